"""What TensorBoard, Weights & Biases and MLflow get of a run, also of one that is stopped and goes on."""

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from byot import tracking
from byot.system.files import read_json
from byot.system.stopping import DivergedError, StoppedError
from byot.tracking import Tracker, Tracking, check_trackers
from tests.helpers import run_command
from tests.test_callback import Driver

ALL: tuple[Tracker, ...] = ("tensorboard", "wandb", "mlflow")
SETTINGS = {"alpha": 0.1, "model": "resnet18", "data_dir": None}


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
def test_every_tracker_has_each_epoch_of_a_run_that_was_stopped_once(tmp_path: Path, client: Any) -> None:
    folder = tmp_path / "run"
    with suppress(StoppedError), Tracking(ALL, folder, SETTINGS, "group") as first:
        for epoch in (1, 2):
            first.log(record(epoch))
        raise StoppedError(15)
    (found,) = client.search_runs([client.get_experiment_by_name("group").experiment_id])
    assert found.info.status == "KILLED"
    with Tracking(ALL, folder, SETTINGS, "group") as second:
        for epoch in (1, 2, 3):
            second.log(record(epoch))
        second.end({"test_accuracy": 61.5})

    (found,) = client.search_runs([client.get_experiment_by_name("group").experiment_id])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert found.data.params == {"alpha": "0.1", "model": "resnet18"}
    assert found.data.metrics["test_accuracy"] == 61.5
    history = client.get_metric_history(found.info.run_id, "train_loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]

    events = events_in(folder)
    assert [event.step for event in events.Scalars("val_accuracy")] == [1, 2, 3]
    assert events.Scalars("test_accuracy")[-1].value == 61.5
    assert events.PluginTagToContent("hparams")

    parts = {re.fullmatch(r"offline-run-\d+_\d+-(\w+)", path.name) for path in (folder / "wandb").glob("offline-run-*")}
    known = read_json(folder / tracking.IDS_FILE)["wandb"]
    assert {part and part[1] for part in parts} == {known}, "both parts are synchronised into one run"


def test_a_run_that_cannot_go_on_has_failed(tmp_path: Path, client: Any) -> None:
    with suppress(DivergedError), Tracking(["mlflow"], tmp_path / "run", SETTINGS) as opened:
        opened.log(record(1))
        raise DivergedError("nan")
    (found,) = client.search_runs([client.get_experiment_by_name(tracking.PROJECT).experiment_id])
    assert found.info.status == "FAILED"


def test_a_tracker_that_fails_is_left_and_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(tracking.TensorBoardRun):
        def log(self, record: Any) -> None:
            raise ConnectionError("no route to the server\nand more")

    monkeypatch.setitem(tracking.TRACKERS, "wandb", Broken)
    opened = Tracking(["wandb", "tensorboard"], tmp_path, SETTINGS)
    with pytest.warns(UserWarning, match="^wandb gets no more figures of this run: no route to the server$"):
        opened.log(record(1))
    opened.log(record(2))
    opened.end({})
    assert [event.step for event in events_in(tmp_path).Scalars("train_loss")] == [1, 2]


def test_what_is_missing_is_said_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "mlflow" else name)
    check_trackers(["tensorboard", "wandb"])
    with pytest.raises(ValueError, match="mlflow is not installed: pip install mlflow-skinny"):
        check_trackers(["wandb", "mlflow"])
    flags = ("--dataset", "digits", "--width", 4, "--outputs", tmp_path, "--track", "wandb")
    done = run_command(flags, cwd=tmp_path, WANDB_MODE="online", WANDB_API_KEY="", HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"train\.py: wandb cannot be used: .+\n", done.stderr)


def test_trials_are_tracked_from_their_first_epoch_to_their_end(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    plan = driver.watch.session.plan
    settings = replace(plan.settings, track=("tensorboard",))
    driver.watch.session = driver.watch.session._replace(plan=plan._replace(settings=settings))
    first, second = driver.start(), driver.start()
    for epoch in range(1, 5):
        driver.epoch(first, epoch, value=10.0 * epoch)
    driver.epoch(second, 1)
    assert driver.complete(first) == "completed"
    driver.watch.close()

    folders = [driver.records.trial_folder(trial.config["trial_id"]) for trial in (first, second)]
    events = events_in(folders[0])
    assert [event.value for event in events.Scalars("val_accuracy")][:4] == [10.0, 20.0, 30.0, 40.0]
    assert events.PluginTagToContent("hparams")
    with pytest.raises(KeyError, match="hparams"):  # it goes on with the search
        events_in(folders[1]).PluginTagToContent("hparams")
