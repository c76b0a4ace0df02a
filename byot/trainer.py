"""The training loop: an iterator of epochs whose whole state can be saved and restored.

Everything random in a run comes from its seed, and everything that changes from epoch to epoch (data order,
augmentation, learning rate) from the epoch's number. So the state is the weights, the optimiser's buffers and a count.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from byot.config import DATASETS, NUM_CLASSIFIERS, RECIPES, TrainConfig, learning_rate
from byot.data import DeviceImages, LabelledImages, Normalisation, draw_epoch, find_normalisation
from byot.loss import self_distillation_loss
from byot.metrics import EpochMetrics, Evaluation, TrainingSums, evaluate
from byot.model import BranchedResNet

EVAL_BATCH_SIZE = {"cpu": 256, "mps": 512, "cuda": 2048}

OnBatch = Callable[[int, int], None]  # (images done in this epoch, images in it)


class DivergedError(RuntimeError):
    """The training loss became NaN or infinite; the weights are of no use any more."""


class Trainer:
    """Trains one network; iterating yields one EpochMetrics an epoch until the configured number is reached."""

    def __init__(
        self,
        config: TrainConfig,
        train: LabelledImages,
        val: LabelledImages | None = None,
        normalisation: Normalisation | None = None,
    ) -> None:
        """`normalisation` is that of a checkpoint to be restored; a new run finds its own in the training images."""
        if len(train.labels) < 2:
            raise ValueError(f"training needs at least 2 images, not {len(train.labels)}")
        self.config = config
        self.device = choose_device(config.device)
        self.autocast_dtype = choose_autocast_dtype(config.precision, self.device)
        self.normalisation = normalisation or find_normalisation(config, train.images)
        self.train_images = DeviceImages(train, self.normalisation, self.device)
        self.val_images = None if val is None else DeviceImages(val, self.normalisation, self.device)
        self.model = build_model(config).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        recipe = RECIPES[config.recipe]
        self.label_smoothing = recipe.label_smoothing
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=recipe.nesterov,
            fused=self.device.type == "cuda",
        )
        self.epoch = 0  # epochs finished

    def __iter__(self) -> Iterator[EpochMetrics]:
        return self.epochs()

    def epochs(self, on_batch: OnBatch | None = None) -> Iterator[EpochMetrics]:
        """Go on from the epochs already finished. Raises DivergedError after an epoch whose loss is not finite."""
        while self.epoch < self.config.epochs:
            yield self._run_epoch(on_batch)

    def _run_epoch(self, on_batch: OnBatch | None) -> EpochMetrics:
        started = time.perf_counter()
        config, images = self.config, self.train_images
        plan = draw_epoch(config, len(images), self.epoch)
        sums = TrainingSums(NUM_CLASSIFIERS, self.device)
        num_batches = images.batches_per_epoch(config.batch_size)
        lr = config.lr
        self.model.train()
        for i, (batch, labels) in enumerate(images.augmented(plan, config.batch_size)):
            lr = learning_rate(config, (self.epoch + i / num_batches) / config.epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                outputs = self.model(batch)
            terms = self_distillation_loss(
                outputs,
                labels,
                alpha=config.alpha,
                temperature=config.temperature,
                beta=config.beta,
                loss_form=config.loss_form,
                label_smoothing=self.label_smoothing,
            )
            self.optimizer.zero_grad(set_to_none=True)
            terms.total.backward()
            self.optimizer.step()
            sums.add(terms, outputs.logits, labels)
            if on_batch is not None:
                on_batch(min((i + 1) * config.batch_size, len(images)), len(images))
        (loss,), label, distillation, hint, accuracy = sums.read()
        trained_s = time.perf_counter() - started
        self.check_finite(loss)
        val = None if self.val_images is None else self.evaluate(self.val_images)
        if val is not None:
            self.check_finite(sum(val.nll))  # what the epoch's last step did, no training loss has seen
        self.epoch += 1
        return EpochMetrics(
            epoch=self.epoch,
            lr=lr,
            loss=loss,
            label=label,
            distillation=distillation,
            hint=hint,
            accuracy=accuracy,
            val=val,
            elapsed_s=time.perf_counter() - started,
            images_per_s=len(images) / trained_s,
        )

    def check_finite(self, loss: float) -> None:
        """Raise DivergedError for a loss that is NaN or infinite."""
        if not math.isfinite(loss):
            epoch = min(self.epoch + 1, self.config.epochs)
            raise DivergedError(f"the loss became {loss} in epoch {epoch}: a smaller lr or beta would help")

    def evaluate(self, images: DeviceImages) -> Evaluation:
        batches = images.in_order(EVAL_BATCH_SIZE[self.device.type])
        return evaluate(self.model, batches, autocast_dtype=self.autocast_dtype)

    def evaluate_on(self, data: LabelledImages) -> Evaluation:
        """Evaluate on images that were not given at the start, such as the test set."""
        return self.evaluate(DeviceImages(data, self.normalisation, self.device))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on as if nothing had happened, as plain data."""
        return {
            "config": self.config.to_dict(),
            "epoch": self.epoch,
            "normalisation": self.normalisation._asdict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state. Raises ValueError, naming the settings, if it belongs to another run."""
        check_same_run(self.config, TrainConfig.from_dict(state["config"]))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = state["epoch"]


def check_same_run(asked: TrainConfig, found: TrainConfig) -> None:
    """Raise ValueError where two configurations differ in anything but the place of the data and the device."""
    differences = asked.differing_settings(found)
    if differences:
        listed = ", ".join(f"{name} {theirs} (asked for: {mine})" for name, (mine, theirs) in differences.items())
        raise ValueError(f"the run was started with {listed}; give the same settings or another --name")


def build_model(config: TrainConfig) -> BranchedResNet:
    """The network of a configuration with the initial weights of its seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return BranchedResNet(config.model, DATASETS[config.dataset].num_classes, config.width)


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
