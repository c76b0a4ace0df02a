"""One training step, in the quickest way that its device and the work ahead allow.

eager     operation by operation; the only way on a CPU unless told otherwise, and the same to the last bit every time
graph     the whole step recorded once as a CUDA graph and replayed: no launches, no Python
compile   the network and the loss compiled by torch.compile, and on CUDA the whole recorded as a graph

On CUDA `auto` begins eagerly, records a graph, and compiles where the steps to come are expected to win back what
compiling costs. Each way's steps are timed as they train, and the quickest goes on.
"""

import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from byot.batches import Batch, augment, constants
from byot.config import Acceleration, TrainConfig
from byot.data import Normalisation
from byot.distributed import ALONE, Processes
from byot.loss import LossTerms, self_distillation_loss
from byot.metrics import TrainingSums
from byot.model import BranchOutputs

WARMUP_STEPS = 10  # of each way, not timed: libraries choose their algorithms in them
TIMED_STEPS = 20
# Of compiling, as long as nothing has been measured here: seconds, and the share of a step's time that it saves.
# Not measured on a GPU yet; compiling ResNet18 took 70 to 150 s on two CPU cores.
EXPECTED_COMPILE_S = 90.0
EXPECTED_SAVING = 0.2

RunStep = Callable[[Batch], None]


class Pace(NamedTuple):
    """What one way of doing a step was measured to take."""

    way: str
    step_s: float
    prepared_s: float  # compiling, recording and what libraries do at first


class TrainingStep:
    """Does steps. Which way is taken never shows in the weights beyond rounding, and shows in `paces`."""

    def __init__(
        self,
        config: TrainConfig,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        sums: TrainingSums,
        normalisation: Normalisation,
        *,
        autocast_dtype: torch.dtype | None,
        label_smoothing: float,
        processes: Processes = ALONE,
        settled: str | None = None,
        may_compile: bool = True,
    ) -> None:
        """`settled` is the way that was chosen before the run was interrupted: it goes on so, to the last bit.

        Without `may_compile` nothing is compiled unless the configuration asks for it.
        """
        self.config, self.network, self.optimizer, self.sums = config, network, optimizer, sums
        self.device = next(network.parameters()).device
        self.autocast_dtype, self.label_smoothing, self.processes = autocast_dtype, label_smoothing, processes
        self._mean, self._std = constants(normalisation, self.device)
        self._weight = 1.0  # of this process's part in the loss of the whole batch
        self.paces: list[Pace] = []
        self._ways = ways_to_try(config.acceleration, self.device, processes)
        if config.acceleration == "auto" and not may_compile:
            self._ways = [way for way in self._ways if way != "compile"]
        if settled in self._ways:
            self._ways = [settled]
        self.chosen = settled if settled in self._ways else None  # once the ways have been timed
        self._run: RunStep = self._eager
        self._steps = 0  # of the way that is being timed
        self._warmup_s = self._timed_s = 0.0  # in them
        self._quickest: tuple[Pace, RunStep] | None = None
        lr = torch.tensor(config.lr, device=self.device) if self.device.type == "cuda" else config.lr
        for group in optimizer.param_groups:
            group["lr"] = lr  # on CUDA a tensor: a graph reads it anew each time

    def __call__(self, batch: Batch, lr: float, *, num_images: int, steps_left: int) -> None:
        """Train on a batch. `num_images` counts it over all processes; `steps_left` of the run, this one included."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if self.processes.count > 1:
            self._weight = len(batch.labels) * self.processes.count / num_images
        if num_images < self.config.batch_size:  # the epoch's last: another shape
            self._eager(batch)
        else:
            self._settled_or_timed(batch, steps_left)
        self.sums.num_images += num_images

    # ------------------------------------------------------------ choosing

    @property
    def is_choosing(self) -> bool:
        return bool(self._ways)

    def _settled_or_timed(self, batch: Batch, steps_left: int) -> None:
        """Do a step; as long as there are ways to be timed, as one of them, and settle for the quickest at the end.

        A way that fails, as for want of memory or of a compiler, is left out where there are others.
        """
        if not self._ways:
            self._run(batch)
            return
        way = self._ways[0]
        started = self._now()
        try:
            if self._steps == 0:
                self._run = self._prepare(way, batch)
            self._run(batch)
        except Exception as error:
            if self.config.acceleration != "auto" or way == "eager":
                raise
            warnings.warn(f"the step cannot be done as {way} here ({error}); it goes on otherwise", stacklevel=2)
            self.optimizer.zero_grad(set_to_none=True)
            self._next_way(steps_left)
            self._eager(batch)
            return
        took_s = self._now() - started  # of the step alone: what happens between two steps is no way's doing
        self._steps += 1
        if self._steps <= WARMUP_STEPS:
            self._warmup_s += took_s
        else:
            self._timed_s += took_s
        if self._steps == WARMUP_STEPS + TIMED_STEPS:
            step_s = self._timed_s / TIMED_STEPS
            self.paces.append(Pace(way, step_s, max(0.0, self._warmup_s - WARMUP_STEPS * step_s)))
            if self._quickest is None or step_s < self._quickest[0].step_s:
                self._quickest = self.paces[-1], self._run
            self._next_way(steps_left)

    def _next_way(self, steps_left: int) -> None:
        self._ways.pop(0)
        self._steps, self._warmup_s, self._timed_s = 0, 0.0, 0.0
        if self._ways == ["compile"] and not self._worth_compiling(steps_left):
            self._ways.clear()
        pace, self._run = self._quickest or (None, self._eager)  # one that lost gives its memory back
        if not self._ways:
            self.chosen = "eager" if pace is None else pace.way

    def _worth_compiling(self, steps_left: int) -> bool:
        saved_s = EXPECTED_SAVING * min(pace.step_s for pace in self.paces) * steps_left
        return saved_s > EXPECTED_COMPILE_S

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    # ------------------------------------------------------------ the ways

    def _prepare(self, way: str, batch: Batch) -> RunStep:
        if way == "eager":
            return self._eager
        if way == "graph":
            return RecordedStep(self._eager, batch)
        compiled_loss = torch.compile(self._loss, dynamic=False)

        def step(batch: Batch) -> None:
            self._descend(batch, compiled_loss)

        record = self.device.type == "cuda" and self.processes.count == 1
        return RecordedStep(step, batch) if record else step

    def _eager(self, batch: Batch) -> None:
        self._descend(batch, self._loss)

    def _descend(self, batch: Batch, loss: Callable[[Batch], tuple[LossTerms, BranchOutputs]]) -> None:
        terms, outputs = loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        (terms.total if self.processes.count == 1 else terms.total * self._weight).backward()
        self.optimizer.step()
        self.sums.add(terms, outputs.logits, batch.labels)

    def _loss(self, batch: Batch) -> tuple[LossTerms, BranchOutputs]:
        config = self.config
        images = augment(batch, config, self._mean, self._std)
        with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            outputs = self.network(images)
        terms = self_distillation_loss(
            outputs,
            batch.labels,
            alpha=config.alpha,
            temperature=config.temperature,
            beta=config.beta,
            loss_form=config.loss_form,
            label_smoothing=self.label_smoothing,
        )
        return terms, outputs


class RecordedStep:
    """A step recorded as a CUDA graph. The first calls run it as it is, on a stream of their own, to warm up."""

    def __init__(self, run: RunStep, batch: Batch) -> None:
        self._run, self._calls = run, 0
        self._batch = Batch(*(None if part is None else part.clone() for part in batch))  # type: ignore[arg-type]
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch) -> None:
        for static, part in zip(self._batch, batch, strict=True):
            if static is not None and part is not None:
                static.copy_(part)
        self._calls += 1
        if self._calls <= WARMUP_STEPS // 2:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._run(self._batch)
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # other threads may pin memory meanwhile, as those do that stream images
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                self._run(self._batch)  # recorded, not done
        self._graph.replay()


def ways_to_try(acceleration: Acceleration, device: torch.device, processes: Processes) -> list[str]:
    """The ways of doing a step in the order they are tried; none where there is nothing to choose.

    Raises ValueError for one that is not to be had.
    """
    if acceleration == "graph" and device.type != "cuda":
        raise ValueError(f"acceleration graph needs a CUDA device, not {device.type}: 'none' or 'compile' work there")
    if acceleration == "graph" and processes.count > 1:
        raise ValueError("acceleration graph is for one process: 'none' or 'compile' work with several")
    if acceleration == "auto":
        return ["eager", "graph", "compile"] if device.type == "cuda" and processes.count == 1 else []
    return [] if acceleration == "none" else [acceleration]
