"""What the noise allows to say of a search and of its retrained runs, in sentences. Shared by best.py and report.py.

A search compares single runs on few images, so a difference is "within the noise" or "beyond" it. Retrained runs have a
spread of their own over seeds, so a difference between them is "resolved" or "not resolved".
"""

import math
import shlex
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from analysis.trials import (
    CLASSIFIER_NAMES,
    STATUSES,
    SUFFIXES,
    find_role,
    pareto_front,
    parse_time,
    rank,
    search_metrics,
)
from byot.system.paths import default_outputs

ROLE_NAMES = {"reference": "the reference setting", "control": "deep supervision alone"}
NUM_STANDARD_ERRORS = 2
CONFIDENCE = 0.95
MAX_LISTED = 6
# Two-sided 5 %, power 80 %: runs an arm = 2 * (1.960 + 0.842)^2 * variance / gap^2, and one for the variance unknown.
RUNS_FACTOR = 2 * (1.960 + 0.842) ** 2
MAX_RUNS_NAMED = 200


class Interval(NamedTuple):
    """A difference of two means and half the width of its confidence interval."""

    difference: float
    half_width: float

    @property
    def resolved(self) -> bool:
        return abs(self.difference) > self.half_width


# ---------------------------------------------------------------- noise


def accuracy_standard_error(accuracy: float, num_images: int) -> float:
    """Binomial standard error, in points, of an accuracy in percent measured on `num_images` images.

    None or all of the images right counts as half an image off: an error of 0 would claim certainty.
    """
    share = min(max(accuracy / 100, 0.5 / num_images), 1 - 0.5 / num_images)
    return 100 * math.sqrt(share * (1 - share) / num_images)


def noise_margin(accuracy: float, other: float, num_images: int) -> float:
    """Two standard errors of the difference of two accuracies, in points.

    As if each were measured on images of its own, about sqrt(2) times the error of one. On the same images the true
    error is smaller, so this errs towards "within the noise".
    """
    errors = (accuracy_standard_error(a, num_images) for a in (accuracy, other))
    return NUM_STANDARD_ERRORS * math.hypot(*errors)


def within_noise(accuracy: float, other: float, num_images: int) -> bool:
    return abs(accuracy - other) <= noise_margin(accuracy, other, num_images)


def compare_means(mean: float, sd: float, n: int, other_mean: float, other_sd: float, other_n: int) -> Interval | None:
    """Welch's 95 % interval of a difference of two means over seeds; None where one of them has a single run."""
    if n < 2 or other_n < 2:
        return None
    from scipy.special import stdtrit

    a, b = sd**2 / n, other_sd**2 / other_n
    if a + b == 0:
        return Interval(mean - other_mean, 0.0)
    degrees = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (other_n - 1))
    return Interval(mean - other_mean, float(stdtrit(degrees, (1 + CONFIDENCE) / 2)) * math.sqrt(a + b))


def runs_needed(difference: float, sd: float, other_sd: float) -> int:
    """Runs an arm that would show a difference of this size, other than 0, in four cases of five."""
    return 1 + math.ceil(RUNS_FACTOR * (sd**2 + other_sd**2) / 2 / difference**2)


# ---------------------------------------------------------------- words


def is_accuracy(metric: str) -> bool:
    return "_accuracy" in metric


def describe_metric(metric: str) -> str:
    """`val_accuracy_2` -> 'validation accuracy, classifier 2/4'."""
    split, measure, *suffix = metric.split("_")
    names = dict(zip(SUFFIXES, CLASSIFIER_NAMES, strict=True))
    which = names.get(suffix[0] if suffix else SUFFIXES[-2], "")
    where = which if which == "ensemble" else f"classifier {which}"
    return f"{ {'val': 'validation', 'test': 'test'}.get(split, split) } {measure.replace('nll', 'NLL')}, {where}"


def unit(metric: str) -> str:
    return "nats" if "_nll" in metric else "%"


def format_value(metric: str, value: float) -> str:
    return f"{value:.4f}" if "_nll" in metric else f"{value:.2f}"


def format_amount(metric: str, difference: float) -> str:
    return f"{format_value(metric, abs(difference))} {'nats' if '_nll' in metric else 'points'}"


def format_parameters(search: Mapping[str, Any], trial: pd.Series) -> str:
    return ", ".join(f"{name} {trial[name]:.3g}" for name in search["space"] if name in trial)


def count_statuses(trials: pd.DataFrame) -> str:
    """'32 trials: 9 completed, 21 stopped, 2 failed'."""
    if trials.empty:
        return "no trial yet"
    counts = trials["status"].value_counts()
    parts = [f"{counts[status]} {status}" for status in STATUSES if status in counts]
    return f"{len(trials)} trial{'s' * (len(trials) != 1)}: {', '.join(parts)}"


def describe_status(search: Mapping[str, Any], last_written: datetime, now: datetime) -> str:
    """Finished, interrupted, or running: files cannot tell that from killed, but how old they are hints at it."""
    if search["status"] != "running":
        return search["status"]
    age = format_duration(max(0.0, (now - last_written).total_seconds()))
    return f"still running, or it was killed: its files were last written {age} ago"


def format_duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 120 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def search_duration(search: Mapping[str, Any]) -> float | None:
    """Seconds from the start of a search to its end, None if it has not ended."""
    try:
        return (parse_time(search.get("finished_at")) - parse_time(search.get("started_at"))).total_seconds()
    except ValueError:
        return None


# ---------------------------------------------------------------- sentences


def judge_search(search: Mapping[str, Any], trials: pd.DataFrame) -> list[str]:
    """What the trials of a search allow to say: the best, its equals within the noise, its standing against the two
    settings that are always tried."""
    metric, epochs = search["metric"], search["config"]["epochs"]
    ranked = rank(trials, metric, search["mode"], epochs)
    if ranked.empty:
        return [f"No trial has reached its last epoch ({epochs}) yet, so there is nothing to compare."]
    best, others = ranked.iloc[0], ranked.iloc[1:]
    num_images = _num_images(search)
    found = f"The only self-distilled trial that has reached epoch {epochs}: {best['trial_id']}"
    if not others.empty:
        found = f"Best of the {len(ranked)} self-distilled trials that reached epoch {epochs}: trial {best['trial_id']}"
    value = f"{format_value(metric, best[metric])} {unit(metric)}"
    if num_images:
        error = accuracy_standard_error(best[metric], num_images)
        value += f" ± {error:.2f} (binomial standard error, {num_images:,} images)"
    sentences = [f"{found}, {format_parameters(search, best)}; {describe_metric(metric)}: {value}."]
    if num_images and not others.empty:
        sentences.append(_judge_equals(metric, best, others, num_images))
    for role in ROLE_NAMES:
        sentences.append(_judge_role(search, best, role, find_role(trials, role, metric, epochs), num_images))
    sentences += _judge_front(search, trials)
    if (runs := seeds_per_trial(search)) > 1:
        sentences.append(f"Each value is the mean of {runs} runs, whose spread is not in the errors above.")
        return [*sentences, *_caution(search)]
    seeds = "one seed" if trials["seed"].nunique() <= 1 else "one seed each"
    if num_images:
        sentences.append(
            f"These are single runs, {seeds}: the errors above are those of the validation images alone, the seed's "
            "come on top, and the best of many is flattered by having been chosen. Retraining over seeds settles it."
        )
    else:
        sentences.append(
            f"These are single runs, {seeds}, and one run gives no error of this measure: retraining over seeds shows "
            "which differences are real."
        )
    return [*sentences, *_caution(search)]


def _caution(search: Mapping[str, Any]) -> list[str]:
    return [] if search["status"] == "finished" else ["The search has not finished: all of this may change."]


def seeds_per_trial(search: Mapping[str, Any]) -> int:
    asked = (search.get("settings") or {}).get("seeds_per_trial")
    return asked if isinstance(asked, int) else 1


def metric_mode(metric: str) -> str:
    return "min" if "_nll" in metric else "max"


def _judge_front(search: Mapping[str, Any], trials: pd.DataFrame) -> list[str]:
    metrics = search_metrics(search)
    if len(metrics) < 2:
        return []
    front = pareto_front(trials, {metric: metric_mode(metric) for metric in metrics}, search["config"]["epochs"])
    listed = "; ".join(
        f"{trial['trial_id']} {' / '.join(format_value(metric, trial[metric]) for metric in metrics)}"
        for _, trial in front.iterrows()
    )
    names = " and ".join(describe_metric(metric) for metric in metrics)
    return [
        f"Of {names}, these are on the Pareto front, beaten by none in one without being better in another: {listed}."
    ]


def _num_images(search: Mapping[str, Any]) -> int:
    """Validation images behind the metric, 0 where they give it no error: no accuracy, or images not counted."""
    return int(search.get("num_val_images") or 0) if is_accuracy(search["metric"]) else 0


def _judge_equals(metric: str, best: pd.Series, others: pd.DataFrame, num_images: int) -> str:
    near = [t for _, t in others.iterrows() if within_noise(best[metric], t[metric], num_images)]
    if not near:
        return (
            "The other lies beyond its noise."
            if len(others) == 1
            else f"All {len(others)} others lie beyond its noise."
        )
    margin = max(noise_margin(best[metric], t[metric], num_images) for t in near)
    distance = f"less than two standard errors of a difference (about {margin:.1f} points) away"
    listed = ", ".join(t["trial_id"] for t in near[:MAX_LISTED])
    if len(near) > MAX_LISTED:
        listed += f" and {len(near) - MAX_LISTED} more"
    lie = (
        "The other lies"
        if len(others) == 1
        else f"Of the {len(others)} others, {len(near)} lie{'s' * (len(near) == 1)}"
    )
    return f"{lie} within its noise, {distance}, so the search cannot tell which of them is best: {listed}."


def _judge_role(search: Mapping[str, Any], best: pd.Series, role: str, other: pd.Series | None, num_images: int) -> str:
    metric, name = search["metric"], ROLE_NAMES[role]
    if other is None:
        return f"{name.capitalize()} has not reached the last epoch here: there is no comparison with it."
    if other["trial_id"] == best["trial_id"]:
        return f"The best is {name} itself: the search found nothing better."
    at = f"{format_parameters(search, other)}; {format_value(metric, other[metric])} {unit(metric)}"
    gain = (best[metric] - other[metric]) * (1 if search["mode"] == "max" else -1)
    amount = format_amount(metric, gain)
    standing = "equal" if gain == 0 else f"{'better' if gain > 0 else 'worse'} by {amount}"
    if num_images:
        near = within_noise(best[metric], other[metric], num_images)
        standing += f", {'within' if near else 'beyond'} the noise"
    return f"Against {name} ({at}): {standing}."


def judge_retrained(search: Mapping[str, Any], trials: pd.DataFrame, summary: pd.DataFrame) -> list[str]:
    """What the retrained runs allow to say of the configuration that validation had chosen, on the test set.

    Only that one is compared: picking the best of several on the test set would flatter it.
    """
    metric = search["metric"].replace("val_", "test_", 1)
    order = rank(trials, search["metric"], search["mode"], search["config"]["epochs"])["trial_id"].tolist()
    sentences = []
    for epochs, runs in summary.groupby("epochs"):
        by_id = runs.set_index("trial_id", drop=False)
        retrained = [trial_id for trial_id in order if trial_id in by_id.index]
        if not retrained:
            continue
        best = by_id.loc[retrained[0]]
        measure = describe_metric(metric)
        sentences.append(
            f"{measure[0].upper()}{measure[1:]}, of trial {best['trial_id']} (best on validation of those retrained) "
            f"after {epochs} epochs on all training images: {_mean(metric, best)}."
        )
        for role, name in ROLE_NAMES.items():
            others = by_id[(by_id["role"] == role) & (by_id["trial_id"] != best["trial_id"])]
            if not others.empty:
                sentences.append(_judge_means(metric, search["mode"], name, best, others.iloc[0]))
            elif best["role"] != role:
                sentences.append(f"{name.capitalize()} was not retrained for {epochs} epochs.")
    return sentences


def _mean(metric: str, runs: pd.Series) -> str:
    if runs["num_runs"] < 2:
        return f"{format_value(metric, runs[metric])} {unit(metric)} (one run)"
    sd = format_value(metric, runs[f"{metric}_sd"])
    return (
        f"{format_value(metric, runs[metric])} ± {sd} {unit(metric)} ({runs['num_runs']} seeds, ± standard deviation)"
    )


def _judge_means(metric: str, mode: str, name: str, best: pd.Series, other: pd.Series) -> str:
    sd, other_sd = best[f"{metric}_sd"], other[f"{metric}_sd"]
    interval = compare_means(best[metric], sd, best["num_runs"], other[metric], other_sd, other["num_runs"])
    against = f"Against {name}, {_mean(metric, other)}"
    if interval is None:
        return f"{against}: it takes at least two seeds of each to say whether the difference is real."
    gain = interval.difference * (1 if mode == "max" else -1)
    low, high = (format_signed(metric, gain + sign * interval.half_width) for sign in (-1, 1))
    standing = f"better by {format_amount(metric, gain)}" if gain >= 0 else f"worse by {format_amount(metric, gain)}"
    text = f"{against}: {standing} (95 % interval {low} to {high})"
    if interval.resolved:
        return f"{text}: resolved."
    needed = runs_needed(gain, sd, other_sd) if gain else math.inf
    if not max(best["num_runs"], other["num_runs"]) < needed <= MAX_RUNS_NAMED:
        return f"{text}: not resolved."
    return f"{text}: not resolved. Were the difference this large, about {needed} runs of each would show it."


def format_signed(metric: str, value: float) -> str:
    return f"{'-' if value < 0 else '+'}{format_value(metric, abs(value))}"


# ---------------------------------------------------------------- commands


def next_commands(folder: Path, outputs: Path) -> list[str]:
    """What to run after a search, as typed in the project's folder."""
    name = shlex.quote(folder.name if folder.parent == outputs / "searches" else str(folder))
    where = "" if outputs == default_outputs() else f" --outputs {shlex.quote(str(outputs))}"
    return [
        f"python byot/train.py --best {name}{where}",
        f"python analysis/retrain.py {name} --top 3 --seeds 3{where}",
        f"python analysis/report.py {name}{where}",
    ]
