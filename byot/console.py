"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere, a table of the classifiers."""

import math
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from byot.config import CLASSIFIERS, TrainConfig, work_after
from byot.search_files import read_epochs

if TYPE_CHECKING:  # importing them imports torch
    from byot.metrics import EpochMetrics
    from byot.runs import OnEpoch
    from byot.trainer import OnBatch

Say = Callable[[str], None]  # prints a line
Show = Callable[[Iterable[Path], int, int], None]  # takes the folders of runs at work, and how many have ended of all

SPEED_OVER_S = 5.0  # the images/s shown are those of so many seconds


def format_duration(seconds: float) -> str:
    """Write a time in the unit that suits it, from seconds to days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def epoch_line(metrics: "EpochMetrics", num_epochs: int) -> str:
    train = " ".join(f"{a:.2f}" for a in metrics.accuracy)
    line = f"epoch {metrics.epoch:>{len(str(num_epochs))}}/{num_epochs}  lr {metrics.lr:.4g}  loss {metrics.loss:.4f}"
    line += f"  train {train} %"
    if metrics.val is not None:
        line += f"  val {' '.join(f'{a:.2f}' for a in metrics.val.accuracy)} %"
    return f"{line}  {metrics.images_per_s:.0f} images/s  {metrics.elapsed_s:.1f} s"


def say(text: str) -> None:
    """Print text at once; that nobody reads it any more is no trouble of what goes on."""
    with suppress(OSError):
        print(text, flush=True)


def terminal_width() -> float:
    """Return the width in letters of the terminal; infinite where standard output is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf


def fold(text: str, width: float | None = None) -> str:
    """Break lines that are longer than the terminal's between words; what two spaces set apart stays together."""
    width = terminal_width() if width is None else width
    return "\n".join(_fold_line(line, int(width)) if len(line) > width else line for line in text.splitlines())


def _fold_line(line: str, width: int) -> str:
    start = re.match(" *(- )?", line)
    assert start is not None, "it matches nothing too"
    indent, parts = " " * start.end(), re.split("  +", line[start.end() :].rstrip())
    if len(parts) > 1 and max(map(len, parts)) <= width - len(indent):
        parts = [part.replace(" ", "\0") for part in parts]
    filled = textwrap.fill(
        start[0] + "  ".join(parts), width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return filled.replace("\0", " ")


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show on a terminal what is waited for, and for how many seconds, until it is over."""
    if not sys.stdout.isatty():
        yield
        return
    is_over, shown = Event(), ""

    def show() -> None:
        nonlocal shown
        with suppress(OSError):  # of a terminal that is gone
            for seconds in count():
                shown = f"{what}, {seconds} s" if seconds else what
                print(shown, end="\r", flush=True)
                if is_over.wait(1.0):
                    return

    shower = Thread(target=show, daemon=True)
    shower.start()
    try:
        yield
    finally:
        is_over.set()
        shower.join()
        with suppress(OSError):
            print(" " * len(shown), end="\r", flush=True)


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], num_text: int = 1, may_go: Sequence[str] = ()
) -> str:
    """Align cells in columns; the first `num_text` columns are words, the rest numbers.

    On a terminal that is too narrow the columns that may go are left out, in this order, until the others fit.
    """
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name in may_go:
        if name in lines[0] and sum(widths) + 2 * (len(widths) - 1) > terminal_width():
            place = lines[0].index(name)
            lines = [[*line[:place], *line[place + 1 :]] for line in lines]
            del widths[place]
            num_text -= place < num_text

    def align(line: Sequence[str]) -> str:
        cells = enumerate(zip(line, widths, strict=True))
        return "  ".join(cell.ljust(width) if i < num_text else cell.rjust(width) for i, (cell, width) in cells)

    return "\n".join(align(line).rstrip() for line in lines)


def classifier_table(record: Mapping[str, Any], prefix: str) -> str:
    """Write accuracy, NLL and ECE of every classifier and the ensemble that a flat record has."""
    rows = []
    for suffix, name in CLASSIFIERS.items():
        if f"{prefix}_accuracy_{suffix}" in record:
            accuracy, nll, ece = (record[f"{prefix}_{measure}_{suffix}"] for measure in ("accuracy", "nll", "ece"))
            rows.append((name, f"{accuracy:.2f}", f"{nll:.4f}", f"{ece:.2f}"))
    return text_table(("classifier", "accuracy %", "NLL", "ECE %"), rows)


@contextmanager
def show_progress(config: TrainConfig, first_epoch: int) -> Iterator[tuple["OnBatch | None", "OnEpoch"]]:
    """Yield the callbacks that show a run: a bar with images/s and the time left on a terminal, and a line an epoch.

    The bar goes with the arithmetic that is done, so that the time left holds where early epochs have smaller images.
    """
    num_epochs = config.epochs
    if not sys.stdout.isatty():
        yield None, lambda metrics: print(epoch_line(metrics, num_epochs), flush=True)
        return

    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("epoch {task.fields[epoch]}/{task.fields[num_epochs]}"),
        BarColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, speed_estimate_period=120, transient=True) as progress:
        finished, started = first_epoch, 0.0
        done_before: int | None = None
        task = progress.add_task(
            "train",
            total=work_after(config, num_epochs),
            completed=work_after(config, first_epoch),  # type: ignore[arg-type]  # which takes parts of epochs
            epoch=first_epoch + 1,
            num_epochs=num_epochs,
            speed="",
        )

        def on_batch(done: int, images: int) -> None:
            nonlocal started, done_before
            epoch, all_done = finished + done / images, (finished - first_epoch) * images + done
            if done_before is None:  # a run may go on within an epoch
                started, done_before = time.perf_counter(), all_done
            passed_s = time.perf_counter() - started
            progress.update(task, completed=work_after(config, epoch), epoch=math.ceil(epoch))
            if passed_s > SPEED_OVER_S:
                progress.update(task, speed=f"{(all_done - done_before) / passed_s:.0f} images/s")
                started, done_before = time.perf_counter(), all_done

        def on_epoch(metrics: "EpochMetrics") -> None:
            nonlocal finished
            finished = metrics.epoch
            progress.console.print(fold(epoch_line(metrics, num_epochs)), highlight=False, soft_wrap=True)

        yield on_batch, on_epoch


@contextmanager
def show_runs(config: TrainConfig) -> Iterator[tuple[Say, Show]]:
    """Yield what prints a line, and what shows how far several runs of so many epochs are.

    On a terminal that is a bar with the time left. It moves with each epoch in the runs' metrics.jsonl files.
    """
    if not sys.stdout.isatty():
        yield say, lambda folders, num_ended, num_runs: None
        return

    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("runs {task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("left"))
    progress = Progress(
        *columns,
        speed_estimate_period=3600,
        transient=True,
        redirect_stderr=sys.stderr.isatty(),  # else it is a file
    )
    task = progress.add_task("", total=None)
    whole = work_after(config, config.epochs)

    def show(folders: Iterable[Path], num_ended: int, num_runs: int) -> None:
        with suppress(OSError):  # of a terminal or a folder that is gone; the runs go on
            begun = [max(read_epochs(folder / "metrics.jsonl"), default=0) for folder in folders]
            progress.update(
                task,
                description=f"{num_ended}/{num_runs}",
                total=num_runs * whole,
                completed=num_ended * whole + sum(work_after(config, epochs) for epochs in begun),
            )

    def say_above(text: str) -> None:
        with suppress(OSError):
            progress.console.print(fold(text), highlight=False, markup=False, soft_wrap=True)

    with suppress(OSError):
        progress.start()
    try:
        yield say_above, show
    finally:
        with suppress(OSError):
            progress.stop()
