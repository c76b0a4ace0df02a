"""Sends the figures of a run or trial, epoch by epoch, to TensorBoard, Weights & Biases or MLflow.

Trackers are for looking only: nothing is read back from them, and one that fails is told of once and left, while the
training goes on. Weights & Biases and MLflow read their own environment variables, such as WANDB_PROJECT, WANDB_MODE
and MLFLOW_TRACKING_URI.
"""

import os
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from byot.system.files import UnreadableError, read_json, write_json
from byot.system.stopping import TrainingError

Tracker = Literal["tensorboard", "wandb", "mlflow"]
PROJECT = "byot"  # at Weights & Biases; MLflow's experiment of runs that belong to no search
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}  # what pip installs
IDS_FILE = "tracking.json"  # in the folder of a run or trial: under which id each tracker knows it
Settings = Mapping[str, Any]
Record = Mapping[str, Any]  # of an epoch, its number under "epoch"


class TrackedRun(Protocol):
    """A run or trial in one tracker."""

    @property
    def id(self) -> str | None:
        """Under which the tracker goes on with it."""

    @property
    def last_epoch(self) -> int:
        """The last one that the tracker has already."""

    def log(self, record: Record) -> None:
        """Send an epoch's figures."""

    def end(self, failed: bool, measures: Mapping[str, float]) -> None:
        """Close it; `measures` are what it came to, nothing for a run that goes on later."""


class Tracking:
    """The trackers of one run or trial, which lies in a folder of its own."""

    def __init__(self, trackers: Sequence[Tracker], folder: Path, settings: Settings, group: str = PROJECT) -> None:
        """Open the trackers, or go on in them. Raises ValueError where one cannot be, such as without a login."""
        self.open: dict[Tracker, TrackedRun] = {}
        ids: dict[str, str] = {}
        with suppress(UnreadableError):
            ids = read_json(folder / IDS_FILE)
        for tracker in trackers:
            try:
                self.open[tracker] = TRACKERS[tracker](folder, settings, group, ids.get(tracker))
            except Exception as error:
                raise ValueError(f"{tracker} cannot be used: {describe(error)}") from error
        known = {tracker: run.id for tracker, run in self.open.items() if run.id is not None}
        if known:
            write_json(folder / IDS_FILE, ids | known)

    def log(self, record: Record) -> None:
        """Send an epoch's figures to the trackers that lack them."""
        self._tell_each(lambda run: run.log(record) if record["epoch"] > run.last_epoch else None)

    def end(self, measures: Mapping[str, float], failed: bool = False) -> None:
        self._tell_each(lambda run: run.end(failed, measures))
        self.open = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Close what was not ended: the run was stopped, and goes on later, or cannot."""
        self.end({}, failed=isinstance(error, TrainingError))

    def _tell_each(self, tell: Callable[[TrackedRun], None]) -> None:
        for tracker, run in list(self.open.items()):
            try:
                tell(run)
            except Exception as error:
                del self.open[tracker]
                warnings.warn(f"{tracker} gets no more figures of this run: {describe(error)}", stacklevel=3)


def check_trackers(trackers: Sequence[Tracker]) -> None:
    """Raise ValueError where a tracker's package is missing."""
    for tracker in trackers:
        if find_spec(tracker) is None:
            raise ValueError(f"{tracker} is not installed: pip install {PACKAGES[tracker]}")


def describe(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def simple(values: Mapping[str, Any]) -> dict[str, Any]:
    """Select what every tracker can show: numbers and texts."""
    return {name: value for name, value in values.items() if isinstance(value, int | float | str)}


class TensorBoardRun:
    """Event files in the folder's tensorboard/."""

    id: str | None = None
    last_epoch = 0  # a reader hides what was written of an epoch before: it is written again

    def __init__(self, folder: Path, settings: Settings, group: str, id: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer, self.settings, self.epoch = SummaryWriter(str(folder / "tensorboard"), purge_step=1), settings, 0

    def log(self, record: Record) -> None:
        self.epoch = record["epoch"]
        for name, value in record.items():
            self.writer.add_scalar(name, value, self.epoch)

    def end(self, failed: bool, measures: Mapping[str, float]) -> None:
        if measures:
            self.writer.add_hparams(simple(self.settings), dict(measures), run_name=".", global_step=self.epoch)
        self.writer.close()


class WandbRun:
    """A run at Weights & Biases, or in the folder's wandb/ where it works offline."""

    def __init__(self, folder: Path, settings: Settings, group: str, id: str | None) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=group,
            name=folder.name,
            id=id,
            resume="allow",
            config=simple(settings),
            dir=folder,
            reinit="create_new",  # several at once in a search
            settings=wandb.Settings(console="off", silent=True),
        )
        self.id, self.last_epoch = self.run.id, self.run.step - 1 if self.run.resumed else 0

    def log(self, record: Record) -> None:
        self.run.log(dict(record), step=record["epoch"])

    def end(self, failed: bool, measures: Mapping[str, float]) -> None:
        self.run.summary.update(dict(measures))
        self.run.finish(exit_code=int(failed))


class MLflowRun:
    """A run where MLFLOW_TRACKING_URI says, else where MLflow itself keeps runs: mlflow.db in the current folder."""

    def __init__(self, folder: Path, settings: Settings, group: str, id: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.metric = Metric
        self.client = MlflowClient()
        if id is None:
            found = self.client.get_experiment_by_name(group)
            experiment = found.experiment_id if found else self.client.create_experiment(group)
            id = self.client.create_run(experiment, run_name=folder.name).info.run_id
            self.client.log_batch(id, params=[Param(name, str(value)) for name, value in simple(settings).items()])
        self.id = id
        self.last_epoch = int(self.client.get_run(id).data.metrics.get("epoch", 0))

    def log(self, record: Record) -> None:
        self._log(record, record["epoch"])

    def end(self, failed: bool, measures: Mapping[str, float]) -> None:
        self._log(measures, 0)
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED" if measures else "KILLED")

    def _log(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self.metric(re.sub(r"[^\w./ -]", "-", name), float(v), now, step) for name, v in values.items()]
        self.client.log_batch(self.id, metrics=metrics)


TRACKERS: dict[Tracker, Callable[[Path, Settings, str, str | None], TrackedRun]] = {
    "tensorboard": TensorBoardRun,
    "wandb": WandbRun,
    "mlflow": MLflowRun,
}
