"""Figures of a search and of its retrained runs, drawn without a display.

One colour means one thing in all of them: blue the best, orange the reference setting, green deep supervision alone,
grey the rest. Legends stand outside the axes, so they never cover a point.
"""

import io
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.trials import (
    CLASSIFIER_NAMES,
    SUFFIXES,
    find_role,
    parameter_columns,
    pareto_front,
    rank,
    search_metrics,
)
from analysis.verdict import ROLE_NAMES, accuracy_standard_error, describe_metric, format_value, metric_mode, unit

BLUE, ORANGE, GREEN, GREY, PALE = "#0b5cad", "#d1600a", "#1a8f63", "#8a8f98", "#c9cdd3"
RED = "#b3261e"
BEST = "best"
ROLE_COLOURS = {"reference": ORANGE, "control": GREEN}
ROLE_MARKERS = {"reference": "D", "control": "s"}
STAR: dict[str, Any] = {"marker": "*", "s": 150, "edgecolor": "white", "zorder": 5}
DIAMOND: dict[str, Any] = {"marker": "D", "s": 42, "edgecolor": "white", "zorder": 4}
OTHER_COLOURS = ("#8460b0", "#a88a1e", "#b8497f", "#5b6570", "#39a0c4")  # retrained configurations after the best
EPOCH_COLOURS = "viridis_r"
WIDTH = 7.6  # inches, the page's text width
LEGEND_WIDTH = 124  # letters in a row of it
MIN_EPOCHS_ENLARGED, SHARE_ENLARGED = 20, 0.2  # learning curves: the last fifth is drawn once more, larger
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#6b717a",
    "axes.labelcolor": "#24292f",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaed",
    "grid.linewidth": 0.8,
    "xtick.color": "#4b5159",
    "ytick.color": "#4b5159",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.4,
    "svg.fonttype": "path",
    "svg.hashsalt": "byot",  # the same figure gives the same bytes
}


class Picture(NamedTuple):
    """A figure with its heading, what to see in it, and the words that stand for it where it cannot be seen."""

    name: str
    title: str
    caption: str
    alternative: str
    figure: Figure


class Marked(NamedTuple):
    """The trials that stand out: the best, the reference setting and the control, where they reached the last epoch."""

    best: pd.Series | None
    reference: pd.Series | None
    control: pd.Series | None


class Group(NamedTuple):
    """What is drawn of one configuration in each classifier's panel (K classifiers, then the ensemble)."""

    label: str
    colour: str
    marker: str
    values: np.ndarray  # [K+1]
    errors: np.ndarray | None  # [K+1]
    runs: np.ndarray  # [runs, K+1]


@contextmanager
def style() -> Iterator[None]:
    with mpl.rc_context(STYLE):
        yield


def draw_pictures(
    search: Mapping[str, Any],
    trials: pd.DataFrame,
    curves: pd.DataFrame,
    retrained: pd.DataFrame,
    summary: pd.DataFrame,
    confirmation: Mapping[str, Any] | None = None,
) -> list[Picture]:
    """Every figure there is something to draw in."""
    with style():
        pictures = (
            draw_confirmation(confirmation),
            draw_history(search, trials),
            draw_front(search, trials),
            draw_parameters(search, trials),
            draw_curves(search, trials, curves),
            draw_classifiers(search, trials),
            *draw_retrained(search, trials, retrained, summary),
        )
    return [picture for picture in pictures if picture is not None]


def to_svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


# ---------------------------------------------------------------- a search


def draw_history(search: Mapping[str, Any], trials: pd.DataFrame) -> Picture | None:
    """The metric of each trial in the order they were started, with the best so far."""
    metric, mode, epochs = search["metric"], search["mode"], search["config"]["epochs"]
    if trials.empty:
        return None
    marked = find_marked(search, trials)
    frame = trials.assign(number=range(1, len(trials) + 1))
    whole = _whole(frame, metric, epochs)
    low, high = metric_range(frame[metric], frame[metric][whole], mode)
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.set_ylim(low, high)
    if marked.best is not None:
        number = frame["number"][frame["trial_id"] == marked.best["trial_id"]]
        axes.scatter(number, [marked.best[metric]], label=best_label(marked), color=BLUE, **STAR)
    for role, trial in (("reference", marked.reference), ("control", marked.control)):
        if trial is not None:
            label = f"{ROLE_NAMES[role]}, {format_value(metric, trial[metric])}"
            axes.axhline(trial[metric], color=ROLE_COLOURS[role], linewidth=1.2, linestyle=(0, (5, 3)), label=label)
    competing = frame[whole & (frame["role"] != "control")]
    if not competing.empty:
        so_far = competing[metric].cummax() if mode == "max" else competing[metric].cummin()
        ends = [*competing["number"], len(frame)]
        axes.step(ends, [*so_far, so_far.iloc[-1]], where="post", color=BLUE, linewidth=1.4, label="best so far")
    _scatter(axes, frame["number"][whole], frame[metric][whole], mode, color=BLUE, label="completed", size=26)
    for status, colour, label in (("stopped", GREY, "stopped early"), ("running", BLUE, "running")):
        there = (frame["status"] == status) & frame[metric].notna()
        _scatter(axes, frame["number"][there], frame[metric][there], mode, edge=colour, label=label, size=20)
    failed = frame["number"][frame["status"] == "failed"]
    if not failed.empty:
        edge = [0.03 if mode == "max" else 0.97] * len(failed)  # they have no value: they stand on the worse side
        transform = axes.get_xaxis_transform()
        axes.scatter(failed, edge, marker="x", s=26, color=RED, transform=transform, label="failed")
    axes.set_xlabel("trial, in the order they were started")
    axes.set_ylabel(metric_label(metric))
    axes.set_xlim(0.2, len(frame) + 0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure)
    best = "none has reached the last epoch"
    if marked.best is not None:
        best = f"the best is trial {marked.best['trial_id']} with {format_value(metric, marked.best[metric])}"
    return Picture(
        "history",
        "Search history",
        "Filled points reached the last epoch and may be compared; hollow ones were stopped earlier, at a lower "
        "budget, or still run. Triangles at the edge lie outside the axis.",
        f"{describe_metric(metric)} of {len(frame)} trials in order; {best}.",
        figure,
    )


def draw_parameters(search: Mapping[str, Any], trials: pd.DataFrame) -> Picture | None:
    """Each searched parameter against the metric."""
    metric, mode, epochs = search["metric"], search["mode"], search["config"]["epochs"]
    names = parameter_columns(trials)
    measured = trials[trials[metric].notna()]
    if measured.empty or not names:
        return None
    marked = find_marked(search, trials)
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(WIDTH, 2.8 * rows + 0.4), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    whole = _whole(measured, metric, epochs)
    limits = metric_range(measured[metric], measured[metric][whole], mode)
    best_id = None if marked.best is None else marked.best["trial_id"]
    colours, norm = mpl.colormaps[EPOCH_COLOURS], Normalize(0, epochs)
    for axes, name in zip(panels, names, strict=False):
        bounds = search["space"].get(name, {})
        axes.set_ylim(*limits)
        if {"low", "high"} <= set(bounds):
            # Nothing to see, but the axis then shows the whole range that was searched.
            axes.plot([bounds["low"], bounds["high"]], [limits[0]] * 2, linestyle="none")
        values = measured[name].notna()
        if bounds.get("log"):
            axes.set_xscale("log")
            values &= measured[name] > 0  # deep supervision's beta of 0 has no place on a logarithmic axis
        if marked.control is not None:
            label = ROLE_NAMES["control"]
            axes.axhline(marked.control[metric], color=GREEN, linewidth=1.2, linestyle=(0, (5, 3)), label=label)
        plain = values & (measured["role"] != "control")
        early = plain & ~whole
        edges = colours(norm(measured["epochs_done"][early]))
        _scatter(axes, measured[name][early], measured[metric][early], mode, edge=edges, size=18, label="")
        shown = plain & whole
        _scatter(
            axes, measured[name][shown], measured[metric][shown], mode, color="#3c434c", size=22, label="completed"
        )
        if marked.reference is not None and best_id != marked.reference["trial_id"]:
            at = marked.reference[name], marked.reference[metric]
            axes.scatter(*at, label=ROLE_NAMES["reference"], color=ORANGE, **DIAMOND)
        if marked.best is not None:
            axes.scatter(marked.best[name], marked.best[metric], label=best_label(marked), color=BLUE, **STAR)
        axes.set_xlabel(name)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel(metric_label(metric))
    if not whole.all():
        bar = figure.colorbar(
            ScalarMappable(norm, colours), ax=panels, pad=0.015, aspect=28, ticks=MaxNLocator(8, integer=True)
        )
        bar.set_label("epochs done")
        bar.outline.set_visible(False)
    _legend(figure)
    return Picture(
        "parameters",
        "Parameters",
        "Filled points reached the last epoch, hollow ones did not and are coloured by how far they came. "
        "Triangles at the edge lie outside the axis.",
        f"One panel for each of {', '.join(names)}: its value against {describe_metric(metric)}.",
        figure,
    )


def draw_curves(search: Mapping[str, Any], trials: pd.DataFrame, curves: pd.DataFrame) -> Picture | None:
    """The metric of every trial after each epoch."""
    metric = search["metric"]
    if metric not in curves.columns or curves[metric].notna().sum() == 0:
        return None
    marked = find_marked(search, trials)
    named: dict[str, tuple[str, str]] = {}
    if marked.best is not None:
        named[marked.best["trial_id"]] = (best_label(marked), BLUE)
    for role, colour in ROLE_COLOURS.items():
        if (trial := getattr(marked, role)) is not None:
            named.setdefault(trial["trial_id"], (ROLE_NAMES[role], colour))
    found = dict(iter(curves[curves[metric].notna()].groupby("trial_id", sort=False)))
    by_trial = {i: found[i] for i in (*named, *found) if i in found}  # in the legend's order
    epochs = search["config"]["epochs"]
    status = trials.set_index("trial_id")["status"].to_dict()
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    widths = [2, 1] if epochs >= MIN_EPOCHS_ENLARGED else [1]
    panels = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False).flat)
    for axes in panels:
        for trial_id, curve in by_trial.items():
            marker = "o" if len(curve) == 1 else ""
            if trial_id in named:
                label, colour = named[trial_id]
                look: dict[str, Any] = {"color": colour, "linewidth": 1.7, "label": label, "zorder": 4}
            else:
                colour = GREY if status.get(trial_id) == "completed" else PALE
                look = {"color": colour, "linewidth": 0.9, "label": "other trials"}
            axes.plot(curve["epoch"], curve[metric], marker=marker, markersize=3, **look)
        axes.set_xlabel("epoch")
        axes.set_xlim(0, epochs * 1.01)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5 if axes is not panels[0] else 9, integer=True))
    panels[0].set_ylabel(metric_label(metric))
    if len(panels) > 1:
        first = epochs * (1 - SHARE_ENLARGED)
        late = curves[curves["epoch"] > first]
        panels[1].set_xlim(first, epochs * (1 + 0.02 * SHARE_ENLARGED))
        panels[1].set_xlabel("epoch, the last ones enlarged")
        whole = trials["trial_id"][_whole(trials, metric, epochs)]
        panels[1].set_ylim(metric_range(late[metric], late[metric][late["trial_id"].isin(whole)], search["mode"]))
    _legend(figure)
    return Picture(
        "curves",
        "Learning curves",
        "Every trial, epoch by epoch; the palest lines were not completed.",
        f"{describe_metric(metric)} against the epoch, one line for each of {curves['trial_id'].nunique()} trials.",
        figure,
    )


def draw_front(search: Mapping[str, Any], trials: pd.DataFrame) -> Picture | None:
    """The first two of several metrics against each other, with the Pareto front."""
    metrics, epochs = search_metrics(search)[:2], search["config"]["epochs"]
    whole = trials[_whole(trials, metrics[0], epochs)]
    if len(metrics) < 2 or whole.empty:
        return None
    first, second = metrics
    front = pareto_front(trials, {metric: metric_mode(metric) for metric in metrics}, epochs)
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(whole[first], whole[second], s=22, color="#3c434c", edgecolor="white", label="completed")
    axes.plot(front[first], front[second], color=BLUE, linewidth=1.2, marker="o", markersize=5, label="Pareto front")
    for role, name in ROLE_NAMES.items():
        trial = find_role(trials, role, first, epochs)
        if trial is not None:
            axes.scatter(trial[first], trial[second], color=ROLE_COLOURS[role], label=name, **DIAMOND)
    axes.set_xlabel(metric_label(first))
    axes.set_ylabel(metric_label(second))
    _legend(figure)
    return Picture(
        "front",
        "Pareto front",
        "Trials that reached their last epoch, one run each. On the front none is beaten in one metric by another that "
        "is not worse in the other. Deep supervision alone, another method, is shown and not on the front.",
        f"{describe_metric(first)} against {describe_metric(second)}; {len(front)} trials are on the front.",
        figure,
    )


def draw_confirmation(confirmation: Mapping[str, Any] | None) -> Picture | None:
    """How far each configuration is from the chosen one on the same fresh seed."""
    if confirmation is None:
        return None
    arms = {arm["trial_id"]: arm for arm in confirmation["arms"]}
    chosen = arms.get(confirmation.get("choice"))
    if chosen is None or not any(value is not None for value in chosen["values"]):
        return None
    figure = Figure(figsize=(WIDTH, 0.8 + 0.42 * len(arms)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color=BLUE, linewidth=1.2)
    words = []
    for y, arm in enumerate(arms.values()):
        rounds = slice(confirmation["num_rounds"])
        pairs = zip(arm["values"][rounds], chosen["values"][rounds], strict=False)
        apart = [value - other for value, other in pairs if value is not None and other is not None]
        colour = BLUE if arm is chosen else ROLE_COLOURS.get(arm["role"], GREY)
        axes.scatter(apart, [y] * len(apart), s=16, color=colour, alpha=0.6, linewidths=0)
        if apart:
            axes.scatter(np.mean(apart), y, color=colour, **DIAMOND)
            words.append(f"{_arm_name(arm)} {np.mean(apart):+.2f}")
    axes.set_yticks(range(len(arms)), [_arm_name(arm) for arm in arms.values()])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    metric = confirmation["metric"]
    points = "nats" if "_nll" in metric else "points"
    axes.set_xlabel(f"{describe_metric(metric)}: {points} from {_arm_name(chosen)} on the same seed")
    return Picture(
        "confirmation",
        "Run again over fresh seeds",
        "Each dot is one seed: the same weights, order of images and validation split for all configurations. Diamonds "
        "are the means. One that was clearly worse was not run with all seeds.",
        f"Mean difference from {_arm_name(chosen)}: {'; '.join(words)}.",
        figure,
    )


def _arm_name(arm: Mapping[str, Any]) -> str:
    return ROLE_NAMES.get(arm["role"], f"trial {arm['trial_id']}")


def draw_classifiers(search: Mapping[str, Any], trials: pd.DataFrame) -> Picture | None:
    """Validation accuracy of the four classifiers and the ensemble, for the trials that stand out."""
    columns = [f"val_accuracy_{suffix}" for suffix in SUFFIXES]
    marked = find_marked(search, trials)
    if marked.best is None or not set(columns) <= set(trials.columns):
        return None
    shown = [(best_label(marked), BLUE, "o", marked.best)]
    for role, name in ROLE_NAMES.items():
        trial = getattr(marked, role)
        if trial is not None and trial["trial_id"] != marked.best["trial_id"]:
            shown.append((name, ROLE_COLOURS[role], ROLE_MARKERS[role], trial))
    num_images = int(search.get("num_val_images") or 0)
    groups = []
    for label, colour, marker, trial in shown:
        values = trial[columns].to_numpy(dtype=float)
        errors = np.array([accuracy_standard_error(v, num_images) for v in values]) if num_images else None
        groups.append(Group(label, colour, marker, values, errors, runs=values[None]))
    figure = _draw_by_classifier(groups, "validation accuracy (%)")
    error = f" Bars are ± one binomial standard error ({num_images:,} images)." if num_images else ""
    words = "; ".join(f"{group.label} {', '.join(f'{value:.1f}' for value in group.values)}" for group in groups)
    return Picture(
        "classifiers",
        "Accuracy by classifier",
        f"Shallow to deep, then the ensemble; one run each. All panels have the same scale.{error}",
        f"Validation accuracy in percent of classifiers 1/4 to 4/4 and the ensemble: {words}.",
        figure,
    )


# ---------------------------------------------------------------- retrained runs


def draw_retrained(
    search: Mapping[str, Any], trials: pd.DataFrame, retrained: pd.DataFrame, summary: pd.DataFrame
) -> list[Picture]:
    """Test accuracy by classifier of each retrained configuration, one figure for each number of epochs."""
    columns = [f"test_accuracy_{suffix}" for suffix in SUFFIXES]
    pictures = []
    for epochs, group in summary.groupby("epochs"):
        groups: list[Group] = []
        for _, row in group.iterrows():
            runs = retrained[(retrained["trial_id"] == row["trial_id"]) & (retrained["epochs"] == epochs)]
            colour = ROLE_COLOURS.get(row["role"])
            if colour is None:
                colour = OTHER_COLOURS[(len(groups) - 1) % len(OTHER_COLOURS)] if groups else BLUE
            several = row["num_runs"] > 1
            groups.append(
                Group(
                    label=f"{ROLE_NAMES.get(row['role'], 'trial ' + row['trial_id'])} (n = {row['num_runs']})",
                    colour=colour,
                    marker=ROLE_MARKERS.get(row["role"], "o"),
                    values=row[columns].to_numpy(dtype=float),
                    errors=row[[f"{c}_sd" for c in columns]].to_numpy(dtype=float) if several else None,
                    runs=runs[columns].to_numpy(dtype=float),
                )
            )
        figure = _draw_by_classifier(groups, "test accuracy (%)")
        words = "; ".join(
            f"{ROLE_NAMES.get(row['role'], row['trial_id'])} {', '.join(f'{row[c]:.1f}' for c in columns)}"
            for _, row in group.iterrows()
        )
        pictures.append(
            Picture(
                f"retrained-{epochs}",
                f"Retrained for {epochs} epochs on all training images",
                "Mean over the seeds, bars ± one standard deviation, small dots the single runs. All panels have the "
                "same scale. The configurations were chosen on validation images, before the test set was read.",
                f"Mean test accuracy in percent of classifiers 1/4 to 4/4 and the ensemble: {words}.",
                figure,
            )
        )
    return pictures


# ---------------------------------------------------------------- parts


def find_marked(search: Mapping[str, Any], trials: pd.DataFrame) -> Marked:
    metric, epochs = search["metric"], search["config"]["epochs"]
    ranked = rank(trials, metric, search["mode"], epochs)
    best = None
    if not ranked.empty:
        best = trials[trials["trial_id"] == ranked.iloc[0]["trial_id"]].iloc[0]
    return Marked(best, *(find_role(trials, role, metric, epochs) for role in ("reference", "control")))


def best_label(marked: Marked) -> str:
    """'best', or 'best: the reference setting' where the search found nothing better."""
    assert marked.best is not None
    return f"{BEST}: {ROLE_NAMES[marked.best['role']]}" if marked.best["role"] in ROLE_NAMES else BEST


def metric_label(metric: str) -> str:
    return f"{describe_metric(metric)} ({unit(metric)})".replace(", ", "\n")


def metric_range(values: pd.Series, whole: pd.Series, mode: str) -> tuple[float, float]:
    """Limits of an axis that shows how the completed trials differ, and not how low the others were when stopped."""
    sign = 1 if mode == "max" else -1
    known = (sign * values.dropna()).to_numpy()
    if len(known) == 0:
        return 0.0, 1.0
    compared = (sign * whole.dropna()).to_numpy()
    top = known.max()
    bottom = np.quantile(compared, 0.1) if len(compared) > 1 else known.min()
    spread = max(top - bottom, 0.01 * abs(top), 1e-3)
    # Room below for those not much worse, unless there is none so low.
    bottom = max(bottom - 0.8 * spread, known.min() - 0.12 * spread)
    low, high = sorted((sign * bottom, sign * (top + 0.12 * spread)))
    return float(low), float(high)


def _whole(trials: pd.DataFrame, metric: str, epochs: int) -> pd.Series:
    return (trials["status"] == "completed") & (trials["epochs_done"] >= epochs) & trials[metric].notna()


def _scatter(
    axes: Axes,
    x: Iterable[float],
    y: Iterable[float],
    mode: str,
    *,
    label: str,
    size: float,
    color: str = "",
    edge: Any = None,
) -> None:
    """Points, filled with `color` or hollow with `edge`; a triangle at the axis' edge for what lies outside of it."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) == 0:
        return
    low, high = axes.get_ylim()
    inside = (y >= low) & (y <= high)
    edges = np.asarray(edge) if edge is not None and not isinstance(edge, str) else None
    for shown, marker in ((inside, "o"), (~inside, "v" if mode == "max" else "^")):
        if not shown.any():
            continue
        span = high - low
        at = np.clip(y[shown], low + 0.02 * span, high - 0.02 * span) if marker != "o" else y[shown]
        look = {"color": color, "edgecolor": "white", "linewidths": 0.6} if color else {"facecolor": "white"}
        if edge is not None:
            look |= {"edgecolor": edge if edges is None else edges[shown], "linewidths": 1.2}
        axes.scatter(x[shown], at, s=size, marker=marker, zorder=3, label=label, **look)
        label = ""  # one entry in the legend


def _draw_by_classifier(groups: list[Group], label: str) -> Figure:
    """One panel for each classifier and the ensemble, all of one scale, with one mark for each group.

    Classifiers differ by ten points and groups by half a point: on one axis the groups could not be told apart.
    """
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    panels = list(figure.subplots(1, len(CLASSIFIER_NAMES), squeeze=False).flat)
    lows = np.min([np.minimum(g.runs.min(axis=0), g.values - _errors(g)) for g in groups], axis=0)
    highs = np.max([np.maximum(g.runs.max(axis=0), g.values + _errors(g)) for g in groups], axis=0)
    half = 0.58 * max((highs - lows).max(), 0.5)
    for i, (axes, name) in enumerate(zip(panels, CLASSIFIER_NAMES, strict=True)):
        for x, group in enumerate(groups):
            around = x + np.linspace(-0.22, 0.22, len(group.runs)) if len(group.runs) > 1 else [x]
            axes.scatter(around, group.runs[:, i], s=9, color=group.colour, alpha=0.5, linewidths=0)
            axes.errorbar(
                x,
                group.values[i],
                yerr=None if group.errors is None else group.errors[i],
                color=group.colour,
                marker=group.marker,
                markersize=5.5,
                linestyle="none",
                capsize=3,
                elinewidth=1.3,
                label=group.label,
                zorder=4,
            )
        middle = (lows[i] + highs[i]) / 2
        axes.set_ylim(middle - half, middle + half)
        axes.set_xlim(-0.7, len(groups) - 0.3)
        axes.set_xticks([])
        axes.grid(visible=True, axis="y")
        axes.set_xlabel(name)
    panels[0].set_ylabel(label)
    _legend(figure)
    return figure


def _errors(group: Group) -> np.ndarray | float:
    return 0.0 if group.errors is None else group.errors


def _legend(figure: Figure) -> None:
    """One legend above the axes, each label once."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in entries}
    if entries:
        columns = max(1, min(len(entries), LEGEND_WIDTH // (max(len(label) for label in entries) + 8)))
        figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=columns)
