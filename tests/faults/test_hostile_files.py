"""Damaged and hostile files: each is told in one sentence that names the file, none runs code, nothing is written.

Files a command reads are given to the command. In the current folder lies what tests/faults/place.py puts there.
"""

import csv
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from analysis.trials import load_curves, load_runs, load_trials
from byot.config import TrainConfig
from byot.data import load_images
from byot.system import checkpoint
from byot.system.checkpoint import load_checkpoint, save_checkpoint
from byot.system.files import read_json, read_json_lines, write_json
from search.space import read_space
from tests.helpers import (
    Refuse,
    assert_one_sentence,
    encode_png,
    picture_of,
    random_pixels,
    run_command,
    write_parquet,
)

pytest_plugins = ["tests.faults.place"]

State = dict[str, Any]
EXAMPLES = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Code:
    """Unpickling this makes a file called `sprung` in the current folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch sprung",)


def write_signed(path: Path, archive: bytes) -> None:
    """Write these bytes as a checkpoint whose checksum is right."""
    archive = archive.removesuffix(checkpoint.NO_COMMENT) + checkpoint.NO_COMMENT
    path.write_bytes(archive[:-2] + checkpoint._comment(archive))


def read_or_told(read: Callable[[Path], Any], path: Path) -> Any:
    """What is in the file, or None where one sentence that names it tells what is wrong."""
    try:
        return read(path)
    except ValueError as error:
        message = str(error)
    assert str(path) in message
    assert "\n" not in message
    return None


def archive_of(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


# ---------------------------------------------------------------- checkpoints, damaged


def cut(share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        whole = path.read_bytes()
        path.write_bytes(whole[: round(share * len(whole))])

    return damage


def flip(share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        whole = bytearray(path.read_bytes())
        whole[round(share * (len(whole) - 1))] ^= 0x10
        path.write_bytes(whole)

    return damage


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def deflate(path: Path) -> None:
    """The same checkpoint compressed, with a record of zeros that is a thousand times its size when unpacked."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
        packed.writestr("archive/data/9999", bytes(50_000_000))
    write_signed(path, buffer.getvalue())


def sign_without_pickle(path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/readme.txt", "no state here")
    write_signed(path, buffer.getvalue())


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{f"cut at {share}": (cut(share), "is damaged") for share in (0, 1e-4, 0.01, 0.1, 0.5, 0.9, 0.99, 0.9999)},
    **{f"flipped at {share}": (flip(share), "is damaged") for share in (0, 0.001, 0.05, 0.3, 0.7, 0.97, 0.999, 1)},
    "one byte more": (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "is damaged"),
    "twice": (lambda p: p.write_bytes(p.read_bytes() * 2), "is damaged"),
    "text": (lambda p: p.write_text("hello"), "is damaged"),
    "zeros": (lambda p: p.write_bytes(bytes(10_000)), "is damaged"),
    "an image": (lambda p: p.write_bytes(encode_png(random_pixels(1)[0])), "is damaged"),
    "a folder": (replace_by_folder, "holds no checkpoint that can be read"),
    "torch.save of another project": (lambda p: torch.save({"state_dict": {}}, p), "not written by this project"),
    "pickle with code": (lambda p: p.write_bytes(pickle.dumps(Code())), "is damaged"),
    "torch.save with code": (lambda p: torch.save({"model": Code()}, p), "is damaged"),
    "signed pickle with code": (lambda p: write_signed(p, pickle.dumps(Code())), "is not loaded"),
    "signed archive with code": (lambda p: write_signed(p, archive_of({"model": Code()})), "is not loaded"),
    "signed text": (lambda p: write_signed(p, b"hello"), "is not loaded"),
    "signed nothing": (lambda p: write_signed(p, b""), "is not loaded"),
    "signed archive without state": (sign_without_pickle, "is not loaded"),
    "zip bomb": (deflate, "was not written by this project"),
    "a list": (lambda p: write_signed(p, archive_of([1, 2])), "was not written by this project"),
    "a tensor": (lambda p: write_signed(p, archive_of(torch.zeros(3))), "was not written by this project"),
    "a whole network": (lambda p: write_signed(p, archive_of(torch.nn.Linear(2, 2))), "is not loaded"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("program", ["evaluate.py", "train.py"])
def test_a_damaged_checkpoint_is_told(place: Path, refuse: Refuse, program: str, name: str) -> None:
    damage, words = DAMAGED[name]
    damage(place / "checkpoint.pt")
    arguments = ("checkpoint.pt", "--device", "cpu") if program == "evaluate.py" else ("--resume", "checkpoint.pt")
    refuse(program, arguments, str(place / "checkpoint.pt"), words)
    assert not (place / "sprung").exists()


def test_the_traps_spring_without_protection(place: Path) -> None:
    write_signed(place / "checkpoint.pt", archive_of({"model": Code()}))
    torch.load(place / "checkpoint.pt", weights_only=False)
    assert (place / "sprung").exists()


@given(st.data())
@EXAMPLES
def test_whatever_is_signed_is_loaded_or_told(tmp_path: Path, data: st.DataObject) -> None:
    """A right checksum over a wrong archive: bytes cut out, put in or changed anywhere."""
    whole = archive_of({"epoch": 3, "model": {"w": torch.arange(10.0)}, "config": {"lr": 0.1, "name": "x"}})
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 40)))
    path = tmp_path / "epoch-0001.pt"
    write_signed(path, whole[:start] + data.draw(st.binary(max_size=40)) + whole[end:])
    assert isinstance(read_or_told(load_checkpoint, path), dict | None)


# ---------------------------------------------------------------- checkpoints, whole but wrong


NO_COUNTS: tuple[Any, ...] = (None, "x", -1.5, [1], {})
ODD: tuple[Any, ...] = (None, "x", 1.5, [1], {}, torch.zeros(2))


def without(*keys: Any) -> Callable[[State], None]:
    def change(state: Any) -> None:
        *outer, last = keys
        for key in outer:
            state = state[key]
        del state[last]

    return change


def having(value: Any, *keys: Any) -> Callable[[State], None]:
    def change(state: Any) -> None:
        *outer, last = keys
        for key in outer:
            state = state[key]
        state[last] = value

    return change


WEIGHT = "branches.2.fc.weight"
WRONG_STATES: dict[str, Callable[[State], None]] = {
    "nothing": lambda state: state.clear(),
    **{f"no {key}": without(key) for key in ("config", "epoch", "normalisation", "model")},
    **{
        f"{key} is {value!r}": having(value, key)
        for key in ("config", "epoch", "normalisation", "model")
        for value in ODD
        if (key, value) != ("config", {})  # the defaults
    },
    "unknown setting": having(1, "config", "gamma"),
    "a setting by number": having(1, "config", 7),
    "lr is nan": having(float("nan"), "config", "lr"),
    "lr is text": having("0.1", "config", "lr"),
    "model is a list": having(["resnet18"], "config", "model"),
    "data_dir is a number": having(5, "config", "data_dir"),
    "data_dir is empty": having("", "config", "data_dir"),
    "epochs is beyond all": having(10**400, "config", "epochs"),
    "lr is beyond all": having(10**400, "config", "lr"),
    "another network": having("resnet34", "config", "model"),
    "another width": having(2, "config", "width"),
    "epoch is negative": having(-1, "epoch"),
    "epoch is beyond the last": having(3, "epoch"),
    "epoch is true": having(True, "epoch"),
    **{
        f"{key} is {value!r}": having(value, key)
        for key in ("step", "num_train_images", "elapsed_s", "history", "sums")
        for value in NO_COUNTS
    },
    "step is negative": having(-1, "step"),
    "elapsed_s is nan": having(float("nan"), "elapsed_s"),
    "no history": having([], "history"),
    "history of another epoch": having(2, "history", 0, "epoch"),
    "history without times": without("history", 0, "elapsed_s"),
    "sums of another shape": having(torch.zeros(3), "sums", "sums"),
    "sums are text": having("x", "sums", "sums"),
    "sums of no images": having(None, "sums", "num_images"),
    "no mean": without("normalisation", "mean"),
    "mean of two channels": having((0.5, 0.5), "normalisation", "mean"),
    "mean is text": having(("a", "b", "c"), "normalisation", "mean"),
    "std is nan": having((0.5, 0.5, float("nan")), "normalisation", "std"),
    "std is 0": having((0.5, 0.5, 0.0), "normalisation", "std"),
    "more in normalisation": having(1, "normalisation", "median"),
    "no weight": without("model", WEIGHT),
    "a weight too many": having(torch.zeros(1), "model", "extra"),
    "a weight by number": having(torch.zeros(1), "model", 7),
    "a weight is text": having("heavy", "model", WEIGHT),
    "a weight is None": having(None, "model", WEIGHT),
    "a weight of another shape": having(torch.zeros(3, 3), "model", WEIGHT),
    "a weight beyond all": having(torch.zeros(1).expand(10**6, 10**6), "model", WEIGHT),
    "a complex weight": lambda state: having(state["model"][WEIGHT] * 1j, "model", WEIGHT)(state),
    "a sparse weight": lambda state: having(state["model"][WEIGHT].to_sparse(), "model", WEIGHT)(state),
    "a weight without values": lambda state: having(state["model"][WEIGHT].to("meta"), "model", WEIGHT)(state),
}
WRONG_OPTIMIZERS: dict[str, Callable[[State], None]] = {
    "no optimizer": without("optimizer"),
    **{f"optimizer is {value!r}": having(value, "optimizer") for value in ODD},
    "no groups": having([], "optimizer", "param_groups"),
    "a group is empty": having([{}], "optimizer", "param_groups"),
    "two groups": lambda state: state["optimizer"]["param_groups"].append({"params": []}),
    "momentum is text": having("0.9", "optimizer", "param_groups", 0, "momentum"),
    "parameters missing": having([0, 1], "optimizer", "param_groups", 0, "params"),
    "buffers are a list": having([], "optimizer", "state"),
    "a buffer of another shape": having(torch.zeros(2), "optimizer", "state", 0, "momentum_buffer"),
    "a buffer is text": having("x", "optimizer", "state", 0, "momentum_buffer"),
    "a buffer too many": having({"momentum_buffer": torch.zeros(1)}, "optimizer", "state", 9999),
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_a_whole_checkpoint_with_a_wrong_state_is_told(place: Path, refuse: Refuse, trained: State, name: str) -> None:
    state = deepcopy(trained)
    WRONG_STATES[name](state)
    save_checkpoint(place / "checkpoint.pt", state)
    refuse("evaluate.py", ("checkpoint.pt", "--device", "cpu"), str(place / "checkpoint.pt"))
    refuse("train.py", ("--resume", "checkpoint.pt"), str(place / "checkpoint.pt"))


@pytest.mark.parametrize("name", WRONG_OPTIMIZERS)
def test_a_whole_checkpoint_with_a_wrong_optimizer_is_told(
    place: Path, refuse: Refuse, trained: State, name: str
) -> None:
    state = deepcopy(trained)
    WRONG_OPTIMIZERS[name](state)
    save_checkpoint(place / "checkpoint.pt", state)
    refuse("train.py", ("--resume", "checkpoint.pt"), str(place / "checkpoint.pt"))


# ---------------------------------------------------------------- images as parquet

PNG = encode_png(random_pixels(1)[0])
LABELS = pyarrow.array([1, 2])
CELL = {"bytes": PNG, "path": "a.png"}


def picture(mode: str, kind: str, size: int = 32, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (size, size), 1).save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size."""
    header = b"IHDR" + struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    return PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]


def png_with_text_bomb() -> bytes:
    chunk = b"zTXt" + b"a\0\0" + zlib.compress(bytes(100_000_000), 9)
    return PNG[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + PNG[33:]


def column(cells: Any, kind: Any = None) -> Any:
    return pyarrow.table({"img": pyarrow.array(cells, type=kind), "fine_label": LABELS})


def labelled(labels: Any) -> Any:
    return pyarrow.table({"img": [CELL] * 2, "fine_label": labels})


def of_images(*images: bytes | None) -> Any:
    return pyarrow.table({"img": [{"bytes": i, "path": "a"} for i in images], "fine_label": [1] * len(images)})


TABLES: dict[str, tuple[Any, str]] = {
    "no columns": (pyarrow.table({}), "lacks the column 'img'"),
    "other columns": (pyarrow.table({"image": [1], "label": [1]}), "lacks the column 'img'; it has image, label"),
    "no labels": (pyarrow.table({"img": [CELL]}), "lacks the column 'fine_label'"),
    "columns twice": (
        pyarrow.Table.from_arrays([column([CELL] * 2)["img"]] * 2 + [LABELS], ["img", "img", "fine_label"]),
        "has a column twice",
    ),
    "labels twice": (
        pyarrow.Table.from_arrays([column([CELL] * 2)["img"], LABELS, LABELS], ["img", "fine_label", "fine_label"]),
        "has a column twice",
    ),
    "no rows": (column([CELL] * 2).slice(0, 0), "has no rows"),
    "image is a number": (column([1, 2]), "row 0 of column 'img' has no bytes"),
    "image is text": (column(["a", "b"]), "row 0 of column 'img' has no bytes"),
    "image is bytes alone": (column([PNG, PNG]), "row 0 of column 'img' has no bytes"),
    "image in a list": (column([[CELL], [CELL]]), "row 0 of column 'img' has no bytes"),
    "image nested once more": (column([{"bytes": CELL}] * 2), "row 0 of column 'img' has no bytes"),
    "image bytes are text": (column([{"bytes": "x"}] * 2), "row 0 of column 'img' has no bytes"),
    "image bytes under another name": (column([{"data": PNG}] * 2), "row 0 of column 'img' has no bytes"),
    "image null": (column([CELL, None]), "row 1 of column 'img' has no bytes"),
    "image bytes null": (of_images(PNG, None), "row 1 of column 'img' has no bytes"),
    "image empty": (of_images(PNG, b""), "row 1 of column 'img' is not an image"),
    "image text": (of_images(b"hello"), "row 0 of column 'img' is not an image"),
    "image cut": (of_images(PNG[:-100]), "row 0 of column 'img' is not an image"),
    "image cut in its header": (of_images(PNG[:20]), "row 0 of column 'img' is not an image"),
    "image of 31 pixels": (of_images(picture("RGB", "PNG", 31)), "row 0 is 31x31 pixels, not 32x32"),
    "image of 96 pixels": (of_images(PNG, picture("RGB", "PNG", 96)), "row 1 is 96x96 pixels, not 32x32"),
    "image not square": (of_images(png_of_size(32, 16)), "row 0 is 32x16 pixels, not 32x32"),
    "image of no pixels": (of_images(png_of_size(0, 0)), "row 0"),
    "image of 100 million pixels": (of_images(png_of_size(10_000, 10_000)), "row 0"),
    "image of all pixels": (of_images(png_of_size(2**31 - 1, 2**31 - 1)), "row 0"),
    "image with a text bomb": (of_images(png_with_text_bomb()), "row 0 of column 'img' is not an image"),
    "image that is a program": (
        of_images(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nquit\n%%EOF\n"),
        "row 0 of column 'img' is not an image",
    ),
    "path is not text": (
        pyarrow.table(
            {
                "img": pyarrow.StructArray.from_arrays(
                    [pyarrow.array([PNG] * 2), pyarrow.array([b"\xff"] * 2).view("string")], ["bytes", "path"]
                ),
                "fine_label": LABELS,
            }
        ),
        "cannot be read as parquet",
    ),
    "label too high": (labelled([0, 100]), "labels run from 0 to 100, but cifar100 has the classes 0 to 99"),
    "label negative": (labelled([-1, 5]), "labels run from -1 to 5"),
    "label beyond all": (labelled(pyarrow.array([0, 2**64 - 1], "uint64")), "but cifar100 has the classes 0 to 99"),
    "label float": (labelled([0.0, 1.0]), "'fine_label' must hold whole numbers only"),
    "label nan": (labelled([0.0, float("nan")]), "'fine_label' must hold whole numbers only"),
    "label bool": (labelled([True, False]), "'fine_label' must hold whole numbers only"),
    "label text": (labelled(["1", "2"]), "'fine_label' must hold whole numbers only"),
    "label null": (labelled([1, None]), "'fine_label' must hold whole numbers only, and some are missing"),
    "label all null": (labelled(pyarrow.nulls(2)), "'fine_label' must hold whole numbers only"),
    "label in a list": (labelled([[1], [2]]), "'fine_label' must hold whole numbers only"),
}
DATA = ("--data-dir", "images", "--width", 1, "--epochs", 1, "--device", "cpu")


@pytest.mark.parametrize("name", TABLES)
def test_a_wrong_table_of_images_is_told(place: Path, refuse: Refuse, name: str) -> None:
    table, words = TABLES[name]
    pyarrow.parquet.write_table(table, place / "images" / "train.parquet")
    refuse("train.py", DATA, str(place / "images" / "train.parquet"), words)
    refuse("tune.py", (*DATA, "--val-fraction", 0.5), str(place / "images" / "train.parquet"), words)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999])
def test_a_cut_parquet_file_is_told(place: Path, refuse: Refuse, split: str, share: float) -> None:
    cut(share)(place / "images" / f"{split}.parquet")
    refuse("train.py", DATA, str(place / "images" / f"{split}.parquet"), "cannot be read as parquet")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1" * 500, b"\xff" * 5000, b"version https://git-lfs\n" * 9, None]
)
def test_what_is_no_parquet_is_told(place: Path, refuse: Refuse, split: str, content: bytes | None) -> None:
    path = place / "images" / f"{split}.parquet"
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    refuse("train.py", DATA, str(path), "cannot be read as parquet")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_that_is_not_there_is_told(place: Path, refuse: Refuse, split: str) -> None:
    (place / "images" / f"{split}.parquet").unlink()
    refuse("train.py", DATA, str(place / "images"), f"{split}*.parquet")


def test_a_second_file_and_a_link_to_nothing_are_told(place: Path, refuse: Refuse) -> None:
    write_parquet(place / "images" / "train-2.parquet", labels=[0, 1, 2, 200])
    refuse("train.py", DATA, "train-2.parquet", "labels run from 0 to 200")
    (place / "images" / "train-2.parquet").unlink()
    (place / "images" / "train-2.parquet").symlink_to("nowhere")
    refuse("train.py", DATA, "train-2.parquet", "cannot be read as parquet")


@pytest.mark.parametrize(
    "image",
    [picture(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    + [picture("P", "PNG", transparency=b"\0" * 256)]
    + [picture(mode, "JPEG") for mode in ("L", "RGB", "CMYK")],
)
def test_images_of_other_modes_become_three_channels(tmp_path: Path, image: bytes) -> None:
    write_parquet(tmp_path / "train.parquet", images=[image], labels=[7])
    found = load_images("cifar100", str(tmp_path), "train").images
    assert (found.shape, found.dtype) == ((1, 32, 32, 3), np.uint8)


@given(st.data())
@EXAMPLES
def test_a_parquet_file_cut_anywhere_is_told(tmp_path: Path, data: st.DataObject) -> None:
    path = write_parquet(tmp_path / "train.parquet", 2)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read as parquet"):
        load_images("cifar100", str(tmp_path), "train")


# ---------------------------------------------------------------- the official archive

ARCHIVE = {"cifar100": "cifar-100-python", "cifar10": "cifar-10-batches-py"}
BATCHES = ("train", "test", "meta", *(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
LOOKS_RIGHT = {"data": np.zeros((4, 3072), np.uint8), "fine_labels": [0] * 4, "labels": [0] * 4}


@pytest.mark.parametrize("dataset", ARCHIVE)
@pytest.mark.parametrize(
    "content", [b"", b"\x80", pickle.dumps(Code()), pickle.dumps(LOOKS_RIGHT), None], ids=lambda c: repr(c)[:20]
)
def test_an_archive_that_is_not_the_published_one_is_told(
    place: Path, refuse: Refuse, dataset: str, content: bytes | None
) -> None:
    """Its files are pickles: one that is not the published one must not be opened at all."""
    for name in BATCHES:
        path = place / "folder" / ARCHIVE[dataset] / name
        path.parent.mkdir(exist_ok=True)
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)
    arguments = ("--dataset", dataset, "--data-dir", "folder", "--width", 1, "--epochs", 1, "--device", "cpu")
    for program in ("train.py", "tune.py"):
        refuse(program, arguments, str(place / "folder"), "incomplete or damaged")
    assert not (place / "sprung").exists()


@pytest.mark.parametrize("dataset", ARCHIVE)
def test_a_packed_archive_that_is_not_the_published_one_is_not_unpacked(
    place: Path, refuse: Refuse, dataset: str
) -> None:
    """torchvision downloads over it; there is no network here."""
    (place / "data").mkdir()
    with tarfile.open(place / "data" / f"{ARCHIVE[dataset].removesuffix('-batches-py')}.tar.gz", "w:gz") as archive:
        archive.add(place / "file", "../escaped")
        archive.add(place / "file", f"{ARCHIVE[dataset]}/train")
    refuse("train.py", ("--dataset", dataset, "--width", 1), str(place / "data"), "could not be downloaded")
    assert not (place / "escaped").exists()


# ---------------------------------------------------------------- records as JSON

NO_JSON: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"config": {"model": "resn',
    "list": b"[]",
    "null": b"null",
    "number": b"5",
    "text": b'"config"',
    "nan": b"NaN",
    "zeros": bytes(100),
    "latin-1": '{"name": "é"}'.encode("latin-1"),
    "utf-16": '{"name": "a"}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "nested without end": b'{"a":' * 200_000,
    "nested lists": b"[" * 200_000 + b"]" * 200_000,
    "a number without end": b'{"a": ' + b"9" * 100_000 + b"}",
    "two records": b"{}{}",
    "single quotes": b"{'config': {}}",
}
DONE = Path("outputs", "searches", "done")


@pytest.mark.parametrize("name", NO_JSON)
def test_what_is_no_json_is_told(place: Path, refuse: Refuse, name: str) -> None:
    for file in ("best.json", "search.json"):
        (place / DONE / file).write_bytes(NO_JSON[name])
    refuse("train.py", ("--best", "done"), str(place / DONE / "best.json"))
    for program in ("best.py", "report.py", "retrain.py"):
        refuse(program, ("done",), str(place / DONE / "search.json"))
    refuse("tune.py", ("--resume", "--name", "done"), str(place / DONE / "search.json"))
    run = place / "outputs" / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "config.json").write_bytes(NO_JSON[name])
    arguments = ("--dataset", "digits", "--width", 1, "--name", "mine")
    refuse("train.py", arguments, str(run / "config.json"))
    write_json(run / "config.json", TrainConfig(dataset="digits", width=1).to_dict())
    (run / "result.json").write_bytes(NO_JSON[name])
    refuse("train.py", arguments, str(run / "result.json"))


def change_record(path: Path, *keys: str, value: Any) -> None:
    """Set a value deep in a record; `...` removes it."""
    record = json.loads(path.read_text())
    *outer, last = keys
    inner = record
    for key in outer:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    path.write_text(json.dumps(record))


Case = tuple[tuple[str, ...], Any]  # where in a record, and what is put there


def each(values: tuple[Any, ...], *keys: str) -> list[Case]:
    return [(keys, value) for value in values]


WRONG_CONFIGS: list[Case] = [
    *each((..., None, 5, "x", [], [["lr", 1]]), "config"),
    *each(("vgg", None, 5, ["resnet18"], {}), "config", "model"),
    *each((0, "6", 6.5, None, True, 10**400), "config", "epochs"),
    *each((0, "0.1", None, [], True, float("nan"), float("inf"), 10**400), "config", "lr"),
    *each(("", 5, []), "config", "data_dir"),
    (("config", "gamma"), 1),
]
WRONG_SPACES: list[Case] = [
    *each((..., None, 5, [], {"width": {"low": 1, "high": 2}}), "space"),
    *each((None, 5, [], {}, {"low": 0}, {"low": 0, "high": 1, "step": 2}), "space", "alpha"),
    *each(("0", None, [], float("nan"), 10**400, 2), "space", "alpha", "low"),
    *each(("yes", 5), "space", "alpha", "log"),
]
WRONG_READINGS: list[Case] = [  # of analysis/ alone
    *each((..., None, 5, []), "name"),
    *each((..., None, 5, []), "status"),
    *each((..., None, 5, [], "", "alpha", "accuracy", "val_f1", "val_accuracy_9"), "metric"),
    *each((..., None, 5, [], "most"), "mode"),
    *each(("many", [], -5, 1.5, True, 10**400), "num_val_images"),
    *each(("many", [], -5), "num_train_images"),
    *each(("many", [], -5), "num_samples"),
    *each(("many", []), "max_concurrent"),
    *each((5, [], "x"), "settings"),
    *each((5, ["GPU"], "x"), "hardware"),
    *each((5, ["torch"], "x"), "versions"),
    *each((5, []), "commit"),
]
WRONG_RESUMPTIONS: list[Case] = [  # of search/tune.py alone
    *each((..., None, 5, [], {"speed": 1}), "settings"),
    *each(("8", None, [], 1.5, True, 0, 10**400), "settings", "num_samples"),
    *each(("8", [], 1.5), "settings", "max_concurrent"),
    *each(("1", [], True), "settings", "gpus_per_trial"),
    *each(("alpha", None, []), "settings", "metric"),
]


def described(cases: list[Case]) -> list[str]:
    return [f"{'.'.join(keys)} {value!r}"[:50] for keys, value in cases]


@pytest.mark.parametrize(("keys", "value"), WRONG_CONFIGS, ids=described(WRONG_CONFIGS))
def test_wrong_settings_in_a_record_are_told(place: Path, refuse: Refuse, keys: tuple[str, ...], value: Any) -> None:
    for file in ("best.json", "search.json"):
        change_record(place / DONE / file, *keys, value=value)
    refuse("train.py", ("--best", "done"), str(place / DONE / "best.json"))
    for program in ("best.py", "report.py", "retrain.py"):
        refuse(program, ("done",), str(place / DONE / "search.json"))
    refuse("tune.py", ("--resume", "--name", "done"), str(place / DONE / "search.json"))


@pytest.mark.parametrize(("keys", "value"), WRONG_SPACES + WRONG_READINGS, ids=described(WRONG_SPACES + WRONG_READINGS))
@pytest.mark.parametrize("program", ["best.py", "report.py", "retrain.py"])
def test_a_wrong_record_of_a_search_is_told(
    place: Path, refuse: Refuse, program: str, keys: tuple[str, ...], value: Any
) -> None:
    change_record(place / DONE / "search.json", *keys, value=value)
    refuse(program, ("done",), str(place / DONE / "search.json"))


@pytest.mark.parametrize(
    ("keys", "value"), WRONG_SPACES + WRONG_RESUMPTIONS, ids=described(WRONG_SPACES + WRONG_RESUMPTIONS)
)
def test_a_wrong_record_of_a_search_to_go_on_with_is_told(
    place: Path, refuse: Refuse, keys: tuple[str, ...], value: Any
) -> None:
    change_record(place / DONE / "search.json", "status", value="interrupted")
    change_record(place / DONE / "search.json", *keys, value=value)
    refuse("tune.py", ("--resume", "--name", "done"), str(place / DONE / "search.json"))


@pytest.mark.parametrize("value", [{"alpha": 7}, {"gamma": 1}, [], None, 5])
def test_wrong_settings_of_an_earlier_run_are_told(place: Path, refuse: Refuse, value: Any) -> None:
    run = place / "outputs" / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(value))
    refuse("train.py", ("--dataset", "digits", "--name", "mine"), str(run / "config.json"))


@pytest.mark.parametrize("key", ["num_test_images", "test_accuracy_1", "test_nll_ensemble"])
@pytest.mark.parametrize("value", [..., None, "high", [], {}])
def test_a_wrong_result_of_an_earlier_run_is_told(place: Path, refuse: Refuse, key: str, value: Any) -> None:
    run = place / "outputs" / "runs" / "mine"
    measures = [f"test_{m}_{s}" for m in ("accuracy", "nll", "ece") for s in (1, 2, 3, 4, "ensemble")]
    write_json(run / "result.json", {"num_test_images": 360, **dict.fromkeys(measures, 1.0)})
    change_record(run / "result.json", key, value=value)
    refuse("train.py", ("--dataset", "digits", "--name", "mine"), str(run / "result.json"))


@pytest.mark.parametrize("value", ["high", [], None, 10**400])
@pytest.mark.parametrize("key", ["test_accuracy", "elapsed_s", "config", "num_test_images"])
def test_a_wrong_result_spoils_no_table_of_runs(place: Path, key: str, value: Any) -> None:
    """The page of a search reads every run there is; one that was tampered with counts as far as it is sound."""
    for name in ("sound", "tampered"):
        result = {"config": TrainConfig().to_dict(), "test_accuracy": 70.0, "elapsed_s": 9.0, "num_test_images": 5}
        write_json(place / "outputs" / "runs" / name / "result.json", result)
    change_record(place / "outputs" / "runs" / "tampered" / "result.json", key, value=value)
    runs = load_runs(place / "outputs").set_index("run")
    assert (runs["test_accuracy"]["sound"], runs["elapsed_s"]["sound"]) == (70, 9)
    assert ("tampered" in runs.index) == (key != "config")
    assert not (runs["test_accuracy"] > 100).any()


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda s: st.lists(s, max_size=3)))
@EXAMPLES
def test_whatever_is_in_a_json_file_is_an_object_or_told(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"record\.json"):
        read_json(path)


# ---------------------------------------------------------------- search spaces as TOML

NO_SPACES: dict[str, tuple[bytes, str]] = {
    "cut": (b"[alpha]\nlow = 0\nhig", "is not valid TOML"),
    "json": (b'{"alpha": {"low": 0, "high": 1}}', "is not valid TOML"),
    "zeros": (bytes(100), "is not valid TOML"),
    "latin-1": ("# é\n[alpha]\nlow = 0\nhigh = 1".encode("latin-1"), "is not valid TOML"),
    "utf-16": ("[alpha]\nlow = 0\nhigh = 1".encode("utf-16"), "is not valid TOML"),
    "nested without end": (b"alpha = " + b"[" * 100_000, "is not valid TOML"),
    "table twice": (b"[alpha]\nlow = 0\nhigh = 1\n[alpha]\n", "is not valid TOML"),
    "a list": (b"alpha = [0, 1]", "the range of alpha needs low and high"),
    "tables in a list": (b"[[alpha]]\nlow = 0\nhigh = 1", "the range of alpha needs low and high"),
    "a number": (b"alpha = 1", "the range of alpha needs low and high"),
    "no high": (b"[alpha]\nlow = 0", "the range of alpha needs low and high"),
    "a step": (b"[alpha]\nlow = 0\nhigh = 1\nstep = 0.1", "nothing else"),
    "not searchable": (b"[epochs]\nlow = 1\nhigh = 5", "names 'epochs'"),
    "capitals": (b"[Alpha]\nlow = 0\nhigh = 1", "names 'Alpha'"),
    "no name": (b"['']\nlow = 0\nhigh = 1", "names ''"),
    "text": (b"[alpha]\nlow = '0'\nhigh = 1", "finite numbers"),
    "date": (b"[alpha]\nlow = 2020-01-01\nhigh = 1", "finite numbers"),
    "true": (b"[alpha]\nlow = false\nhigh = true", "finite numbers"),
    "nan": (b"[alpha]\nlow = nan\nhigh = 1", "finite numbers"),
    "inf": (b"[temperature]\nlow = 1\nhigh = inf", "finite numbers"),
    "beyond a float": (b"[temperature]\nlow = 1\nhigh = " + b"9" * 400, "finite numbers"),
    "log is text": (b"[beta]\nlow = 1e-8\nhigh = 1\nlog = 'true'", "log of beta must be true or false"),
    "log is 1": (b"[beta]\nlow = 1e-8\nhigh = 1\nlog = 1", "log of beta must be true or false"),
    "log from 0": (b"[beta]\nlow = 0\nhigh = 1\nlog = true", "above 0 on a logarithmic range"),
    "backwards": (b"[alpha]\nlow = 0.9\nhigh = 0.1", "low of alpha must be below high"),
    "one value": (b"[alpha]\nlow = 0.5\nhigh = 0.5", "low of alpha must be below high"),
    "alpha above 1": (b"[alpha]\nlow = 0\nhigh = 1.5", "alpha must lie between 0 and 1"),
    "lr of 0": (b"[lr]\nlow = 0\nhigh = 1", "lr must be a finite number above 0"),
    "weight_decay below 0": (b"[weight_decay]\nlow = -1\nhigh = 1", "weight_decay must be"),
}


@pytest.mark.parametrize("name", NO_SPACES)
def test_a_wrong_space_is_told(place: Path, refuse: Refuse, name: str) -> None:
    content, words = NO_SPACES[name]
    (place / "space.toml").write_bytes(content)
    refuse("tune.py", ("--dataset", "digits", "--space", "space.toml"), str(place / "space.toml"), words)


GOOD_SPACE = "[alpha]\nlow = 0.0\nhigh = 0.5\n\n[lr]\nlow = 0.01\nhigh = 0.5\nlog = true\n"


@given(st.integers(0, len(GOOD_SPACE)), st.integers(0, 8), st.text(max_size=8) | st.sampled_from("[]=.\"'\n-e0"))
@EXAMPLES
def test_a_space_changed_anywhere_is_a_space_or_told(tmp_path: Path, start: int, length: int, put_in: str) -> None:
    path = tmp_path / "space.toml"
    path.write_text(GOOD_SPACE[:start] + put_in + GOOD_SPACE[start + length :], encoding="utf-8")
    for name, bounds in (read_or_told(read_space, path) or {}).items():
        assert bounds.low < bounds.high
        for end in bounds[:2]:
            TrainConfig.from_dict({name: end})


# ---------------------------------------------------------------- tables of trials, and their epochs


def with_cell(column: str, value: str) -> Callable[[str], bytes]:
    """The table with one cell of its first trial changed."""

    def change(text: str) -> bytes:
        header, first, *rest = list(csv.reader(io.StringIO(text)))
        first[header.index(column)] = value
        out = io.StringIO()
        csv.writer(out).writerows([header, first, *rest])
        return out.getvalue().encode()

    return change


WRONG_TRIALS: dict[str, Callable[[str], bytes]] = {
    "empty": lambda text: b"",
    "a blank line": lambda text: b"\n",
    "binary": lambda text: bytes(range(256)) * 20,
    "zeros": lambda text: bytes(1000),
    "utf-16": lambda text: text.encode("utf-16"),
    "latin-1": lambda text: text.replace("completed", "complété").encode("latin-1"),
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "semicolons": lambda text: text.replace(",", ";").encode(),
    "no header": lambda text: text.split("\n", 1)[1].encode(),
    "no seconds": lambda text: text.replace("seconds", "hours", 1).encode(),
    "no metric": lambda text: text.replace("val_accuracy,", "accuracy,", 1).encode(),
    "a column twice": lambda text: text.replace("val_nll", "val_ece", 1).encode(),
    "cut": lambda text: text[: len(text) // 2].encode(),
    "an open quote": lambda text: (text + '"').encode(),
    "a cell too many": lambda text: text.replace("\n", ",\n").replace(",\n", "\n", 1).encode(),
    "a cell without end": lambda text: text.replace("sampled", "s" * 200_000, 1).encode(),
    "json": lambda text: json.dumps({"trials": []}).encode(),
    "a trial twice": lambda text: (text + text.splitlines()[1] + "\n").encode(),
    "status unknown": with_cell("status", "lost"),
    "role unknown": with_cell("role", "king"),
    "trial_id is a path": with_cell("trial_id", "../../file"),
    "trial_id is empty": with_cell("trial_id", ""),
    "epochs_done is text": with_cell("epochs_done", "six"),
    "epochs_done is a fraction": with_cell("epochs_done", "6.5"),
    "epochs_done is negative": with_cell("epochs_done", "-1"),
    "epochs_done is beyond all": with_cell("epochs_done", "9" * 30),
    "seed is text": with_cell("seed", "zero"),
    "seed is beyond all": with_cell("seed", "9" * 30),
    "alpha is text": with_cell("alpha", "much"),
    "alpha is 7": with_cell("alpha", "7"),
    "val_accuracy is text": with_cell("val_accuracy", "high"),
    "val_accuracy is 200": with_cell("val_accuracy", "200"),
    "seconds is text": with_cell("seconds", "long"),
}


@pytest.mark.parametrize("name", WRONG_TRIALS)
@pytest.mark.parametrize("program", ["best.py", "report.py", "retrain.py"])
def test_a_wrong_table_of_trials_is_told(place: Path, refuse: Refuse, program: str, name: str) -> None:
    path = place / DONE / "trials.csv"
    path.write_bytes(WRONG_TRIALS[name](path.read_text()))
    refuse(program, ("done",), "trials.csv")


@pytest.mark.parametrize("program", ["best.py", "report.py", "retrain.py"])
def test_a_table_of_trials_that_is_missing_or_a_folder_is_told(place: Path, refuse: Refuse, program: str) -> None:
    path = place / DONE / "trials.csv"
    path.unlink()
    refuse(program, ("done",), str(path))
    path.mkdir()
    refuse(program, ("done",), str(path))


TORN_LINES = [
    "",
    "{",
    "null",
    "[1]",
    "5",
    "\0\0\0",
    "[" * 100_000,
    '{"epoch": null}',
    '{"epoch": "2"}',
    '{"epoch": 1.5}',
    '{"epoch": true}',
    '{"epoch": -1}',
    '{"epoch": ' + "9" * 30 + "}",
    '{"loss": 1}',
]


@pytest.mark.parametrize("line", TORN_LINES, ids=lambda line: line[:20])
def test_a_damaged_line_of_epochs_is_passed_over(place: Path, line: str) -> None:
    """As a process may die while writing: such a line is no fault of the user's, and the others are sound."""
    change = with_cell("status", "running")
    path = place / DONE / "trials.csv"
    path.write_bytes(change(path.read_text()))
    (trial_id, *_) = load_trials(place / DONE)["trial_id"]
    metrics = place / DONE / "trials" / trial_id / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    good = '{"epoch": 7, "val_accuracy": 50, "elapsed_s": 3}\n'
    metrics.write_text(f"{line}\n{good}", encoding="utf-8")
    trial = load_trials(place / DONE).iloc[0]
    assert (trial["epochs_done"], trial["val_accuracy"]) == (7, 50)
    assert load_curves(place / DONE)["epoch"].tolist() == [7]


@pytest.mark.parametrize("value", ["null", '"high"', "[]", "{}", "NaN", "9" * 400])
def test_a_measure_that_is_no_number_is_not_known(place: Path, value: str) -> None:
    metrics = place / DONE / "trials" / "0001" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text(f'{{"epoch": 1, "val_accuracy": {value}}}\n')
    assert load_curves(place / DONE)["val_accuracy"].isna().tolist() == [True]


@given(st.binary(max_size=60))
@EXAMPLES
def test_whatever_is_in_a_file_of_epochs_the_records_are_objects(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content + b'\n{"epoch": 1}\n')
    records = read_json_lines(tmp_path / "metrics.jsonl")
    assert records[-1] == {"epoch": 1}
    assert all(isinstance(record, dict) for record in records)


@pytest.mark.parametrize("program", ["best.py", "report.py"])
def test_epochs_in_a_folder_are_told(place: Path, refuse: Refuse, program: str) -> None:
    path = place / DONE / "trials.csv"
    path.write_bytes(with_cell("status", "running")(path.read_text()))
    trial_id = path.read_text().splitlines()[1].split(",")[0]
    (place / DONE / "trials" / trial_id / "metrics.jsonl").mkdir(parents=True)
    refuse(program, ("done",), "metrics.jsonl")


# ---------------------------------------------------------------- from a shell


def give_code(place: Path) -> None:
    write_signed(place / "checkpoint.pt", archive_of({"model": Code()}))


def give_large_image(place: Path) -> None:
    pyarrow.parquet.write_table(TABLES["image of 100 million pixels"][0], place / "images" / "train.parquet")


def give_binary_table(place: Path) -> None:
    (place / DONE / "trials.csv").write_bytes(bytes(range(256)) * 20)


@pytest.mark.parametrize(
    ("script", "arguments", "give", "words"),
    [
        ("byot/evaluate.py", ("checkpoint.pt",), give_code, "checkpoint.pt holds other than plain data"),
        ("byot/train.py", DATA, give_large_image, "train.parquet: row 0 is 10000x10000 pixels, not 32x32"),
        ("analysis/report.py", ("done",), give_binary_table, "trials.csv cannot be read"),
    ],
    ids=["code", "large image", "binary table"],
)
def test_hostile_files_from_a_shell(
    place: Path, script: str, arguments: tuple[Any, ...], give: Callable[[Path], None], words: str
) -> None:
    """In processes of their own, where warnings are printed and are no errors: none must be."""
    give(place)
    before = picture_of(place)
    done = run_command(arguments, cwd=place, script=script, BYOT_OUTPUTS=str(place / "outputs"))
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_sentence(done.stderr, f"{Path(script).name}: ", words)
    assert picture_of(place) == before, "nothing was run, nothing was written"


def test_a_run_with_damaged_checkpoints_alone_from_a_shell(place: Path) -> None:
    """Each one that is passed over is told in a line too."""
    for epoch in (1, 2):
        path = place / "folder" / "checkpoints" / f"epoch-000{epoch}.pt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"damaged")
    done = run_command(("folder",), cwd=place, script="byot/evaluate.py")
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert [line.startswith("evaluate.py: ") for line in lines] == [True] * 3, done.stderr
    assert ["epoch-0002.pt" in lines[0], "epoch-0001.pt" in lines[1]] == [True, True]
    assert lines[2].endswith("holds no checkpoint that can be read")
