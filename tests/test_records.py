"""trials.csv and best.json: read back as written, right about which trial is best."""

from pathlib import Path
from typing import Any

import pytest

from byot.config import TrainConfig
from byot.system.files import read_json
from search.records import (
    MEASURES,
    MOST_ROWS_AT_ONCE,
    SearchRecords,
    best_row,
    read_rows,
    trials_table,
    write_best,
    write_rows,
)

PARAMETERS = ["alpha", "temperature", "beta"]


def row(trial_id: str, value: float | None, status: str = "completed", role: str = "sampled") -> dict[str, Any]:
    return {
        "trial_id": trial_id,
        "role": role,
        "status": status,
        "epochs_done": 6 if status == "completed" else 2,
        "alpha": 0.25,
        "temperature": 2.5,
        "beta": 3.3e-7,
        **dict.fromkeys(MEASURES, value),
        "seconds": 12.25,
        "seed": 0,
        "error": "" if status != "failed" else 'diverged, "badly"',
    }


def test_rows_read_back_as_written(tmp_path: Path):
    rows = [row("1234e567", 71.5), row("00000042", None, "failed"), row("inf", 3.0, "stopped")]
    write_rows(tmp_path / "trials.csv", rows, PARAMETERS)
    assert read_rows(tmp_path / "trials.csv") == rows
    assert read_rows(tmp_path / "none.csv") == []


def test_the_best_has_reached_its_last_epoch_and_is_not_the_control():
    rows = [
        row("stopped", 99.0, "stopped"),
        row("control", 98.0, role="control"),
        row("good", 70.0),
        row("reference", 60.0, role="reference"),
        row("failed", None, "failed"),
    ]
    found = best_row(rows, "val_accuracy", "max")
    assert found is not None
    assert found["trial_id"] == "good"
    found = best_row(rows, "val_accuracy", "min")
    assert found is not None
    assert found["trial_id"] == "reference"
    assert best_row(rows[:2], "val_accuracy", "max") is None


def test_best_json_trains_again_on_all_images(tmp_path: Path):
    rows = [row("control", 98.0, role="control"), row("good", 70.0)]
    search = {
        "name": "s",
        "metric": "val_accuracy",
        "mode": "max",
        "num_val_images": 100,
        "config": TrainConfig(val_fraction=0.1, width=16).to_dict(),
        "commit": None,
        "versions": {},
        "hardware": {},
    }
    write_best(tmp_path, search, rows[1], rows, PARAMETERS)
    best = read_json(tmp_path / "best.json")
    assert TrainConfig.from_dict(best["config"]) == TrainConfig(width=16, alpha=0.25, temperature=2.5, beta=3.3e-7)
    assert best["trial_id"] == "good"
    assert best["value"] == 70.0
    assert [other["role"] for other in best["compared_with"]] == ["control"]


def test_table_puts_full_budgets_first_and_shows_failures():
    rows = [row("failed", None, "failed"), row("stopped", 99.0, "stopped"), row("low", 50.0), row("high", 70.0)]
    lines = trials_table(rows, PARAMETERS, "val_accuracy", "max").splitlines()
    assert [line.split()[0] for line in lines] == ["trial", "high", "low", "stopped", "failed"]
    assert "70.00" in lines[1]
    assert len(trials_table([], PARAMETERS, "val_accuracy", "max").splitlines()) == 1


def test_a_long_table_is_written_soon_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, space = tmp_path / "s", {"alpha": 0.5, "temperature": 2.0, "beta": 1e-6}
    records = SearchRecords(folder, parameters=list(space), metric="val_accuracy", mode="max", epochs=1, seed=0)
    clock = 0.0
    monkeypatch.setattr("search.records.time.monotonic", lambda: clock)

    def written() -> int:
        return len(read_rows(folder / "trials.csv"))

    for number in range(1, MOST_ROWS_AT_ONCE + 1):
        records.begin("sampled", space)
        assert (written(), records.is_behind) == (number, False)
    records._next_table_at = 1.0  # after a write that took long
    records.begin("sampled", space)
    assert (written(), records.is_behind) == (MOST_ROWS_AT_ONCE, True)
    assert len(list((folder / "trials").glob("t*/trial.json"))) == MOST_ROWS_AT_ONCE + 1
    clock = 2.0
    records.write_table()
    assert (written(), records.is_behind) == (MOST_ROWS_AT_ONCE + 1, False)
    records._next_table_at = 3.0
    records.begin("sampled", space)
    records.write_table(at_once=True)
    assert (written(), records.is_behind) == (MOST_ROWS_AT_ONCE + 2, False)
