"""One process at a time writes in a folder, whatever becomes of it; signals to stop are noted once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from byot.system.lock import lock_folder
from byot.system.stopping import catch_stop_signals
from tests.helpers import PROJECT

HOLD = """
import sys, time
from pathlib import Path
from byot.system.lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        for wait_s in (0, 0.2):
            with pytest.raises(ValueError, match="another process is writing to"), lock_folder(tmp_path, wait_s):
                pass
    finally:
        holder.kill()
        holder.communicate()
    with lock_folder(tmp_path):
        pass


def test_an_unused_new_folder_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "for" / "it"
    with pytest.raises(KeyError), lock_folder(folder):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with lock_folder(folder):
        (folder / "file").touch()
    with lock_folder(folder):
        pass
    assert (folder / "file").exists()
    empty = tmp_path / "was there"
    empty.mkdir()
    with lock_folder(empty):
        pass
    assert empty.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with catch_stop_signals() as stop_asked:
        assert stop_asked() == 0
        os.kill(os.getpid(), number)
        assert stop_asked() == number
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with catch_stop_signals() as stop_asked:
        assert stop_asked() == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
