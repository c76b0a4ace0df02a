"""A trial of several seeds trains them side by side, and goes on after a kill as if nothing had happened."""

from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from byot.config import TrainConfig
from byot.data import LabelledImages, load_images, split_validation
from byot.system.files import read_json_lines
from search.trial import mean_record, train_seeds

CONFIG = TrainConfig(dataset="digits", width=2, epochs=3, val_fraction=0.2, device="cpu", seed=5)
TIMES = ("elapsed_s", "images_per_s")
Data = tuple[LabelledImages, LabelledImages]


@pytest.fixture(scope="module")
def data() -> Data:
    images = load_images("digits", None, "train")
    images = LabelledImages(images.images[:300], images.labels[:300])
    train, val = split_validation(images, fraction=CONFIG.val_fraction, seed=0)
    assert val is not None
    return train, val


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def test_several_seeds_are_the_mean_of_each_alone(tmp_path: Path, data: Data):
    together = list(train_seeds(CONFIG, 2, tmp_path / "both", *data, timed=None))
    alone = [
        list(train_seeds(CONFIG.with_settings(seed=seed), 1, tmp_path / str(seed), *data, timed=None))
        for seed in (5, 6)
    ]
    assert alone[0] != alone[1]
    for record, first, second in zip(together, *alone, strict=True):
        for name in ("val_accuracy", "val_accuracy_1", "val_nll_ensemble", "train_loss"):
            assert record[name] == pytest.approx(fmean((first[name], second[name])))
    assert [record["epoch"] for record in together] == [1, 2, 3]
    assert read_json_lines(tmp_path / "both" / "metrics.jsonl") == together
    assert {path.name for path in (tmp_path / "both").glob("seed-*")} == {"seed-5", "seed-6"}


@pytest.mark.parametrize("epochs_before", [1, 2])
def test_it_goes_on_exactly_where_it_was_stopped(tmp_path: Path, data: Data, epochs_before: int):
    whole = list(train_seeds(CONFIG, 2, tmp_path / "whole", *data, timed=None))
    broken = tmp_path / "broken"
    list(islice(train_seeds(CONFIG, 2, broken, *data, timed=None), epochs_before))
    # The kill left the first seed an epoch ahead of the second, and the means a line short.
    ahead = train_seeds(CONFIG, 1, broken / "seed-5", *data, timed=None)
    list(islice(ahead, epochs_before + 1))
    lines = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken / "metrics.jsonl").write_text("".join(lines[:-1]))
    resumed = list(train_seeds(CONFIG, 2, broken, *data, timed=None))
    assert timeless(resumed) == timeless(whole)
    assert timeless(read_json_lines(broken / "metrics.jsonl")) == timeless(whole)


def test_mean_record():
    first = {"epoch": 3, "val_accuracy": 70.0, "elapsed_s": 2.0}
    second = {"epoch": 3, "val_accuracy": 72.0, "elapsed_s": 3.0}
    assert mean_record([first]) is first
    expected = {"epoch": 3, "val_accuracy": 71.0, "elapsed_s": 5.0}
    assert mean_record([first, second]) == expected
    assert mean_record([first | {"val_exit_accuracy": 60.0}, second]) == expected, "an older version measured less"
