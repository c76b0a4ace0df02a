"""Holds what train.py --dry-run says of a run to the run itself."""

import re
from pathlib import Path

import pytest

from byot import data, dry_run, train
from byot.config import DATASETS, TrainConfig
from byot.runs import train_run
from byot.trainer import build_model
from tests.helpers import Call


@pytest.mark.parametrize("loss_form", ["reference", "plain"])
def test_a_dry_run_says_what_the_run_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call, loss_form: str
) -> None:
    monkeypatch.setattr(dry_run, "MEASURED_S", 0.2)
    config = TrainConfig.from_dict(
        {"dataset": "digits", "width": 16, "epochs": 1, "batch_size": 256, "device": "cpu", "loss_form": loss_form}
    )
    arguments = ["--dataset", "digits", "--width", "16", "--epochs", "1", "--batch-size", "256", "--device", "cpu"]
    arguments += ["--loss-form", loss_form, "--outputs", str(tmp_path)]
    code, out, err = call(train, *arguments, "--dry-run")
    assert (code, err) == (0, "")
    assert not list(tmp_path.iterdir()), "nothing is written"
    assert max(map(len, out.splitlines())) <= 80
    number = sum(p.numel() for p in build_model(config).parameters())
    rows = [line.split() for line in out.splitlines() if line.startswith(("stage", "exit"))]
    assert len(rows) == (8 if loss_form == "reference" else 5)
    column = [int(row[-2 if row[0] == "stage" else -3].replace(",", "")) for row in rows]
    assert sum(column) == number
    assert f"{number:,}" in out.split("parameters")[-1]
    assert rows[-1][-1] == "1.000", "the deepest network is the measure of cost"
    (said,) = re.findall(r"a checkpoint +([\d.]+) MB", out)
    train_run(config, tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("*.pt")
    assert float(said) == pytest.approx(checkpoint.stat().st_size / 1e6, rel=0.03)
    (images_per_s,) = re.findall(r"(\d+) images/s", out)
    assert int(images_per_s) > 0


def test_a_dry_run_downloads_nothing(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    monkeypatch.setattr(dry_run, "MEASURED_S", 0.2)
    monkeypatch.delattr(data, "_load_archive")
    arguments = ("--dataset", "cifar100", "--width", "2", "--val-fraction", "0.1", "--dry-run")
    code, out, err = call(train, *arguments)
    assert (code, err) == (0, "")
    assert "45,000 training images of 32 pixels" in out
    assert re.search(r"^exit 4/4 +100 ", out, re.MULTILINE), "classes"


def test_the_digits_are_as_many_as_is_known() -> None:
    assert len(data.load_images("digits", None, "train").labels) == DATASETS["digits"].num_train_images


def test_a_dry_run_is_refused_as_the_run_would_be(tmp_path: Path, call: Call) -> None:
    arguments = ("--data-dir", tmp_path / "nowhere", "--outputs", tmp_path, "--dry-run")
    code, _, err = call(train, *arguments)
    assert code == 2
    assert "does not exist" in err
