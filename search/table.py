"""What a person sees of a search while it runs: on a terminal one table, plain lines elsewhere."""

import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, Self

from rich.columns import Columns
from rich.console import Console, Group, JustifyMethod, OverflowMethod
from rich.live import Live
from rich.table import Table
from rich.text import Text

from search.records import Row, SearchRecords, format_value
from search.settings import NUM_FIRST_POINTS, expected_work_left

DAY_S = 86400
REFRESH_S = 1.0
NUM_MEASURED = 100  # the last epochs of all trials together, whose speed is shown
OTHER_LINES = 12  # of the table beside the trials that run, where the counts and times need two lines each
SHORTEST_HEADER = 5
FOLDED = "parameters"  # the column of all parameters where it is narrow


class TrialView(NamedTuple):
    """One line of the table."""

    trial_id: str
    role: str
    epochs_done: int
    value: float | None  # of the metric searched for, after the last epoch
    params: tuple[float, ...]


class SearchView(NamedTuple):
    """All that the table shows, at one moment."""

    name: str
    metric: str
    parameters: tuple[str, ...]
    epochs: int  # of a trial that is not stopped
    num_samples: int
    num_stopped: int
    num_completed: int
    num_failed: int
    running: tuple[TrialView, ...]
    best: TrialView | None
    elapsed_s: float
    left_s: float | None  # None: not known yet
    epochs_per_s: float | None
    stopping: bool


# ------------------------------------------------------------ the speed and the time left


class EpochRate:
    """The speed of all trials together over their last epochs, in epochs a second and in their work."""

    def __init__(self, began_at: float) -> None:
        self._ended = deque([(began_at, 0.0)], maxlen=NUM_MEASURED + 1)  # when each epoch ended, and its work

    def add(self, at: float, work: float = 1.0) -> None:
        self._ended.append((at, work))

    def per_second(self, at: float, num_running: int) -> float | None:
        """Epochs a second, None before the first one.

        Where the next epochs are late, it is no higher than if each trial that runs did its next one now.
        """
        epochs = len(self._ended) - 1
        if epochs == 0:
            return None
        first, last = self._ended[0][0], self._ended[-1][0]
        return min(epochs / (last - first), (epochs + max(num_running, 1)) / (at - first))

    def mean_work(self) -> float:
        """Of the epochs measured; 1 before the first."""
        works = [work for _, work in self._ended][1:]
        return sum(works) / len(works) if works else 1.0


def estimate_left_s(records: SearchRecords, num_samples: int, work_per_s: float, *, stops_early: bool = True) -> float:
    """About how long a search still takes: the work expected at this speed, but no less than its longest trial."""
    whole_trial = records.work(records.epochs)
    to_come = num_samples - len(records.rows)
    begun = sum(row["role"] != "sampled" for row in records.rows.values())
    whole = min(to_come, max(0, NUM_FIRST_POINTS - begun))

    def expect(role: str, done: int) -> float:
        may_be_stopped = stops_early and role == "sampled"
        if may_be_stopped:
            return expected_work_left(done, records.epochs, records.grace, records.work)
        return whole_trial - records.work(done)

    work_left = whole * whole_trial + (to_come - whole) * expect("sampled", 0)
    longest_s = 0.0
    for row in records.unfinished:
        done = row["epochs_done"]
        left = expect(row["role"], done)
        work_left += left
        if done:
            longest_s = max(longest_s, left * row["seconds"] / records.work(done))
    return max(work_left / work_per_s, longest_s)


def format_duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 2 * DAY_S:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / DAY_S:.1f} days"


# ------------------------------------------------------------ from the records to the table


def view_search(
    records: SearchRecords,
    running: list[str],
    *,
    num_samples: int,
    stops_early: bool,
    elapsed_s: float,
    epochs_per_s: float | None,
    epoch_work: float = 1.0,
    budget_s: float | None,
    stopping: bool,
) -> SearchView:
    """What is to be shown now; `running` are the trials that run, the search stops after another `budget_s`.

    `epoch_work` is the mean work of the epochs that the speed was measured in.
    """
    counts = Counter(row["status"] for row in records.rows.values())
    best = records.best()
    left_s = None
    if epochs_per_s is not None:
        left_s = estimate_left_s(records, num_samples, epochs_per_s * epoch_work, stops_early=stops_early)
    if left_s is not None and budget_s is not None:
        left_s = min(left_s, max(budget_s, 0.0))

    def view_trial(row: Row) -> TrialView:
        params = tuple(row[name] for name in records.parameters)
        return TrialView(row["trial_id"], row["role"], row["epochs_done"], row[records.metric], params)

    return SearchView(
        name=records.folder.name,
        metric=records.metric,
        parameters=tuple(records.parameters),
        epochs=records.epochs,
        num_samples=num_samples,
        num_stopped=counts["stopped"],
        num_completed=counts["completed"],
        num_failed=counts["failed"],
        running=tuple(view_trial(records.rows[trial_id]) for trial_id in running),
        best=None if best is None else view_trial(best),
        elapsed_s=elapsed_s,
        left_s=left_s,
        epochs_per_s=epochs_per_s,
        stopping=stopping,
    )


def render(view: SearchView, width: int, height: int) -> Group:
    """The table, for a terminal of this size. All of it is ASCII, which every terminal can show."""
    num_ended = view.num_stopped + view.num_completed + view.num_failed
    counts = {
        "running": str(len(view.running)),
        "stopped": str(view.num_stopped),
        "completed": str(view.num_completed),
        "failed": str(view.num_failed),
        "to come": str(view.num_samples - num_ended - len(view.running)),
    }
    minutes, seconds = divmod(int(view.elapsed_s), 60)
    times = {
        "time": f"{minutes // 60}:{minutes % 60:02}:{seconds:02}",
        "left": "-" if view.left_s is None else f"about {format_duration(view.left_s)}",
        "epochs/s": "-" if view.epochs_per_s is None else f"{view.epochs_per_s:.3g}",
    }
    title = Text.assemble((view.name, "bold"), f"  {num_ended} of {view.num_samples} trials have ended")
    if view.stopping:
        title.append("  stopping", "bold")
    return Group("", title, _pairs(counts), _pairs(times), "", _trials(view, width, max(1, height - OTHER_LINES)))


def _pairs(values: dict[str, str]) -> Columns:
    """Names with their values, on as many lines as they need."""
    pairs = [Text.assemble((name, "dim"), " ", value) for name, value in values.items()]
    return Columns(pairs, padding=(0, 2))


def _trials(view: SearchView, width: int, most: int) -> Table:
    """The best trial and those that run, at most so many."""
    columns = _fit(_columns(view, most), view.parameters, width)
    gap = 2 if FOLDED not in columns and _width(columns, 2) <= width else 1
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
    for name, column_width in zip(columns, _widths(columns, gap, width), strict=True):
        justify: JustifyMethod = "left" if name in ("", "trial", "role", FOLDED) else "right"
        overflow: OverflowMethod = "fold" if name == FOLDED else "crop"
        table.add_column(name, justify=justify, width=column_width, overflow=overflow)
    for line in zip(*columns.values(), strict=True):
        table.add_row(*line, style="bold" if line[0] == "best" else "")
    return table


def _columns(view: SearchView, most: int) -> dict[str, list[str]]:
    """The cells of the table by their header, from top to bottom."""
    shown = view.running if len(view.running) <= most + 1 else view.running[:most]
    num_hidden = len(view.running) - len(shown)
    trials = [view.best, *([None, *shown] if shown else [])]
    columns = {
        "": ["best", "", "running", *[""] * len(shown)][: len(trials)],
        "trial": [trial.trial_id if trial else "" for trial in trials],
        "role": [trial.role if trial else "" for trial in trials],
        "epoch": [f"{trial.epochs_done}/{view.epochs}" if trial else "" for trial in trials],
        view.metric.removeprefix("val_"): [format_value(trial.value) if trial else "" for trial in trials],
    }
    for i, name in enumerate(view.parameters):
        columns[name] = [f"{trial.params[i]:.3g}" if trial else "" for trial in trials]
    for name, cells in columns.items():
        if view.best is None and name:
            cells[0] = "-"
        if num_hidden:
            cells.append("" if name else f"{num_hidden} more")
    return columns


def _fit(columns: dict[str, list[str]], parameters: tuple[str, ...], width: int) -> dict[str, list[str]]:
    """The columns for which there is room: headers are cut, then roles left out, then parameters put in one column."""
    if _width(columns, 2) > width:
        columns = {name: cells for name, cells in columns.items() if name != "role"}
    if _width(columns, 1) > width:
        lines = zip(*(columns[name] for name in parameters), strict=True)
        together = [" ".join(f"{n}={c}" for n, c in zip(parameters, line, strict=True) if c) for line in lines]
        columns = {name: cells for name, cells in columns.items() if name not in parameters} | {FOLDED: together}
    return columns


def _widths(columns: dict[str, list[str]], gap: int, width: int) -> list[int]:
    """How wide each column is to be; rich itself would not stop at the least."""
    least = [_least(name, cells) for name, cells in columns.items()]
    widths = [max(len(name), *map(len, cells)) for name, cells in columns.items()]
    if FOLDED in columns:
        widths[:-1] = least[:-1]
    while sum(widths) + gap * (len(widths) - 1) > width and widths != least:
        spare = [given - needed for given, needed in zip(widths, least, strict=True)]
        widths[spare.index(max(spare))] -= 1
    return widths


def _width(columns: dict[str, list[str]], gap: int) -> int:
    """How wide the columns are at the least, with a gap between them."""
    return sum(_least(name, cells) for name, cells in columns.items()) + gap * (len(columns) - 1)


def _least(name: str, cells: list[str]) -> int:
    if name == FOLDED:
        return len(FOLDED)
    return max(min(len(name), SHORTEST_HEADER), *map(len, cells))


# ------------------------------------------------------------ on the terminal


class Terminal(Console):
    """A console that leaves it to its user what a broken pipe means; rich would end the program."""

    def on_broken_pipe(self) -> None:
        raise OSError("the terminal is gone")


class LiveTable:
    """Shows a search on standard output from `with` to its end: the table on a terminal, plain lines elsewhere.

    All is drawn by whoever calls, at most once in REFRESH_S; there is no thread. A terminal that goes away is no
    trouble of the search: nothing more is drawn.
    """

    def __init__(self) -> None:
        self.began_at = time.monotonic()
        self.rate = EpochRate(self.began_at)
        self._live: Live | None = None
        self._due_at = self.began_at

    def __enter__(self) -> Self:
        terminal = sys.__stdout__  # sys.stdout goes to the log while Ray runs
        if terminal is None or not terminal.isatty():
            return self
        console = Terminal(file=terminal)
        if console.is_interactive:  # not where TERM=dumb
            self._live = Live(
                console=console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
                vertical_overflow="crop",
            )
            self._draw(self._live.start)
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.update("")  # a table taller than the terminal could not be taken back
            self._draw(self._live.stop)
            self._live = None

    def __reduce__(self) -> tuple[type["LiveTable"], tuple[()]]:
        """Ray pickles what it is given for a state of its own, which is never read; a terminal cannot be pickled."""
        return LiveTable, ()

    def is_due(self) -> bool:
        return self._live is not None and time.monotonic() >= self._due_at

    def show(self, view: SearchView) -> None:
        live = self._live
        if live is None:
            return
        self._due_at = time.monotonic() + REFRESH_S
        table = render(view, *live.console.size)
        self._draw(lambda: live.update(table, refresh=True))

    def say(self, text: str) -> None:
        """Print a line, above the table if there is one."""
        live = self._live
        if live is None:
            with suppress(OSError):  # whoever read it may be gone
                print(text, file=sys.__stdout__, flush=True)
        else:
            self._draw(lambda: live.console.print(Text(text), soft_wrap=True))
            self._due_at = time.monotonic()  # what was said is not in the table yet

    def _draw(self, draw: Callable[[], object]) -> None:
        try:
            draw()
        except OSError:
            self._live = None
