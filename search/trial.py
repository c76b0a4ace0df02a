"""Runs one trial in a Ray worker: proposed parameters in, a report after every epoch, checkpoints of its own.

Ray is given no checkpoints: after a kill its snapshot may name one that is gone. A trial that starts again, whoever
starts it, looks into its own folder, or what an object store has of that.
"""

import math
import time
from collections.abc import Iterable, Iterator
from errno import ENOENT
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from ray import tune
from ray.util import get_node_ip_address

from byot.config import TrainConfig
from byot.data import LabelledImages
from byot.runs import OnSave, restore_trainer, train_saving
from byot.search_files import DIVERGED
from byot.system.files import append_json_line, describe_refusal, write_json_lines
from byot.system.lock import WORKER_WAIT_S, LockedError, lock_folder
from byot.system.stopping import DivergedError, TrainingError
from byot.trainer import OnBatch, Trainer
from search.system.remote import Store, working_folder

# Steps of a new search's first trial after which its speed is reported: those that warm up, those that are timed.
STEPS_TIMED = {"cpu": (1, 3), "mps": (10, 10), "cuda": (100, 100)}

# Keys of a report with which a trial ends before its last epoch, beside the metric's NaN.
FAILED = "failed"  # for good, with the reason
UNWRITABLE = "unwritable"  # its folder or the object store cannot be read or written: it can go on when that can
# Key of a report that is no epoch's: images a second, before the first epoch is done.
PACE = "pace"


class TrialSetup(NamedTuple):
    """What all trials of a search have in common."""

    base: TrainConfig  # the settings that are not searched
    store: Store  # of the search's folder, in which each trial has trials/TRIAL_ID
    metric: str
    threads: int
    timed: str | None  # the trial that reports its speed early
    num_seeds: int = 1


def run_trial(suggestion: dict[str, Any], *, setup: TrialSetup, train: LabelledImages, val: LabelledImages) -> None:
    """Train with the suggested parameters, going on from the trial's last checkpoint if it has one.

    One that goes on first reports its epochs again: the search may have been killed before it heard of them.
    """
    torch.set_num_threads(setup.threads)
    trial_id = suggestion["trial_id"]
    folder = setup.store.folder / "trials" / trial_id
    ending = {"epoch": 0, setup.metric: math.nan}
    try:
        with working_folder(folder, setup.store) as (here, save):
            if not (here / "trial.json").is_file():  # a folder made here would be on this node alone
                told = f"the node {get_node_ip_address()} does not see it"
                raise FileNotFoundError(ENOENT, told, str(setup.store.place(folder) or folder))
            with lock_folder(here, wait_s=WORKER_WAIT_S):
                config = setup.base.with_settings(**suggestion["params"])
                timed = setup.metric if trial_id == setup.timed else None
                for record in train_seeds(config, setup.num_seeds, here, train, val, timed, save):
                    save()
                    tune.report(record)
    except TrainingError as error:
        tune.report(ending | {FAILED: f"{DIVERGED if isinstance(error, DivergedError) else ''}{error}"})
    except LockedError as error:
        tune.report(ending | {UNWRITABLE: str(error)})
    except OSError as error:
        tune.report(ending | {UNWRITABLE: describe_refusal(error, folder)})


def train_seeds(
    config: TrainConfig,
    num_seeds: int,
    folder: Path,
    train: LabelledImages,
    val: LabelledImages,
    timed: str | None,
    on_save: OnSave = lambda: None,
) -> Iterator[dict[str, Any]]:
    """Train with one seed or several, epoch by epoch side by side; yields each epoch's record, of several the mean.

    The epochs that were done before come first. Several seeds have folders of their own, and the folder's
    metrics.jsonl has their means. `timed` is the metric of a trial that reports its speed early.
    """
    seeds = range(config.seed, config.seed + num_seeds)
    folders = [folder] if num_seeds == 1 else [folder / f"seed-{seed}" for seed in seeds]
    trainers = [
        restore_trainer(config.with_settings(seed=seed), train, val, place)[0]
        for seed, place in zip(seeds, folders, strict=True)
    ]
    done = [mean_record(records) for records in zip(*(trainer.history for trainer in trainers), strict=False)]
    if num_seeds > 1:
        write_json_lines(folder / "metrics.jsonl", done)
    yield from done
    on_batch = report_pace(trainers[0], timed) if timed is not None else None
    running = [
        train_saving(trainer, place, on_batch if trainer is trainers[0] else None, on_save=on_save)
        for trainer, place in zip(trainers, folders, strict=True)
    ]
    for epoch in range(len(done) + 1, config.epochs + 1):
        for trainer, epochs in zip(trainers, running, strict=True):
            if trainer.epoch < epoch:  # a kill may have left one ahead of the others
                next(epochs)
        record = mean_record(trainer.history[epoch - 1] for trainer in trainers)
        if num_seeds > 1:
            append_json_line(folder / "metrics.jsonl", record)
        yield record


def mean_record(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of what several seeds measured in the same epoch; their seconds are added up."""
    first, *others = records
    if not others:
        return first
    known = [name for name in first if name != "epoch" and all(name in record for record in others)]  # older ones: less
    mean = {name: fmean(record[name] for record in (first, *others)) for name in known}
    seconds = sum(record["elapsed_s"] for record in (first, *others))
    return {"epoch": first["epoch"], **mean, "elapsed_s": seconds}


def report_pace(trainer: Trainer, metric: str) -> OnBatch:
    """Return a function to be called after each step that reports the speed as soon as it can be known."""
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
