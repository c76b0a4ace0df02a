"""Measures how many trials do best on one GPU, or on one CPU's cores, by letting so many train at once.

A narrow network leaves most of a large GPU idle; several trials on it are quicker together, up to a number that depends
on the network, the batch size and the GPU.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from byot.config import TrainConfig
from byot.data import LabelledImages
from byot.system.stopping import OutOfMemoryError
from byot.trainer import Trainer
from search.system.resources import Resources, round_down

MOST_TRIALS_PER_GPU = 16
WARMUP_S, MEASURED_S = 3.0, 4.0
ANSWER_TIMEOUT_S = 600.0  # of a trial that finds no room on the node
GAIN = 1.05  # in images a second, at least
PROBED_STEPS = 60  # steps an epoch of the images that are trained on, over and over
HARMLESS_LR = 1e-6  # so that a search whose lr makes trials diverge can still be timed

Measure = Callable[[int], float | None]


class EnoughError(Exception):
    """The time to train for is over."""


class Probe:
    """One trial's share of the machine, kept busy on demand at full resolution; each is an actor of its own."""

    def __init__(self, base: TrainConfig, few: LabelledImages, threads: int) -> None:
        torch.set_num_threads(threads)
        harmless = base.with_settings(epochs=10_000, lr=HARMLESS_LR)
        self._trainer = Trainer(harmless, few)
        self._trainer.epoch = harmless.epochs - 1_000  # near the end images are whole whatever the recipe

    def images_in(self, seconds: float) -> float | None:
        """Train for so long and return the images a second; None for want of memory."""
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
    """Take enough images for some steps an epoch, repeated where there are not so many."""
    chosen = np.arange(PROBED_STEPS * batch_size) % len(data.labels)
    return data._replace(images=data.images[chosen], labels=data.labels[chosen])


@contextmanager
def probing(base: TrainConfig, data: LabelledImages, *, cpus: int, gpus: float) -> Iterator[Measure]:
    """Yield what lets so many trials train at once, on a Ray that has been started, and measures them.

    It returns the images a second of all together, None for want of memory.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    few = ray.put(few_images(data, base.batch_size))
    node = next(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= gpus)
    here = NodeAffinitySchedulingStrategy(node, soft=False)  # else Ray may spread them over the nodes
    probe = ray.remote(Probe).options(num_cpus=cpus, num_gpus=round_down(gpus), scheduling_strategy=here)
    actors: list[Any] = []

    def measure(trials: int) -> float | None:
        while len(actors) < trials:
            actors.append(probe.remote(base, few, cpus))
        try:
            for seconds in (WARMUP_S, MEASURED_S):
                answers = [actor.images_in.remote(seconds) for actor in actors[:trials]]
                found = ray.get(answers, timeout=ANSWER_TIMEOUT_S)
        except ray.exceptions.RayError:  # an actor died, of memory most likely, or found no room
            return None
        return None if None in found else sum(found)

    try:
        yield measure
    finally:
        for actor in actors:
            ray.kill(actor)


def fewest_that_gain(measure: Measure, most: int) -> tuple[int, list[float]]:
    """Measure one trial, two, and so on, as long as one more makes all together so much quicker that it is worth it.

    Returns the last number that did, 1 where nothing could be measured, and the speeds of one trial, two, …
    """
    speeds: list[float] = []
    while len(speeds) < most and (speed := measure(len(speeds) + 1)) is not None:
        speeds.append(speed)
        if len(speeds) > 1 and speed < GAIN * speeds[-2]:
            return len(speeds) - 1, speeds
    return max(1, len(speeds)), speeds


def find_trials_per_gpu(base: TrainConfig, data: LabelledImages, resources: Resources, most: int) -> int:
    """Measure how many trials, up to `most`, are quickest together on one GPU, and tell."""
    with probing(base, data, cpus=resources.cpus, gpus=1 / MOST_TRIALS_PER_GPU) as measure:
        best, speeds = fewest_that_gain(measure, min(most, MOST_TRIALS_PER_GPU))
    told = ", ".join(f"{speed:.0f} with {trials}" for trials, speed in enumerate(speeds, start=1))
    print(f"trials a GPU: {best} (images/s in all: {told or 'nothing could be measured'})", flush=True)
    return best
