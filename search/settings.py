"""The settings of a search itself, beside those of its trials (byot.config.TrainConfig). Standard library only."""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from byot.config import TrainConfig, check_fields, comparable_after, known_settings, setting
from byot.search_files import Mode, SearchRecord, metric_mode
from byot.tracking import Tracker

Metric = Literal[
    "val_accuracy",
    "val_accuracy_1",
    "val_accuracy_2",
    "val_accuracy_3",
    "val_accuracy_4",
    "val_accuracy_ensemble",
    "val_accuracy_mean",
    "val_exit_accuracy",
    "val_nll",
    "val_nll_ensemble",
]

Scheduler = Literal["asha", "none"]
Sampler = Literal["tpe", "gp", "random"]
Prior = Literal["reference", "none"]

REDUCTION_FACTOR = 3  # of the trials at a rung, the best third goes on
LEARNING_STEPS = 4  # of all trials at most a quarter runs at once
LEAST_AT_ONCE = 4  # however few trials are asked for
NUM_FIRST_POINTS = 2  # tried first and always trained whole: the reference and the control
GRACE_FRACTION = 0.1  # no trial is stopped before this share of its epochs
VAL_FRACTION = 0.1  # of the training images, held out to compare trials, where another share is not given
FRESH_SEEDS = 1000  # the first fresh seed of a confirmation is so much above the search's own
Work = Callable[[float], float]  # what a run's first so many epochs take, such as byot.config.work_after
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How many trials, how many at once, by what they are compared. Building a wrong one raises ValueError."""

    num_samples: int = setting(32, "trials, the two that are always tried first among them", low=1)
    max_concurrent: int | None = setting(
        None, "trials at once (default: as many as have room, at most 4 or a quarter of all, if that is more)", low=1
    )
    gpus_per_trial: str | float | None = setting(
        None,
        "GPUs a trial, fractions share one; auto measures how many trials on one are quickest together "
        "(default: 1 where there is a GPU, else 0)",
    )
    cpus_per_trial: int | None = setting(None, "CPU threads a trial (default: 1)", low=1)
    time_budget: str | None = setting(
        None,
        "stop after this time, such as 90s, 30m, 8h or 2d; trials may take half of it where the best are confirmed",
    )
    metric: tuple[Metric, ...] = setting(
        ("val_accuracy",),
        "what is searched for: val_accuracy, the deepest classifier's, val_accuracy_1 to _4, _ensemble or _mean of "
        "the four, val_exit_accuracy of early exit at half the cost, val_nll or val_nll_ensemble; of several the "
        "Pareto front",
    )
    sampler: Sampler = setting("tpe", "what proposes; gp learns from trials that reached their last epoch")
    scheduler: Scheduler | None = setting(
        None, "asha stops trials that are behind; none lets all run whole (default: asha, with several metrics none)"
    )
    grace: int | None = setting(
        None,
        "epochs before asha may stop a trial (default: a tenth, and until the learning rate has dropped, or the "
        "warm-up is over and images have grown)",
        low=1,
    )
    prior: Prior = setting(
        "none",
        "where random proposals of tpe and gp lie: two thirds of them around the reference's setting, or anywhere",
    )
    try_: tuple[str, ...] = setting(
        (), "settings to try early, such as alpha=0.3,temperature=4; what they leave out is the reference's"
    )
    seeds_per_trial: int = setting(
        1, "runs of each trial, with seeds one after the other; their mean is compared", low=1, high=1000
    )
    warm_start: str | None = setting(None, "name of an earlier search: its trials are known, or its best tried early")
    confirm: int = setting(
        3,
        "how many of the best are run again, with both baselines, over fresh seeds; 0: none",
        low=0,
    )
    # One seed says nothing of the noise.
    confirm_seeds: int = setting(
        8, "fresh seeds of each, at most; with fewer than 3 nothing is compared", low=2, high=1000
    )
    margin: float = setting(
        0.3, "differences below this count as equal: percentage points; for val_nll, hundredths of a nat", low=0
    )
    track: tuple[Tracker, ...] = setting(
        (), "where each trial's figures go, epoch by epoch: tensorboard, wandb, mlflow or none"
    )

    def __post_init__(self) -> None:
        check_fields(self, *(f.name for f in fields(self) if f.name != "gpus_per_trial"))
        object.__setattr__(self, "gpus_per_trial", _read_gpus(self.gpus_per_trial))
        object.__setattr__(self, "metric", _read_list("metric", self.metric, get_args(Metric)))
        object.__setattr__(self, "try_", _read_list("try_", self.try_))
        object.__setattr__(self, "track", _read_list("track", self.track, get_args(Tracker)))
        if not self.metric:
            raise ValueError("metric must name what is searched for")
        if twice := [name for name in self.metric if self.metric.count(name) > 1]:
            raise ValueError(f"metric names {twice[0]} twice")
        if len(self.metric) > 1 and self.scheduler == "asha":
            raise ValueError("asha stops trials by one metric: give one --metric, or --scheduler none")
        if self.gpus_per_trial == "auto" and self.seeds_per_trial > 1:
            raise ValueError("gpus_per_trial auto measures trials of one run: give a number with seeds_per_trial")
        self.time_budget_s()

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Build from a search's record. Older ones have one metric as a text, patience, cmaes or trials_per_gpu."""
        if isinstance(values, dict):
            values = dict(values)
            if isinstance(metric := values.get("metric"), str):
                values["metric"] = [metric]
            trials, patience = values.pop("trials_per_gpu", None), values.pop("patience", None)
            if trials is not None:
                values["gpus_per_trial"] = 1 / int(trials) if re.fullmatch("[1-9][0-9]*", str(trials)) else trials
            if patience is not None:
                raise ValueError("--patience is no longer there: --fresh starts the search anew without it")
            if values.get("sampler") == "cmaes":
                others = " or ".join(get_args(Sampler))
                raise ValueError(f"sampler cmaes is no longer there: --fresh starts the search anew with {others}")
        return cls(**known_settings(cls, values))

    @property
    def main_metric(self) -> Metric:
        """The first: by it trials are ranked where one number has to do."""
        return self.metric[0]

    @property
    def stops_early(self) -> bool:
        """Whether ASHA stops trials."""
        return self.scheduler == "asha" or (self.scheduler is None and len(self.metric) == 1)

    def at_once(self, room: int) -> int:
        """Return how many trials to run at once, of the `room` there is: few enough that the sampler can learn."""
        if self.max_concurrent is not None or self.sampler == "random":
            return room
        return min(room, max(LEAST_AT_ONCE, self.num_samples // LEARNING_STEPS))

    @property
    def mode(self) -> Mode:
        return metric_mode(self.main_metric)

    def time_budget_s(self) -> float | None:
        if self.time_budget is None:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", self.time_budget)
        if not match or not 0 < float(match[1]) < math.inf:
            raise ValueError(f"time_budget must be a time such as 90s, 30m, 8h or 2d, not {self.time_budget!r}")
        return float(match[1]) * SECONDS[match[2] or "s"]

    def trials_budget_s(self) -> float | None:
        """Return the seconds that the trials may take: half, where the best are then run again."""
        budget_s = self.time_budget_s()
        return budget_s / 2 if budget_s is not None and self.confirm else budget_s

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _read_gpus(given: Any) -> str | float | None:
    """Return a number of GPUs given as text or number, "auto" or None."""
    if given is None or given == "auto":
        return given
    try:
        gpus = float(given)
    except (TypeError, ValueError, OverflowError):
        gpus = math.nan
    if isinstance(given, bool) or not (0 <= gpus <= 1 or (1 < gpus < math.inf and gpus == int(gpus))):
        raise ValueError(f"gpus_per_trial must be a fraction of 1, a whole number or auto, not {given!r:.40}")
    return gpus


def _read_list(name: str, given: Any, known: tuple[str, ...] = ()) -> tuple[Any, ...]:
    """Return a list of texts as a tuple. Raises ValueError for one that is not in `known`, unless that is empty."""
    if not isinstance(given, tuple | list) or not all(isinstance(text, str) for text in given):
        raise ValueError(f"{name} must be a list of texts, not {given!r:.40}")
    for text in given:
        if known and text not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {text!r:.40}")
    return tuple(given)


def grace_epochs(epochs: int, comparable_after: float = 0.0) -> int:
    """Return the epochs before a trial may be stopped: a tenth of its budget, at least two where it has as many.

    At least one whole epoch more than the share of the run before which runs cannot be compared. Until the learning
    rate drops for the first time, trials are ranked by how they bear the first one: on 160 recorded curves the rank
    correlation with the last epoch is 0.3 to 0.7 before the drop and 0.98 after it (results/curves,
    benchmarks/quality/search_quality.py).
    """
    return min(epochs, max(2, math.ceil(GRACE_FRACTION * epochs), math.ceil(comparable_after * epochs) + 1))


def choose_grace(base: TrainConfig, settings: SearchSettings, recorded: SearchRecord | None = None) -> int:
    """Epochs before ASHA may stop a trial; a search that goes on keeps to what it was started with."""
    asked = settings.grace
    if asked is None and recorded is not None:
        before = recorded.fields.get("grace_epochs")
        asked = before if isinstance(before, int) else grace_epochs(base.epochs)  # of a version that knew no other
    return min(base.epochs, grace_epochs(base.epochs, comparable_after(base)) if asked is None else asked)


def expected_work(num_samples: int, epochs: int, grace: int, work: Work = float) -> float:
    """Estimate how much the trials of a search do in all: two are whole, of the others a third goes past each rung.

    `work` says what the first so many epochs take; left out, every epoch takes the same. A grace of all epochs stands
    for trials that are not stopped.
    """
    whole = min(NUM_FIRST_POINTS, num_samples)
    return whole * work(epochs) + (num_samples - whole) * expected_work_left(0, epochs, grace, work)


def expected_work_left(done: int, epochs: int, grace: int, work: Work = float) -> float:
    """Estimate how much a trial still does that ASHA may stop: at each rung to come it goes on in a third."""
    left, share, reached, rung = 0.0, 1.0, done, grace
    while reached < epochs:
        if rung > reached:
            left += share * (work(rung) - work(reached))
            share /= REDUCTION_FACTOR
            reached = rung
        rung = min(rung * REDUCTION_FACTOR, epochs)
    return left
