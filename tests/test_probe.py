"""How many trials share a GPU: measured where it can be, decided as measured, refused where it cannot be."""

import time
from pathlib import Path

import pytest
import ray

from byot.config import TrainConfig
from byot.data import load_images
from search.probe import (
    Probe,
    Throughput,
    best_number,
    few_images,
    find_trials_per_gpu,
    raise_until_it_gains_nothing,
)
from search.settings import SearchSettings
from search.system.resources import Share, Slots, share, start_ray
from search.trial import TrialSetup
from tests.helpers import assert_one_sentence, run_command

BASE = TrainConfig(dataset="digits", width=2, device="cpu", precision="fp32", batch_size=64)
SETUP = TrialSetup(BASE, Path("unused"), "val_accuracy", 1, timed=None)


@pytest.mark.parametrize(
    ("speeds", "best", "measured"),
    [
        ([100, 180, 240, 250, 260], 3, 4),
        ([100, 90, 300], 1, 2),
        ([100, 180, None], 2, 2),
        ([None], 1, 0),
        ([100, 200, 300], 3, 3),
    ],
)
def test_trials_are_added_as_long_as_it_gains(speeds: list[float | None], best: int, measured: int) -> None:
    found = raise_until_it_gains_nothing(lambda trials: speeds[trials - 1], most=len(speeds))
    assert [row.trials for row in found] == list(range(1, measured + 1))
    assert best_number(found) == best


def test_the_choice_looks_at_what_was_measured_alone() -> None:
    assert best_number([]) == 1
    assert best_number([Throughput(1, 100), Throughput(2, 104), Throughput(3, 500)]) == 1


def test_a_probe_trains_for_the_time_given() -> None:
    probe = Probe(SETUP, few_images(load_images("digits", None, "train"), BASE.batch_size))
    before = probe._trainer.model.trunk.conv1.weight.clone()
    images_per_s = probe.images_in(0.5)
    assert images_per_s is not None
    assert images_per_s > 0
    assert probe._trainer.step > 0
    assert not before.equal(probe._trainer.model.trunk.conv1.weight)


@pytest.mark.slow
def test_a_number_is_found_on_a_gpu_that_ray_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray is told of a GPU; the trials train on the CPU, two at once at most."""
    monkeypatch.setattr("search.probe.WARMUP_S", 0.2)
    monkeypatch.setattr("search.probe.MEASURED_S", 0.5)
    start_ray(Slots(2, 1, 1.0, num_cpus=2, num_gpus=1))
    try:
        found = find_trials_per_gpu(SETUP, load_images("digits", None, "train"), cpus=1, num_cpus=2)
        assert [row.trials for row in found] == [1, 2]
        assert all(row.images_per_s > 0 for row in found)
        deadline = time.monotonic() + 30
        while ray.available_resources().get("GPU", 0) < 1:  # the trials will need all of it
            assert time.monotonic() < deadline, "the probes still hold the GPU"
            time.sleep(0.1)
    finally:
        ray.shutdown()


@pytest.mark.parametrize("number", range(1, 100))
def test_so_many_trials_get_a_gpu(number: int) -> None:
    settings = SearchSettings(trials_per_gpu=str(number))
    assert share(Share(1, settings.gpus_asked_for), 200, 2, "here").max_concurrent == 2 * number
    share_each = settings.gpus_asked_for
    assert share_each is not None
    assert number * round(share_each * 10_000) <= 10_000, "Ray counts in ten-thousandths, rounded to the nearest"


def test_auto_begins_with_a_whole_gpu() -> None:
    assert SearchSettings(trials_per_gpu="auto").gpus_asked_for is None
    assert SearchSettings(gpus_per_trial=0.5).gpus_asked_for == 0.5


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--trials-per-gpu", "0"), "trials_per_gpu"),
        (("--trials-per-gpu", "many"), "trials_per_gpu"),
        (("--trials-per-gpu", "2", "--gpus-per-trial", "0.5"), "in two ways"),
        (("--trials-per-gpu", "2", "--device", "cpu"), "0.5 GPUs each are asked for"),
    ],
)
def test_bad_command_lines(tmp_path: Path, flags: tuple[str, ...], word: str) -> None:
    done = run_command(["--dataset", "digits", *flags], cwd=tmp_path, script="search/tune.py")
    assert done.returncode == 2
    assert_one_sentence(done.stderr, word)
