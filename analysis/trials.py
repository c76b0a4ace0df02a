"""What searches and runs left on disk, as pandas tables. Reads files only, also of a search that runs or was killed.

A trial table has one row a trial, in the order the trials were started:

  trial_id, role, status   str     role: sampled | reference | control; status: completed | stopped | failed | running
  epochs_done              int64
  alpha, temperature, …    float64 one column a searched parameter
  val_…                    float64 accuracies and ECE in percent, NLL in nats; NaN before the first epoch is finished
  seconds, seed, error     float64, Int64, str

A run table has one row a finished run: its folder's name, every setting, the test set's figures.
"""

import csv
import math
import sys
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from byot.config import MOST, NUM_CLASSIFIERS, TrainConfig
from byot.system.files import errors_in, read_json, read_json_lines
from byot.system.paths import absolute_path, check_name

STATUSES = ("completed", "stopped", "failed", "running")
ROLES = ("sampled", "reference", "control")
TEXT_COLUMNS = ("trial_id", "role", "status", "error")
FIXED_COLUMNS = ("trial_id", "role", "status", "epochs_done", "seconds", "seed", "error")
SETTINGS = tuple(f.name for f in fields(TrainConfig))
PARAMETERS = tuple(f.name for f in fields(TrainConfig) if f.type is float)

SUFFIXES = (*(str(i) for i in range(1, NUM_CLASSIFIERS + 1)), "ensemble")  # shallow to deep, then all together
CLASSIFIER_NAMES = (*(f"{i}/{NUM_CLASSIFIERS}" for i in range(1, NUM_CLASSIFIERS + 1)), "ensemble")
TEST_MEASURES = tuple(
    name
    for measure in ("accuracy", "nll", "ece")
    for name in (f"test_{measure}", *(f"test_{measure}_{suffix}" for suffix in SUFFIXES))
)

# In these a retrained run may differ from the trial whose settings it takes up.
NOT_COMPARED = ("seed", "epochs", "device", "data_dir", "val_fraction", "split_seed", "precision")
VAL_MEASURES = tuple(name.replace("test_", "val_", 1) for name in TEST_MEASURES)
RECORD_KINDS: dict[type, tuple[str, ...]] = {  # of what a search.json has, if it has it
    str: ("name", "status", "commit"),
    dict: ("config", "space", "settings", "versions", "hardware"),
    int: ("num_samples", "max_concurrent", "num_train_images", "num_val_images"),
}
KIND_NAMES = {str: "a text", dict: "a table", int: "a whole number"}
SEARCH_KEYS = ("name", "status", "config", "space", "metric", "mode")


# ---------------------------------------------------------------- searches


def find_search(outputs: Path, name: str | None = None) -> Path:
    """The folder of the named search (or a path to one), else of the one started last. Raises ValueError if none is."""
    searches = outputs / "searches"
    if name is not None:
        for folder in (absolute_path(searches / name), absolute_path(name)):
            if (folder / "search.json").is_file():
                return folder
        known = sorted(path.parent.name for path in searches.glob("*/search.json"))
        there = f"; there are {', '.join(known)}" if known else ""
        raise ValueError(f"there is no search {name} in {searches}{there}")
    found = []
    for path in searches.glob("*/search.json"):
        try:
            found.append((parse_time(read_json(path).get("started_at")), path.parent.name, path.parent))
        except ValueError:  # a damaged record is passed over; naming the search tells what is wrong with it
            continue
    if not found:
        raise ValueError(f"no search is in {searches}: run python search/tune.py first")
    return max(found)[2]


def load_search(path: Path) -> dict[str, Any]:
    """The record of a search. Raises ValueError if it is missing, damaged or incomplete."""
    record_path = path / "search.json"
    record = read_json(record_path)
    missing = [key for key in SEARCH_KEYS if record.get(key) is None]
    if missing:
        raise ValueError(f"{record_path} lacks {', '.join(missing)}")
    with errors_in(record_path):
        if record["mode"] not in ("max", "min"):
            raise ValueError(f"mode must be max or min, not {record['mode']!r}")
        if record["metric"] not in VAL_MEASURES:
            raise ValueError(f"metric must be a measure such as val_accuracy, not {record['metric']!r:.40}")
        for kind, keys in RECORD_KINDS.items():
            for key in keys:
                if record.get(key) is not None and type(record[key]) is not kind:
                    raise ValueError(f"{key} must be {KIND_NAMES[kind]}, not {record[key]!r:.40}")
        for key in RECORD_KINDS[int]:
            if not 0 <= (record.get(key) or 0) < 2**63:
                raise ValueError(f"{key} must be a count, not {record[key]!r:.40}")
        record["config"] = TrainConfig.from_dict(record["config"]).to_dict()
        for name, bounds in record["space"].items():
            _check_bounds(name, bounds)
    return record


def search_metrics(search: Mapping[str, Any]) -> list[str]:
    """What was searched for; several have a Pareto front."""
    asked = (search.get("settings") or {}).get("metric")
    if isinstance(asked, list) and len(asked) > 1 and all(metric in VAL_MEASURES for metric in asked):
        return asked
    return [search["metric"]]


def _check_bounds(name: str, bounds: Any) -> None:
    if name not in PARAMETERS:
        raise ValueError(f"the space names {name!r}, which is no setting to be searched")
    if not (isinstance(bounds, dict) and {"low", "high"} <= set(bounds) <= {"low", "high", "log"}):
        raise ValueError(f"the range of {name} must have low, high and log")
    if not isinstance(bounds.get("log", False), bool):
        raise ValueError(f"log of {name} must be true or false")
    for end in ("low", "high"):
        TrainConfig.from_dict({name: bounds[end]})
    if not bounds["low"] < bounds["high"]:
        raise ValueError(f"low of {name} must be below high, not {bounds['low']:g} and {bounds['high']:g}")


def parse_time(text: Any) -> datetime:
    """An ISO time with its zone, UTC if it has none. Raises ValueError for anything else."""
    if not isinstance(text, str):
        raise ValueError(f"a time must be an ISO date and time, not {text!r}")
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def last_sign_of_life(path: Path) -> datetime:
    """When the files of a search were last written: tells one that runs from one that was killed."""
    files = [path / "search.json", path / "trials.csv", *path.glob("trials/*/metrics.jsonl")]
    return datetime.fromtimestamp(max(file.stat().st_mtime for file in files if file.exists()), UTC)


# ---------------------------------------------------------------- trials


def load_trials(path: Path) -> pd.DataFrame:
    """The trial table of a search's folder, or of its trials.csv.

    Trials that were running when the table was written are brought up to date from their metrics.jsonl.
    Raises ValueError if the table is missing or damaged.
    """
    table_path = path if path.suffix == ".csv" else path / "trials.csv"
    columns, rows = _read_table(table_path)
    for row in rows:
        if row["status"] == "running":
            _bring_up_to_date(row, table_path.parent / "trials" / row["trial_id"] / "metrics.jsonl")
    types = dict.fromkeys(columns, "float64") | dict.fromkeys(TEXT_COLUMNS, "str")
    return pd.DataFrame(rows, columns=columns).astype({**types, "epochs_done": "int64", "seed": "Int64"})


def _read_table(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    # Not pandas' reader: it would take a trial id such as 1234e567 for a number, and its floats are not exact, while a
    # run's name is made of the exact ones.
    if not path.is_file():
        raise ValueError(f"there is no {path}: no trial of that search has started yet")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            columns, *lines = list(csv.reader(file, strict=True)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    missing = [name for name in FIXED_COLUMNS if name not in columns]
    if missing or len(set(columns)) < len(columns):
        what = f"lacks the column {missing[0]}" if missing else "has a column twice"
        raise ValueError(f"{path} is not a table of trials: it {what}")
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, cells in enumerate(lines, start=2):
        if len(cells) != len(columns):
            raise ValueError(f"{path} is damaged: row {number} has {len(cells)} cells instead of {len(columns)}")
        try:
            row = {name: _parse_cell(name, cell) for name, cell in zip(columns, cells, strict=True)}
            TrainConfig(**{name: row[name] for name in columns if name in SETTINGS and row[name] == row[name]})
            check_name(row["trial_id"])
        except ValueError as error:
            raise ValueError(f"{path} is damaged: row {number}, {error}") from error
        for name, allowed in (("status", STATUSES), ("role", ROLES)):
            if row[name] not in allowed:
                raise ValueError(f"{path} is damaged: row {number} has the {name} {row[name]!r}")
        if row["trial_id"] in seen:
            raise ValueError(f"{path} is damaged: row {number} has the trial {row['trial_id']} a second time")
        seen.add(row["trial_id"])
        rows.append(row)
    return columns, rows


def _parse_cell(column: str, cell: str) -> Any:
    if column in TEXT_COLUMNS:
        return cell
    if column == "epochs_done":
        return _within(column, int(cell or 0), MOST)
    if column == "seed":
        return int(cell) if cell else None
    value = float(cell) if cell else math.nan
    if "_accuracy" in column and math.isfinite(value):
        _within(column, value, 100)
    return value if math.isfinite(value) else math.nan


def _within(column: str, value: float, most: float) -> float:
    if not 0 <= value <= most:
        raise ValueError(f"{column} must lie between 0 and {most:g}, not {value:g}")
    return value


def _bring_up_to_date(row: dict[str, Any], metrics_path: Path) -> None:
    records = _read_epochs(metrics_path)
    if not records or max(records) <= row["epochs_done"]:
        return
    row["epochs_done"] = max(records)
    latest = records[row["epochs_done"]]
    row.update({name: _number(latest.get(name)) for name in row if name.startswith("val_")})
    trained_s = sum(_number(record.get("elapsed_s")) for record in records.values())
    if not trained_s <= row["seconds"]:  # also where either is not known
        row["seconds"] = trained_s


def _read_epochs(metrics_path: Path) -> dict[int, dict[str, Any]]:
    """The records of a metrics.jsonl by epoch; of an epoch done twice, the later one."""
    records = read_json_lines(metrics_path)
    return {r["epoch"]: r for r in records if type(r.get("epoch")) is int and 0 < r["epoch"] <= MOST}


def _number(value: Any) -> float:
    """A number read from JSON; NaN for what is none, or is larger than a float holds."""
    known = isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return float(value) if known else math.nan


def load_curves(path: Path) -> pd.DataFrame:
    """One row for each epoch of each trial: trial_id, epoch, measures. A line torn by a crash is left out."""
    rows = [
        {"trial_id": metrics_path.parent.name, "epoch": epoch}
        | {name: _number(value) for name, value in record.items() if name != "epoch"}
        for metrics_path in sorted(path.glob("trials/*/metrics.jsonl"))
        for epoch, record in sorted(_read_epochs(metrics_path).items())
    ]
    measured = dict.fromkeys(name for row in rows for name in row if name not in ("trial_id", "epoch"))
    frame = pd.DataFrame(rows, columns=["trial_id", "epoch", *measured])
    return frame.astype({"trial_id": "str", "epoch": "int64"})


def parameter_columns(trials: pd.DataFrame) -> list[str]:
    """The searched parameters: the columns of a trial table that bear the name of a setting."""
    return [name for name in trials.columns if name in SETTINGS and name != "seed"]


def rank(trials: pd.DataFrame, metric: str, mode: str, full_budget_epochs: int) -> pd.DataFrame:
    """The trials that reached the last epoch, best first; of equals, the one started first.

    A trial stopped earlier is not comparable and is never in it. Nor is the control, another method: search/records.py
    chooses best.json by the same rule.
    """
    if metric not in trials.columns:
        raise ValueError(f"the trials have no {metric}; they have {', '.join(_measured(trials))} in trials.csv")
    whole = trials[
        _reached_the_end(trials, full_budget_epochs) & (trials["role"] != "control") & trials[metric].notna()
    ]
    return whole.sort_values(metric, ascending=mode == "min", kind="stable").reset_index(drop=True)


def pareto_front(trials: pd.DataFrame, modes: Mapping[str, str], full_budget_epochs: int) -> pd.DataFrame:
    """Of the trials that `rank` ranks those that no other beats in one metric without being worse in another."""
    main = next(iter(modes))
    whole = rank(trials, main, modes[main], full_budget_epochs)
    costs = [whole[metric] * (-1 if mode == "max" else 1) for metric, mode in modes.items()]
    cost = pd.concat(costs, axis=1).to_numpy(dtype=float)
    beaten = [bool(((cost <= own).all(axis=1) & (cost < own).any(axis=1)).any()) for own in cost]
    return whole[~pd.Series(beaten, index=whole.index, dtype=bool)].reset_index(drop=True)


def find_role(trials: pd.DataFrame, role: str, metric: str, full_budget_epochs: int) -> pd.Series | None:
    """The trial of the reference's setting or the control, None if it has not reached the last epoch."""
    reached = _reached_the_end(trials, full_budget_epochs)
    found = trials[reached & (trials["role"] == role) & trials[metric].notna()]
    return None if found.empty else found.iloc[0]


def _reached_the_end(trials: pd.DataFrame, full_budget_epochs: int) -> pd.Series:
    return (trials["status"] == "completed") & (trials["epochs_done"] >= full_budget_epochs)


def _measured(trials: pd.DataFrame) -> list[str]:
    return [name for name in trials.columns if name.startswith("val_")]


# ---------------------------------------------------------------- runs


def load_runs(outputs: Path) -> pd.DataFrame:
    """The finished runs; one whose record is damaged counts as not finished."""
    columns = ["run", *SETTINGS, "num_train_images", "num_test_images", *TEST_MEASURES, "elapsed_s", "commit"]
    rows = []
    for path in sorted((outputs / "runs").glob("*/result.json")):
        try:
            result = read_json(path)
            config = TrainConfig.from_dict(result.get("config"))
        except ValueError:
            continue
        row = {"run": path.parent.name, **config.to_dict()}
        row |= {name: _number(result.get(name)) for name in (*TEST_MEASURES, "elapsed_s")}
        rows.append(row | {name: result.get(name) for name in columns if name not in row})
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys((*TEST_MEASURES, "elapsed_s"), "float64"))


def trial_config(search: Mapping[str, Any], trial: Mapping[str, Any] | pd.Series) -> TrainConfig:
    """The settings of a trial for a run on all training images, as best.json has them for the best one."""
    params = {name: float(trial[name]) for name in search["space"] if name in trial and pd.notna(trial[name])}
    return TrainConfig.from_dict({**search["config"], **params, "val_fraction": 0.0})


def retrained_runs(runs: pd.DataFrame, search: Mapping[str, Any], trials: pd.DataFrame) -> pd.DataFrame:
    """The runs on all training images that took up a trial's settings, with that trial's id and role.

    Best trial first, then the rest in their order; within a trial by epochs and seed. Of trials with the same settings
    the runs go to the best.
    """
    ranked = rank(trials, search["metric"], search["mode"], search["config"]["epochs"])
    order = [*ranked["trial_id"], *trials["trial_id"][~trials["trial_id"].isin(ranked["trial_id"])]]
    by_id = trials.set_index("trial_id", drop=False)
    owners: dict[tuple[Any, ...], int] = {}
    for position, trial_id in enumerate(order):
        owners.setdefault(_compared_settings(trial_config(search, by_id.loc[trial_id]).to_dict()), position)
    position = pd.Series([owners.get(_compared_settings(run)) for run in runs.to_dict("records")], index=runs.index)
    found = runs.assign(position=position.astype("Int64"))[position.notna() & (runs["val_fraction"] == 0)]
    found = found.sort_values(["position", "epochs", "seed"], kind="stable", ignore_index=True)
    ids = pd.Series([order[p] for p in found.pop("position")], dtype="str")
    found.insert(0, "trial_id", ids)
    found.insert(1, "role", ids.map(by_id["role"]).astype("str"))
    return found


def _compared_settings(config: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(config[name] for name in SETTINGS if name not in NOT_COMPARED)


def summarise_runs(retrained: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation (ddof 1, NaN of a single run) over the seeds of each configuration and budget.

    Columns: trial_id, role, epochs, num_runs, and for each test measure its mean, under its own name, and `…_sd`.
    """
    rows = []
    for (trial_id, epochs), runs in retrained.groupby(["trial_id", "epochs"], sort=False):
        row = {"trial_id": trial_id, "role": runs["role"].iloc[0], "epochs": epochs, "num_runs": len(runs)}
        for name in TEST_MEASURES:
            row |= {name: runs[name].mean(), f"{name}_sd": runs[name].std(ddof=1)}
        rows.append(row)
    measures = [column for name in TEST_MEASURES for column in (name, f"{name}_sd")]
    return pd.DataFrame(rows, columns=["trial_id", "role", "epochs", "num_runs", *measures])
