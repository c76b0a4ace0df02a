"""Damages files and makes hostile ones: each is one sentence that names the file, none runs code, nothing is written.

READERS has, by what a file is to a program, the file and the commands that read it; DAMAGES has what is done to it and
a part of the sentence. What each reader checks value by value is in the tests of its own room. In the current folder
lies what tests/faults/place.py puts there.
"""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.trials import load_curves, load_runs, load_trials
from byot.config import TrainConfig
from byot.data import load_images
from byot.system import checkpoint
from byot.system.checkpoint import load_checkpoint
from byot.system.files import read_json, read_json_lines, write_json
from search.space import read_space
from tests.helpers import encode_png, random_pixels, run_command, write_parquet

pytest_plugins = ["tests.faults.place"]

Damage = Callable[[bytes], bytes | None]  # from what is in a file to what shall be there; None: a folder in its place

DONE = "outputs/searches/done"
DATA = ("--data-dir", "images", "--width", 1, "--epochs", 1, "--device", "cpu")
ANALYSIS = [(program, ("done",)) for program in ("best.py", "report.py", "retrain.py")]
TUNE = [("tune.py", ("--resume", "--name", "done"))]
START_MINE = [("train.py", ("--dataset", "digits", "--name", "mine"))]
LOAD = [("evaluate.py", ("checkpoint.pt", "--device", "cpu")), ("train.py", ("--resume", "checkpoint.pt"))]
READERS: dict[str, tuple[str, list[tuple[str, tuple[Any, ...]]]]] = {
    "checkpoint": ("checkpoint.pt", LOAD),
    "images": ("images/train.parquet", [("train.py", DATA), ("tune.py", (*DATA, "--val-fraction", 0.5))]),
    "test images": ("images/test.parquet", [("train.py", DATA)]),
    "space": ("space.toml", [("tune.py", ("--dataset", "digits", "--space", "space.toml"))]),
    "best": (f"{DONE}/best.json", [("train.py", ("--best", "done"))]),
    "search": (f"{DONE}/search.json", [*ANALYSIS, *TUNE]),
    "trials": (f"{DONE}/trials.csv", ANALYSIS),
    "config": ("outputs/runs/mine/config.json", START_MINE),
    "result": ("outputs/runs/mine/result.json", START_MINE),
}


class Code:
    """Unpickling this makes a file called `sprung` in the current folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch sprung",)


# ---------------------------------------------------------------- what is done to a file
def put(content: bytes | None) -> Damage:
    return lambda _: content


def replace(old: str, new: str) -> Damage:
    def damage(content: bytes) -> bytes:
        assert old.encode() in content
        return content.replace(old.encode(), new.encode(), 1)

    return damage


def archive_of(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def sign(archive: bytes) -> bytes:
    """The archive as a checkpoint whose checksum is right."""
    archive = archive.removesuffix(checkpoint.NO_COMMENT) + checkpoint.NO_COMMENT
    return archive[:-2] + checkpoint._comment(archive)


def archive_without_state() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/readme", b"no state here")
    return buffer.getvalue()


def edit_state(change: Callable[[dict[str, Any]], object]) -> Damage:
    """A checkpoint whose checksum is right and whose state is not that of a run."""

    def damage(content: bytes) -> bytes:
        state = torch.load(io.BytesIO(content), weights_only=True)
        change(state)
        return sign(archive_of(state))

    return damage


def edit_json(value: Any, *keys: str) -> Damage:
    """Set a value deep in a record; `...` removes it."""

    def damage(content: bytes) -> bytes:
        record = inner = json.loads(content)
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        if value is ...:
            del inner[keys[-1]]
        return json.dumps(record).encode()

    return damage


PNG = encode_png(random_pixels(1)[0])
CELL = {"bytes": PNG, "path": "a.png"}


def put_table(cells: Any, labels: Any, column: str = "fine_label") -> Damage:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"img": cells, column: labels}), buffer)
    return put(buffer.getvalue())


def put_image(image: bytes) -> Damage:
    return put_table([{"bytes": image, "path": "a.png"}], [1])


def columns_twice() -> bytes:
    buffer = io.BytesIO()
    table = pyarrow.Table.from_arrays([[CELL], [CELL], [1]], ["img", "img", "fine_label"])
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def paths_that_are_no_text() -> Any:
    paths = pyarrow.array([b"\xff"] * 2).view("string")
    return pyarrow.StructArray.from_arrays([pyarrow.array([PNG] * 2), paths], ["bytes", "path"])


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size."""
    header = b"IHDR" + struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    return PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]


def png_with_text_bomb() -> bytes:
    chunk = b"zTXt" + b"a\0\0" + zlib.compress(bytes(100_000_000), 9)
    return PNG[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + PNG[33:]


# ---------------------------------------------------------------- the table

EVERYWHERE: dict[str, tuple[Damage, str]] = {
    "cut": (lambda content: content[: len(content) // 2], ""),
    "zeros": (put(bytes(1000)), ""),
    "binary": (put(bytes(range(256)) * 20), ""),
}
A_FOLDER: dict[str, tuple[Damage, str]] = {"a folder": (put(None), "")}
NO_OBJECT: dict[str, tuple[Damage, str]] = {
    "empty": (put(b""), "is not valid JSON"),
    "list": (put(b"[]"), "does not hold a JSON object"),
    "latin-1": (put('{"name": "é"}'.encode("latin-1")), "is not valid JSON"),
    "nested without end": (put(b'{"a":' * 200_000), "is not valid JSON"),
    "a number without end": (put(b'{"a": ' + b"9" * 100_000 + b"}"), "is not valid JSON"),
}
PROGRAM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nquit\n%%EOF\n"
DAMAGES: dict[str, dict[str, tuple[Damage, str]]] = {
    "checkpoint": A_FOLDER
    | {
        "one byte more": (lambda content: content + b"\0", "is damaged"),
        "pickle with code": (put(pickle.dumps(Code())), "is damaged"),
        "signed pickle with code": (put(sign(pickle.dumps(Code()))), "is not loaded"),
        "signed archive with code": (put(sign(archive_of({"model": Code()}))), "is not loaded"),
        "signed archive without state": (put(sign(archive_without_state())), "is not loaded"),
        "a whole network": (put(sign(archive_of(torch.nn.Linear(2, 2)))), "is not loaded"),
        "an unknown setting": (edit_state(lambda state: state["config"].update(gamma=1)), "unknown setting gamma"),
        "another network": (edit_state(lambda state: state["config"].update(model="resnet34")), ""),
        "no weights": (edit_state(lambda state: state.pop("model")), ""),
    },
    "images": A_FOLDER
    | {
        "columns twice": (put(columns_twice()), "has a column twice"),
        "image nested once more": (put_table([{"bytes": CELL}], [1]), "row 0 of column 'img' has no bytes"),
        "path is not text": (put_table(paths_that_are_no_text(), [1, 2]), "cannot be read as parquet"),
        "image of no pixels": (put_image(png_of_size(0, 0)), "row 0"),
        "image of 100 million pixels": (put_image(png_of_size(10_000, 10_000)), "row 0 is 10000x10000 pixels"),
        "image of all pixels": (put_image(png_of_size(2**31 - 1, 2**31 - 1)), "row 0"),
        "image with a text bomb": (put_image(png_with_text_bomb()), "row 0 of column 'img' is not an image"),
        "image that is a program": (put_image(PROGRAM), "row 0 of column 'img' is not an image"),
        "a second image of text": (put_table([CELL, {"bytes": b"text", "path": ""}], [1, 2]), "row 1 of column 'img'"),
        "no rows": (put_table(pyarrow.array([CELL])[:0], pyarrow.array([1])[:0]), "has no rows"),
        "another data set": (put_table([CELL], [1], "label"), "is of cifar10: give --dataset cifar10"),
        "label below 0": (put_table([CELL, CELL], [1, -1]), "labels run from -1 to 1, but cifar100 has the classes"),
        "label with a fraction": (put_table([CELL], [1.5]), "'fine_label' must hold whole numbers only"),
        "label beyond all": (put_table([CELL], pyarrow.array([2**64 - 1], "uint64")), "has the classes 0 to 99"),
        "label in a list": (put_table([CELL], [[1]]), "'fine_label' must hold whole numbers only"),
    },
    "test images": A_FOLDER,
    "space": A_FOLDER
    | {
        "utf-16": (put("[alpha]\nlow = 0\nhigh = 1".encode("utf-16")), "is not valid TOML"),
        "nested without end": (put(b"alpha = " + b"[" * 100_000), "is not valid TOML"),
        "no name": (put(b"['']\nlow = 0\nhigh = 1"), "names ''"),
        "a date": (replace("0.0", "2020-01-01"), "low must be a"),
        "beyond a float": (replace("0.5", "9" * 400), "high must be a"),
    },
    "best": NO_OBJECT
    | {
        "no settings": (edit_json(..., "config"), "the settings must be a table"),
        "lr beyond all": (edit_json(10**400, "config", "lr"), "lr must be"),
    },
    "search": NO_OBJECT
    | {
        "no settings": (edit_json(..., "config"), ""),
        "model in a list": (edit_json(["resnet18"], "config", "model"), "model must be one of"),
        "no space": (edit_json(..., "space"), "a search space must be tables"),
        "a range of nan": (edit_json(float("nan"), "space", "alpha", "low"), "the range of alpha"),
        "no name": (edit_json(..., "name"), "name must be"),
        "an unknown metric": (edit_json("val_f1", "metric"), "metric must be a measure"),
        "a count that is text": (edit_json("many", "num_val_images"), "num_val_images must be"),
    },
    "trials": A_FOLDER
    | {
        "empty": (put(b""), "is no table of trials"),
        "no header": (lambda content: content.split(b"\n", 1)[1], "is no table of trials"),
        "a cell without end": (replace("control", "c" * 200_000), "cannot be read"),
        "a trial twice": (lambda content: content + content.splitlines()[1] + b"\n", "a second time"),
        "an unknown status": (replace("completed", "lost"), "status must be one of"),
        "an unknown role": (replace("control", "chosen"), "row 2: role must be one of sampled, reference, control"),
        "a count below 0": (replace("completed,6", "completed,-1"), "row 2: epochs_done must be a count, not -1"),
        "an alpha of 7": (replace("6,0.0,3.0", "6,7,3.0"), "row 2: alpha must lie between 0 and 1, not 7"),
        "an accuracy of 200": (replace("22.52", "200"), "row 2: val_accuracy_1 must lie between 0 and 100, not 200"),
        "no number": (replace("1225.793273227", "nan"), "row 2: seconds must be a number, not None"),
        "a seed beyond all": (replace("3273227,0", "3273227," + "9" * 30), "row 2: seed must be a count"),
        "a trial id that is a path": (replace("170572c2", "../../file"), "a name is made of"),
        "a number beyond all": (replace("completed,6", "completed," + "9" * 30), "epochs_done must be"),
    },
    "config": NO_OBJECT | {"unknown": (edit_json(1, "gamma"), "unknown setting gamma")},
    "result": NO_OBJECT | {"no accuracy": (edit_json(..., "test_accuracy_1"), "no number as test_accuracy_1")},
}
CASES = [(kind, name) for kind, damages in DAMAGES.items() for name in EVERYWHERE | damages]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_damaged_file_is_told(place, refuse, kind, name):
    file, readers = READERS[kind]
    damage, words = (EVERYWHERE | DAMAGES[kind])[name]
    content = damage((place / file).read_bytes())
    (place / file).unlink()
    if content is None:
        (place / file).mkdir()
    else:
        (place / file).write_bytes(content)
    for program, arguments in readers:
        refuse(program, arguments, str(place / file), words)
    assert not (place / "sprung").exists()


def test_the_traps_spring_without_protection(place):
    torch.load(io.BytesIO(sign(archive_of({"model": Code()}))), weights_only=False)
    assert (place / "sprung").exists()


STATE = {"epoch": 3, "model": {"w": torch.arange(10.0)}, "config": {"lr": 0.1, "name": "x"}}
EPOCHS = b'{"epoch": 1, "loss": 2}\n' * 3
CHANGED_ANYWHERE: dict[str, tuple[Callable[[Path], Any], str | bytes]] = {
    "epoch-0001.pt": (load_checkpoint, archive_of(STATE)),
    "train.parquet": (lambda path: load_images("cifar100", str(path.parent), "train"), "images/train.parquet"),
    "space.toml": (read_space, "space.toml"),
    "search.json": (read_json, f"{DONE}/search.json"),
    "trials.csv": (load_trials, f"{DONE}/trials.csv"),
    "metrics.jsonl": (read_json_lines, EPOCHS),
}


@pytest.mark.parametrize("name", CHANGED_ANYWHERE)
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_a_file_changed_anywhere_is_read_or_told(place, name, data):
    """Bytes are cut out, put in or changed; the checksum of a checkpoint is right all the same."""
    read, source = CHANGED_ANYWHERE[name]
    whole = source if isinstance(source, bytes) else (place / source).read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 40)) | st.just(len(whole)))
    changed = whole[:start] + data.draw(st.binary(max_size=40)) + whole[end:]
    path = place / "folder" / name
    path.write_bytes(sign(changed) if name.endswith(".pt") else changed)
    try:
        read(path)
    except ValueError as error:
        told = str(error)
    else:
        return
    assert str(path) in told
    assert "\n" not in told


# ---------------------------------------------------------------- images
def test_a_second_file_and_a_link_to_nothing_are_told(place, refuse):
    write_parquet(place / "images" / "train-2.parquet", labels=[0, 1, 2, 200])
    refuse("train.py", DATA, "train-2.parquet", "labels run from 0 to 200")
    (place / "images" / "train-2.parquet").unlink()
    (place / "images" / "train-2.parquet").symlink_to("nowhere")
    refuse("train.py", DATA, "train-2.parquet", "cannot be read as parquet")


ARCHIVE = {"cifar100": "cifar-100-python", "cifar10": "cifar-10-batches-py"}
BATCHES = ("train", "test", "meta", *(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")


@pytest.mark.parametrize("dataset", ARCHIVE)
def test_an_archive_that_is_not_the_published_one_is_not_opened(place, refuse, dataset):
    """Its files are pickles: they are checked before they are read."""
    (place / "folder" / ARCHIVE[dataset]).mkdir()
    for name in BATCHES:
        (place / "folder" / ARCHIVE[dataset] / name).write_bytes(pickle.dumps(Code()))
    arguments = ("--dataset", dataset, "--data-dir", "folder", "--width", 1, "--epochs", 1, "--device", "cpu")
    for program in ("train.py", "tune.py"):
        refuse(program, arguments, str(place / "folder"), "incomplete or damaged")
    assert not (place / "sprung").exists()


@pytest.mark.parametrize("dataset", ARCHIVE)
def test_a_packed_archive_that_is_not_the_published_one_is_not_unpacked(place, refuse, dataset):
    """torchvision downloads over it; there is no network here."""
    (place / "data").mkdir()
    with tarfile.open(place / "data" / f"{ARCHIVE[dataset].removesuffix('-batches-py')}.tar.gz", "w:gz") as archive:
        archive.add(place / "file", "../escaped")
        archive.add(place / "file", f"{ARCHIVE[dataset]}/train")
    refuse("train.py", ("--dataset", dataset, "--width", 1), str(place / "data"), "could not be downloaded")
    assert not (place / "escaped").exists()


# ---------------------------------------------------------------- what is passed over
@pytest.mark.parametrize("value", ["high", [], 10**400])
@pytest.mark.parametrize("key", ["test_accuracy", "elapsed_s", "config"])
def test_a_wrong_result_spoils_no_table_of_runs(place, key, value):
    """The page of a search reads every run there is; one that was tampered with counts as far as it is sound."""
    result = {"config": TrainConfig().to_dict(), "test_accuracy": 70.0, "elapsed_s": 9.0, "num_test_images": 5}
    write_json(place / "outputs/runs/sound/result.json", result)
    write_json(place / "outputs/runs/tampered/result.json", result | {key: value})
    runs = load_runs(place / "outputs").set_index("run")
    assert (runs["test_accuracy"]["sound"], runs["elapsed_s"]["sound"]) == (70, 9)
    assert ("tampered" in runs.index) == (key != "config")
    assert not (runs["test_accuracy"] > 100).any()


@pytest.mark.parametrize("line", ["", "{", "[1]", "\0\0\0", "[" * 100_000, '{"epoch": 1.5}', '{"epoch": -1}'])
def test_a_damaged_line_of_epochs_is_passed_over(place, line):
    """As a process may die while writing: such a line is no fault of the user's, and the others are sound."""
    table = place / DONE / "trials.csv"
    table.write_text(table.read_text().replace("completed", "running", 1))
    metrics = place / DONE / "trials" / "170572c2" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text(f'{line}\n{{"epoch": 7, "val_accuracy": 50, "elapsed_s": 3, "val_nll": "high"}}\n')
    trial = load_trials(place / DONE).iloc[0]
    assert (trial["epochs_done"], trial["val_accuracy"]) == (7, 50)
    curves = load_curves(place / DONE)
    assert curves["epoch"].tolist() == [7]
    assert curves["val_nll"].isna().tolist() == [True]


# ---------------------------------------------------------------- from a shell
def test_a_run_with_damaged_checkpoints_alone_from_a_shell(place):
    """Each one that is passed over is told in a line too."""
    (place / "folder" / "checkpoints").mkdir()
    for epoch in (1, 2):
        (place / "folder" / "checkpoints" / f"epoch-000{epoch}.pt").write_bytes(b"damaged")
    done = run_command(("folder",), cwd=place, script="byot/evaluate.py", code=2)
    assert done.stdout == ""
    newer, older, sentence = done.stderr.splitlines()
    assert all(line.startswith("evaluate.py: ") for line in (newer, older, sentence)), done.stderr
    assert ("epoch-0002.pt" in newer, "epoch-0001.pt" in older) == (True, True)
    assert sentence.endswith("holds no checkpoint that can be read")
