"""Made-up trials and records of searches, as a search writes them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from byot.config import TrainConfig
from byot.search_files import MEASURES, Role, Status, TrialRecord, read_trials, space_to_dict
from search.records import SearchRecords
from search.settings import SearchSettings, grace_epochs
from search.space import DEFAULT_SPACE

BASE = TrainConfig(recipe="reference", dataset="digits", width=4, epochs=6, val_fraction=0.2)


def make_trial(
    trial_id: str,
    value: float | None = None,
    *,
    role: Role = "sampled",
    status: Status = "completed",
    epochs_done: int = 6,
    seconds: float = 12.25,
    error: str = "",
    measures: dict[str, float | None] | None = None,
    **params: float,
) -> TrialRecord:
    """A trial with this value of all measures but those that are given."""
    fields: dict[str, Any] = {"epochs_done": epochs_done, "seconds": seconds, "seed": 0, "error": error}
    fields |= {"params": {"alpha": 0.1, "temperature": 3.0, "beta": 1e-6, **params}}
    fields |= {"measures": {**dict.fromkeys(MEASURES, value), **(measures or {})}}
    return TrialRecord(trial_id=trial_id, role=role, status=status, **fields)


def search_record(config: TrainConfig = BASE, **fields: Any) -> dict[str, Any]:
    """What search.json holds."""
    record = {
        **{"name": "s", "status": "finished", "metric": "val_accuracy", "mode": "max", "num_samples": 32},
        **{"started_at": "2026-11-20T10:00:00+00:00", "finished_at": "2026-11-20T12:30:00+00:00"},
        **{"config": config.to_dict(), "settings": SearchSettings(confirm=0).to_dict()},
        **{"space": space_to_dict(DEFAULT_SPACE), "num_train_images": 1150, "num_val_images": 287},
        **{"commit": None, "versions": {}, "hardware": {}},
    }
    return record | fields


def open_records(
    folder: Path,
    *metrics: str,
    parameters: Iterable[str] = tuple(DEFAULT_SPACE),
    epochs: int = BASE.epochs,
    seed: int = 0,
) -> SearchRecords:
    """The records of a search in this folder, by default of the validation accuracy."""
    metrics, grace = metrics or ("val_accuracy",), grace_epochs(epochs)
    return SearchRecords(folder, parameters=[*parameters], metrics=metrics, epochs=epochs, grace=grace, seed=seed)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a search's trials.csv."""
    return [trial.to_row() for trial in read_trials(folder / "trials.csv")]
