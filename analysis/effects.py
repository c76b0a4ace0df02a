"""Fits what each searched parameter does: a Gaussian process over the trials that reached their last epoch.

The process knows the noise: trials of the same setting would differ, and it finds out by how much. What a parameter
does is the mean of the fitted surface over the other parameters, with a 95 % band; where the band is wide, or a level
line fits into it, the trials do not say that the parameter matters. All of it is within the values of these trials:
where every trial was stopped early nothing is fitted.
"""

import warnings
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.trials import rank
from byot.search_files import Range, SearchRecord, is_inside, to_unit

FEWEST_TRIALS = 8
DEFAULT_MARGIN = 0.3  # points; of searches that recorded none
NUM_POINTS, NUM_OTHERS = 41, 64  # of a parameter's range; of the other parameters', over which the mean is taken
LENGTHS = (0.1, 10.0)  # of the ranges, over which the metric changes: at the longest it hardly does
# Standard errors on each side of the mean. 1.96 would be right if noise and smoothness were known. They are fitted to
# the same trials, so 1.96 held the truth of made-up searches in only 86 to 92 cases of 100.
BAND = 2.4
NOISES = (1e-3, 1.0)  # of the variance of the trials' values


def find_margin(search: SearchRecord) -> float:
    """Return the margin in the metric's unit: settings that differ by less count as equal."""
    return to_unit(search.metric, float(search.settings.get("margin", DEFAULT_MARGIN)))


class Effect(NamedTuple):
    """What a parameter does to the metric, at values from the least to the greatest of the trials."""

    bounds: Range
    values: np.ndarray  # [P]
    mean: np.ndarray  # [P], in the metric's unit
    half_width: np.ndarray  # [P], of the 95 % band

    @property
    def is_flat(self) -> bool:
        """Whether a level line fits into the band: no value is shown to be better than another."""
        return bool((self.mean - self.half_width).max() <= (self.mean + self.half_width).min())

    def near_best(self, mode: str, margin: float) -> tuple[float, float]:
        """Find the ends of the values around the best whose mean is within the margin of it."""
        behind = self.mean.max() - self.mean if mode == "max" else self.mean - self.mean.min()
        low = high = int(behind.argmin())
        while low > 0 and behind[low - 1] <= margin:
            low -= 1
        while high < len(behind) - 1 and behind[high + 1] <= margin:
            high += 1
        return float(self.values[low]), float(self.values[high])


def fit_effects(search: SearchRecord, trials: pd.DataFrame) -> dict[str, Effect]:
    """Fit what each parameter with a range does; nothing where there are too few trials for that.

    Deep supervision alone, another method, is left out.
    """
    bounds = {name: found for name, found in search.space.items() if isinstance(found, Range)}
    whole = rank(trials, search.metric)
    whole = whole[[is_inside(bounds, params) for params in whole.to_dict("records")]]  # the reference's may lie outside
    if not bounds or len(whole) < FEWEST_TRIALS or whole[search.metric].nunique() < 2:
        return {}
    from scipy.stats import qmc
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    places = np.array([[found.place(value) for value in whole[name]] for name, found in bounds.items()]).T
    values = whole[search.metric].to_numpy(dtype=float)
    centre, scale = values.mean(), values.std()
    smooth = Matern([1.0] * len(bounds), LENGTHS, nu=2.5)  # smoother ones are surer than they should be
    kernel = ConstantKernel(1.0, (0.1, 10.0)) * smooth + WhiteKernel(0.3, NOISES)
    process = GaussianProcessRegressor(kernel, n_restarts_optimizer=3, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its bound: a parameter that does nothing
        process.fit(places, (values - centre) / scale)
    process.kernel_ = process.kernel_.k1  # the surface, without the noise of single trials
    lowest, highest = places.min(axis=0), places.max(axis=0)
    others = lowest + (highest - lowest) * qmc.Sobol(len(bounds), seed=0).random(NUM_OTHERS)
    effects = {}
    for i, (name, found) in enumerate(bounds.items()):
        line = np.linspace(lowest[i], highest[i], NUM_POINTS)
        mean, sd = np.empty(NUM_POINTS), np.empty(NUM_POINTS)
        for point, place in enumerate(line):
            at_place = others.copy()
            at_place[:, i] = place
            surface, covariance = process.predict(at_place, return_cov=True)
            mean[point], sd[point] = surface.mean(), max(0.0, covariance.mean()) ** 0.5
        at = np.array([found.at(place) for place in line.tolist()])
        effects[name] = Effect(found, at, centre + scale * mean, BAND * scale * sd)
    return effects
