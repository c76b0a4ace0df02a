"""What TensorBoard, Weights & Biases and MLflow get of a run, also of one that is stopped and goes on."""

import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from byot import tracking
from byot.system.files import read_json, write_json
from byot.system.stopping import DivergedError, StoppedError
from byot.tracking import Tracker, Trackers, Tracking, check_trackers, trackers_of
from search.callback import SearchWatch
from search.table import LiveTable
from tests.helpers import run_command
from tests.test_callback import Driver

ALL: tuple[Tracker, ...] = ("tensorboard", "wandb", "mlflow")
SETTINGS = {"alpha": 0.1, "model": "resnet18", "data_dir": None}


def open_all(folder: Path, *names: Tracker, group: str = tracking.PROJECT) -> tuple[Tracking, list[str]]:
    """Open a run in trackers; whatever is told of them is in the list."""
    told: list[str] = []
    return Tracking(Trackers(names, told.append), folder, SETTINGS, group), told


def test_a_run_without_trackers_goes_on_without(tmp_path):
    assert trackers_of(tmp_path) == ["tensorboard"], "a new run"
    (tmp_path / "checkpoints").mkdir()
    assert trackers_of(tmp_path) == []
    (tmp_path / "tensorboard").mkdir()
    assert trackers_of(tmp_path) == ["tensorboard"]


def record(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "train_loss": 1 / epoch, "val_accuracy": 10.0 * epoch}


def events_in(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard")).Reload()


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow with a database of its own, and Weights & Biases offline."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    from mlflow import MlflowClient

    return MlflowClient()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within the trackers
def test_every_tracker_has_each_epoch_of_a_run_that_was_stopped_once(tmp_path, client):
    folder = tmp_path / "run"
    first, told = open_all(folder, *ALL, *ALL, group="group")
    with suppress(StoppedError), first:
        for epoch in (1, 2, 1, 2):  # as a trial does whose worker died
            first.log(record(epoch))
        raise StoppedError(15)
    (found,) = client.search_runs([client.get_experiment_by_name("group").experiment_id])
    assert found.info.status == "KILLED"
    with open_all(folder, *ALL, group="group")[0] as second:
        (found,) = client.search_runs([client.get_experiment_by_name("group").experiment_id])
        assert found.info.status == "RUNNING"
        for epoch in (1, 2, 3):
            second.log(record(epoch))
        second.end({"test_accuracy": 61.5, "val_accuracy": 30.0})
    assert told == []

    (found,) = client.search_runs([client.get_experiment_by_name("group").experiment_id])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert found.data.params == {"alpha": "0.1", "model": "resnet18"}
    assert found.data.metrics["test_accuracy"] == 61.5
    history = client.get_metric_history(found.info.run_id, "train_loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert [point.step for point in client.get_metric_history(found.info.run_id, "val_accuracy")] == [1, 2, 3]

    events = events_in(folder)
    assert [event.step for event in events.Scalars("val_accuracy")] == [1, 2, 3]
    assert events.Scalars("hparam/test_accuracy")[-1].value == 61.5
    assert events.PluginTagToContent("hparams")

    known = read_json(folder / tracking.IDS_FILE)["wandb"]
    parts = [path.name for path in (folder / "wandb").glob("offline-run-*/*.wandb")]
    assert parts == [f"run-{known}.wandb"] * 2, "both parts are synchronised into one run"


def test_a_run_that_cannot_go_on_has_failed(tmp_path, client):
    with suppress(DivergedError), open_all(tmp_path / "run", "mlflow")[0] as opened:
        opened.log(record(1))
        raise DivergedError("nan")
    (found,) = client.search_runs([client.get_experiment_by_name(tracking.PROJECT).experiment_id])
    assert found.info.status == "FAILED"


def test_a_run_that_mlflow_has_forgotten_begins_anew(tmp_path, client):
    write_json(tmp_path / "run" / tracking.IDS_FILE, {"mlflow": "f" * 32})
    opened, told = open_all(tmp_path / "run", "mlflow")
    opened.end({})
    assert told == []
    assert client.get_run(read_json(tmp_path / "run" / tracking.IDS_FILE)["mlflow"]).info.run_name == "run"


def test_a_tracker_that_fails_is_left_and_told_of_once(tmp_path, monkeypatch):
    """Also by the next trial of the same search."""

    class Broken(tracking.TensorBoardRun):
        def __init__(self, folder: Path, *more: Any) -> None:
            super().__init__(folder / "elsewhere", *more)  # event files of one second are read in any order

        def log(self, record: Any) -> None:
            raise ConnectionError("no route to the server\nand more")

    monkeypatch.setitem(tracking.TRACKED_RUNS, "wandb", Broken)
    told: list[str] = []
    trackers = Trackers(["wandb", "tensorboard"], told.append)
    for trial in ("first", "second"):
        opened = Tracking(trackers, tmp_path / trial, SETTINGS)
        opened.log(record(1))
        opened.log(record(2))
        opened.end({})
        assert [event.step for event in events_in(tmp_path / trial).Scalars("train_loss")] == [1, 2]
    assert told == ["wandb gets no more figures: no route to the server"]


def test_a_server_that_does_not_answer_is_refused_soon(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(ValueError, match="mlflow cannot be used: "):
        check_trackers(["mlflow"])
    assert time.monotonic() - began < 60


def test_what_is_missing_is_said_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "mlflow" else name)
    check_trackers(["tensorboard", "none"])
    with pytest.raises(ValueError, match="mlflow is not installed: pip install mlflow-skinny"):
        check_trackers(["wandb", "mlflow"])
    flags = ("--dataset", "digits", "--width", 4, "--outputs", tmp_path, "--track", "wandb")
    done = run_command(flags, cwd=tmp_path, code=2, WANDB_MODE="online", WANDB_API_KEY="", HOME=str(tmp_path))
    assert done.stdout == ""
    words = "wandb cannot be used: there is no login; `wandb login` makes one, WANDB_MODE=offline does without"
    assert done.stderr == f"train.py: {words}\n"
    assert not (tmp_path / "runs").exists()
    write_json(tmp_path / "runs" / "r" / tracking.IDS_FILE, {"wandb": "id"})  # of a run that goes on
    done = run_command((*flags[:-2], "--name", "r"), cwd=tmp_path, code=2, WANDB_MODE="online", HOME=str(tmp_path))
    assert done.stderr == f"train.py: {words}\n"


def test_trials_are_tracked_from_their_first_epoch_to_their_end(tmp_path):
    driver = Driver(tmp_path)
    plan = driver.watch.session.plan
    settings = replace(plan.settings, track=("tensorboard",))
    driver.watch = SearchWatch(driver.watch.session._replace(plan=plan._replace(settings=settings)), LiveTable())
    driver.searcher = driver.watch.searcher
    first, second, third = (driver.start() for _ in range(3))
    for epoch in range(1, 5):
        driver.epoch(first, epoch, value=10.0 * epoch)
    driver.epoch(second, 1)
    assert driver.complete(first) == "completed"
    assert driver.diverge(third) == "failed diverged: nan"
    driver.watch.close()

    folders = [tmp_path / "tracking" / trial.config["trial_id"] for trial in (first, second, third)]
    events = events_in(folders[0])
    assert [event.value for event in events.Scalars("val_accuracy")][:4] == [10.0, 20.0, 30.0, 40.0]
    assert events.PluginTagToContent("hparams")
    with pytest.raises(KeyError, match="hparams"):  # it goes on with the search
        events_in(folders[1]).PluginTagToContent("hparams")
    assert events_in(folders[2]).Tags()["scalars"] == [], "it has no epoch, and was closed"
