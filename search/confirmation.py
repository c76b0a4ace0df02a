"""Which configuration is best, judged over seeds: a sequential test that says when it is clear, and how clear.

Every configuration (an arm) is run with the same fresh seeds. A seed sets the weights, the order of the images, their
augmentation and the validation split alike for all, so a round, one run of each arm with one seed, is a block: what the
seed does to all of them cancels in their differences.

After each round from the second on, all arms still in are compared pairwise: Tukey's simultaneous intervals in the
two-way layout arm + round, with the pooled variance of the residuals. The error of 5 % is shared equally among all
the looks that may be taken (Bonferroni), so that stopping early does not raise it. An arm that is resolved to be worse
than the leader is out; when the leader stands alone, or the seeds are used up, the test ends.

Equal variances and normal residuals are assumed. Intervals: Tukey, The Problem of Multiple Comparisons (1953); looks:
Jennison and Turnbull, Group Sequential Methods (2000), chapter 2.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy.stats import studentized_range

ERROR = 0.05  # of calling any two equal arms different, over all pairs and looks together
FIRST_LOOK = 2  # rounds; one says nothing of the noise
POWER_FACTOR = 2 * (1.960 + 0.842) ** 2  # runs an arm = this * (sd / gap)^2: two-sided 5 %, power 80 %
MOST_RUNS_NAMED = 200


class Comparison(NamedTuple):
    """The leader of a round against another arm. Points of the metric, larger is better."""

    leader: str
    other: str
    difference: float  # of the means, never negative
    half_width: float  # of the simultaneous confidence interval
    sd: float  # of a single run, what its seed does to all arms taken out
    rounds: int

    @property
    def resolved(self) -> bool:
        return self.difference > self.half_width

    @property
    def runs_needed(self) -> int:
        """More runs of each of the two that would resolve a difference of this size, in four cases of five."""
        if self.difference == 0:
            return MOST_RUNS_NAMED + 1
        needed = 1 + math.ceil(POWER_FACTOR * (self.sd / self.difference) ** 2)
        return min(max(1, needed - self.rounds), MOST_RUNS_NAMED + 1)


class Judgement(NamedTuple):
    """What the rounds so far allow to say."""

    leader: str
    rounds: int  # complete for all arms still in
    remaining: list[str]  # arms still in, the leader first, then by their means
    comparisons: dict[str, Comparison]  # other arm -> the last in which it took part
    is_over: bool


def judge(values: Mapping[str, Sequence[float]], max_rounds: int, least_sd: float = 0.0) -> Judgement:
    """Judge the runs of each arm, in the order of the seeds; arms may have as many as they like.

    What is found depends on the values alone: after a restart the same arms are in and out. An arm whose run diverged
    (NaN) is out. `least_sd` is the step in which the metric is measured, such as one image of the validation split: a
    spread below it is a coincidence.
    """
    remaining = list(values)
    comparisons: dict[str, Comparison] = {}
    rounds = 0
    while len(remaining) > 1 and rounds < max_rounds and all(len(values[arm]) > rounds for arm in remaining):
        rounds += 1
        remaining = [arm for arm in remaining if math.isfinite(values[arm][rounds - 1])] or remaining[:1]
        if rounds < FIRST_LOOK or len(remaining) < 2:
            continue
        table = np.array([values[arm][:rounds] for arm in remaining])
        num_looks = max_rounds - FIRST_LOOK + 1
        found = compare_with_leader(remaining, table, len(values), num_looks, least_sd)
        comparisons |= {one.other: one for one in found}
        remaining = [found[0].leader, *(one.other for one in found if not one.resolved)]
    leader, *others = sorted(remaining, key=lambda arm: -_mean(values[arm][:rounds]))
    is_over = not others or rounds >= max_rounds
    return Judgement(leader, rounds, [leader, *others], comparisons, is_over)


def compare_with_leader(
    arms: list[str], table: np.ndarray, num_arms: int, num_looks: int, least_sd: float
) -> list[Comparison]:
    """The best arm of a table [arms, rounds] against each other one, next best first."""
    num, rounds = table.shape
    means = table.mean(axis=1)
    residuals = table - means[:, None] - table.mean(axis=0) + table.mean()
    degrees = (num - 1) * (rounds - 1)
    sd = max(least_sd, math.sqrt(float((residuals**2).sum()) / degrees))
    half_width = studentized_quantile(num_arms, degrees, ERROR / num_looks) * sd / math.sqrt(rounds)
    leader, *others = np.argsort(-means, kind="stable")
    return [
        Comparison(arms[leader], arms[other], float(means[leader] - means[other]), half_width, sd, rounds)
        for other in others
    ]


@cache
def studentized_quantile(num_arms: int, degrees: int, error: float) -> float:
    return float(studentized_range.isf(error, num_arms, degrees))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else -math.inf
