"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere, a table of the classifiers."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from byot.config import NUM_CLASSIFIERS
from byot.metrics import EpochMetrics
from byot.runs import OnEpoch
from byot.trainer import OnBatch

CLASSIFIER_NAMES = (*(f"{i}/{NUM_CLASSIFIERS}" for i in range(1, NUM_CLASSIFIERS + 1)), "ensemble")


def epoch_line(metrics: EpochMetrics, num_epochs: int) -> str:
    train = " ".join(f"{a:.2f}" for a in metrics.accuracy)
    line = f"epoch {metrics.epoch:>{len(str(num_epochs))}}/{num_epochs}  lr {metrics.lr:.4g}  loss {metrics.loss:.4f}"
    line += f"  train {train} %"
    if metrics.val is not None:
        line += f"  val {' '.join(f'{a:.2f}' for a in metrics.val.accuracy)} %"
    return f"{line}  {metrics.images_per_s:.0f} images/s  {metrics.elapsed_s:.1f} s"


def classifier_table(record: Mapping[str, Any], prefix: str) -> str:
    """Accuracy, NLL and ECE of every classifier and the ensemble, from a flat record."""
    suffixes = (*range(1, NUM_CLASSIFIERS + 1), "ensemble")
    lines = [f"{'classifier':<10}  {'accuracy %':>10}  {'NLL':>7}  {'ECE %':>6}"]
    for name, suffix in zip(CLASSIFIER_NAMES, suffixes, strict=True):
        accuracy, nll, ece = (record[f"{prefix}_{measure}_{suffix}"] for measure in ("accuracy", "nll", "ece"))
        lines.append(f"{name:<10}  {accuracy:>10.2f}  {nll:>7.4f}  {ece:>6.2f}")
    return "\n".join(lines)


@contextmanager
def show_progress(first_epoch: int, num_epochs: int) -> Iterator[tuple[OnBatch | None, OnEpoch]]:
    """Give the callbacks that show a run: a bar with images/s and the time left on a terminal, and a line an epoch."""
    if not sys.stdout.isatty():
        yield None, lambda metrics: print(epoch_line(metrics, num_epochs), flush=True)
        return

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, speed_estimate_period=120) as progress:
        task = progress.add_task("train", total=num_epochs, completed=first_epoch, speed="")
        finished = first_epoch

        def on_batch(done: int, images: int) -> None:
            speed = progress.tasks[0].speed  # epochs a second
            text = f"{speed * images:.0f} images/s" if speed else ""
            progress.update(task, completed=finished + done / images, speed=text)

        def on_epoch(metrics: EpochMetrics) -> None:
            nonlocal finished
            finished = metrics.epoch
            progress.console.print(epoch_line(metrics, num_epochs), highlight=False, soft_wrap=True)

        yield on_batch, on_epoch
