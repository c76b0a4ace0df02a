"""How many trials do best on one GPU, or on one CPU's cores: measured by letting so many train at once.

A narrow network leaves most of a large GPU idle; several trials on it are quicker together, up to a number that depends
on the network, the batch size and the GPU.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from byot.data import LabelledImages
from byot.system.stopping import OutOfMemoryError
from byot.trainer import Trainer
from search.settings import share_of_gpu
from search.trial import TrialSetup

MOST_TRIALS_PER_GPU = 16
WARMUP_S, MEASURED_S = 3.0, 4.0
GAIN = 1.05  # in images a second, at least
PROBED_STEPS = 60  # steps an epoch of the images that are trained on, over and over
HARMLESS_LR = 1e-6  # so that a search whose lr makes trials diverge can still be timed

Measure = Callable[[int], float | None]


class Throughput(NamedTuple):
    """So many trials at once, and the images a second that all of them train on together."""

    trials: int
    images_per_s: float


class EnoughError(Exception):
    """The time to train for is over."""


class Probe:
    """One trial's share of the machine, kept busy on demand at full resolution; each is an actor of its own."""

    def __init__(self, setup: TrialSetup, few: LabelledImages) -> None:
        torch.set_num_threads(setup.threads)
        harmless = setup.base.with_settings(epochs=10_000, lr=HARMLESS_LR)
        self._trainer = Trainer(harmless, few)
        self._trainer.epoch = harmless.epochs - 1_000  # near the end images are whole whatever the recipe

    def images_in(self, seconds: float) -> float | None:
        """Images a second, training for so long; None for want of memory."""
        trainer, steps = self._trainer, 0
        started = time.perf_counter()

        def on_batch(done: int, images: int) -> None:
            nonlocal steps
            steps += 1
            if time.perf_counter() - started > seconds:
                raise EnoughError

        try:
            list(trainer.epochs(on_batch))
        except OutOfMemoryError:
            return None
        except EnoughError:
            if trainer.device.type == "cuda":
                torch.cuda.synchronize()
        return steps * trainer.config.batch_size / (time.perf_counter() - started)


def few_images(data: LabelledImages, batch_size: int) -> LabelledImages:
    """Enough images for some steps an epoch, repeated where there are not so many."""
    chosen = np.arange(PROBED_STEPS * batch_size) % len(data.labels)
    return LabelledImages(data.images[chosen], data.labels[chosen])


def measure_on_ray(setup: TrialSetup, data: LabelledImages, *, cpus: int, gpus: float) -> tuple[Measure, list[Any]]:
    """A function that lets so many trials train at once, and the actors in which they do, to be killed in the end.

    Ray has been started. An actor is made when it is first needed.
    """
    import ray
    from ray.exceptions import RayError

    few = ray.put(few_images(data, setup.base.batch_size))
    actors: list[Any] = []

    def measure(trials: int) -> float | None:
        while len(actors) < trials:
            actors.append(ray.remote(num_cpus=cpus, num_gpus=gpus)(Probe).remote(setup, few))
        try:
            for seconds in (WARMUP_S, MEASURED_S):
                found = ray.get([actor.images_in.remote(seconds) for actor in actors[:trials]])
        except RayError:  # an actor died, of memory most likely
            return None
        return None if None in found else sum(found)

    return measure, actors


def gains(fewer: Throughput, more: Throughput) -> bool:
    """Whether one more trial makes all of them together so much quicker that it is worth its memory."""
    return more.images_per_s >= GAIN * fewer.images_per_s


def raise_until_it_gains_nothing(measure: Measure, most: int) -> list[Throughput]:
    """Measure one trial, two, and so on, as long as one more makes all together quicker; the last may not have."""
    found: list[Throughput] = []
    for trials in range(1, most + 1):
        images_per_s = measure(trials)
        if images_per_s is None:
            break
        found.append(Throughput(trials, images_per_s))
        if trials > 1 and not gains(*found[-2:]):
            break
    return found


def best_number(found: list[Throughput]) -> int:
    """The fewest trials that nothing beats by more than the gain asked for; 1 where nothing could be measured."""
    best = 1
    for fewer, more in pairwise(found):
        if not gains(fewer, more):
            break
        best = more.trials
    return best


def find_trials_per_gpu(setup: TrialSetup, data: LabelledImages, cpus: int, num_cpus: int) -> list[Throughput]:
    """Measure on one GPU of a machine or cluster with so many CPUs, of which each trial takes `cpus`."""
    import ray

    most = min(MOST_TRIALS_PER_GPU, num_cpus // cpus)
    measure, actors = measure_on_ray(setup, data, cpus=cpus, gpus=share_of_gpu(MOST_TRIALS_PER_GPU))
    try:
        return raise_until_it_gains_nothing(measure, most)
    finally:
        for actor in actors:
            ray.kill(actor)
