"""What the noise allows to say of a search and of its retrained runs, in sentences. Shared by best.py and report.py.

A search compares single runs on few images, so a difference is "within the noise" or "beyond" it. Retrained runs are
compared seed by seed, so a difference between them is "resolved" or "not resolved".
"""

import math
from datetime import datetime
from typing import get_args

import pandas as pd

from analysis.trials import NOT_POOLED, find_role, pareto_front, rank
from byot.config import CLASSIFIERS, NUM_CLASSIFIERS
from byot.console import format_duration
from byot.search_files import ROLE_NAMES, SearchRecord, Status, format_parameter, format_value, metric_mode, unit
from search.significance import compare, describe, format_gain

NUM_STANDARD_ERRORS = 2
MAX_LISTED = 6
SPLITS = {"val": "validation", "test": "test"}


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
    return NUM_STANDARD_ERRORS * math.hypot(*(accuracy_standard_error(a, num_images) for a in (accuracy, other)))


# ---------------------------------------------------------------- words


def num_images_behind(search: SearchRecord) -> int:
    """Count the validation images behind an accuracy; 0 for another measure, or where they were not counted."""
    return search.num_val_images if "_accuracy" in search.metric else 0


def describe_metric(metric: str) -> str:
    """`val_accuracy_2` -> 'validation accuracy, classifier 2/4'."""
    split, measure, *suffix = metric.split("_")
    if measure == "exit":
        return f"{SPLITS[split]} accuracy, early exit at half the cost"
    if suffix == ["mean"]:
        return f"{SPLITS[split]} accuracy, mean of the classifiers"
    which = CLASSIFIERS.get(suffix[0] if suffix else str(NUM_CLASSIFIERS), "")
    where = which if which == "ensemble" else f"classifier {which}"
    return f"{SPLITS[split]} {measure if measure == 'accuracy' else measure.upper()}, {where}"


def format_parameters(search: SearchRecord, trial: pd.Series) -> str:
    return ", ".join(f"{name} {format_parameter(trial[name])}" for name in search.space if name in trial)


def count_statuses(trials: pd.DataFrame) -> str:
    """'32 trials: 9 completed, 21 stopped, 2 failed'."""
    if trials.empty:
        return "no trial yet"
    counts = trials["status"].value_counts()
    parts = [f"{counts[status]} {status}" for status in get_args(Status) if status in counts]
    return f"{len(trials)} trial{'s' * (len(trials) != 1)}: {', '.join(parts)}"


def describe_status(search: SearchRecord, last_written: datetime, now: datetime) -> str:
    """Finished, interrupted, or running: files cannot tell that from killed, but how old they are hints at it."""
    if search.status != "running":
        return search.status
    age = format_duration(max(0.0, (now - last_written).total_seconds()))
    return f"still running, or it was killed: its files were last written {age} ago"


# ---------------------------------------------------------------- sentences


def judge_search(search: SearchRecord, trials: pd.DataFrame, has_fresh_seeds: bool = False) -> list[str]:
    """Say what can be concluded from the trials of a search.

    That is the best, its equals within the noise, and its standing against the two settings that are always tried.
    `has_fresh_seeds` tells that the best were run again over fresh seeds.
    """
    metric, epochs, num_images = search.metric, search.config.epochs, num_images_behind(search)
    ranked = rank(trials, metric)
    if ranked.empty:
        return [f"No trial has reached its last epoch ({epochs}) yet, so there is nothing to compare."]
    best, others = ranked.iloc[0], ranked.iloc[1:]
    value = f"{format_value(metric, best[metric])} {unit(metric)}"
    if num_images:
        error = accuracy_standard_error(best[metric], num_images)
        value += f" ± {error:.2f} (binomial standard error, {num_images:,} images)"
    sentences = [
        f"Best of {len(ranked)} self-distilled trials that reached epoch {epochs}: {best['trial_id']}, "
        f"{format_parameters(search, best)}; {describe_metric(metric)}: {value}."
    ]
    if num_images and not others.empty:
        sentences.append(_judge_equals(metric, best, others, num_images))
    for role in ROLE_NAMES:
        sentences.append(_judge_role(search, best, role, find_role(trials, role, metric), num_images))
    if len(search.metrics) > 1:
        sentences.append(_judge_front(search.metrics, pareto_front(trials, search.metrics)))
    if search.seeds_per_trial > 1:
        hidden = ", whose spread is not in the errors above" if num_images else ""
        sentences.append(f"Each value is the mean of {search.seeds_per_trial} runs{hidden}.")
    elif num_images:
        sentences.append(
            "These are single runs: the errors above are those of the validation images alone, the seed's come on top, "
            "and the best of many is flattered by having been chosen."
            + ("" if has_fresh_seeds else " Retraining over seeds settles it.")
        )
    else:
        sentences.append(
            "These are single runs, and one run gives no error of this measure."
            + ("" if has_fresh_seeds else " Retraining over seeds shows which differences are real.")
        )
    if search.status != "finished":
        sentences.append("The search has not finished: all of this may change.")
    return sentences


def _judge_equals(metric: str, best: pd.Series, others: pd.DataFrame, num_images: int) -> str:
    margins = others[metric].map(lambda value: noise_margin(best[metric], value, num_images))
    near = (others[metric] - best[metric]).abs() <= margins
    if not near.any():
        return "No other lies within its noise."
    ids = others["trial_id"][near].tolist()
    more = f" and {len(ids) - MAX_LISTED} more" if len(ids) > MAX_LISTED else ""
    return (
        f"{len(ids)} of {len(others)} others lie within its noise, two standard errors of a difference (about "
        f"{margins[near].max():.1f} points), so the search cannot tell which of them is best: "
        f"{', '.join(ids[:MAX_LISTED])}{more}."
    )


def _judge_role(search: SearchRecord, best: pd.Series, role: str, other: pd.Series | None, num_images: int) -> str:
    metric, name = search.metric, ROLE_NAMES[role]
    if other is None:
        return f"{name.capitalize()} has not reached the last epoch here: there is no comparison with it."
    if other["trial_id"] == best["trial_id"]:
        return f"The best is {name} itself: the search found nothing better."
    gain = (best[metric] - other[metric]) * (1 if search.mode == "max" else -1)
    standing = format_gain(metric, gain)
    if num_images:
        is_near = abs(gain) <= noise_margin(best[metric], other[metric], num_images)
        standing += f", {'within' if is_near else 'beyond'} the noise"
    at = f"{format_parameters(search, other)}; {format_value(metric, other[metric])} {unit(metric)}"
    return f"Against {name} ({at}): {standing}."


def _judge_front(metrics: tuple[str, ...], front: pd.DataFrame) -> str:
    values = (" / ".join(format_value(metric, trial[metric]) for metric in metrics) for _, trial in front.iterrows())
    listed = "; ".join(map(" ".join, zip(front["trial_id"], values, strict=True)))
    names = " and ".join(map(describe_metric, metrics))
    return f"Pareto front of {names} (no other trial is at least as good in all and better in one): {listed}."


def judge_retrained(
    search: SearchRecord, trials: pd.DataFrame, retrained: pd.DataFrame, confirmed: str = ""
) -> list[str]:
    """Say what the retrained runs allow to say of the configuration that validation had chosen, on the test set.

    That is the trial confirmed over fresh seeds where there is one, else the best trial of those retrained. Only that
    one is compared: picking the best of several on the test set would flatter it.
    """
    metric = search.metric.replace("val_", "test_", 1)
    order = [confirmed, *rank(trials, search.metric)["trial_id"]]
    sentences = []
    for (epochs, precision), runs in retrained.groupby(NOT_POOLED):
        chosen = next((trial_id for trial_id in order if trial_id in set(runs["trial_id"])), None)
        if chosen is None:
            continue
        best = runs[runs["trial_id"] == chosen]
        how = "chosen over fresh seeds" if chosen == confirmed else "best on validation of those retrained"
        measure = describe_metric(metric)
        sentences.append(
            f"{measure[0].upper()}{measure[1:]}, of trial {chosen} ({how}) "
            f"after {epochs} epochs in {precision} on all training images: {_format_mean(metric, best)}."
        )
        for role, name in ROLE_NAMES.items():
            others = runs[(runs["role"] == role) & (runs["trial_id"] != chosen)]
            if not others.empty:
                same = others[others["trial_id"] == others["trial_id"].iloc[0]]
                sentences.append(f"Against {name}, {_format_mean(metric, same)}: {judge_pairs(metric, best, same)}")
            elif best["role"].iloc[0] != role:
                sentences.append(f"{name.capitalize()} was not retrained for {epochs} epochs in {precision}.")
    return sentences


def _format_mean(metric: str, runs: pd.DataFrame) -> str:
    values = runs.groupby("seed")[metric].mean()
    mean, sd = (format_value(metric, value) for value in (values.mean(), values.std(ddof=1)))
    if len(values) < 2:
        return f"{mean} {unit(metric)} (one run)"
    return f"{mean} ± {sd} {unit(metric)} ({len(values)} runs, ± standard deviation)"


def judge_pairs(metric: str, best: pd.DataFrame, other: pd.DataFrame) -> str:
    """Compare two configurations by the seeds that both have; several runs with one seed count as their mean."""
    by_seed = [runs.groupby("seed")[metric].mean() for runs in (best, other)]
    pairs = pd.concat(by_seed, axis="columns", join="inner", keys=["best", "other"]).dropna()
    if len(pairs) < 2:
        return "to compare them takes at least two seeds, each run with both settings."
    sign = 1 if metric_mode(metric) == "max" else -1
    num_images = pd.to_numeric(best["num_test_images"], errors="coerce").max()
    step = 100 / num_images if "_accuracy" in metric and num_images > 0 else 0.0  # a smaller spread is a coincidence
    one = compare("best", "other", list(sign * pairs["best"]), list(sign * pairs["other"]), least_sd=step)
    return f"{describe(metric, one)}."
