"""Provides what search methods are compared on: made-up learning curves and recorded ones, both at no cost.

A family answers a configuration with a whole learning curve, and knows how good the configuration truly is.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.stats import qmc

from benchmarks.quality.curves import FAMILIES, RECORDED_SPACE, Curve, curves_path, load_curves
from byot.config import comparable_after
from byot.search_files import Range, Role, Space
from search.settings import grace_epochs

SYNTHETIC_EPOCHS = 27
SYNTHETIC_SPACE: Space = {
    **RECORDED_SPACE,
    "beta": Range(1e-8, 1e-2, log=True),
    "lr": Range(1e-3, 1.0, log=True),
}
NOISE = 0.006  # standard deviation of one value of a synthetic curve
NUM_LOOKED_AT = 2**14  # configurations from which the best of a synthetic family is climbed to
NUM_NEIGHBOURS = 4  # recorded configurations whose curves make a proposal's
Shape = Callable[[np.ndarray, np.ndarray | int], np.ndarray]  # of a place [..., 4] in the unit cube, and an epoch


class Run(NamedTuple):
    """One training of a configuration, as it will have gone when it is over."""

    values: list[float]  # one an epoch, larger is better; fewer than the family's epochs where it diverged
    truth: float  # what the configuration's last value is without noise


class Family(NamedTuple):
    """A space, a budget for each trial, and what training would give."""

    space: Space
    epochs: int
    train: Callable[[dict[str, float], np.random.Generator], Run]
    best: float  # the best truth there is
    typical: float  # the mean truth of a random configuration
    grace: int  # epochs before our searches may stop a trial


def load_family(name: str, curves_folder: Path) -> Family:
    """Make the family of this name. Raises FileNotFoundError where a recorded family was not recorded."""
    return synthetic_family(SHAPES[name]) if name in SHAPES else recorded_family(curves_path(name, curves_folder))


def to_unit_cube(params: dict[str, float], space: Space) -> np.ndarray:
    """Scale each parameter to its place from 0 to 1."""
    return np.array([bounds.place(params[name]) for name, bounds in space.items()])


# ---------------------------------------------------------------- synthetic


def _final(place: np.ndarray) -> np.ndarray:
    """Compute the final quality: a tilted bowl whose bottom is in the middle of no axis."""
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
    """Rise to the end; a high learning rate learns early, so that curves cross."""
    a, _, _, lr = np.moveaxis(place, -1, 0)
    return _final(place) * (1 - 0.85 * np.exp(-epoch / (1.5 + 7 * (1 - lr) ** 2 + 2 * a)))


def early_peak(place: np.ndarray, epoch: np.ndarray | int) -> np.ndarray:
    """Let a high learning rate shine at the second epoch and fall back: the early values mislead."""
    lr = place[..., 3]
    bump = 0.55 * np.maximum(0.0, lr - 0.2) * np.exp(-(((epoch - 2) / 3.5) ** 2))
    return _final(place) * (1 - 0.6 * np.exp(-epoch / (2 + 4 * (1 - lr)))) + bump


def negative_loss(place: np.ndarray, epoch: np.ndarray | int) -> np.ndarray:
    """Let a loss fall and then rise again, the more the less hints regularise."""
    beta = place[..., 2]
    return -(1 - _final(place)) * (0.55 + 1.2 * np.exp(-epoch / 2.5) + 0.03 * epoch * (1.4 - beta))


SHAPES: dict[str, Shape] = {"acc": accuracy, "peak": early_peak, "loss": negative_loss}
SYNTHETIC, RECORDED = tuple(SHAPES), tuple(name for name, family in FAMILIES.items() if family.num_configurations)


def synthetic_family(shape: Shape) -> Family:
    def train(params: dict[str, float], rng: np.random.Generator) -> Run:
        curve = shape(to_unit_cube(params, SYNTHETIC_SPACE), np.arange(1, SYNTHETIC_EPOCHS + 1))
        return Run((curve + NOISE * rng.standard_normal(SYNTHETIC_EPOCHS)).tolist(), float(curve[-1]))

    size, grace = len(SYNTHETIC_SPACE), grace_epochs(SYNTHETIC_EPOCHS)  # there is no learning rate to drop
    places = qmc.Sobol(size, seed=0).random(NUM_LOOKED_AT)
    truths = shape(places, SYNTHETIC_EPOCHS)
    climbed = minimize(
        lambda place: -float(shape(place, SYNTHETIC_EPOCHS)), places[truths.argmax()], bounds=[(0.0, 1.0)] * size
    )
    return Family(SYNTHETIC_SPACE, SYNTHETIC_EPOCHS, train, -float(climbed.fun), float(truths.mean()), grace)


# ---------------------------------------------------------------- recorded


def recorded_family(path: Path) -> Family:
    """Answer a proposal with the mean of the curves trained around it.

    These are the four nearest in the unit cube of the space, one seed of each drawn at random, weighted by the inverse
    of their squared distance. With the nearest alone a search would be a lottery for the best cell. Where the nearest
    diverged, so does the proposal. A configuration's truth is the mean of its last values over the seeds; a run that
    diverged counts as 0 % there.
    """
    recorded = load_curves(path)
    space, epochs = recorded.space, recorded.config.epochs

    found: dict[Role, list[list[Curve]]] = {"sampled": [], "reference": [], "control": []}
    for same in recorded.by_number().values():
        found[same[0].role].append(same)
    places = np.array([to_unit_cube(same[0].params, space) for same in found["sampled"]])

    def truth_of(same: list[Curve]) -> float:
        runs = [curve.values["val_accuracy"] for curve in same]
        return float(np.mean([run[-1] if len(run) == epochs else 0.0 for run in runs]))

    def train(params: dict[str, float], rng: np.random.Generator) -> Run:
        squared = ((places - to_unit_cube(params, space)) ** 2).sum(axis=1)
        nearest = np.argsort(squared, kind="stable")[:NUM_NEIGHBOURS]
        around, weights = [found["sampled"][number] for number in nearest], 1 / (squared[nearest] + 1e-9)
        runs = [same[rng.integers(len(same))].values["val_accuracy"] for same in around]
        truth = float(weights / weights.sum() @ np.array([truth_of(same) for same in around]))
        whole = [len(run) == epochs for run in runs]
        if not whole[0]:
            return Run(runs[0], truth)
        curves = np.array([run for run, is_whole in zip(runs, whole, strict=True) if is_whole])
        return Run((weights[whole] / weights[whole].sum() @ curves).tolist(), truth)

    # The control is another method: it is no answer to a search.
    best = max(truth_of(same) for same in found["sampled"] + found["reference"])
    typical = float(np.mean([truth_of(same) for same in found["sampled"]]))
    return Family(space, epochs, train, best, typical, grace_epochs(epochs, comparable_after(recorded.config)))
