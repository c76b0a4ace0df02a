"""Holds byot/data.py to what its files hold, its splits to their labels, and every bad file to one helpful sentence."""

import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from byot import data
from byot.config import TrainConfig
from byot.data import (
    REFERENCE_MEAN,
    REFERENCE_STD,
    LabelledImages,
    check_dataset,
    find_normalisation,
    find_parquet,
    load_images,
    split_validation,
    stratified_split,
)
from tests.helpers import ParquetMaker, encode_png, picture_of, random_pixels, write_parquet

# ---------------------------------------------------------------- splits


def uneven_labels() -> np.ndarray:
    labels = np.repeat(np.arange(7), [100, 50, 10, 200, 33, 4, 60])
    return np.random.default_rng(0).permutation(labels)


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
    train, val = split_validation(LabelledImages(pixels, labels), fraction=0.25, seed=1)
    assert val is not None
    seen = []
    for part in (train, val):
        numbers = part.images.reshape(len(part.labels), -1).copy().view(np.uint32)[:, 0]
        assert np.array_equal(labels[numbers], part.labels)
        seen += numbers.tolist()
    assert sorted(seen) == list(range(len(labels)))


def test_split_validation_of_nothing_and_of_too_little() -> None:
    everything = LabelledImages(random_pixels(20, 8), np.arange(20) % 10)
    assert split_validation(everything, fraction=0, seed=0) == (everything, None)
    with pytest.raises(ValueError, match=r"val_fraction 0\.1 of 20 images holds out none"):
        split_validation(everything, fraction=0.1, seed=0)


# ---------------------------------------------------------------- normalisation


def test_reference_recipe_has_the_references_constants() -> None:
    pixels = random_pixels(5)
    assert find_normalisation(TrainConfig(recipe="reference"), pixels) == (REFERENCE_MEAN, REFERENCE_STD)
    assert (REFERENCE_MEAN, REFERENCE_STD) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@pytest.mark.parametrize("config", [TrainConfig(recipe="modern"), TrainConfig(recipe="reference", dataset="digits")])
def test_normalisation_of_the_images_is_numpys(config: TrainConfig) -> None:
    pixels = (random_pixels(100) ** np.array([1.0, 0.9, 0.7])).astype(np.uint8)
    found = find_normalisation(config, pixels)
    assert found.mean == pytest.approx((pixels / 255).mean(axis=(0, 1, 2)), rel=1e-10)
    assert found.std == pytest.approx((pixels / 255).std(axis=(0, 1, 2)), rel=1e-10)


# ---------------------------------------------------------------- data sets


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    train, test = load_images("digits", None, "train"), load_images("digits", None, "test")
    bunch = load_digits()
    assert len(train.labels) + len(test.labels) == len(bunch.target) == 1797
    for part in (train, test):
        assert part.images.shape[1:] == (8, 8, 3)
        assert part.images.dtype == np.uint8
        assert (part.images == part.images[..., :1]).all()

    def as_rows(levels: np.ndarray, labels: np.ndarray) -> Counter[bytes]:
        rows = np.concatenate([levels.reshape(len(labels), -1), labels[:, None]], axis=1)
        return Counter(row.astype(np.int64).tobytes() for row in rows)

    levels = [np.rint(part.images[..., 0] * (16 / 255)) for part in (train, test)]
    together = as_rows(levels[0], train.labels) + as_rows(levels[1], test.labels)
    assert together == as_rows(bunch.images, bunch.target), "images lost, doubled or changed"
    for label in range(10):
        members = (bunch.target == label).sum()
        assert abs((test.labels == label).sum() - members / 5) <= 0.5


@pytest.fixture(scope="module")
def cifar100(cifar100_dir: Path) -> dict[str, LabelledImages]:
    return {split: load_images("cifar100", str(cifar100_dir), split) for split in ("train", "test")}


@pytest.mark.parametrize(("split", "num_images", "each"), [("train", 50_000, 500), ("test", 10_000, 100)])
def test_cifar100_counts(cifar100: dict[str, LabelledImages], split: str, num_images: int, each: int) -> None:
    found = cifar100[split]
    assert found.images.shape == (num_images, 32, 32, 3)
    assert found.images.dtype == np.uint8
    assert np.array_equal(np.bincount(found.labels), np.full(100, each))


def test_cifar100_mean_and_deviation_are_the_published_ones(cifar100: dict[str, LabelledImages]) -> None:
    found = find_normalisation(TrainConfig(recipe="modern"), cifar100["train"].images)
    assert found.mean == pytest.approx((0.50708, 0.48655, 0.44092), abs=1e-5)
    assert found.std == pytest.approx((0.26733, 0.25644, 0.27615), abs=1e-5)


def test_cifar100_validation_split_is_45_000_and_5_000(cifar100: dict[str, LabelledImages]) -> None:
    train, val = split_validation(cifar100["train"], fraction=0.1, seed=0)
    assert val is not None
    assert np.array_equal(np.bincount(train.labels), np.full(100, 450))
    assert np.array_equal(np.bincount(val.labels), np.full(100, 50))


def test_cifar100_folder_is_accepted_before_training(cifar100_dir: Path) -> None:
    check_dataset("cifar100", str(cifar100_dir))
    assert len(find_parquet("cifar100", str(cifar100_dir), "train")) >= 1


# ---------------------------------------------------------------- parquet


@pytest.mark.parametrize("dataset", ["cifar100", "cifar10"])
def test_parquet_images_come_out_as_they_went_in(tmp_path: Path, dataset: str) -> None:
    pixels = random_pixels(7)
    labels = [3, 1, 4, 1, 5, 9, 2]
    for name, part in (("train-00000-of-00002.parquet", slice(0, 4)), ("train-00001-of-00002.parquet", slice(4, 7))):
        images = [encode_png(p) for p in pixels[part]]
        write_parquet(tmp_path / name, dataset=dataset, images=images, labels=labels[part])
    found = load_images(dataset, str(tmp_path), "train")
    assert np.array_equal(found.images, pixels)
    assert found.labels.tolist() == labels
    assert found.labels.dtype == np.int64


@pytest.mark.parametrize("subfolder", ["", "cifar100", "data", "plain_text"])
def test_parquet_is_found_where_the_hub_puts_it(tmp_path: Path, subfolder: str) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / subfolder / f"{split}-00000-of-00001.parquet", 3)
    check_dataset("cifar100", str(tmp_path))
    assert len(load_images("cifar100", str(tmp_path), "test").labels) == 3


def test_grey_images_are_spread_over_three_channels(tmp_path: Path) -> None:
    grey = random_pixels(1)[0, ..., 0]
    write_parquet(tmp_path / "train.parquet", images=[encode_png(grey)], labels=[0])
    found = load_images("cifar100", str(tmp_path), "train").images[0]
    assert np.array_equal(found, np.repeat(grey[..., None], 3, axis=2))


def break_nothing_there(folder: Path) -> None:
    (folder / "readme.txt").write_text("no images here")


def break_column_img(folder: Path) -> None:
    write_parquet(folder / "train.parquet", columns=["fine_label"])


def break_column_label(folder: Path) -> None:
    write_parquet(folder / "train.parquet", dataset="cifar10")  # its column is `label`


def break_label_high(folder: Path) -> None:
    write_parquet(folder / "train.parquet", labels=[0, 1, 2, 100])


def break_label_low(folder: Path) -> None:
    write_parquet(folder / "train.parquet", labels=[0, 1, -1, 2])


def break_label_null(folder: Path) -> None:
    write_parquet(folder / "train.parquet", labels=[0, None, 1, 2])


def break_label_text(folder: Path) -> None:
    write_parquet(folder / "train.parquet", labels=["cat", "dog", "cat", "dog"])


def break_label_fraction(folder: Path) -> None:
    write_parquet(folder / "train.parquet", labels=[0.0, 1.5, 2.0, 3.0])


def break_image_size(folder: Path) -> None:
    write_parquet(folder / "train.parquet", images=[encode_png(random_pixels(1, size=31)[0])])


def break_image_bytes(folder: Path) -> None:
    write_parquet(folder / "train.parquet", images=[encode_png(random_pixels(1)[0]), b"not an image"])


def break_image_cut(folder: Path) -> None:
    write_parquet(folder / "train.parquet", images=[encode_png(random_pixels(1)[0])[:900]])


def break_image_null(folder: Path) -> None:
    write_parquet(folder / "train.parquet", images=[encode_png(random_pixels(1)[0]), None])


def break_image_kind(folder: Path) -> None:
    table = pyarrow.table({"img": [1, 2], "fine_label": [1, 2]})
    pyarrow.parquet.write_table(table, folder / "train.parquet")


def break_no_rows(folder: Path) -> None:
    write_parquet(folder / "train.parquet", 0)


def break_cut_short(folder: Path) -> None:
    whole = write_parquet(folder / "train.parquet", 4).read_bytes()
    (folder / "train.parquet").write_bytes(whole[: len(whole) // 2])


def break_empty(folder: Path) -> None:
    (folder / "train.parquet").write_bytes(b"")


def break_text(folder: Path) -> None:
    (folder / "train.parquet").write_text("version https://git-lfs.github.com/spec/v1\n" * 20)


def break_folder(folder: Path) -> None:
    (folder / "train.parquet").mkdir()


BROKEN: dict[Callable[[Path], None], str] = {
    break_nothing_there: r"has neither train\*\.parquet files nor the folder cifar-100-python",
    break_column_img: "lacks the column 'img'; it has fine_label",
    break_column_label: "lacks the column 'fine_label'; it has img, label",
    break_label_high: "labels run from 0 to 100, but cifar100 has the classes 0 to 99",
    break_label_low: "labels run from -1 to 2",
    break_label_null: "'fine_label' must hold whole numbers only",
    break_label_text: "'fine_label' must hold whole numbers only",
    break_label_fraction: "'fine_label' must hold whole numbers only",
    break_image_size: "row 0 is 31x31 pixels, not 32x32",
    break_image_bytes: "row 1 of column 'img' is not an image",
    break_image_cut: "row 0 of column 'img' is not an image",
    break_image_null: "row 1 of column 'img' has no bytes",
    break_image_kind: "row 0 of column 'img' has no bytes",
    break_no_rows: "has no rows",
    break_cut_short: "cannot be read as parquet",
    break_empty: "cannot be read as parquet",
    break_text: "cannot be read as parquet",
    break_folder: "cannot be read as parquet",
}


def test_a_damaged_image_is_told_wherever_it_is_damaged(tmp_path: Path) -> None:
    """Pillow has many exceptions for a broken file; what it still decodes has the right shape."""
    smooth = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    whole = encode_png(smooth)
    path = tmp_path / "train.parquet"
    told = 0
    for position in range(8, len(whole)):
        write_parquet(path, images=[whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :]])
        try:
            found = load_images("cifar100", str(tmp_path), "train")
        except ValueError as error:
            told += 1
            assert_sentence(error, tmp_path, "row 0")
        else:
            assert found.images.shape == (1, 32, 32, 3)
    assert told > len(whole) / 4


def assert_sentence(error: BaseException, folder: Path, words: str = "") -> None:
    message = str(error)
    assert "\n" not in message
    assert str(folder) in message
    assert words in message


@pytest.mark.parametrize("break_it", BROKEN, ids=lambda f: f.__name__.removeprefix("break_"))
def test_bad_files_are_told_in_one_sentence(tmp_path: Path, break_it: Callable[[Path], None]) -> None:
    break_it(tmp_path)
    with pytest.raises(ValueError, match=BROKEN[break_it]) as caught:
        load_images("cifar100", str(tmp_path), "train")
    assert_sentence(caught.value, tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    for function in (lambda f: load_images("cifar100", f, "train"), lambda f: check_dataset("cifar100", f)):
        with pytest.raises(ValueError, match="does not exist") as caught:
            function(str(tmp_path / "nowhere"))
        assert_sentence(caught.value, tmp_path / "nowhere", "the data folder")


def test_a_missing_or_broken_test_set_is_told_before_training(parquet_folder: ParquetMaker) -> None:
    """It is read at the run's end only: nobody wants to hear of it then."""
    folder = parquet_folder()
    check_dataset("cifar100", str(folder))
    (test_file,) = folder.glob("test*.parquet")
    whole = test_file.read_bytes()

    write_parquet(test_file, columns=["img"])
    with pytest.raises(ValueError, match="lacks the column 'fine_label'"):
        check_dataset("cifar100", str(folder))
    test_file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        check_dataset("cifar100", str(folder))
    test_file.unlink()
    with pytest.raises(ValueError, match=r"test\*\.parquet"):
        check_dataset("cifar100", str(folder))


# ---------------------------------------------------------------- the official archive


@pytest.mark.parametrize("dataset", ["cifar100", "cifar10"])
def test_a_damaged_archive_is_told_in_one_sentence(tmp_path: Path, dataset: str) -> None:
    folder = tmp_path / {"cifar100": "cifar-100-python", "cifar10": "cifar-10-batches-py"}[dataset]
    folder.mkdir()
    for name in ("train", "test", "meta", "data_batch_1", "test_batch", "batches.meta"):
        (folder / name).write_bytes(b"\x80\x04}q\x00.")  # a pickle, but not the official one
    before = picture_of(tmp_path)
    with pytest.raises(ValueError, match="archive of cifar") as caught:
        load_images(dataset, str(tmp_path), "train")
    assert_sentence(caught.value, tmp_path, "incomplete or damaged")
    assert picture_of(tmp_path) == before


def test_without_network_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(data, "DEFAULT_DATA_DIR", tmp_path / "data")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(77)
    try:
        with pytest.raises(ValueError, match="could not be downloaded") as caught:
            load_images("cifar100", None, "train")
        assert socket.getdefaulttimeout() == 77, "the process's own timeout is given back"
    finally:
        socket.setdefaulttimeout(before)
    assert_sentence(caught.value, tmp_path / "data", "--data-dir")
    assert "--dataset digits" in str(caught.value)
    assert picture_of(tmp_path) == {}, "a failed download leaves nothing behind"
