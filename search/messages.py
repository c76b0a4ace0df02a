"""What a search tells a person beside its trials: how long it will take, what it found, what to run next."""

import math
from pathlib import Path
from statistics import fmean

from byot.config import CLASSIFIERS, work_after
from byot.console import fold, format_duration, text_table
from byot.search_files import (
    ACCURACIES,
    ROLE_NAMES,
    TrialRecord,
    format_parameter,
    format_value,
    load_confirmation,
    next_commands,
)
from byot.system.files import read_json
from search.plan import SearchPlan
from search.race import Confirmation
from search.records import SearchRecords
from search.settings import NUM_FIRST_POINTS, choose_grace, expected_work
from search.significance import FIRST_LOOK
from search.system.resources import Resources

EVALUATION_COST = 1 / 3  # of an image's training step: the forward pass alone
QUICK_WIDTH = 16
SHARE_OF_ROUNDS = 0.9  # of the runs that a confirmation may take: 0.78 to 1, results/benchmarks/winner-test.md


def describe_time(images_per_s: float, plan: SearchPlan, resources: Resources) -> str:
    """Tell how long a search will take at this speed, and, where that is days, what would make it hours.

    The speed is that of a trial's first epoch, whose images the recipe may have made smaller.
    """
    base, settings = plan.base, plan.settings
    image_s = 1 / (images_per_s * work_after(base, 1))  # at full resolution

    def trial_s(epochs: float) -> float:
        images = len(plan.train.labels) * work_after(base, epochs) + len(plan.val.labels) * EVALUATION_COST * epochs
        return images * image_s * settings.seeds_per_trial

    slots = settings.at_once(resources.max_concurrent)
    grace = choose_grace(base, settings) if settings.stops_early else base.epochs
    at_most = math.ceil(settings.num_samples / slots) * trial_s(base.epochs)
    all_work = expected_work(settings.num_samples, base.epochs, grace, trial_s)
    about = min(at_most, (all_work + (slots - 1) * trial_s(base.epochs)) / slots)  # the last ones run beside idle slots
    text = f"{images_per_s:.0f} images/s a trial, {slots} at a time: about "
    if settings.confirm:
        sampled = max(0, settings.num_samples - NUM_FIRST_POINTS)
        runs = (min(settings.confirm, sampled) + NUM_FIRST_POINTS) * settings.confirm_seeds
        run_s = trial_s(base.epochs) / settings.seeds_per_trial
        longest, confirming = (
            math.ceil(share * runs / resources.max_concurrent) * run_s for share in (1, SHARE_OF_ROUNDS)
        )
        about, at_most = about + confirming, at_most + longest
        text += f"{format_duration(about)}, {format_duration(confirming)} of it over fresh seeds"
    else:
        text += format_duration(about)
    if at_most > about:
        text += f", at most {format_duration(at_most)}"
    budget = settings.time_budget_s()
    if budget is not None and budget < about:
        text += f"; it will stop after {settings.time_budget}"
    elif about > 24 * 3600:
        ways = [] if resources.gpus else ["a GPU"]
        if base.width > QUICK_WIDTH:
            ways.append(f"--width {QUICK_WIDTH} (about a tenth of the work of 64)")
        ways.append(f"fewer --epochs than {base.epochs}")
        text += f"\nto make that hours: {', '.join(ways)}"
    return text


def describe_confirmation(confirmation: Confirmation, trials: list[TrialRecord], resources: Resources) -> str:
    """Tell what is to be run again, and how long that will take if it goes as quickly as the trials did."""
    arms, most = len(confirmation.arms), confirmation.max_rounds
    least = min(FIRST_LOOK, most)
    seeds = f"{least} to {most}" if least < most else str(most)
    text = f"{arms} configurations again, over {seeds} fresh seeds each"
    if confirmation.results:
        text += f", {len(confirmation.results)} runs finished before"
    base = confirmation.base
    paces = [trial.seconds / work_after(base, trial.epochs_done) for trial in trials if trial.epochs_done]
    if not paces:
        return text
    run_s = fmean(paces) * work_after(base, base.epochs) / confirmation.runs_a_trial
    longest, shortest = (
        format_duration(math.ceil(confirmation.num_left(rounds) / resources.max_concurrent) * run_s)
        for rounds in (most, least)
    )
    return f"{text}: about {shortest}" + (f", at most {longest}" if longest != shortest else "")


def trials_table(records: SearchRecords) -> str:
    """Lay out the trials as text, those that reached their last epoch first and best first."""
    metric, order = records.metric, ("completed", "stopped", "running", "failed")
    sign = -1 if records.mode == "max" else 1

    def rank(trial: TrialRecord) -> tuple[int, float, float]:
        value = trial.measures[metric]
        depth = -trial.epochs_done if trial.status == "stopped" else 0
        return order.index(trial.status), depth, math.inf if value is None else sign * value

    # val_accuracy is the deepest classifier's, which the numbered columns show already.
    shown = [name for name in dict.fromkeys((metric, *ACCURACIES)) if name != "val_accuracy"]
    names = [CLASSIFIERS.get(name.removeprefix("val_accuracy_"), name.removeprefix("val_")) for name in shown]
    header = ["trial", "role", "status", "epochs", *records.parameters, *names, "seconds"]
    rows = [
        [
            trial.trial_id,
            trial.role,
            "to go on" if trial.status == "running" else trial.status,
            str(trial.epochs_done),
            *(format_parameter(trial.params[name]) for name in records.parameters),
            *(format_value(name, trial.measures[name]) for name in shown),
            f"{trial.seconds:.0f}",
        ]
        for trial in sorted(records.trials.values(), key=rank)
    ]
    searched = names[shown.index(metric)] if metric in shown else None
    may_go = [name for name in ("seconds", "ensemble", "1/4", "2/4", "3/4") if name != searched]
    return text_table(header, rows, num_text=3, may_go=may_go)


def verdict(folder: Path, outputs: Path, go_on: str) -> str:
    """Tell the best configuration, what it is compared with, and the commands to run next.

    `go_on` is the command that goes on with the search and confirms it.
    """
    best = read_json(folder / "best.json")
    metric = best["metric"]
    told = ", ".join(f"{name} {format_parameter(value, 4)}" for name, value in best["params"].items())
    try:
        confirmation = load_confirmation(folder)
        sentences = [] if confirmation is None else confirmation.sentences
    except ValueError as error:
        sentences = [f"{error}; --confirm makes it anew"]
    which = "best in the search" if sentences else "best"
    lines = [f"{which}: trial {best['trial_id']}, {told}: {metric} {format_value(metric, best['value'])}"]
    for other in best["compared_with"]:
        if other["role"] != best["role"]:
            lines.append(f"      {ROLE_NAMES[other['role']]}: {metric} {format_value(metric, other['value'])}")
    if front := best.get("pareto_front"):
        lines += ["", "Pareto front (no other trial is at least as good in all and better in one):"]
        lines += [
            f"      {one['trial_id']}  "
            + "  ".join(f"{name} {format_value(name, value)}" for name, value in one["values"].items())
            for one in front
        ]
    if sentences:
        lines += ["", *sentences, ""]
    else:
        lines += ["a confirmation over fresh seeds would tell whether the difference is more than noise", ""]
    commands = [] if sentences else [go_on]
    return "\n".join([*map(fold, lines), *commands, *next_commands(folder, outputs)])
