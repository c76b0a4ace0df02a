"""Retrain the best configurations of a search on all training images, over several seeds, in parallel by Ray.

  python analysis/retrain.py --top 3 --seeds 3            of the newest search
  python analysis/retrain.py NAME --top 1 --seeds 5 --no-with-baselines

The reference setting and deep supervision alone are retrained too, so that there is something to compare with. Each
run has its own folder outputs/runs/NAME and its own checkpoints: the same command leaves finished runs alone and goes
on with the others. The test set is read once a run, at its end; the configurations were chosen on validation images.
"""

from importlib.util import find_spec

if find_spec("byot") is None:
    raise SystemExit("byot is not installed for this Python: activate its .venv, or pip install -r requirements.txt")

import argparse
import shlex
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from byot.config import TrainConfig, check_range
from byot.console import fold, show_runs, waiting
from byot.search_files import (
    SearchRecord,
    TrialRecord,
    confirmed_trial,
    find_role,
    find_search,
    load_search,
    ranked,
    read_trials,
    to_retrain,
)
from byot.system.files import describe_refusal, write_text
from byot.system.flags import Parser, flag_name, one_sentence_errors, tell, this_command
from byot.system.paths import absolute_path, check_writable, outputs_folder
from byot.system.stopping import catch_stop_signals

if TYPE_CHECKING:
    import pandas as pd

MOST_SEEDS = 10_000
MAY_GO = ("precision", "epochs", "1/4 %", "2/4 %", "3/4 %", "ensemble %")  # columns, on a narrow terminal


class Job(NamedTuple):
    """One run: a trial's settings with a seed."""

    trial_id: str
    config: TrainConfig
    folder: Path


def build_parser() -> Parser:
    parser = Parser(prog="retrain.py", description=__doc__)
    parser.add_argument("search", nargs="?", metavar="SEARCH", help="name of a search (default: the newest)")
    parser.add_argument(
        "--top",
        type=int,
        default=3,
        metavar="K",
        help="configurations: that chosen over fresh seeds, then the best on validation [3]",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="S", help="runs of each, with seeds 0 to S-1 [3]")
    parser.add_argument(
        "--with-baselines",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also the reference setting and deep supervision alone, where they are not among the best [yes]",
    )
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="passes over the training images (default: the search's)"
    )
    parser.add_argument("--data-dir", metavar="DIR", help="where the data set is, if not where the search found it")
    parser.add_argument("--cpus-per-run", type=int, default=1, metavar="N", help="CPU threads of a run [1]")
    parser.add_argument(
        "--gpus-per-run",
        type=float,
        metavar="F",
        help="GPUs of a run, fractions share one (default: 1 if there is one)",
    )
    parser.add_argument("--max-concurrent", type=int, metavar="N", help="runs at once (default: as many as have room)")
    parser.add_argument("--outputs", metavar="DIR", help="where runs and searches are kept (default: outputs/)")
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    for name in ("top", "epochs", "cpus_per_run", "max_concurrent"):
        if getattr(arguments, name) is not None:
            check_range(flag_name(name), getattr(arguments, name), low=1)
    check_range("--seeds", arguments.seeds, low=1, high=MOST_SEEDS)
    gpus = arguments.gpus_per_run
    if gpus is not None and not (0 <= gpus <= 1 or (gpus > 1 and gpus % 1 == 0)):
        raise ValueError(f"--gpus-per-run must be a fraction of 1 or a whole number, not {gpus:g}")


def choose_configurations(
    search: SearchRecord, trials: list[TrialRecord], top: int, with_baselines: bool, confirmed: str = ""
) -> dict[str, TrainConfig]:
    """Return trial id -> settings of the best `top` trials, then of both baselines if they are asked for.

    The trial that was confirmed over fresh seeds is the best, whatever its single run says. Trials with the same
    settings count once. Raises ValueError if no trial has reached the last epoch.
    """
    from search.race import choose_arms, to_arm

    if not ranked(trials, search.metric):
        epochs = search.config.epochs
        raise ValueError(f"no trial of the search {search.name} has reached its last epoch ({epochs}) yet")
    roles = (find_role(trials, "reference", search.metric), find_role(trials, "control", search.metric))
    baselines = [to_arm(trial, search.config) for trial in roles if trial is not None]
    chosen = [to_arm(trial, search.config) for trial in trials if trial.trial_id == confirmed]
    arms = choose_arms(trials, search.config, search.metric, top, baselines if with_baselines else [], first=chosen)
    return {arm.trial_id: to_retrain(search.config, arm.role, arm.params) for arm in arms}


def plan_jobs(configurations: dict[str, TrainConfig], runs_folder: Path, num_seeds: int, **changes: Any) -> list[Job]:
    """Plan every configuration with seed 0, then every one with seed 1: stopped early, all have as many runs."""
    jobs = []
    for seed in range(num_seeds):
        for trial_id, configuration in configurations.items():
            config = configuration.with_settings(seed=seed, **changes)
            jobs.append(Job(trial_id, config, runs_folder / config.run_name()))
    return jobs


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("retrain.py"), waiting("loading PyTorch, Ray and the images"):
        check_arguments(arguments)
        outputs = outputs_folder(arguments.outputs)
        folder = find_search(outputs, arguments.search)
        search = load_search(folder)
        if arguments.data_dir is not None:
            moved = str(absolute_path(arguments.data_dir))
            search = replace(search, config=search.config.with_settings(data_dir=moved))
        trials = read_trials(folder / "trials.csv")
        confirmed = confirmed_trial(folder)
        configurations = choose_configurations(search, trials, arguments.top, arguments.with_baselines, confirmed)
        changes: dict[str, Any] = {} if arguments.epochs is None else {"epochs": arguments.epochs}
        if arguments.gpus_per_run == 0:
            changes["device"] = "cpu"
        jobs = plan_jobs(configurations, check_writable(outputs / "runs"), arguments.seeds, **changes)
        config = jobs[0].config

        from byot.data import check_dataset, load_images
        from byot.runs import read_result, train_run
        from search.system.resources import ResourceRequest, resolve, running_ray, this_machine
        from search.system.tasks import Task, run_tasks, told_if_stopped

        request = ResourceRequest(arguments.cpus_per_run, arguments.gpus_per_run, arguments.max_concurrent)
        resources = resolve(request, *this_machine(config.device))
        check_dataset(config.dataset, config.data_dir, config.image_size)
        # what has to be downloaded or decoded is, once for all runs
        load_images(config.dataset, config.data_dir, "test", config.image_size)
        finished = {job: result for job in jobs if (result := read_result(job.config, job.folder)) is not None}
    told = f"search {search.name}: {len(configurations)} configurations x {arguments.seeds} seeds, "
    told += f"{config.epochs} epochs on all training images, {len(finished)} of {len(jobs)} runs finished before"
    print(fold(told), flush=True)
    for number, (job, result) in enumerate(finished.items(), start=1):
        print(f"{outcome_line(number, len(jobs), job, result)}  (finished before)", flush=True)
    tasks = iter([Task(job, (job.config, job.folder, resources.cpus)) for job in jobs if job not in finished])
    named = [] if arguments.search else [folder.name]  # by then another search may be the newest
    go_on = shlex.join([*this_command(), *named, *sys.argv[1:]])
    failed = 0
    try:
        if len(finished) < len(jobs):
            with (
                told_if_stopped("retrain.py", lambda: go_on),
                running_ray(resources),
                catch_stop_signals() as stop_asked,
                show_runs(config) as (say, show),
            ):
                num_ended = len(finished)

                def on_look(running: Collection[Job]) -> None:
                    show((job.folder for job in running), num_ended, len(jobs))

                ended = run_tasks(train_run, lambda: next(tasks, None), resources, stop_asked, on_look=on_look)
                for job, result, error in ended:
                    num_ended, failed = num_ended + 1, failed + bool(error)
                    say(outcome_line(num_ended, len(jobs), job, result, error))
    finally:
        try:
            runs, trial_table = write_runs(outputs, folder, search)
        except OSError as error:  # a full disk
            tell("retrain.py", f"{describe_refusal(error, folder)}; once it can, go on with: {go_on}")
            raise SystemExit(1) from None
    print_summary(search, trial_table, confirmed, runs[runs["run"].isin([job.folder.name for job in jobs])])
    print(f"\nevery run of this search: {folder / 'retrained.csv'}")
    if failed:
        tell("retrain.py", f"{failed} of {len(jobs)} runs failed; the same command tries them again")
        raise SystemExit(1)


def outcome_line(number: int, num_jobs: int, job: Job, result: dict[str, Any], error: str = "") -> str:
    line = f"{number:>{len(str(num_jobs))}}/{num_jobs}  trial {job.trial_id}  seed {job.config.seed}  "
    if error:
        return f"{line}failed: {error}  ({job.folder})"
    return f"{line}test accuracy {result['test_accuracy']:.2f} %  {result['elapsed_s']:.0f} s"


def write_runs(outputs: Path, folder: Path, search: SearchRecord) -> "tuple[pd.DataFrame, pd.DataFrame]":
    """Write retrained.csv into the search's folder: every finished run of its configurations, of other commands too.

    Returns these runs and the search's trials.
    """
    from analysis.trials import load_runs, load_trials, retrained_runs

    trials = load_trials(folder)
    runs = retrained_runs(load_runs(outputs), search, trials)
    write_text(folder / "retrained.csv", runs.to_csv(index=False))
    return runs, trials


def print_summary(search: SearchRecord, trials: "pd.DataFrame", confirmed: str, runs: "pd.DataFrame") -> None:
    """Print mean ± standard deviation over the seeds of each configuration, and the conclusion."""
    from analysis.listing import bullets, summary_table
    from analysis.trials import summarise_runs
    from analysis.verdict import judge_retrained

    summary = summarise_runs(runs)
    if not summary.empty:
        table = summary_table(summary, trials).to_text(MAY_GO)
        print(f"\ntest accuracy, mean ± standard deviation over n seeds\n{table}")
        print(f"\n{bullets(judge_retrained(search, trials, runs, confirmed))}")


if __name__ == "__main__":
    main()
