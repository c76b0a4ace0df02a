"""One trial, as it runs in a Ray worker: proposed parameters in, a report after every epoch, checkpoints of its own.

Ray is given no checkpoints: after a kill its snapshot may name one that is gone. A trial that starts again, whoever
starts it, looks into its own folder.
"""

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ray import tune

from byot.config import TrainConfig
from byot.data import LabelledImages
from byot.files import describe_refusal
from byot.lock import WORKER_WAIT_S, LockedError, lock_folder
from byot.runs import restore_trainer, train_saving
from byot.stopping import DivergedError, TrainingError
from byot.trainer import OnBatch, Trainer
from search.records import DIVERGED

# Steps of a new search's first trial after which its speed is reported: those that warm up, those that are timed.
STEPS_TIMED = {"cpu": (1, 3), "mps": (10, 10), "cuda": (100, 100)}

# Keys of a report with which a trial ends before its last epoch, beside the metric's NaN.
FAILED = "failed"  # for good, with the reason
UNWRITABLE = "unwritable"  # its folder cannot be read or written: the trial can go on when it can
# Key of a report that is no epoch's: images a second, before the first epoch is done.
PACE = "pace"


class TrialSetup(NamedTuple):
    """What all trials of a search have in common."""

    base: TrainConfig  # the settings that are not searched
    trials_folder: Path  # each trial has trials_folder/TRIAL_ID
    metric: str
    threads: int
    timed: str | None  # the trial that reports its speed early


def run_trial(suggestion: dict[str, Any], *, setup: TrialSetup, train: LabelledImages, val: LabelledImages) -> None:
    """Train with the suggested parameters, going on from the trial's last checkpoint if it has one.

    One that goes on first reports its epochs again: the search may have been killed before it heard of them.
    """
    torch.set_num_threads(setup.threads)
    folder = setup.trials_folder / suggestion["trial_id"]
    ending = {"epoch": 0, setup.metric: math.nan}
    try:
        with lock_folder(folder, wait_s=WORKER_WAIT_S):
            config = setup.base.with_settings(**suggestion["params"])
            trainer, _ = restore_trainer(config, train, val, folder, may_compile=False)
            for record in list(trainer.history):
                tune.report(record)
            timed = suggestion["trial_id"] == setup.timed
            for _ in train_saving(trainer, folder, on_batch=report_pace(trainer, setup.metric) if timed else None):
                tune.report(trainer.history[-1])
    except TrainingError as error:
        tune.report(ending | {FAILED: f"{DIVERGED if isinstance(error, DivergedError) else ''}{error}"})
    except LockedError as error:
        tune.report(ending | {UNWRITABLE: str(error)})
    except OSError as error:
        tune.report(ending | {UNWRITABLE: describe_refusal(error, folder)})


def report_pace(trainer: Trainer, metric: str) -> OnBatch:
    """A function to be called after each step that reports the speed as soon as it can be known."""
    warmup, timed = STEPS_TIMED[trainer.device.type]
    began_at, steps = 0.0, 0

    def after_step(done: int, images: int) -> None:
        nonlocal began_at, steps
        steps += 1
        if steps == warmup:
            began_at = time.perf_counter()
        elif steps == warmup + timed:
            images_per_s = timed * trainer.config.batch_size / (time.perf_counter() - began_at)
            tune.report({"epoch": 0, metric: math.nan, PACE: images_per_s})

    return after_step
