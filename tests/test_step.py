"""A step has one result in every mode and on every device, and a graph records all of it.

Without a GPU a CUDA graph is played: capturing notes the step's operations and undoes them, replaying does them again.
That shows that a step reads nothing on the host and keeps nothing outside of its graph. It shows nothing of streams,
memory pools or kernels.
"""

import contextlib
import copy
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from byot import trainer
from byot.config import Acceleration, Precision, TrainConfig
from byot.data import LabelledImages
from byot.metrics import EpochMetrics
from byot.system import cuda_graph
from byot.system.cuda_graph import RecordingError
from byot.system.distributed import Processes
from byot.system.stopping import OutOfMemoryError
from byot.trainer import Trainer, records_graphs
from tests.helpers import assert_same_state, few_digits, random_pixels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DIGITS = TrainConfig(dataset="digits", width=4, epochs=2, lr=1e-3, batch_size=50, device="cpu", precision="fp32")
FEW_DIGITS = DIGITS.with_settings(batch_size=10)
CIFAR = DIGITS.with_settings(dataset="cifar100", epochs=3, batch_size=4)


def random_images(number: int) -> LabelledImages:
    return LabelledImages(random_pixels(number), np.random.default_rng(0).integers(0, 100, number))


# ---------------------------------------------------------------- a graph played on a CPU

WARMUP_CALLS = 2  # of 5, to save time: nothing here chooses algorithms


class Recorder(TorchDispatchMode):
    """Notes every operation, each read on the host, and what memory held before it was written to."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []  # with arguments and results
        self.host_reads: list[str] = []
        self.before: dict[int, tuple[Any, Any]] = {}  # memory and a copy of it, by address

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if reads_on_host(function, args):
            self.host_reads.append(str(function))
        arguments = function._schema.arguments
        values = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
        for argument in arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written or argument.name in ("running_mean", "running_var"):  # which batch normalisation does not tell
                for tensor in tensors(values.get(argument.name)):
                    memory = tensor.untyped_storage()
                    self.before.setdefault(memory.data_ptr(), (memory, memory.clone()))
        result = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, result))
        return result

    def undo(self) -> None:
        for memory, held in self.before.values():
            memory.copy_(held)

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, result in self.operations:
                again = function(*args, **kwargs)
                for old, new in zip(tensors(result), tensors(again), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new.detach())

    def size(self) -> int:
        """The side in pixels of the images that the network was given."""
        return next(args[0].shape[-1] for function, args, *_ in self.operations if "convolution" in str(function))


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def reads_on_host(function: Any, args: Any) -> bool:
    """Whether the operation gives the host a number, or a tensor whose shape depends on numbers."""
    told = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags)
    if "index" in str(function):  # by a mask it asks how much of it is set
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors(args[1:2]))
    return bool(told)


class PlayedGraph:
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.num_replays = 0

    def replay(self) -> None:
        self.recorder.replay()
        self.num_replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[PlayedGraph]:
    """Every mode but 'none' plays graphs, which are in the list. With an error as parameter, recording ends in it."""
    begun: list[PlayedGraph] = []

    @contextlib.contextmanager
    def capture(graph: PlayedGraph, **_: Any) -> Iterator[None]:
        begun.append(graph)
        with graph.recorder:
            yield
        graph.recorder.undo()
        if error := getattr(request, "param", None):
            raise error

    def records(acceleration: Acceleration, *_: Any) -> bool:
        return acceleration != "none"

    monkeypatch.setattr(cuda_graph, "WARMUP_CALLS", WARMUP_CALLS)
    monkeypatch.setattr(trainer, "records_graphs", records)
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PlayedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return begun


def train(config: TrainConfig, data: LabelledImages) -> tuple[list[EpochMetrics], dict[str, Tensor]]:
    """The epochs' metrics, without their times, and the last weights and running statistics."""
    trained = Trainer(config, data)
    return without_times(trained), trained.model.state_dict()


def without_times(epochs: Iterable[EpochMetrics]) -> list[EpochMetrics]:
    return [replace(metrics, elapsed_s=0, images_per_s=0) for metrics in epochs]


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_form": "reference"},
        {"loss_form": "plain", "epochs": 31},  # from 31 epochs on with Cutout
        {"recipe": "reference", "teacher": "ensemble", "epochs": 2},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_a_played_graph_trains_as_eager_steps_do(graphs, settings):
    """At every resolution, with a smaller last batch in every epoch but where there are many."""
    config = CIFAR.with_settings(**settings)
    data = random_images(4 if config.epochs > 30 else 30)
    expected, weights = train(config.with_settings(acceleration="none"), data)
    assert not graphs
    found, recorded_weights = train(config, data)
    assert found == expected
    assert_same_state(recorded_weights, weights)
    assert [host_read for graph in graphs for host_read in graph.recorder.host_reads] == []
    assert [graph.recorder.size() for graph in graphs] == ([16, 24, 32] if config.recipe == "modern" else [32])
    full_steps = len(data.labels) // config.batch_size * config.epochs
    assert sum(graph.num_replays for graph in graphs) == full_steps - WARMUP_CALLS * len(graphs)
    assert min(graph.num_replays for graph in graphs) >= 3


def test_a_host_read_is_found(graphs, monkeypatch):
    train_step = Trainer.train_step

    def read(self: Trainer, *args: Any) -> None:
        train_step(self, *args)
        mean, _ = self._mean_and_std
        mean[0].item()
        mean[mean > 0]

    monkeypatch.setattr(Trainer, "train_step", read)
    train(FEW_DIGITS, few_digits(20))
    (graph,) = graphs
    assert graph.recorder.host_reads == ["aten._local_scalar_dense.default", "aten.index.Tensor"]


def test_a_restored_state_is_recorded_anew(graphs):
    """A graph has the momentum of before in it."""
    trained = Trainer(FEW_DIGITS, few_digits(40))
    epochs = iter(trained)
    next(epochs)
    state = copy.deepcopy(trained.state_dict())
    expected, weights = without_times(epochs), copy.deepcopy(trained.model.state_dict())
    trained.load_state_dict(state)
    assert without_times(trained) == expected
    assert_same_state(trained.model.state_dict(), weights)
    assert len(graphs) == 2


# ---------------------------------------------------------------- a graph that cannot be recorded

REFUSED = RuntimeError("operation not permitted when stream is capturing")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("graphs", [REFUSED, OUT_OF_MEMORY], indirect=True)
def test_without_a_graph_training_goes_on_eagerly(graphs):
    """It is told once, and not tried again at the resolutions that follow."""
    data = random_images(14)
    expected, weights = train(CIFAR.with_settings(acceleration="none"), data)
    with pytest.warns(
        UserWarning, match="cannot be recorded as a CUDA graph here .*: training goes on without"
    ) as told:
        found, other_weights = train(CIFAR, data)
    assert (len(told), len(graphs)) == (1, 1)
    assert found == expected
    assert_same_state(other_weights, weights)


@pytest.mark.parametrize(
    ("graphs", "error", "words"),
    [
        (REFUSED, RecordingError, r"cannot be recorded as a CUDA graph here \(operation not permitted"),
        (OUT_OF_MEMORY, OutOfMemoryError, "a smaller --batch-size or --width would help"),
    ],
    indirect=["graphs"],
)
def test_a_graph_that_was_asked_for_and_fails_is_an_error(graphs, error, words):
    trained = Trainer(FEW_DIGITS.with_settings(acceleration="graph"), few_digits(40))
    with pytest.raises(error, match=words):
        next(iter(trained))
    assert (trained.step, len(graphs)) == (WARMUP_CALLS, 1)


# ---------------------------------------------------------------- modes
@pytest.mark.slow
def test_a_compiled_step_is_an_eager_one():
    """Both over two epochs whose last batch is smaller; the compiled one takes the same way but for rounding.

    At ten times the learning rate rounding alone makes a percent of difference within these few steps.
    """
    eager, compiled = (
        Trainer(DIGITS.with_settings(acceleration=mode), few_digits(220)) for mode in ("none", "compile")
    )
    expected, found = ([metrics.loss for metrics in trained] for trained in (eager, compiled))
    assert found == pytest.approx(expected, rel=1e-3)
    assert found != expected, "the same to the last bit: nothing was compiled"


@pytest.mark.parametrize(
    ("acceleration", "device", "num_processes", "records"),
    [
        ("auto", CUDA, 1, True),
        ("auto", CUDA, 2, False),
        ("auto", CPU, 1, False),
        ("none", CUDA, 1, False),
        ("graph", CUDA, 1, True),
        ("compile", CUDA, 1, True),
        ("compile", CPU, 1, False),
    ],
)
def test_where_steps_are_recorded(acceleration, device, num_processes, records):
    assert records_graphs(acceleration, device, Processes(0, num_processes)) == records


def test_a_graph_is_for_one_process():  # and for CUDA: tests/faults/test_command_lines.py
    with pytest.raises(ValueError, match="is for one process"):
        records_graphs("graph", CUDA, Processes(0, 2))


# ---------------------------------------------------------------- this device and the CPU

# Held to the CPU's float32 steps without acceleration are the mean losses over the steps, and what the network says
# of the images after them. The learning rate is small, so that rounding does not grow. On a GPU the network is the
# published one; `make bench-gpu` begins with these tests.
ON_GPU = torch.cuda.is_available()
WAYS: tuple[Acceleration, ...] = ("none", "graph", "compile") if ON_GPU else ("none",)
LARGEST: dict[Precision, float] = {"fp32": 1e-3, "bf16": 2e-2}  # relative difference; TF32 multiplies with 10 bits
CONFIG = TrainConfig(
    recipe="reference", width=64 if ON_GPU else 4, batch_size=128 if ON_GPU else 32, epochs=10_000, lr=1e-3
)
NUM_IMAGES = CONFIG.batch_size * (20 if ON_GPU else 3)


def measure(config: TrainConfig) -> np.ndarray:
    """Train one epoch: the mean label losses of the classifiers, the whole loss, and the NLLs afterwards."""
    images = random_images(NUM_IMAGES)
    trainer = Trainer(config, images)
    metrics = next(iter(trainer))
    return np.array([*metrics.label, metrics.loss, *trainer.evaluate_on(images).nll])


@cache
def measure_on_cpu() -> np.ndarray:
    return measure(CONFIG.with_settings(device="cpu", precision="fp32", acceleration="none"))


@pytest.mark.parametrize("precision", LARGEST)
@pytest.mark.parametrize("way", WAYS)
def test_steps_are_those_of_the_cpu(way, precision):
    found = measure(CONFIG.with_settings(acceleration=way, precision=precision))
    np.testing.assert_allclose(found, measure_on_cpu(), rtol=LARGEST[precision])


def test_a_step_that_is_slightly_wrong_would_be_found_out():
    wrong = measure(CONFIG.with_settings(device="cpu", precision="fp32", acceleration="none", lr=2e-2))
    assert not np.allclose(wrong, measure_on_cpu(), rtol=LARGEST["fp32"])


# ---------------------------------------------------------------- memory

# ResNet18 of width 16 and images of 32 pixels: 15,000 to 20,000 pages a step where freed memory is given back.
PAGES_A_STEP = """
import resource
import numpy as np
from byot.batches import draw_epoch, shuffled
from byot.config import TrainConfig
from byot.data import LabelledImages
from byot.trainer import Trainer

images = LabelledImages(np.zeros((128, 32, 32, 3), np.uint8), np.arange(128) % 100)
trainer = Trainer(TrainConfig(recipe="reference", width=16, device="cpu"), images)
(batch,) = shuffled(trainer.train_images, draw_epoch(trainer.config, 128, 0), 128)
for step in range(6):
    if step == 3:  # by then the process has what it needs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    trainer.train_step(batch, 32, 128)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 3)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept_for_the_next_step():
    done = subprocess.run([sys.executable, "-c", PAGES_A_STEP], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 3_000
