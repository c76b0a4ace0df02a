"""What searches and runs left on disk, as pandas tables. Reads files only, also of a search that runs or was killed.

A trial table has one row a trial, in the order the trials were started:

  trial_id, role, status   str     role: sampled | reference | control; status: completed | stopped | failed | running
  epochs_done              int64
  alpha, temperature, …    float64 one column a searched parameter
  val_…                    float64 accuracies and ECE in percent, NLL in nats; NaN before the first epoch is finished
  seconds, seed, error     float64, Int64, str

A table of curves has one row an epoch of each trial: trial_id, epoch, val_…

A run table has one row a finished run: its folder's name, every setting, the test set's figures.

Each reader takes one folder or several. The table of several has one more column, `folder`, in front.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from byot import search_files
from byot.config import CLASSIFIERS, NOT_IDENTITY, TrainConfig
from byot.search_files import (
    MEASURES,
    SEARCHABLE,
    TEXT_COLUMNS,
    TEXT_PARAMETERS,
    SearchRecord,
    TrialRecord,
    is_number,
    read_epochs,
    read_trials,
    to_retrain,
    trial_columns,
)
from byot.system.files import errors_in, read_json

SETTINGS = tuple(f.name for f in fields(TrainConfig))
TEST_MEASURES = (
    *(
        f"test_{measure}{suffix}"
        for measure in ("accuracy", "nll", "ece")
        for suffix in ("", *(f"_{classifier}" for classifier in CLASSIFIERS))
    ),
    "test_accuracy_mean",
    "test_exit_accuracy",
)
MEASURED, OF_RUNS = (*TEST_MEASURES, "elapsed_s"), ("num_train_images", "num_test_images", "commit")
# In these a retrained run may differ from the trial whose settings it takes up.
NOT_COMPARED = (*NOT_IDENTITY, "seed", "epochs", "val_fraction", "split_seed", "precision")
NOT_POOLED = ["epochs", "precision"]  # runs that differ in these are not compared, and have no common mean


# ---------------------------------------------------------------- trials


def _of_each(read: Callable[[Path], pd.DataFrame], folders: tuple[Path | str, ...]) -> pd.DataFrame:
    tables = {str(folder): read(Path(folder)) for folder in folders}
    if len(folders) == 1:
        return tables[str(folders[0])]
    return pd.concat(tables, names=["folder"]).reset_index(level="folder").reset_index(drop=True)


def load_trials(*folders: Path | str) -> pd.DataFrame:
    """Read the trial table of a search's folder, or of several.

    Trials that were running when the table was written are brought up to date from their metrics.jsonl.
    Raises ValueError if the table is missing or damaged.
    """
    return _of_each(_read_trial_table, folders)


def _read_trial_table(folder: Path) -> pd.DataFrame:
    table_path = folder / "trials.csv"
    if not table_path.exists():
        raise ValueError(f"there is no {table_path}: no trial of that search has started yet")
    trials = [_up_to_date(trial, table_path.parent) for trial in read_trials(table_path)]
    columns = trial_columns(trials[0].params if trials else ())
    types = dict.fromkeys(columns, "float64")
    types |= {name: "str" for name in columns if name in (*TEXT_COLUMNS, *TEXT_PARAMETERS)}
    frame = pd.DataFrame([trial.to_row() for trial in trials], columns=columns)
    return frame.astype({**types, "epochs_done": "int64", "seed": "Int64"})


def _up_to_date(trial: TrialRecord, folder: Path) -> TrialRecord:
    epochs = read_epochs(folder / "trials" / trial.trial_id / "metrics.jsonl") if trial.status == "running" else {}
    last = max(epochs, default=0)
    if last <= trial.epochs_done:
        return trial
    return trial.after_epoch(last, epochs[last], sum(measured.get("elapsed_s", 0.0) for measured in epochs.values()))


def load_curves(*folders: Path | str) -> pd.DataFrame:
    """Read the curves of a search's folder, or of several. A line torn by a crash is left out."""
    return _of_each(_read_curves, folders)


def _read_curves(folder: Path) -> pd.DataFrame:
    rows = [
        {"trial_id": metrics_path.parent.name, "epoch": epoch, **measured}
        for metrics_path in sorted(folder.glob("trials/*/metrics.jsonl"))
        for epoch, measured in read_epochs(metrics_path).items()
    ]
    types = {"trial_id": "str", "epoch": "int64"} | dict.fromkeys(MEASURES, "float64")
    return pd.DataFrame(rows, columns=list(types)).astype(types)


def last_sign_of_life(path: Path) -> datetime:
    """Tell when the files of a search were last written, and so one that runs from one that was killed."""
    files = [path / "search.json", path / "trials.csv", *path.glob("trials/*/metrics.jsonl")]
    return datetime.fromtimestamp(max(file.stat().st_mtime for file in files if file.exists()), UTC)


def parameter_columns(trials: pd.DataFrame) -> list[str]:
    """List the searched parameters."""
    return [name for name in trials.columns if name in SEARCHABLE]


def rank(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Sort the trials that reached their last epoch, best first, without the control: search_files.ranked."""
    return _chosen(trials, search_files.ranked(_records(trials), metric))


def pareto_front(trials: pd.DataFrame, metrics: Iterable[str]) -> pd.DataFrame:
    """Find the ranked trials that no other beats in one metric without being worse in another."""
    return _chosen(trials, search_files.pareto_front(_records(trials), metrics))


def find_role(trials: pd.DataFrame, role: str, metric: str) -> pd.Series | None:
    """Find the trial of the reference's setting or the control, None if it has not reached its last epoch."""
    found = search_files.find_role(_records(trials), role, metric)
    return None if found is None else _chosen(trials, [found]).iloc[0]


def _records(trials: pd.DataFrame) -> list[TrialRecord]:
    rows: list[dict[Any, Any]] = trials.astype(object).where(trials.notna(), None).to_dict("records")
    return [TrialRecord.from_row(row) for row in rows]


def _chosen(trials: pd.DataFrame, records: list[TrialRecord]) -> pd.DataFrame:
    by_id = trials.set_index("trial_id", drop=False)
    return by_id.loc[[record.trial_id for record in records]].reset_index(drop=True)


# ---------------------------------------------------------------- runs


def load_runs(*outputs: Path | str) -> pd.DataFrame:
    """Read the finished runs in an outputs folder, or in several; one with a damaged record counts as not finished."""
    return _of_each(_read_runs, outputs)


def _read_runs(outputs: Path) -> pd.DataFrame:
    rows = []
    for path in sorted((outputs / "runs").glob("*/result.json")):
        with suppress(ValueError):
            rows.append(read_run(path))
    return run_table(rows)


def read_run(path: Path) -> dict[str, Any]:
    """Read a result.json, also under another name, as a row of a run table. Raises ValueError where it is damaged."""
    result = read_json(path)
    with errors_in(path):
        config = TrainConfig.from_dict(result.get("config"))
    name = path.parent.name if path.name == "result.json" else path.stem
    row = {"run": name, **config.to_dict(), **{name: result.get(name) for name in OF_RUNS}}
    row["precision"] = result.get("precision", config.precision)  # what auto came to
    return row | {name: result[name] for name in MEASURED if is_number(result.get(name))}


def run_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Make a run table of its rows."""
    columns = ["run", *SETTINGS, *OF_RUNS[:2], *MEASURED, "commit"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(MEASURED, "float64"))


def trial_config(search: SearchRecord, trial: Mapping[str, Any] | pd.Series) -> TrainConfig:
    """Make the settings of a trial for a run on all training images, as best.json has them for the best one."""
    params = {name: trial[name] for name in search.space if name in trial}
    return to_retrain(search.config, trial["role"], params)


def retrained_runs(runs: pd.DataFrame, search: SearchRecord, trials: pd.DataFrame) -> pd.DataFrame:
    """Find the runs on all training images that took up a trial's settings; that trial's id and role come first.

    Best trial first, then the rest in their order; within a trial by epochs, precision and seed. Of trials with the
    same settings the runs go to the best.
    """
    ranked = rank(trials, search.metric)
    order = pd.concat([ranked, trials[~trials["trial_id"].isin(ranked["trial_id"])]], ignore_index=True)
    owners: dict[tuple[Any, ...], int] = {}
    for place, trial in enumerate(order.to_dict("records")):
        owners.setdefault(_compared_settings(trial_config(search, trial).to_dict()), place)
    places = [owners.get(_compared_settings(run), -1) for run in runs.to_dict("records")]
    found = runs.assign(place=pd.Series(places, index=runs.index, dtype="int64"))
    found = found[(found["place"] >= 0) & (found["val_fraction"] == 0)]
    found = found.sort_values(["place", *NOT_POOLED, "seed"], kind="stable", ignore_index=True)
    owner = order.loc[found.pop("place"), ["trial_id", "role"]].reset_index(drop=True)
    return pd.concat([owner, found], axis="columns")


def _compared_settings(config: Mapping[Any, Any]) -> tuple[Any, ...]:
    images = config["data_dir"] if config["dataset"] == "imagefolder" else None  # other folders have other images
    return images, *(config[name] for name in SETTINGS if name not in NOT_COMPARED)


def summarise_runs(retrained: pd.DataFrame) -> pd.DataFrame:
    """Compute mean and standard deviation over the seeds of each configuration (ddof 1, NaN of one seed).

    Runs with one seed count as their mean; runs of other epochs or in another precision are apart. Columns: trial_id,
    role, epochs, precision, num_runs (seeds), and for each test measure its mean, under its own name, and `…_sd`.
    """
    groups = ["trial_id", "role", *NOT_POOLED]
    by_seed = retrained.groupby([*groups, "seed"], sort=False)[list(TEST_MEASURES)].mean()
    of_each = by_seed.groupby(groups, sort=False)
    summary = of_each.mean().join(of_each.std(ddof=1).add_suffix("_sd"))
    summary.insert(0, "num_runs", of_each.size())
    return summary.reset_index()
