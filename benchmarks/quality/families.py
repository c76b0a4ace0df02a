"""What search methods are compared on: made-up learning curves and recorded ones, both at no cost.

A family answers a configuration with a whole learning curve, and knows how good the configuration truly is.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
from scipy.optimize import minimize
from scipy.stats import qmc

from benchmarks.quality.curves import Curve, curves_path, load_curves
from byot.config import TrainConfig, comparable_after
from search.settings import grace_epochs
from search.space import DEFAULT_SPACE, Range, Role, Space

SyntheticName = Literal["acc", "peak", "loss"]
RecordedName = Literal["digits", "cifar100-10", "modern-e4", "modern-e8", "modern-e24", "reference-e40"]
SYNTHETIC, RECORDED = get_args(SyntheticName), get_args(RecordedName)

SYNTHETIC_EPOCHS = 27
SYNTHETIC_SPACE: Space = {
    **DEFAULT_SPACE,
    "beta": Range(1e-8, 1e-2, log=True),
    "lr": Range(1e-3, 1.0, log=True),
}
NOISE = 0.006  # standard deviation of one value of a synthetic curve
NUM_LOOKED_AT = 2**14  # configurations from which the best of a synthetic family is climbed to


class Run(NamedTuple):
    """One training of a configuration, as it will have gone when it is over."""

    values: list[float]  # one an epoch, larger is better; fewer than the family's epochs where it diverged
    truth: float  # what the configuration's last value is without noise


class Family(NamedTuple):
    """A space, a budget for each trial, and what training would give."""

    space: Space
    epochs: int
    train: Callable[[Role, dict[str, float], np.random.Generator], Run]
    best: float  # the best truth there is
    typical: float  # the mean truth of a random configuration
    grace: int  # epochs before our searches may stop a trial


class Shape(Protocol):
    def __call__(self, place: np.ndarray, epoch: np.ndarray | int) -> np.ndarray: ...


def load_family(name: str, curves_folder: Path) -> Family:
    """Raises FileNotFoundError where a recorded family was not recorded."""
    if name in SYNTHETIC:
        return synthetic_family(SHAPES[name])
    return recorded_family(curves_path(name, curves_folder))


def to_unit_cube(params: dict[str, float], space: Space) -> np.ndarray:
    """The place of a configuration, each parameter from 0 to 1; one below its range, as a beta of 0, is at 0."""

    def scaled(value: float, bounds: Range) -> float:
        low, high, value = bounds.low, bounds.high, max(value, bounds.low)
        if bounds.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)

    return np.array([scaled(params[name], bounds) for name, bounds in space.items()])


# ---------------------------------------------------------------- synthetic


def _final(place: np.ndarray) -> np.ndarray:
    """The final quality of places [..., 4]: a tilted bowl whose bottom is in the middle of no axis."""
    a, t, b, lr = np.moveaxis(place, -1, 0)
    return (
        0.9
        - 1.2 * (a - 0.35) ** 2
        - 0.6 * (t - 0.3) ** 2 * (0.3 + a)
        - 0.5 * (b - 0.6) ** 2
        - 1.5 * (lr - 0.55) ** 2
        - 0.5 * (a - 0.35) * (lr - 0.55)
    )


def accuracy(place: np.ndarray, epoch: np.ndarray | int) -> np.ndarray:
    """Rises to the end; a high learning rate learns early, so that curves cross."""
    a, _, _, lr = np.moveaxis(place, -1, 0)
    return _final(place) * (1 - 0.85 * np.exp(-epoch / (1.5 + 7 * (1 - lr) ** 2 + 2 * a)))


def early_peak(place: np.ndarray, epoch: np.ndarray | int) -> np.ndarray:
    """A high learning rate shines at the second epoch and falls back: the early values mislead."""
    lr = place[..., 3]
    bump = 0.55 * np.maximum(0.0, lr - 0.2) * np.exp(-(((epoch - 2) / 3.5) ** 2))
    return _final(place) * (1 - 0.6 * np.exp(-epoch / (2 + 4 * (1 - lr)))) + bump


def negative_loss(place: np.ndarray, epoch: np.ndarray | int) -> np.ndarray:
    """A loss that falls and then rises again, the more the less hints regularise."""
    beta = place[..., 2]
    return -(1 - _final(place)) * (0.55 + 1.2 * np.exp(-epoch / 2.5) + 0.03 * epoch * (1.4 - beta))


SHAPES: dict[str, Shape] = {"acc": accuracy, "peak": early_peak, "loss": negative_loss}


def synthetic_family(shape: Shape, noise: float = NOISE) -> Family:
    def train(role: Role, params: dict[str, float], rng: np.random.Generator) -> Run:
        curve = shape(to_unit_cube(params, SYNTHETIC_SPACE), np.arange(1, SYNTHETIC_EPOCHS + 1))
        noisy = curve + noise * rng.standard_normal(SYNTHETIC_EPOCHS)
        return Run(noisy.tolist(), float(curve[-1]))

    size, grace = len(SYNTHETIC_SPACE), grace_epochs(SYNTHETIC_EPOCHS)  # there is no learning rate to drop
    places = qmc.Sobol(size, seed=0).random(NUM_LOOKED_AT)
    truths = shape(places, SYNTHETIC_EPOCHS)
    climbed = minimize(
        lambda place: -float(shape(place, SYNTHETIC_EPOCHS)), places[truths.argmax()], bounds=[(0.0, 1.0)] * size
    )
    return Family(SYNTHETIC_SPACE, SYNTHETIC_EPOCHS, train, -float(climbed.fun), float(truths.mean()), grace)


# ---------------------------------------------------------------- recorded


NUM_NEIGHBOURS = 4


class Recorded(NamedTuple):
    """A configuration that was trained, once for each seed."""

    runs: list[list[float]]  # val_accuracy by epoch
    truth: float


def recorded_family(path: Path) -> Family:
    """A proposal takes a mean of the curves trained around it, of each configuration one of its seeds at random.

    That is of the four nearest in the unit cube of the space, weighted by the inverse of their squared distance: the
    curve of a single one, the answer for its whole cell, would make the search a lottery for the best cell. Where the
    nearest diverged, so does the proposal. The settings that a search tries first have curves of their own. A
    configuration's truth is the mean of its last values over the seeds; a run that diverged counts as 0 % there.
    """
    recorded = load_curves(path)
    by_number: dict[int, list[Curve]] = {}
    for curve in recorded.curves:
        by_number.setdefault(curve.number, []).append(curve)
    found: dict[Role, list[Recorded]] = {"sampled": [], "reference": [], "control": []}
    places = []
    for same in by_number.values():
        runs = [curve.values["val_accuracy"] for curve in same]
        truth = float(np.mean([run[-1] if len(run) == recorded.epochs else 0.0 for run in runs]))
        found[same[0].role].append(Recorded(runs, truth))
        if same[0].role == "sampled":
            places.append(to_unit_cube(same[0].params, recorded.space))
    train = partial(_replay, found=found, places=np.array(places), space=recorded.space, epochs=recorded.epochs)
    # The control is another method: it is no answer to a search.
    best = max(one.truth for role in ("sampled", "reference") for one in found[role])
    typical = float(np.mean([one.truth for one in found["sampled"]]))
    grace = grace_epochs(recorded.epochs, comparable_after(TrainConfig.from_dict(recorded.header["config"])))
    return Family(recorded.space, recorded.epochs, train, best, typical, grace)


def _replay(
    role: Role,
    params: dict[str, float],
    rng: np.random.Generator,
    *,
    found: dict[Role, list[Recorded]],
    places: np.ndarray,
    space: Space,
    epochs: int,
) -> Run:
    if role != "sampled":
        (recorded,) = found[role]
        return Run(recorded.runs[rng.integers(len(recorded.runs))], recorded.truth)
    squared = ((places - to_unit_cube(params, space)) ** 2).sum(axis=1)
    around = [found["sampled"][number] for number in np.argsort(squared, kind="stable")[:NUM_NEIGHBOURS]]
    weights = 1 / (np.sort(squared)[:NUM_NEIGHBOURS] + 1e-9)
    runs = [recorded.runs[rng.integers(len(recorded.runs))] for recorded in around]
    truth = float(weights / weights.sum() @ np.array([recorded.truth for recorded in around]))
    whole = [len(run) == epochs for run in runs]
    if not whole[0]:
        return Run(runs[0], truth)
    curves = np.array([run for run, is_whole in zip(runs, whole, strict=True) if is_whole])
    shares = weights[whole] / weights[whole].sum()
    return Run((shares @ curves).tolist(), truth)
