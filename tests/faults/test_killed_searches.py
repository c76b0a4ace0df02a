"""Searches whose driver or workers are killed with -9 end whole: nothing lost, nothing twice, as many as asked for."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.conftest import LONG
from tests.faults.searches import Search, kill_quietly, strike_moment, trial_workers
from tests.faults.tally import TALLY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

DRIVER_KILLS = 5 if LONG else 2  # of each search
SEARCHES = 4 if LONG else 1
WORKER_KILLS = 10 if LONG else 2


@pytest.mark.parametrize("number", range(SEARCHES))
def test_killed_driver(tmp_path: Path, moments: random.Random, number: int) -> None:
    search = Search(tmp_path / "outputs")
    with TALLY.attempt("kill -9 of a search's driver", DRIVER_KILLS):
        for _ in range(DRIVER_KILLS):
            process = search.start()
            strike_moment(search, process, moments)
            search.kill_driver(process)
        search.finish()


def test_killed_workers(tmp_path: Path, moments: random.Random) -> None:
    """However often its workers are killed, no trial that gets on is given up."""
    search = Search(tmp_path / "outputs")
    process = search.start()
    killed: set[int] = set()
    with TALLY.attempt("kill -9 of a search's worker", WORKER_KILLS):
        for _ in range(WORKER_KILLS):
            search.wait_for_work(process)
            time.sleep(moments.uniform(0, 1))
            workers = [pid for pid in trial_workers(process.pid) if pid not in killed]
            assert workers, "no worker was at work"
            victim = moments.choice(workers)
            kill_quietly(victim)
            killed.add(victim)
        assert process.wait(timeout=600) == 0, (search.outputs / "driver.log").read_text()
        search.check_whole()


@pytest.mark.parametrize("stop_signal", [signal.SIGINT, signal.SIGTERM] if LONG else [signal.SIGINT])
def test_a_search_asked_to_stop_says_how_to_go_on(tmp_path: Path, stop_signal: signal.Signals) -> None:
    search = Search(tmp_path / "outputs")
    with TALLY.attempt(f"{stop_signal.name} of a search's driver"):
        process = search.start()
        search.wait_for_work(process)
        process.send_signal(stop_signal)
        assert process.wait(timeout=120) == 128 + stop_signal
        said = (search.outputs / "driver.log").read_text()
        assert "go on with: " in said
        assert "--name s" in said
        assert "Traceback" not in said
        search.note_ended()
        search.finish()
