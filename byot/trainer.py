"""The training loop: an iterator of epochs whose whole state can be saved and restored.

All that is random in a run is drawn from its seed, and all that changes from epoch to epoch (data order, augmentation,
learning rate) from the epoch's number. So the state is the weights, the optimizer's momentum, the epoch, the step
within it and the figures measured so far; there is no random generator to save.

How steps are done never shows in the weights beyond rounding:

none      operation by operation; on a CPU the same to the last bit every time
graph     the whole step recorded as a CUDA graph and replayed; one graph for each resolution
compile   the network and the loss compiled by torch.compile; on one CUDA device the step is then recorded as well
auto      graph on one CUDA device, none elsewhere
"""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from byot.batches import (
    Batch,
    ImageSource,
    augment,
    batches_per_epoch,
    draw_epoch,
    in_order,
    mean_and_std,
    place_images,
    shuffled,
)
from byot.config import DATASETS, Acceleration, TrainConfig, learning_rate, resolution
from byot.data import LabelledImages, Normalisation, find_normalisation, fingerprint
from byot.exits import measure_costs
from byot.loss import LossTerms, self_distillation_loss
from byot.metrics import EpochMetrics, Evaluation, TrainingSums, evaluate
from byot.model import BranchedResNet, BranchOutputs
from byot.optimizer import make_optimizer
from byot.system.checkpoint import is_out_of_memory
from byot.system.cuda_graph import RecordedFunction, RecordingError
from byot.system.distributed import ALONE, Processes, synchronise_batch_norms
from byot.system.memory import keep_freed_memory
from byot.system.stopping import DivergedError, OutOfMemoryError

EVAL_BATCH_SIZE = {"cpu": 256, "mps": 512, "cuda": 2048}
STEPS_BETWEEN_CHECKS = {"cpu": 1, "mps": 50, "cuda": 50}  # of the loss; on a GPU each one waits for it

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

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
        check_shards(config, len(train.labels), processes)
        self.config = config
        self.processes = processes
        self.device = choose_device(config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.autocast_dtype = choose_autocast_dtype(config.precision, self.device)
        self._records = records_graphs(config.acceleration, self.device, processes)
        self.normalisation = normalisation or find_normalisation(config, train.images)
        self.train_images = place_images(train, self.device, config.placement)
        self.val_images = None if val is None else place_images(val, self.device, config.placement)
        self.class_names = train.class_names
        self._fingerprint = fingerprint(train) if self.class_names else None
        self.model = build_model(config, len(self.class_names)).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._exit_costs = measure_costs(self.model, train.images.shape[1]) if config.num_classifiers > 1 else None
        if processes.count > 1 and config.batch_norm == "global":
            synchronise_batch_norms(self.model, self.device)
        self.optimizer = make_optimizer(self.model, config, self.autocast_dtype)
        self.epoch = 0  # epochs finished
        self.step = 0  # steps done of the next one
        self.history: list[dict[str, Any]] = []  # the record of each finished epoch
        self._sums = TrainingSums(config.num_classifiers, config.num_students, self.device, processes)
        self._elapsed_s = 0.0  # in the steps done, by this process and those before
        self._network: nn.Module = self.model  # what the step calls: the model, or what shares it among processes
        self._mean_and_std = mean_and_std(self.normalisation, self.device)
        self._loss = torch.compile(compute_loss, dynamic=False) if config.acceleration == "compile" else compute_loss
        self._recorded: tuple[int, RecordedFunction] | None = None  # the resolution and the step at it

    def __iter__(self) -> Iterator[EpochMetrics]:
        return self.epochs()

    def epochs(self, on_batch: OnBatch | None = None) -> Iterator[EpochMetrics]:
        """Go on from the epochs and steps already done.

        `on_batch` is called after each step, when the state may be saved. Raises DivergedError where the loss is no
        longer finite and OutOfMemoryError where the device's memory does not suffice.
        """
        while self.epoch < self.config.epochs:
            with explain_out_of_memory(self.config):
                if self.processes.count > 1 and self._network is self.model:  # by now all have the same weights
                    self._network = nn.parallel.DistributedDataParallel(self.model)
                metrics = self._run_epoch(on_batch)
            yield metrics

    def _run_epoch(self, on_batch: OnBatch | None) -> EpochMetrics:
        started = time.perf_counter() - self._elapsed_s
        config, images, sums = self.config, self.train_images, self._sums
        plan = draw_epoch(config, len(images), self.epoch)
        num_batches = batches_per_epoch(len(images), config.batch_size)
        self.model.train()
        for batch in shuffled(images, plan, config.batch_size, first=self.step, processes=self.processes):
            progress = (self.epoch + self.step / num_batches) / config.epochs
            num_images = min(config.batch_size, len(images) - self.step * config.batch_size)
            self.optimizer.lr.fill_(learning_rate(config, progress))
            if self._records and num_images == config.batch_size:
                self._replay_step(batch, resolution(config, progress))
            else:  # also the epoch's last batch, of another shape
                self.train_step(batch, resolution(config, progress), num_images)
            sums.num_images += num_images
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

    def train_step(self, batch: Batch, size: int, num_images: int) -> None:
        """Go from a batch to new weights: with images of `size` pixels a side, `num_images` over all processes."""
        self.optimizer.zero_grad()
        terms, outputs = self._loss(self._network, batch, size, self.config, self._mean_and_std, self.autocast_dtype)
        share = len(batch.labels) * self.processes.count / num_images  # gradients are averaged over the processes
        (terms.total * share).backward()
        self.optimizer.step()
        self._sums.add(terms, outputs.logits, batch.labels)

    def _replay_step(self, batch: Batch, size: int) -> None:
        """Do the step of a whole batch by the graph of its resolution, which takes the place of the one before.

        With acceleration auto, a step that cannot be recorded is done without a graph, and so are all later ones.
        """

        def step(batch: Batch) -> None:
            self.train_step(batch, size, self.config.batch_size)

        if self._recorded is None or self._recorded[0] != size:
            self._recorded = None  # gives its memory back before the next one is recorded
            self._recorded = size, RecordedFunction(step, batch)
        try:
            self._recorded[1](batch)
            return
        except RecordingError as error:
            if self.config.acceleration != "auto":
                raise
            warnings.warn(f"{error}: training goes on without a graph, more slowly", stacklevel=2)
        self._records, self._recorded = False, None
        step(batch)

    def due_for_check(self) -> bool:
        """Tell whether after this step the processes look at the loss, and whether one was asked to stop."""
        num_batches = batches_per_epoch(len(self.train_images), self.config.batch_size)
        return (self.epoch * num_batches + self.step) % STEPS_BETWEEN_CHECKS[self.device.type] == 0

    def check_finite(self, loss: float) -> None:
        """Raise DivergedError for a loss that is NaN or infinite."""
        if not math.isfinite(loss):
            epoch = min(self.epoch + 1, self.config.epochs)
            raise DivergedError(f"the loss became {loss} in epoch {epoch}: a smaller lr or beta would help")

    def evaluate(self, images: ImageSource) -> Evaluation:
        self.processes.broadcast_buffers(self.model)
        batches = in_order(images, EVAL_BATCH_SIZE[self.device.type], self.normalisation, self.processes)
        return evaluate(
            self.model,
            batches,
            autocast_dtype=self.autocast_dtype,
            costs=self._exit_costs,
            processes=self.processes,
        )

    def evaluate_on(self, data: LabelledImages) -> Evaluation:
        """Evaluate on images that were not given at the start, such as the test set."""
        return self.evaluate(place_images(data, self.device, self.config.placement))

    def state_dict(self) -> dict[str, Any]:
        """Give all that is needed to go on exactly from here, as plain data. All processes call it together."""
        return {
            "config": self.config.to_dict(),
            "class_names": list(self.class_names),
            "fingerprint": self._fingerprint,
            "num_train_images": len(self.train_images),
            "epoch": self.epoch,
            "step": self.step,
            "sums": self._sums.state_dict(),
            "elapsed_s": self._elapsed_s,
            "history": self.history,
            "normalisation": self.normalisation._asdict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state. Raises ValueError if it was trained on other images or classes."""
        go_on = "give the --data-dir it was started with or another --name"
        if state.get("class_names", []) != list(self.class_names):
            raise ValueError(f"the run was started with other classes than the data set has now; {go_on}")
        if state["num_train_images"] != len(self.train_images):
            raise ValueError(
                f"the run was started with {state['num_train_images']} training images, the data set has "
                f"{len(self.train_images)} now; {go_on}"
            )
        if state.get("fingerprint") != self._fingerprint:
            raise ValueError(f"the run was started with other training images than the data set has now; {go_on}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step, self.history = state["epoch"], state["step"], list(state["history"])
        self._sums.load_state_dict(state["sums"])
        self._elapsed_s = state["elapsed_s"]
        self._recorded = None  # it has the old momentum


def compute_loss(
    network: nn.Module,
    batch: Batch,
    size: int,
    config: TrainConfig,
    mean_and_std: tuple[Tensor, Tensor],
    autocast_dtype: torch.dtype | None,
) -> tuple[LossTerms, BranchOutputs]:
    """Augment a batch, at `size` pixels a side, and compare what the network says of it with its labels."""
    images = augment(batch, config, *mean_and_std, size)
    with torch.autocast(images.device.type, autocast_dtype, enabled=autocast_dtype is not None):
        outputs = network(images)
    terms = self_distillation_loss(
        outputs,
        batch.labels,
        alpha=config.alpha,
        temperature=config.temperature,
        beta=config.beta,
        loss_form=config.loss_form,
        label_smoothing=config.label_smoothing,
        teacher=config.teacher,
    )
    return terms, outputs


def check_shards(config: TrainConfig, num_images: int, processes: Processes) -> None:
    """Raise ValueError if some batch is too small for each process to have a shard of it."""
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
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, Exception) and is_out_of_memory(cause)):
            cause = cause.__cause__ or cause.__context__  # a RecordingError's, say
        if cause is None:
            raise
        raise OutOfMemoryError(
            f"out of memory with batch_size {config.batch_size} and width {config.width}: a smaller --batch-size or "
            "--width would help, or fewer trials or runs at once"
        ) from error


def build_model(config: TrainConfig, num_classes: int = 0) -> BranchedResNet:
    """Build a configuration's network with the initial weights of its seed; the global generator stays as it was.

    `num_classes` is that of an imagefolder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return BranchedResNet(
            config.model,
            num_classes or DATASETS[config.dataset].num_classes,
            config.width,
            branch=config.branch if config.num_classifiers > 1 else None,
            imagenet_stem=config.has_imagenet_stem,
        )


def records_graphs(acceleration: Acceleration, device: torch.device, processes: Processes) -> bool:
    """Tell whether steps are recorded as CUDA graphs. Raises ValueError where one is asked for and cannot be."""
    if acceleration == "graph" and device.type != "cuda":
        raise ValueError(f"acceleration graph needs a CUDA device, not {device.type}: 'none' or 'compile' work there")
    if acceleration == "graph" and processes.count > 1:
        raise ValueError("acceleration graph is for one process: 'none' or 'compile' work with several")
    return acceleration != "none" and device.type == "cuda" and processes.count == 1


def choose_device(name: str) -> torch.device:
    """Find the device: `auto` takes CUDA, then MPS, then the CPU. Raises ValueError for one that is not there.

    Also for `auto` where there is a GPU that this PyTorch cannot use: on the CPU a run of hours would take weeks.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if NVIDIA_DRIVER.exists() and not available["cuda"] and not is_hidden:
            raise ValueError(
                f"there is an NVIDIA driver here and PyTorch {torch.__version__} cannot use it: a newer driver or "
                "another build of PyTorch would help; --device cpu goes on without"
            )
        name = next(n for n, there in available.items() if there)
    if not available[name]:
        raise ValueError(f"device {name} is not available here; {', '.join(n for n, a in available.items() if a)} is")
    return torch.device(name)


def choose_autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Give bfloat16, or None for float32; `auto` takes bfloat16 where the hardware computes in it."""
    if precision == "auto":
        native = {
            "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
            "cpu": lambda: any(torch.cpu.get_capabilities().get(k) for k in ("avx512_bf16", "amx_bf16")),
            "mps": lambda: False,
        }
        precision = "bf16" if native[device.type]() else "fp32"
    return torch.bfloat16 if precision == "bf16" else None
