"""Holds byot/data.py to what its files hold, its splits to their labels, its cache to what was decoded, and every bad
file to one helpful sentence."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from byot import data
from byot.config import DATASETS, TrainConfig
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
from tests.helpers import encode_png, random_pixels, write_parquet

SPLITS: tuple[Split, ...] = ("train", "test")


def load_train(folder: Path) -> LabelledImages:
    return load_images("cifar100", str(folder), "train")


def same(a: LabelledImages, b: LabelledImages) -> bool:
    arrays = zip((a.images, a.labels), (b.images, b.labels), strict=True)
    return a.class_names == b.class_names and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in arrays)


# ---------------------------------------------------------------- splits and normalisation
def uneven_labels() -> np.ndarray:
    return np.random.default_rng(0).permutation(np.repeat(np.arange(7), [100, 50, 10, 200, 33, 4, 60]))


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_split_is_disjoint_complete_and_stratified(fraction):
    labels = uneven_labels()
    rest, held_out = stratified_split(labels, fraction=fraction, seed=0)
    assert sorted([*rest, *held_out]) == list(range(len(labels)))
    assert list(rest) == sorted(rest)
    assert list(held_out) == sorted(held_out)
    for label in range(7):
        members = int((labels == label).sum())
        assert abs(int((labels[held_out] == label).sum()) - members * fraction) <= 0.5


def test_split_depends_on_labels_fraction_and_seed_alone():
    labels = uneven_labels()
    first = stratified_split(labels, fraction=0.2, seed=0)
    np.random.seed(99)
    again = stratified_split(labels.copy(), fraction=0.2, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1], stratified_split(labels, fraction=0.2, seed=1)[1])


def test_split_validation_cuts_images_with_their_labels():
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


@pytest.mark.parametrize("recipe", ["reference", "modern"])
@pytest.mark.parametrize("dataset", ["cifar100", "digits"])
def test_normalisation_is_the_references_or_numpys(recipe, dataset):
    pixels = (random_pixels(100) ** np.array([1.0, 0.9, 0.7])).astype(np.uint8)
    mean, std = (pixels / 255).mean(axis=(0, 1, 2)), (pixels / 255).std(axis=(0, 1, 2))
    if (recipe, dataset) == ("reference", "cifar100"):
        mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    found = find_normalisation(TrainConfig(recipe=recipe, dataset=dataset), pixels)
    assert found.mean == pytest.approx(mean, rel=1e-10)
    assert found.std == pytest.approx(std, rel=1e-10)


def test_a_channel_of_one_level_is_no_division_by_zero():
    pixels = random_pixels(10)
    pixels[..., 1] = 51
    found = find_normalisation(TrainConfig(dataset="digits"), pixels)
    assert (found.mean[1], found.std[1]) == (0.2, 1.0)


# ---------------------------------------------------------------- data sets
def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    def as_rows(levels: np.ndarray, labels: np.ndarray) -> Counter[bytes]:
        rows = np.concatenate([levels.reshape(len(labels), -1), labels[:, None]], axis=1)
        return Counter(row.astype(np.int64).tobytes() for row in rows)

    bunch = load_digits()
    found: Counter[bytes] = Counter()
    for split, share in zip(SPLITS, (0.8, 0.2), strict=True):
        images, labels, _ = load_images("digits", None, split)
        assert (images.shape[1:], images.dtype) == ((8, 8, 3), np.uint8)
        assert (images == images[..., :1]).all()
        assert (np.abs(np.bincount(labels) - np.bincount(bunch.target) * share) <= 0.5).all()
        found += as_rows(np.rint(images[..., 0] * (16 / 255)), labels)
    assert found == as_rows(bunch.images, bunch.target), "images lost, doubled or changed"
    assert len(load_images("digits", None, "train").labels) == DATASETS["digits"].num_train_images


def test_cifar100_is_whole(cifar100_dir):
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
def test_parquet_images_come_out_as_they_went_in(tmp_path, dataset):
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
def test_parquet_is_found_where_the_hub_puts_it(tmp_path, subfolder):
    for split in SPLITS:
        write_parquet(tmp_path / subfolder / f"{split}-00000-of-00001.parquet", 3)
    check_dataset("cifar100", str(tmp_path))
    assert len(load_images("cifar100", str(tmp_path), "test").labels) == 3


def test_a_missing_test_set_is_told_before_training(parquet_folder):
    """It is read at the run's end only: nobody wants to hear of it then."""
    folder = parquet_folder()
    next(folder.glob("test*.parquet")).unlink()
    with pytest.raises(ValueError, match=r"test\*\.parquet"):
        check_dataset("cifar100", str(folder))


# ---------------------------------------------------------------- the cache of decoded images
def test_the_second_time_nothing_is_decoded(cache, parquet_folder, monkeypatch):
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


def test_other_files_are_other_data(cache, parquet_folder):
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
def test_a_damaged_cache_file_is_made_again(cache, parquet_folder, damage):
    folder = parquet_folder(12, 6)
    expected = load_train(folder)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        flipped = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
        file.write_bytes({"cut": whole[:-9], "flipped": flipped, "empty": b"", "longer": whole * 2}[damage])
    assert read_cached(file, 32) is None
    assert same(load_train(folder), expected)
    assert damage == "folder" or file.read_bytes() == whole


def test_without_a_place_for_the_cache_everything_goes_on(cache, parquet_folder):
    cache.write_text("a file, not a folder")
    assert len(load_train(parquet_folder(12, 6)).labels) == 12
