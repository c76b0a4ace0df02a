"""What a search leaves on disk, which is all it needs to go on: Ray's own state is never read again.

search.json                   settings, seed, versions, commit, hardware, status; state/search.json is its copy
warm_start.json               what an earlier search lent, where one was named
confirmation.json             what running the best again over fresh seeds found; confirmation/ has the runs
trials.csv                    one row a trial, failed ones too; rewritten whole, in a large search not at every change
best.json                     the best configuration that reached its last epoch
trials/TRIAL_ID/trial.json    the trial's row, written when it is proposed and when it ends
trials/TRIAL_ID/metrics.jsonl one line an epoch, written by the trial itself
trials/TRIAL_ID/checkpoints/  the trial's last two, by itself
optuna.log                    the trials that have ended as an Optuna journal, for optuna-dashboard
ray/                          Ray Tune's own folder, made anew whenever the search goes on
search.log                    what Ray and the libraries had to say

Kept in an object store (search/system/remote.py), the last three and the checkpoints are not in both places.
"""

import csv
import io
import math
import pickle
import shutil
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from byot.config import NUM_CLASSIFIERS
from byot.system.files import read_json, read_json_lines, write_json, write_text
from search.settings import Work, grace_epochs, metric_mode
from search.space import Role
from search.system.remote import Kept

Status = Literal["completed", "stopped", "failed", "running"]  # running: begun and not ended, whether it runs or not

ACCURACIES = (
    "val_accuracy",
    *(f"val_accuracy_{i}" for i in range(1, NUM_CLASSIFIERS + 1)),
    "val_accuracy_ensemble",
)
MEASURES = (*ACCURACIES, "val_nll", "val_nll_ensemble", "val_ece", "val_ece_ensemble")
# What CMA-ES keeps with the trials: its generation and, pickled, its distribution; and what such a pickle is made of.
CMA_STATE = "cma:"
CMA_CLASS = ("cmaes._cma", "CMA")
CMA_CLASSES = {
    CMA_CLASS,
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
}
DIVERGED = "diverged: "  # how the error of such a trial begins; tried again it would diverge again

# A table of more rows takes so long to write that writing it at every change would make a search ever slower.
MOST_ROWS_AT_ONCE = 100
TABLE_SHARE = 0.02  # of the time may then go into it

Row = dict[str, Any]


class EpochResult(NamedTuple):
    """What the search remembers of one epoch of a trial."""

    value: float  # of the metric searched for
    seconds: float


class SearchRecords:
    """The trials of a search, in memory and on disk: proposed, measured epoch by epoch, ended."""

    def __init__(
        self,
        folder: Path,
        *,
        parameters: list[str],
        metric: str,
        mode: str,
        epochs: int,
        seed: int,
        further_metrics: tuple[str, ...] = (),
        grace: int | None = None,
        work: Work = float,
        kept: Kept | None = None,
    ) -> None:
        """Reads what the folder holds. A damaged trial.json is made good from trials.csv, and trials.csv from them.

        `further_metrics` are those that are searched for beside `metric`, by which trials are ranked. `grace` is the
        number of epochs before a trial may be stopped, `work` what a trial's first so many take. `kept` is where what
        is written is kept, if not in the folder alone: a record that cannot be put there raises OSError as one that
        cannot be written does.
        """
        self.folder = folder
        self.kept = kept or Kept()
        self.parameters = parameters
        self.metric = metric
        self.metrics = (metric, *further_metrics)
        self.mode = mode
        self.epochs = epochs
        self.grace = grace_epochs(epochs) if grace is None else min(grace, epochs)
        self.work = work
        self.seed = seed
        self.search: dict[str, Any] = {}  # what search.json holds, for best.json to tell
        self.history: dict[str, dict[int, EpochResult]] = {}  # trial id -> epoch -> result
        # Trial id -> epoch -> value with which ASHA let it go on or stopped it; None where that record is lost.
        self.judged: dict[str, dict[int, float] | None] = {}
        self.sampler_state: dict[str, dict[str, Any]] = {}  # trial id -> what the sampler keeps with its proposal
        self.notes: list[str] = []  # what was found damaged, one sentence each
        self.is_behind = False  # trials.csv, of the trials' own records
        self._next_table_at = 0.0  # on the monotonic clock
        self.rows = {row["trial_id"]: row for row in self._read_rows()}

    def _read_rows(self) -> list[Row]:
        try:
            rows = read_rows(self.folder / "trials.csv")
            if not all(_is_cell(name, row.get(name, row)) for row in rows for name in table_columns(self.parameters)):
                raise ValueError("a cell is not what a search writes there")
            table = {row["trial_id"]: row for row in rows}
        except (ValueError, OSError) as error:
            self.notes.append(f"trials.csv is damaged ({error}) and made anew from the trials' own records")
            table = {}
        on_disk = {path.name for path in (self.folder / "trials").glob("t*") if path.is_dir()}
        rows = []
        for trial_id in sorted(on_disk | set(table), key=lambda trial_id: (trial_number(trial_id), trial_id)):
            lines = self._read_lines(trial_id)
            self.history[trial_id] = {n["epoch"]: EpochResult(n[self.metric], n["elapsed_s"]) for n in lines}
            row = self._read_row(trial_id, table.get(trial_id))
            if row is None:
                continue
            if row["status"] == "running" and lines:
                self._update(row, lines[-1])
            rows.append(row)
        return rows

    def _read_lines(self, trial_id: str) -> list[dict[str, Any]]:
        needed = ("epoch", self.metric, "elapsed_s")
        lines = read_json_lines(self.trial_folder(trial_id) / "metrics.jsonl")
        return [line for line in lines if all(_is_number(line.get(name)) for name in needed)]

    def _read_row(self, trial_id: str, in_table: Row | None) -> Row | None:
        path = self.trial_folder(trial_id) / "trial.json"
        try:
            row = read_json(path)
            judged, curve = _by_epoch(row.pop("judged", None)), _by_epoch(row.pop("curve", None))
            state = row.pop("sampler_state", None)
            wrong = [name for name in table_columns(self.parameters) if not _is_cell(name, row.get(name, row))]
            if not wrong:
                self.judged[trial_id] = judged
                if is_sampler_state(state):
                    self.sampler_state[trial_id] = state
                if row["status"] != "running" and curve is not None:  # metrics.jsonl may have been cut
                    self.history[trial_id] = {epoch: EpochResult(value, 0.0) for epoch, value in curve.items()}
                return row
            reason = f"{path} has no {', no '.join(wrong)} as a search writes them"
        except ValueError as error:
            reason = str(error)
        if in_table is not None:
            self.notes.append(f"{reason}: trial {trial_id} is taken from trials.csv")
            self.judged[trial_id] = None
            self._write_trial(in_table)
            return in_table
        self.notes.append(f"{reason}, nor does trials.csv know it: trial {trial_id} is left out")
        aside = path.parent.with_name(f"damaged-{trial_id}-{datetime.now():%Y%m%d-%H%M%S-%f}")
        shutil.move(path.parent, aside)
        self.kept.rename(path.parent, aside)
        return None

    def trial_folder(self, trial_id: str) -> Path:
        return self.folder / "trials" / trial_id

    @property
    def ended(self) -> list[Row]:
        return [row for row in self.rows.values() if row["status"] != "running"]

    @property
    def unfinished(self) -> list[Row]:
        return [row for row in self.rows.values() if row["status"] == "running"]

    def curve(self, trial_id: str) -> dict[int, float]:
        """Epoch -> value of the metric."""
        return {epoch: result.value for epoch, result in self.history[trial_id].items()}

    @property
    def next_number(self) -> int:
        return max(map(trial_number, self.rows), default=-1) + 1

    @property
    def next_id(self) -> str:
        return f"t{self.next_number:04d}"  # no spreadsheet takes it for a number

    def begin(self, role: Role, params: dict[str, float], sampler_state: dict[str, Any] | None = None) -> Row:
        """Record a trial that is proposed, before anything of it is done."""
        row: Row = {
            "trial_id": self.next_id,
            "role": role,
            "status": "running",
            "epochs_done": 0,
            **params,
            **dict.fromkeys(MEASURES),
            "seconds": 0.0,
            "seed": self.seed,
            "error": "",
        }
        self.history[row["trial_id"]], self.judged[row["trial_id"]] = {}, {}
        if sampler_state:
            self.sampler_state[row["trial_id"]] = sampler_state
        self._write_trial(row)
        self.rows[row["trial_id"]] = row
        self.write_table()
        return row

    def _write_trial(self, row: Row) -> None:
        trial_id = row["trial_id"]
        known: dict[str, Any] = {"judged": self.judged[trial_id], "curve": self.curve(trial_id)}
        if trial_id in self.sampler_state:
            known["sampler_state"] = self.sampler_state[trial_id]
        path = self.trial_folder(trial_id) / "trial.json"
        write_json(path, row | known)
        self.kept.put(path)

    def judge(self, trial_id: str, epoch: int, value: float, *, goes_on: bool) -> None:
        """Record that ASHA has judged a trial. One that it stops is written when it ends, a moment later."""
        self.judged[trial_id] = (self.judged[trial_id] or {}) | {epoch: value}
        if goes_on:
            self._write_trial(self.rows[trial_id])

    def add_epoch(self, trial_id: str, record: dict[str, Any]) -> None:
        """Take in what a trial reported; an epoch reported again counts once, and one after its end not at all."""
        row = self.rows[trial_id]
        if row["status"] != "running":
            return
        self.history[trial_id][record["epoch"]] = EpochResult(record[self.metric], record["elapsed_s"])
        self._update(row, record)

    def _update(self, row: Row, record: dict[str, Any]) -> None:
        row["epochs_done"] = record["epoch"]
        row["seconds"] = sum(result.seconds for result in self.history[row["trial_id"]].values())
        row |= {name: record[name] for name in MEASURES if name in record}

    def end(self, trial_id: str, status: Status, error: str = "") -> Row:
        """Record how a trial ended. The checkpoints of one that will not go on are removed."""
        row = self.rows[trial_id] | {"status": status, "error": error}
        self._write_trial(row)
        self.rows[trial_id] = row
        if status == "stopped" or error.startswith(DIVERGED):
            for folder in (self.trial_folder(trial_id), *self.trial_folder(trial_id).glob("seed-*")):
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            self.kept.drop_checkpoints(self.trial_folder(trial_id))
        self.kept.fetch_run(self.trial_folder(trial_id))
        self.write_table()
        if status == "completed":
            self.write_best()
        return row

    def retry_failed(self) -> int:
        """Set the failed trials that may do better another time to running; returns how many."""
        failed = [r for r in self.ended if r["status"] == "failed" and not r["error"].startswith(DIVERGED)]
        for row in failed:
            row |= {"status": "running", "error": ""}
            self._write_trial(row)
        return len(failed)

    def to_text(self) -> str:
        return trials_table(self.rows.values(), self.parameters, self.metric, self.mode)

    def best(self) -> Row | None:
        return best_row(self.rows.values(), self.metric, self.mode)

    def write_tables(self) -> None:
        """Bring trials.csv and best.json in line with the trials' own records."""
        self.write_table(at_once=True)
        self.write_best()

    def write_table(self, *, at_once: bool = False) -> None:
        """Write trials.csv now or, once it is long, soon: whoever goes on calling this sees it written."""
        began_at = time.monotonic()
        self.is_behind = True
        if at_once or len(self.rows) <= MOST_ROWS_AT_ONCE or began_at >= self._next_table_at:
            write_rows(self.folder / "trials.csv", self.rows.values(), self.parameters)
            self.kept.put(self.folder / "trials.csv")
            self.is_behind = False
            done_at = time.monotonic()
            self._next_table_at = done_at + (done_at - began_at) / TABLE_SHARE

    def write_best(self) -> None:
        best = self.best()
        if best is not None and self.search:
            write_best(self.folder, self.search, best, list(self.rows.values()), self.parameters, self.metrics)
            self.kept.put(self.folder / "best.json")


def trial_number(trial_id: str) -> int:
    """The place of a trial in the order of proposals; -1 for an id that another version gave."""
    return int(trial_id[1:]) if trial_id[:1] == "t" and trial_id[1:].isdecimal() else -1


def is_sampler_state(state: Any) -> bool:
    """Whether this is what CMA-ES keeps with a proposal, and safe to hand to it.

    It unpickles its distribution, and a pickle may run anything: this one may make numbers and arrays alone.
    """
    if not isinstance(state, dict) or not isinstance(state.get(CMA_STATE + "generation"), int):
        return False
    names = [f"{CMA_STATE}optimizer:{number}" for number in range(len(state) - 1)]  # joined in this order
    if set(state) != {CMA_STATE + "generation", *names}:
        return False
    if not names:
        return True
    try:
        optimizer = NumbersOnly(io.BytesIO(bytes.fromhex("".join(state[name] for name in names)))).load()
    except Exception:  # whatever a damaged pickle raises
        return False
    return (type(optimizer).__module__, type(optimizer).__name__) == CMA_CLASS


class NumbersOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in CMA_CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} has no place here")
        return super().find_class(module, name)


def _by_epoch(table: Any) -> dict[int, float] | None:
    """Epoch -> value from JSON, whose keys are text; None for anything else."""
    if not isinstance(table, dict) or not all(map(str.isdecimal, table)) or not all(map(_is_number, table.values())):
        return None
    return {int(epoch): value for epoch, value in table.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_cell(column: str, value: Any) -> bool:
    """Whether a row may have this value in this column."""
    if column == "status":
        return value in get_args(Status)
    if column == "role":
        return value in get_args(Role)
    if column in TEXT_COLUMNS:
        return isinstance(value, str)
    if column in MEASURES:
        return value is None or _is_number(value)
    return isinstance(value, int) if column in WHOLE_COLUMNS else _is_number(value)


def ranked(rows: Iterable[Row], metric: str, mode: str) -> list[Row]:
    """The trials that reached their last epoch, best first; the control, another method, does not compete."""
    whole = [r for r in rows if r["status"] == "completed" and r["role"] != "control"]
    return sorted(whole, key=lambda row: row[metric], reverse=mode == "max")


def best_row(rows: Iterable[Row], metric: str, mode: str) -> Row | None:
    return next(iter(ranked(rows, metric, mode)), None)


def pareto_front(rows: Iterable[Row], metrics: Iterable[str]) -> list[Row]:
    """Of those trials the ones that no other is better than in one metric without being worse in another."""
    signs = {metric: -1 if metric_mode(metric) == "max" else 1 for metric in metrics}
    main = next(iter(signs))
    whole = ranked(rows, main, metric_mode(main))
    costs = [tuple(sign * row[metric] for metric, sign in signs.items()) for row in whole]

    def is_beaten(cost: tuple[float, ...]) -> bool:
        return any(other != cost and all(o <= c for o, c in zip(other, cost, strict=True)) for other in costs)

    return [row for row, cost in zip(whole, costs, strict=True) if not is_beaten(cost)]


def write_best(
    folder: Path,
    search: dict[str, Any],
    best: Row,
    rows: list[Row],
    parameters: list[str],
    metrics: tuple[str, ...] = (),
) -> None:
    """Write best.json: the settings with which byot/train.py --best trains, and what they are compared with.

    Where several metrics were searched for, also the Pareto front.
    """
    metric = search["metric"]
    params = {name: best[name] for name in parameters}
    compared = [r for r in rows if r["role"] != "sampled" and r["status"] == "completed"]

    def describe(row: Row) -> dict[str, Any]:
        values = {name: row[name] for name in metrics}
        return {"trial_id": row["trial_id"], "params": {name: row[name] for name in parameters}, "values": values}

    write_json(
        folder / "best.json",
        {
            "search": folder.name,
            "trial_id": best["trial_id"],
            "role": best["role"],
            "metric": metric,
            "mode": search["mode"],
            "value": best[metric],
            "params": params,
            "val": {name: best[name] for name in MEASURES},
            "num_val_images": search["num_val_images"],
            "compared_with": [
                {"role": r["role"], "params": {name: r[name] for name in parameters}, "value": r[metric]}
                for r in compared
            ],
            **({"pareto_front": [describe(row) for row in pareto_front(rows, metrics)]} if len(metrics) > 1 else {}),
            # Retraining uses all training images: nothing is held out.
            "config": {**search["config"], **params, "val_fraction": 0.0},
            **{key: search.get(key) for key in ("commit", "versions", "hardware")},
        },
    )


# ---------------------------------------------------------------- search.json


def load_search(folder: Path) -> dict[str, Any]:
    """The record of a search, from its copy if it is damaged. Raises ValueError if both are or there is none."""
    try:
        return read_json(folder / "search.json")
    except ValueError as error:
        try:
            return read_json(folder / "state" / "search.json")
        except ValueError:
            raise error from None


def find_search(folder: Path) -> dict[str, Any] | None:
    """The same, but None where there is no such record, or none that can be read."""
    try:
        return load_search(folder)
    except ValueError:
        return None


def save_search(folder: Path, record: dict[str, Any], kept: Kept | None = None) -> None:
    for path in (folder / "search.json", folder / "state" / "search.json"):
        write_json(path, record)
        if kept is not None:
            kept.put(path)


# ---------------------------------------------------------------- trials.csv


def table_columns(parameters: list[str]) -> list[str]:
    return ["trial_id", "role", "status", "epochs_done", *parameters, *MEASURES, "seconds", "seed", "error"]


def write_rows(path: Path, rows: Iterable[Row], parameters: list[str]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, table_columns(parameters), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """The rows of a trials.csv with their numbers as numbers; none if there is no file.

    Raises ValueError if a row is damaged.
    """
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise ValueError(str(error)) from error
        for number, row in enumerate(rows, start=2):
            if None in row or None in row.values():  # csv's sign for too many cells and for too few
                raise ValueError(f"row {number} does not have as many cells as the header")
        return [{name: _parse(name, cell) for name, cell in row.items()} for row in rows]


TEXT_COLUMNS = ("trial_id", "role", "status", "error")
WHOLE_COLUMNS = ("epochs_done", "seed")


def _parse(column: str, cell: str) -> Any:
    if column in TEXT_COLUMNS:
        return cell
    if cell == "":
        return None
    return int(cell) if column in WHOLE_COLUMNS else float(cell)


def trials_table(rows: Iterable[Row], parameters: list[str], metric: str, mode: str) -> str:
    """The trials as text, those that reached their last epoch first and best first."""
    sign = -1 if mode == "max" else 1
    order = {"completed": 0, "stopped": 1, "running": 2, "failed": 3}

    def rank(row: Row) -> tuple[int, float, float]:
        value = row.get(metric)
        depth = -row["epochs_done"] if row["status"] == "stopped" else 0
        return order[row["status"]], depth, sign * value if value is not None else math.inf

    # val_accuracy is the deepest classifier's, which the numbered columns show already.
    shown = [name for name in dict.fromkeys((metric, *ACCURACIES)) if name != "val_accuracy"]
    header = ["trial", "role", "status", "epochs", *parameters, *(n.removeprefix("val_") for n in shown), "seconds"]
    lines = [header]
    for row in sorted(rows, key=rank):
        lines.append(
            [
                row["trial_id"],
                row["role"],
                row["status"],
                str(row["epochs_done"]),
                *(f"{row[name]:.3g}" for name in parameters),
                *(format_value(row.get(name)) for name in shown),
                f"{row['seconds']:.0f}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    aligned = [
        "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in aligned)


def format_value(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
