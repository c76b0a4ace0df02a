"""Judges over seeds which configuration is best: better than every other, equal within a margin, or not resolved.

Every configuration (an arm) is run with the same fresh seeds. A round is one run of each arm with one seed. Two arms
are compared by their differences round by round, with the spread of these differences alone: Student's paired t-test.

- Resolved: the leader is better than each other arm, each at the two-sided 5 % level. As all of them must be beaten,
  the level needs no correction for their number (an intersection-union test).
- Equivalent: no arm is better by the margin than the simplest one that is not shown to be worse, each at the one-sided
  5 % level. If that one leads, it is not better by the margin either.
- Not resolved: neither, after the last round.

Each test may be read after every round from the third on. The error is spent over these looks as (round / last
round)^5, so nearly all of it is left for the last one. Asking for more rounds after the last one spends it again: two
equal arms are then called different in more than 5 % of cases.

An arm is out, and not run again, when the leader beats it at a level shared by all arms (Bonferroni). An arm of which a
run diverged is left out. Intervals hold for one pair each, not for all pairs at once, and for seeds and splits of the
same training images, not for other data.

Sources: Berger, Multiparameter hypothesis testing and acceptance sampling (1982); Schuirmann, A comparison of the two
one-sided tests procedure (1987); Jennison and Turnbull, Group Sequential Methods (2000), chapters 7 and 11.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy.stats import norm, t

from byot.search_files import format_value, unit

ERROR = 0.05
FIRST_LOOK = 3  # rounds; fewer say next to nothing of the noise
SPENDING = 5  # the error spent by round r of R is ERROR * (r / R) ** SPENDING
LAST_LEVEL = 0.88  # of the error: about what the last look is left with
POWER = 0.842  # standard normal quantile of 80 %
MOST_RUNS_NAMED = 200


class Comparison(NamedTuple):
    """One arm against another, both run with the same seeds. Points of the metric, larger is better."""

    arm: str
    other: str
    difference: float  # of the means, positive where `arm` is better
    sd: float  # of the differences by round
    rounds: int
    max_rounds: int | None = None  # None: this is the only look

    def half_width(self, error: float = ERROR) -> float:
        """Half of the confidence interval of the difference at this look, which misses it in this share of cases."""
        level = look_levels(error, self.max_rounds)[self.rounds - FIRST_LOOK] if self.max_rounds else error
        return self.sd * float(t.isf(level / 2, self.rounds - 1)) / math.sqrt(self.rounds)

    @property
    def resolved(self) -> bool:
        return self.difference > self.half_width()

    def reversed(self) -> "Comparison":
        """Return this comparison as seen from the other arm."""
        return self._replace(arm=self.other, other=self.arm, difference=-self.difference)

    @property
    def runs_needed(self) -> int:
        """More runs of each of the two that would resolve a true difference of this size, in four cases of five."""
        for rounds in range(max(self.rounds + 1, FIRST_LOOK), self.rounds + MOST_RUNS_NAMED + 1):
            errors = float(t.isf(LAST_LEVEL * ERROR / 2, rounds - 1)) + POWER  # in standard errors
            if abs(self.difference) * math.sqrt(rounds) >= errors * self.sd:
                return rounds - self.rounds
        return MOST_RUNS_NAMED + 1


class Judgement(NamedTuple):
    """What the rounds so far allow to say."""

    rounds: int  # complete for all arms still in
    remaining: list[str]  # arms still in, the leader first, then by their means; empty if all diverged
    equivalent: list[str]  # arms that are equal within the margin, the one to take first; empty if that is not shown
    comparisons: dict[str, Comparison]  # other arm -> the leader against it, at the last look in which it took part
    diverged: list[str]
    is_over: bool

    @property
    def leader(self) -> str | None:
        return self.remaining[0] if self.remaining else None

    @property
    def chosen(self) -> str | None:
        """The arm to take: the simplest of those that are equal, else the leader."""
        return self.equivalent[0] if self.equivalent else self.leader

    @property
    def resolved(self) -> bool:
        """Whether the leader is shown to be better than every arm that did not diverge, of which there is another."""
        return len(self.remaining) == 1 and bool(self.comparisons)


def compare(
    arm: str,
    other: str,
    values: Sequence[float],
    others: Sequence[float],
    *,
    max_rounds: int | None = None,
    least_sd: float = 0.0,
) -> Comparison:
    """Compare two arms by their values, one a seed and in the same order, of two seeds at least."""
    differences = np.subtract(values, others)
    sd = max(least_sd, float(np.std(differences, ddof=1)))
    return Comparison(arm, other, float(np.mean(differences)), sd, len(differences), max_rounds)


def format_gain(metric: str, gain: float) -> str:
    """'better by 0.70 points'; `gain` is positive for better."""
    if gain == 0:
        return "equal"
    return f"{'better' if gain > 0 else 'worse'} by {format_value(metric, abs(gain))} {unit(metric, 'points')}"


def describe(metric: str, one: Comparison) -> str:
    """'worse by 0.41 points (95 % interval -0.86 to +0.04, 8 seeds): not resolved; …', of `arm` against `other`."""
    ends = (one.difference - one.half_width(), one.difference + one.half_width())
    low, high = ("+" * bool(end > 0) + format_value(metric, end) for end in ends)
    text = f"{format_gain(metric, one.difference)} ({100 * (1 - ERROR):.0f} % interval {low} to {high}, "
    text += f"{one.rounds} seeds)"
    if abs(one.difference) > one.half_width():
        return f"{text}: resolved"
    many = f"more than {MOST_RUNS_NAMED}" if one.runs_needed > MOST_RUNS_NAMED else f"about {one.runs_needed}"
    runs = f"{many} more run{'s' * (one.runs_needed > 1)} of each"
    return f"{text}: not resolved; were the difference this large, {runs} would show it"


def judge(
    values: Mapping[str, Sequence[float]],
    max_rounds: int,
    margin: float = 0.0,
    *,
    simplest: Sequence[str] = (),
    least_sd: float = 0.0,
) -> Judgement:
    """Judge the runs of each arm, in the order of the seeds; arms may have as many as they like, NaN where it diverged.

    What is found depends on the values alone, so a restart changes nothing. `margin` is in points of the metric; with 0
    nothing is called equal. `simplest` names the arms to prefer among equals, the most preferred first; where all of
    them are shown to be worse, the leader is preferred. `least_sd` is the step in which the metric is measured, such as
    one image of the validation split: a spread below it is a coincidence.
    """

    def mean(arm: str) -> float:
        return float(np.mean(values[arm][:rounds])) if rounds else 0.0

    def against(arm: str, other: str) -> Comparison:
        runs = values[arm][:rounds], values[other][:rounds]
        return compare(arm, other, *runs, max_rounds=max_rounds, least_sd=least_sd)

    diverged = [arm for arm, runs in values.items() if any(math.isnan(value) for value in runs)]
    remaining = [arm for arm in values if arm not in diverged]
    comparisons: dict[str, Comparison] = {}
    equivalent: list[str] = []
    rounds = 0
    while len(remaining) > 1 and not equivalent and rounds < max_rounds:
        if any(len(values[arm]) == rounds for arm in remaining):
            break
        rounds += 1
        remaining.sort(key=mean, reverse=True)
        if rounds < FIRST_LOOK:
            continue
        leader, *others = remaining
        found = {other: against(leader, other) for other in others}
        comparisons |= found
        comparisons.pop(leader, None)  # of an earlier look, at which another led
        level = ERROR / (len(values) - 1)
        contenders = [leader, *(arm for arm in others if not found[arm].resolved)]
        equivalent = find_equals(contenders, against, margin, simplest)
        if len(contenders) == 1 or equivalent:
            remaining = contenders
        else:
            remaining = [leader, *(arm for arm in others if found[arm].difference <= found[arm].half_width(level))]
    is_over = len(remaining) < 2 or bool(equivalent) or rounds >= max_rounds
    return Judgement(rounds, remaining, equivalent, comparisons, diverged, is_over)


def find_equals(
    contenders: list[str], against: Callable[[str, str], Comparison], margin: float, simplest: Sequence[str]
) -> list[str]:
    """Return the contenders, the preferred one first; none if they may differ by the margin. The first one leads."""
    leader = contenders[0]
    preferred = next((arm for arm in simplest if arm in contenders), leader)
    others = [arm for arm in contenders if arm != preferred]
    for one in (against(preferred, other) for other in others):
        ahead = abs(one.difference) if preferred == leader else -one.difference
        if ahead + one.half_width(2 * ERROR) >= margin:
            return []
    return [preferred, *others] if others else []


@cache
def look_levels(error: float, max_rounds: int) -> tuple[float, ...]:
    """Compute the two-sided levels of the looks after FIRST_LOOK to `max_rounds` rounds, which spend `error` together.

    The sum of the rounds' standard normal differences is followed on a grid: its density among the cases in which no
    look has found anything yet.
    """
    sums = np.linspace(-9, 9, 2001) * math.sqrt(max_rounds)
    step = sums[1] - sums[0]
    one_round = norm.pdf(sums)
    density = norm.pdf(sums, scale=math.sqrt(FIRST_LOOK))
    levels: list[float] = []
    spent = 0.0
    for rounds in range(FIRST_LOOK, max_rounds + 1):
        if levels:
            density = np.convolve(density, one_round, mode="same") * step
        may_spend = error * (rounds / max_rounds) ** SPENDING - spent
        beyond = 2 * step * np.cumsum(density[::-1])[::-1]  # the probability of larger sums of either sign
        bound = float(np.interp(-may_spend, -beyond, sums))
        levels.append(2 * float(norm.sf(bound / math.sqrt(rounds))))
        density = np.where(np.abs(sums) < bound, density, 0.0)
        spent += may_spend
    return tuple(levels)
