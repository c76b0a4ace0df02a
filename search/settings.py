"""The settings of a search itself, beside those of its trials (byot.config.TrainConfig). Standard library only."""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from byot.config import MOST, TrainConfig, comparable_after, setting

Metric = Literal[
    "val_accuracy",
    "val_accuracy_1",
    "val_accuracy_2",
    "val_accuracy_3",
    "val_accuracy_4",
    "val_accuracy_ensemble",
    "val_nll",
    "val_nll_ensemble",
]

Mode = Literal["max", "min"]
Scheduler = Literal["asha", "none"]
Sampler = Literal["tpe", "gp", "random", "cmaes"]

REDUCTION_FACTOR = 3  # of the trials at a rung, the best third goes on
NUM_FIRST_POINTS = 2  # tried first and always trained whole: the reference and the control
GRACE_FRACTION = 0.1  # no trial is stopped before this share of its epochs
WHOLE_NUMBERS = (
    *(
        "num_samples",
        "max_concurrent",
        "cpus_per_trial",
        "grace",
        "patience",
        "seeds_per_trial",
        "confirm",
        "confirm_seeds",
    ),
)
OPTIONAL = ("max_concurrent", "cpus_per_trial", "grace", "patience", "confirm")
LEAST = {"confirm_seeds": 2}  # one seed says nothing of the noise; of the others 1
GREATEST = {"confirm_seeds": 1000, "seeds_per_trial": 1000}  # of the others MOST
FRESH_SEEDS = 1000  # the first fresh seed of a confirmation is so much above the search's own
Work = Callable[[float], float]  # what a run's first so many epochs take, such as byot.config.work_after
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How many trials, how many at once, by what they are compared. Building a wrong one raises ValueError."""

    num_samples: int = setting(32, "trials, the two that are always tried first among them")
    max_concurrent: int | None = setting(None, "trials at once (default: as many as the machine has room for)")
    gpus_per_trial: float | None = setting(
        None, "GPUs a trial, fractions share one (default: 1 where there is a GPU, else 0)"
    )
    trials_per_gpu: str | None = setting(
        None, "trials on one GPU at once: a number, or auto, which measures how many are quickest together"
    )
    cpus_per_trial: int | None = setting(None, "CPU threads a trial (default: 1)")
    time_budget: str | None = setting(None, "stop after this time, such as 90s, 30m, 8h or 2d")
    metric: tuple[Metric, ...] = setting(
        ("val_accuracy",),
        "what is searched for: val_accuracy, the deepest classifier's, val_accuracy_1 to _4 or _ensemble, val_nll or "
        "val_nll_ensemble; of several the Pareto front",
    )
    sampler: Sampler = setting("tpe", "what proposes; gp and cmaes learn from trials that reached their last epoch")
    scheduler: Scheduler | None = setting(
        None, "asha stops trials that are behind; none lets all run whole (default: asha, with several metrics none)"
    )
    grace: int | None = setting(
        None,
        "epochs before asha may stop a trial (default: a tenth; until the learning rate has dropped or images grown)",
    )
    patience: int | None = setting(None, "also stop a trial that has not got better for so many epochs")
    seeds_per_trial: int = setting(1, "runs of each trial, with seeds one after the other; their mean is compared")
    warm_start: str | None = setting(None, "name of an earlier search: its trials are known, or its best tried early")
    confirm: int | None = setting(
        None,
        "then run the best so many and both controls again over fresh seeds, until it is clear which is best",
    )
    confirm_seeds: int = setting(8, "fresh seeds of each, at most")

    def __post_init__(self) -> None:
        for name in WHOLE_NUMBERS:
            value = getattr(self, name)
            if not (value is None and name in OPTIONAL) and (not isinstance(value, int) or isinstance(value, bool)):
                raise ValueError(f"{name} must be a whole number, not {value!r:.40}")
            least, most = LEAST.get(name, 1), GREATEST.get(name, MOST)
            if value is not None and not least <= value <= most:
                bound = f"at least {least}" if value < least else f"at most {most}"
                raise ValueError(f"{name} must be {bound}, not {value}")
        if self.gpus_per_trial is not None and (
            not isinstance(self.gpus_per_trial, int | float) or isinstance(self.gpus_per_trial, bool)
        ):
            raise ValueError(f"gpus_per_trial must be a number, not {self.gpus_per_trial!r:.40}")
        self._check_metrics()
        for name, kinds in (("sampler", get_args(Sampler)), ("scheduler", (*get_args(Scheduler), None))):
            if getattr(self, name) not in kinds:
                allowed = " or ".join(filter(None, kinds))
                raise ValueError(f"{name} must be {allowed}, not {getattr(self, name)!r:.40}")
        if len(self.metric) > 1 and self.scheduler == "asha":
            raise ValueError("asha stops trials by one metric: give one --metric, or --scheduler none")
        if len(self.metric) > 1 and self.sampler == "cmaes":
            raise ValueError("cmaes searches for one metric: give one --metric, or another --sampler")
        if not isinstance(self.warm_start, str | None) or self.warm_start == "":
            raise ValueError(f"warm_start must be the name of a search, not {self.warm_start!r:.40}")
        if not isinstance(self.time_budget, str | None):
            raise ValueError(f"time_budget must be a time such as 90s, 30m, 8h or 2d, not {self.time_budget!r:.40}")
        gpus = self.gpus_per_trial
        if gpus is not None and not (0 <= gpus < math.inf and (gpus <= 1 or gpus == int(gpus))):
            raise ValueError(f"gpus_per_trial must be a fraction of 1 or a whole number, not {gpus:g}")
        shared = self.trials_per_gpu
        if (
            shared is not None
            and shared != "auto"
            and not (isinstance(shared, str) and re.fullmatch(r"[1-9]\d?", shared, re.ASCII))
        ):
            raise ValueError(f"trials_per_gpu must be auto or a number from 1 to 99, not {shared!r:.40}")
        if shared == "auto" and self.seeds_per_trial > 1:
            raise ValueError("trials_per_gpu auto measures trials of one run: give a number with seeds_per_trial")
        if shared is not None and gpus is not None:
            raise ValueError("trials_per_gpu and gpus_per_trial say the same in two ways: give one of them")
        self.time_budget_s()

    def _check_metrics(self) -> None:
        """Take one metric, as older searches recorded it, or a list of them."""
        given: Any = self.metric
        asked = (given,) if isinstance(given, str) else given
        if not isinstance(asked, tuple | list) or not asked:
            raise ValueError(f"metric must name what is searched for, not {self.metric!r:.40}")
        for metric in asked:
            if metric not in get_args(Metric):
                raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}, not {metric!r:.40}")
        if len(set(asked)) < len(asked):
            raise ValueError(f"metric names {asked[0]} twice" if len(asked) == 2 else "metric names one of them twice")
        object.__setattr__(self, "metric", tuple(asked))

    @property
    def main_metric(self) -> str:
        """The first: by it trials are ranked where one number has to do."""
        return self.metric[0]

    @property
    def stops_early(self) -> bool:
        """Whether ASHA stops trials."""
        return self.scheduler == "asha" or (self.scheduler is None and len(self.metric) == 1)

    @property
    def gpus_asked_for(self) -> float | None:
        """GPUs a trial; None leaves it open."""
        if self.trials_per_gpu in (None, "auto"):
            return self.gpus_per_trial
        return share_of_gpu(int(str(self.trials_per_gpu)))

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

    def to_dict(self) -> dict[str, Any]:
        """As it is in JSON."""
        return asdict(self) | {"metric": list(self.metric)}


def metric_mode(metric: str) -> Mode:
    return "min" if "nll" in metric else "max"


def share_of_gpu(trials: int) -> float:
    """The fraction of a GPU that each of so many trials gets, rounded down to what Ray counts in: 1/10,000."""
    return 10_000 // trials / 10_000


def grace_epochs(epochs: int, comparable_after: float | None = None) -> int:
    """Epochs before a trial may be stopped: a tenth of its budget, at least two where it has as many.

    Where runs cannot be compared before some share of the run, one whole epoch more than that: until the learning rate
    drops for the first time, trials are ranked by how they bear the first one. On 160 recorded curves the rank
    correlation with the last epoch is 0.3 to 0.7 before the drop and 0.98 after it (results/curves,
    benchmarks/quality/search_quality.py).
    """
    least = max(2, math.ceil(GRACE_FRACTION * epochs))
    if comparable_after is not None:
        least = max(least, math.ceil(comparable_after * epochs) + 1)
    return min(epochs, least)


def choose_grace(base: TrainConfig, settings: SearchSettings, recorded: dict[str, Any] | None = None) -> int:
    """Epochs before ASHA may stop a trial; a search that goes on keeps to what it was started with."""
    asked = settings.grace
    if asked is None and recorded is not None:
        before = recorded.get("grace_epochs")
        asked = before if isinstance(before, int) else grace_epochs(base.epochs)  # of a version that knew no other
    return min(base.epochs, grace_epochs(base.epochs, comparable_after(base)) if asked is None else asked)


def expected_work(num_samples: int, epochs: int, grace: int, work: Work = float) -> float:
    """About how much the trials of a search do in all: two are whole, of the others a third goes past each rung.

    `work` says what the first so many epochs take; left out, every epoch takes the same. A grace of all epochs stands
    for trials that are not stopped.
    """
    whole = min(NUM_FIRST_POINTS, num_samples)
    return whole * work(epochs) + (num_samples - whole) * expected_work_left(0, epochs, grace, work)


def expected_work_left(done: int, epochs: int, grace: int, work: Work = float) -> float:
    """About how much a trial still does that ASHA may stop: at each rung to come it goes on in a third."""
    left, share, reached, rung = 0.0, 1.0, done, grace
    while reached < epochs:
        if rung > reached:
            left += share * (work(rung) - work(reached))
            share /= REDUCTION_FACTOR
            reached = rung
        rung = min(rung * REDUCTION_FACTOR, epochs)
    return left
