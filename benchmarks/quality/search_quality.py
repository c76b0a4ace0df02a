"""How good a configuration search methods find, against the epochs they spend: regret, with nothing trained.

  python benchmarks/quality/search_quality.py                                   all families, 30 seeds
  python benchmarks/quality/search_quality.py --families acc peak loss --output FILE --figure FILE

The real searchers and schedulers, ours and Ray's, are called as Ray's controller calls them, by workers in simulated
time whose trials take their epochs from families.py: made-up curves, and recorded ones (curves.py). Only our records
are replaced, by the same that write nothing to disk.

Every method has the same budget of epochs. What it has found is, of the trials that reached their last epoch, the one
whose last value was best; its regret is how much better the best configuration of the family truly is. Before any
trial is complete it is that of a random configuration. Intervals are 95 % by Student's t over the seeds.
"""

import argparse
import heapq
import logging
import math
import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import optuna
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch
from scipy.stats import t as student

from analysis.figures import BLUE, GREEN, GREY, ORANGE, STYLE, WIDTH
from benchmarks.quality.curves import FOLDER, curves_path
from benchmarks.quality.families import RECORDED, SYNTHETIC, Family, load_family
from benchmarks.quality.pool import make_pool
from byot.config import TrainConfig
from byot.system.files import write_json
from byot.system.flags import Parser, one_sentence_errors
from byot.system.paths import absolute_path
from byot.system.provenance import provenance
from search.records import DIVERGED, Row, SearchRecords, Status
from search.space import Role, first_points
from search.study import BudgetAwareSearch, RecordedAsha, make_distributions

Name = Literal["ours", "shipped", "stock", "tpe", "random_asha", "random"]
LABELS: dict[Name, str] = {
    "ours": "ours",
    "shipped": "ours, with the first points",
    "stock": "Ray's OptunaSearch + ASHA",
    "tpe": "OptunaSearch, nothing stopped",
    "random_asha": "random + Ray's ASHA",
    "random": "random, nothing stopped",
}
COLOURS: dict[Name, str] = {
    "ours": BLUE,
    "shipped": "#39a0c4",
    "stock": ORANGE,
    "tpe": GREEN,
    "random_asha": "#8460b0",
    "random": GREY,
}
METRIC = "val_accuracy"
MODE: Literal["max"] = "max"
NUM_WORKERS = 4
NUM_WHOLE_TRIALS = 60  # the budget: the epochs of so many
JITTER = 0.1  # an epoch takes from 1 to so much longer
CONTROLLER: Any = None  # schedulers do without


class Proposal(NamedTuple):
    """A trial that begins."""

    trial_id: str
    role: Role
    params: dict[str, float]


class Method(Protocol):
    """A searcher with its scheduler."""

    def begin(self) -> Proposal: ...

    def report(self, trial: Proposal, epoch: int, value: float) -> bool:
        """Take in the value of an epoch, NaN where the trial diverged, and say whether the trial goes on."""


# ---------------------------------------------------------------- methods


class RecordsInMemory(SearchRecords):
    """A search's records that leave nothing on disk: a replay begins thousands of trials."""

    def __init__(self, family: Family, seed: int) -> None:
        parameters = list(family.space)
        nowhere = Path(os.devnull)  # no file can be below it
        epochs, grace = family.epochs, family.grace
        super().__init__(
            nowhere, parameters=parameters, metric=METRIC, mode=MODE, epochs=epochs, grace=grace, seed=seed
        )

    def _read_rows(self) -> list[Row]:
        return []

    def _write_trial(self, row: Row) -> None:
        pass

    def write_table(self, *, at_once: bool = False) -> None:
        pass

    def write_best(self) -> None:
        pass


class Ours:
    """BudgetAwareSearch and RecordedAsha, told of each epoch and each end as search/callback.py tells them."""

    def __init__(self, family: Family, seed: int, *, first: bool) -> None:
        self.records = RecordsInMemory(family, seed)
        points = first_points(family.space, TrainConfig(recipe="reference")) if first else []
        self.searcher = BudgetAwareSearch(
            self.records, family.space, first=points, num_samples=4 * NUM_WHOLE_TRIALS, seed=seed
        )
        self.scheduler = RecordedAsha(self.records, mode=MODE)
        self.epochs = family.epochs

    def begin(self) -> Proposal:
        return Proposal(**self.searcher.suggest("Ray's id"))

    def report(self, trial: Proposal, epoch: int, value: float) -> bool:
        result = {"epoch": epoch, METRIC: value, "elapsed_s": 1.0}
        ray_trial: Any = SimpleNamespace(trial_id="Ray's id", config=trial._asdict())
        decision = self.scheduler.on_trial_result(CONTROLLER, ray_trial, result)
        if math.isfinite(value):
            self.records.add_epoch(trial.trial_id, result)
        if decision == TrialScheduler.CONTINUE:
            return True
        status: Status = "completed"
        if trial.trial_id in self.scheduler.stopped:
            status = "stopped"
        elif not math.isfinite(value):
            status = "failed"
        error = f"{DIVERGED}the loss became nan" if status == "failed" else ""
        self.searcher.tell(self.records.end(trial.trial_id, status, error))
        return False


class Stock:
    """Ray's own searcher and scheduler, told what ray/tune/execution/tune_controller.py tells them.

    That is: the scheduler first; the searcher of what does not stop the trial; both of the last result once more when
    the trial ends, whoever ended it. A trial that diverges reports NaN once and ends.
    """

    def __init__(self, family: Family, seed: int, *, random: bool, stops: bool) -> None:
        sampler = {"sampler": optuna.samplers.RandomSampler(seed=seed)} if random else {"seed": seed}
        self.searcher = OptunaSearch(make_distributions(family.space), metric=METRIC, mode=MODE, **sampler)
        self.scheduler: TrialScheduler = FIFOScheduler()
        if stops:
            self.scheduler = AsyncHyperBandScheduler(time_attr="epoch", metric=METRIC, mode=MODE, max_t=family.epochs)
        self.epochs = family.epochs
        self.num_begun = 0

    def begin(self) -> Proposal:
        trial_id = f"{self.num_begun:05d}"
        self.num_begun += 1
        params = self.searcher.suggest(trial_id)
        assert params is not None
        self.scheduler.on_trial_add(CONTROLLER, _ray_trial(trial_id))
        return Proposal(trial_id, "sampled", params)

    def report(self, trial: Proposal, epoch: int, value: float) -> bool:
        result = {"epoch": epoch, "training_iteration": epoch, METRIC: value}
        ray_trial = _ray_trial(trial.trial_id)
        decision = self.scheduler.on_trial_result(CONTROLLER, ray_trial, result)
        if decision != TrialScheduler.STOP:
            self.searcher.on_trial_result(trial.trial_id, result)
            if epoch < self.epochs and math.isfinite(value):
                return True
        self.scheduler.on_trial_complete(CONTROLLER, ray_trial, result)
        self.searcher.on_trial_complete(trial.trial_id, result=result)
        return False


def _ray_trial(trial_id: str) -> Any:
    return SimpleNamespace(trial_id=trial_id)  # all that the schedulers look at


def make_method(name: Name, family: Family, seed: int) -> Method:
    if name in ("ours", "shipped"):
        return Ours(family, seed, first=name == "shipped")
    return Stock(family, seed, random=name.startswith("random"), stops=name in ("stock", "random_asha"))


# ---------------------------------------------------------------- simulated time


class Outcome(NamedTuple):
    """One search."""

    regret: np.ndarray  # [budget] after each epoch spent
    num_begun: int
    num_completed: int


def simulate(method: Method, family: Family, *, budget: int, seed: int) -> Outcome:
    """Let workers train what the method proposes until the budget of epochs is spent; what still runs is lost."""
    rng = np.random.default_rng(seed)
    queue: list[tuple[float, int, int, Proposal, Any]] = []  # end of the epoch, number, epoch, trial, its run
    num_begun = num_completed = 0

    def push(time: float, number: int, epoch: int, trial: Proposal, run: Any) -> None:
        heapq.heappush(queue, (time + 1 + rng.uniform(0, JITTER), number, epoch, trial, run))

    def begin(time: float) -> None:
        nonlocal num_begun
        trial = method.begin()
        push(time, num_begun, 1, trial, family.train(trial.role, trial.params, rng))
        num_begun += 1

    for _ in range(NUM_WORKERS):
        begin(0.0)
    regret = np.empty(budget)
    best_value, best_regret = -math.inf, family.best - family.typical
    for spent in range(budget):
        time, number, epoch, trial, run = heapq.heappop(queue)
        value = run.values[epoch - 1] if epoch <= len(run.values) else math.nan
        if method.report(trial, epoch, value):
            push(time, number, epoch + 1, trial, run)
        else:
            if epoch == family.epochs and math.isfinite(value):
                num_completed += 1
                if value > best_value and trial.role != "control":  # another method, as in search/records.py
                    best_value, best_regret = value, family.best - run.truth
            begin(time)
        regret[spent] = best_regret
    return Outcome(regret, num_begun, num_completed)


class Task(NamedTuple):
    """One search to be simulated."""

    family: str
    method: Name
    seed: int
    curves_folder: Path


def run_task(task: Task) -> Outcome:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger(OptunaSearch.__module__).setLevel(logging.ERROR)  # it warns of every NaN
    family = _family(task.family, task.curves_folder)
    budget = NUM_WHOLE_TRIALS * family.epochs
    return simulate(make_method(task.method, family, task.seed), family, budget=budget, seed=task.seed)


_family = cache(load_family)


def run_tasks(tasks: list[Task], processes: int) -> Iterator[Outcome]:
    if processes == 1:
        yield from map(run_task, tasks)
        return
    with make_pool(processes) as pool:
        yield from pool.map(run_task, tasks)


# ---------------------------------------------------------------- statistics


class Estimate(NamedTuple):
    """A mean over seeds and half the width of its 95 % confidence interval."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.half:.2g}"


def half_width(values: np.ndarray) -> np.ndarray:
    """Of the 95 % confidence interval of the mean along the first axis, by Student's t."""
    n = len(values)
    return np.asarray(student.ppf(0.975, n - 1) * values.std(axis=0, ddof=1) / math.sqrt(n))


def estimate(values: np.ndarray) -> Estimate:
    return Estimate(float(values.mean()), float(half_width(values)))


def first_reached(regret: np.ndarray, level: float) -> int | None:
    """Epochs spent when a curve is first at the level or below it; None if it never is."""
    reached = np.flatnonzero(regret <= level)
    return int(reached[0]) + 1 if len(reached) else None


def summarise(outcomes: dict[Name, list[Outcome]], epochs: int) -> dict[str, Any]:
    """A family's part of the record: every method's regret on a grid of whole trials, and what the table shows."""
    regrets = {name: np.stack([outcome.regret for outcome in found]) for name, found in outcomes.items()}
    budget = regrets["random"].shape[1]
    level = float(regrets["random"][:, -1].mean())
    grid = np.arange(epochs, budget + 1, epochs)
    rows = {}
    for name, regret in regrets.items():
        shown = regret[:, grid - 1]
        reached = first_reached(regret.mean(axis=0), level)
        rows[name] = {
            "final": estimate(regret[:, -1])._asdict(),
            "minus_stock": estimate(regret[:, -1] - regrets["stock"][:, -1])._asdict(),
            "reaches_random_at": reached,
            "share_of_budget": None if reached is None else reached / budget,
            "trials_begun": float(np.mean([outcome.num_begun for outcome in outcomes[name]])),
            "trials_completed": float(np.mean([outcome.num_completed for outcome in outcomes[name]])),
            "regret": shown.mean(axis=0).tolist(),
            "half_width": half_width(shown).tolist(),
            "final_by_seed": regret[:, -1].tolist(),
        }
    return {"epochs_a_trial": epochs, "budget": budget, "grid": grid.tolist(), "methods": rows}


def to_text(name: str, found: dict[str, Any]) -> str:
    lines = [
        f"{name}: {found['budget']} epochs, trials of {found['epochs_a_trial']}",
        f"  {'':30}{'final regret':>20}{'minus stock':>22}{'random is met at':>20}{'begun':>7}{'whole':>7}",
    ]
    for method, row in found["methods"].items():
        reached = row["reaches_random_at"]
        met = "never" if reached is None else f"{reached} ({row['share_of_budget']:.2f})"
        minus = "" if method == "stock" else str(Estimate(**row["minus_stock"]))
        lines.append(
            f"  {LABELS[method]:30}{Estimate(**row['final'])!s:>20}{minus:>22}{met:>20}"
            f"{row['trials_begun']:>7.0f}{row['trials_completed']:>7.0f}"
        )
    return "\n".join(lines)


def draw(families: dict[str, dict[str, Any]]) -> Figure:
    """A panel for each family: mean regret against epochs spent, in bands of 95 % confidence."""
    columns = min(3, len(families))
    num_rows = math.ceil(len(families) / columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 2.4 * num_rows), layout="constrained")
        panels = list(figure.subplots(num_rows, columns, squeeze=False).flat)
        for axes, (name, found) in zip(panels, families.items(), strict=False):
            grid = np.array(found["grid"])
            for method, row in found["methods"].items():
                mean, half = np.array(row["regret"]), np.array(row["half_width"])
                axes.plot(grid, mean, color=COLOURS[method], linewidth=1.4, label=LABELS[method])
                # On a logarithmic axis a band that reaches 0 would have no end.
                low = np.maximum(mean - half, 0.05 * mean)
                axes.fill_between(grid, low, mean + half, color=COLOURS[method], alpha=0.15, linewidth=0)
            axes.set_yscale("log")
            axes.set_title(name, fontsize=9)
            axes.set_xlabel("epochs spent")
            axes.set_xlim(0, found["budget"])
        for axes in panels[len(families) :]:
            axes.set_axis_off()
        panels[0].set_ylabel("regret")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return figure


# ---------------------------------------------------------------- command line


def build_parser() -> Parser:
    parser = Parser(prog="search_quality.py", description=__doc__)
    everything = (*SYNTHETIC, *RECORDED)
    parser.add_argument("--families", nargs="+", choices=everything, help="[all, of the recorded those that are there]")
    parser.add_argument("--seeds", type=int, default=30, help="searches of each method in each family [30]")
    parser.add_argument("--first-seed", type=int, default=0, help="seeds are counted from here [0]")
    parser.add_argument("--processes", type=int, default=1, help="at once [1]")
    parser.add_argument("--curves", metavar="DIR", default=str(FOLDER), help="recorded curves [results/curves]")
    parser.add_argument("--output", metavar="FILE", help="write the record here as JSON")
    parser.add_argument("--figure", metavar="FILE", help="draw the figure here, PNG or SVG by its name")
    return parser


def check(arguments: argparse.Namespace) -> None:
    if arguments.seeds < 2:
        raise ValueError(f"--seeds must be at least 2 for an interval, not {arguments.seeds}")
    if arguments.first_seed < 0:
        raise ValueError(f"--first-seed must be 0 or more, not {arguments.first_seed}")
    if not 1 <= arguments.processes <= (os.cpu_count() or 1):
        raise ValueError(f"--processes must be from 1 to {os.cpu_count()}, the CPUs here, not {arguments.processes}")
    if arguments.figure and Path(arguments.figure).suffix not in (".png", ".svg"):
        raise ValueError(f"--figure must end in .png or .svg, unlike {arguments.figure}")


def compare(families: Iterable[str], seeds: range, processes: int, curves_folder: Path) -> dict[str, dict[str, Any]]:
    """The record of each family; prints its table as soon as it is there."""
    names: tuple[Name, ...] = get_args(Name)
    families = list(dict.fromkeys(families))
    tasks = [Task(family, name, seed, curves_folder) for family in families for name in names for seed in seeds]
    outcomes = run_tasks(tasks, processes)
    record = {}
    for family in families:
        found = {name: [next(outcomes) for _ in seeds] for name in names}
        record[family] = summarise(found, _family(family, curves_folder).epochs)
        print(to_text(family, record[family]), flush=True)
    return record


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("search_quality.py"):
        check(arguments)
        curves_folder = absolute_path(arguments.curves)
        recorded = [name for name in RECORDED if curves_path(name, curves_folder).exists()]
        names = arguments.families or [*SYNTHETIC, *recorded]
        for name in names:
            _family(name, curves_folder)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    record = compare(names, seeds, arguments.processes, curves_folder)
    if arguments.figure:
        path = absolute_path(arguments.figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(record).savefig(path, dpi=150)
    if arguments.output:
        settings = {"seeds": [seeds.start, seeds.stop - 1], "workers": NUM_WORKERS, "labels": LABELS}
        write_json(absolute_path(arguments.output), {**settings, "families": record, **provenance(torch.device("cpu"))})


if __name__ == "__main__":
    main()
