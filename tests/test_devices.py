"""This device computes what the CPU does: the same steps from the same weights, in each way and precision.

Held to the CPU's float32 steps without acceleration are the mean losses over the steps, and what the network says of
the images after them. The learning rate is small, so that rounding does not grow. On a GPU the network is the published
one; `make bench-gpu` begins with these tests.
"""

from functools import cache

import numpy as np
import pytest
import torch

from byot.config import Acceleration, Precision, TrainConfig
from byot.data import LabelledImages
from byot.trainer import Trainer
from tests.helpers import random_pixels

ON_GPU = torch.cuda.is_available()
WAYS: tuple[Acceleration, ...] = ("none", "graph", "compile") if ON_GPU else ("none",)
LARGEST: dict[Precision, float] = {"fp32": 1e-3, "bf16": 2e-2}  # relative difference; TF32 multiplies with 10 bits
CONFIG = TrainConfig(
    recipe="reference", width=64 if ON_GPU else 4, batch_size=128 if ON_GPU else 32, epochs=10_000, lr=1e-3
)
NUM_IMAGES = CONFIG.batch_size * (20 if ON_GPU else 3)


def measure(config: TrainConfig) -> np.ndarray:
    """Train one epoch: the mean label losses of the classifiers, the whole loss, and the NLLs afterwards."""
    labels = np.random.default_rng(0).integers(0, 100, NUM_IMAGES)
    images = LabelledImages(random_pixels(NUM_IMAGES), labels)
    trainer = Trainer(config, images)
    metrics = next(iter(trainer))
    return np.array([*metrics.label, metrics.loss, *trainer.evaluate_on(images).nll])


@cache
def measure_on_cpu() -> np.ndarray:
    return measure(CONFIG.with_settings(device="cpu", precision="fp32", acceleration="none"))


@pytest.mark.parametrize("precision", LARGEST)
@pytest.mark.parametrize("way", WAYS)
def test_steps_are_those_of_the_cpu(way: Acceleration, precision: Precision) -> None:
    found = measure(CONFIG.with_settings(acceleration=way, precision=precision))
    np.testing.assert_allclose(found, measure_on_cpu(), rtol=LARGEST[precision])


def test_a_step_that_is_slightly_wrong_would_be_found_out() -> None:
    wrong = measure(CONFIG.with_settings(device="cpu", precision="fp32", acceleration="none", lr=2e-2))
    assert not np.allclose(wrong, measure_on_cpu(), rtol=LARGEST["fp32"])
