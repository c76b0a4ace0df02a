"""Retrain the best configurations of a search on all training images, over several seeds, in parallel by Ray.

  python analysis/retrain.py --top 3 --seeds 3            of the newest search
  python analysis/retrain.py NAME --top 1 --seeds 5 --no-with-controls

The reference setting and deep supervision alone are retrained too, so that there is something to compare with. Each
run has its own folder outputs/runs/NAME and its own checkpoints: the same command leaves finished runs alone and goes
on with the others. The test set is read once a run, at its end; the configurations were chosen on validation images.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from byot.config import TrainConfig
from byot.system.files import write_text
from byot.system.flags import Parser, flag_name, one_sentence_errors
from byot.system.paths import absolute_path, check_writable, outputs_folder
from byot.system.stopping import StoppedError, catch_stop_signals

if TYPE_CHECKING:
    import pandas as pd

    from byot.runs import StopAsked
    from search.system.resources import Slots

MOST_SEEDS = 10_000


class Job(NamedTuple):
    """One run: a trial's settings with a seed."""

    trial_id: str
    config: TrainConfig
    folder: Path


class Outcome(NamedTuple):
    """How a job ended: its result, or why it failed."""

    job: Job
    result: dict[str, Any] | None
    error: str = ""


def build_parser() -> Parser:
    parser = Parser(prog="retrain.py", description=__doc__)
    parser.add_argument("search", nargs="?", metavar="SEARCH", help="name of a search (default: the newest)")
    parser.add_argument("--top", type=int, default=3, metavar="K", help="configurations, best on validation first [3]")
    parser.add_argument("--seeds", type=int, default=3, metavar="S", help="runs of each, with seeds 0 to S-1 [3]")
    parser.add_argument(
        "--with-controls",
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
    for name in ("top", "seeds", "epochs", "cpus_per_run", "max_concurrent"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{flag_name(name)} must be at least 1, not {value}")
    if arguments.seeds > MOST_SEEDS:
        raise ValueError(f"--seeds must be at most {MOST_SEEDS}, not {arguments.seeds}")
    gpus = arguments.gpus_per_run
    if gpus is not None and not (0 <= gpus <= 1 or (gpus > 1 and gpus % 1 == 0)):
        raise ValueError(f"--gpus-per-run must be a fraction of 1 or a whole number, not {gpus:g}")


def choose_configurations(
    search: dict[str, Any], trials: "pd.DataFrame", top: int, with_controls: bool
) -> dict[str, TrainConfig]:
    """Trial id -> settings of the best `top` trials, then of the reference setting and the control if asked for.

    Trials with the same settings count once. Raises ValueError if no trial has reached the last epoch.
    """
    from analysis.trials import find_role, rank, trial_config

    metric, epochs = search["metric"], search["config"]["epochs"]
    ranked = rank(trials, metric, search["mode"], epochs)
    if ranked.empty:
        raise ValueError(f"no trial of the search {search['name']} has reached its last epoch ({epochs}) yet")
    chosen: dict[str, TrainConfig] = {}
    for _, trial in ranked.iterrows():
        config = trial_config(search, trial)
        if len(chosen) < top and config not in chosen.values():
            chosen[trial["trial_id"]] = config
    for role in ("reference", "control") if with_controls else ():
        trial = find_role(trials, role, metric, epochs)
        if trial is not None and trial_config(search, trial) not in chosen.values():
            chosen[trial["trial_id"]] = trial_config(search, trial)
    return chosen


def plan_jobs(configurations: dict[str, TrainConfig], runs_folder: Path, num_seeds: int, **changes: Any) -> list[Job]:
    """Every configuration with seed 0, then every one with seed 1: stopped early, all have as many runs."""
    jobs = []
    for seed in range(num_seeds):
        for trial_id, configuration in configurations.items():
            config = configuration.with_settings(seed=seed, **changes)
            jobs.append(Job(trial_id, config, runs_folder / config.run_name()))
    return jobs


def check_data(config: TrainConfig) -> None:
    """Raise ValueError if the data set is not there; download it if that is how it is to come, once for all runs."""
    from byot.data import check_dataset, find_parquet, load_images

    check_dataset(config.dataset, config.data_dir)
    if config.dataset != "digits" and not find_parquet(config.dataset, config.data_dir, "train"):
        load_images(config.dataset, config.data_dir, "test")


def run_jobs(jobs: list[Job], slots: "Slots", stop_asked: "StopAsked") -> Iterator[Outcome]:
    """Run the jobs on this machine by Ray and yield each as it ends; one that fails does not stop the others."""
    import ray

    from byot.runs import train_run
    from search.system.tasks import Task, run_tasks

    waiting = iter([Task(job, (job.config, job.folder, slots.cpus)) for job in jobs])
    try:
        for done in run_tasks(train_run, lambda: next(waiting, None), slots, stop_asked):
            yield Outcome(*done)
    finally:
        ray.shutdown()


def outcome_line(position: int, num_jobs: int, outcome: Outcome, *, before: bool = False) -> str:
    job, result = outcome.job, outcome.result
    line = f"{position:>{len(str(num_jobs))}}/{num_jobs}  trial {job.trial_id}  seed {job.config.seed}  "
    if result is None:
        return f"{line}failed: {outcome.error}  ({job.folder})"
    line += f"test accuracy {result['test_accuracy']:.2f} %  {result['elapsed_s']:.0f} s"
    return f"{line}  (finished before)" if before else line


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("retrain.py"):
        check_arguments(arguments)
        outputs = outputs_folder(arguments.outputs)

        from analysis.trials import find_search, load_search, load_trials

        folder = find_search(outputs, arguments.search)
        search, trials = load_search(folder), load_trials(folder)
        configurations = choose_configurations(search, trials, arguments.top, arguments.with_controls)
        changes: dict[str, Any] = {}
        if arguments.epochs is not None:
            changes["epochs"] = arguments.epochs
        if arguments.data_dir is not None:
            changes["data_dir"] = str(absolute_path(arguments.data_dir))
        if arguments.gpus_per_run == 0:
            changes["device"] = "cpu"
        jobs = plan_jobs(configurations, check_writable(outputs / "runs"), arguments.seeds, **changes)

        from byot.runs import read_result
        from search.system.resources import RayStartError, Share, share_machine, start_ray

        check_data(jobs[0].config)
        asked = Share(arguments.cpus_per_run, arguments.gpus_per_run, arguments.max_concurrent)
        slots = share_machine(asked, jobs[0].config.device)
        finished = [Outcome(job, result) for job in jobs if (result := read_result(job.config, job.folder))]
    done_before = {outcome.job.folder for outcome in finished}
    waiting = [job for job in jobs if job.folder not in done_before]
    print(
        f"search {search['name']}: {len(configurations)} configurations x {arguments.seeds} seeds, "
        f"{jobs[0].config.epochs} epochs on all training images, {len(finished)} of {len(jobs)} runs finished before",
        flush=True,
    )
    for position, outcome in enumerate(finished, start=1):
        print(outcome_line(position, len(jobs), outcome, before=True), flush=True)
    named = [] if arguments.search else [folder.name]  # by then another search may be the newest
    go_on = shlex.join([sys.executable, *sys.argv[:1], *named, *sys.argv[1:]])
    failed = 0
    try:
        if waiting:
            start_ray(slots)
            with catch_stop_signals() as stop_asked:  # after Ray has started, which has handlers of its own
                for position, outcome in enumerate(run_jobs(waiting, slots, stop_asked), start=len(finished) + 1):
                    failed += outcome.result is None
                    print(outcome_line(position, len(jobs), outcome), flush=True)
    except (KeyboardInterrupt, StoppedError) as stopped:
        print(f"\nstopped; go on with: {go_on}", file=sys.stderr)
        number = stopped.signal_number if isinstance(stopped, StoppedError) else signal.SIGINT
        raise SystemExit(128 + number) from None
    except RayStartError as error:
        print(f"retrain.py: Ray did not start ({error}); try again with: {go_on}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        write_runs(outputs, folder, search, trials)
    print_summary(outputs, search, trials, jobs)
    print(f"\nevery run of this search: {folder / 'retrained.csv'}")
    if failed:
        print(f"retrain.py: {failed} of {len(jobs)} runs failed; the same command tries them again", file=sys.stderr)
        raise SystemExit(1)


def write_runs(outputs: Path, folder: Path, search: dict[str, Any], trials: "pd.DataFrame") -> None:
    """Write retrained.csv into the search's folder: every finished run of its configurations, of other commands too."""
    from analysis.trials import load_runs, retrained_runs

    write_text(folder / "retrained.csv", retrained_runs(load_runs(outputs), search, trials).to_csv(index=False))


def print_summary(outputs: Path, search: dict[str, Any], trials: "pd.DataFrame", jobs: list[Job]) -> None:
    """Print mean ± standard deviation over the seeds of each configuration, and what it allows to say."""
    from analysis.listing import bullets, summary_table
    from analysis.trials import load_runs, retrained_runs, summarise_runs
    from analysis.verdict import judge_retrained

    runs = retrained_runs(load_runs(outputs), search, trials)
    summary = summarise_runs(runs[runs["run"].isin([job.folder.name for job in jobs])])
    if summary.empty:
        return
    print(
        f"\ntest accuracy, mean ± standard deviation over n seeds\n{summary_table(search, summary, trials).to_text()}"
    )
    print(f"\n{bullets(judge_retrained(search, trials, summary))}")


if __name__ == "__main__":
    main()
