"""Says what a run is made of and how long it will take here, and trains nothing: byot/train.py --dry-run."""

import io
import math
import time

import numpy as np
import torch
from torch import nn

from byot.batches import batches_per_epoch
from byot.config import CLASSIFIERS, DATASETS, TrainConfig, work_after
from byot.console import format_duration, text_table
from byot.data import LabelledImages, check_dataset, load_images, split_validation
from byot.exits import measure_costs
from byot.trainer import Trainer, build_model, explain_out_of_memory

WARMUP_STEPS = {"cpu": 1, "mps": 10, "cuda": 20}
MEASURED_S = 5.0
HARMLESS_LR = 1e-9  # weights that hardly move cannot diverge


class EnoughError(Exception):
    """The steps to be timed are done."""


def describe_run(config: TrainConfig) -> str:
    """Write a table of the network's parts and their costs, the size of a checkpoint, and the time that an epoch takes.

    Times some steps with the training images, with made-up ones where they would have to be downloaded. Raises
    ValueError for what the run itself would refuse, OutOfMemoryError where it does not fit.
    """
    images = find_images(config)
    train, _ = split_validation(images, fraction=config.val_fraction, seed=config.split_seed)
    with explain_out_of_memory(config):
        trainer = Trainer(config.with_settings(epochs=10_000, lr=HARMLESS_LR), train)
        trainer.epoch = trainer.config.epochs - 1_000  # near the end images are whole whatever the recipe
        images_per_s = time_steps(trainer)
    checkpoint = io.BytesIO()
    torch.save(trainer.state_dict(), checkpoint)
    epoch_s = len(train.labels) / images_per_s
    return "\n".join(
        (
            f"{config.model} width {config.width} on {config.dataset}, {len(train.labels):,} training images of "
            f"{config.image_size} pixels",
            "",
            table_of_parts(config, len(images.class_names)),
            "",
            f"parameters             {num_parameters(trainer.model):,}",
            f"a checkpoint           {checkpoint.tell() / 1e6:,.1f} MB; a run keeps two",
            f"an epoch here          {format_duration(epoch_s)}, {images_per_s:.0f} images/s on {trainer.device.type}",
            f"{config.epochs} epochs of training  {format_duration(work_after(config, config.epochs) * epoch_s)}",
        )
    )


def find_images(config: TrainConfig) -> LabelledImages:
    """Read the training images where the run would read files, else make as many, of noise, of as many classes."""
    info = DATASETS[config.dataset]
    if config.data_dir is not None or not info.num_train_images:
        check_dataset(config.dataset, config.data_dir, config.image_size)
        return load_images(config.dataset, config.data_dir, "train", config.image_size)
    shape = (info.num_train_images, config.image_size, config.image_size, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return LabelledImages(noise, np.arange(info.num_train_images) % info.num_classes)


def table_of_parts(config: TrainConfig, num_classes: int = 0) -> str:
    """Write a row for each stage and each classifier; its cost is that of a network that ends there.

    The cost is in multiply-adds of one image, as a share of those of the plain deepest network.
    """
    model = build_model(config.with_settings(loss_form="reference"), num_classes)
    costs = measure_costs(model, config.image_size)
    side = config.image_size / (4 if config.has_imagenet_stem else 1)
    rows = []
    for i, stage in enumerate(model.trunk.stages()):
        stem = num_parameters(model.trunk.conv1) + num_parameters(model.trunk.bn1) if i == 0 else 0
        shape = f"{model.trunk.stage_channels[i]} x {math.ceil(side / 2**i)} x {math.ceil(side / 2**i)}"
        size = f"{num_parameters(stage) + stem:,}"
        rows.append((f"stage {i + 1}", shape, size, f"{costs.stages[i] / 1e6:,.2f}", ""))
        last = i == len(costs.stages) - 1
        if last or config.num_classifiers > 1:
            classifier = model.trunk.fc if last else model.branches[i]
            name, size = CLASSIFIERS[str(i + 1)], f"{num_parameters(classifier):,}"
            millions = f"{costs.classifiers[i] / 1e6:,.2f}"
            rows.append((f"exit {name}", str(model.trunk.fc.out_features), size, millions, f"{costs.alone()[i]:.3f}"))
    return text_table(("part", "output", "parameters", "million multiply-adds", "cost"), rows, num_text=2)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def time_steps(trainer: Trainer) -> float:
    """Train for some seconds and return the images a second, without the first steps."""
    steps, started = -WARMUP_STEPS[trainer.device.type], 0.0

    def on_batch(done: int, images: int) -> None:
        nonlocal steps, started
        steps += 1
        if steps == 0:
            finish(trainer)
            started = time.perf_counter()
        elif steps > 0 and time.perf_counter() - started > MEASURED_S:
            raise EnoughError

    try:
        list(trainer.epochs(on_batch))
    except EnoughError:
        finish(trainer)
    num_images = len(trainer.train_images)
    images_a_step = num_images / batches_per_epoch(num_images, trainer.config.batch_size)
    return steps * images_a_step / (time.perf_counter() - started)


def finish(trainer: Trainer) -> None:
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
