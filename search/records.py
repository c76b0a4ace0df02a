"""What a search leaves on disk, and the table of its trials.

search.json                   settings, seed, versions, commit, hardware, status
trials.csv                    one row a trial, failed ones too; rewritten whole at every change
best.json                     the best configuration that reached its last epoch
trials/TRIAL_ID/metrics.jsonl one line an epoch, written by the trial itself
state/                        what the search needs to go on: ASHA's rungs
ray/                          Ray Tune's own folder
search.log                    what Ray and the libraries had to say
"""

import csv
import io
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ray import tune
from ray.tune.experiment import Trial

from byot.config import NUM_CLASSIFIERS
from byot.files import read_json, write_json, write_text

Status = Literal["completed", "stopped", "failed", "running"]

ACCURACIES = (
    "val_accuracy",
    *(f"val_accuracy_{i}" for i in range(1, NUM_CLASSIFIERS + 1)),
    "val_accuracy_ensemble",
)
MEASURES = (*ACCURACIES, "val_nll", "val_nll_ensemble", "val_ece", "val_ece_ensemble")

Row = dict[str, Any]


class SearchRecorder(tune.Callback):
    """Keeps trials.csv and best.json up to date in the driver and prints a line for each trial that ends."""

    def __init__(self, folder: Path, *, parameters: list[str], metric: str, mode: str, epochs: int, seed: int) -> None:
        self.folder = folder
        self.parameters = parameters
        self.metric = metric
        self.mode = mode
        self.epochs = epochs
        self.seed = seed
        self.num_samples = int(read_json(folder / "search.json")["num_samples"])
        self.rows: dict[str, Row] = {}

    def setup(self, *args: Any, **info: Any) -> None:
        """Called when a search starts and when it goes on: trials that had ended before keep their rows."""
        self.rows = {row["trial_id"]: row for row in read_rows(self.folder / "trials.csv")}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        before = self.rows.get(trial.trial_id, {})
        if before.get("status", "running") != "running":
            return  # it had ended, but Ray's last snapshot before a kill did not know: the same epochs come again
        self.rows[trial.trial_id] = {
            **before,
            "trial_id": trial.trial_id,
            "role": trial.config["role"],
            "status": "running",
            "epochs_done": before.get("epochs_done", 0),
            **trial.config["params"],
            "seconds": before.get("seconds", 0.0),
            "seed": self.seed,
            "error": "",
        }
        self._write()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        row = self._running_row(trial)
        if row is None:
            return
        if "diverged" in result:
            row["error"] = f"diverged: {result['diverged']}"
        else:
            row["epochs_done"] = result["epoch"]
            row["seconds"] += result["elapsed_s"]
            row |= {name: result[name] for name in MEASURES}

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        row = self._running_row(trial)
        if row is None:
            return
        if row["error"]:
            status: Status = "failed"
        else:
            status = "completed" if row["epochs_done"] >= self.epochs else "stopped"
        self._end(row, status)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        row = self._running_row(trial)
        if row is None:
            return
        row["error"] = row["error"] or _last_line(trial)
        self._end(row, "failed")

    def _running_row(self, trial: Trial) -> Row | None:
        row = self.rows[trial.trial_id]
        return row if row["status"] == "running" else None

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Drop trials that had only begun when the driver was killed and that Ray, knowing nothing of them, began
        again under another id."""
        known = {trial.trial_id for trial in trials}
        self.rows = {i: row for i, row in self.rows.items() if i in known or row["status"] != "running"}
        self._write()

    def _end(self, row: Row, status: Status) -> None:
        row["status"] = status
        self._write()
        if status == "completed":
            self._write_best()
        best = best_row(self.rows.values(), self.metric, self.mode)
        ended = sum(r["status"] != "running" for r in self.rows.values())
        line = f"{ended:>3}/{self.num_samples}  {row['trial_id']}  {status:<9}  {row['epochs_done']:>3} epochs"
        line += f"  {self.metric} {_number(row.get(self.metric))}"
        line += "".join(f"  {name} {row[name]:.3g}" for name in self.parameters)
        line += f"  {row['seconds']:.0f} s"
        if row["error"]:
            line += f"  {row['error']}"
        elif best is not None:
            line += f"  best {_number(best[self.metric])}"
        print(line, file=sys.__stdout__, flush=True)  # sys.stdout goes to the log while Ray runs

    def _write(self) -> None:
        write_rows(self.folder / "trials.csv", self.rows.values(), self.parameters)

    def _write_best(self) -> None:
        best = best_row(self.rows.values(), self.metric, self.mode)
        if best is not None:
            write_best(self.folder, best, list(self.rows.values()), self.parameters)


def best_row(rows: Iterable[Row], metric: str, mode: str) -> Row | None:
    """The best trial that reached its last epoch; the control, another method, does not compete."""
    ranked = [r for r in rows if r["status"] == "completed" and r["role"] != "control"]
    if not ranked:
        return None
    return (max if mode == "max" else min)(ranked, key=lambda row: row[metric])


def write_best(folder: Path, best: Row, rows: list[Row], parameters: list[str]) -> None:
    """Write best.json: the settings with which byot/train.py --best trains, and what they are compared with."""
    search = read_json(folder / "search.json")
    metric = search["metric"]
    params = {name: best[name] for name in parameters}
    compared = [r for r in rows if r["role"] != "sampled" and r["status"] == "completed"]
    write_json(
        folder / "best.json",
        {
            "search": search["name"],
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
            # Retraining uses all training images: nothing is held out.
            "config": {**search["config"], **params, "val_fraction": 0.0},
            **{key: search[key] for key in ("commit", "versions", "hardware")},
        },
    )


def table_columns(parameters: list[str]) -> list[str]:
    return ["trial_id", "role", "status", "epochs_done", *parameters, *MEASURES, "seconds", "seed", "error"]


def write_rows(path: Path, rows: Iterable[Row], parameters: list[str]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, table_columns(parameters), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """The rows of a trials.csv with their numbers as numbers; none if there is no file."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [{name: _parse(name, cell) for name, cell in row.items()} for row in csv.DictReader(file)]


TEXT_COLUMNS = ("trial_id", "role", "status", "error")
WHOLE_COLUMNS = ("epochs_done", "seed")


def _parse(column: str, cell: str) -> Any:
    if column in TEXT_COLUMNS:
        return cell
    if cell == "":
        return None
    return int(cell) if column in WHOLE_COLUMNS else float(cell)


def trials_table(rows: list[Row], parameters: list[str], metric: str, mode: str) -> str:
    """The trials as text, those that reached their last epoch first and best first."""
    sign = -1 if mode == "max" else 1
    order = {"completed": 0, "stopped": 1, "running": 2, "failed": 3}

    def rank(row: Row) -> tuple[int, float, float]:
        value = row.get(metric)
        depth = -row["epochs_done"] if row["status"] == "stopped" else 0
        return order[row["status"]], depth, sign * value if value is not None else 0.0

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
                *(_number(row.get(name)) for name in shown),
                f"{row['seconds']:.0f}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    aligned = [
        "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in aligned)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _last_line(trial: Trial) -> str:
    """The last line of a trial's traceback: the exception and its message."""
    path = trial.error_file
    lines = Path(path).read_text(errors="replace").strip().splitlines() if path and Path(path).is_file() else []
    return lines[-1].strip() if lines else "the worker died"


def update_search(folder: Path, **changes: Any) -> None:
    write_json(folder / "search.json", {**read_json(folder / "search.json"), **changes})
