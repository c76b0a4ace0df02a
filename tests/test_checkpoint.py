"""Holds the files a run leaves on disk to DESIGN: whole or not there, damage found, nothing executed, two kept."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

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
from byot.system.files import append_json_line, read_json, read_json_lines, set_aside, write_json, write_json_lines
from tests.helpers import assert_same_state, command_environment

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


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "epoch-0003.pt"
    save_checkpoint(path, STATE)
    assert_same_state(load_checkpoint(path), STATE)
    assert load_checkpoint(path)["model"]["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert [p.name for p in path.parent.iterdir()] == ["epoch-0003.pt"], "no temporary file is left"


class StopError(Exception):
    """What the tests throw into the middle of a write."""


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "os.replace"])
def test_an_exception_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "epoch-0001.pt"
    save_checkpoint(path, STATE)

    def fail(*arguments: Any) -> None:
        if moment == "torch.save":
            arguments[1].write(b"half of it")
        raise StopError

    monkeypatch.setattr(moment, fail)
    with pytest.raises(StopError):
        save_checkpoint(path, STATE | {"epoch": 4})
    monkeypatch.undo()
    assert_same_state(load_checkpoint(path), STATE)
    assert [p.name for p in tmp_path.iterdir()] == ["epoch-0001.pt"]


def test_the_disk_has_the_new_file_before_the_old_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that reaches the disk before the data would leave an empty checkpoint after a power cut."""
    calls: list[str] = []
    real: dict[str, Any] = {"fsync": os.fsync, "replace": os.replace}

    def noted(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            calls.append(name)
            return real[name](*arguments)

        return call

    for name in real:
        monkeypatch.setattr(os, name, noted(name))
    save_checkpoint(tmp_path / "a.pt", STATE)
    assert calls[:2] == ["fsync", "replace"]


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
import torch
from byot.system.checkpoint import save_checkpoint
os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)
save_checkpoint(Path(sys.argv[1]), {"epoch": 4, "model": torch.zeros(1000)})
"""


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "epoch-0001.pt"
    save_checkpoint(path, STATE)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_WRITING, str(path)], cwd=tmp_path, env=command_environment(), check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2, "it was killed in the middle of writing"
    assert_same_state(load_checkpoint(path), STATE)
    assert list_checkpoints(tmp_path) == [path], "what it left behind is not taken for a checkpoint"


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, dict[str, Any], bytes]:
    """A checkpoint of few bytes."""
    state = {"epoch": 3, "model": {"w": torch.arange(10.0)}, "config": {"lr": 0.1, "name": "x"}}
    path = tmp_path / "epoch-0001.pt"
    save_checkpoint(path, state)
    return path, state, path.read_bytes()


def test_truncation_anywhere_is_found(small: tuple[Path, dict[str, Any], bytes]) -> None:
    path, _, whole = small
    for length in (*range(0, len(whole), 13), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=path.name):
            load_checkpoint(path)


def test_a_flipped_bit_anywhere_is_found(small: tuple[Path, dict[str, Any], bytes]) -> None:
    """Also in the archive's directory, where torch.load alone would read another record in silence."""
    path, _, whole = small
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x01]) + whole[position + 1 :])
        with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
            load_checkpoint(path)


def test_torch_reads_a_checkpoint_as_it_is(small: tuple[Path, dict[str, Any], bytes]) -> None:
    path, state, _ = small
    assert_same_state(torch.load(path, weights_only=True), state)


class Code:
    """Unpickling this would make a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path: Path) -> None:
    path, marker = tmp_path / "epoch-0001.pt", tmp_path / "marker"
    save_checkpoint(path, {"epoch": 1, "model": Code(marker)})  # its checksum is right
    with pytest.raises(ValueError, match=rf"{path.name} holds other than plain data"):
        load_checkpoint(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # it is a trap: without protection it springs
    assert marker.exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, "hello"])
def test_other_peoples_files_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt is damaged, or was not written by this project"):
        load_checkpoint(tmp_path / "weights.pt")


def test_the_latest_is_the_one_of_the_highest_epoch(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "nowhere") is None
    for epoch in (10, 9, 100):  # not in the order they were written
        save_checkpoint(checkpoint_path(tmp_path, epoch), STATE | {"epoch": epoch})
    found = load_latest(tmp_path)
    assert found is not None
    assert found[0] == checkpoint_path(tmp_path, 100)
    assert found[1]["epoch"] == 100
    assert [p.name for p in list_checkpoints(tmp_path)] == ["epoch-0100.pt", "epoch-0010.pt", "epoch-0009.pt"]


def test_a_damaged_latest_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        save_checkpoint(checkpoint_path(tmp_path, epoch), STATE | {"epoch": epoch})
    for epoch in (2, 3):
        path = checkpoint_path(tmp_path, epoch)
        path.write_bytes(path.read_bytes()[:-50])
    with pytest.warns(UserWarning, match="damaged") as caught:
        found = load_latest(tmp_path)
    assert [name in str(w.message) for name, w in zip(("epoch-0003", "epoch-0002"), caught, strict=True)] == [True] * 2
    assert found is not None
    assert found[1]["epoch"] == 1


def test_two_checkpoints_are_kept_and_no_half_written_ones(tmp_path: Path) -> None:
    """Half-written checkpoints of killed runs are as large as whole ones."""
    (tmp_path / ".epoch-0002.pt.999999999.tmp").write_bytes(b"half")  # no process has this number
    for epoch in range(1, 6):
        save_checkpoint(checkpoint_path(tmp_path, epoch), {"epoch": epoch})
        remove_old_checkpoints(tmp_path)
        expected = [checkpoint_path(tmp_path, e) for e in (epoch, epoch - 1) if e > 0]
        assert sorted(tmp_path.iterdir(), reverse=True) == list_checkpoints(tmp_path) == expected


# ---------------------------------------------------------------- JSON files


def test_json_has_no_name_for_nan(tmp_path: Path) -> None:
    record = {"a": math.nan, "b": [1.0, math.inf], "c": {"d": -math.inf}, "e": (2, "x", None, True)}
    write_json(tmp_path / "a.json", record)
    append_json_line(tmp_path / "a.jsonl", record)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    for name in ("a.json", "a.jsonl"):
        found = json.loads((tmp_path / name).read_text(), parse_constant=refuse)
        assert found == {"a": None, "b": [1.0, None], "c": {"d": None}, "e": [2, "x", None, True]}


@pytest.mark.parametrize("content", [None, "", "[1]", "null", "\x00", '{"a":' * 100_000])
def test_damaged_json_is_told_in_one_sentence(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"config\.json [^\n]+$"):
        read_json(path)


def test_a_torn_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path) == []
    records: list[dict[str, Any]] = [{"epoch": epoch, "loss": epoch / 2} for epoch in (1, 2, 3)]
    write_json_lines(path, records[:1])
    for record in records[1:]:
        append_json_line(path, record)
    with path.open("a") as file:
        file.write('{"epoch": 4, "lo')
    assert read_json_lines(path) == records
    write_json_lines(path, records[:2])
    assert path.read_text().count("\n") == 2
    assert read_json_lines(path) == records[:2]


def test_what_is_set_aside_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    for content in ("first", "second"):
        folder.mkdir(parents=True)
        (folder / "file").write_text(content)
        aside = set_aside(folder)
        assert (aside / "file").read_text() == content
        assert aside.parent == tmp_path / "runs" / "replaced"
    assert not folder.exists()
    assert len(list((tmp_path / "runs" / "replaced").iterdir())) == 2
