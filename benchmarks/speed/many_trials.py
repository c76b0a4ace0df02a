"""Whether a search stays quick and small however many trials it has: time and the driver's memory as trials add up.

  python benchmarks/speed/many_trials.py                             1,000 trials, some minutes on two cores

One whole search in a folder that is removed. Its trials are trivial (one step of a network of width 1 on a few of the
digits), so that what a trial costs is Ray, the proposal and the records. Each row is a block of trials, in seconds a
trial: all; the driver's processor, which other work on the machine changes least; the parts in which the driver
proposes, writes records, tells the Optuna journal and writes Ray's snapshots. The driver's resident memory is that at
the block's end. Linux only, for the memory.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.speed.train_speed import resident_gib
from byot.config import TrainConfig
from byot.data import LabelledImages
from byot.system.files import write_json
from byot.system.flags import Parser, one_sentence_errors
from byot.system.paths import absolute_path
from search.settings import SearchSettings
from search.space import DEFAULT_SPACE

NUM_TRAIN, NUM_VAL = 32, 64
BASE = TrainConfig(
    recipe="reference",
    dataset="digits",
    width=1,
    epochs=1,
    batch_size=NUM_TRAIN,
    val_fraction=0.2,
    precision="fp32",
)
BLOCK = 100
MIB_A_GIB = 1024


class Stopwatch:
    """Seconds spent in some methods, and what they are at the end of each block of trials."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.spent: dict[str, float] = {}
        self.rows: list[dict[str, float]] = []
        self.ended = 0
        self._began_at = time.perf_counter()
        self._cpu_before_s = time.process_time()

    def timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, with the time that it takes added up under a name."""
        self.spent[name] = 0.0

        def call(*given: Any, **named: Any) -> Any:
            began_at = time.perf_counter()
            try:
                return method(*given, **named)
            finally:
                self.spent[name] += time.perf_counter() - began_at

        return call

    def counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method that is called when a trial has ended."""

        def call(*given: Any, **named: Any) -> Any:
            found = method(*given, **named)
            self.ended += 1
            if self.ended % self.block == 0:
                self._end_block()
            return found

        return call

    def _end_block(self) -> None:
        now = time.perf_counter()
        row = {"trials": self.ended, "all_s_a_trial": (now - self._began_at) / self.block}
        cpu_s = time.process_time()
        row["cpu_s_a_trial"] = (cpu_s - self._cpu_before_s) / self.block
        row |= {f"{name}_s_a_trial": spent / self.block for name, spent in self.spent.items()}
        self.rows.append(row | {"memory_mib": resident_gib("VmRSS") * MIB_A_GIB})
        self.spent = dict.fromkeys(self.spent, 0.0)
        self._began_at, self._cpu_before_s = now, cpu_s


def build_parser() -> Parser:
    parser = Parser(prog="many_trials.py", description=__doc__)
    parser.add_argument("--num-samples", type=int, default=1000, help="trials [1000]")
    parser.add_argument("--block", type=int, default=BLOCK, help=f"trials a row [{BLOCK}]")
    parser.add_argument("--output", metavar="FILE", help="write the record here as JSON")
    return parser


def few(images: LabelledImages, number: int) -> LabelledImages:
    return LabelledImages(images.images[:number], images.labels[:number])


def measure(settings: SearchSettings, block: int) -> list[dict[str, float]]:
    """Do the search; a row for each block of trials, of which the first has the start of the workers in it."""
    from search import driver
    from search.system.resources import Share, share_machine, start_ray

    room = share_machine(Share(), BASE.device)
    start_ray(room)  # with its settings in the environment, before what imports Ray

    from ray.tune.execution.tune_controller import TuneController

    from search.callback import SearchWatch
    from search.mirror import OptunaMirror
    from search.records import SearchRecords
    from search.study import BudgetAwareSearch

    whole = driver.load_search_data(BASE)
    data = driver.SearchData(few(whole.train, NUM_TRAIN), few(whole.val, NUM_VAL))
    watch = Stopwatch(block)
    parts: tuple[tuple[str, Any, str], ...] = (
        ("propose", BudgetAwareSearch, "suggest"),
        ("begin", SearchRecords, "begin"),  # a part of propose
        ("end", SearchRecords, "end"),
        ("tell", BudgetAwareSearch, "tell"),
        ("journal", OptunaMirror, "add"),
        ("snapshot", TuneController, "checkpoint"),
    )
    with ExitStack() as patches, tempfile.TemporaryDirectory() as folder:
        for name, owner, method in parts:
            timed = watch.timed(name, getattr(owner, method))
            patches.enter_context(mock.patch.object(owner, method, timed))
        patches.enter_context(
            mock.patch.object(SearchWatch, "on_trial_complete", watch.counted(SearchWatch.on_trial_complete))
        )
        patches.enter_context(mock.patch.object(driver, "start_ray"))
        search = Path(folder) / "search"
        search.mkdir()
        plan = driver.SearchPlan(search, BASE, settings, DEFAULT_SPACE, None)
        assert driver.run_search(plan, data, room) == 0, "the search failed"
    return watch.rows


def to_text(rows: list[dict[str, float]]) -> str:
    """The rows as a table, seconds a trial but for the last column."""
    header = [name.removesuffix("_s_a_trial") for name in rows[0]]
    lines = [header, *([f"{value:.4g}" for value in row.values()] for row in rows)]
    return "\n".join("  ".join(f"{cell:>10}" for cell in line) for line in lines)


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("many_trials.py"):
        settings = SearchSettings(num_samples=arguments.num_samples)
        if not 1 <= arguments.block <= settings.num_samples:
            raise ValueError(f"--block must lie between 1 and --num-samples, not {arguments.block}")
    rows = measure(settings, arguments.block)
    print(to_text(rows), flush=True)
    if arguments.output:
        from byot.system.provenance import provenance
        from byot.trainer import choose_device

        record = {"config": BASE.to_dict(), "num_train_images": NUM_TRAIN, "num_val_images": NUM_VAL, "blocks": rows}
        write_json(absolute_path(arguments.output), {**record, **provenance(choose_device(BASE.device))})


if __name__ == "__main__":
    main()
