"""Kills the driver and the workers of searches with -9; they end whole: nothing lost, nothing twice."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from byot.search_files import find_best, load_confirmation
from tests.faults.conftest import LONG
from tests.faults.searches import Search, kill_quietly, trial_workers
from tests.faults.tally import TALLY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

DRIVER_KILLS = 5 if LONG else 2  # of each search
SEARCHES = 4 if LONG else 1
WORKER_KILLS = 10 if LONG else 2


@pytest.mark.parametrize("number", range(SEARCHES))
def test_killed_driver(tmp_path: Path, moments: random.Random, number: int) -> None:
    """While it tries settings, and once while it runs the best again over fresh seeds."""
    search = Search(tmp_path / "outputs", "--confirm", 1, "--confirm-seeds", 3)
    with TALLY.attempt("kill -9 of a search's driver", DRIVER_KILLS + 1):
        for _ in range(DRIVER_KILLS):
            process = search.start()
            if moments.random() < 0.2:  # now and then while it starts
                time.sleep(moments.uniform(0, 10))
            else:
                search.wait_for_work(process)
                time.sleep(moments.uniform(0, 2))
            process.kill()
            assert process.wait() == -signal.SIGKILL, f"it ended before it could be killed: {search.log()}"
            search.note_ended()
        process = search.start()
        done = "confirmation/*/result.json"
        search.wait_until(lambda: any(search.folder.glob(done)), process)
        process.kill()
        assert process.wait() == -signal.SIGKILL, f"it ended before it could be killed: {search.log()}"
        before = {path: path.stat().st_mtime_ns for path in search.folder.glob(done)}
        search.finish()
        assert {path: path.stat().st_mtime_ns for path in before} == before, "a run that had ended was done again"
        confirmation = load_confirmation(search.folder)
        assert confirmation is not None
        assert (confirmation.status, confirmation.num_rounds) == ("finished", 3)
        assert find_best(search.outputs, "s").settings == confirmation.fields["config"]


def test_killed_workers(tmp_path: Path, moments: random.Random) -> None:
    """However often its workers are killed, no trial that gets on is given up."""
    search = Search(tmp_path / "outputs")
    process = search.start()
    killed: set[int] = set()
    with TALLY.attempt("kill -9 of a search's worker", WORKER_KILLS):
        while len(killed) < WORKER_KILLS:
            search.wait_for_work(process)
            assert process.poll() is None, f"it ended before its workers could be killed: {search.log()}"
            time.sleep(moments.uniform(0, 1))
            workers = [pid for pid in trial_workers(process.pid) if pid not in killed]
            if workers:  # between two trials there is none
                victim = moments.choice(workers)
                kill_quietly(victim)
                killed.add(victim)
        assert process.wait(timeout=600) == 0, search.log()
        search.check_whole()


@pytest.mark.parametrize("stop_signal", [signal.SIGINT, signal.SIGTERM])
def test_a_search_asked_to_stop_says_how_to_go_on(tmp_path: Path, stop_signal: signal.Signals) -> None:
    """A terminal, `timeout` and batch systems ask the whole process group, so Ray must not be in it."""
    search = Search(tmp_path / "outputs")
    with TALLY.attempt(f"{stop_signal.name} of a search's driver"):
        process = search.start()
        search.wait_for_work(process)
        os.killpg(process.pid, stop_signal)
        assert process.wait(timeout=120) == 128 + stop_signal
        assert "go on with: " in search.log()
        assert "--name s" in search.log()
        assert "Traceback" not in search.log()
        search.note_ended()
        search.finish()
