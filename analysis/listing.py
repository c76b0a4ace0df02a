"""Tables of trials and of retrained runs as cells of text, for the terminal and for the page."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from analysis.trials import CLASSIFIER_NAMES, SUFFIXES, find_role, parameter_columns, rank
from analysis.verdict import accuracy_standard_error, format_value, is_accuracy, unit

NOTHING = "\N{EN DASH}"


class Table(NamedTuple):
    """A header and rows of cells. The first `num_text` columns are words, the rest numbers."""

    header: list[str]
    rows: list[list[str]]
    num_text: int

    def to_text(self) -> str:
        widths = [max(len(row[i]) for row in (self.header, *self.rows)) for i in range(len(self.header))]
        lines = []
        for row in (self.header, *self.rows):
            cells = zip(row, widths, strict=True)
            aligned = (c.ljust(w) if i < self.num_text else c.rjust(w) for i, (c, w) in enumerate(cells))
            lines.append("  ".join(aligned).rstrip())
        return "\n".join(lines)


def number(value: Any, metric: str = "") -> str:
    return NOTHING if pd.isna(value) else format_value(metric, float(value))


def ranking_table(search: Mapping[str, Any], trials: pd.DataFrame, top: int) -> Table:
    """The best full-budget configurations, then the reference setting, if it is not one of them, and the control."""
    metric, epochs = search["metric"], search["config"]["epochs"]
    ranked = rank(trials, metric, search["mode"], epochs)
    rows = [(str(position), ranked.iloc[position - 1]) for position in range(1, min(top, len(ranked)) + 1)]
    for position in range(top + 1, len(ranked) + 1):
        if ranked.iloc[position - 1]["role"] == "reference":
            rows.append((str(position), ranked.iloc[position - 1]))
    control = find_role(trials, "control", metric, epochs)
    if control is not None:
        rows.append((NOTHING, control))
    parameters = parameter_columns(trials)
    num_images = int(search.get("num_val_images") or 0) if is_accuracy(metric) else 0
    error = ["± se"] if num_images else []
    header = ["rank", "trial", "role", *parameters, f"{metric} {unit(metric)}", *error]
    accuracies = _accuracies(trials, "val")
    return Table(
        [*header, *accuracies],
        [
            [
                position,
                trial["trial_id"],
                trial["role"],
                *(f"{trial[name]:.3g}" for name in parameters),
                number(trial[metric], metric),
                *([f"{accuracy_standard_error(trial[metric], num_images):.2f}"] if num_images else []),
                *(number(trial[column]) for column in accuracies.values()),
            ]
            for position, trial in rows
        ],
        num_text=3,
    )


def trials_table(trials: pd.DataFrame) -> Table:
    """Every trial in the order they were started, failed ones too."""
    parameters, accuracies = parameter_columns(trials), _accuracies(trials, "val")
    others = {name: column for name, column in (("NLL", "val_nll"), ("ECE", "val_ece")) if column in trials.columns}
    header = ["trial", "role", "status", "epochs", *parameters, *accuracies, *others, "seconds"]
    return Table(
        header,
        [
            [
                trial["trial_id"],
                trial["role"],
                trial["status"],
                str(trial["epochs_done"]),
                *(NOTHING if pd.isna(trial[name]) else f"{trial[name]:.3g}" for name in parameters),
                *(number(trial[column]) for column in accuracies.values()),
                *(number(trial[column], column) for column in others.values()),
                NOTHING if pd.isna(trial["seconds"]) else f"{trial['seconds']:.0f}",
            ]
            for _, trial in trials.iterrows()
        ],
        num_text=3,
    )


def summary_table(search: Mapping[str, Any], summary: pd.DataFrame, trials: pd.DataFrame) -> Table:
    """Test accuracies, mean ± standard deviation over seeds, of each retrained configuration."""
    parameters, accuracies = parameter_columns(trials), _accuracies(summary, "test")
    by_id = trials.set_index("trial_id")
    return Table(
        ["trial", "role", "epochs", "n", *parameters, *(f"{name} %" for name in accuracies)],
        [
            [
                runs["trial_id"],
                runs["role"],
                str(runs["epochs"]),
                str(runs["num_runs"]),
                *(f"{by_id.loc[runs['trial_id'], name]:.3g}" for name in parameters),
                *(f"{number(runs[column])} ± {number(runs[column + '_sd'])}" for column in accuracies.values()),
            ]
            for _, runs in summary.iterrows()
        ],
        num_text=2,
    )


def bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _accuracies(frame: pd.DataFrame, split: str) -> dict[str, str]:
    """Name of each classifier -> column of its accuracy, shallow to deep, then the ensemble."""
    columns = (f"{split}_accuracy_{suffix}" for suffix in SUFFIXES)
    return {n: c for n, c in zip(CLASSIFIER_NAMES, columns, strict=True) if c in frame.columns}
