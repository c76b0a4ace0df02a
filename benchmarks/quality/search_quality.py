"""Measures the regret of search methods against the epochs they spend; nothing is trained.

  python benchmarks/quality/search_quality.py                                   all families, 30 seeds
  python benchmarks/quality/search_quality.py --families acc peak loss --output FILE --figure FILE

The real searchers and schedulers, ours and Ray's, are called as Ray's controller calls them, by workers in simulated
time whose trials take their epochs from families.py: made-up curves, and recorded ones (curves.py). Only our records
are replaced, by the same that write nothing to disk.

Every method has the same budget of epochs. What it has found is, of the trials that reached their last epoch, the one
whose last value was best; its regret is how much better the family's best configuration truly is. Before any
trial is complete it is that of a random configuration. Intervals are 95 % by Student's t over the seeds.
"""

import heapq
import logging
import math
import os
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np
import optuna
from matplotlib import rc_context
from matplotlib.figure import Figure
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from analysis.figures import BLUE, GREEN, GREY, ORANGE, OTHER_COLOURS, RED, STYLE, add_legend, make_panels
from benchmarks import common
from benchmarks.quality.curves import FOLDER, curves_path
from benchmarks.quality.families import RECORDED, SYNTHETIC, Family, load_family
from byot.console import text_table
from byot.search_files import DIVERGED, Status, TrialRecord
from byot.system.flags import Parser, one_sentence_errors
from search import significance
from search.records import SearchRecords
from search.space import DEFAULT_SPACE, make_distributions
from search.study import BudgetAwareSearch, RecordedAsha

METHODS = {  # name -> what tables call it, its colour
    "ours": ("ours", BLUE),
    "default space": ("ours, alpha in its default range", RED),
    "stock": ("Ray's OptunaSearch + ASHA", ORANGE),
    "tpe": ("OptunaSearch, nothing stopped", GREEN),
    "few epochs": ("few epochs, the best four whole", OTHER_COLOURS[0]),
    "random": ("random, nothing stopped", GREY),
}
METRIC = "val_accuracy"
NUM_WORKERS = 4
NUM_WHOLE_TRIALS = 60  # the budget: the epochs of so many
BEST_FEW = 4  # trials that are trained whole where all others are for few epochs
JITTER = 0.1  # an epoch takes from 1 to so much longer
CONTROLLER: Any = None  # schedulers do without


class Proposal(NamedTuple):
    """A trial that begins."""

    trial_id: str
    role: str
    params: dict[str, float]


class Method(Protocol):
    """A searcher with its scheduler."""

    def begin(self) -> Proposal: ...

    def report(self, trial: Proposal, epoch: int, value: float) -> bool:
        """Take in the value of an epoch, NaN where the trial diverged, and say whether the trial goes on."""


# ---------------------------------------------------------------- methods


class RecordsInMemory(SearchRecords):
    """A search's records that leave nothing on disk: a replay begins thousands of trials."""

    def _write_trial(self, trial: TrialRecord) -> None:
        pass

    def write_table(self) -> None:
        pass


class Ours:
    """BudgetAwareSearch and RecordedAsha, told of each epoch and each end as search/callback.py tells them."""

    def __init__(self, family: Family, seed: int) -> None:
        parameters, nowhere = list(family.space), Path(os.devnull)  # no file can be below it
        self.records = RecordsInMemory(
            nowhere, parameters=parameters, metrics=(METRIC,), epochs=family.epochs, grace=family.grace, seed=seed
        )
        self.searcher = BudgetAwareSearch(self.records, family.space, first=[], num_samples=4 * NUM_WHOLE_TRIALS)
        self.scheduler = RecordedAsha(self.records)

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
        diverged = not math.isfinite(value)
        stopped = trial.trial_id in self.scheduler.stopped
        status: Status = "failed" if diverged else "stopped" if stopped else "completed"
        self.records.end(trial.trial_id, status, DIVERGED if diverged else "")
        return False


class Stock:
    """Ray's own searcher and scheduler, told what ray/tune/execution/tune_controller.py tells them.

    That is: the scheduler first; the searcher of what does not stop the trial; both of the last result once more when
    the trial ends, whoever ended it. A trial that diverges reports NaN once and ends.
    """

    def __init__(self, family: Family, seed: int, name: str) -> None:
        sampler = {"sampler": optuna.samplers.RandomSampler(seed=seed)} if name == "random" else {"seed": seed}
        self.searcher = OptunaSearch(make_distributions(family.space), metric=METRIC, mode="max", **sampler)
        self.scheduler: TrialScheduler = FIFOScheduler()
        if name == "stock":
            self.scheduler = AsyncHyperBandScheduler(time_attr="epoch", metric=METRIC, mode="max", max_t=family.epochs)
        self.epochs = family.epochs
        self.num_begun = 0

    def begin(self) -> Proposal:
        trial_id = f"{self.num_begun:05d}"
        self.num_begun += 1
        params = self.searcher.suggest(trial_id)
        assert params is not None
        self.scheduler.on_trial_add(CONTROLLER, self._ray_trial(trial_id))
        return Proposal(trial_id, "sampled", params)

    def report(self, trial: Proposal, epoch: int, value: float) -> bool:
        result = {"epoch": epoch, "training_iteration": epoch, METRIC: value}
        ray_trial = self._ray_trial(trial.trial_id)
        decision = self.scheduler.on_trial_result(CONTROLLER, ray_trial, result)
        if decision != TrialScheduler.STOP:
            self.searcher.on_trial_result(trial.trial_id, result)
            if epoch < self.epochs and math.isfinite(value):
                return True
        self.scheduler.on_trial_complete(CONTROLLER, ray_trial, result)
        self.searcher.on_trial_complete(trial.trial_id, result=result)
        return False

    @staticmethod
    def _ray_trial(trial_id: str) -> Any:
        return SimpleNamespace(trial_id=trial_id)  # all that the schedulers look at


class FewEpochs:
    """All trials for few epochs, until ours may stop one, then the best few to the end; Optuna's TPE proposes.

    Source: Egele et al., "The unreasonable effectiveness of early discarding after one epoch", 2024.
    """

    def __init__(self, family: Family, seed: int) -> None:
        self.searcher = OptunaSearch(make_distributions(family.space), metric=METRIC, mode="max", seed=seed)
        self.epochs, self.few = family.epochs, min(family.grace, family.epochs // 2)
        for_the_best = BEST_FEW * (self.epochs - self.few)
        unused = NUM_WORKERS * self.few  # what the others train of further trials until the last of the best has ended
        self.num_short = (NUM_WHOLE_TRIALS * self.epochs - for_the_best - unused) // self.few
        self.num_begun = 0
        self.waiting: list[tuple[float, Proposal]] = []  # those that could go on

    def begin(self) -> Proposal:
        if self.num_begun >= self.num_short and self.waiting:
            best = max(self.waiting, key=lambda known: known[0])
            self.waiting.remove(best)
            return best[1]
        trial_id = f"{self.num_begun:05d}"
        self.num_begun += 1
        params = self.searcher.suggest(trial_id)
        assert params is not None
        return Proposal(trial_id, "sampled", params)

    def report(self, trial: Proposal, epoch: int, value: float) -> bool:
        if epoch > self.few:
            return epoch < self.epochs and math.isfinite(value)
        if not math.isfinite(value):
            self.searcher.on_trial_complete(trial.trial_id, error=True)
            return False
        if epoch < self.few:
            return True
        self.searcher.on_trial_complete(trial.trial_id, result={METRIC: value})
        self.waiting.append((value, trial))
        return False


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
    paused: dict[str, tuple[int, Any]] = {}  # trials that may go on: the epochs they have had, their runs

    def push(time: float, number: int, epoch: int, trial: Proposal, run: Any) -> None:
        heapq.heappush(queue, (time + 1 + rng.uniform(0, JITTER), number, epoch, trial, run))

    def begin(time: float) -> None:
        nonlocal num_begun
        trial = method.begin()
        epochs_done, run = paused.get(trial.trial_id) or (0, family.train(trial.params, rng))
        push(time, num_begun, epochs_done + 1, trial, run)
        num_begun += epochs_done == 0

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
                if value > best_value:
                    best_value, best_regret = value, family.best - run.truth
            paused[trial.trial_id] = epoch, run
            begin(time)
        regret[spent] = best_regret
    return Outcome(regret, num_begun, num_completed)


def run_search(name: str, method: str, seed: int, curves_folder: Path) -> tuple[str, int, Outcome]:
    """Simulate a search in the family of this name."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger(OptunaSearch.__module__).setLevel(logging.ERROR)  # it warns of every NaN
    family = _family(name, curves_folder)
    tried = make_method(method, family, seed)
    return method, seed, simulate(tried, family, budget=NUM_WHOLE_TRIALS * family.epochs, seed=seed)


def make_method(name: str, family: Family, seed: int) -> Method:
    if name == "default space":
        family = family._replace(space={**family.space, "alpha": DEFAULT_SPACE["alpha"]})
    if name == "few epochs":
        return FewEpochs(family, seed)
    return Ours(family, seed) if name in ("ours", "default space") else Stock(family, seed, name)


_family = cache(load_family)


# ---------------------------------------------------------------- statistics


def estimate(values: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """Compute the mean of the differences over the seeds and half the width of its interval."""
    found = significance.compare("", "", values.tolist(), others.tolist())
    return {"mean": found.difference, "half": found.half_width()}


def first_reached(regret: np.ndarray, level: float) -> int | None:
    """Count the epochs spent when a curve is first at the level or below it; None if it never is."""
    reached = np.flatnonzero(regret <= level)
    return int(reached[0]) + 1 if len(reached) else None


def summarise(outcomes: dict[str, list[Outcome]], epochs: int) -> dict[str, Any]:
    """Make a family's part of the record: each method's regret on a grid of whole trials, and the table's figures."""
    regrets = {name: np.stack([outcome.regret for outcome in found]) for name, found in outcomes.items()}
    budget = regrets["random"].shape[1]
    level = float(regrets["random"][:, -1].mean())
    grid = np.arange(epochs, budget + 1, epochs)
    rows = {}
    for name, regret in regrets.items():
        shown, final, zeros = regret[:, grid - 1], regret[:, -1], np.zeros(len(regret))
        reached = first_reached(regret.mean(axis=0), level)
        rows[name] = {
            "final": estimate(final, zeros),
            "minus_stock": estimate(final, regrets["stock"][:, -1]),
            "reaches_random_at": reached,
            "share_of_budget": None if reached is None else reached / budget,
            "trials_begun": float(np.mean([outcome.num_begun for outcome in outcomes[name]])),
            "trials_completed": float(np.mean([outcome.num_completed for outcome in outcomes[name]])),
            "regret": shown.mean(axis=0).tolist(),
            "half_width": [estimate(values, zeros)["half"] for values in shown.T],
            "final_by_seed": final.tolist(),
        }
    return {"epochs_a_trial": epochs, "budget": budget, "grid": grid.tolist(), "methods": rows}


def to_text(name: str, found: dict[str, Any]) -> str:
    rows = []
    for method, row in found["methods"].items():
        reached = row["reaches_random_at"]
        rows.append(
            [
                f"  {METHODS[method][0]}",
                *("{mean:.4g} ± {half:.2g}".format(**row[of]) for of in ("final", "minus_stock")),
                "never" if reached is None else f"{reached} ({row['share_of_budget']:.2f})",
                *(f"{row[count]:.0f}" for count in ("trials_begun", "trials_completed")),
            ]
        )
    header = ["", "final regret", "minus stock", "random is met at", "begun", "whole"]
    title = f"{name}: {found['budget']} epochs, trials of {found['epochs_a_trial']}"
    return f"{title}\n{text_table(header, rows)}"


def draw(families: dict[str, dict[str, Any]]) -> Figure:
    """Draw a panel for each family: mean regret against epochs spent, in bands of 95 % confidence."""
    columns = min(3, len(families))
    num_rows = math.ceil(len(families) / columns)
    with rc_context(STYLE):
        figure, panels = make_panels(columns, 0.9 + 2.4 * num_rows, num_rows)
        for axes, (name, found) in zip(panels, families.items(), strict=False):
            grid = np.array(found["grid"])
            for method, row in found["methods"].items():
                mean, half = np.array(row["regret"]), np.array(row["half_width"])
                label, colour = METHODS[method]
                axes.plot(grid, mean, color=colour, linewidth=1.4, label=label)
                # On a logarithmic axis a band that reaches 0 would have no end.
                low = np.maximum(mean - half, 0.05 * mean)
                axes.fill_between(grid, low, mean + half, color=colour, alpha=0.15, linewidth=0)
            axes.set(yscale="log", xlabel="epochs spent", xlim=(0, found["budget"]))
            axes.set_title(name, fontsize=9)
        for axes in panels[len(families) :]:
            axes.set_axis_off()
        panels[0].set_ylabel("regret")
        add_legend(figure)
    return figure


# ---------------------------------------------------------------- command line


def compare(family: str, seeds: range, processes: int, curves_folder: Path) -> dict[str, Any]:
    """Compare all methods in a family and make its record."""
    jobs = [(family, method, seed, curves_folder) for method in METHODS for seed in seeds]
    found = {(method, seed): outcome for method, seed, outcome in common.run_all(run_search, jobs, processes)}
    outcomes = {method: [found[method, seed] for seed in seeds] for method in METHODS}
    return summarise(outcomes, _family(family, curves_folder).epochs)


def main() -> None:
    parser = Parser(prog="search_quality.py", description=__doc__)
    everything = (*SYNTHETIC, *RECORDED)
    parser.add_argument("--families", nargs="+", choices=everything, help="[all, of the recorded those that are there]")
    parser.add_argument("--seeds", type=common.number(2), default=30, help="searches of each method [30]")
    parser.add_argument("--workers", type=common.num_workers, default=1, help="searches at once [1]")
    parser.add_argument("--curves", type=common.path, metavar="DIR", default=FOLDER, help="[results/curves]")
    parser.add_argument("--output", type=common.file_to_write, metavar="FILE", help="write the record here as JSON")
    parser.add_argument("--figure", type=common.picture, metavar="FILE", help="draw the figure here, PNG or SVG")
    arguments = parser.parse_args()
    with one_sentence_errors("search_quality.py"):
        recorded = [name for name in RECORDED if curves_path(name, arguments.curves).exists()]
        names = dict.fromkeys(arguments.families or [*SYNTHETIC, *recorded])
        for name in names:
            _family(name, arguments.curves)
    seeds = range(arguments.seeds)
    families = {}
    for name in names:
        families[name] = compare(name, seeds, arguments.workers, arguments.curves)
        print(to_text(name, families[name]), flush=True)
    if arguments.figure:
        arguments.figure.parent.mkdir(parents=True, exist_ok=True)
        draw(families).savefig(arguments.figure, dpi=150)
    labels = {name: label for name, (label, _) in METHODS.items()}
    settings = {"seeds": [0, arguments.seeds - 1], "workers": NUM_WORKERS, "labels": labels}
    common.save_record(arguments.output, {**settings, "families": families})


if __name__ == "__main__":
    main()
