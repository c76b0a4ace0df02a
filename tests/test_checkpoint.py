"""Holds the files a run leaves on disk to DESIGN: whole or not there, damage found, nothing executed, two kept."""

import json
import math
import os
import signal
import subprocess
import sys
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from byot.system.checkpoint import (
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    remove_old_checkpoints,
    save_checkpoint,
)
from byot.system.files import append_json_line, write_json
from byot.system.lock import lock_folder
from byot.system.stopping import catch_stop_signals
from tests.helpers import PROJECT, assert_same_state

STATE: dict[str, Any] = {
    "epoch": 3,
    "config": {"lr": 0.1, "model": "resnet18", "data_dir": None},
    "normalisation": {"mean": (0.5, 0.25, 0.125)},
    "model": {
        "float": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)),
        "odd": torch.tensor([math.nan, math.inf, -0.0, 1e-42]).nan_to_num(nan=2.0, posinf=math.inf),
        "count": torch.tensor(9),
        "half": torch.arange(6).to(torch.bfloat16).view(2, 3),
        "empty": torch.zeros(0),
        "channels_last": torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    },
    "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
}


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "folder" / "epoch-0003.pt"
    save_checkpoint(path, STATE)
    assert_same_state(load_checkpoint(path), STATE)
    assert_same_state(torch.load(path, weights_only=True), STATE)
    assert load_checkpoint(path)["model"]["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert [p.name for p in path.parent.iterdir()] == ["epoch-0003.pt"], "no temporary file is left"


def test_an_exception_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "epoch-0001.pt"
    save_checkpoint(path, STATE)
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, STATE | {"epoch": 4})
    assert_same_state(load_checkpoint(path), STATE)
    assert [p.name for p in tmp_path.iterdir()] == ["epoch-0001.pt"]


def test_the_disk_has_the_new_file_before_the_old_one_goes(tmp_path, monkeypatch):
    """A rename that reaches the disk before the data would leave an empty checkpoint after a power cut."""
    order = Mock()
    order.replace.side_effect = os.replace
    monkeypatch.setattr(os, "fsync", order.fsync)
    monkeypatch.setattr(os, "replace", order.replace)
    save_checkpoint(tmp_path / "a.pt", STATE)
    assert [call[0] for call in order.mock_calls] == ["fsync", "replace"]


def test_a_flipped_bit_and_a_cut_anywhere_are_found(tmp_path):
    """Also in the archive's directory, where torch.load alone would read another record in silence."""
    path = tmp_path / "epoch-0001.pt"
    save_checkpoint(path, {"epoch": 3, "model": {"w": torch.arange(10.0)}, "config": {"lr": 0.1, "name": "x"}})
    whole = path.read_bytes()
    damaged = [whole[:i] + bytes([whole[i] ^ 0x01]) + whole[i + 1 :] for i in range(len(whole))]
    for content in (*damaged, *(whole[:length] for length in range(0, len(whole), 13)), whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
            load_checkpoint(path)


def test_the_latest_is_the_one_of_the_highest_epoch_that_is_whole(tmp_path):
    assert load_latest(tmp_path / "nowhere") is None
    for epoch in (10, 9, 100):  # not in the order they were written
        save_checkpoint(checkpoint_path(tmp_path, epoch), {"epoch": epoch})
    assert load_latest(tmp_path) == (checkpoint_path(tmp_path, 100), {"epoch": 100})
    checkpoint_path(tmp_path, 100).write_bytes(b"damaged")
    checkpoint_path(tmp_path, 10).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"epoch-0(10|01)0\.pt is damaged") as caught:
        assert load_latest(tmp_path) == (checkpoint_path(tmp_path, 9), {"epoch": 9})
    assert len(caught) == 2


def test_two_checkpoints_are_kept_and_no_half_written_ones(tmp_path):
    """Half-written checkpoints of killed runs are as large as whole ones."""
    (tmp_path / ".epoch-0002.pt.999999999.tmp").write_bytes(b"half")  # no process has this number
    for epoch in range(1, 6):
        save_checkpoint(checkpoint_path(tmp_path, epoch), {"epoch": epoch})
        remove_old_checkpoints(tmp_path)
        expected = [checkpoint_path(tmp_path, e) for e in (epoch, epoch - 1) if e > 0]
        assert sorted(tmp_path.iterdir(), reverse=True) == list_checkpoints(tmp_path) == expected


# ---------------------------------------------------------------- JSON files
def test_json_has_no_name_for_nan(tmp_path):
    record = {"a": math.nan, "b": [1.0, math.inf], "c": {"d": -math.inf}, "e": (2, "x", None, True)}
    write_json(tmp_path / "a.json", record)
    append_json_line(tmp_path / "a.jsonl", record)
    for name in ("a.json", "a.jsonl"):
        found = json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail)
        assert found == {"a": None, "b": [1.0, None], "c": {"d": None}, "e": [2, "x", None, True]}


# ---------------------------------------------------------------- one process at a time, and signals to stop

HOLD = """
import sys, time
from pathlib import Path
from byot.system.lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path):
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


def test_an_unused_new_folder_is_removed(tmp_path):
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
def test_the_first_signal_is_noted_and_the_second_acts(number):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with catch_stop_signals() as stop_asked:
        assert stop_asked() == 0
        os.kill(os.getpid(), number)
        assert stop_asked() == number
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with catch_stop_signals() as stop_asked:
        assert stop_asked() == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
