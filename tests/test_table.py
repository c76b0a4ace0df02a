"""The table of a search that runs: what it shows at any width, what is estimated, how a terminal is left behind."""

import errno
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from byot import console
from byot.config import TrainConfig
from byot.console import fold, show_runs, text_table
from byot.search_files import MEASURES
from byot.system.files import append_json_line
from search.records import SearchRecords
from search.settings import expected_work, expected_work_left, grace_epochs
from search.table import NUM_MEASURED, LiveTable, estimate_left_s, render
from tests.helpers import FakeTerminal, command_environment, command_line
from tests.made_up import open_records

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
PARAMS = {"alpha": 0.12345, "temperature": 9.8765, "beta": 1.2345e-05, "lr": 0.0123456, "weight_decay": 0.000123456}
TIMES = {"time": "1:02:34", "left": "about 22 min", "epochs/s": "1.43"}


def begin(records: SearchRecords, epochs: int, value: float = 50.0, *, role="sampled", seconds: float = 1.0) -> str:
    """Begin a trial and let it do its first epochs; returns its id."""
    trial_id = records.begin(role, {name: PARAMS[name] for name in records.parameters}).trial_id
    for epoch in range(1, epochs + 1):
        records.add_epoch(trial_id, {**dict.fromkeys(MEASURES, value), "epoch": epoch, "elapsed_s": seconds})
    return trial_id


@pytest.fixture
def records(tmp_path: Path) -> SearchRecords:
    """One trial of each kind; t0003 and t0004 are not at their end."""
    records = open_records(tmp_path / "resnet18", epochs=30)
    records.end(begin(records, 30, 92.361, role="reference"), "completed")
    records.end(begin(records, 3), "stopped")
    records.end(begin(records, 1), "failed")
    begin(records, 10, 50.25, role="control")
    begin(records, 11, 51.25)
    return records


def lines_of(records: SearchRecords, width: int, running: tuple[str, ...], **options) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(render(records, list(running), TIMES, width, num_samples=64, **options))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_all_that_is_known_is_shown(records):
    assert lines_of(records, 100, ("t0003", "t0004")) == [
        "",
        "resnet18  3 of 64 trials have ended",
        "running 2  stopped 1  completed 1  failed 1  to come 59",
        "time 1:02:34  left about 22 min  epochs/s 1.43",
        "",
        "                trial  epoch  accuracy  alpha  temperature      beta",
        "best reference  t0000  30/30     92.36  0.123         9.88  1.23e-05",
        "control         t0003  10/30     50.25  0.123         9.88  1.23e-05",
        "                t0004  11/30     51.25  0.123         9.88  1.23e-05",
    ]
    waiting = lines_of(records, 80, ("t0004",), stopping=True)
    assert waiting[1].endswith("have ended  stopping")
    assert waiting[2].endswith("to come 60"), "t0003 waits"
    assert "t0003" not in "\n".join(waiting)
    trial_id = begin(records, 0)
    assert lines_of(records, 80, (trial_id,))[-1].split()[:3] == [trial_id, "0/30", "-"], "nothing known yet"


@pytest.mark.parametrize("params", [3, 5])
@pytest.mark.parametrize("metric", ["val_nll", "val_accuracy", "val_accuracy_ensemble"])
def test_no_width_loses_a_number(tmp_path, params, metric):
    records = open_records(tmp_path / "resnet18", metric, parameters=list(PARAMS)[:params], epochs=30)
    begin(records, 10, 0.5025)
    value = "0.5025" if metric == "val_nll" else "0.50"
    numbers = ["t0000", "10/30", value, *(f"{value:.3g}" for value in list(PARAMS.values())[:params])]
    for width in range(60, 130):
        lines = lines_of(records, width, ("t0000",))
        assert max(map(len, lines)) <= width
        text = "\n".join(lines)
        assert text.isascii()
        assert [word for word in re.split(r"[\s=]+", text) if word in numbers] == numbers, text
    assert max(map(len, lines_of(records, 30, ("t0000",)))) <= 30


# ---------------------------------------------------------------- the time left
def expect_slowly(done: int, epochs: int, rungs: list[int]) -> float:
    """Epoch by epoch: how likely it is that it is trained."""
    return sum((1 / 3) ** sum(done < rung < epoch for rung in rungs) for epoch in range(done + 1, epochs + 1))


@pytest.mark.parametrize(("epochs", "rungs"), [(1, []), (6, [2]), (200, [20, 60, 180])])
def test_epochs_that_asha_leaves(epochs, rungs):
    grace = grace_epochs(epochs)
    for done in range(epochs + 1):
        assert expected_work_left(done, epochs, grace) == pytest.approx(expect_slowly(done, epochs, rungs))
    assert expected_work(7, epochs, grace) == pytest.approx(2 * epochs + 5 * expect_slowly(0, epochs, rungs))


def test_time_left_falls_from_what_is_expected_of_all_to_nothing(tmp_path):
    records = open_records(tmp_path / "resnet18", epochs=30)
    left = [estimate_left_s(records, 4, 2.0)]
    assert left[0] == pytest.approx(expected_work(4, 30, 3) / 2.0)
    assert estimate_left_s(records, 4, 2.0, stops_early=False) == 4 * 30 / 2.0
    for role, epochs in (("reference", 10), ("control", 10), ("sampled", 2), ("sampled", 2)):
        trial_id = begin(records, epochs, role=role, seconds=0.01)
        left.append(estimate_left_s(records, 4, 2.0))
        records.end(trial_id, "stopped")
        left.append(estimate_left_s(records, 4, 2.0))
    assert left[-1] == 0
    assert all(a > b for a, b in pairwise(left))


def test_the_last_trial_takes_its_own_time_however_quick_all_were_together(tmp_path):
    records = open_records(tmp_path / "resnet18", epochs=30)
    begin(records, 10, role="reference", seconds=4.0)
    assert estimate_left_s(records, 1, work_per_s=8.0) == 20 * 4.0


# ---------------------------------------------------------------- the terminal
@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> FakeTerminal:
    fake = FakeTerminal()
    monkeypatch.setattr(sys, "__stdout__", fake)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "24")
    return fake


def test_long_lines_are_broken_where_they_may_be():
    line = "  1/6  t0001  completed    6 epochs  val_accuracy 93.01  temperature 3  beta 2.08e-07  3 s"
    assert fold(line, 60).splitlines() == [
        "  1/6  t0001  completed  6 epochs  val_accuracy 93.01",
        "  temperature 3  beta 2.08e-07  3 s",
    ]
    assert fold("- one sentence that is too long\nshort", 20) == "- one sentence that\n  is too long\nshort"
    assert fold("/a/path/that/is/longer/than/the/line", 20) == "/a/path/that/is/longer/than/the/line"
    assert fold(line) == line, "in a file lines are as long as they are"


def test_several_runs_are_shown_as_far_as_their_files_say(terminal, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", terminal)
    (tmp_path / "run").mkdir()
    config = TrainConfig(recipe="reference", epochs=4)
    for epoch in (1, 2):
        append_json_line(tmp_path / "run" / "metrics.jsonl", {"epoch": epoch})
    with show_runs(config) as (say, on_look):
        on_look([tmp_path / "run", tmp_path / "not begun"], 1, 5)
        say("one has ended")
    shown = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", terminal.getvalue())
    assert "one has ended" in shown
    bar = next(line for line in shown.splitlines() if "runs 1/5" in line)
    assert bar.endswith("left")
    assert bar.index("\u257a") - bar.index("\u2501") == 12, "of forty: six of twenty epochs"


def test_several_runs_are_lines_elsewhere(capsys, tmp_path):
    with show_runs(TrainConfig()) as (say, on_look):
        on_look([tmp_path], 0, 5)
        say("one has ended")
    assert capsys.readouterr().out == "one has ended\n"


def show(live: LiveTable, records: SearchRecords, running: tuple[str, ...] = ("t0004",), **options) -> None:
    live.show(records, list(running), num_samples=64, stops_early=True, **options)


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


def test_speed_and_time_left_are_those_of_the_last_epochs(terminal, records, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with LiveTable() as live:
        show(live, records)
        assert "left -  epochs/s -" in re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
        for seconds in [1000.0] * 5 + [2.0] * NUM_MEASURED:
            clock[0] += seconds
            live.add_epoch(1.0)
        clock[0] += 3.0
        show(live, records, deadline=clock[0] + 61.0)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert "time 1:26:43  left about 61 s  epochs/s 0.5" in shown, "the search stops before it has done all"


def test_lines_stay_and_the_table_goes(terminal, records):
    with LiveTable() as live:
        show(live, records)
        live.say("first [bold] :smile:")
        show(live, records, ("t0003", "t0004"))
    live.say("last")
    assert terminal.getvalue().startswith(HIDE_CURSOR)
    assert terminal.getvalue().rindex(SHOW_CURSOR) > terminal.getvalue().rindex("t0004")
    assert screen_after(terminal.getvalue()) == ["first [bold] :smile:", "last"]


def test_more_trials_than_lines(terminal, records):
    running = tuple(begin(records, 1) for _ in range(40))
    with LiveTable() as live:
        show(live, records, running)
    shown = terminal.getvalue()
    assert shown.count("\n") <= 24
    assert all(words in shown for words in ("92.36", running[0], "...")), "the best, the first of the others"
    assert running[-1] not in shown
    assert screen_after(shown) == []


@pytest.mark.parametrize(("variable", "is_terminal"), [(("TERM", "dumb"), True), (("FORCE_COLOR", "1"), False)])
def test_where_no_table_can_be_there_are_plain_lines(terminal, records, monkeypatch, variable, is_terminal):
    monkeypatch.setenv(*variable)
    monkeypatch.setattr(terminal, "isatty", lambda: is_terminal)
    with LiveTable() as live:
        assert not live.is_due()
        show(live, records)
        live.say("line")
    assert terminal.getvalue() == "line\n"


@pytest.mark.parametrize("gone_before", ["start", "table", "line", "end"])
def test_a_terminal_that_goes_away_is_no_trouble(terminal, records, gone_before):
    def now(moment: str) -> None:
        if moment == gone_before:
            terminal.error = BrokenPipeError(errno.EPIPE, "Broken pipe")

    now("start")
    with LiveTable() as live:
        now("table")
        show(live, records)
        now("line")
        live.say("line")
        now("end")
    live.say("line")


def test_it_is_drawn_at_most_once_in_a_while_but_after_each_line(terminal, records, monkeypatch):
    monkeypatch.setattr("search.table.REFRESH_S", 3600.0)
    with LiveTable() as live:
        assert live.is_due()
        show(live, records)
        assert not live.is_due()
        live.say("line")
        assert live.is_due()


# ---------------------------------------------------------------- a real search on a pseudo-terminal
@pytest.mark.slow
def test_ctrl_c_gives_the_terminal_back(tmp_path):
    # Epochs enough that the table, drawn once a second, shows one before all is done.
    flags = ("--dataset", "digits", "--width", 4, "--epochs", 100, "--num-samples", 4, "--outputs", tmp_path)
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 60, 0, 0))
    command, environment = command_line("search/tune.py", *flags), command_environment(TERM="xterm-256color")
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=its, stdout=its, stderr=its)
    os.close(its)
    output, asked, give_up_at = "", False, time.monotonic() + 300
    with suppress(OSError):  # Linux's word for the end of a terminal
        while time.monotonic() < give_up_at:
            if select.select([ours], [], [], 1)[0]:
                output += os.read(ours, 65536).decode(errors="replace")
            if not asked and "/100" in output:
                asked = True
                process.send_signal(signal.SIGINT)
    os.close(ours)
    assert process.wait(60) == 128 + signal.SIGINT, output
    assert output.rindex(SHOW_CURSOR) > output.rindex(HIDE_CURSOR)
    assert "epochs/s" in output
    assert "epochs/s" not in "\n".join(screen_after(output)), "the table is gone"
    assert " of 4 trials have ended; go on with:" in output
    assert "Traceback" not in output


def test_columns_go_until_a_table_fits_the_terminal(monkeypatch):
    header, rows = ["trial", "alpha", "1/4", "seconds"], [["t0001", "0.123456", "12.34", "1234567"]]
    wide = text_table(header, rows, may_go=("seconds", "1/4"))
    assert wide.splitlines()[0] == "trial     alpha    1/4  seconds", "a pipe is as wide as one likes"
    for width, kept in ((31, header), (30, header[:3]), (21, header[:2]), (5, header[:2])):
        monkeypatch.setattr(console, "terminal_width", lambda width=width: width)
        assert text_table(header, rows, may_go=("seconds", "1/4")).splitlines()[0].split() == kept
