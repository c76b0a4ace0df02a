"""Holds fused.py and its C source to PyTorch's operations in float64, whatever the shape and the threads."""

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byot.config import TrainConfig
from byot.system import fused
from byot.system.fused import load_library, norm_relu
from byot.trainer import Trainer
from tests.helpers import PROJECT, few_digits, run_process
from tests.test_model import stir_batch_norms

needs_compiler = pytest.mark.skipif(load_library() is None, reason="needs a C compiler")


def images(*shape: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale + shift
    return values.bfloat16().contiguous(memory_format=torch.channels_last)


def stirred_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    stir_batch_norms(norm, seed=channels)
    return norm


class Passed(NamedTuple):
    """What a forward and a backward pass make; norm has the gradients of its weights and the running statistics."""

    y: Tensor
    dx: Tensor
    dresidual: Any
    norm: Any


def both_passes(function: Any, norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, dy: Tensor) -> Passed:
    x = x.clone().requires_grad_()
    residual = None if residual is None else residual.clone().requires_grad_()
    y = function(norm, x, residual)
    y.backward(dy)
    assert x.grad is not None
    return Passed(y, x.grad, None if residual is None else residual.grad, norm)


def slow_norm_relu(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None) -> Tensor:
    return F.relu(norm(x) if residual is None else norm(x) + residual)


@needs_compiler
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("shape", "scale", "shift"),
    [
        ((128, 16, 32, 32), 1.0, 0.0),
        ((3, 32, 7, 5), 2.0, 1.0),
        ((2, 48, 1, 1), 1.0, 0.0),
        ((1, 64, 2, 1), 1.0, 0.0),
        ((16, 512, 4, 4), 0.1, -3.0),  # a mean far from 0
        ((65, 128, 4, 4), 100.0, 50.0),
    ],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_it_is_torchs_three_operations(shape, scale, shift, threads, with_residual):
    x, dy = images(*shape, scale=scale, shift=shift), images(*shape, seed=1)
    residual = images(*shape, seed=2) if with_residual else None
    norm = stirred_norm(shape[1])
    in_float64: list[Any] = [None if tensor is None else tensor.double() for tensor in (x, residual, dy)]
    expected = both_passes(slow_norm_relu, copy.deepcopy(norm).double(), *in_float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = both_passes(norm_relu, norm, x, residual, dy)
    finally:
        torch.set_num_threads(before)
    assert "FusedNormRelu" in type(found.y.grad_fn).__name__
    assert found.y.dtype == torch.bfloat16
    assert found.y.is_contiguous(memory_format=torch.channels_last)
    # half a unit in the last place of bfloat16, and a little
    torch.testing.assert_close(found.y.double(), expected.y, rtol=2**-8, atol=1e-4)
    certain = expected.y.abs() > 1e-3  # nearer to 0 rounding decides whether a gradient passes
    tolerance = 2e-3 * expected.dx.abs().max().item()
    torch.testing.assert_close(found.dx.double() * certain, expected.dx * certain, rtol=2**-7, atol=tolerance)
    if with_residual:
        assert torch.equal(found.dresidual.double() * certain, expected.dresidual * certain)
    for name in ("running_mean", "running_var"):
        values, right = getattr(norm, name), getattr(expected.norm, name)
        torch.testing.assert_close(values.double(), right, rtol=1e-4, atol=1e-5)
    assert norm.num_batches_tracked == 1
    for weight, slow in zip(norm.parameters(), expected.norm.parameters(), strict=True):
        assert weight.grad is not None
        tolerance = 1e-3 * slow.grad.abs().max().item()
        torch.testing.assert_close(weight.grad.double(), slow.grad, rtol=1e-3, atol=tolerance)


@needs_compiler
def test_the_same_to_the_last_bit_every_time():
    x, dy = images(40, 32, 8, 8), images(40, 32, 8, 8, seed=1)
    first, *others = (both_passes(norm_relu, stirred_norm(32), x, None, dy) for _ in range(3))
    assert all(torch.equal(first.y, other.y) and torch.equal(first.dx, other.dx) for other in others)


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    """A diverged run is known by its loss."""
    x = images(4, 16, 4, 4)
    x[1, 3, 2, 2] = bad
    y = norm_relu(stirred_norm(16), x.requires_grad_())
    assert y[:, 3].isnan().all()
    assert y[:, :3].isfinite().all()


@needs_compiler
def test_several_threads_are_not_left_to_one(monkeypatch):
    """As a compiler without OpenMP would have it; torch's own operations use them all."""
    norm, x = stirred_norm(16), images(4, 16, 4, 4).requires_grad_()
    monkeypatch.setattr(fused, "load_library", lambda: SimpleNamespace(norm_relu_is_parallel=lambda: 0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert type(norm_relu(norm, x).grad_fn).__name__ == "ReluBackward0"


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        lambda norm, x: (norm.eval(), x),
        lambda norm, x: (norm, x.float()),
        lambda norm, x: (norm, x.contiguous()),
        lambda norm, x: (norm.bfloat16(), x),
        lambda norm, x: (nn.BatchNorm2d(16, affine=False), x),
        lambda norm, x: (nn.BatchNorm2d(8), x[:, :8].contiguous(memory_format=torch.channels_last)),
    ],
)
def test_everything_else_is_left_to_torch(change):
    norm, x = change(stirred_norm(16), images(4, 16, 4, 4))
    y = norm_relu(norm, x.requires_grad_())
    assert type(y.grad_fn).__name__ == "ReluBackward0"
    torch.testing.assert_close(y, F.relu(copy.deepcopy(norm)(x)))


@needs_compiler
def test_training_with_and_without_it_is_the_same_but_for_rounding(monkeypatch):
    config = TrainConfig(dataset="digits", width=16, epochs=2, lr=0.01, device="cpu", precision="bf16")
    data = few_digits(512)
    (first, last) = list(Trainer(config, data))
    monkeypatch.setattr(fused, "load_library", lambda: None)
    (plain_first, plain_last) = list(Trainer(config, data))
    assert first.loss != plain_first.loss
    assert first.loss == pytest.approx(plain_first.loss, rel=0.02)
    assert last.loss == pytest.approx(plain_last.loss, rel=0.05)


def load_elsewhere(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Whether a new process gets the library."""
    program = "from byot.system.fused import load_library; print(load_library() is not None)"
    return run_process([sys.executable, "-c", program], PROJECT, {"BYOT_CACHE": str(folder / "cache"), **environment})


@needs_compiler
def test_it_is_compiled_once_and_again_where_it_is_damaged(tmp_path):
    assert load_elsewhere(tmp_path).stdout == "True\n"
    (made,) = (tmp_path / "cache").iterdir()
    before = made.stat().st_mtime_ns
    assert load_elsewhere(tmp_path).stdout == "True\n"
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()] == [before]
    made.write_bytes(b"not a library")
    assert load_elsewhere(tmp_path).stdout == "True\n"
    assert made.stat().st_size > 1000


@pytest.mark.parametrize("without", ["compiler", "place", "wish"])
def test_without_it_training_goes_on(tmp_path, without):
    (tmp_path / "file").write_text("")
    environment = {
        "compiler": {"PATH": str(tmp_path), "CC": "no-such-compiler"},
        "place": {"BYOT_CACHE": str(tmp_path / "file" / "cache")},
        "wish": {"BYOT_FUSED": "0"},
    }[without]
    done = load_elsewhere(tmp_path, **environment)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr
