"""One training run in its folder: started, gone on with, finished, recorded.

config.json         every setting
metrics.jsonl       one line an epoch
checkpoints/        epoch-0012.pt, the last two
tensorboard/        the same metrics as events
result.json         written last: the test set's figures and where they come from
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from byot.checkpoint import (
    checkpoint_epoch,
    epoch_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    remove_old_checkpoints,
    save_checkpoint,
)
from byot.config import TrainConfig
from byot.data import DeviceImages, LabelledImages, Normalisation, check_dataset, load_images, split_validation
from byot.files import append_json_line, keep_epochs, read_json, read_json_lines, write_json
from byot.metrics import EpochMetrics, Evaluation, evaluate
from byot.provenance import provenance
from byot.trainer import (
    EVAL_BATCH_SIZE,
    OnBatch,
    Trainer,
    build_model,
    check_same_run,
    choose_autocast_dtype,
    choose_device,
)

OnEpoch = Callable[[EpochMetrics], None]


@dataclass(frozen=True)
class Run:
    """A run that is ready to train."""

    folder: Path
    trainer: Trainer
    resumed_from: Path | None


def read_result(config: TrainConfig, folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, None if it is not finished. Raises ValueError if the folder is another run's."""
    if (folder / "config.json").is_file():
        check_same_run(config, TrainConfig.from_dict(read_json(folder / "config.json")))
    return read_json(folder / "result.json") if (folder / "result.json").is_file() else None


def open_run(config: TrainConfig, folder: Path, checkpoint: Path | None = None) -> Run:
    """Read the data, build the network and go back to the given checkpoint, else to the folder's last one.

    Writes nothing before all of that has worked. Raises ValueError for what a user can put right.
    """
    read_result(config, folder)
    check_dataset(config.dataset, config.data_dir)
    images = load_images(config.dataset, config.data_dir, "train")
    train, val = split_validation(images, fraction=config.val_fraction, seed=config.split_seed)
    found = (checkpoint, load_checkpoint(checkpoint)) if checkpoint else load_latest(folder / "checkpoints")
    if found is None:
        trainer = Trainer(config, train, val)
    else:
        trainer = Trainer(config, train, val, normalisation=Normalisation(**found[1]["normalisation"]))
        trainer.load_state_dict(found[1])
    for path in list_checkpoints(folder / "checkpoints"):
        if checkpoint_epoch(path) > trainer.epoch:
            path.unlink()  # damaged, or left behind by going back to an older one: the run makes it again
    write_json(folder / "config.json", config.to_dict())
    keep_epochs(folder / "metrics.jsonl", trainer.epoch)
    return Run(folder, trainer, found[0] if found else None)


def finish_run(run: Run, on_batch: OnBatch | None = None, on_epoch: OnEpoch | None = None) -> dict[str, Any]:
    """Train to the last epoch, with a checkpoint after each, then read the test set, once, and record the result."""
    from torch.utils.tensorboard import SummaryWriter

    folder, trainer, config = run.folder, run.trainer, run.trainer.config
    origin = provenance(trainer.device)  # now: the checkout may change while the run goes on
    with SummaryWriter(str(folder / "tensorboard"), purge_step=trainer.epoch + 1) as writer:
        for metrics in trainer.epochs(on_batch):
            record = metrics.to_record()
            append_json_line(folder / "metrics.jsonl", record)
            save_checkpoint(epoch_checkpoint(folder / "checkpoints", metrics.epoch), trainer.state_dict())
            remove_old_checkpoints(folder / "checkpoints")
            for name, value in record.items():
                writer.add_scalar(name, value, metrics.epoch)
            if on_epoch is not None:
                on_epoch(metrics)
    test = trainer.evaluate_on(load_images(config.dataset, config.data_dir, "test"))
    trainer.check_finite(sum(test.nll))
    result = {
        "config": config.to_dict(),
        "num_train_images": len(trainer.train_images),
        "num_test_images": test.num_images,
        **test.to_record("test"),
        "elapsed_s": sum(r["elapsed_s"] for r in read_json_lines(folder / "metrics.jsonl")),
        **origin,
    }
    write_json(folder / "result.json", result)
    return result


def train_run(config: TrainConfig, folder: Path, threads: int | None = None) -> dict[str, Any]:
    """Do a whole run, or the rest of it, and return its result; of a finished run, the result alone."""
    if threads is not None:
        torch.set_num_threads(threads)
    result = read_result(config, folder)
    return result if result is not None else finish_run(open_run(config, folder))


def evaluate_checkpoint(config: TrainConfig, checkpoint: Path, test: LabelledImages) -> tuple[Evaluation, int]:
    """Evaluate the weights of a checkpoint; returns the figures and the epochs it was trained."""
    state = load_checkpoint(checkpoint)
    device = choose_device(config.device)
    model = build_model(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.load_state_dict(state["model"])
    batches = DeviceImages(test, Normalisation(**state["normalisation"]), device).in_order(EVAL_BATCH_SIZE[device.type])
    dtype = choose_autocast_dtype(config.precision, device)
    return evaluate(model, batches, autocast_dtype=dtype), state["epoch"]


def find_checkpoint(path: Path) -> tuple[Path, TrainConfig, Path]:
    """From a run's folder or one of its checkpoint files: (run folder, its settings, checkpoint).

    Raises ValueError where there is none.
    """
    if not path.exists():
        raise ValueError(f"there is no run or checkpoint at {path}")
    if path.is_dir():
        found = load_latest(path / "checkpoints")
        if found is None:
            raise ValueError(f"{path} holds no checkpoint that can be read")
        checkpoint, state = found
        folder = path
    else:
        checkpoint, state = path, load_checkpoint(path)
        folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    try:
        config = TrainConfig.from_dict(state["config"])
    except KeyError as error:
        raise ValueError(f"the checkpoint {checkpoint} was not written by this project") from error
    return folder, config, checkpoint
