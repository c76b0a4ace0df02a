"""Holds byot/decoded.py to what was decoded: kept whole, shared, never another data set's, never damaged."""

from pathlib import Path

import numpy as np
import pytest

from byot import data
from byot.data import LabelledImages, Split, load_images
from byot.decoded import digest_of, read_decoded
from tests.helpers import ParquetMaker, write_parquet

SPLITS: tuple[Split, ...] = ("train", "test")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BYOT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(data, "_load_parquet", decode)


def same(a: LabelledImages, b: LabelledImages) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_second_time_nothing_is_decoded(
    cache: Path, parquet_folder: ParquetMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(parquet_folder(12, 6))
    first = {split: load_images("cifar100", folder, split) for split in SPLITS}
    assert [len(images.labels) for images in first.values()] == [12, 6]
    assert len(list(cache.iterdir())) == 2
    forbid_decoding(monkeypatch)
    for split, expected in first.items():
        found = load_images("cifar100", folder, split)
        assert same(found, expected)
        assert not found.images.flags.writeable
    assert not found.images.flags.owndata, "mapped, not copied"


def test_other_files_are_other_data(cache: Path, parquet_folder: ParquetMaker) -> None:
    folder = parquet_folder(12, 6)
    before = load_images("cifar100", str(folder), "train")
    (file,) = folder.glob("train*")
    write_parquet(file, 9, dataset="cifar100")
    assert len(load_images("cifar100", str(folder), "train").labels) == 9
    write_parquet(file, 12, dataset="cifar100")
    assert same(load_images("cifar100", str(folder), "train"), before)
    moved = folder.rename(folder.with_name("moved"))
    assert len(list(cache.iterdir())) == 2
    assert same(load_images("cifar100", str(moved), "train"), before)
    assert len(list(cache.iterdir())) == 2, "the place of the files does not matter"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "folder", "longer"])
def test_a_damaged_file_is_made_again(cache: Path, parquet_folder: ParquetMaker, damage: str) -> None:
    folder = str(parquet_folder(12, 6))
    expected = load_images("cifar100", folder, "train")
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    else:
        flipped = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
        file.write_bytes({"cut": whole[:-9], "flipped": flipped, "empty": b"", "longer": whole * 2}[damage])
    assert read_decoded(file, 32) is None
    assert same(load_images("cifar100", folder, "train"), expected)
    assert damage == "folder" or read_decoded(file, 32) is not None


def test_without_a_place_to_keep_it_everything_goes_on(
    parquet_folder: ParquetMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BYOT_CACHE", str(tmp_path / "file" / "cache"))
    assert len(load_images("cifar100", str(parquet_folder(12, 6)), "train").labels) == 12


def test_what_is_no_file_is_not_hashed() -> None:
    assert digest_of([Path("/dev/zero")]) is None
    assert digest_of([]) is None
    assert digest_of([Path("/nowhere")]) is None
