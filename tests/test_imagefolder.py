"""Holds the data set imagefolder to what its files hold, to CIFAR-100 read from parquet, and damage to being listed."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.functional import center_crop

from analysis.trials import _compared_settings as compared_settings
from byot import data, evaluate
from byot.batches import augment, draw_epoch, mean_and_std, place_images, shuffled
from byot.config import TrainConfig
from byot.data import LabelledImages, check_dataset, fingerprint, load_images, split_validation, take
from byot.graphs import AllExits, Normalise, cut_sections
from byot.image_files import list_classes, read_square
from byot.predictor import Predictor
from byot.runs import check_classes, class_names, find_run, load_network, open_run, read_result, train_run
from byot.system.files import read_json
from byot.trainer import Trainer
from tests.helpers import encode_png, random_pixels, run_command

CPU = torch.device("cpu")
SMALL = TrainConfig(dataset="imagefolder", width=2, epochs=1, batch_size=16, device="cpu")


def write_images(folder: Path, pixels: np.ndarray, first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(pixels, first):
        (folder / f"{number:05d}.png").write_bytes(encode_png(image))


def make_folder(root: Path, *, train: int = 8, test: int = 2, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Write random images of 32 pixels: so many a class in train/ and test/, or in one folder where test is 0."""
    for seed, name in enumerate(names):
        write_images(root / ("train" if test else "") / name, random_pixels(train, seed=seed))
        if test:
            write_images(root / "test" / name, random_pixels(test, seed=100 + seed))
    return root


def load(folder: Path, split: data.Split = "train", image_size: int = 32) -> LabelledImages:
    return load_images("imagefolder", str(folder), split, image_size)


# ---------------------------------------------------------------- what is read
def test_a_folder_written_from_cifar100_trains_as_cifar100_does(tmp_path, cifar100_dir):
    """Pixels, batches, losses and weights, to the last bit."""
    source = load_images("cifar100", str(cifar100_dir), "test")
    rows = np.concatenate([np.flatnonzero(source.labels == label)[:3] for label in range(100)])  # as in the folder
    expected = take(source, rows)
    for label in range(100):
        for split in ("train", "test"):
            write_images(tmp_path / split / f"{label:02d}", expected.images[expected.labels == label])
    found = load(tmp_path)
    assert np.array_equal(found.images, expected.images)
    assert np.array_equal(found.labels, expected.labels)
    assert found.class_names == tuple(f"{label:02d}" for label in range(100))

    config = SMALL.with_settings(dataset="cifar100", epochs=31, batch_size=64)  # with Cutout
    losses, batches = [], []
    for settings, images in (({"dataset": "cifar100"}, expected), ({"dataset": "imagefolder"}, found)):
        trainer = Trainer(config.with_settings(**settings), images)
        losses.append(trainer._run_epoch(None).loss)
        plan = draw_epoch(trainer.config, len(images.labels), 1)
        drawn = shuffled(place_images(images, CPU, "device"), plan, 64)
        normalisation = mean_and_std(trainer.normalisation, CPU)
        batches.append(torch.cat([augment(batch, trainer.config, *normalisation) for batch in drawn]))
    assert losses[0] == losses[1]
    assert torch.equal(*batches)


def test_files_are_those_of_torchvision(tmp_path):
    """Sorted, with folders below a class and what links lead to; hidden ones are left out here."""
    for place in ("b/1.png", "b/x/2.png", "b/x/0.png", "a/9.jpg", "a/10.jpg", "B/3.webp"):
        (tmp_path / "data" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / place).touch()
    write_images(tmp_path / "elsewhere", random_pixels(2))
    (tmp_path / "data" / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    theirs = torchvision.datasets.ImageFolder(str(tmp_path / "data"))
    for hidden in ("b/.1.png", ".c/4.png", "a/.x/5.png"):
        (tmp_path / "data" / hidden).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / hidden).touch()
    ours = list_classes(tmp_path / "data")
    assert list(ours.class_names) == theirs.classes == ["B", "a", "b"]
    assert list(zip(map(str, ours.paths), ours.labels.tolist(), strict=True)) == theirs.samples


def test_links_that_lead_round_in_circles_end(tmp_path):
    """Neither are the images of all classes taken for one's where a link leads back to the data set's folder."""
    make_folder(tmp_path, train=3, test=0)
    expected = list_classes(tmp_path).paths
    for name, target in (("self", "."), ("up", ".."), ("above", "../.."), ("x/y/down", "../..")):
        (tmp_path / "cat" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cat" / name).symlink_to(target)
    assert list_classes(tmp_path).paths == expected


def test_one_folder_of_classes_keeps_a_fifth_of_each_for_the_test(tmp_path, cache):
    folder = make_folder(tmp_path / "photos", train=10, test=0, names=("a", "b", "train"))
    train, test = load(folder), load(folder, "test")
    assert np.bincount(train.labels).tolist() == [8, 8, 8]
    assert np.bincount(test.labels).tolist() == [2, 2, 2]
    together = {image.tobytes() for part in (train, test) for image in part.images}
    assert together == {image.tobytes() for seed in range(3) for image in random_pixels(10, seed=seed)}


def save(path: Path, image: Image.Image, **how: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **how)  # type: ignore[arg-type]


def test_every_mode_becomes_rgb(tmp_path):
    red = Image.new("RGB", (8, 8), (200, 10, 30))
    grey = np.full((8, 8), 60_000, dtype=np.uint16)
    see_through = Image.new("RGBA", (8, 8), (200, 10, 30, 0))
    palette = red.quantize(4)
    turned = Image.fromarray(np.pad(np.zeros((8, 4, 3), np.uint8), ((0, 0), (0, 4), (0, 0)), constant_values=255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    for name, image, how, corner in (
        ("cmyk.jpg", red.convert("CMYK"), {"quality": 95}, (200, 10, 30)),
        ("grey.png", red.convert("L"), {}, (69, 69, 69)),
        ("16.png", Image.fromarray(grey), {}, (233, 233, 233)),
        ("palette.png", palette, {}, (200, 10, 30)),
        ("clear palette.png", palette, {"transparency": bytes([0] * 4)}, (255, 255, 255)),
        ("clear.png", see_through, {}, (255, 255, 255)),
        ("opaque.png", Image.new("RGBA", (8, 8), (200, 10, 30, 255)), {}, (200, 10, 30)),
        ("moving.webp", red, {"save_all": True, "append_images": [turned], "lossless": True}, (200, 10, 30)),
        ("turned.png", turned, {"exif": exif}, (0, 0, 0)),
        ("1.png", red.convert("1", dither=Image.Dither.NONE), {}, (0, 0, 0)),
    ):
        save(tmp_path / name, image, **how)
        found = read_square(tmp_path / name, 8)
        assert (found.shape, found.dtype) == ((8, 8, 3), np.uint8)
        assert np.abs(found[0, -1].astype(int) - corner).max() <= 3, (name, found[0, -1])


@pytest.mark.parametrize(("width", "height"), [(50, 40), (40, 50), (128, 64), (32, 48), (8, 100)])
def test_the_square_in_the_middle_is_resized(tmp_path, width, height):
    """By a bicubic filter, as torch has it; a square of the right size keeps its pixels."""
    pixels = np.random.default_rng(0).integers(90, 160, (height, width, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(encode_png(pixels))
    side = min(width, height)
    square = center_crop(torch.from_numpy(pixels).permute(2, 0, 1), [side, side])
    resized = torch.nn.functional.interpolate(square[None].double(), size=(32, 32), mode="bicubic", antialias=True)
    expected = resized[0].permute(1, 2, 0)
    found = read_square(tmp_path / "a.png", 32)
    assert np.abs(found - expected.numpy()).max() <= 2
    assert (width, height) != (32, 48) or np.array_equal(found, pixels[8:40])


# ---------------------------------------------------------------- damage
def make_damage(folder: Path) -> list[str]:
    """Write odd files into a class; return the names of those that are no whole image."""
    photo = Image.fromarray(random_pixels(1, size=80)[0])
    exif = Image.Exif()
    exif[0x0112] = 8
    save(folder / "whole turned.jpg", photo, exif=exif)
    (folder / ".hidden.png").write_text("not counted")
    (folder / "loop").symlink_to("..")
    save(folder / "truncated.jpg", photo)
    cut = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(cut[: len(cut) // 2])
    (folder / "text.png").write_text("no image at all")
    (folder / "empty.png").touch()
    huge = bytearray(encode_png(random_pixels(1)[0]))
    huge[16:24] = (100_000).to_bytes(4, "big") * 2
    crc = __import__("zlib").crc32(huge[12:29]).to_bytes(4, "big")
    (folder / "huge.png").write_bytes(bytes(huge[:29]) + crc + bytes(huge[33:]))
    (folder / "dangling.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    save(folder / "photo.bmp", photo)
    return ["dangling.png", "empty.png", "huge.png", "photo.bmp", "pipe.png", "text.png", "truncated.jpg"]


def test_a_run_trains_on_what_is_whole_and_lists_the_rest(tmp_path, cache, works, refused):
    """From the command line; evaluated again once the run and its images have been moved."""
    folder = make_folder(tmp_path / "photos", train=10, test=6)
    unreadable = make_damage(folder / "train" / "dog")
    settings = ("--dataset", "imagefolder", "--image-size", 72, "--width", 2, "--epochs", 1, "--batch-size", 8)
    arguments = (*settings, "--data-dir", "photos", "--outputs", "outputs", "--name", "mine", "--device", "cpu")
    done = run_command(arguments, cwd=tmp_path)
    assert done.stderr.count("\n") == 1
    assert re.findall(r"train/dog/([^,\n]+)", done.stderr) == unreadable
    assert "21 training images" in done.stdout
    run = (tmp_path / "outputs" / "runs" / "mine").rename(tmp_path / "moved run")
    folder.rename(tmp_path / "moved photos")
    saved = find_run(run)
    assert class_names(saved) == Predictor(saved).class_names == ("cat", "dog")
    network, normalisation = load_network(saved)
    x = torch.rand(2, 3, 72, 72)
    with torch.inference_mode():
        exported = AllExits(cut_sections(network, normalisation))(x)
        expected = network(Normalise(normalisation)(x)).logits
    torch.testing.assert_close(exported, expected)
    out = works(evaluate, run, "--data-dir", tmp_path / "moved photos")
    assert out[out.index("classifier ") :] in done.stdout
    assert read_json(run / "result.json")["num_test_images"] == 12
    for split in ("train", "test"):
        (tmp_path / "moved photos" / split / "cat").rename(tmp_path / "moved photos" / split / "zebra")
    given = (run, "--exits", "--data-dir", tmp_path / "moved photos")
    with pytest.warns(UserWarning, match="left out"):
        refused(evaluate, *given, words=("was trained on other classes",))
    assert not (run / "exits.json").exists(), "fitted on wrong labels"


def test_many_unreadable_files_are_counted(tmp_path, cache):
    make_folder(tmp_path)
    for number in range(12):
        (tmp_path / "train" / "cat" / f"{number:02d}.txt").touch()
    with pytest.warns(UserWarning, match=r"^left out.* PNG, JPEG or WebP: [^ ]+00.txt, .*09.txt and 2 more$"):
        first = load(tmp_path)
    assert len(first.labels) == 16
    assert np.array_equal(load(tmp_path).images, first.images), "and told once"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "train/eel").mkdir(), "the class folder .*train/eel holds no file"),
        (lambda folder: (folder / "test").rename(folder.parent / "elsewhere"), "has train/ but no test/"),
        (lambda folder: write_images(folder / "test/eel", random_pixels(1)), "same classes; one of them lacks 'eel'"),
        (lambda folder: (folder / "train/cat").rename(folder.parent / "elsewhere"), "train has only the class 'dog'"),
        (lambda folder: [*map(shutil.rmtree, (folder / "train").iterdir())], "train has no folder in it"),
        (lambda folder: folder.rename(folder.parent / "elsewhere"), "does not exist"),
    ],
)
def test_a_folder_that_cannot_do_is_refused_in_one_sentence(tmp_path, spoil, words):
    spoil(make_folder(tmp_path / "photos"))
    for split in data.Split.__args__:  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=rf"^[^\n]*{words}[^\n]*$"):
            load(tmp_path / "photos", split)


def test_images_that_cannot_do_are_refused_in_one_sentence(tmp_path, cache):
    with pytest.raises(ValueError, match="needs --data-dir"):
        check_dataset("imagefolder", None, 32)
    few = make_folder(tmp_path / "few", train=2, test=0)
    with pytest.raises(ValueError, match="too few images to keep 20% of each class"):
        load(few)
    for split, words in (("train", "no training image of the class 'dog'"), ("test", "no file of the test images")):
        spoilt = make_folder(tmp_path / split)
        for path in (spoilt / split).glob("*/*" if split == "test" else "dog/*"):
            path.write_text("text")
        with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match=words):
            load(spoilt, split)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the cache
def test_files_are_decoded_once_for_each_size(tmp_path, cache, monkeypatch):
    folder = make_folder(tmp_path / "photos")
    decoded: list[Path] = []

    def read(path: Path, size: int) -> np.ndarray:
        decoded.append(path)
        return read_square(path, size)

    monkeypatch.setattr(data, "read_square", read)
    first = load(folder)
    moved = folder.rename(tmp_path / "moved")
    again = load(moved)
    assert np.array_equal(again.images, first.images)
    assert not again.images.flags.owndata
    assert len(decoded) == 16
    assert load(moved, image_size=16).images.shape == (16, 16, 16, 3)
    assert len(decoded) == 32

    changed = moved / "train" / "dog" / "00003.png"
    changed.write_bytes(encode_png(255 - first.images[11]))
    assert np.array_equal(load(moved).images[11], 255 - first.images[11]), "a changed file is noticed"
    os.utime(changed, ns=(1, 1))
    load(moved)
    assert len(decoded) == 64
    changed.rename(changed.with_name("zzz.png"))
    assert np.array_equal(load(moved).images[-1], 255 - first.images[11]), "a renamed file too"
    assert not list((cache / "imagefolder").glob(".*.tmp"))


def test_a_damaged_cache_file_is_made_again_and_none_where_there_is_no_place(tmp_path, cache):
    photos = make_folder(tmp_path / "photos")
    expected = take(load(photos), np.arange(16))  # a copy: they are mapped from the file
    (file,) = (cache / "imagefolder").glob("train*")
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    assert np.array_equal(load(photos).images, expected.images)
    assert file.read_bytes() == whole
    shutil.rmtree(cache)
    cache.write_text("a file, not a folder")
    found = load(photos)
    assert np.array_equal(found.images, expected.images)
    assert np.array_equal(found.labels, expected.labels)


def test_a_large_validation_split_lies_in_a_file(tmp_path, cache, monkeypatch):
    whole = load(make_folder(tmp_path, train=400, names=("a", "b")), image_size=16)
    small = split_validation(whole, fraction=0.25, seed=3)
    monkeypatch.setattr(data, "LARGE", 200 * 16 * 16 * 3)
    large = split_validation(whole, fraction=0.25, seed=3)
    for a, b in zip(small, large, strict=True):
        assert a is not None
        assert b is not None
        assert np.array_equal(a.images, b.images)
        assert np.array_equal(a.labels, b.labels)
        assert a.class_names == b.class_names == ("a", "b")
    assert not large[0].images.flags.owndata
    assert not large[0].images.flags.writeable
    assert np.array_equal(load(tmp_path, image_size=16).images, whole.images)
    monkeypatch.setenv("BYOT_CACHE", str(tmp_path / "train" / "a" / "00000.png"))  # nothing can be written there
    again, _ = split_validation(whole, fraction=0.25, seed=3)
    assert np.array_equal(again.images, large[0].images)


# ---------------------------------------------------------------- runs
def test_a_checkpoint_goes_on_with_its_own_images_alone(tmp_path, cache):
    folder = make_folder(tmp_path / "a")
    run = tmp_path / "run"
    config = SMALL.with_settings(data_dir=str(folder))
    train_run(config, run)
    (run / "result.json").unlink()
    others = {
        "other classes": make_folder(tmp_path / "b", names=("cat", "fox")),
        "with 16 training images, the data set has 14": make_folder(tmp_path / "c", train=7),
        "other training images": make_folder(tmp_path / "d"),
    }
    write_images(tmp_path / "d" / "train" / "cat", random_pixels(8, seed=7))
    for words, other in others.items():
        with pytest.raises(ValueError, match=words):
            open_run(config.with_settings(data_dir=str(other)), run)
    moved = config.with_settings(data_dir=str(folder.rename(tmp_path / "moved")))
    train_run(moved, run)
    with pytest.raises(ValueError, match=r"is finished and was trained on .*moved"):
        read_result(config, run)
    with pytest.raises(ValueError, match="trained on other classes"):
        check_classes(find_run(run), load(tmp_path / "b", "test"))


def test_tables_do_not_mix_runs_on_different_folders():
    here, there = (SMALL.with_settings(data_dir=place) for place in ("/a", "/b"))
    assert compared_settings(here.to_dict()) != compared_settings(there.to_dict())
    one, other = (config.with_settings(dataset="cifar100") for config in (here, there))
    assert compared_settings(one.to_dict()) == compared_settings(other.to_dict()), "CIFAR-100 is the same everywhere"


def test_a_fingerprint_tells_images_and_labels_apart():
    images = LabelledImages(random_pixels(300), np.arange(300))
    same = LabelledImages(images.images.copy(), images.labels.copy())
    other = LabelledImages(random_pixels(300, seed=1), images.labels)
    assert fingerprint(images) == fingerprint(same)
    assert len({fingerprint(d) for d in (images, other, images._replace(labels=images.labels[::-1]))}) == 3
