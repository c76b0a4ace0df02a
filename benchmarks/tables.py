"""The runs behind the tables of results: a named plan, done in pieces of a given length, each going on from the last.

  python benchmarks/tables.py modern-w16 --data-dir DIR                     width 16, for a CPU; likewise tiny
  python benchmarks/tables.py reference-r18 --data-dir DIR --minutes 8      stops in time; the same command goes on
  python benchmarks/tables.py search-r18 --data-dir DIR --minutes 8         the search whose choice is the last arm
  python benchmarks/tables.py speed --data-dir DIR --minutes 8              this device against the CPU, then its speed

Arms: plain cross-entropy, deep supervision alone, the reference's setting (also in bf16), the searched setting; all
train on all training images and read the test set once, after the last epoch. Every finished run leaves a record in
results/runs, and is not run again where its record is, on whatever machine. Unfinished ones go on from their
checkpoints in OUTPUTS/runs. `--toy` does the same with the embedded digits in seconds and keeps nothing in results/.
What to run in 30 minutes of one GPU: results/README.md. The tables themselves: benchmarks/readme_tables.py.
"""

import argparse
import math
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args

from benchmarks.plans import (
    CPU_COMMANDS,
    GPU_COMMANDS,
    PLANS,
    RESULTS,
    SEARCH_PLANS,
    SPEED_PLAN,
    TABLE_PLANS,
    TOY_COMMANDS,
    Arm,
    PlannedRun,
    SearchPlan,
    TablePlan,
    planned_runs,
    read_record,
)
from benchmarks.quality.pool import make_pool
from byot.config import TrainConfig
from byot.system.files import describe_refusal, read_json, write_json, write_text
from byot.system.flags import Parser, flag_name, one_line, one_sentence_errors
from byot.system.paths import PROJECT_ROOT, absolute_path, outputs_folder

NUM_TRAIN_IMAGES = {"cifar100": 50_000}
LINES_A_RUN = 10  # to say how far it is
TOY = {"dataset": "digits", "width": 4, "epochs": 2}
SEARCH_RECORDS = ("search.json", "trials.csv", "best.json", "confirmation.json", "warm_start.json")


def build_parser() -> Parser:
    parser = Parser(prog="tables.py", description=__doc__)
    parser.add_argument("plan", choices=PLANS, help="what is run")
    parser.add_argument("--data-dir", metavar="DIR", help="where CIFAR-100 is (default: data/, downloaded)")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after M minutes; the same command goes on")
    parser.add_argument("--seeds", type=int, metavar="S", help="seeds 0 to S-1 of each arm (default: the plan's)")
    parser.add_argument("--arms", nargs="+", choices=get_args(Arm), metavar="ARM", help="default: the plan's")
    parser.add_argument(
        "--concurrent", type=int, metavar="N", help="runs at once (default: 1 on a GPU, one a core on a CPU)"
    )
    parser.add_argument("--toy", action="store_true", help="the embedded digits and a narrow network, to try the plan")
    parser.add_argument("--outputs", metavar="DIR", help="where unfinished runs are kept (default: outputs/)")
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    for name in ("minutes", "seeds", "concurrent"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ValueError(f"{flag_name(name)} must be above 0, not {value:g}")
    if arguments.plan not in TABLE_PLANS:
        for name in ("seeds", "arms", "concurrent"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"{flag_name(name)} is for plans of runs: {', '.join(TABLE_PLANS)}")
    if arguments.toy and arguments.data_dir is not None:
        raise ValueError("--toy trains on the embedded digits: it takes no --data-dir")


class Places(NamedTuple):
    """Where a plan's files lie."""

    outputs: Path  # unfinished runs and searches
    results: Path  # records

    def record(self, plan: str, run: PlannedRun) -> Path:
        return self.results / "runs" / f"{run.name(plan)}.json"

    def run(self, plan: str, run: PlannedRun) -> Path:
        return self.outputs / "runs" / run.name(plan)


# ---------------------------------------------------------------- runs


def train_piece(config: TrainConfig, folder: Path, threads: int, stop_at: float | None) -> dict[str, Any] | None:
    """Do a run, or what fits of it until the given time; its result, None where it was stopped and saved."""
    import torch

    from byot.console import epoch_line
    from byot.metrics import EpochMetrics
    from byot.runs import finish_run, open_run, read_result
    from byot.system.lock import WORKER_WAIT_S, lock_folder
    from byot.system.stopping import StoppedError, catch_stop_signals

    torch.set_num_threads(threads)
    with lock_folder(folder, wait_s=WORKER_WAIT_S), catch_stop_signals() as stop_asked, ctrl_c(signal.SIG_UNBLOCK):

        def is_over() -> int:
            return signal.SIGTERM if stop_at is not None and time.time() >= stop_at else stop_asked()

        def tell(metrics: EpochMetrics) -> None:
            if metrics.epoch % math.ceil(config.epochs / LINES_A_RUN) == 0:
                print(f"{folder.name}  {epoch_line(metrics, config.epochs)}", flush=True)

        if (result := read_result(config, folder)) is not None:
            return result
        try:
            return finish_run(open_run(config, folder), on_epoch=tell, stop_asked=is_over)
        except StoppedError:
            return None


class Ended(NamedTuple):
    """How a run ended: finished with a result, stopped and saved with none, or failed for a reason."""

    run: PlannedRun
    result: dict[str, Any] | None
    error: str = ""
    diverged: bool = False


@contextmanager
def ctrl_c(how: int) -> Iterator[None]:
    """Hold Ctrl-C back from this thread (SIG_BLOCK) or let it in (SIG_UNBLOCK), within."""
    before = signal.pthread_sigmask(how, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_pieces(
    plan: str, runs: list[PlannedRun], places: Places, concurrent: int, threads: int, stop_at: float | None
) -> Iterator[Ended]:
    """Run until the given time, so many at once, and yield each as it ends; one that fails does not stop the others.

    Each has a process of its own: one that a GPU's error or the memory's end has spoilt is not used again.
    """
    from byot.system.stopping import DivergedError

    waiting = list(reversed(runs))
    running: dict[Future[dict[str, Any] | None], PlannedRun] = {}
    with ExitStack() as pools:
        while True:
            while len(running) < concurrent and waiting and (stop_at is None or time.time() < stop_at):
                run = waiting.pop()
                pool = pools.enter_context(make_pool(1))
                with ctrl_c(signal.SIG_BLOCK):  # its process is born so: until it can save, Ctrl-C waits
                    future = pool.submit(train_piece, run.config, places.run(plan, run), threads, stop_at)
                pool.shutdown(wait=False)
                running[future] = run
            if not running:
                return
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                run = running.pop(future)
                try:
                    yield Ended(run, future.result())
                except (ValueError, OSError, RuntimeError) as error:  # a full disk, a process that was killed, ...
                    yield Ended(run, None, one_line(str(error)), isinstance(error, DivergedError))


def do_table_plan(name: str, plan: TablePlan, arguments: argparse.Namespace, places: Places) -> int:
    stop_at = None if arguments.minutes is None else time.time() + 60 * arguments.minutes
    with one_sentence_errors("tables.py"):
        if arguments.toy:
            plan = plan._replace(base=plan.base.with_settings(**TOY))
        if arguments.seeds is not None:
            plan = plan._replace(num_seeds=arguments.seeds)
        if arguments.arms is not None:
            plan = plan._replace(arms=tuple(arguments.arms))
        data_dir = None if arguments.data_dir is None else str(absolute_path(arguments.data_dir))
        runs = planned_runs(plan, *places, data_dir)
        if not runs:
            first = f"run the plan {plan.search} first" if plan.search else f"the plan {name} names no search"
            raise ValueError(f"no setting of another arm has been searched yet: {first}")
        waiting = [run for run in runs if read_record(places.record(name, run), run) is None]
        if waiting or data_dir is not None:  # a named folder has to be right also where nothing is left to train
            check_images(plan.base.dataset, data_dir)

        from byot.trainer import choose_device
        from search.system.resources import count_cpus

        on_gpu = choose_device(plan.base.device).type != "cpu"
        concurrent = arguments.concurrent or (1 if on_gpu else count_cpus())
        threads = max(1, count_cpus() // concurrent)
    left, failed, code = [run.name(name) for run in waiting], 0, 0
    try:
        print(f"{name}: {len(runs)} runs, {len(runs) - len(waiting)} finished before", flush=True)
        for ended in run_pieces(name, waiting, places, concurrent, threads, stop_at):
            run, told = ended.run, ended.error
            try:
                if keep_record(name, ended, places):
                    left.remove(run.name(name))
            except OSError as error:  # the run's own result is where it was trained: the record is made of it next time
                told = describe_refusal(error, places.results)
            failed += bool(told)
            print(f"{run.name(name)}: {told or describe(run, places.run(name, run), ended.result)}", flush=True)
    except KeyboardInterrupt:  # which the runs have heard as well, and saved
        code = 128 + signal.SIGINT
    print(f"{len(runs) - len(left)} of {len(runs)} runs are finished; their records are in {places.results / 'runs'}")
    if left:
        print(go_on())
    if failed:
        print(f"tables.py: {failed} of {len(runs)} runs failed; the same command tries them again", file=sys.stderr)
    return code or int(failed > 0)


def keep_record(plan: str, ended: Ended, places: Places) -> bool:
    """Write the record of a run that is finished, or that diverged and would do so again; returns whether it is."""
    record: dict[str, Any] = {"plan": plan, "arm": ended.run.arm}
    if ended.result is not None:
        record |= ended.result
    elif ended.diverged:
        record |= {"config": ended.run.config.to_dict(), "error": ended.error}
    else:
        return False
    record["config"] = {**record["config"], "data_dir": None}
    write_json(places.record(plan, ended.run), record)
    return True


def describe(run: PlannedRun, folder: Path, result: dict[str, Any] | None) -> str:
    if result is not None:
        return f"test accuracy {result['test_accuracy']:.2f} %, {result['elapsed_s']:.0f} s"
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").is_file() else []
    return f"stopped and saved, {len(lines)} of {run.config.epochs} epochs are done"


def check_images(dataset: str, data_dir: str | None) -> None:
    """Raise ValueError if the data set is not there, or not all of it."""
    from byot.data import check_dataset, load_images

    check_dataset(dataset, data_dir)
    found = len(load_images(dataset, data_dir, "train").labels)
    expected = NUM_TRAIN_IMAGES.get(dataset, found)
    if found != expected:
        raise ValueError(f"{data_dir} holds {found} training images of {dataset}, a table needs all {expected}")


# ---------------------------------------------------------------- searches


def do_search_plan(name: str, plan: SearchPlan, arguments: argparse.Namespace, places: Places) -> int:
    """Run the search by its own command, or the rest of it, and keep its records."""
    base, flags = plan.base, list(plan.flags)
    if arguments.toy:
        base, flags = base.with_settings(**TOY), ["--num-samples", "4"]
    folder = places.outputs / "searches" / name
    # Always given: a search has other epochs where none are, and the recipe decides what the other defaults are.
    defaults = TrainConfig(recipe=base.recipe).to_dict() | {"recipe": None, "epochs": None}
    changed = {setting: value for setting, value in base.to_dict().items() if value != defaults[setting]}
    command: list[Any] = [sys.executable, PROJECT_ROOT / "search" / "tune.py", "--name", name]
    command += ["--outputs", places.outputs, *flags]
    command += [part for setting, value in changed.items() for part in (flag_name(setting), value)]
    if arguments.data_dir is not None:
        command += ["--data-dir", absolute_path(arguments.data_dir)]
    if arguments.minutes is not None:
        command += ["--time-budget", f"{arguments.minutes:g}m"]
    code = run_to_its_end(command)
    if (folder / "search.json").is_file():
        kept = places.results / "searches" / name
        for record in SEARCH_RECORDS:
            if (folder / record).is_file():
                copy_record(folder / record, kept / record)
        print(f"its records are in {kept}")
    return code


def run_to_its_end(command: list[Any]) -> int:
    """Run a command, also to the end of what it does on Ctrl-C, which it hears as well; returns its exit code."""
    with subprocess.Popen([str(part) for part in command]) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


def copy_record(source: Path, target: Path) -> None:
    """Copy a record, leaving out where this machine has its data."""
    if source.suffix != ".json":
        write_text(target, source.read_text())
        return
    record = read_json(source)
    if isinstance(record.get("config"), dict):
        record["config"] = {**record["config"], "data_dir": None}
    write_json(target, record)


# ---------------------------------------------------------------- speed


def do_speed_plan(arguments: argparse.Namespace, places: Places) -> int:
    """The device against the CPU, then its speed; each part once, and one that fails does not stop the others."""
    import torch

    on_gpu = torch.cuda.is_available()
    commands = TOY_COMMANDS if arguments.toy else GPU_COMMANDS if on_gpu else CPU_COMMANDS
    folder = places.results / "benchmarks" / ("gpu" if on_gpu else "cpu")
    stop_at = None if arguments.minutes is None else time.time() + 60 * arguments.minutes
    first_code = 0
    for name, (script, *flags) in commands.items():
        output = folder / f"{name}.json"
        if output.is_file():
            print(f"{output} is there already", flush=True)
            continue
        if stop_at is not None and time.time() >= stop_at:
            print(f"the time is over; {go_on()}")
            break
        if arguments.data_dir is not None and name != "concurrent-trials":  # which has random images
            flags += ["--data-dir", str(absolute_path(arguments.data_dir))]
        command = [sys.executable, str(PROJECT_ROOT / script), *flags, "--output", str(output)]
        print(f"\n{shlex.join(command)}", flush=True)
        code = run_to_its_end(command)
        if code in (-signal.SIGINT, 128 + signal.SIGINT):
            return 128 + signal.SIGINT
        first_code = first_code or code
    return first_code


def go_on() -> str:
    return f"go on with: {shlex.join([sys.executable, *sys.argv])}"


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("tables.py"):
        check_arguments(arguments)
        outputs = outputs_folder(arguments.outputs)
    places = Places(outputs / "toy", outputs / "toy" / "results") if arguments.toy else Places(outputs, RESULTS)
    name = arguments.plan
    if name in TABLE_PLANS:
        code = do_table_plan(name, TABLE_PLANS[name], arguments, places)
    elif name == SPEED_PLAN:
        code = do_speed_plan(arguments, places)
    else:
        code = do_search_plan(name, SEARCH_PLANS[name], arguments, places)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
