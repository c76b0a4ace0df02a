"""Holds fused.py and its C source to PyTorch's operations in float64, whatever the shape and the threads."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byot.config import TrainConfig
from byot.data import LabelledImages, load_images
from byot.system import fused
from byot.system.fused import load_library, norm_relu
from byot.trainer import Trainer

needs_compiler = pytest.mark.skipif(load_library() is None, reason="needs a C compiler")


def images(*shape: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale + shift
    return values.bfloat16().contiguous(memory_format=torch.channels_last)


def stirred_norm(channels: int) -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(channels)
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(channels, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(channels, generator=generator) * 0.3)
    return norm


def in_float64(
    norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, nn.BatchNorm2d]:
    norm = copy.deepcopy(norm).double()
    x = x.double().requires_grad_()
    added = None if residual is None else residual.double().requires_grad_()
    y = norm(x)
    y = F.relu(y if added is None else y + added)
    y.backward(dy.double())
    assert x.grad is not None
    return y.detach(), x.grad, None if added is None else added.grad, norm


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
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_it_is_torchs_three_operations(
    shape: tuple[int, ...], scale: float, shift: float, threads: int, with_residual: bool
) -> None:
    x, dy = images(*shape, scale=scale, shift=shift), images(*shape, seed=1)
    residual = images(*shape, seed=2) if with_residual else None
    norm = stirred_norm(shape[1])
    y, dx, dresidual, expected_norm = in_float64(norm, x, residual, dy)
    mine, added = x.clone().requires_grad_(), None if residual is None else residual.clone().requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = norm_relu(norm, mine, added)
        assert "FusedNormRelu" in type(found.grad_fn).__name__
        found.backward(dy)
    finally:
        torch.set_num_threads(before)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert mine.grad is not None
    # half a unit in the last place of bfloat16, and a little
    torch.testing.assert_close(found.double(), y, rtol=2**-8, atol=1e-4)
    certain = y.abs() > 1e-3  # nearer to 0 rounding decides whether a gradient passes
    tolerance = 2e-3 * dx.abs().max().item()
    torch.testing.assert_close(mine.grad.double() * certain, dx * certain, rtol=2**-7, atol=tolerance)
    if added is not None:
        assert dresidual is not None
        assert added.grad is not None
        assert torch.equal(added.grad.double() * certain, dresidual * certain)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(norm, name).double(), getattr(expected_norm, name), rtol=1e-4, atol=1e-5)
    assert norm.num_batches_tracked == 1
    for weight, expected in ((norm.weight, expected_norm.weight), (norm.bias, expected_norm.bias)):
        assert weight.grad is not None
        assert expected.grad is not None
        torch.testing.assert_close(
            weight.grad.double(), expected.grad, rtol=1e-3, atol=1e-3 * expected.grad.abs().max().item()
        )


@needs_compiler
def test_the_same_to_the_last_bit_every_time() -> None:
    norm, dy = stirred_norm(32), images(40, 32, 8, 8, seed=1)
    found = []
    for _ in range(3):
        x = images(40, 32, 8, 8).requires_grad_()
        y = norm_relu(copy.deepcopy(norm), x)
        y.backward(dy)
        assert x.grad is not None
        found.append((y.detach(), x.grad))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    """A diverged run is known by its loss."""
    x = images(4, 16, 4, 4)
    x[1, 3, 2, 2] = bad
    y = norm_relu(stirred_norm(16), x.requires_grad_())
    assert y[:, 3].isnan().all()
    assert y[:, :3].isfinite().all()


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        lambda norm, x: (norm.eval(), x),
        lambda norm, x: (norm, x.float()),
        lambda norm, x: (norm, x.contiguous()),
        lambda norm, x: (nn.BatchNorm2d(8), x[:, :8].contiguous(memory_format=torch.channels_last)),
    ],
)
def test_everything_else_is_left_to_torch(change) -> None:
    norm, x = change(stirred_norm(16), images(4, 16, 4, 4))
    y = norm_relu(norm, x.requires_grad_())
    assert type(y.grad_fn).__name__ == "ReluBackward0"
    torch.testing.assert_close(y, F.relu(copy.deepcopy(norm)(x)))


@needs_compiler
def test_training_with_and_without_it_is_the_same_but_for_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(dataset="digits", width=16, epochs=2, lr=0.01, device="cpu", precision="bf16")
    pixels, labels = load_images("digits", None, "train")
    data = LabelledImages(pixels[:512], labels[:512])
    (first, last) = list(Trainer(config, data))
    monkeypatch.setattr(fused, "load_library", lambda: None)
    (plain_first, plain_last) = list(Trainer(config, data))
    assert first.loss != plain_first.loss
    assert first.loss == pytest.approx(plain_first.loss, rel=0.02)
    assert last.loss == pytest.approx(plain_last.loss, rel=0.05)


def load_elsewhere(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Whether a new process gets the library."""
    return subprocess.run(
        [sys.executable, "-c", "from byot.system.fused import load_library; print(load_library() is not None)"],
        env={**os.environ, "BYOT_CACHE": str(folder / "cache"), **environment},
        capture_output=True,
        text=True,
    )


@needs_compiler
def test_it_is_compiled_once(tmp_path: Path) -> None:
    assert load_elsewhere(tmp_path).stdout == "True\n"
    (made,) = (tmp_path / "cache").iterdir()
    before = made.stat()
    assert load_elsewhere(tmp_path).stdout == "True\n"
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()] == [before.st_mtime_ns]


@pytest.mark.parametrize("without", ["compiler", "place", "wish"])
def test_without_it_training_goes_on(tmp_path: Path, without: str) -> None:
    (tmp_path / "file").write_text("")
    environment = {
        "compiler": {"PATH": str(tmp_path), "CC": "no-such-compiler"},
        "place": {"BYOT_CACHE": str(tmp_path / "file" / "cache")},
        "wish": {"BYOT_FUSED": "0"},
    }[without]
    done = load_elsewhere(tmp_path, **environment)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr


@needs_compiler
def test_a_damaged_library_is_made_again(tmp_path: Path) -> None:
    load_elsewhere(tmp_path)
    (made,) = (tmp_path / "cache").iterdir()
    made.write_bytes(b"not a library")
    assert load_elsewhere(tmp_path).stdout == "True\n"
    assert made.stat().st_size > 1000
