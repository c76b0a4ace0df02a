"""The settings of a search itself, beside those of its trials (byot.config.TrainConfig). Standard library only."""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from byot.config import MOST, setting

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

REDUCTION_FACTOR = 3  # of the trials at a rung, the best third goes on
GRACE_FRACTION = 0.1  # no trial is stopped before this share of its epochs
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
    metric: Metric = setting("val_accuracy", "what is searched for; val_accuracy is the deepest classifier's")

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_concurrent", "cpus_per_trial", "gpus_per_trial"):
            value, whole = getattr(self, name), name != "gpus_per_trial"
            kinds = int if whole else int | float
            optional = value is None and name != "num_samples"
            if not optional and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise ValueError(f"{name} must be a {'whole ' if whole else ''}number, not {value!r:.40}")
        if self.metric not in get_args(Metric):
            raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}, not {self.metric!r:.40}")
        if not isinstance(self.time_budget, str | None):
            raise ValueError(f"time_budget must be a time such as 90s, 30m, 8h or 2d, not {self.time_budget!r:.40}")
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {self.num_samples}")
        if self.num_samples > MOST:
            raise ValueError(f"num_samples must be at most {MOST}")
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise ValueError(f"max_concurrent must be at least 1, not {self.max_concurrent}")
        if self.cpus_per_trial is not None and self.cpus_per_trial < 1:
            raise ValueError(f"cpus_per_trial must be at least 1, not {self.cpus_per_trial}")
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
        if shared is not None and gpus is not None:
            raise ValueError("trials_per_gpu and gpus_per_trial say the same in two ways: give one of them")
        self.time_budget_s()

    @property
    def gpus_asked_for(self) -> float | None:
        """GPUs a trial; None leaves it open."""
        if self.trials_per_gpu in (None, "auto"):
            return self.gpus_per_trial
        return share_of_gpu(int(str(self.trials_per_gpu)))

    @property
    def mode(self) -> Literal["max", "min"]:
        return "min" if "nll" in self.metric else "max"

    def time_budget_s(self) -> float | None:
        if self.time_budget is None:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", self.time_budget)
        if not match or not 0 < float(match[1]) < math.inf:
            raise ValueError(f"time_budget must be a time such as 90s, 30m, 8h or 2d, not {self.time_budget!r}")
        return float(match[1]) * SECONDS[match[2] or "s"]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def share_of_gpu(trials: int) -> float:
    """The fraction of a GPU that each of so many trials gets, rounded down to what Ray counts in: 1/10,000."""
    return 10_000 // trials / 10_000


def grace_epochs(epochs: int) -> int:
    """Epochs before a trial may be stopped: a tenth of its budget, at least two where it has as many."""
    return min(epochs, max(2, math.ceil(GRACE_FRACTION * epochs)))


def expected_epochs(num_samples: int, epochs: int) -> float:
    """About how many epochs a search trains in all: two trials whole, of the others a third past each rung."""
    grace = grace_epochs(epochs)
    each, reached, survivors = float(grace), grace, 1.0
    while reached < epochs:
        following = min(reached * REDUCTION_FACTOR, epochs)
        survivors /= REDUCTION_FACTOR
        each += survivors * (following - reached)
        reached = following
    whole = min(2, num_samples)
    return whole * epochs + (num_samples - whole) * each
