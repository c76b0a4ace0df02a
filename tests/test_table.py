"""The table of a search that runs: what it shows at any width, what is estimated, how a terminal is left behind."""

import errno
import fcntl
import os
import pickle
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from byot.config import TrainConfig
from search.records import MEASURES, SearchRecords
from search.settings import expected_work, expected_work_left, grace_epochs
from search.space import DEFAULT_SPACE, first_points
from search.table import (
    NUM_MEASURED,
    EpochRate,
    LiveTable,
    SearchView,
    TrialView,
    estimate_left_s,
    format_duration,
    render,
    view_search,
)
from tests.helpers import FakeTerminal, command_environment, command_line

HEIGHT = 24
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
SMALL = ("--dataset", "digits", "--width", 4, "--epochs", 3, "--num-samples", 4, "--name", "small")


def make_view(num_running: int = 2, parameters: tuple[str, ...] = ("alpha", "temperature", "beta")) -> SearchView:
    params = (0.12345, 9.8765, 1.2345e-05, 0.0123456, 0.000123456)[: len(parameters)]
    running = [TrialView(f"t{i:04}", "sampled", i % 30, 40.25 + i, params) for i in range(10, 10 + num_running)]
    return SearchView(
        name="resnet18-w16-digits-e30",
        metric="val_accuracy",
        parameters=parameters,
        epochs=30,
        num_samples=64,
        num_stopped=5,
        num_completed=2,
        num_failed=1,
        running=tuple(running),
        best=TrialView("t0000", "reference", 30, 92.361, params),
        elapsed_s=3754.2,
        left_s=1333.0,
        epochs_per_s=1.4321,
        stopping=False,
    )


BEGINNING = make_view(0)._replace(
    num_stopped=0, num_completed=0, num_failed=0, best=None, elapsed_s=0.4, left_s=None, epochs_per_s=None
)


def lines_of(view: SearchView, width: int) -> list[str]:
    console = Console(width=width, height=HEIGHT, color_system=None)
    with console.capture() as capture:
        console.print(render(view, width, HEIGHT))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_all_that_is_known_is_shown():
    assert lines_of(make_view(), 80) == [
        "",
        "resnet18-w16-digits-e30  8 of 64 trials have ended",
        "running 2  stopped 5  completed 2  failed 1  to come 54",
        "time 1:02:34  left about 22 min  epochs/s 1.43",
        "",
        "         trial  role       epoch  accuracy  alpha  temperature      beta",
        "best     t0000  reference  30/30     92.36  0.123         9.88  1.23e-05",
        "",
        "running  t0010  sampled    10/30     50.25  0.123         9.88  1.23e-05",
        "         t0011  sampled    11/30     51.25  0.123         9.88  1.23e-05",
    ]


def test_what_is_not_known_yet_is_a_dash():
    lines = lines_of(BEGINNING, 80)
    assert "running 0  stopped 0  completed 0  failed 0  to come 64" in lines
    assert "time 0:00:00  left -  epochs/s -" in lines
    assert lines[-1].split() == ["best", *"-------"]
    first = TrialView("t0000", "reference", 0, None, (0.1, 3.0, 1e-6))
    assert lines_of(BEGINNING._replace(running=(first,)), 80)[-1].split()[3:] == ["0/30", "-", "0.1", "3", "1e-06"]


def test_a_search_that_stops_says_so():
    assert "stopping" in "\n".join(lines_of(make_view()._replace(stopping=True), 80))


@pytest.mark.parametrize("num_parameters", [3, 5])
@pytest.mark.parametrize("metric", ["val_nll", "val_accuracy", "val_accuracy_ensemble"])
@pytest.mark.parametrize("params", [(0.12345, 9.8765, 1.2345e-05, 0.0123456, 0.000123456), (0.1, 3, 1e-6, 0.1, 5e-4)])
def test_no_width_loses_a_number(num_parameters: int, metric: str, params: tuple[float, ...]):
    names = ("alpha", "temperature", "beta", "lr", "weight_decay")[:num_parameters]
    view = make_view(parameters=names)
    trial = view.running[0]._replace(params=params[:num_parameters])
    view = view._replace(metric=metric, running=(trial,), best=None)
    numbers = ["running", "t0010", "10/30", "50.25", *(f"{value:.3g}" for value in trial.params)]
    for width in range(60, 130):
        lines = lines_of(view, width)
        assert max(map(len, lines)) <= width
        text = "\n".join(lines)
        assert text.isascii()
        table = text[text.index("trial  ") if "trial  " in text else text.index("trial ") :]
        words = re.split(r"[\s=]+", table)
        assert [word for word in words if word in numbers][: len(numbers)] == numbers, text


def test_where_it_is_narrow_the_role_goes_first():
    assert "reference" in "\n".join(lines_of(make_view(), 80))
    narrow = lines_of(make_view(), 60)
    assert "reference" not in "\n".join(narrow)
    assert narrow[6] == "best     t0000  30/30     92.36  0.123        9.88  1.23e-05"
    names = ("alpha", "temperature", "beta", "lr", "weight_decay")
    assert "alpha=0.123 temperature=9.88" in "\n".join(lines_of(make_view(parameters=names), 60))
    assert max(map(len, lines_of(make_view(parameters=names), 30))) <= 30


def test_more_trials_than_lines():
    lines = lines_of(make_view(40), 80)
    assert len(lines) < HEIGHT
    assert "92.36" in "\n".join(lines)
    shown = sum("sampled" in line for line in lines)
    assert lines[-1] == f"{40 - shown} more"
    assert "more" not in "\n".join(lines_of(make_view(3), 80))


# ---------------------------------------------------------------- the speed and the time left


def test_speed_is_of_all_trials_over_the_last_epochs():
    rate = EpochRate(100.0)
    assert rate.per_second(150.0, 2) is None
    for at in (110.0, 110.0, 120.0, 120.0):
        rate.add(at)
    assert rate.per_second(120.0, 2) == rate.per_second(130.0, 2) == 0.2
    assert rate.per_second(220.0, 2) == (4 + 2) / 120, "late epochs tell"
    for i in range(2 * NUM_MEASURED):
        rate.add(120.0 + i)
    assert rate.per_second(120.0 + 2 * NUM_MEASURED, 2) == pytest.approx(1.0)


def expect_slowly(done: int, epochs: int, rungs: list[int]) -> float:
    """Epoch by epoch: how likely it is that it is trained."""
    return sum((1 / 3) ** sum(done < rung < epoch for rung in rungs) for epoch in range(done + 1, epochs + 1))


@pytest.mark.parametrize(("epochs", "rungs"), [(1, []), (2, []), (6, [2]), (30, [3, 9, 27]), (200, [20, 60, 180])])
def test_epochs_that_asha_leaves(epochs: int, rungs: list[int]):
    for done in range(epochs + 1):
        assert expected_work_left(done, epochs, grace_epochs(epochs)) == pytest.approx(
            expect_slowly(done, epochs, rungs)
        )
    assert expected_work_left(epochs, epochs, grace_epochs(epochs)) == 0
    assert expected_work(7, epochs, grace_epochs(epochs)) == pytest.approx(
        2 * epochs + 5 * expect_slowly(0, epochs, rungs)
    )


def make_records(folder: Path, epochs: int = 30) -> SearchRecords:
    return SearchRecords(
        folder, parameters=list(DEFAULT_SPACE), metric="val_accuracy", mode="max", epochs=epochs, seed=0
    )


def add_epochs(records: SearchRecords, trial_id: str, num_epochs: int, seconds: float = 1.0) -> None:
    for epoch in range(1, num_epochs + 1):
        records.add_epoch(trial_id, {**dict.fromkeys(MEASURES, 50.0), "epoch": epoch, "elapsed_s": seconds})


def test_time_left_falls_from_what_is_expected_of_all_to_nothing(tmp_path: Path):
    records = make_records(tmp_path)
    left = [estimate_left_s(records, 4, 2.0)]
    assert left[0] == pytest.approx(expected_work(4, 30, 3) / 2.0)
    assert estimate_left_s(records, 4, 2.0, stops_early=False) == 4 * 30 / 2.0
    for role, params in first_points(DEFAULT_SPACE, TrainConfig()):
        add_epochs(records, records.begin(role, params)["trial_id"], 30)
        left.append(estimate_left_s(records, 4, 2.0))
    assert left[-1] == pytest.approx(2 * expected_work_left(0, 30, 3) / 2.0)
    for trial_id in ("t0000", "t0001"):
        records.end(trial_id, "completed")
    for _ in range(2):
        trial_id = records.begin("sampled", dict.fromkeys(DEFAULT_SPACE, 1.0))["trial_id"]
        add_epochs(records, trial_id, 2)
        left.append(estimate_left_s(records, 4, 2.0))
        records.end(trial_id, "stopped")
    left.append(estimate_left_s(records, 4, 2.0))
    assert left[-1] == 0
    assert all(a > b for a, b in pairwise(left))


def test_the_last_trial_takes_its_own_time_however_quick_all_were_together(tmp_path: Path):
    records = make_records(tmp_path)
    records.begin("reference", dict.fromkeys(DEFAULT_SPACE, 1.0))
    add_epochs(records, "t0000", 10, seconds=4.0)
    assert estimate_left_s(records, 1, work_per_s=8.0) == 20 * 4.0


def test_a_view_counts_every_trial_once(tmp_path: Path):
    records = make_records(tmp_path, epochs=3)
    for status in ("completed", "stopped", "failed", "running", "running"):
        trial_id = records.begin("sampled", dict.fromkeys(DEFAULT_SPACE, 1.0))["trial_id"]
        add_epochs(records, trial_id, 3 if status == "completed" else 2)
        if status != "running":
            records.end(trial_id, status)
    view = view_search(
        records,
        ["t0004"],
        num_samples=9,
        stops_early=True,
        elapsed_s=5.0,
        epochs_per_s=0.01,
        budget_s=60.0,
        stopping=False,
    )
    assert (view.num_completed, view.num_stopped, view.num_failed) == (1, 1, 1)
    assert [trial.trial_id for trial in view.running] == ["t0004"]
    assert view.best == TrialView("t0000", "sampled", 3, 50.0, (1.0, 1.0, 1.0))
    assert view.left_s == 60.0, "then the search stops"
    assert "to come 5" in "\n".join(lines_of(view, 80)), "t0003 waits"


def test_durations():
    told = [format_duration(seconds) for seconds in (3.4, 100, 7200, 3 * 86400)]
    assert told == ["3 s", "2 min", "2.0 h", "3.0 days"]


# ---------------------------------------------------------------- the terminal


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> FakeTerminal:
    fake = FakeTerminal()
    monkeypatch.setattr(sys, "__stdout__", fake)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return fake


def test_lines_stay_and_the_table_goes(terminal: FakeTerminal):
    with LiveTable() as live:
        live.show(make_view())
        live.say("first [bold] :smile:")
        live.show(make_view(3))
    live.say("last")
    assert terminal.getvalue().startswith(HIDE_CURSOR)
    assert terminal.getvalue().rindex(SHOW_CURSOR) > terminal.getvalue().rindex("t0012")
    assert screen_after(terminal.getvalue()) == ["first [bold] :smile:", "last"]


def test_the_table_goes_when_the_search_fails(terminal: FakeTerminal):
    def fail() -> None:
        with LiveTable() as live:
            live.show(make_view())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert SHOW_CURSOR in terminal.getvalue()
    assert screen_after(terminal.getvalue()) == []


def test_a_dumb_terminal_gets_plain_lines(terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "dumb")
    with LiveTable() as live:
        assert not live.is_due()
        live.show(make_view())
        live.say("line")
    assert terminal.getvalue() == "line\n"


def test_no_color_is_respected(terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_COLOR", "1")
    with LiveTable() as live:
        live.show(make_view())
    assert not re.search(r"\x1b\[[0-9;]*[34]\d(;[0-9;]*)?m", terminal.getvalue())


def test_forced_colours_make_no_terminal_of_a_pipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with open(tmp_path / "pipe", "w+") as pipe:
        monkeypatch.setattr(sys, "__stdout__", pipe)
        with LiveTable() as live:
            live.show(make_view())
            live.say("line")
    assert (tmp_path / "pipe").read_text() == "line\n"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), BrokenPipeError(errno.EPIPE, "Broken")])
@pytest.mark.parametrize("gone_before", ["start", "table", "line", "end"])
def test_a_terminal_that_goes_away_is_no_trouble(terminal: FakeTerminal, error: OSError, gone_before: str):
    def now(moment: str) -> None:
        if moment == gone_before:
            terminal.error = error

    now("start")
    with LiveTable() as live:
        now("table")
        live.show(make_view())
        now("line")
        live.say("line")
        now("end")
    live.say("line")


def test_ray_can_pickle_it(terminal: FakeTerminal):
    with LiveTable() as live:
        pickle.loads(pickle.dumps(live)).say("a line of one without a table")


def test_it_is_drawn_at_most_once_in_a_while_but_after_each_line(
    terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("search.table.REFRESH_S", 3600.0)
    with LiveTable() as live:
        assert live.is_due()
        live.show(make_view())
        assert not live.is_due()
        live.say("line")
        assert live.is_due()


# ---------------------------------------------------------------- real searches on a pseudo-terminal


def screen_after(output: str) -> list[str]:
    """What is left on a terminal that is high and wide enough, without empty lines."""
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\x1b[2K":
            lines[row] = ""
        elif token.endswith("A") and token.startswith("\x1b"):
            row -= int(token[2:-1])
        elif not token.startswith("\x1b") and token != "\r":
            lines[row] += token
    return [line for line in lines if line.strip()]


def run_on_terminal(outputs: Path, *more: object, stop_at: str | None = None, columns: int = 200) -> tuple[int, str]:
    """Run a small search under a pseudo-terminal, with Ctrl-C as soon as `stop_at` is seen: exit code and output."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        command_line("search/tune.py", *SMALL, *more, "--outputs", outputs),
        cwd=outputs,
        env=command_environment(TERM="xterm-256color"),
        stdin=its,
        stdout=its,
        stderr=its,
    )
    os.close(its)
    output, asked, give_up_at = b"", False, time.monotonic() + 300
    while time.monotonic() < give_up_at:
        if select.select([ours], [], [], 1)[0]:
            try:
                output += os.read(ours, 65536)
            except OSError:  # Linux's word for the end of a terminal
                break
        if stop_at is not None and not asked and stop_at.encode() in output:
            asked = True
            process.send_signal(signal.SIGINT)
    os.close(ours)
    return process.wait(60), output.decode()


@pytest.mark.slow
def test_a_search_on_a_terminal(tmp_path: Path):
    code, output = run_on_terminal(tmp_path)
    assert code == 0, output
    assert "trials have ended" in output
    assert re.search(r"running.*t000\d.*/3", output)
    left = screen_after(output)
    text = "\n".join(left)
    assert "trials have ended" not in text, "the table is gone"
    for i in range(1, 5):
        assert sum(line.startswith(f"  {i}/4  t000") for line in left) == 1
    header = next(i for i, line in enumerate(left) if line.startswith("trial  role "))
    assert header > next(i for i, line in enumerate(left) if line.startswith("  4/4"))
    assert {line.split()[0] for line in left[header + 1 : header + 5]} == {"t0000", "t0001", "t0002", "t0003"}
    assert "byot/train.py --best small" in text
    assert output.rindex(SHOW_CURSOR) > output.rindex(HIDE_CURSOR)


@pytest.mark.slow
def test_ctrl_c_gives_the_terminal_back(tmp_path: Path):
    # Epochs enough that the table, drawn once a second, shows one before all is done.
    code, output = run_on_terminal(tmp_path, "--epochs", 100, stop_at="/100", columns=60)
    assert code == 128 + signal.SIGINT, output
    assert output.rindex(SHOW_CURSOR) > output.rindex(HIDE_CURSOR)
    assert "trials have ended" not in "\n".join(screen_after(output))
    assert "of 4 trials to end; go on with:" in output
    assert "Traceback" not in output
