"""What a search costs beside training: seconds a trial, and the share of the time in which its workers train.

  python benchmarks/speed/search_overhead.py          trivial trials, then trials of some epochs on the digits
  python benchmarks/speed/search_overhead.py --data-dir DIR --width 16 --epochs 1 --num-samples 8       on CIFAR-100

Each search is a whole one, in a process of its own and a folder that is removed. Training is what the trials' own
records say their epochs took, validation included. All else is overhead: Ray, starting workers, building networks,
proposing, checkpoints, records.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from byot.config import TrainConfig
from byot.system.files import read_json_lines, write_json
from byot.system.flags import Parser, one_sentence_errors
from byot.system.paths import absolute_path
from search.settings import SearchSettings

TRIVIAL = ("--width", "4", "--epochs", "1", "--num-samples", "8")
PHASES = ("start_ray", "_fit")  # of search/driver.py


class Plan(NamedTuple):
    """One search to be measured."""

    base: TrainConfig
    settings: SearchSettings


def build_parser() -> Parser:
    parser = Parser(prog="search_overhead.py", description=__doc__)
    parser.add_argument("--data-dir", metavar="DIR", help="CIFAR-100 (default: the digits)")
    parser.add_argument("--width", type=int, default=16, help="[16]")
    parser.add_argument("--epochs", type=int, default=10, help="[10]")
    parser.add_argument("--num-samples", type=int, default=12, help="trials [12]")
    parser.add_argument("--output", metavar="FILE", help="write the record here as JSON")
    parser.add_argument("--only-this", action="store_true", help=argparse.SUPPRESS)
    return parser


def plan(arguments: argparse.Namespace) -> Plan:
    on_cifar = arguments.data_dir is not None
    base = TrainConfig(
        recipe="reference",
        dataset="cifar100" if on_cifar else "digits",
        data_dir=str(absolute_path(arguments.data_dir)) if on_cifar else None,
        width=arguments.width,
        epochs=arguments.epochs,
        val_fraction=0.1 if on_cifar else 0.2,
    )
    return Plan(base, SearchSettings(num_samples=arguments.num_samples))


def measure(planned: Plan, began_at: float) -> dict[str, Any]:
    """Do the search and return what its parts took, in seconds."""
    from search import driver
    from search.space import DEFAULT_SPACE
    from search.system.resources import Share, share_machine

    took = {"imports_s": time.perf_counter() - began_at}

    def timed(name: str, work: Callable[..., Any], *given: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return work(*given, **named)
        finally:
            took[name] = took.get(name, 0.0) + time.perf_counter() - started

    with tempfile.TemporaryDirectory() as folder:
        search = Path(folder) / "search"
        search.mkdir()
        data = timed("data_s", driver.load_search_data, planned.base)
        room = share_machine(Share(None, None, None), planned.base.device)
        with ExitStack() as patches:
            for name in PHASES:
                work = partial(timed, f"{name.strip('_')}_s", getattr(driver, name))
                patches.enter_context(mock.patch.object(driver, name, work))
            plan = driver.SearchPlan(search, planned.base, planned.settings, DEFAULT_SPACE, None)
            code = timed("search_s", driver.run_search, plan, data, room)
        assert code == 0, "the search failed"
        epochs = [record for file in search.glob("trials/*/metrics.jsonl") for record in read_json_lines(file)]
    training_s = sum(record["elapsed_s"] for record in epochs)
    trials, slots = planned.settings.num_samples, room.max_concurrent
    return took | {
        "wall_s": time.perf_counter() - began_at,
        "training_s": training_s,
        "epochs": len(epochs),
        "trials": trials,
        "slots": slots,
        "s_a_trial": took["fit_s"] / trials,
        "overhead_s_a_trial": (took["fit_s"] * slots - training_s) / trials,
        "busy_share": training_s / (took["fit_s"] * slots),
        "wall_over_training": took["search_s"] / (training_s / slots),
    }


def to_text(found: dict[str, Any]) -> str:
    return (
        f"{found['trials']} trials, {found['epochs']} epochs in all, {found['slots']} at once: {found['fit_s']:.1f} s, "
        f"of which training {found['training_s'] / found['slots']:.1f} s a slot\n"
        f"  seconds a trial                     {found['s_a_trial']:.2f}\n"
        f"  slot seconds a trial not training   {found['overhead_s_a_trial']:.2f}\n"
        f"  busy share of the workers           {found['busy_share']:.3f}\n"
        f"  whole search over training          {found['wall_over_training']:.2f}\n"
        f"  before the first trial: imports {found['imports_s']:.1f} s, data {found['data_s']:.1f} s, "
        f"Ray {found['start_ray_s']:.1f} s"
    )


def main() -> None:
    began_at = time.perf_counter()
    arguments = build_parser().parse_args()
    with one_sentence_errors("search_overhead.py"):
        planned = plan(arguments)
    if arguments.only_this:
        found = measure(planned, began_at)
        Path(arguments.output).write_text(json.dumps(found))
        return

    from byot.system.provenance import provenance
    from byot.trainer import choose_device

    given = ("--data-dir", arguments.data_dir) if arguments.data_dir else ()
    sized = ("--width", arguments.width, "--epochs", arguments.epochs, "--num-samples", arguments.num_samples)
    rows = {}
    for name, flags in (("trivial", TRIVIAL), ("real", (*given, *sized))):
        with tempfile.TemporaryDirectory() as folder:
            record = Path(folder) / "record.json"
            command = [sys.executable, __file__, "--only-this", "--output", record, *flags]
            done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
            if done.returncode != 0:
                print(done.stdout, done.stderr, file=sys.stderr)
                raise SystemExit(1)
            rows[name] = json.loads(record.read_text())
        print(f"{name}: {to_text(rows[name])}", flush=True)
    if arguments.output:
        write_json(absolute_path(arguments.output), {"searches": rows, **provenance(choose_device("auto"))})


if __name__ == "__main__":
    main()
