"""Which configuration is best, judged over seeds: a sequential test that says when it is clear, and how clear.

Every configuration (an arm) is run with the same fresh seeds. A seed sets the weights, the order of the images, their
augmentation and the validation split alike for all, so a round, one run of each arm with one seed, is a block: what the
seed does to all of them cancels in their differences.

After each round from the third on, all arms still in are compared pairwise: Tukey's simultaneous intervals in the
two-way layout arm + round, with the pooled variance of the residuals. The error of 5 % is spent over the looks in
shares that add up to 1 however many there will be (Bonferroni), so that neither stopping early nor going on with more
seeds raises it. An arm that is resolved to be worse than the leader is out; when the leader stands alone, or the seeds
are used up, the test ends. An arm of which a run diverged is left out of all comparisons.

The 95 % are over seeds and splits of the same training images, not over other data. Equal variances and normal
residuals are assumed. Intervals: Tukey, The Problem of Multiple Comparisons (1953); looks: Jennison and Turnbull, Group
Sequential Methods (2000), chapter 2.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy.stats import studentized_range

ERROR = 0.05  # of calling any two equal arms different, over all pairs and looks together
FIRST_LOOK = 3  # rounds; fewer say next to nothing of the noise
EVEN_LOOKS = 5  # about so many looks have nearly equal shares of the error, then shares fall off
POWER = 0.842  # standard normal quantile of 80 %
MOST_RUNS_NAMED = 200


class Comparison(NamedTuple):
    """The leader of a round against another arm. Points of the metric, larger is better."""

    leader: str
    other: str
    difference: float  # of the means, never negative
    half_width: float  # of the simultaneous confidence interval
    sd: float  # of a single run, what its seed does to all arms taken out
    rounds: int
    num_compared: int  # arms still in when they were compared
    num_arms: int  # all there were

    @property
    def resolved(self) -> bool:
        return self.difference > self.half_width

    @property
    def runs_needed(self) -> int:
        """More runs of each of the two that would resolve a true difference of this size, in four cases of five."""

        def is_enough(rounds: int) -> bool:
            half_width = self.sd * interval_factor(rounds, self.num_compared, self.num_arms)
            return self.difference >= half_width + POWER * self.sd * math.sqrt(2 / rounds)

        more = range(1, MOST_RUNS_NAMED + 1)
        first = max(self.rounds, FIRST_LOOK - 1)
        return 1 + bisect_left(more, True, key=lambda added: is_enough(first + added)) + first - self.rounds


class Judgement(NamedTuple):
    """What the rounds so far allow to say."""

    rounds: int  # complete for all arms still in
    remaining: list[str]  # arms still in, the leader first, then by their means; empty if all diverged
    comparisons: dict[str, Comparison]  # other arm -> the last in which it took part
    diverged: list[str]
    is_over: bool

    @property
    def leader(self) -> str | None:
        return self.remaining[0] if self.remaining else None

    @property
    def resolved(self) -> bool:
        """Whether the leader is shown to be better than every arm that did not diverge, of which there is another."""
        return len(self.remaining) == 1 and bool(self.comparisons)


def judge(values: Mapping[str, Sequence[float]], max_rounds: int, least_sd: float = 0.0) -> Judgement:
    """Judge the runs of each arm, in the order of the seeds; arms may have as many as they like, NaN where it diverged.

    What is found depends on the values alone: after a restart the same arms are in and out, and more rounds change
    nothing of what the earlier ones showed. `least_sd` is the step in which the metric is measured, such as one image
    of the validation split: a spread below it is a coincidence.
    """
    diverged = [arm for arm, runs in values.items() if any(math.isnan(value) for value in runs)]
    remaining = [arm for arm in values if arm not in diverged]
    comparisons: dict[str, Comparison] = {}
    rounds = 0
    while len(remaining) > 1 and rounds < max_rounds and all(len(values[arm]) > rounds for arm in remaining):
        rounds += 1
        if rounds < FIRST_LOOK:
            continue
        table = np.array([values[arm][:rounds] for arm in remaining])
        found = compare_with_leader(remaining, table, len(values), least_sd)
        comparisons |= {one.other: one for one in found}
        remaining = [found[0].leader, *(one.other for one in found if not one.resolved)]
    remaining.sort(key=lambda arm: -float(np.mean(values[arm][:rounds])) if rounds else 0.0)
    for leader in remaining[:1]:
        comparisons.pop(leader, None)  # of an earlier round, in which another led
    return Judgement(rounds, remaining, comparisons, diverged, len(remaining) < 2 or rounds >= max_rounds)


def compare_with_leader(arms: list[str], table: np.ndarray, num_arms: int, least_sd: float) -> list[Comparison]:
    """The best arm of a table [arms, rounds] against each other one, next best first."""
    num, rounds = table.shape
    means = table.mean(axis=1)
    residuals = table - means[:, None] - table.mean(axis=0) + table.mean()
    sd = max(least_sd, math.sqrt(float((residuals**2).sum()) / ((num - 1) * (rounds - 1))))
    half_width = sd * interval_factor(rounds, num, num_arms)
    leader, *others = np.argsort(-means, kind="stable")
    return [
        Comparison(
            arms[leader], arms[other], float(means[leader] - means[other]), half_width, sd, rounds, num, num_arms
        )
        for other in others
    ]


@cache
def interval_factor(rounds: int, num_compared: int, num_arms: int) -> float:
    """Half the width of an interval at the look after so many rounds, in standard deviations of a single run.

    Tukey's quantile is that of all arms there were, also when some are out.
    """
    look = rounds - FIRST_LOOK  # from 0
    error = ERROR * EVEN_LOOKS / ((look + EVEN_LOOKS) * (look + EVEN_LOOKS + 1))  # these add up to ERROR
    degrees = (num_compared - 1) * (rounds - 1)
    return float(studentized_range.isf(error, num_arms, degrees)) / math.sqrt(rounds)
