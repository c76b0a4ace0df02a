"""The training loop: an iterator of epochs whose whole state can be saved and restored.

Everything random in a run comes from its seed, and everything that changes from epoch to epoch (data order,
augmentation, learning rate) from the epoch's number. So the state is the weights, the optimiser's buffers, the epoch,
the step within it and the figures measured so far; there is no random generator to save.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from byot.batches import ImageSource, batches_per_epoch, draw_epoch, in_order, place_images, shuffled
from byot.config import DATASETS, TrainConfig, learning_rate, resolution
from byot.data import LabelledImages, Normalisation, find_normalisation
from byot.metrics import EpochMetrics, Evaluation, TrainingSums, evaluate
from byot.model import BranchedResNet
from byot.optimizer import make_optimizer
from byot.step import TrainingStep, choose_mode
from byot.system.checkpoint import is_out_of_memory
from byot.system.distributed import ALONE, Processes, synchronise_batch_norms
from byot.system.provenance import find_versions
from byot.system.stopping import DivergedError, OutOfMemoryError

EVAL_BATCH_SIZE = {"cpu": 256, "mps": 512, "cuda": 2048}
STEPS_BETWEEN_CHECKS = {"cpu": 1, "mps": 50, "cuda": 50}  # of the loss; on a GPU each one waits for it

OnBatch = Callable[[int, int], None]  # (images done in this epoch, images in it)


class Trainer:
    """Trains one network; iterating yields one EpochMetrics an epoch until the configured number is reached."""

    def __init__(
        self,
        config: TrainConfig,
        train: LabelledImages,
        val: LabelledImages | None = None,
        normalisation: Normalisation | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """`normalisation` is that of a checkpoint to be restored; a new run finds its own in the training images."""
        if len(train.labels) < 2:
            raise ValueError(f"training needs at least 2 images, not {len(train.labels)}")
        check_parts(config, len(train.labels), processes)
        self.config = config
        self.processes = processes
        self.device = choose_device(config.device)
        self.autocast_dtype = choose_autocast_dtype(config.precision, self.device)
        choose_mode(config.acceleration, self.device, processes)  # told now if it is not to be had
        self.normalisation = normalisation or find_normalisation(config, train.images)
        self.train_images = place_images(train, self.device, config.placement)
        self.val_images = None if val is None else place_images(val, self.device, config.placement)
        self.model = build_model(config).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if processes.count > 1 and config.batch_norm == "global":
            synchronise_batch_norms(self.model, self.device)
        self.optimizer = make_optimizer(self.model, config, self.autocast_dtype)
        self.epoch = 0  # epochs finished
        self.step = 0  # steps done of the next one
        self.history: list[dict[str, Any]] = []  # the record of each finished epoch
        self._sums = TrainingSums(config.num_classifiers, config.num_students, self.device, processes)
        self._elapsed_s = 0.0  # in the steps done, by this process and those before
        self._versions = find_versions()
        self._training_step: TrainingStep | None = None  # made once the state is the one to go on from

    def __iter__(self) -> Iterator[EpochMetrics]:
        return self.epochs()

    def epochs(self, on_batch: OnBatch | None = None) -> Iterator[EpochMetrics]:
        """Go on from the epochs and steps already done.

        `on_batch` is called after each step, when the state may be saved. Raises DivergedError where the loss is no
        longer finite and OutOfMemoryError where the device's memory does not suffice.
        """
        while self.epoch < self.config.epochs:
            with explain_out_of_memory(self.config):
                metrics = self._run_epoch(on_batch)
            yield metrics

    def _run_epoch(self, on_batch: OnBatch | None) -> EpochMetrics:
        started = time.perf_counter() - self._elapsed_s
        config, images, sums = self.config, self.train_images, self._sums
        plan = draw_epoch(config, len(images), self.epoch)
        num_batches = batches_per_epoch(len(images), config.batch_size)
        training_step = self._training_step = self._training_step or self._make_training_step()
        self.model.train()
        for batch in shuffled(images, plan, config.batch_size, first=self.step, processes=self.processes):
            progress = (self.epoch + self.step / num_batches) / config.epochs
            num_images = min(config.batch_size, len(images) - self.step * config.batch_size)
            training_step(batch, learning_rate(config, progress), resolution(config, progress), num_images=num_images)
            self.step += 1
            self._elapsed_s = time.perf_counter() - started
            if self.due_for_check():
                self.check_finite(sums.read_loss())
            if on_batch is not None:
                on_batch(min(self.step * config.batch_size, len(images)), len(images))
        (loss,), label, distillation, hint, accuracy = sums.read()
        trained_s = time.perf_counter() - started
        self.check_finite(loss)
        val = None if self.val_images is None else self.evaluate(self.val_images)
        if val is not None:
            self.check_finite(sum(val.nll))  # what the epoch's last step did, no training loss has seen
        self.epoch += 1
        self.step, self._elapsed_s = 0, 0.0
        sums.reset()
        metrics = EpochMetrics(
            epoch=self.epoch,
            lr=learning_rate(config, (self.epoch - 1 / num_batches) / config.epochs),  # the last step's
            loss=loss,
            label=label,
            distillation=distillation,
            hint=hint,
            accuracy=accuracy,
            val=val,
            elapsed_s=time.perf_counter() - started,
            images_per_s=len(images) / trained_s,
        )
        self.history.append(metrics.to_record())
        return metrics

    def _make_training_step(self) -> TrainingStep:
        network: torch.nn.Module = self.model
        if self.processes.count > 1:
            network = torch.nn.parallel.DistributedDataParallel(self.model)
        return TrainingStep(
            self.config,
            network,
            self.optimizer,
            self._sums,
            self.normalisation,
            autocast_dtype=self.autocast_dtype,
            processes=self.processes,
        )

    def due_for_check(self) -> bool:
        """Whether, after this step, the processes look up: at the loss, and whether one was asked to stop."""
        num_batches = batches_per_epoch(len(self.train_images), self.config.batch_size)
        return (self.epoch * num_batches + self.step) % STEPS_BETWEEN_CHECKS[self.device.type] == 0

    def check_finite(self, loss: float) -> None:
        """Raise DivergedError for a loss that is NaN or infinite."""
        if not math.isfinite(loss):
            epoch = min(self.epoch + 1, self.config.epochs)
            raise DivergedError(f"the loss became {loss} in epoch {epoch}: a smaller lr or beta would help")

    def evaluate(self, images: ImageSource) -> Evaluation:
        self.processes.share_buffers(self.model)
        batches = in_order(images, EVAL_BATCH_SIZE[self.device.type], self.normalisation, self.processes)
        return evaluate(self.model, batches, autocast_dtype=self.autocast_dtype, processes=self.processes)

    def evaluate_on(self, data: LabelledImages) -> Evaluation:
        """Evaluate on images that were not given at the start, such as the test set."""
        return self.evaluate(place_images(data, self.device, self.config.placement))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on as if nothing had happened, as plain data. All processes ask for it together."""
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"])
        return {
            "config": self.config.to_dict(),
            "num_train_images": len(self.train_images),
            "versions": self._versions,
            "epoch": self.epoch,
            "step": self.step,
            "sums": self._sums.state_dict(),
            "elapsed_s": self._elapsed_s,
            "history": self.history,
            "normalisation": self.normalisation._asdict(),
            "model": self.model.state_dict(),
            "optimizer": optimizer,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state. Raises ValueError, naming what differs, if it belongs to another run."""
        check_same_run(self.config, TrainConfig.from_dict(state["config"]))
        if state["num_train_images"] != len(self.train_images):
            raise ValueError(
                f"the run was started with {state['num_train_images']} training images, the data set has "
                f"{len(self.train_images)} now; give the --data-dir it was started with or another --name"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step, self.history = state["epoch"], state["step"], list(state["history"])
        self._sums.load_state_dict(state["sums"])
        self._elapsed_s = state["elapsed_s"]
        self._training_step = None  # a recorded step has the old buffers


def check_parts(config: TrainConfig, num_images: int, processes: Processes) -> None:
    """Raise ValueError if some batch is too small for each process to have a part of it."""
    least = processes.count * (2 if config.batch_norm == "local" else 1)
    smallest = num_images % config.batch_size
    smallest = config.batch_size if smallest < 2 else smallest
    if processes.count > 1 and smallest < least:
        raise ValueError(
            f"{processes.count} processes cannot share a batch of {smallest} images, as the last one of an epoch with "
            f"batch_size {config.batch_size} is: another batch_size or fewer processes would do"
        )


def check_same_run(asked: TrainConfig, found: TrainConfig) -> None:
    """Raise ValueError where two configurations differ in anything but the place of the data and the device."""
    differences = asked.differing_settings(found)
    if differences:
        listed = ", ".join(f"{name} {theirs} (asked for: {mine})" for name, (mine, theirs) in differences.items())
        raise ValueError(f"the run was started with {listed}; give the same settings or another --name")


@contextmanager
def explain_out_of_memory(config: TrainConfig) -> Iterator[None]:
    """Turn the ways in which torch and Python run out of memory into an OutOfMemoryError that says what would help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"out of memory with batch_size {config.batch_size} and width {config.width}: a smaller --batch-size or "
            "--width would help, or fewer trials or runs at once"
        ) from error


def build_model(config: TrainConfig) -> BranchedResNet:
    """The network of a configuration with the initial weights of its seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return BranchedResNet(
            config.model,
            DATASETS[config.dataset].num_classes,
            config.width,
            branched=config.num_classifiers > 1,
        )


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU. Raises ValueError for one that is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(n for n, there in available.items() if there)
    if not available[name]:
        raise ValueError(f"device {name} is not available here; {', '.join(n for n, a in available.items() if a)} is")
    return torch.device(name)


def choose_autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 for autocast, or None for float32; `auto` takes bfloat16 where the hardware computes in it."""
    if precision == "auto":
        native = {
            "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
            "cpu": lambda: any(torch.cpu.get_capabilities().get(k) for k in ("avx512_bf16", "amx_bf16")),
            "mps": lambda: False,
        }
        precision = "bf16" if native[device.type]() else "fp32"
    return torch.bfloat16 if precision == "bf16" else None
