"""Holds byot/data.py to what its files hold, its splits to their labels, its cache to what was decoded, and every bad
file to one helpful sentence."""

import socket
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from byot import data
from byot.config import TrainConfig
from byot.data import (
    LabelledImages,
    Split,
    check_dataset,
    find_normalisation,
    load_images,
    read_cached,
    split_validation,
    stratified_split,
)
from tests.helpers import ParquetMaker, encode_png, picture_of, random_pixels, write_parquet

SPLITS: tuple[Split, ...] = ("train", "test")


def load_train(folder: Path) -> LabelledImages:
    return load_images("cifar100", str(folder), "train")


def same(a: LabelledImages, b: LabelledImages) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def assert_sentence(error: BaseException, folder: Path, words: str = "") -> None:
    message = str(error)
    assert "\n" not in message
    assert str(folder) in message
    assert words in message


# ---------------------------------------------------------------- splits and normalisation


def uneven_labels() -> np.ndarray:
    return np.random.default_rng(0).permutation(np.repeat(np.arange(7), [100, 50, 10, 200, 33, 4, 60]))


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_split_is_disjoint_complete_and_stratified(fraction: float) -> None:
    labels = uneven_labels()
    rest, held_out = stratified_split(labels, fraction=fraction, seed=0)
    assert sorted([*rest, *held_out]) == list(range(len(labels)))
    assert list(rest) == sorted(rest)
    assert list(held_out) == sorted(held_out)
    for label in range(7):
        members = int((labels == label).sum())
        assert abs(int((labels[held_out] == label).sum()) - members * fraction) <= 0.5


def test_split_depends_on_labels_fraction_and_seed_alone() -> None:
    labels = uneven_labels()
    first = stratified_split(labels, fraction=0.2, seed=0)
    np.random.seed(99)
    torch.manual_seed(99)
    state = np.random.get_state(legacy=False)["state"]["key"].copy()
    again = stratified_split(labels.copy(), fraction=0.2, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], state), "the global generator moved"
    assert not np.array_equal(first[1], stratified_split(labels, fraction=0.2, seed=1)[1])


def test_split_validation_cuts_images_with_their_labels() -> None:
    labels = uneven_labels()
    pixels = np.repeat(np.arange(len(labels), dtype=np.uint32), 12).view(np.uint8).reshape(len(labels), 4, 4, 3)
    whole = LabelledImages(pixels, labels)
    seen = []
    for part in split_validation(whole, fraction=0.25, seed=1):
        assert part is not None
        numbers = part.images.reshape(len(part.labels), -1).copy().view(np.uint32)[:, 0]
        assert np.array_equal(labels[numbers], part.labels)
        seen += numbers.tolist()
    assert sorted(seen) == list(range(len(labels)))
    assert split_validation(whole, fraction=0, seed=0) == (whole, None)
    few = LabelledImages(random_pixels(20, 8), np.arange(20) % 10)
    with pytest.raises(ValueError, match=r"val_fraction 0\.1 of 20 images holds out none"):
        split_validation(few, fraction=0.1, seed=0)


@pytest.mark.parametrize(
    ("config", "is_fixed"),
    [
        (TrainConfig(recipe="reference"), True),
        (TrainConfig(recipe="modern"), False),
        (TrainConfig(recipe="reference", dataset="digits"), False),
    ],
)
def test_normalisation_is_the_references_or_numpys(config: TrainConfig, is_fixed: bool) -> None:
    pixels = (random_pixels(100) ** np.array([1.0, 0.9, 0.7])).astype(np.uint8)
    mean, std = (pixels / 255).mean(axis=(0, 1, 2)), (pixels / 255).std(axis=(0, 1, 2))
    if is_fixed:
        mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    found = find_normalisation(config, pixels)
    assert found.mean == pytest.approx(mean, rel=1e-10)
    assert found.std == pytest.approx(std, rel=1e-10)


# ---------------------------------------------------------------- data sets


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    parts = [load_images("digits", None, split) for split in SPLITS]
    bunch = load_digits()
    for images, _ in parts:
        assert images.shape[1:] == (8, 8, 3)
        assert images.dtype == np.uint8
        assert (images == images[..., :1]).all()

    def as_rows(levels: np.ndarray, labels: np.ndarray) -> Counter[bytes]:
        rows = np.concatenate([levels.reshape(len(labels), -1), labels[:, None]], axis=1)
        return Counter(row.astype(np.int64).tobytes() for row in rows)

    train, test = (as_rows(np.rint(images[..., 0] * (16 / 255)), labels) for images, labels in parts)
    assert train + test == as_rows(bunch.images, bunch.target), "images lost, doubled or changed"
    for label in range(10):
        members = (bunch.target == label).sum()
        assert abs((parts[1].labels == label).sum() - members / 5) <= 0.5


def test_cifar100_is_whole(cifar100_dir: Path) -> None:
    """Its counts, its published mean and deviation, and the split of 45,000 and 5,000."""
    check_dataset("cifar100", str(cifar100_dir))
    train, test = (load_images("cifar100", str(cifar100_dir), split) for split in SPLITS)
    rest, val = split_validation(train, fraction=0.1, seed=0)
    assert val is not None
    for part, each in ((train, 500), (test, 100), (rest, 450), (val, 50)):
        assert part.images.shape == (100 * each, 32, 32, 3)
        assert part.images.dtype == np.uint8
        assert np.array_equal(np.bincount(part.labels), np.full(100, each))
    found = find_normalisation(TrainConfig(recipe="modern"), train.images)
    assert found.mean == pytest.approx((0.50708, 0.48655, 0.44092), abs=1e-5)
    assert found.std == pytest.approx((0.26733, 0.25644, 0.27615), abs=1e-5)


# ---------------------------------------------------------------- parquet


@pytest.mark.parametrize("dataset", ["cifar100", "cifar10"])
def test_parquet_images_come_out_as_they_went_in(tmp_path: Path, dataset: str) -> None:
    """From two files; a grey image is spread over three channels."""
    pixels = random_pixels(7)
    pixels[2] = pixels[2, ..., :1]
    encoded = [encode_png(image) for image in pixels]
    encoded[2] = encode_png(pixels[2, ..., 0])
    labels = [3, 1, 4, 1, 5, 9, 2]
    for name, part in (("train-00000-of-00002.parquet", slice(0, 4)), ("train-00001-of-00002.parquet", slice(4, 7))):
        write_parquet(tmp_path / name, dataset=dataset, images=encoded[part], labels=labels[part])
    found = load_images(dataset, str(tmp_path), "train")
    assert same(found, LabelledImages(pixels, np.array(labels, dtype=np.int64)))


@pytest.mark.parametrize("subfolder", ["", "cifar100", "data", "plain_text"])
def test_parquet_is_found_where_the_hub_puts_it(tmp_path: Path, subfolder: str) -> None:
    for split in SPLITS:
        write_parquet(tmp_path / subfolder / f"{split}-00000-of-00001.parquet", 3)
    check_dataset("cifar100", str(tmp_path))
    assert len(load_images("cifar100", str(tmp_path), "test").labels) == 3


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"dataset": "cifar10"}, "lacks the column 'fine_label'; it has img, label"),
        ({"labels": [0, 1, -1, 2]}, "labels run from -1 to 2, but cifar100 has the classes 0 to 99"),
        ({"labels": ["cat", "dog", "cat", "dog"]}, "'fine_label' must hold whole numbers only"),
        ({"labels": [0.0, 1.5, 2.0, 3.0]}, "'fine_label' must hold whole numbers only"),
        ({"images": [encode_png(random_pixels(1, size=31)[0])]}, "row 0 is 31x31 pixels, not 32x32"),
        ({"images": [encode_png(random_pixels(1)[0]), b"not an image"]}, "row 1 of column 'img' is not an image"),
        ({"images": []}, "has no rows"),
    ],
)
def test_bad_files_are_told_in_one_sentence(tmp_path: Path, written: dict[str, Any], words: str) -> None:
    """More of them in tests/faults/test_hostile_files.py."""
    write_parquet(tmp_path / "train.parquet", **written)
    with pytest.raises(ValueError, match=r"train\.parquet") as caught:
        load_train(tmp_path)
    assert_sentence(caught.value, tmp_path, words)


def test_a_damaged_image_is_told_wherever_it_is_damaged(tmp_path: Path) -> None:
    """Pillow has many exceptions for a broken file; what it still decodes has the right shape."""
    whole = encode_png(np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8))
    told = 0
    for position in range(8, len(whole), 3):
        damaged = whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :]
        write_parquet(tmp_path / "train.parquet", images=[damaged])
        try:
            assert load_train(tmp_path).images.shape == (1, 32, 32, 3)
        except ValueError as error:
            told += 1
            assert_sentence(error, tmp_path, "row 0")
    assert told > len(whole) / 12


def test_a_missing_data_set_is_told(tmp_path: Path) -> None:
    for folder, words in (
        (tmp_path / "nowhere", "the data folder .* does not exist"),
        (tmp_path, r"has neither train\*\.parquet files nor the folder cifar-100-python"),
    ):
        for read in (load_train, lambda folder: check_dataset("cifar100", str(folder))):
            with pytest.raises(ValueError, match=words) as caught:
                read(folder)
            assert_sentence(caught.value, folder)


def test_a_missing_or_broken_test_set_is_told_before_training(parquet_folder: ParquetMaker) -> None:
    """It is read at the run's end only: nobody wants to hear of it then."""
    folder = parquet_folder()
    check_dataset("cifar100", str(folder))
    (test_file,) = folder.glob("test*.parquet")
    whole = test_file.read_bytes()
    for spoil, words in (
        (lambda: write_parquet(test_file, columns=["img"]), "lacks the column 'fine_label'"),
        (lambda: test_file.write_bytes(whole[:-100]), "cannot be read as parquet"),
        (test_file.unlink, r"test\*\.parquet"),
    ):
        spoil()
        with pytest.raises(ValueError, match=words):
            check_dataset("cifar100", str(folder))


def test_without_network_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(data, "DEFAULT_DATA_DIR", tmp_path / "data")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(77)
    try:
        with pytest.raises(ValueError, match=r"could not be downloaded.*--dataset digits") as caught:
            load_images("cifar100", None, "train")
        assert socket.getdefaulttimeout() == 77, "the process's own timeout is given back"
    finally:
        socket.setdefaulttimeout(before)
    assert_sentence(caught.value, tmp_path / "data", "--data-dir")
    assert picture_of(tmp_path) == {}, "a failed download leaves nothing behind"


# ---------------------------------------------------------------- the cache of decoded images


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BYOT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_second_time_nothing_is_decoded(
    cache: Path, parquet_folder: ParquetMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(parquet_folder(12, 6))
    first = {split: load_images("cifar100", folder, split) for split in SPLITS}
    assert [len(images.labels) for images in first.values()] == [12, 6]
    assert len(list(cache.iterdir())) == 2
    monkeypatch.delattr(data, "_decode")
    for split, expected in first.items():
        found = load_images("cifar100", folder, split)
        assert same(found, expected)
        assert not found.images.flags.writeable
        assert not found.images.flags.owndata, "mapped, not copied"


def test_other_files_are_other_data(cache: Path, parquet_folder: ParquetMaker) -> None:
    folder = parquet_folder(12, 6)
    before = load_train(folder)
    (file,) = folder.glob("train*")
    write_parquet(file, 9)
    assert len(load_train(folder).labels) == 9
    write_parquet(file, 12)
    assert same(load_train(folder), before)
    moved = folder.rename(folder.with_name("moved"))
    assert same(load_train(moved), before)
    assert len(list(cache.iterdir())) == 2, "the place of the files does not matter"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "folder", "longer"])
def test_a_damaged_cache_file_is_made_again(cache: Path, parquet_folder: ParquetMaker, damage: str) -> None:
    folder = parquet_folder(12, 6)
    expected = load_train(folder)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    else:
        flipped = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
        file.write_bytes({"cut": whole[:-9], "flipped": flipped, "empty": b"", "longer": whole * 2}[damage])
    assert read_cached(file, 32) is None
    assert same(load_train(folder), expected)
    assert damage == "folder" or read_cached(file, 32) is not None


def test_without_a_place_for_the_cache_everything_goes_on(cache: Path, parquet_folder: ParquetMaker) -> None:
    cache.write_text("a file, not a folder")
    assert len(load_train(parquet_folder(12, 6)).labels) == 12
