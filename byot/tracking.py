"""Sends the figures of runs and trials, epoch by epoch, to TensorBoard, Weights & Biases or MLflow.

Trackers are for looking only: nothing is read back from them, and one that fails is told of once and left, while the
training goes on. Weights & Biases and MLflow read their own environment variables, such as WANDB_PROJECT, WANDB_MODE
and MLFLOW_TRACKING_URI.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from byot.system.files import UnreadableError, read_json, write_json
from byot.system.paths import default_outputs
from byot.system.stopping import TrainingError

Tracker = Literal["tensorboard", "wandb", "mlflow", "none"]
PROJECT = "byot"  # at Weights & Biases; MLflow's experiment of runs that belong to no search
PIP_NAMES = {"mlflow": "mlflow-skinny"}  # of a tracker whose package has another name
# MLflow's own would try a server that does not answer for four minutes and more.
MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
IDS_FILE = "tracking.json"  # in the folder of a run or trial: under which id each tracker knows it
Settings = Mapping[str, Any]
Record = Mapping[str, Any]  # of an epoch, its number under "epoch"
Tell = Callable[[str], None]


class Trackers:
    """The trackers that are asked for and have not failed; all trials of a search share them."""

    def __init__(self, names: Iterable[Tracker], tell: Tell) -> None:
        self.names = [name for name in dict.fromkeys(names) if name != "none"]
        self.tell = tell

    def call(self, name: Tracker, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that needs the tracker; where that fails, tell so and do without it from now on."""
        try:
            return function(*arguments)
        except Exception as error:
            if name in self.names:
                self.names.remove(name)
                self.tell(f"{name} gets no more figures: {describe(error)}")
            return None


class Tracking:
    """One run or trial in its trackers. What they need to go on with it lies in its folder."""

    def __init__(self, trackers: Trackers, folder: Path, settings: Settings, group: str = PROJECT) -> None:
        self.trackers = trackers
        self.runs: dict[Tracker, TrackedRun] = {}
        ids: dict[str, str] = {}
        with suppress(UnreadableError):
            ids = read_json(folder / IDS_FILE)
        for name in list(trackers.names):
            run = trackers.call(name, TRACKED_RUNS[name], folder, settings, group, ids.get(name))
            if run is not None:
                self.runs[name] = run
        known = {name: run.id for name, run in self.runs.items() if run.id is not None}
        if known != {name: ids.get(name) for name in known}:
            write_json(folder / IDS_FILE, ids | known)
        self.last_epochs = {name: run.last_epoch for name, run in self.runs.items()}

    def log(self, record: Record) -> None:
        """Send an epoch's figures to the trackers that lack them."""
        for name, run in self.runs.items():
            if name in self.trackers.names and record["epoch"] > self.last_epochs[name]:
                self.trackers.call(name, run.log, record)
                self.last_epochs[name] = record["epoch"]

    def end(self, measures: Mapping[str, float], failed: bool = False) -> None:
        """Close it; `measures` are the result, nothing for a run that goes on later."""
        for name, run in self.runs.items():
            if name in self.trackers.names:
                self.trackers.call(name, run.end, failed, measures)
        self.runs = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Close a run without a result: it was stopped, or it cannot go on."""
        self.end({}, failed=isinstance(error, TrainingError))


def trackers_of(folder: Path) -> list[Tracker]:
    """Find the trackers that a run was started with; TensorBoard alone for a new one."""
    known: dict[str, Any] = {}
    with suppress(UnreadableError):
        known = read_json(folder / IDS_FILE)
    found: list[Tracker] = [name for name in TRACKED_RUNS if name in known or (folder / name).is_dir()]
    return found if found or (folder / "checkpoints").is_dir() else ["tensorboard"]


def check_trackers(names: Iterable[Tracker]) -> None:
    """Raise ValueError where a tracker cannot be used: its package is missing, or a login, or its server."""
    for name in (name for name in names if name != "none"):
        if find_spec(name) is None:
            raise ValueError(f"{name} is not installed: pip install {PIP_NAMES.get(name, name)}")
        try:
            if name == "wandb":
                check_wandb()
            elif name == "mlflow":
                mlflow_client().search_experiments(max_results=1)
        except Exception as error:
            raise ValueError(f"{name} cannot be used: {describe(error)}") from error


def describe(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def loggable(settings: Settings) -> dict[str, Any]:
    """Select what every tracker can show: numbers and texts."""
    return {name: value for name, value in settings.items() if isinstance(value, int | float | str)}


# ---------------------------------------------------------------- a run in each of the trackers


class TrackedRun(Protocol):
    """A run or trial in one tracker."""

    @property
    def id(self) -> str | None:
        """The id under which the tracker goes on with this run."""

    @property
    def last_epoch(self) -> int:
        """The last epoch that the tracker had when this was opened."""

    def log(self, record: Record) -> None:
        """Send an epoch's figures."""

    def end(self, failed: bool, measures: Mapping[str, float]) -> None:
        """Close it, with the result if there is one."""


class TensorBoardRun:
    """Writes event files into the folder's tensorboard/.

    A run that goes on writes all its epochs again; the new file hides the old ones.
    """

    id: str | None = None
    last_epoch = 0

    def __init__(self, folder: Path, settings: Settings, group: str, id: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer, self.settings, self.epoch = SummaryWriter(str(folder / "tensorboard"), purge_step=1), settings, 0

    def log(self, record: Record) -> None:
        self.epoch = record["epoch"]
        for name, value in record.items():
            self.writer.add_scalar(name, value, self.epoch)

    def end(self, failed: bool, measures: Mapping[str, float]) -> None:
        if measures:
            results = {f"hparam/{name}": value for name, value in measures.items()}
            self.writer.add_hparams(loggable(self.settings), results, run_name=".", global_step=self.epoch)
        self.writer.close()


def check_wandb() -> None:
    """Raise ValueError where a login is missing: wandb itself would ask for it in the middle of the work."""
    import wandb

    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
        raise ValueError("there is no login; `wandb login` makes one, WANDB_MODE=offline does without")


class WandbRun:
    """A run at Weights & Biases, or in the folder's wandb/ where it works offline."""

    def __init__(self, folder: Path, settings: Settings, group: str, id: str | None) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=group,
            name=folder.name,
            id=id,
            resume="allow",
            config=loggable(settings),
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


def mlflow_client() -> Any:
    """Connect to where MLFLOW_TRACKING_URI says, else to mlflow.db in the default outputs folder."""
    default_outputs().mkdir(parents=True, exist_ok=True)
    defaults = {**MLFLOW_PATIENCE, "MLFLOW_TRACKING_URI": f"sqlite:///{default_outputs() / 'mlflow.db'}"}
    os.environ.update({name: os.environ.get(name) or value for name, value in defaults.items()})
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # they tell of each table that they make
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient()


class MLflowRun:
    """A run at MLflow; one that the server does not know any more begins anew."""

    def __init__(self, folder: Path, settings: Settings, group: str, id: str | None) -> None:
        self.client = mlflow_client()
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        self.metric, self.epoch, self.logged = Metric, 0, set[str]()
        found = None
        with suppress(MlflowException):
            found = None if id is None else self.client.get_run(id)
        if found is None:
            known = self.client.get_experiment_by_name(group)
            experiment = known.experiment_id if known else self.client.create_experiment(group)
            found = self.client.create_run(experiment, run_name=folder.name)
            params = [Param(name, str(value)) for name, value in loggable(settings).items()]
            self.client.log_batch(found.info.run_id, params=params)
        else:
            self.client.update_run(id, status="RUNNING")
        self.id, self.last_epoch = found.info.run_id, int(found.data.metrics.get("epoch", 0))

    def log(self, record: Record) -> None:
        self.epoch = record["epoch"]
        now = int(1000 * time.time())
        values = {re.sub(r"[^\w./ -]", "-", name): float(value) for name, value in record.items()}
        self.client.log_batch(self.id, [self.metric(name, value, now, self.epoch) for name, value in values.items()])
        self.logged |= set(record)

    def end(self, failed: bool, measures: Mapping[str, float]) -> None:
        new = {name: value for name, value in measures.items() if name not in self.logged}
        if new:
            self.log({"epoch": self.epoch, **new})
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED" if measures else "KILLED")


TRACKED_RUNS: dict[Tracker, Callable[[Path, Settings, str, str | None], TrackedRun]] = {
    "tensorboard": TensorBoardRun,
    "wandb": WandbRun,
    "mlflow": MLflowRun,
}
