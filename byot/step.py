"""One training step, from a batch to new weights.

eager     operation by operation; on a CPU the same to the last bit every time
graph     the whole step recorded as a CUDA graph and replayed: no launches, no Python; one graph for each resolution
compile   the network and the loss compiled by torch.compile, and on one CUDA device the whole recorded as a graph

`auto` records a graph on one CUDA device and is eager elsewhere.
"""

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from byot.batches import Batch, augment, constants
from byot.config import Acceleration, TrainConfig
from byot.data import Normalisation
from byot.loss import LossTerms, self_distillation_loss
from byot.metrics import TrainingSums
from byot.model import BranchOutputs
from byot.system.distributed import ALONE, Processes

Mode = Literal["eager", "graph", "compile"]
WARMUP_STEPS = 5  # before a step is recorded: libraries choose their algorithms in them


class TrainingStep:
    """Does steps. The mode never shows in the weights beyond rounding."""

    def __init__(
        self,
        config: TrainConfig,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        sums: TrainingSums,
        normalisation: Normalisation,
        *,
        autocast_dtype: torch.dtype | None,
        processes: Processes = ALONE,
    ) -> None:
        self.config, self.network, self.optimizer, self.sums = config, network, optimizer, sums
        self.device = next(network.parameters()).device
        self.autocast_dtype, self.processes = autocast_dtype, processes
        self._mean, self._std = constants(normalisation, self.device)
        self._weight = 1.0  # of this process's part in the loss of the whole batch
        mode = choose_mode(config.acceleration, self.device, processes)
        self._loss = torch.compile(self.loss, dynamic=False) if mode == "compile" else self.loss
        self._records = mode == "graph" or (mode == "compile" and self.device.type == "cuda" and processes.count == 1)
        self._recorded: tuple[int, RecordedStep] | None = None  # with its resolution
        lr = torch.tensor(config.lr, device=self.device) if self._records else config.lr
        for group in optimizer.param_groups:
            group["lr"] = lr  # a recorded step reads the tensor anew each time

    def __call__(self, batch: Batch, lr: float, size: int, *, num_images: int) -> None:
        """Train on a batch with images of `size` pixels a side. `num_images` counts it over all processes."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if self.processes.count > 1:
            self._weight = len(batch.labels) * self.processes.count / num_images
        if self._records and num_images == self.config.batch_size:
            self._recorded_step(batch, size)
        else:  # also the epoch's last batch, of another shape
            self.train_step(batch, size)
        self.sums.num_images += num_images

    def train_step(self, batch: Batch, size: int) -> None:
        terms, outputs = self._loss(batch, size)
        self.optimizer.zero_grad(set_to_none=True)
        (terms.total if self.processes.count == 1 else terms.total * self._weight).backward()
        self.optimizer.step()
        self.sums.add(terms, outputs.logits, batch.labels)

    def loss(self, batch: Batch, size: int) -> tuple[LossTerms, BranchOutputs]:
        config = self.config
        images = augment(batch, config, self._mean, self._std, size)
        with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            outputs = self.network(images)
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

    def _recorded_step(self, batch: Batch, size: int) -> None:
        """Replay the graph of this resolution, in whose place the next one's comes.

        Where it cannot be recorded, and the configuration leaves it open, steps are eager from then on.
        """
        if self._recorded is None or self._recorded[0] != size:
            self._recorded = None  # gives its memory back before the next one is recorded
            self._recorded = size, RecordedStep(lambda batch: self.train_step(batch, size), batch)
        try:
            self._recorded[1](batch)
        except RecordingError as error:
            if self.config.acceleration != "auto":
                raise
            warnings.warn(f"{error}: training goes on without a graph, more slowly", stacklevel=2)
            self._records, self._recorded = False, None
            self.train_step(batch, size)


class RecordingError(RuntimeError):
    """A step could not be recorded; nothing of it was done."""


class RecordedStep:
    """A step recorded as a CUDA graph. The first calls run it as it is, on a stream of their own, to warm up."""

    def __init__(self, run: Callable[[Batch], None], batch: Batch) -> None:
        self._run, self._calls = run, 0
        self._batch = Batch(*(None if part is None else part.clone() for part in batch))  # type: ignore[arg-type]
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch) -> None:
        for static, part in zip(self._batch, batch, strict=True):
            if static is not None and part is not None:
                static.copy_(part)
        self._calls += 1
        if self._calls <= WARMUP_STEPS:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._run(self._batch)
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may pin memory meanwhile, as those do that stream images
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._run(self._batch)  # recorded, not done
        except Exception as error:
            raise RecordingError(f"the step cannot be recorded as a CUDA graph here ({error})") from error
        return graph


def choose_mode(acceleration: Acceleration, device: torch.device, processes: Processes) -> Mode:
    """How steps are done. Raises ValueError for what is not to be had."""
    if acceleration == "graph" and device.type != "cuda":
        raise ValueError(f"acceleration graph needs a CUDA device, not {device.type}: 'none' or 'compile' work there")
    if acceleration == "graph" and processes.count > 1:
        raise ValueError("acceleration graph is for one process: 'none' or 'compile' work with several")
    if acceleration == "auto":
        return "graph" if device.type == "cuda" and processes.count == 1 else "eager"
    return "eager" if acceleration == "none" else acceleration
