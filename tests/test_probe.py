"""How many trials share a GPU: measured where it can be, decided as measured."""

import time

import pytest
import ray

from byot.config import TrainConfig
from byot.data import load_images
from search.probe import Probe, few_images, fewest_that_gain, find_trials_per_gpu
from search.system.resources import Resources, running_ray

BASE = TrainConfig(dataset="digits", width=2, device="cpu", precision="fp32", batch_size=64)


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
    found, told = fewest_that_gain(lambda trials: speeds[trials - 1], most=len(speeds))
    assert found == best
    assert told == speeds[:measured]


def test_a_probe_trains_for_the_time_given() -> None:
    probe = Probe(BASE, few_images(load_images("digits", None, "train"), BASE.batch_size), threads=1)
    before = probe._trainer.model.trunk.conv1.weight.clone()
    images_per_s = probe.images_in(0.5)
    assert images_per_s is not None
    assert images_per_s > 0
    assert probe._trainer.step > 0
    assert not before.equal(probe._trainer.model.trunk.conv1.weight)


@pytest.mark.slow
def test_a_number_is_found_on_a_gpu_that_ray_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray is told of a GPU; the trials train on the CPU, two at once at most."""
    monkeypatch.setattr("search.probe.WARMUP_S", 0.2)
    monkeypatch.setattr("search.probe.MEASURED_S", 0.5)
    resources = Resources(1, 1, 1.0, num_cpus=2, num_gpus=1)
    with running_ray(resources):
        assert find_trials_per_gpu(BASE, load_images("digits", None, "train"), resources, most=2) in (1, 2)
        told = capsys.readouterr().out
        assert " with 1, " in told
        assert " with 2)" in told
        deadline = time.monotonic() + 30
        while ray.available_resources().get("GPU", 0) < 1:  # the trials will need all of it
            assert time.monotonic() < deadline, "the probes still hold the GPU"
            time.sleep(0.1)
