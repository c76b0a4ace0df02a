"""Kills runs, and drivers and workers of searches, with -9: they end whole, a run in the same weights as unkilled."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from byot.search_files import find_best, load_confirmation
from byot.system.checkpoint import checkpoint_path, load_checkpoint
from byot.system.files import read_json, read_json_lines
from tests.faults.conftest import LONG, TALLY
from tests.faults.searches import Search, kill_quietly, trial_workers
from tests.helpers import PROJECT, assert_same_state, run_command, start_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

EPOCHS = 40
FLAGS = ("--dataset", "digits", "--width", 4, "--epochs", EPOCHS, "--val-fraction", 0.1, "--name", "run", "--outputs")
STAGES = ("half", "written", "renamed")
RUNS = 5 if LONG else 1
KILLS = 7 if LONG else 4  # of each run at a random moment
KILLS_IN_WRITES = 3 if LONG else 1


def start(outputs: Path, script: str, *arguments: object) -> subprocess.Popen[str]:
    return start_command([*arguments, *FLAGS, outputs], cwd=outputs, script=script, PYTHONPATH=str(PROJECT))


def kill_at_random(outputs: Path, moments: random.Random) -> subprocess.Popen[str]:
    """Kill it mostly while it trains, now and then while it starts."""
    process = start(outputs, "byot/train.py")
    assert process.stdout is not None
    if moments.random() < 0.9:
        process.stdout.readline()  # it has read its data
        time.sleep(moments.uniform(0, 0.3))
    else:
        time.sleep(moments.uniform(0, 4))
    process.kill()
    return process


def kill_in_write(outputs: Path, moments: random.Random) -> subprocess.Popen[str]:
    """Let it kill itself inside one of the next checkpoint writes."""
    strike = ("epoch-*.pt", moments.randint(1, 3), moments.choice(STAGES))
    return start(outputs, "tests/faults/killed_in_write.py", *strike, PROJECT / "byot/train.py")


def test_killed_runs_end_as_if_they_had_not_been(tmp_path, moments):
    (tmp_path / "unbroken").mkdir()
    unbroken = finish(tmp_path / "unbroken")
    for number in range(RUNS):
        outputs = tmp_path / str(number)
        outputs.mkdir()
        with (
            TALLY.attempt("kill -9 of train.py at a random moment", KILLS),
            TALLY.attempt("kill -9 of train.py inside a checkpoint write", KILLS_IN_WRITES),
        ):
            kinds = [kill_at_random] * KILLS + [kill_in_write] * KILLS_IN_WRITES
            moments.shuffle(kinds)
            for kill in kinds:
                process = kill(outputs, moments)
                _, said = process.communicate(timeout=300)
                assert process.returncode == -signal.SIGKILL, f"it ended before it could be killed: {said}"
            check_same_run(finish(outputs), unbroken)


def finish(outputs: Path) -> Path:
    run_command([*FLAGS, outputs], cwd=outputs)
    return outputs / "runs" / "run"


def check_same_run(folder: Path, unbroken: Path) -> None:
    found, expected = (load_checkpoint(checkpoint_path(f / "checkpoints", EPOCHS)) for f in (folder, unbroken))
    assert_same_state(found, expected)
    lines, expected_lines = (
        [*read_json_lines(f / "metrics.jsonl"), read_json(f / "result.json")] for f in (folder, unbroken)
    )
    assert [line.get("epoch") for line in lines[:-1]] == list(range(1, EPOCHS + 1))
    assert_same_state(lines, expected_lines)
    assert not list(folder.rglob("*.tmp"))


DRIVER_KILLS = 5 if LONG else 2  # of each search
SEARCHES = 4 if LONG else 1
WORKER_KILLS = 10 if LONG else 2


@pytest.mark.parametrize("number", range(SEARCHES))
def test_killed_driver(tmp_path, moments, number):
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


def test_killed_workers(tmp_path, moments):
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
def test_a_search_asked_to_stop_says_how_to_go_on(tmp_path, stop_signal):
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
