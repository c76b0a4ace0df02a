"""byot/train.py killed with -9 again and again ends in the weights of a run that never was."""

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
from tests.helpers import PROJECT, TIMES, assert_same_state, command_environment, command_line, run_command

EPOCHS = 40
FLAGS = ("--dataset", "digits", "--width", 4, "--epochs", EPOCHS, "--val-fraction", 0.1, "--name", "run")
STAGES = ("half", "written", "renamed")
KILLS_A_RUN = 10 if LONG else 5
RUNS = 5 if LONG else 1


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("unbroken")
    result = run_command([*FLAGS, "--outputs", outputs], cwd=outputs)
    assert result.returncode == 0, result.stderr
    return outputs / "runs" / "run"


def start(outputs: Path, *before: object) -> subprocess.Popen[str]:
    script, *more = (*before, PROJECT / "byot/train.py") if before else ("byot/train.py",)
    command = command_line(str(script), *more, *FLAGS, "--outputs", outputs)
    environment = command_environment(PYTHONPATH=str(PROJECT))
    return subprocess.Popen(
        command, cwd=outputs, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kill_at_random(outputs: Path, moments: random.Random) -> None:
    """Kill it somewhere between its start and a third of a second's work."""
    process = start(outputs)
    assert process.stdout is not None
    if moments.random() < 0.9:
        process.stdout.readline()  # it has read its data
        time.sleep(moments.uniform(0, 0.3))
    else:
        time.sleep(moments.uniform(0, 4))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it had ended before it could be killed"


def kill_in_write(outputs: Path, moments: random.Random) -> None:
    """Let it kill itself inside one of the next checkpoint writes."""
    stage = moments.choice(STAGES)
    process = start(outputs, "tests/faults/killed_in_write.py", "epoch-*.pt", moments.randint(1, 3), stage)
    _, said = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, said


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_runs_end_as_if_they_had_not_been(tmp_path: Path, unbroken: Path, moments: random.Random) -> None:
    for number in range(RUNS):
        outputs = tmp_path / str(number)
        outputs.mkdir()
        in_writes = KILLS_A_RUN // 3
        with (
            TALLY.attempt("kill -9 of train.py at a random moment", KILLS_A_RUN - in_writes),
            TALLY.attempt("kill -9 of train.py inside a checkpoint write", in_writes),
        ):
            kinds = [kill_in_write] * in_writes + [kill_at_random] * (KILLS_A_RUN - in_writes)
            moments.shuffle(kinds)
            for kill in kinds:
                kill(outputs, moments)
            result = run_command([*FLAGS, "--outputs", outputs], cwd=outputs)
            assert result.returncode == 0, result.stderr
            check_same_run(outputs / "runs" / "run", unbroken)


def check_same_run(folder: Path, unbroken: Path) -> None:
    found, expected = (load_checkpoint(checkpoint_path(f / "checkpoints", EPOCHS)) for f in (folder, unbroken))
    assert_same_state(found, expected)
    lines = [read_json_lines(f / "metrics.jsonl") for f in (folder, unbroken)]
    assert [line["epoch"] for line in lines[0]] == list(range(1, EPOCHS + 1))
    results = [read_json(f / "result.json") for f in (folder, unbroken)]
    for a, b in zip((*lines[0], results[0]), (*lines[1], results[1]), strict=True):
        assert {k: v for k, v in a.items() if k not in TIMES} == {k: v for k, v in b.items() if k not in TIMES}
    assert not list(folder.rglob("*.tmp"))
