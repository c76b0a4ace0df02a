"""Kills byot/train.py with -9 again and again; it ends in the weights of a run that nobody killed."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from byot.system.checkpoint import checkpoint_path, load_checkpoint
from byot.system.files import read_json, read_json_lines
from tests.faults.conftest import LONG
from tests.faults.tally import TALLY
from tests.helpers import PROJECT, assert_same_state, command_environment, command_line, run_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

EPOCHS = 40
FLAGS = ("--dataset", "digits", "--width", 4, "--epochs", EPOCHS, "--val-fraction", 0.1, "--name", "run", "--outputs")
STAGES = ("half", "written", "renamed")
RUNS = 5 if LONG else 1
KILLS = 7 if LONG else 4  # of each run at a random moment
KILLS_IN_WRITES = 3 if LONG else 1


def start(outputs: Path, script: str, *arguments: object) -> subprocess.Popen[str]:
    command = command_line(script, *arguments, *FLAGS, outputs)
    environment = command_environment(PYTHONPATH=str(PROJECT))
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=outputs, env=environment, stdout=pipe, stderr=pipe, text=True)


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


def test_killed_runs_end_as_if_they_had_not_been(tmp_path: Path, moments: random.Random) -> None:
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
    result = run_command([*FLAGS, outputs], cwd=outputs)
    assert result.returncode == 0, result.stderr
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
