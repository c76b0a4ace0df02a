"""Measures what searching costs: beside training, with very many trials, and for trials that share the machine.

  python benchmarks/speed/searches.py overhead          trivial trials, then trials of some epochs on the digits
  python benchmarks/speed/searches.py overhead --data-dir DIR --width 16 --epochs 1 --num-samples 8      on CIFAR-100
  python benchmarks/speed/searches.py many              1,000 trivial trials, some minutes on two cores
  python benchmarks/speed/searches.py at-once           ResNet18 at width 16; --width 64 --most 4 is another

overhead: seconds a trial, and the share of the time in which the workers train. Training is what the trials' own
records say their epochs took, validation included. All else is overhead: Ray, starting workers, building networks,
proposing, checkpoints, records.

many: whether a search stays quick and small however many trials it has. Its trials are one step of a network of width 1
on a few of the digits, so that what a trial costs is Ray, the proposal and the records. Each row is a block of trials,
in seconds a trial: all, and the driver's processor, which other work on the machine changes least. The first block has
the start of the workers in it. The driver's resident memory is that at the block's end, on Linux.

at-once: images a second that several trials train on together, against their number. On a GPU its memory and processor
are shared; `tune.py --gpus-per-trial auto` chooses by the same measurement. On a CPU the cores are dealt out, so that
fewer trials have more threads each.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import common
from benchmarks.speed.train_speed import resident_gib, some_images
from byot.config import TrainConfig
from byot.console import text_table
from byot.data import LabelledImages, take
from byot.system.files import read_json_lines
from byot.system.flags import Parser, one_sentence_errors
from byot.trainer import choose_device
from search.settings import SearchSettings
from search.system.resources import ResourceRequest, resolve, running_ray, start_ray, this_machine

DIGITS: dict[str, Any] = {"recipe": "reference", "dataset": "digits", "val_fraction": 0.2}
TRIVIAL = TrainConfig(width=4, epochs=1, **DIGITS)
ONE_STEP = TrainConfig(width=1, epochs=1, batch_size=32, precision="fp32", **DIGITS)
NUM_VAL = 64  # images on which trials of one step are compared


@contextmanager
def timed(functions: dict[str, str]) -> Iterator[dict[str, float]]:
    """Within, add up the seconds spent in the functions that are given by name and dotted path."""
    spent = dict.fromkeys(functions, 0.0)

    def time_calls(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            began_at = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                spent[name] += time.perf_counter() - began_at

        return call

    with ExitStack() as patches:
        for name, path in functions.items():
            patches.enter_context(mock.patch(path, time_calls(name, resolve_name(path))))
        yield spent


def search(
    folder: Path, base: TrainConfig, settings: SearchSettings, train: LabelledImages, val: LabelledImages
) -> int:
    """Do a whole search in a new folder; returns how many trials ran at once."""
    from search import driver
    from search.plan import SearchPlan
    from search.space import DEFAULT_SPACE
    from search.system.remote import Store

    folder.mkdir()
    resources = resolve(ResourceRequest(), *this_machine(base.device))
    code = driver.run_search(SearchPlan(Store(folder), base, settings, DEFAULT_SPACE, train, val, resources))
    assert code == 0, "the search failed"
    return resources.max_concurrent


# ---------------------------------------------------------------- overhead


def measure_overhead(base: TrainConfig, settings: SearchSettings, began_at: float) -> dict[str, Any]:
    """Do the search in this process, started at `began_at`; return what its parts took, in seconds."""
    from search import driver, plan  # noqa: F401  the driver, so that its import is in imports_s

    imports_s = time.time() - began_at
    functions = {
        "data_s": "search.plan.load_search_data",
        "start_ray_s": "search.system.resources.start_ray",
        "fit_s": "search.driver._run_tuner",
        "search_s": "search.driver.run_search",
    }
    with tempfile.TemporaryDirectory() as folder, timed(functions) as spent:
        slots = search(Path(folder) / "search", base, settings, *plan.load_search_data(base))
        files = Path(folder).glob("search/trials/*/metrics.jsonl")
        epochs = [record["elapsed_s"] for file in files for record in read_json_lines(file)]
    trials, fit_s, training_s = settings.num_samples, spent["fit_s"], sum(epochs)
    return spent | {
        "imports_s": imports_s,
        "wall_s": time.time() - began_at,
        "training_s": training_s,
        "epochs": len(epochs),
        "trials": trials,
        "slots": slots,
        "s_a_trial": fit_s / trials,
        "overhead_s_a_trial": (fit_s * slots - training_s) / trials,
        "busy_share": training_s / (fit_s * slots),
        "wall_over_training": spent["search_s"] / (training_s / slots),
    }


def overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    with one_sentence_errors("searches.py"):
        real = TrainConfig(width=arguments.width, epochs=arguments.epochs, **DIGITS)
        if arguments.data_dir:
            real = real.with_settings(dataset="cifar100", data_dir=arguments.data_dir, val_fraction=0.1)
        searches = {"trivial": (TRIVIAL, 8), "real": (real, arguments.num_samples)}
        jobs = {
            name: (base, SearchSettings(num_samples=trials, confirm=0)) for name, (base, trials) in searches.items()
        }
    rows = {name: common.in_fresh_process(measure_overhead, *job, time.time()) for name, job in jobs.items()}
    cells = [[measure, *(f"{row[measure]:.4g}" for row in rows.values())] for measure in rows["real"]]
    print(text_table(["", *rows], cells))
    return {"searches": rows}


# ---------------------------------------------------------------- many trials


def measure_blocks(settings: SearchSettings, block: int) -> list[dict[str, float]]:
    """Do the search and return a row for each block of trials."""
    start_ray(resolve(ResourceRequest(), *this_machine(ONE_STEP.device)))  # before what imports Ray

    from search.plan import load_search_data
    from search.records import SearchRecords

    rows, ended, end = list[dict[str, float]](), 0, SearchRecords.end
    began_at, began_cpu_s = time.perf_counter(), time.process_time()

    def end_and_measure(*given: Any, **named: Any) -> Any:
        nonlocal ended, began_at, began_cpu_s
        record = end(*given, **named)
        ended += 1
        if ended % block == 0:
            now, cpu_s = time.perf_counter(), time.process_time()
            spent = {"all_s_a_trial": (now - began_at) / block, "cpu_s_a_trial": (cpu_s - began_cpu_s) / block}
            rows.append({"trials": float(ended), **spent, "memory_mib": resident_gib("VmRSS") * 1024})
            began_at, began_cpu_s = now, cpu_s
        return record

    train, val = load_search_data(ONE_STEP)
    few = take(train, np.arange(ONE_STEP.batch_size)), take(val, np.arange(NUM_VAL))
    is_started = mock.patch("search.system.resources.start_ray")
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(SearchRecords, "end", end_and_measure), is_started:
        search(Path(folder) / "search", ONE_STEP, settings, *few)
    return rows


def many(arguments: argparse.Namespace) -> dict[str, Any]:
    with one_sentence_errors("searches.py"):
        settings = SearchSettings(num_samples=arguments.num_samples, confirm=0)
        if arguments.block > settings.num_samples:
            raise ValueError(f"--block must be at most --num-samples, not {arguments.block}")
    rows = measure_blocks(settings, arguments.block)
    header = [name.removesuffix("_s_a_trial") for name in rows[0]]
    print(text_table(header, [[f"{value:.4g}" for value in row.values()] for row in rows]))
    sizes = {"num_train_images": ONE_STEP.batch_size, "num_val_images": NUM_VAL}
    return {"config": ONE_STEP.to_dict(), **sizes, "blocks": rows}


# ---------------------------------------------------------------- trials at once


def measure_at_once(config: TrainConfig, most: int | None) -> Iterator[dict[str, Any]]:
    """Yield the images a second in all for one trial, two, and so on, as long as there is memory for them."""
    from search.probe import probing

    machine = resolve(ResourceRequest(), *this_machine(config.device))
    data = some_images(None, 20 * config.batch_size)
    with running_ray(machine):
        for trials in range(1, (most or (8 if machine.num_gpus else machine.num_cpus)) + 1):
            threads = max(1, machine.num_cpus // trials)
            with probing(config, data, cpus=threads, gpus=1 / trials if machine.num_gpus else 0) as measure:
                images_per_s = measure(trials)
            if images_per_s is None:
                print(f"{trials} at once: out of memory")
                return
            print(f"{trials} at once, {threads} threads each: {images_per_s:.0f} images/s in all", flush=True)
            yield {"trials": trials, "threads_each": threads, "images_per_s": images_per_s}


def at_once(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = {name: getattr(arguments, name) for name in ("model", "width", "batch_size")}
    with one_sentence_errors("searches.py"):
        config = TrainConfig(recipe="reference", **settings)
    return {"settings": {**settings, "most": arguments.most}, "rows": list(measure_at_once(config, arguments.most))}


# ---------------------------------------------------------------- command line


def main() -> None:
    parser = Parser(prog="searches.py", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="overhead | many | at-once")
    flags = kinds.add_parser("overhead")
    flags.add_argument("--data-dir", type=common.data_dir, metavar="DIR", help="CIFAR-100 (default: the digits)")
    flags.add_argument("--width", type=int, default=16, help="[16]")
    flags.add_argument("--epochs", type=int, default=10, help="[10]")
    flags.add_argument("--num-samples", type=int, default=12, help="trials [12]")
    flags.set_defaults(measure=overhead)
    flags = kinds.add_parser("many")
    flags.add_argument("--num-samples", type=int, default=1000, help="trials [1000]")
    flags.add_argument("--block", type=common.number(1), default=100, help="trials a row [100]")
    flags.set_defaults(measure=many)
    flags = kinds.add_parser("at-once")
    flags.add_argument("--model", default="resnet18", help="[resnet18]")
    flags.add_argument("--width", type=int, default=16, help="[16]")
    flags.add_argument("--batch-size", type=int, default=128, help="[128]")
    flags.add_argument("--most", type=common.number(1), help="trials (default: 8 on a GPU, one a core on a CPU)")
    flags.set_defaults(measure=at_once)
    for flags in kinds.choices.values():
        flags.add_argument("--output", type=common.file_to_write, metavar="FILE", help="write the record here as JSON")
    arguments = parser.parse_args()
    common.save_record(arguments.output, arguments.measure(arguments), choose_device("auto").type)


if __name__ == "__main__":
    main()
