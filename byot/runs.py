"""One training run in its folder: started, gone on with, finished, recorded.

config.json         every setting
metrics.jsonl       one line an epoch
checkpoints/        epoch-0012.pt, the last two; epoch-0012-step-000100.pt where an epoch takes long or was stopped;
                    left-… what was damaged or gone back before
tensorboard/        the same metrics as events
result.json         written last: the test set's figures and where they come from
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from byot.batches import in_order, place_images
from byot.config import NUM_CLASSIFIERS, TrainConfig
from byot.data import LabelledImages, Normalisation, check_dataset, load_images, split_validation
from byot.metrics import EpochMetrics, Evaluation, evaluate
from byot.model import BranchedResNet
from byot.state import check_buffers, check_state, check_weights
from byot.system.checkpoint import (
    checkpoint_path,
    load_checkpoint,
    load_latest,
    pass_over_newer,
    remove_old_checkpoints,
    save_checkpoint,
)
from byot.system.distributed import ALONE, Processes
from byot.system.files import append_json_line, errors_in, read_json, remove_leftovers, write_json, write_json_lines
from byot.system.lock import WORKER_WAIT_S, lock_folder
from byot.system.paths import absolute_path
from byot.system.provenance import provenance
from byot.system.stopping import StoppedError
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

MEASURES = ("test_accuracy", "test_nll", "test_ece")  # of a result.json, each of every classifier


@dataclass(frozen=True)
class Run:
    """A run that is ready to train."""

    folder: Path
    trainer: Trainer
    resumed_from: Path | None


def read_result(config: TrainConfig, folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, None if it is not finished. Raises ValueError if the folder is another run's."""
    config_path, result_path = folder / "config.json", folder / "result.json"
    try:
        if config_path.is_file():
            recorded = read_json(config_path)
            with errors_in(config_path):
                found = TrainConfig.from_dict(recorded)
        else:
            found = config
        result = _read_figures(result_path, found) if result_path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{error}; without this file the run goes on from its last checkpoint") from error
    check_same_run(config, found)
    return result


def _read_figures(path: Path, config: TrainConfig) -> dict[str, Any]:
    """A result with the numbers that are printed of a finished run. Raises ValueError where one is missing."""
    result = read_json(path)
    classifiers = range(NUM_CLASSIFIERS + 1 - config.num_classifiers, NUM_CLASSIFIERS + 1)
    suffixes = ("", *(f"_{i}" for i in classifiers), *(["_ensemble"] if config.num_classifiers > 1 else []))
    for name in ("num_test_images", "elapsed_s", *(measure + suffix for measure in MEASURES for suffix in suffixes)):
        if not isinstance(result.get(name), int | float):
            raise ValueError(f"{path} has no number as {name}")
    return result


def open_run(config: TrainConfig, folder: Path, checkpoint: Path | None = None, processes: Processes = ALONE) -> Run:
    """Read the data, build the network and go back to the given checkpoint, else to the folder's last one.

    The first process holds the folder's lock and is the one that writes, which it does once all of that has worked;
    others, on whatever machine, read its checkpoint. Raises ValueError for what a user can put right.
    """
    if not processes.is_first:
        processes.from_first(None)  # it refuses, downloads and decodes for all
    read_result(config, folder)
    check_dataset(config.dataset, config.data_dir)
    images = load_images(config.dataset, config.data_dir, "train")
    if processes.is_first:
        processes.from_first(None)
    train, val = split_validation(images, fraction=config.val_fraction, seed=config.split_seed)
    if not processes.is_first:
        resumed_from = processes.from_first(None)
        state = load_checkpoint(resumed_from) if resumed_from else None
        normalisation = Normalisation(**state["normalisation"]) if state else None
        trainer = Trainer(config, train, val, normalisation, processes)
        if state:
            trainer.load_state_dict(state)
        return Run(folder, trainer, resumed_from)
    trainer, resumed_from = restore_trainer(config, train, val, folder, checkpoint, processes)
    write_json(folder / "config.json", config.to_dict())
    processes.from_first(resumed_from)
    return Run(folder, trainer, resumed_from)


def restore_trainer(
    config: TrainConfig,
    train: LabelledImages,
    val: LabelledImages | None,
    folder: Path,
    checkpoint: Path | None = None,
    processes: Processes = ALONE,
) -> tuple[Trainer, Path | None]:
    """A trainer as the given checkpoint left it, else the folder's last whole one, else new; and that checkpoint.

    What the folder has from later than that is renamed: it is damaged, or left behind by going back, and made again.
    """
    with explain_out_of_memory(config):
        found = (checkpoint, load_checkpoint(checkpoint)) if checkpoint else load_latest(folder / "checkpoints")
        if found:
            check_same_run(config, check_state(*found))
        normalisation = Normalisation(**found[1]["normalisation"]) if found else None
        trainer = Trainer(config, train, val, normalisation, processes)
        if found:
            check_weights(*found, trainer.model)
            check_buffers(*found, trainer.optimizer)
            trainer.load_state_dict(found[1])
    pass_over_newer(folder / "checkpoints", trainer.epoch, trainer.step)
    remove_leftovers(folder)
    if trainer.history or (folder / "metrics.jsonl").exists():
        write_json_lines(folder / "metrics.jsonl", trainer.history)
    return trainer, found[0] if found else None


def train_saving(
    trainer: Trainer,
    folder: Path,
    on_batch: OnBatch | None = None,
    stop_asked: StopAsked = lambda: 0,
    on_save: OnSave = lambda: None,
) -> Iterator[EpochMetrics]:
    """Train to the last epoch; each one is saved, then added to metrics.jsonl, then yielded.

    On a GPU, where an epoch may take no longer than saving does, those are left out that would make saving take more
    than its share. Raises StoppedError, the step at hand done and saved, once `stop_asked` says so, in any process.
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
        return processes.greatest(int(value), trainer.device)

    def after_batch(done: int, images: int) -> None:
        if on_batch is not None:
            on_batch(done, images)
        if processes.count > 1 and not trainer.due_for_check():
            return
        stop = agreed(stop_asked())
        if stop or agreed(time.monotonic() - saved_at > SAVE_EVERY_S):
            save()
        if stop:
            agreed(0)  # the first has saved: as soon as one process ends, torchrun ends the others
            raise StoppedError(stop)

    for metrics in trainer.epochs(after_batch):
        pause_s = took_s / SAVING_SHARE[trainer.device.type]
        if trainer.epoch == trainer.config.epochs or agreed(time.monotonic() - saved_at >= pause_s):
            save()
        if processes.is_first:
            append_json_line(folder / "metrics.jsonl", trainer.history[-1])
        yield metrics


def finish_run(
    run: Run,
    on_batch: OnBatch | None = None,
    on_epoch: OnEpoch | None = None,
    stop_asked: StopAsked = lambda: 0,
) -> dict[str, Any]:
    """Train to the last epoch, with a checkpoint after each, then read the test set, once, and record the result."""
    folder, trainer, config = run.folder, run.trainer, run.trainer.config
    origin = provenance(trainer.device)  # now: the checkout may change while the run goes on
    with ExitStack() as opened:
        show = _shown_in_tensorboard(run, opened) if trainer.processes.is_first else None
        for metrics in train_saving(trainer, folder, on_batch, stop_asked):
            if show is not None:
                show()
            if on_epoch is not None:
                on_epoch(metrics)
    test = trainer.evaluate_on(load_images(config.dataset, config.data_dir, "test"))
    trainer.check_finite(sum(test.nll))
    result = {
        "config": config.to_dict(),
        "num_train_images": len(trainer.train_images),
        "num_test_images": test.num_images,
        **test.to_record("test"),
        "elapsed_s": sum(record["elapsed_s"] for record in trainer.history),
        "num_processes": trainer.processes.count,
        "precision": "fp32" if trainer.autocast_dtype is None else "bf16",
        **origin,
    }
    if trainer.processes.is_first:
        write_json(folder / "result.json", result)
    return result


def _shown_in_tensorboard(run: Run, opened: ExitStack) -> Callable[[], None]:
    """A function that shows the last epoch's figures; the writer is closed with `opened`."""
    from torch.utils.tensorboard import SummaryWriter

    trainer = run.trainer
    writer = opened.enter_context(SummaryWriter(str(run.folder / "tensorboard"), purge_step=trainer.epoch))

    def show() -> None:
        for name, value in trainer.history[-1].items():
            writer.add_scalar(name, value, trainer.epoch)

    if trainer.history:  # its last epoch may have been saved and not shown
        show()
    return show


def train_run(config: TrainConfig, folder: Path, threads: int | None = None) -> dict[str, Any]:
    """Do a whole run, or the rest of it, and return its result; of a finished run, the result alone."""
    if threads is not None:
        torch.set_num_threads(threads)
    with lock_folder(folder, wait_s=WORKER_WAIT_S):
        result = read_result(config, folder)
        return result if result is not None else finish_run(open_run(config, folder))


def evaluate_checkpoint(config: TrainConfig, checkpoint: Path, test: LabelledImages) -> tuple[Evaluation, int]:
    """Evaluate the weights of a checkpoint; returns the figures and the epochs it was trained."""
    device = choose_device(config.device)
    model, state = _load_weights(config, checkpoint)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    source = place_images(test, device, config.placement)
    batches = in_order(source, EVAL_BATCH_SIZE[device.type], Normalisation(**state["normalisation"]))
    dtype = choose_autocast_dtype(config.precision, device)
    return evaluate(model, batches, autocast_dtype=dtype), state["epoch"]


def load_network(path: Path | str) -> tuple[BranchedResNet, Normalisation]:
    """The trained network of a run's folder, or of a checkpoint file, on the CPU and in evaluation mode.

    Its input is a batch [N,3,H,W] of values from 0 to 1 that were normalised with what is returned beside it. Raises
    ValueError where there is none.
    """
    _, config, checkpoint = find_checkpoint(absolute_path(path))
    model, state = _load_weights(config, checkpoint)
    return model.eval(), Normalisation(**state["normalisation"])


def _load_weights(config: TrainConfig, checkpoint: Path) -> tuple[BranchedResNet, dict[str, Any]]:
    """The network with a checkpoint's weights, and all that the checkpoint holds."""
    state = load_checkpoint(checkpoint)
    check_state(checkpoint, state)
    model = build_model(config)
    check_weights(checkpoint, state, model)
    model.load_state_dict(state["model"])
    return model, state


def find_checkpoint(path: Path) -> tuple[Path, TrainConfig, Path]:
    """From a run's folder or one of its checkpoint files: (run folder, its settings, checkpoint).

    Raises ValueError where there is none.
    """
    if not path.exists():
        raise ValueError(f"there is no run or checkpoint at {path}")
    if not (path.is_dir() or path.is_file()):
        raise ValueError(f"{path} is neither a folder nor a file")
    if path.is_dir():
        found = load_latest(path / "checkpoints")
        if found is None:
            raise ValueError(f"{path} holds no checkpoint that can be read")
        checkpoint, state = found
        folder = path
    else:
        checkpoint, state = path, load_checkpoint(path)
        folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return folder, check_state(checkpoint, state), checkpoint
