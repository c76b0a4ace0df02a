"""Figures of one run: its training, and what its exits are worth on the test set.

The lighter a blue, the shallower the exit. A star stands for early exit as it was asked for.
"""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.ticker import MaxNLocator

from analysis.figures import BLUE, GREEN, GREY, INK, ORANGE, STYLE, Drawing, add_legend, make_panels
from byot.config import CLASSIFIERS

EXIT_COLOURS = ("#9ec5ea", "#5b9bd5", "#2368a8", "#0a2f57")  # 1/4 to 4/4
COLOURS = dict(zip(CLASSIFIERS, (*EXIT_COLOURS, ORANGE), strict=True))
LEAST_LABELLED = 6  # percent of the images: a shorter bar has no room for its number


def draw_run(epochs: Mapping[int, Mapping[str, float]], test: Mapping[str, Any] | None) -> dict[str, Drawing]:
    """Draw every figure for which there is something to draw, by its name: metrics by epoch, and measured exits."""
    with mpl.rc_context(STYLE):
        pictures = {"training": draw_training(epochs)} if epochs else {}
        if test is not None:
            pictures |= {"cost": draw_cost(test), "time": draw_time(test), "leaving": draw_leaving(test)}
    return pictures


def draw_training(epochs: Mapping[int, Mapping[str, float]]) -> Drawing:
    """Draw the loss, and the accuracy of each classifier on training images and on held-out ones, after each epoch."""
    figure, (left, right) = make_panels(2, 3.2)
    look: dict[str, Any] = {"marker": "o" if len(epochs) == 1 else "", "markersize": 4}
    left.plot(list(epochs), [row.get("train_loss", float("nan")) for row in epochs.values()], color=INK, **look)
    held_out = any("val_accuracy_4" in row for row in epochs.values())
    for suffix, name in CLASSIFIERS.items():
        for split in ("train", "val"):
            column = f"{split}_accuracy_{suffix}"
            rows = {epoch: row[column] for epoch, row in epochs.items() if column in row}
            if rows:
                solid = split == "val" or not held_out
                style: dict[str, Any] = {"label": name} if solid else {"linestyle": (0, (2, 2)), "linewidth": 0.9}
                right.plot(list(rows), list(rows.values()), color=COLOURS[suffix], **look | style)
    left.set_ylabel("training loss")
    right.set_ylabel("accuracy (%)")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    add_legend(figure)
    return figure, f"Training loss and accuracy of each classifier after each of {len(epochs)} epochs."


def draw_cost(test: Mapping[str, Any]) -> Drawing:
    """Draw accuracy against multiply-adds: early exit, each exit alone, the ensembles so far and the oracle."""
    figure, (axes,) = make_panels(1, 3.8)
    exits, oracle, asked = test["exits"], test["oracle"], test["table"][0]
    points = sorted((point["cost"], point["accuracy"]) for point in test["curve"])
    axes.plot(*zip(*points, strict=True), color=BLUE, linewidth=1.4, marker=".", label="early exit, fitted for a cost")
    _draw_star(axes, asked["cost"], asked)
    for row, colour in zip(exits, EXIT_COLOURS, strict=True):
        _draw_exit(axes, row["cost"], row, colour)
    later = exits[1:]  # the first exit is an ensemble of one
    axes.scatter(
        [row["ensemble_cost"] for row in later],
        [row["ensemble_accuracy"] for row in later],
        marker="D",
        s=30,
        color=ORANGE,
        edgecolor="white",
        zorder=3,
        label="ensemble so far",
    )
    axes.scatter(
        oracle["cost"], oracle["accuracy"], marker="s", s=38, color=GREEN, edgecolor="white", zorder=3, label="oracle"
    )
    axes.set_xlabel("multiply-adds, as a share of the plain deepest network's")
    axes.set_ylabel("test accuracy (%)")
    add_legend(figure)
    told = ", ".join(f"{row['exit']} {row['accuracy']:.1f} % at {row['cost']:.2f}" for row in exits)
    return figure, f"Accuracy against cost. Each exit alone: {told}; early exit as asked: {_tell(asked)}."


def draw_time(test: Mapping[str, Any]) -> Drawing:
    """Draw accuracy against measured time, one panel for each batch size."""
    figure, panels = make_panels(len(test["time"]), 3.4, sharey=True)
    words = []
    for axes, timed in zip(panels, test["time"], strict=True):
        reached = [(ms, row) for ms, row in zip(timed["table_ms"], test["table"], strict=True) if ms is not None]
        points = sorted((ms, row["accuracy"]) for ms, row in reached)
        axes.plot(*zip(*points, strict=True), color=BLUE, linewidth=1.4, marker=".", label="early exit")
        _draw_star(axes, timed["early_ms"], test["table"][0])
        for ms, row, colour in zip(timed["exits_ms"], test["exits"], EXIT_COLOURS, strict=True):
            _draw_exit(axes, ms, row, colour)
        axes.axvline(
            timed["plain_ms"], color=GREY, linewidth=1, linestyle=(0, (5, 3)), label="the plain network's time"
        )
        axes.set_xlabel(f"ms an image, {timed['batch_size']} at a time")
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        words.append(
            f"{timed['batch_size']} at a time {timed['early_ms']:.3f} ms against {timed['plain_ms']:.3f} ms of the "
            "plain network"
        )
    panels[0].set_ylabel("test accuracy (%)")
    add_legend(figure)
    return figure, f"Accuracy against measured time. Early exit as asked: {'; '.join(words)}."


def draw_leaving(test: Mapping[str, Any]) -> Drawing:
    """Draw the share of the images that leaves at each exit, one bar for each cost that was asked for."""
    rows = [row for row in test["table"] if "accuracy" in row]
    figure, (axes,) = make_panels(1, 0.9 + 0.42 * len(rows))
    for i, (one, colour) in enumerate(zip(test["exits"], EXIT_COLOURS, strict=True)):
        starts, widths = [sum(row["left"][:i]) for row in rows], [row["left"][i] for row in rows]
        bars = axes.barh(range(len(rows)), widths, 0.7, starts, color=colour, label=f"leaves at {one['exit']}")
        numbers = [f"{width:.0f}" if width >= LEAST_LABELLED else "" for width in widths]
        axes.bar_label(bars, numbers, label_type="center", color=INK if i < 1 else "white")
    axes.set_yticks(range(len(rows)), [f"{row['asked']}: {row['accuracy']:.1f} %" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("share of the test images (%)")
    add_legend(figure)
    told = "; ".join(f"{row['asked']}: {', '.join(f'{share:.0f}' for share in row['left'])} %" for row in rows)
    return figure, f"Share of the images that leaves at each exit, shallow to deep. {told}."


# ---------------------------------------------------------------- parts


def _draw_exit(axes: Any, x: float, row: Mapping[str, Any], colour: str) -> None:
    axes.scatter(x, row["accuracy"], s=42, color=colour, edgecolor="white", zorder=4, label=f"{row['exit']} alone")


def _draw_star(axes: Any, x: float, asked: Mapping[str, Any]) -> None:
    label = f"early exit as asked: {asked['asked']}"
    axes.scatter(x, asked["accuracy"], s=150, marker="*", color=BLUE, edgecolor="white", zorder=5, label=label)


def _tell(row: Mapping[str, Any]) -> str:
    return f"{row['accuracy']:.1f} % at {row['cost']:.2f}"
