"""A small search to be disturbed: started, waited for, and checked to be whole at the end."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from byot.system.files import read_json, read_json_lines
from search.records import Row, read_rows
from search.settings import REDUCTION_FACTOR, grace_epochs
from tests.helpers import command_environment, command_line, run_command

EPOCHS = 18
NUM_SAMPLES = 12
FLAGS = ("--dataset", "digits", "--width", 4, "--epochs", EPOCHS, "--num-samples", NUM_SAMPLES, "--val-fraction", 0.2)


class Search:
    """One search on this machine, which is killed and gone on with."""

    def __init__(self, outputs: Path, *flags: object) -> None:
        outputs.mkdir(exist_ok=True)
        self.outputs = outputs
        self.folder = outputs / "searches" / "s"
        self.flags = (*FLAGS, *flags, "--name", "s", "--outputs", outputs)
        self.ended_before: dict[str, Row] = {}

    def start(self) -> subprocess.Popen[bytes]:
        with open(self.outputs / "driver.log", "ab") as log:
            return subprocess.Popen(
                command_line("search/tune.py", *self.flags),
                cwd=self.outputs,
                env=command_environment(),
                stdout=log,
                stderr=log,
            )

    def ended(self) -> dict[str, Row]:
        rows = {}
        for path in self.folder.glob("trials/t*/trial.json"):
            row = {name: cell for name, cell in read_json(path).items() if name not in ("judged", "curve")}
            if row["status"] != "running":
                rows[path.parent.name] = row
        return rows

    def num_epochs(self) -> int:
        return sum(len(read_json_lines(path)) for path in self.folder.glob("trials/t*/metrics.jsonl"))

    def wait_for_work(self, process: subprocess.Popen[bytes], limit_s: float = 120) -> None:
        """Until a trial has done an epoch in this process' time."""
        before, deadline = self.num_epochs(), time.monotonic() + limit_s
        while self.num_epochs() <= before and process.poll() is None:
            assert time.monotonic() < deadline, (self.outputs / "driver.log").read_text()
            time.sleep(0.02)

    def kill_driver(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it had ended before it could be killed"
        self.note_ended()

    def note_ended(self) -> None:
        """Remember the trials that have ended: their rows must never change again."""
        now_ended = self.ended()
        for trial_id, row in self.ended_before.items():
            assert now_ended[trial_id] == row, "a trial that had ended has changed"
        self.ended_before = now_ended

    def finish(self) -> None:
        result = run_command([*self.flags], cwd=self.outputs, script="search/tune.py")
        assert result.returncode == 0, result.stdout + result.stderr
        self.check_whole()

    def check_whole(self, num_samples: int = NUM_SAMPLES) -> None:
        """All that was asked for is there once, nothing that had ended was lost or changed, and all records agree."""
        self.note_ended()
        rows = {row["trial_id"]: row for row in read_rows(self.folder / "trials.csv")}
        assert len(rows) == num_samples == len(list((self.folder / "trials").iterdir()))
        assert rows == self.ended_before
        assert {row["status"] for row in rows.values()} <= {"completed", "stopped"}
        assert sorted(row["role"] for row in rows.values())[:2] == ["control", "reference"]
        assert read_json(self.folder / "search.json")["status"] == "finished"
        rungs = [grace_epochs(EPOCHS) * REDUCTION_FACTOR**k for k in range(3)]
        for trial_id, row in rows.items():
            lines = read_json_lines(self.folder / "trials" / trial_id / "metrics.jsonl")
            assert [line["epoch"] for line in lines] == list(range(1, row["epochs_done"] + 1))
            assert lines[-1]["val_accuracy"] == row["val_accuracy"]
            assert row["epochs_done"] == EPOCHS if row["status"] == "completed" else row["epochs_done"] in rungs
        best = max((r for r in rows.values() if r["status"] == "completed" and r["role"] != "control"), key=value_of)
        assert read_json(self.folder / "best.json")["value"] == best["val_accuracy"]
        mirrored = load_mirror(self.folder)
        assert sorted(trial.user_attrs["trial_id"] for trial in mirrored) == sorted(rows)
        assert all(trial.state.is_finished() for trial in mirrored)


def value_of(row: Row) -> float:
    value: float = row["val_accuracy"]
    return value


def load_mirror(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(folder / "optuna.log")))
    (study,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=study, storage=storage).trials


def strike_moment(search: Search, process: subprocess.Popen[bytes], moments: random.Random) -> None:
    """Wait until a random moment: mostly while trials run, now and then while all starts."""
    if moments.random() < 0.2:
        time.sleep(moments.uniform(0, 10))
    else:
        search.wait_for_work(process)
        time.sleep(moments.uniform(0, 2))


def descendants(pid: int) -> dict[int, str]:
    """The processes below one, with their command lines."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # gone meanwhile
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {child: names[child] for child in found - {pid} if child in names}


def trial_workers(pid: int) -> list[int]:
    """The Ray workers below a driver that run trials."""
    return [child for child, name in descendants(pid).items() if name.startswith("ray::ImplicitFunc")]


def kill_quietly(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # it ended by itself just before
        return
