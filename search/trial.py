"""One trial, as it runs in a Ray worker: proposed parameters in, a report and a checkpoint out after every epoch."""

import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ray import tune

from byot.checkpoint import load_checkpoint, save_checkpoint
from byot.config import TrainConfig
from byot.data import LabelledImages
from byot.files import append_json_line, keep_epochs
from byot.trainer import DivergedError, Trainer

CHECKPOINT_FILE = "checkpoint.pt"
STEPS_TIMED = 3
SPEED_TEST_LR = 1e-6  # so that a search whose lr makes trials diverge can still be timed


class TrialSetup(NamedTuple):
    """What all trials of a search have in common."""

    base: TrainConfig  # the settings that are not searched
    trials_folder: Path  # each trial appends to trials_folder/TRIAL_ID/metrics.jsonl
    metric: str
    threads: int


def run_trial(suggestion: dict[str, Any], *, setup: TrialSetup, train: LabelledImages, val: LabelledImages) -> None:
    """Train with the suggested parameters, going on from the trial's checkpoint if Ray brings one.

    A trial whose loss is no longer finite reports NaN with the reason under `diverged` and ends; what to make of that
    is the scheduler's and the searcher's affair.
    """
    torch.set_num_threads(setup.threads)
    trainer = Trainer(setup.base.with_settings(**suggestion["params"]), train, val)
    checkpoint = tune.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            trainer.load_state_dict(load_checkpoint(Path(folder) / CHECKPOINT_FILE))
    metrics_path = setup.trials_folder / tune.get_context().get_trial_id() / "metrics.jsonl"
    metrics_path.parent.mkdir(parents=True, exist_ok=True)
    keep_epochs(metrics_path, trainer.epoch)
    try:
        for metrics in trainer:
            record = metrics.to_record()
            append_json_line(metrics_path, record)
            with tempfile.TemporaryDirectory() as folder:
                save_checkpoint(Path(folder) / CHECKPOINT_FILE, trainer.state_dict())
                tune.report(record, checkpoint=tune.Checkpoint.from_directory(folder))
    except DivergedError as error:
        tune.report({"epoch": trainer.epoch + 1, setup.metric: math.nan, "diverged": str(error)})


def measure_images_per_s(setup: TrialSetup, train: LabelledImages) -> float:
    """Training speed on this worker over these few images: once to warm up, once that counts."""
    torch.set_num_threads(setup.threads)
    harmless = setup.base.with_settings(epochs=2, lr=SPEED_TEST_LR)
    return [metrics.images_per_s for metrics in Trainer(harmless, train)][-1]
