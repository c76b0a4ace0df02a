"""Starts a small search to be disturbed, waits for its work, and checks that it is whole at the end."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray.cluster_utils import Cluster

from byot.search_files import read_trials
from byot.system.files import read_json, read_json_lines
from search.settings import REDUCTION_FACTOR
from search.system.resources import RAY_ENVIRONMENT
from tests.helpers import run_command, start_command

EPOCHS = 18
NUM_SAMPLES = 12
SMALL = ("--dataset", "digits", "--width", 4, "--val-fraction", 0.2, "--confirm", 0)
FLAGS = (*SMALL, "--epochs", EPOCHS, "--num-samples", NUM_SAMPLES)


class Search:
    """One search on this machine, which is killed and gone on with."""

    def __init__(self, outputs: Path, *flags: object) -> None:
        outputs.mkdir(exist_ok=True)
        self.outputs = outputs
        self.folder = outputs / "searches" / "s"
        self.flags = (*FLAGS, *flags, "--name", "s", "--outputs", outputs)
        self.ended_before: dict[str, dict[str, Any]] = {}

    def start(self) -> subprocess.Popen[str]:
        with open(self.outputs / "driver.log", "ab") as log:
            return start_command(self.flags, cwd=self.outputs, script="search/tune.py", output=log)

    def log(self) -> str:
        return (self.outputs / "driver.log").read_text()

    def ended(self) -> dict[str, dict[str, Any]]:
        """Read the rows of the trials that have ended, by trial."""
        rows = {}
        for path in self.folder.glob("trials/t*/trial.json"):
            row = {name: cell for name, cell in read_json(path).items() if name not in ("judged", "curve")}
            if row["status"] != "running":
                rows[path.parent.name] = row
        return rows

    def num_epochs(self) -> int:
        return sum(len(read_json_lines(path)) for path in self.folder.glob("trials/t*/metrics.jsonl"))

    def wait_for_work(self, process: subprocess.Popen[str]) -> None:
        """Wait until a trial has done one more epoch, or the process has ended."""
        before = self.num_epochs()
        self.wait_until(lambda: self.num_epochs() > before, process)

    def wait_until(self, is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        """Wait until it is so, or the process has ended."""
        deadline = time.monotonic() + 600
        while not is_so() and process.poll() is None:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def note_ended(self) -> None:
        """Remember the trials that have ended: their rows must never change again."""
        now_ended = self.ended()
        for trial_id, row in self.ended_before.items():
            assert now_ended[trial_id] == row, "a trial that had ended has changed"
        self.ended_before = now_ended

    def finish(self) -> None:
        run_command(self.flags, cwd=self.outputs, script="search/tune.py")
        self.check_whole()

    def check_whole(self) -> None:
        """Check that all trials are there once, none that had ended was lost or changed, and all records agree."""
        self.note_ended()
        trials = {trial.trial_id: trial for trial in read_trials(self.folder / "trials.csv")}
        assert len(trials) == NUM_SAMPLES == len(list((self.folder / "trials").iterdir()))
        assert {trial_id: trial.to_row() for trial_id, trial in trials.items()} == self.ended_before
        assert {trial.status for trial in trials.values()} <= {"completed", "stopped"}
        assert sorted(trial.role for trial in trials.values())[:2] == ["control", "reference"]
        assert read_json(self.folder / "search.json")["status"] == "finished"
        rungs = [read_json(self.folder / "search.json")["grace_epochs"] * REDUCTION_FACTOR**k for k in range(3)]
        for trial_id, trial in trials.items():
            lines = read_json_lines(self.folder / "trials" / trial_id / "metrics.jsonl")
            assert [line["epoch"] for line in lines] == list(range(1, trial.epochs_done + 1))
            assert lines[-1]["val_accuracy"] == trial.measures["val_accuracy"]
            assert trial.epochs_done in ([EPOCHS] if trial.status == "completed" else rungs)
        whole = [row for row in self.ended_before.values() if row["status"] == "completed" and row["role"] != "control"]
        assert read_json(self.folder / "best.json")["value"] == max(row["val_accuracy"] for row in whole)
        mirrored = load_mirror(self.folder)
        assert sorted(trial.user_attrs["trial_id"] for trial in mirrored) == sorted(trials)
        assert all(trial.state.is_finished() for trial in mirrored)


def load_mirror(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(folder / "optuna.log")))
    (study,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=study, storage=storage).trials


def trial_workers(pid: int) -> list[int]:
    """Find the Ray workers below a driver that run trials."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(path.name)] = (path / "cmdline").read_bytes()
        except OSError:  # gone meanwhile
            continue
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return [child for child in below if names.get(child, b"").startswith(b"ray::ImplicitFunc")]


def kill_quietly(pid: int) -> None:
    with suppress(ProcessLookupError):  # it ended by itself just before
        os.kill(pid, signal.SIGKILL)


ATTEMPTS = 3


@contextmanager
def running_cluster(num_nodes: int, **variables: str) -> Iterator[Cluster]:
    """Run a head that runs no trials, and this many nodes with room for one trial each."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (RAY_ENVIRONMENT | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables).items():
            patch.setenv(name, value)
        cluster = _start(Cluster, initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(num_nodes):
            add_node(cluster)
        yield cluster
        cluster.shutdown()


def add_node(cluster: Cluster, **settings: Any) -> None:
    _start(cluster.add_node, num_cpus=1, **settings)


def _start(start: Callable[..., Any], **settings: Any) -> Any:
    """Start a node, again where it does not come up within Ray's fixed 30 seconds."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return start(**settings)
        except Exception as error:  # Ray has no class of its own for a start that timed out
            if "timed out" not in str(error).lower() or attempt == ATTEMPTS:
                raise
    raise AssertionError


def hiding(folder: Path) -> list[str]:
    """Return what is typed before a command so that nobody else sees what it writes into the folder."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("a process can have no mounts of its own here")
    return ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(folder)]
