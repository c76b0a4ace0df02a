"""Figures of a search and of its retrained runs, drawn without a display.

Optuna's own plots are not used: they leave out trials that were stopped early, or draw them like finished ones, and
know neither the control nor seeds. One mark means one thing in all figures of trials: a blue star the best, an orange
diamond the reference's setting, a green square deep supervision alone, a filled dot a trial that reached its last
epoch, a hollow one a trial that did not. Legends stand outside the axes, so they never cover a point.
"""

import io
import math
from itertools import cycle
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.effects import find_margin, fit_effects
from analysis.trials import NOT_POOLED, find_role, parameter_columns, pareto_front, rank
from analysis.verdict import accuracy_standard_error, describe_metric
from byot.config import CLASSIFIERS
from byot.search_files import ROLE_NAMES, ConfirmationRecord, Range, SearchRecord, format_value, unit

BLUE, ORANGE, GREEN, GREY, PALE = "#0b5cad", "#d1600a", "#1a8f63", "#8a8f98", "#c9cdd3"
INK, RED = "#3c434c", "#b3261e"
OTHER_COLOURS = ("#8460b0", "#a88a1e", "#b8497f", "#5b6570", "#39a0c4")  # retrained configurations after the best
ROLE_MARKS = {"best": (BLUE, "*"), "reference": (ORANGE, "D"), "control": (GREEN, "s")}
STATUS_MARKS: dict[str, dict[str, Any]] = {
    "completed": {"s": 26, "color": INK, "edgecolor": "white", "linewidths": 0.6, "label": "completed"},
    "stopped": {"s": 20, "facecolor": "white", "linewidths": 1.2, "label": "stopped early"},
    "running": {"s": 20, "facecolor": "white", "edgecolor": BLUE, "linewidths": 1.2, "label": "running"},
    "failed": {"s": 26, "color": RED, "marker": "x", "label": "failed"},
}
WIDTH = 7.6  # inches, the page's text width
LEGEND_WIDTH = 124  # letters in a row of it
ENLARGED = 0.2  # the share of a learning curve, its end, that is drawn once more, larger
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaed",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "byot",  # the same figure gives the same bytes
}
Drawing = tuple[Figure, str]  # with the words that stand for it where it cannot be seen


class Mark(NamedTuple):
    """A configuration that stands out, in one colour and with one marker in every figure."""

    row: pd.Series  # of the trial table, or of the summary of retrained runs
    label: str
    colour: str
    marker: str


def draw_pictures(
    search: SearchRecord,
    trials: pd.DataFrame,
    curves: pd.DataFrame,
    retrained: pd.DataFrame,
    summary: pd.DataFrame,
    confirmation: ConfirmationRecord | None = None,
) -> dict[str, Drawing]:
    """Draw every figure for which there is something to draw, by its name."""
    with mpl.rc_context(STYLE):
        drawings = {
            "confirmation": draw_confirmation(confirmation) if confirmation else None,
            "history": draw_history(search, trials),
            "front": draw_front(search, trials),
            "parameters": draw_parameters(search, trials),
            "effects": draw_effects(search, trials),
            "curves": draw_curves(search, trials, curves),
            "classifiers": draw_classifiers(search, trials),
        }
        for budget, rows in summary.groupby(NOT_POOLED):
            of_it = (retrained[NOT_POOLED] == list(budget)).all(axis="columns")
            drawings["-".join(["retrained", *map(str, budget)])] = draw_retrained(retrained[of_it], rows)
    return {name: drawing for name, drawing in drawings.items() if drawing is not None}


def to_svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


# ---------------------------------------------------------------- a search


def draw_history(search: SearchRecord, trials: pd.DataFrame) -> Drawing | None:
    """Draw the metric of each trial in the order they were started, with the best so far."""
    if trials.empty:
        return None
    metric = search.metric
    numbered = trials.assign(number=range(1, len(trials) + 1))
    figure, (axes,) = make_panels(1, 3.5)
    _draw_trials(axes, search, numbered, "number")
    competing = numbered[_whole(numbered, metric) & (numbered["role"] != "control")]
    best = "none has reached the last epoch"
    if not competing.empty:
        so_far = competing[metric].cummax() if search.mode == "max" else competing[metric].cummin()
        ends = [*competing["number"], len(trials)]
        axes.step(ends, [*so_far, so_far.iloc[-1]], where="post", color=BLUE, linewidth=1.4, label="best so far")
        best = f"the best has {format_value(metric, so_far.iloc[-1])}"
    axes.set_xlabel("trial, in the order they were started")
    axes.set_ylabel(metric_label(metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    add_legend(figure)
    return figure, f"{describe_metric(metric)} of {len(trials)} trials in order; {best}."


def draw_parameters(search: SearchRecord, trials: pd.DataFrame) -> Drawing | None:
    """Draw each searched parameter against the metric."""
    names = parameter_columns(trials)
    if not names or trials[search.metric].isna().all():
        return None
    figure, panels = make_parameter_panels(len(names))
    for axes, name in zip(panels, names, strict=True):
        bounds = search.space.get(name)
        if isinstance(bounds, Range):
            axes.set_xscale("log" if bounds.log else "linear")
            axes.plot([bounds.low, bounds.high], [trials[search.metric].max()] * 2, linestyle="none")  # its whole range
        _draw_trials(axes, search, trials, name)
        axes.set_xlabel(name)
    panels[0].set_ylabel(metric_label(search.metric))
    add_legend(figure)
    return figure, f"One panel for each of {', '.join(names)}: its value against {describe_metric(search.metric)}."


def draw_effects(search: SearchRecord, trials: pd.DataFrame) -> Drawing | None:
    """Draw what each parameter does, the others taken over their ranges, and where it is near its best."""
    effects = fit_effects(search, trials)
    if not effects:
        return None
    margin = find_margin(search)
    whole = trials[_whole(trials, search.metric) & (trials["role"] != "control")]
    stopped = trials[trials["status"] == "stopped"]
    figure, panels = make_parameter_panels(len(effects))
    words = []
    for axes, (name, effect) in zip(panels, effects.items(), strict=True):
        axes.set_xscale("log" if effect.bounds.log else "linear")
        low, high = effect.mean - effect.half_width, effect.mean + effect.half_width
        axes.fill_between(effect.values, low, high, color=BLUE, alpha=0.18, linewidth=0, label="95 % band")
        axes.plot(effect.values, effect.mean, color=BLUE, linewidth=1.6, label="mean over the other parameters")
        axes.scatter(whole[name], whole[search.metric], **STATUS_MARKS["completed"] | {"s": 12, "color": GREY})
        ticks: dict[str, Any] = {"marker": "|", "color": GREY, "linestyle": "none", "label": "stopped early"}
        axes.plot(stopped[name], [0.03] * len(stopped), transform=axes.get_xaxis_transform(), **ticks)
        axes.set_xlabel(name)
        if effect.is_flat:
            words.append(f"{name}: no effect is shown")
            continue
        ends = effect.near_best(search.mode, margin)
        axes.plot(
            ends, [0.02] * 2, color=ORANGE, linewidth=4, transform=axes.get_xaxis_transform(), label="near its best"
        )
        words.append(
            f"{name}: best from {ends[0]:.3g} to {ends[1]:.3g}, within {margin:g} {unit(search.metric, 'points')}"
        )
    panels[0].set_ylabel(metric_label(search.metric))
    add_legend(figure)
    return figure, f"What each parameter does to {describe_metric(search.metric)}. {'; '.join(words)}."


def draw_curves(search: SearchRecord, trials: pd.DataFrame, curves: pd.DataFrame) -> Drawing | None:
    """Draw the metric of every trial after each epoch, and the last epochs once more, larger."""
    metric, epochs = search.metric, search.config.epochs
    measured = curves[curves[metric].notna()]
    if measured.empty:
        return None
    marks = {mark.row["trial_id"]: mark for mark in find_marks(search, trials)}
    completed = set(trials["trial_id"][_whole(trials, metric)])
    first = min(epochs * (1 - ENLARGED), epochs - 1)
    figure, panels = make_panels(2, 3.5, width_ratios=[2, 1])
    for axes in panels:
        for trial_id, curve in measured.groupby("trial_id"):
            mark = marks.get(trial_id)
            colour = mark.colour if mark else GREY if trial_id in completed else PALE
            axes.plot(
                curve["epoch"],
                curve[metric],
                color=colour,
                linewidth=1.7 if mark else 0.9,
                marker="o" if len(curve) == 1 else "",
                markersize=3,
                zorder=4 if mark else 2,
                label=mark.label if mark else "other trials",
            )
        axes.set_xlabel("epoch" if axes is panels[0] else "epoch, the last ones enlarged")
        axes.set_xlim(0 if axes is panels[0] else first, epochs * 1.01)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    late = measured[measured["epoch"] > first]
    panels[0].set_ylabel(metric_label(metric))
    panels[1].set_ylim(metric_range(late[metric], late[metric][late["trial_id"].isin(completed)], search.mode))
    add_legend(figure)
    return figure, f"{describe_metric(metric)} after each epoch of {measured['trial_id'].nunique()} trials, as lines."


def draw_front(search: SearchRecord, trials: pd.DataFrame) -> Drawing | None:
    """Draw the first two of several metrics against each other, with the Pareto front."""
    whole = trials[_whole(trials, search.metric)]
    if len(search.metrics) < 2 or whole.empty:
        return None
    first, second = search.metrics[:2]
    front = pareto_front(trials, (first, second))
    figure, (axes,) = make_panels(1, 3.4)
    axes.scatter(whole[first], whole[second], **STATUS_MARKS["completed"])
    axes.plot(front[first], front[second], color=BLUE, linewidth=1.2, marker="o", markersize=5, label="Pareto front")
    for mark in find_marks(search, trials):
        _draw_mark(axes, mark, mark.row[first], mark.row[second])
    axes.set_xlabel(metric_label(first))
    axes.set_ylabel(metric_label(second))
    add_legend(figure)
    return figure, f"{describe_metric(first)} against {describe_metric(second)}; {len(front)} trials are on the front."


def draw_confirmation(confirmation: ConfirmationRecord) -> Drawing | None:
    """Draw how far each configuration is from the chosen one on the same fresh seed."""
    arms = confirmation.arms
    chosen = next((arm for arm in arms if arm.trial_id == confirmation.choice), None)
    if chosen is None or set(chosen.values) <= {None}:
        return None
    names = [ROLE_NAMES.get(arm.role, f"trial {arm.trial_id}") for arm in arms]
    against = f"from {names[arms.index(chosen)]}"
    figure, (axes,) = make_panels(1, 0.8 + 0.42 * len(arms))
    axes.axvline(0, color=BLUE, linewidth=1.2)
    means = []
    for y, arm in enumerate(arms):
        pairs = list(zip(arm.values, chosen.values, strict=False))[: confirmation.num_rounds]
        apart = [value - other for value, other in pairs if value is not None and other is not None]
        colour = BLUE if arm is chosen else ROLE_MARKS.get(arm.role, (GREY, ""))[0]
        axes.scatter(apart, [y] * len(apart), s=16, color=colour, alpha=0.6, linewidths=0)
        if apart:
            axes.scatter(np.mean(apart), y, s=42, color=colour, marker="D", edgecolor="white", zorder=4)
            means.append(f"{names[y]} {np.mean(apart):+.2f}")
    axes.set_yticks(range(len(arms)), names)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    points = unit(confirmation.metric, "points")
    axes.set_xlabel(f"{describe_metric(confirmation.metric)}: {points} {against} on the same seed")
    return figure, f"Mean difference {against}: {'; '.join(means)}."


# ---------------------------------------------------------------- by classifier


def draw_classifiers(search: SearchRecord, trials: pd.DataFrame) -> Drawing | None:
    """Draw the validation accuracy of the four classifiers and the ensemble, for the trials that stand out."""
    marks = find_marks(search, trials)
    if not marks:
        return None
    columns = [f"val_accuracy_{suffix}" for suffix in CLASSIFIERS]
    values = np.array([mark.row[columns].to_numpy(dtype=float) for mark in marks])
    count = search.num_val_images
    errors = np.vectorize(accuracy_standard_error)(values, count) if count else np.zeros_like(values)
    return _draw_by_classifier(marks, values, errors, list(values[:, None]), "validation accuracy (%)")


def draw_retrained(retrained: pd.DataFrame, summary: pd.DataFrame) -> Drawing:
    """Draw the test accuracy by classifier of each retrained configuration."""
    columns = [f"test_accuracy_{suffix}" for suffix in CLASSIFIERS]
    marks, runs, others = [], [], cycle((BLUE, *OTHER_COLOURS))
    for _, row in summary.iterrows():
        label = f"{ROLE_NAMES.get(row['role'], 'trial ' + row['trial_id'])} (n = {row['num_runs']})"
        marks.append(Mark(row, label, *(ROLE_MARKS.get(row["role"]) or (next(others), "o"))))
        runs.append(retrained[columns][retrained["trial_id"] == row["trial_id"]].to_numpy())
    errors = summary[[f"{column}_sd" for column in columns]].fillna(0).to_numpy()
    return _draw_by_classifier(marks, summary[columns].to_numpy(), errors, runs, "test accuracy (%)")


def _draw_by_classifier(
    marks: list[Mark], values: np.ndarray, errors: np.ndarray, runs: list[np.ndarray], label: str
) -> Drawing:
    """Draw one panel for each of K classifiers and the ensemble, all of one scale.

    Classifiers differ by ten points and configurations by half a point: on one axis these could not be told apart.
    Of each configuration there are values and errors [K+1] and runs [runs, K+1].
    """
    figure, panels = make_panels(len(CLASSIFIERS), 3.0)
    ends = np.concatenate([values - errors, values + errors, *runs])
    middles, half = (ends.min(axis=0) + ends.max(axis=0)) / 2, 0.58 * max(np.ptp(ends, axis=0).max(), 0.5)
    for i, (axes, name) in enumerate(zip(panels, CLASSIFIERS.values(), strict=True)):
        for x, mark in enumerate(marks):
            look: dict[str, Any] = {"color": mark.colour, "marker": mark.marker, "label": mark.label}
            axes.errorbar(x, values[x, i], errors[x, i] or None, linestyle="none", capsize=3, zorder=4, **look)
            around = x + np.linspace(-0.22, 0.22, len(runs[x])) * (len(runs[x]) > 1)
            axes.scatter(around, runs[x][:, i], s=9, color=mark.colour, alpha=0.5, linewidths=0)
        axes.set_ylim(middles[i] - half, middles[i] + half)
        axes.set_xlim(-0.7, len(marks) - 0.3)
        axes.set_xticks([])
        axes.set_xlabel(name)
    panels[0].set_ylabel(label)
    add_legend(figure)
    words = "; ".join(f"{m.label} {', '.join(f'{v:.1f}' for v in row)}" for m, row in zip(marks, values, strict=True))
    return figure, f"{label} of classifiers 1/4 to 4/4 and the ensemble: {words}."


# ---------------------------------------------------------------- parts


def find_marks(search: SearchRecord, trials: pd.DataFrame) -> list[Mark]:
    """The best, the reference's setting and the control, where they reached the last epoch; each trial once."""
    found = {
        trial["trial_id"]: Mark(trial, f"best: {ROLE_NAMES.get(trial['role'], '')}".rstrip(": "), *ROLE_MARKS["best"])
        for _, trial in rank(trials, search.metric).head(1).iterrows()
    }
    for role, name in ROLE_NAMES.items():
        trial = find_role(trials, role, search.metric)
        if trial is not None:
            found.setdefault(trial["trial_id"], Mark(trial, name, *ROLE_MARKS[role]))
    return list(found.values())


def metric_label(metric: str) -> str:
    return f"{describe_metric(metric)} ({unit(metric)})".replace(", ", "\n")


def metric_range(values: pd.Series, whole: pd.Series, mode: str) -> tuple[float, float]:
    """Limits of an axis that shows how the completed trials differ, and not how low the others were when stopped."""
    if mode == "min":
        low, high = metric_range(-values, -whole, "max")
        return -high, -low
    if values.isna().all():
        return 0.0, 1.0
    top, bottom = values.max(), whole.quantile(0.1) if len(whole) > 1 else values.min()
    spread = max(top - bottom, 0.01 * abs(top), 1e-3)
    # Room below for those not much worse, unless there is none so low.
    return float(max(bottom - 0.8 * spread, values.min() - 0.12 * spread)), float(top + 0.12 * spread)


def _whole(trials: pd.DataFrame, metric: str) -> pd.Series:
    return (trials["status"] == "completed") & trials[metric].notna()


def make_panels(columns: int, height: float, rows: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def make_parameter_panels(count: int) -> tuple[Figure, list[Axes]]:
    """Make a panel for each parameter, three in a row and with one vertical axis; what is left of the row is empty."""
    rows = math.ceil(count / 3)
    figure, panels = make_panels(min(3, count), 2.8 * rows + 0.4, rows, sharey=True)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _draw_trials(axes: Axes, search: SearchRecord, trials: pd.DataFrame, x: str) -> None:
    """Draw the metric of every trial at its `x`, and lines at the reference's setting and the control.

    A triangle at the axis' edge is a trial that lies outside it; one that failed stands at the worse edge.
    """
    metric, is_max = search.metric, search.mode == "max"
    low, high = metric_range(trials[metric], trials[metric][_whole(trials, metric)], search.mode)
    axes.set_ylim(low, high)
    marks = find_marks(search, trials)
    if axes.get_xscale() == "log":
        trials = trials.assign(**{x: trials[x].where(trials[x] > 0)})  # no place for deep supervision's beta of 0
    y, edge = trials[metric].mask(trials["status"] == "failed", -math.inf if is_max else math.inf), 0.02 * (high - low)
    shown = trials.assign(y=y.clip(low + edge, high - edge), is_inside=y.between(low, high)).set_index("trial_id")
    for mark in marks:
        if mark.row["role"] in ROLE_NAMES:
            axes.axhline(mark.row[metric], color=mark.colour, linewidth=1, linestyle=(0, (5, 3)), zorder=1)
        _draw_mark(axes, mark, shown[x][mark.row["trial_id"]], mark.row[metric])
        shown = shown.drop(mark.row["trial_id"])
    for (status, is_inside), group in shown.dropna(subset=["y"]).groupby(["status", "is_inside"]):
        look = {"marker": "o" if is_inside else "v" if is_max else "^"} | STATUS_MARKS[status]
        if status == "stopped":
            look["edgecolor"] = mpl.colormaps["Greys"](0.4 + 0.5 * group["epochs_done"] / search.config.epochs)
        axes.scatter(group[x], group["y"], zorder=3, **look)


def _draw_mark(axes: Axes, mark: Mark, x: float, y: float) -> None:
    size = 150 if mark.marker == "*" else 42
    axes.scatter(x, y, s=size, color=mark.colour, marker=mark.marker, edgecolor="white", zorder=5, label=mark.label)


def add_legend(figure: Figure) -> None:
    """Add one legend above the axes, each label once."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries
    if entries:
        columns = max(1, min(len(entries), LEGEND_WIDTH // (max(map(len, entries)) + 8)))
        figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=columns)
