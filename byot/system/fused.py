"""Does batch normalisation, the addition of a residual and ReLU as one operation.

In training on a CPU in bfloat16 a narrow ResNet spends a fifth of its time in these three. PyTorch does one after
another and reads and writes all of the images in each; norm_relu.c needs two passes forward and two backward. The
machine's own C compiler compiles it when it is first needed, which takes a second, into the cache folder. Without a
compiler, and everywhere but on a CPU in bfloat16, PyTorch's operations are used.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm  # of one process or over several

from byot.system.paths import cache_folder
from byot.system.provenance import read_cpu_info

SOURCE = Path(__file__).with_name("norm_relu.c")
LANES = 16  # as in the source: channels done together
# What -ffast-math has for vectorised sums, but not its switching off of subnormal numbers in the whole process.
FAST_MATH = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math")
FLAGS = ("-O3", "-march=native", *FAST_MATH, "-shared", "-fPIC")
COMPILE_TIMEOUT_S = 60

POINTER, COUNT, DOUBLE, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int


def norm_relu(norm: AnyBatchNorm | nn.Identity, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Compute relu(norm(x) + residual), [B, C, H, W]."""
    if _can_fuse(norm, x, residual) and _has_library():
        y: Tensor = FusedNormRelu.apply(x, residual, norm.weight, norm.bias, norm)
        return y
    x = norm(x)
    return F.relu(x if residual is None else x + residual, inplace=True)


def _has_library() -> bool:
    library = load_library()
    return library is not None and bool(torch.get_num_threads() == 1 or library.norm_relu_is_parallel())


def _can_fuse(norm: AnyBatchNorm | nn.Identity, x: Tensor, residual: Tensor | None) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and norm.training
        and type(norm) is nn.BatchNorm2d  # not one that looks at other processes' images
        and norm.affine
        and norm.weight.dtype == torch.float32
        and x.shape[1] % LANES == 0
        and x.numel() > x.shape[1]
        and not torch.compiler.is_compiling()
        and all(t is None or t.is_contiguous(memory_format=torch.channels_last) for t in (x, residual))
        and (residual is None or residual.dtype == x.dtype)
    )


class FusedNormRelu(torch.autograd.Function):
    """The operation with its gradient; keeps only its input and output for it. Updates the running statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, norm: Any) -> Tensor:
        channels, threads = x.shape[1], torch.get_num_threads()
        pixels = x.numel() // channels
        y = torch.empty_like(x)
        mean, rstd, variance = torch.empty(3, channels).unbind()
        sums = torch.empty(threads * 2 * channels, dtype=torch.float64)
        library: Any = load_library()
        library.norm_relu_forward(
            *map(_address, (x, residual, weight, bias, y, mean, rstd, variance, sums)),
            pixels,
            channels,
            norm.eps,
            threads,
        )
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (pixels / (pixels - 1)), norm.momentum)
        ctx.save_for_backward(x, y, weight, mean, rstd)
        ctx.has_residual = residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, mean, rstd = ctx.saved_tensors
        dy = gradients[0].contiguous(memory_format=torch.channels_last)
        channels, threads = x.shape[1], torch.get_num_threads()
        dx = torch.empty_like(x)
        dresidual = torch.empty_like(x) if ctx.has_residual else None
        dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
        sums = torch.empty(threads * 2 * channels, dtype=torch.float64)
        library: Any = load_library()
        library.norm_relu_backward(
            *map(_address, (dy, y, x, weight, mean, rstd, dx, dresidual, dweight, dbias, sums)),
            x.numel() // channels,
            channels,
            threads,
        )
        return dx, dresidual, dweight, dbias, None


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """Load the compiled source; None where it cannot be had, or $BYOT_FUSED is 0."""
    if os.environ.get("BYOT_FUSED") == "0":
        return None
    try:
        try:
            library = ctypes.CDLL(str(_compiled()))
        except OSError:  # damaged
            library = ctypes.CDLL(str(_compiled(again=True)))
    except (OSError, subprocess.SubprocessError):
        return None
    library.norm_relu_forward.argtypes = [*[POINTER] * 9, COUNT, COUNT, DOUBLE, INT]
    library.norm_relu_backward.argtypes = [*[POINTER] * 11, COUNT, COUNT, INT]
    library.norm_relu_forward.restype = library.norm_relu_backward.restype = None
    return library


def _compiled(again: bool = False) -> Path:
    """Find the library for this source, these flags and this processor, or compile it; `again` puts it in its place.

    Raises OSError or SubprocessError where that does not work.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    identity = (SOURCE.read_text(), *FLAGS, compiler, _processor())
    path = cache_folder() / f"norm_relu-{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.so"
    if path.is_file() and not again:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        for threading in (("-fopenmp",), ()):  # some compilers lack it; the threads' parts are then done in turn
            command = [compiler, *FLAGS, *threading, "-o", str(made), str(SOURCE), "-lm"]
            done = subprocess.run(command, capture_output=True, timeout=COMPILE_TIMEOUT_S)
            if done.returncode == 0:
                os.replace(made, path)
                return path
    raise subprocess.SubprocessError("the C compiler refused")


def _processor() -> str:
    """Describe the processor: what is compiled for one may not run on another with other instructions."""
    return "".join(sorted(set(read_cpu_info("model name", "flags", "Features")))) or platform.processor()
