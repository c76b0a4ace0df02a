"""Does the runs behind the tables of results: a named plan, in pieces of a given length that go on from each other.

  python benchmarks/tables.py modern-w16 --data-dir DIR                     width 16, for a CPU; likewise tiny
  python benchmarks/tables.py reference-r18 --data-dir DIR --minutes 8      stops in time; the same command goes on
  python benchmarks/tables.py search-r18 --data-dir DIR --minutes 8         the search whose choice is the last arm

Arms: plain cross-entropy, deep supervision alone, the reference's setting (also in bf16), the searched setting; all
train on all training images, or those that the plan names, and read the test set once, after the last epoch. Every
finished run leaves a record in results/runs, and is not run again where its record is, on whatever machine. Unfinished
ones go on from their checkpoints in OUTPUTS/runs (with other images in OUTPUTS/harder-runs), whose metrics.jsonl shows
how far they are. Stopping costs each run at most its last epoch, or ten minutes of it. `--toy` does the same with the
embedded digits in seconds and keeps nothing in results/. What to run in 30 minutes of one GPU: results/README.md. The
tables themselves: benchmarks/readme_tables.py.
"""

import argparse
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from benchmarks import common
from benchmarks.harder_images import ALL_IMAGES, write_harder
from benchmarks.plans import (
    MOST_SEEDS,
    RESULTS,
    SEARCH_PLANS,
    TABLE_PLANS,
    Arm,
    PlannedRun,
    TablePlan,
    planned_runs,
    read_record,
)
from byot.config import DATASETS, TrainConfig
from byot.system.files import describe_refusal, read_json, refusals_at, write_json, write_text
from byot.system.flags import Parser, flag_name, one_sentence_errors, this_command
from byot.system.paths import PROJECT_ROOT, outputs_folder
from byot.system.stopping import DivergedError, catch_stop_signals

if TYPE_CHECKING:  # importing them imports torch
    from search.system.resources import Resources
    from search.system.tasks import Done

TOY = {"dataset": "digits", "width": 4, "epochs": 2}
SEARCH_RECORDS = ("search.json", "trials.csv", "best.json", "confirmation.json", "warm_start.json")


def without_data_dir(record: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a record where this machine has its data."""
    return record | {"config": {**record["config"], "data_dir": None}} if "config" in record else record


# ---------------------------------------------------------------- runs


def check_images(dataset: str, data_dir: str | None) -> None:
    """Raise ValueError if the data set is not there, or not all of it."""
    from byot.data import check_dataset, load_images

    check_dataset(dataset, data_dir)
    found = len(load_images(dataset, data_dir, "train").labels)
    expected = DATASETS[dataset].num_train_images
    if found != expected:
        raise ValueError(f"{data_dir} holds {found} training images of {dataset}, a table needs all {expected}")


def check_precision(runs: list[PlannedRun], results: Path) -> None:
    """Raise ValueError if records of a plan were computed in another precision than this machine would choose."""
    from byot.trainer import choose_autocast_dtype, choose_device

    for run in runs:
        record, asked = read_record(results, run), run.config.precision
        if asked == "auto" and record is not None and "precision" in record:
            here = "fp32" if choose_autocast_dtype(asked, choose_device(run.config.device)) is None else "bf16"
            if record["precision"] != here:
                raise ValueError(
                    f"the record of {run.name} was computed in {record['precision']} and this machine computes in "
                    f"{here}: runs that are compared must not differ in that, so the plan goes on on such a machine"
                )


def share_machine(device: str, concurrent: int | None) -> "Resources":
    """Give each of so many runs its part of the CPUs and GPUs here; by default one run a GPU, or a core of a CPU."""
    from search.system.resources import ResourceRequest, resolve, this_machine

    num_cpus, num_gpus, where = this_machine(device)
    concurrent = concurrent or num_gpus or num_cpus
    request = ResourceRequest(max(1, num_cpus // concurrent), min(1.0, num_gpus / concurrent), concurrent)
    return resolve(request, num_cpus, num_gpus, where)


def run_table_plan(name: str, plan: TablePlan, arguments: argparse.Namespace, outputs: Path, results: Path) -> int:
    from byot.console import show_runs
    from byot.runs import train_run
    from search.system.resources import running_ray
    from search.system.tasks import Task, run_tasks, told_if_stopped

    folder = outputs / ("runs" if plan.images == ALL_IMAGES else "harder-runs")  # apart: their settings are the same
    with one_sentence_errors("tables.py"):
        asked = plan._replace(num_seeds=arguments.seeds or plan.num_seeds)
        if arguments.arms:
            asked = asked._replace(arms=tuple(arguments.arms), side_arms=())
        runs = planned_runs(name, asked, outputs, results)
        if not runs:
            first = f"run the plan {plan.search} first" if plan.search else f"the plan {name} names no search"
            raise ValueError(f"no setting of another arm has been searched yet: {first}")
        waiting = [run for run in runs if read_record(results, run) is None]
        data_dir = arguments.data_dir
        if waiting or data_dir:  # a named folder has to be right also where nothing is left to train
            check_images(plan.base.dataset, data_dir)
        if waiting:
            check_precision(planned_runs(name, plan._replace(num_seeds=MOST_SEEDS), outputs, results), results)
            if plan.images != ALL_IMAGES:
                data_dir = write_harder(plan.base.dataset, data_dir, plan.images)
        resources = share_machine(plan.base.device, arguments.concurrent)
        waiting = [run._replace(config=run.config.with_settings(data_dir=data_dir)) for run in waiting]
    tasks = iter([Task(run, (run.config, folder / run.name, resources.cpus)) for run in waiting])
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    go_on, num_left, num_failed = shlex.join([*this_command(), *sys.argv[1:]]), len(waiting), 0
    print(f"{name}: {len(runs)} runs, {len(runs) - len(waiting)} finished before", flush=True)
    if waiting:
        with (
            told_if_stopped("tables.py", lambda: go_on),
            running_ray(resources),
            catch_stop_signals() as stop_asked,
            show_runs(plan.base) as (say, show),
        ):

            def on_look(running: Collection[PlannedRun]) -> None:
                show((folder / run.name for run in running), len(runs) - num_left, len(runs))

            for done in run_tasks(train_run, lambda: next(tasks, None), resources, stop_asked, deadline, on_look):
                is_kept, told = keep_record(name, done, results)
                num_left -= is_kept
                num_failed += not (is_kept and done.result)
                say(f"{done.key.name}: {told}")
    print(f"{len(runs) - num_left} of {len(runs)} runs are finished; their records are in {results / 'runs'}")
    if num_left:
        print(f"go on with: {go_on}")
    if num_failed:
        print(
            f"tables.py: {num_failed} of {len(runs)} runs failed; what is not recorded is tried again", file=sys.stderr
        )
    return int(num_failed > 0)


def keep_record(plan: str, done: "Done[PlannedRun]", results: Path) -> tuple[bool, str]:
    """Record a run that is finished, or that diverged for good; return whether it is recorded, and what to say."""
    record, told = done.result, done.error
    if record is not None:
        told = f"test accuracy {record['test_accuracy']:.2f} %, {record['elapsed_s']:.0f} s"
    elif told.startswith(DivergedError.__name__):
        record = {"config": done.key.config.to_dict(), "error": told}
    else:
        return False, told
    try:
        path = results / "runs" / f"{done.key.name}.json"
        write_json(path, without_data_dir({"plan": plan, "arm": done.key.arm, **record}))
    except OSError as error:  # the run's own result is where it was trained: the record is made of it next time
        return False, describe_refusal(error, results)
    return True, told


# ---------------------------------------------------------------- searches


def run_search_plan(name: str, arguments: argparse.Namespace, outputs: Path, results: Path) -> int:
    """Run the search by its own command, or the rest of it, and keep its records."""
    base, flags = SEARCH_PLANS[name]
    if arguments.toy:
        base, flags = base.with_settings(**TOY), ("--num-samples", "4")
    # Always given: a search has other epochs where none are, and the recipe decides what the other defaults are.
    defaults = TrainConfig(recipe=base.recipe).to_dict() | {"recipe": None, "epochs": None}
    changed = {setting: value for setting, value in base.to_dict().items() if value != defaults[setting]}
    command: list[Any] = [PROJECT_ROOT / "search" / "tune.py", "--name", name, "--outputs", outputs, *flags]
    command += ["--confirm", 0]
    command += [part for setting, value in changed.items() for part in (flag_name(setting), value)]
    if arguments.data_dir:
        command += ["--data-dir", arguments.data_dir]
    if arguments.minutes:
        command += ["--time-budget", f"{arguments.minutes:g}m"]
    with catch_stop_signals() as stop_asked, subprocess.Popen([sys.executable, *map(str, command)]) as search:
        while search.poll() is None and not stop_asked():
            time.sleep(1)
        if stop_asked() == signal.SIGTERM:  # a Ctrl-C in a terminal the search hears as well
            search.terminate()
        code = search.wait()  # its records are kept when it has ended
    folder, kept = outputs / "searches" / name, results / "searches" / name
    with one_sentence_errors("tables.py"), refusals_at(kept):
        for source in (folder / record for record in SEARCH_RECORDS if (folder / record).is_file()):
            if source.suffix == ".json":
                write_json(kept / source.name, without_data_dir(read_json(source)))
            else:
                write_text(kept / source.name, source.read_text())
    if (folder / "search.json").is_file():
        print(f"its records are in {kept}")
    return code


# ---------------------------------------------------------------- command line


def check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise ValueError(f"--minutes must be above 0, not {arguments.minutes:g}")
    for name in ("seeds", "arms", "concurrent"):
        if arguments.plan not in TABLE_PLANS and getattr(arguments, name) is not None:
            raise ValueError(f"{flag_name(name)} is for plans of runs: {', '.join(TABLE_PLANS)}")
    if arguments.toy and arguments.data_dir is not None:
        raise ValueError("--toy trains on the embedded digits: it takes no --data-dir")


def main() -> None:
    parser = Parser(prog="tables.py", description=__doc__)
    add = parser.add_argument
    add("plan", choices=(*TABLE_PLANS, *SEARCH_PLANS), help="what is run")
    add("--data-dir", type=common.data_dir, metavar="DIR", help="where CIFAR-100 is (default: data/, downloaded)")
    add("--minutes", type=float, metavar="M", help="stop after M minutes; the same command goes on")
    add(
        "--seeds",
        type=common.number(1),
        metavar="S",
        help="seeds 0 to S-1, half as many of a side arm (default: the plan's)",
    )
    add("--arms", nargs="+", choices=get_args(Arm), metavar="ARM", help="default: the plan's")
    add("--concurrent", type=common.number(1), metavar="N", help="runs at once (default: one a GPU or CPU core)")
    add("--toy", action="store_true", help="the embedded digits and a narrow network, to try the plan")
    add("--outputs", metavar="DIR", help="where unfinished runs are kept (default: outputs/)")
    arguments = parser.parse_args()
    with one_sentence_errors("tables.py"):
        check_arguments(arguments)
        outputs = outputs_folder(arguments.outputs)
    results, name = RESULTS, arguments.plan
    if arguments.toy:
        outputs, results = outputs / "toy", outputs / "toy" / "results"
    if name in SEARCH_PLANS:
        raise SystemExit(run_search_plan(name, arguments, outputs, results))
    plan = TABLE_PLANS[name]
    base = plan.base.with_settings(**TOY) if arguments.toy else plan.base
    plan = plan._replace(base=base, images=ALL_IMAGES if arguments.toy else plan.images)
    raise SystemExit(run_table_plan(name, plan, arguments, outputs, results))


if __name__ == "__main__":
    main()
