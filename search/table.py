"""What a person sees of a search while it runs: on a terminal one table, plain lines elsewhere."""

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from byot.console import fold, format_duration
from byot.search_files import format_parameter, format_value
from search.records import SearchRecords
from search.settings import expected_work, expected_work_left

REFRESH_S = 1.0
NUM_MEASURED = 100  # the last epochs of all trials together, whose speed is shown
WIDE = 100  # letters in a line of a terminal that has room for wide gaps between the columns
STYLES = {"completed": "green", "stopped": "dim", "failed": "bold red"}  # of words in a line that is said
# Letters that the columns need at least: a column for each parameter, and all others together.
PARAMETER, OTHERS = 9, 33


def estimate_left_s(records: SearchRecords, num_samples: int, work_per_s: float, *, stops_early: bool = True) -> float:
    """Estimate how long a search still takes: all the work left at this speed, but no less than its longest trial."""
    epochs, work = records.epochs, records.work
    grace = records.grace if stops_early else epochs
    of_all, of_begun = (expected_work(trials, epochs, grace, work) for trials in (num_samples, len(records.trials)))
    work_left = of_all - of_begun
    longest_s = 0.0
    for trial in records.unfinished:
        done = trial.epochs_done
        left = expected_work_left(done, epochs, grace if trial.role == "sampled" else epochs, work)
        work_left += left
        if done:
            longest_s = max(longest_s, left * trial.seconds / work(done))
    return max(work_left / work_per_s, longest_s)


def render(
    records: SearchRecords,
    running: list[str],
    times: Mapping[str, str],
    width: int,
    *,
    num_samples: int,
    stopping: bool = False,
) -> Group:
    """Lay out the table for a terminal of this width: counts, times, the best trial and those that run.

    All of it is ASCII, which every terminal can show.
    """
    num_ended = len(records.ended)
    title = Text.assemble((records.folder.name, "bold"), f"  {num_ended} of {num_samples} trials have ended")
    if stopping:
        title.append("  stopping", "bold")
    of_status = Counter(trial.status for trial in records.ended)
    counts = {"running": len(running)} | {status: of_status[status] for status in ("stopped", "completed", "failed")}
    counts["to come"] = num_samples - num_ended - len(running)
    apart = width >= OTHERS + PARAMETER * len(records.parameters)
    table = Table(box=None, padding=(0, 2 if width >= WIDE else 1, 0, 0), pad_edge=False, header_style="dim")
    for name in ("", "trial", "epoch"):
        table.add_column(name, no_wrap=True, overflow="crop")
    for name in (records.metric.removeprefix("val_"), *(records.parameters if apart else ())):
        table.add_column(Text(name, overflow="crop"), justify="right", overflow="crop")  # these headers are cut first
    if not apart:
        table.add_column("parameters", overflow="fold")
    best = records.best()
    for trial in ([] if best is None else [best]) + [records.trials[trial_id] for trial_id in running]:
        marks = ("best" if trial is best else "", trial.role if trial.role != "sampled" else "")
        params = {name: format_parameter(trial.params[name]) for name in records.parameters}
        table.add_row(
            " ".join(filter(None, marks)),
            trial.trial_id,
            f"{trial.epochs_done}/{records.epochs}",
            format_value(records.metric, trial.measures[records.metric]),
            *(params.values() if apart else [" ".join(map("=".join, params.items()))]),
            style="bold" if trial is best else "",
        )
    return Group("", title, _pairs(counts), _pairs(times), "", table)


def _pairs(values: Mapping[str, object]) -> Text:
    return Text("  ").join(Text.assemble((name, "dim"), f" {value}") for name, value in values.items())


class Terminal(Console):
    """A rich console that raises OSError on a broken pipe, where rich would end the program."""

    def on_broken_pipe(self) -> None:
        raise OSError("the terminal is gone")


class LiveTable:
    """Shows a search on standard output from `with` to its end: the table on a terminal, plain lines elsewhere.

    It is drawn by whoever calls, at most once in REFRESH_S; there is no thread. A terminal that goes away is no
    trouble of the search: nothing more is drawn.
    """

    def __init__(self) -> None:
        self.began_at = time.monotonic()
        self.epochs = deque([(self.began_at, 0.0)], maxlen=NUM_MEASURED + 1)  # when each ended, and its work
        self._live: Live | None = None
        self._due_at = self.began_at

    def __enter__(self) -> Self:
        terminal = sys.__stdout__  # sys.stdout goes to the log while Ray runs
        if terminal is not None and terminal.isatty():  # rich takes a pipe for a terminal where colours are forced
            console = Terminal(file=terminal)
            if console.is_interactive:  # not where TERM=dumb
                self._live = Live(
                    console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
                )
                self._draw(self._live.start)
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.update("")  # a table taller than the terminal could not be taken back
            self._draw(self._live.stop)
            self._live = None

    def add_epoch(self, work: float) -> None:
        """Take in that a trial has just done an epoch, and how much work that was."""
        self.epochs.append((time.monotonic(), work))

    def is_due(self) -> bool:
        return self._live is not None and time.monotonic() >= self._due_at

    def show(
        self,
        records: SearchRecords,
        running: list[str],
        *,
        num_samples: int,
        stops_early: bool,
        deadline: float | None = None,
        stopping: bool = False,
    ) -> None:
        """Draw the table; `running` are the ids of the trials that run, `deadline` is on the monotonic clock."""
        live, now = self._live, time.monotonic()
        if live is None:
            return
        self._due_at = now + REFRESH_S
        times = {"time": str(timedelta(seconds=int(now - self.began_at))), "left": "-", "epochs/s": "-"}
        (began_at, _), *measured = self.epochs
        if measured:
            seconds = measured[-1][0] - began_at
            work_per_s = sum(work for _, work in measured) / seconds
            left_s = estimate_left_s(records, num_samples, work_per_s, stops_early=stops_early)
            if deadline is not None:
                left_s = min(left_s, max(deadline - now, 0.0))
            times |= {"left": f"about {format_duration(left_s)}", "epochs/s": f"{len(measured) / seconds:.3g}"}
        table = render(records, running, times, live.console.width, num_samples=num_samples, stopping=stopping)
        self._draw(lambda: live.update(table, refresh=True))

    def say(self, text: str) -> None:
        """Print a line, above the table if there is one."""
        live = self._live
        if live is None:
            with suppress(OSError, UnicodeError):  # whoever read it may be gone
                print(text, file=sys.__stdout__, flush=True)
        else:
            line = Text(fold(text, live.console.width))
            for word, style in STYLES.items():
                line.highlight_words([word], style)
            self._draw(lambda: live.console.print(line, soft_wrap=True))
            self._due_at = time.monotonic()  # what was said is not in the table yet

    def _draw(self, draw: Callable[[], object]) -> None:
        try:
            draw()
        except (OSError, UnicodeError):  # a terminal that is gone, or has no letter for a mark of rich's
            self._live = None
