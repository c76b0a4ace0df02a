"""What the driver makes of what Ray tells it: how trials end, when a search gives up, what a full disk leaves."""

import errno
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

from byot.config import TrainConfig
from byot.search_files import DIVERGED, MEASURES
from byot.system.files import read_json
from search import records as records_module
from search.callback import MAX_FAILURES, MAX_RETRIES, SearchWatch
from search.plan import SearchPlan, Session
from search.records import save_search
from search.settings import SearchSettings
from search.space import DEFAULT_SPACE
from search.system.remote import Store, TakenOverError
from search.table import LiveTable
from search.trial import FAILED, UNWRITABLE
from tests.faults.searches import load_mirror
from tests.made_up import open_records, read_rows, search_record

EPOCHS = 4


class Driver:
    """A search's driver without Ray: trials are made up, and end as they are told to."""

    def __init__(self, folder: Path, time_budget_s: float | None = None) -> None:
        if not (folder / "search.json").exists():
            save_search(folder, search_record())
        self.folder = folder
        self.asked_to_stop = 0
        store, settings, none = Store(folder), SearchSettings(num_samples=20), cast(Any, None)
        plan = SearchPlan(store, TrainConfig(), settings, DEFAULT_SPACE, none, none, none)
        self.records = open_records(folder, epochs=EPOCHS)
        deadline = None if time_budget_s is None else time.monotonic() + time_budget_s
        session = Session(plan, none, self.records, lambda: self.asked_to_stop, deadline)
        self.watch = SearchWatch(session, LiveTable())
        self.searcher = self.watch.searcher

    def diverge(self, trial: Any, error: str = "nan") -> str:
        self.report(trial, **{FAILED: f"{DIVERGED}{error}"})
        return self.complete(trial)

    def start(self) -> Any:
        known: dict[str, Any] = {"trial_id": "of Ray", "status": "RUNNING", "last_result": {}, "error_file": None}
        counts = SimpleNamespace(num_failures=0, metric_analysis={}, metric_n_steps={})
        return SimpleNamespace(config=self.searcher.suggest("of Ray"), run_metadata=counts, **known)

    def report(self, trial: Any, **result: Any) -> None:
        trial.last_result = {"epoch": 0, "val_accuracy": math.nan, **result}
        self.watch.scheduler.on_trial_result(None, trial, trial.last_result)
        self.watch.on_trial_result(0, [], trial, trial.last_result)

    def epoch(self, trial: Any, epoch: int, value: float = 50.0) -> None:
        self.report(trial, **dict.fromkeys(MEASURES, value), epoch=epoch, elapsed_s=1.0)

    def complete(self, trial: Any) -> str:
        self.watch.on_trial_complete(0, [], trial)
        return self.status(trial)

    def crash(self, trial: Any, traceback: str, failures: int = MAX_RETRIES + 1) -> str:
        trial.run_metadata.num_failures = failures
        trial.error_file = str(self.folder / "error of ray.txt")
        Path(trial.error_file).write_text(traceback)
        self.watch.on_trial_error(0, [], trial)
        return self.status(trial)

    def status(self, trial: Any) -> str:
        row = read_json(self.folder / "trials" / trial.config["trial_id"] / "trial.json")
        row = {name: cell for name, cell in row.items() if name not in ("judged", "curve")}
        assert row in read_rows(self.folder)
        return f"{row['status']} {row['error']}".strip()


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    return Driver(tmp_path)


def test_a_driver_that_no_longer_drives_stops_the_search(driver):
    driver.watch.on_step_end(0, [])
    assert not driver.watch.stop_all()
    error = TakenOverError(errno.EBUSY, "the driver elsewhere goes on with this search", "s3://bucket/s")
    driver.records.store.watch_lease = Mock(side_effect=error)
    driver.watch.on_step_end(1, [])
    assert driver.watch.stop_all()
    assert "the driver elsewhere goes on" in driver.watch.trouble


def test_how_trials_end(driver):
    completed, control, stopped, diverged, cut_off = (driver.start() for _ in range(5))
    driver.epoch(completed, EPOCHS)
    assert driver.complete(completed) == "completed"
    driver.epoch(completed, 1, value=7.0)  # should Ray run it again all the same
    assert driver.complete(completed) == "completed"
    assert driver.records.trials[completed.config["trial_id"]].measures["val_accuracy"] == 50.0
    driver.watch.scheduler.stopped.add(stopped.config["trial_id"])
    driver.epoch(stopped, 2)
    assert driver.complete(stopped) == "stopped"
    assert driver.diverge(diverged, "the loss became nan") == "failed diverged: the loss became nan"
    driver.epoch(cut_off, 3)
    assert driver.complete(cut_off) == "running", "with the search, which goes on with it"
    assert driver.crash(control, "Traceback\n  line\nKeyError: 7\n") == "failed KeyError: 7"
    error = driver.folder / "trials" / control.config["trial_id"] / "error.txt"
    assert error.read_text() == "Traceback\n  line\nKeyError: 7\n"
    assert not driver.watch.stop_all()
    assert [t.user_attrs["status"] for t in load_mirror(driver.folder)] == ["completed", "stopped", "failed", "failed"]
    assert len(driver.records.unfinished) == 1
    memory = "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.\n"
    said = driver.crash(driver.start(), memory)
    assert said.startswith("failed out of memory")
    assert "fewer trials at once" in said


def test_a_worker_that_dies_before_its_trial_begins_costs_no_trial(driver):
    """Ray calls this an error and tries it no more; the search goes on with it in its next round."""
    trial = driver.start()
    assert driver.crash(trial, "ActorDiedError", failures=2) == "running"
    assert not driver.watch.stop_all()
    assert Driver(driver.folder).start().config == trial.config


def test_only_deaths_without_an_epoch_between_count(driver):
    trial = driver.start()
    driver.epoch(trial, 1)
    trial.run_metadata.num_failures = MAX_RETRIES
    driver.epoch(trial, 1)  # what it reports again
    assert trial.run_metadata.num_failures == MAX_RETRIES
    driver.epoch(trial, 2)
    assert trial.run_metadata.num_failures == 0


def test_it_gives_up_when_nothing_works(driver):
    for number in range(1, MAX_FAILURES + 1):
        assert not driver.watch.stop_all()
        driver.diverge(driver.start(), f"nan number {number}")
    assert driver.watch.stop_all()
    assert "nan number 5" in driver.watch.trouble


def test_it_gives_up_when_all_begins_to_crash_but_not_over_a_hard_space(driver):
    works = driver.start()
    driver.epoch(works, EPOCHS)
    driver.complete(works)
    for _ in range(3 * MAX_FAILURES):
        driver.diverge(driver.start())
    assert not driver.watch.stop_all(), "diverging is the trial's fault"
    for _ in range(MAX_FAILURES):
        assert not driver.watch.stop_all()
        driver.crash(driver.start(), "cuda error")
    assert driver.watch.stop_all()
    assert driver.records.retry_failed() == MAX_FAILURES, "those that diverged would do so again"
    again = Driver(driver.folder)
    assert len(again.records.unfinished) == MAX_FAILURES
    assert all(t.user_attrs["error"] != "cuda error" for t in load_mirror(driver.folder))


def test_a_disk_that_cannot_be_written_loses_nothing(driver, monkeypatch):
    by_trial, by_driver = driver.start(), driver.start()
    driver.report(by_trial, **{UNWRITABLE: "trials/t0000 cannot be written (No space left on device)"})
    assert driver.watch.stop_all()
    assert driver.complete(by_trial) == "running"

    other = Driver(driver.folder)
    again = other.start(), other.start()
    other.epoch(again[1], EPOCHS)
    full = OSError(28, "No space left on device", "trial.json")
    monkeypatch.setattr(records_module, "write_json", Mock(side_effect=full))
    other.watch.on_trial_complete(0, [], again[1])
    assert other.watch.trouble == "trial.json cannot be read or written (No space left on device)"
    monkeypatch.undo()
    assert other.status(again[1]) == "running"
    assert again[1].config["trial_id"] == by_driver.config["trial_id"]


def test_it_stops_when_asked_and_when_time_is_over(tmp_path):
    driver = Driver(tmp_path, time_budget_s=1000)
    assert not driver.watch.stop_all()
    driver.asked_to_stop = 15
    assert driver.watch.stop_all()
    assert not driver.watch.out_of_time()
    late = Driver(tmp_path, time_budget_s=-1)
    assert late.watch.stop_all()
    assert late.watch.out_of_time()
