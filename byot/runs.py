"""One training run in its folder: started, gone on with, finished, recorded.

config.json         every setting
metrics.jsonl       one line an epoch
checkpoints/        epoch-0012.pt, the last two; epoch-0012-step-000100.pt where an epoch takes long or was stopped;
                    left-… those that are damaged, or later than the one the run went back to
tensorboard/        the same metrics as events; tracking.json names the run at other trackers
result.json         written last: the test set's figures and where they come from
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from byot.batches import in_order, place_images
from byot.class_names import CLASS_NAMES
from byot.config import CLASSIFIERS, NUM_CLASSIFIERS, TrainConfig
from byot.data import LabelledImages, Normalisation, check_dataset, load_images, split_validation
from byot.exits import measure_costs
from byot.metrics import EpochMetrics, Evaluation, evaluate
from byot.model import BranchedResNet
from byot.system.checkpoint import (
    checkpoint_path,
    is_out_of_memory,
    load_checkpoint,
    load_latest,
    remove_old_checkpoints,
    save_checkpoint,
    set_aside_newer,
)
from byot.system.distributed import ALONE, Processes
from byot.system.files import append_json_line, errors_in, read_json, remove_leftovers, write_json, write_json_lines
from byot.system.lock import WORKER_WAIT_S, lock_folder
from byot.system.paths import SHIPPED_NETWORKS, absolute_path, default_outputs
from byot.system.provenance import provenance
from byot.system.stopping import StoppedError
from byot.tracking import Trackers, Tracking
from byot.trainer import (
    EVAL_BATCH_SIZE,
    OnBatch,
    Trainer,
    build_model,
    check_same_run,
    choose_autocast_dtype,
    choose_device,
    explain_out_of_memory,
)

SAVE_EVERY_S = 600.0  # within an epoch that takes longer
SAVING_SHARE = {"cpu": math.inf, "mps": 0.05, "cuda": 0.05}  # of the time, at most; infinite: after every epoch

OnEpoch = Callable[[EpochMetrics], None]
StopAsked = Callable[[], int]  # anything but 0 asks to stop
OnSave = Callable[[], None]  # a checkpoint has been written


@dataclass(frozen=True)
class Run:
    """A run that is ready to train."""

    folder: Path
    trainer: Trainer
    resumed_from: Path | None
    tracking: Tracking


def read_result(config: TrainConfig, folder: Path) -> dict[str, Any] | None:
    """Read the result of a finished run; None if it is not finished.

    Raises ValueError if the folder is another run's, or if its config.json or result.json is damaged.
    """
    config_path, result_path = folder / "config.json", folder / "result.json"
    found, result = config, None
    try:
        if config_path.is_file():
            recorded = read_json(config_path)
            with errors_in(config_path):
                found = TrainConfig.from_dict(recorded)
        if result_path.is_file():
            result = read_json(result_path)
            ends = [end for end in CLASSIFIERS if found.num_classifiers > 1 or end == str(NUM_CLASSIFIERS)]
            suffixes = ("", *(f"_{end}" for end in ends))
            figures = (f"test_{measure}{suffix}" for measure in ("accuracy", "nll", "ece") for suffix in suffixes)
            for name in ("num_test_images", "elapsed_s", *figures):
                if not isinstance(result.get(name), int | float):
                    raise ValueError(f"{result_path} has no number as {name}")
    except ValueError as error:
        raise ValueError(f"{error}; without this file the run goes on from its last checkpoint") from error
    check_same_run(config, found)
    if result is not None and config.dataset == "imagefolder" and config.data_dir != found.data_dir:
        raise ValueError(f"{folder} is finished and was trained on {found.data_dir}; another --name would do")
    return result


def open_run(
    config: TrainConfig,
    folder: Path,
    checkpoint: Path | None = None,
    processes: Processes = ALONE,
    trackers: Trackers | None = None,
) -> Run:
    """Read the data, build the network and go back to the given checkpoint, else to the folder's last one.

    The first process holds the folder's lock. It alone writes, and only once all of this has worked; the others, on
    whatever machine, read the checkpoint that it names. Left out, the one tracker is TensorBoard. Raises ValueError for
    what a user can put right.
    """
    if not processes.is_first:
        checkpoint = processes.broadcast(None)  # once the first has refused, downloaded and decoded for all
    read_result(config, folder)
    check_dataset(config.dataset, config.data_dir, config.image_size)
    images = load_images(config.dataset, config.data_dir, "train", config.image_size)
    train, val = split_validation(images, fraction=config.val_fraction, seed=config.split_seed)
    trainer, resumed_from = restore_trainer(config, train, val, folder, checkpoint, processes)
    if processes.is_first:
        write_json(folder / "config.json", config.to_dict())
        processes.broadcast(resumed_from)
    if trackers is None or not processes.is_first:
        trackers = Trackers(["tensorboard" if processes.is_first else "none"], warnings.warn)
    return Run(folder, trainer, resumed_from, Tracking(trackers, folder, config.to_dict()))


def restore_trainer(
    config: TrainConfig,
    train: LabelledImages,
    val: LabelledImages | None,
    folder: Path,
    checkpoint: Path | None = None,
    processes: Processes = ALONE,
) -> tuple[Trainer, Path | None]:
    """Build a trainer as the given checkpoint left it, else the folder's last whole one, else new.

    Returns it with that checkpoint. Checkpoints of later epochs are renamed: they are damaged, or the run has gone back
    before them and makes them again.
    """
    with explain_out_of_memory(config):
        found = None
        if checkpoint is not None:
            found = checkpoint, load_checkpoint(checkpoint)
        elif processes.is_first:
            found = load_latest(folder / "checkpoints")
        if found is None:
            trainer = Trainer(config, train, val, None, processes)
        else:
            checkpoint, state = found
            with explain_misfit(checkpoint):
                check_same_run(config, recorded_config(state))
                normalisation = Normalisation(**state["normalisation"])
            trainer = Trainer(config, train, val, normalisation, processes)
            with explain_misfit(checkpoint):
                trainer.load_state_dict(state)
    if processes.is_first:
        set_aside_newer(folder / "checkpoints", trainer.epoch, trainer.step)
        remove_leftovers(folder)
        if trainer.history or (folder / "metrics.jsonl").exists():
            write_json_lines(folder / "metrics.jsonl", trainer.history)
    return trainer, checkpoint


@contextmanager
def explain_misfit(checkpoint: Path) -> Iterator[None]:
    """Turn what fails when a checkpoint of another run, network or version is used into a ValueError that names it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"the checkpoint {checkpoint} cannot be used: {error}") from error
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        what = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(
            f"the checkpoint {checkpoint} was not written by this version of the project: {what:.200}"
        ) from error


def recorded_config(state: dict[str, Any]) -> TrainConfig:
    """Read the settings of the run that wrote a checkpoint; to be called within explain_misfit."""
    config = TrainConfig.from_dict(state["config"])
    if config.loss_form == "plain" and any("branches" in name for name in state["model"]):
        raise ValueError(
            "it is of a version that built branches for loss_form plain too: start that run anew, with --fresh or "
            "another --name"
        )
    if [record["epoch"] for record in state["history"]] != list(range(1, state["epoch"] + 1)):
        raise ValueError("its history is not that of the epochs it has done")
    return config


def train_saving(
    trainer: Trainer,
    folder: Path,
    on_batch: OnBatch | None = None,
    stop_asked: StopAsked = lambda: 0,
    on_save: OnSave = lambda: None,
) -> Iterator[EpochMetrics]:
    """Train to the last epoch; each one is saved, then added to metrics.jsonl, then yielded.

    On a GPU an epoch may be as short as a save: saves that would take more than a twentieth of the time are skipped.
    Raises StoppedError, the step at hand done and saved, once `stop_asked` says so, in any process.
    """
    processes = trainer.processes
    saved_at, took_s = time.monotonic(), 0.0

    def save() -> None:
        nonlocal saved_at, took_s
        started = time.monotonic()
        state = trainer.state_dict()
        if processes.is_first:
            save_checkpoint(checkpoint_path(folder / "checkpoints", trainer.epoch, trainer.step), state)
            remove_old_checkpoints(folder / "checkpoints")
            on_save()
        saved_at = time.monotonic()
        took_s = saved_at - started

    def agreed(value: int) -> int:
        return processes.all_reduce_max(int(value))

    def after_batch(done: int, images: int) -> None:
        if on_batch is not None:
            on_batch(done, images)
        if processes.count > 1 and not trainer.due_for_check():
            return
        stop = agreed(stop_asked())
        if stop or agreed(time.monotonic() - saved_at > SAVE_EVERY_S):
            save()
        if stop:
            processes.barrier()  # the first has saved: as soon as one process ends, torchrun ends the others
            raise StoppedError(stop)

    for metrics in trainer.epochs(after_batch):
        pause_s = took_s / SAVING_SHARE[trainer.device.type]
        if trainer.epoch == trainer.config.epochs or agreed(time.monotonic() - saved_at >= pause_s):
            save()
        if processes.is_first:
            append_json_line(folder / "metrics.jsonl", trainer.history[-1])
        yield metrics


def train_and_test(
    run: Run,
    on_batch: OnBatch | None = None,
    on_epoch: OnEpoch = lambda metrics: None,
    stop_asked: StopAsked = lambda: 0,
) -> dict[str, Any]:
    """Train to the last epoch, with a checkpoint after each, then read the test set, once, and record the result."""
    folder, trainer, config = run.folder, run.trainer, run.trainer.config
    origin = provenance(trainer.device)  # now: the checkout may change while the run goes on
    with run.tracking as tracking:
        for record in trainer.history:  # of a run that goes on
            tracking.log(record)
        for metrics in train_saving(trainer, folder, on_batch, stop_asked):
            tracking.log(trainer.history[-1])
            on_epoch(metrics)
        test = trainer.evaluate_on(load_images(config.dataset, config.data_dir, "test", config.image_size))
        trainer.check_finite(sum(test.nll))
        tracking.end(measures := test.to_record("test"))
    result = {
        "config": config.to_dict(),
        "num_train_images": len(trainer.train_images),
        "num_test_images": test.num_images,
        **measures,
        "elapsed_s": sum(record["elapsed_s"] for record in trainer.history),
        "num_processes": trainer.processes.count,
        "precision": "fp32" if trainer.autocast_dtype is None else "bf16",
        **origin,
    }
    if trainer.processes.is_first:
        write_json(folder / "result.json", result)
    return result


def train_run(config: TrainConfig, folder: Path, threads: int | None = None) -> dict[str, Any]:
    """Do a whole run, or the rest of it, and return its result; of a finished run, the result alone."""
    if threads is not None:
        torch.set_num_threads(threads)
    with lock_folder(folder, wait_s=WORKER_WAIT_S):
        result = read_result(config, folder)
        return result if result is not None else train_and_test(open_run(config, folder))


class SavedRun(NamedTuple):
    """A run as one of its checkpoints has it."""

    folder: Path
    config: TrainConfig
    checkpoint: Path
    state: dict[str, Any]


def find_run(run: Path | str, outputs: Path | None = None) -> SavedRun:
    """Read the last checkpoint of a run's folder, or one checkpoint file. Raises ValueError where there is none.

    Where there is no such path, the name is looked for in the outputs folder, then among the networks that ship.
    """
    path = absolute_path(run)
    if not path.exists():
        named = (folder / run for folder in ((outputs or default_outputs()) / "runs", SHIPPED_NETWORKS))
        path = next((folder for folder in named if folder.is_dir()), path)
    if path.is_dir():
        found = load_latest(path / "checkpoints")
        if found is None:
            raise ValueError(f"{path} holds no checkpoint that can be read")
        folder, (checkpoint, state) = path, found
    elif path.is_file():
        folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        checkpoint, state = path, load_checkpoint(path)
    else:
        raise ValueError(f"there is no run or checkpoint at {path}")
    with explain_misfit(checkpoint):
        return SavedRun(folder, recorded_config(state), checkpoint, state)


def load_network(run: Path | str | SavedRun) -> tuple[BranchedResNet, Normalisation]:
    """Load the trained network of a run's folder or of a checkpoint file, on the CPU and in evaluation mode.

    Its input is a batch [N,3,H,W] of values from 0 to 1 that were normalised with what is returned beside it. Raises
    ValueError where there is none.
    """
    saved = run if isinstance(run, SavedRun) else find_run(run)
    with explain_misfit(saved.checkpoint):
        model = build_model(saved.config, len(saved.state.get("class_names", [])))
        model.load_state_dict(saved.state["model"])
        return model.eval(), Normalisation(**saved.state["normalisation"])


def class_names(saved: SavedRun) -> tuple[str, ...]:
    """Name the classes of a saved network, in the order of the labels."""
    return tuple(saved.state.get("class_names", ())) or CLASS_NAMES[saved.config.dataset]


def check_classes(saved: SavedRun, images: LabelledImages) -> None:
    """Raise ValueError for images of other classes than those that a saved network knows."""
    if list(images.class_names) != saved.state.get("class_names", []):
        raise ValueError(f"{saved.checkpoint} was trained on other classes than the data set has")


def evaluate_run(saved: SavedRun, config: TrainConfig, test: LabelledImages) -> Evaluation:
    """Evaluate a saved network on images, on the device and in the precision that `config` asks for."""
    device = choose_device(config.device)
    model, normalisation = load_network(saved)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = in_order(place_images(test, device, config.placement), EVAL_BATCH_SIZE[device.type], normalisation)
    costs = measure_costs(model, test.images.shape[1]) if config.num_classifiers > 1 else None
    return evaluate(model, batches, autocast_dtype=choose_autocast_dtype(config.precision, device), costs=costs)
