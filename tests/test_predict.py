"""Holds predicting to a loop over single images, and reading pictures to what a viewer shows of them."""

import csv
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import byot
from byot import predict
from byot.class_names import CLASS_NAMES
from byot.config import DATASETS
from byot.data import load_images
from byot.predictor import DEEPEST_ALONE, Predictor
from byot.runs import load_network
from byot.system.files import read_json, write_json
from tests.helpers import EXIT_RULE, PROJECT, random_pixels


def test_the_shipped_network_is_as_good_as_its_record_says(cifar100_dir):
    """On the first thousand test images: within three standard errors of early exit on all ten thousand."""
    folder = PROJECT / "results/networks/resnet18-w16-cifar100"
    images, labels, *_ = load_images("cifar100", str(cifar100_dir), "test", 32)
    answers = byot.load(folder, "cpu").predict(images[:1000])
    right = [CLASS_NAMES["cifar100"][label] == found.name for label, found in zip(labels[:1000], answers, strict=True)]
    recorded = read_json(folder / "exits-test.json")["test"]["table"][0]
    assert abs(100 * np.mean(right) - recorded["accuracy"]) < 3 * 1.6
    assert {found.exit for found in answers} == {2, 3, 4}, "nobody asks the first exit"


@pytest.fixture(scope="module")
def predictor(exits_run: Path) -> Predictor:
    return byot.load(exits_run, "cpu")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with three pictures, and three files that are none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, pixels in zip(("b.png", "a.JPG", "c.webp"), random_pixels(3, size=40), strict=True):
        Image.fromarray(pixels).save(folder / name)
    (folder / "text.png").write_text("no picture")
    (folder / "torn.jpeg").write_bytes((folder / "a.JPG").read_bytes()[:700])
    os.mkfifo(folder / "pipe.png")
    (folder / "notes.txt").write_text("of no known ending")
    return folder


# ---------------------------------------------------------------- answers
def test_answers_are_those_of_the_exit_that_the_rule_finds(exits_run, predictor, monkeypatch):
    """Image by image, with every exit computed."""
    model, (mean, std) = load_network(exits_run)
    images = load_images("digits", None, "test").images
    monkeypatch.setattr(predictor, "batch_size", 100)
    found = predictor.predict(images, top=3)
    assert len(found) == len(images)
    for pixels, answer in zip(images, found, strict=True):
        x = (torch.from_numpy(pixels) / 255 - torch.tensor(mean)) / torch.tensor(std)
        with torch.inference_mode():
            logits = torch.cat(model(x.permute(2, 0, 1)[None]).logits)
        first, second, _, fourth = (logits / torch.tensor(EXIT_RULE["temperatures"])[:, None]).softmax(dim=1)
        number, chosen = (1, first) if first.max() >= 0.4 else (2, second) if second.max() >= 0.3 else (4, fourth)
        best = chosen.sort(descending=True)
        assert answer.exit == number
        assert [name for name, _ in answer.top] == [str(i) for i in best.indices[:3].tolist()]
        assert [value for _, value in answer.top] == pytest.approx(best.values[:3].tolist(), abs=1e-5)
        assert (answer.name, answer.probability) == answer.top[0]
    assert {answer.exit for answer in found} == {1, 2, 4}


def test_files_pictures_and_arrays_are_one(predictor, tmp_path):
    pixels = random_pixels(3, size=8)
    pictures = [Image.fromarray(image) for image in pixels]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    answers = [
        [(found.exit, found.top) for found in predictor.predict(images)]
        for images in (pixels, pictures, paths, list(map(str, paths)))
    ]
    assert answers[1:] == answers[:1] * 3
    (alone,) = predictor.predict(str(paths[1]))
    assert alone.name == answers[0][1][1][0][0]
    assert predictor.predict([]) == []
    with pytest.raises(ValueError, match="at least 1, not 0"):
        predictor.predict(paths, top=0)
    with pytest.raises(ValueError, match=r"must be uint8 \[N, H, W, 3\], not float64 \[3, 8, 8, 3\]"):
        predictor.predict(pixels / 255)


def test_without_a_rule_the_deepest_classifier_answers(alone, plain_run, pictures, call):
    """Of a plain network there is nothing to be told: it has the fourth exit alone."""
    for run, told in ((alone, f"`python byot/evaluate.py {alone} --exits`"), (plain_run, "")):
        code, out, err = call(predict, run, pictures / "a.JPG", "--format", "json")
        assert (code, json.loads(out)[0]["exit"], err.count("\n")) == (0, 4, bool(told))
        assert told in err
        assert byot.load(run, "cpu").rule == DEEPEST_ALONE


def test_a_rule_of_another_checkpoint_is_told(exits_run, pictures, call, tmp_path):
    run = shutil.copytree(exits_run, tmp_path / "run")
    (checkpoint,) = (run / "checkpoints").glob("*.pt")
    write_json(run / "exits.json", EXIT_RULE | {"checkpoint": "epoch-0009.pt"})
    for named in (run, checkpoint):
        with pytest.warns(
            UserWarning, match=f"^the exits were .* and the network is that of {checkpoint.name}: python"
        ):
            assert call(predict, named, pictures / "a.JPG")[0] == 0
    checkpoint.with_name("epoch-0009.pt").touch()
    with pytest.warns(UserWarning, match=f"and the network is that of {checkpoint.name}: "):  # the newest is no matter
        call(predict, checkpoint, pictures / "a.JPG")


# ---------------------------------------------------------------- the command
def test_what_is_no_image_is_named_and_the_others_go_on(exits_run, predictor, pictures, call, monkeypatch):
    batches = []
    monkeypatch.setattr("byot.predictor.EVAL_BATCH_SIZE", {"cpu": 2})
    answer = Predictor.answer

    def counted(self: Predictor, pixels: np.ndarray, top: int = 5) -> list[object]:
        batches.append(len(pixels))
        return list(answer(self, pixels, top))

    monkeypatch.setattr(Predictor, "answer", counted)
    given = (exits_run, pictures, pictures / "c.webp", "--device", "cpu")
    code, out, err = call(predict, *given, "--format", "json")
    records = json.loads(out)
    names = ["a.JPG", "b.png", "c.webp", "c.webp"]
    assert (code, [Path(record["file"]).name for record in records]) == (1, names)
    assert max(batches) == 2, "no more in memory at once"
    complaints = err.splitlines()
    assert [line for line in complaints if line.startswith(f"predict.py: {pictures}")] == complaints
    assert [Path(line.split()[1]).name for line in complaints] == ["pipe.png", "text.png", "torn.jpeg"]
    expected = predictor.predict([pictures / name for name in names])
    assert [record["exit"] for record in records] == [found.exit for found in expected]
    assert [[entry["name"] for entry in record["top"]] for record in records] == [
        [name for name, _ in found.top] for found in expected
    ]

    code, out, _ = call(predict, *given, "--format", "csv", "--top", 2)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert (code, list(rows[0])) == (1, ["file", "exit", "ms", "name_1", "probability_1", "name_2", "probability_2"])
    assert [(row["name_2"], float(row["probability_2"])) for row in rows] == [
        (found.top[1][0], pytest.approx(found.top[1][1], abs=1e-5)) for found in expected
    ]
    code, out, _ = call(predict, *given[:1], pictures / "b.png", "--top", 1)
    header, row = out.splitlines()
    assert (code, header.split()) == (0, ["file", "exit", "1", "ms"])
    first = expected[1]
    assert row.split()[:4] == [str(pictures / "b.png"), f"{first.exit}/4", first.name, f"{first.probability:.1%}"]


# ---------------------------------------------------------------- names and imports
def test_every_class_has_a_name():
    assert {dataset: len(set(names)) for dataset, names in CLASS_NAMES.items()} == {
        dataset: info.num_classes for dataset, info in DATASETS.items() if dataset != "imagefolder"
    }


def test_names_of_cifar100_are_in_the_order_of_its_labels(cifar100_dir):
    (file,) = cifar100_dir.glob("test*.parquet")
    features = json.loads(pyarrow.parquet.read_schema(file).metadata[b"huggingface"])["info"]["features"]
    assert list(CLASS_NAMES["cifar100"]) == features["fine_label"]["names"]
