"""Tables of trials and of retrained runs as cells of text, for the terminal and for the page."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pandas as pd

from analysis.trials import find_role, parameter_columns, rank
from analysis.verdict import accuracy_standard_error, num_images_behind
from byot.config import CLASSIFIERS
from byot.console import fold, text_table
from byot.search_files import SearchRecord, format_parameter, format_value, unit

NOTHING = "\N{EN DASH}"


class Table(NamedTuple):
    """A header and rows of cells. The first `num_text` columns are words, the rest numbers."""

    header: list[str]
    rows: list[list[str]]
    num_text: int

    def to_text(self, may_go: Sequence[str] = ()) -> str:
        return text_table(*self, may_go)


def ranking_table(search: SearchRecord, trials: pd.DataFrame, top: int) -> Table:
    """List the best configurations, then the reference's setting, if it is not one of them, and the control."""
    metric, num_images, parameters = search.metric, num_images_behind(search), parameter_columns(trials)
    ranked = enumerate((trial for _, trial in rank(trials, metric).iterrows()), start=1)
    listed = [(str(place), trial) for place, trial in ranked if place <= top or trial["role"] == "reference"]
    control = find_role(trials, "control", metric)
    if control is not None:
        listed.append((NOTHING, control))
    error = ["± se"] if num_images else []
    rows = [
        [
            *(place, trial["trial_id"], trial["role"], *_parameters(trial, parameters), _value(trial, metric)),
            *(f"{accuracy_standard_error(trial[metric], num_images):.2f}" for _ in error),
            *_accuracies(trial, "val"),
        ]
        for place, trial in listed
    ]
    header = ["rank", "trial", "role", *parameters, f"{metric} {unit(metric)}", *error, *CLASSIFIERS.values()]
    return Table(header, rows, num_text=3)


def trials_table(trials: pd.DataFrame) -> Table:
    """List every trial in the order they were started, failed ones too."""
    parameters = parameter_columns(trials)
    rows = [
        [
            *(trial["trial_id"], trial["role"], trial["status"], str(trial["epochs_done"])),
            *_parameters(trial, parameters),
            *_accuracies(trial, "val"),
            *(_value(trial, "val_nll"), _value(trial, "val_ece"), f"{trial['seconds']:.0f}"),
        ]
        for _, trial in trials.iterrows()
    ]
    header = ["trial", "role", "status", "epochs", *parameters, *CLASSIFIERS.values(), "NLL", "ECE", "seconds"]
    return Table(header, rows, num_text=3)


def summary_table(summary: pd.DataFrame, trials: pd.DataFrame) -> Table:
    """List the test accuracies, mean ± standard deviation over seeds, of each retrained configuration."""
    parameters, by_id = parameter_columns(trials), trials.set_index("trial_id")
    rows = [
        [
            *(runs["trial_id"], runs["role"], str(runs["epochs"]), runs["precision"], str(runs["num_runs"])),
            *_parameters(by_id.loc[runs["trial_id"]], parameters),
            *map(" ± ".join, zip(_accuracies(runs, "test"), _accuracies(runs, "test", "_sd"), strict=True)),
        ]
        for _, runs in summary.iterrows()
    ]
    header = ["trial", "role", "epochs", "precision", "n", *parameters, *(f"{name} %" for name in CLASSIFIERS.values())]
    return Table(header, rows, num_text=2)


def bullets(sentences: Iterable[str]) -> str:
    return "\n".join(fold(f"- {sentence}") for sentence in sentences)


def _parameters(trial: pd.Series, names: list[str]) -> list[str]:
    return [format_parameter(trial[name]) for name in names]


def _accuracies(row: pd.Series, split: str, ending: str = "") -> list[str]:
    """Of the classifiers, shallow to deep, and the ensemble."""
    return [_value(row, f"{split}_accuracy_{suffix}{ending}") for suffix in CLASSIFIERS]


def _value(row: pd.Series, column: str) -> str:
    return NOTHING if pd.isna(row[column]) else format_value(column, row[column])
