"""One trial, as it runs in a Ray worker: proposed parameters in, a report after every epoch, checkpoints of its own.

Ray is given no checkpoints: after a kill its snapshot may name one that is gone. A trial that starts again, whoever
starts it, looks into its own folder.
"""

import math
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
from byot.trainer import Trainer
from search.records import DIVERGED

STEPS_TIMED = 3
SPEED_TEST_LR = 1e-6  # so that a search whose lr makes trials diverge can still be timed

# Keys of a report with which a trial ends before its last epoch, beside the metric's NaN.
FAILED = "failed"  # for good, with the reason
UNWRITABLE = "unwritable"  # its folder cannot be read or written: the trial can go on when it can


class TrialSetup(NamedTuple):
    """What all trials of a search have in common."""

    base: TrainConfig  # the settings that are not searched
    trials_folder: Path  # each trial has trials_folder/TRIAL_ID
    metric: str
    threads: int


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
            trainer, _ = restore_trainer(config, train, val, folder)
            for record in list(trainer.history):
                tune.report(record)
            for _ in train_saving(trainer, folder):
                tune.report(trainer.history[-1])
    except TrainingError as error:
        tune.report(ending | {FAILED: f"{DIVERGED if isinstance(error, DivergedError) else ''}{error}"})
    except LockedError as error:
        tune.report(ending | {UNWRITABLE: str(error)})
    except OSError as error:
        tune.report(ending | {UNWRITABLE: describe_refusal(error, folder)})


def measure_images_per_s(setup: TrialSetup, train: LabelledImages) -> float:
    """Training speed on this worker over these few images: once to warm up, once that counts."""
    torch.set_num_threads(setup.threads)
    harmless = setup.base.with_settings(epochs=2, lr=SPEED_TEST_LR)
    return [metrics.images_per_s for metrics in Trainer(harmless, train)][-1]
