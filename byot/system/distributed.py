"""Several processes that train one network: each takes its shard of every batch, on a device of its own.

torchrun starts them and tells each its rank. Together they do what one process would: the same batches, the same
augmentation, the loss of the whole batch, and, unless told otherwise, batch normalisation over the whole batch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Its functions have the group as a default argument. Imported after the group is made, as DistributedDataParallel does,
# they would keep it and its threads alive, and those can abort the process when the interpreter ends.
import torch.distributed.nn
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

TIMEOUT = timedelta(minutes=30)  # for the others; the first may be writing a checkpoint or downloading


@dataclass(frozen=True)
class Processes:
    """The processes of a run and this one's place among them. Alone, nothing is exchanged."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def shard(self, rows: Tensor) -> Tensor:
        """Give this process's rows of a batch: neighbours, as many as any other process has, or one more or less."""
        return rows[len(rows) * self.rank // self.count : len(rows) * (self.rank + 1) // self.count]

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Add up the values of all processes."""
        if self.count > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def all_reduce_max(self, value: int) -> int:
        """Find the greatest of all processes' values."""
        if self.count == 1:
            return value
        greatest = torch.tensor(value)
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
        return int(greatest)

    def barrier(self) -> None:
        """Wait until every process has come here."""
        self.all_reduce_max(0)

    def broadcast(self, value: Any) -> Any:
        """Give every process what the first one has; the others' value is ignored."""
        box = [value]
        if self.count > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Give every process what each one has, in the order of their ranks."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's statistics: each may have those of its own shards of the batches."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


ALONE = Processes()


@contextmanager
def joined_processes(device: str = "auto") -> Iterator[Processes]:
    """Meet the other processes that torchrun started, if it did.

    A process that loses the first one ends silently: the first has said why, or was told to end. Raises
    ValueError if the device is, or may be, a GPU and there is none for each.
    """
    count, rank, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    if count == 1:
        yield ALONE
        return
    on_gpus = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpus:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"there are {torch.cuda.device_count()} GPUs here, one for each process: "
                "--nproc-per-node must be at most that"
            )
        torch.cuda.set_device(local_rank)
    # gloo beside nccl: what is no tensor is exchanged on the CPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=TIMEOUT)
    try:
        yield Processes(rank, count)
    except RuntimeError as error:  # of torch.distributed, which has no class of its own for it
        if rank == 0 or not any(words in str(error) for words in ("by peer", "Broken pipe")):
            raise
        raise SystemExit(1) from None
    finally:
        dist.destroy_process_group()


def synchronise_batch_norms(model: nn.Module, device: torch.device) -> None:
    """Let every batch normalisation take its statistics from all processes' shards of the batch."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = CpuSyncBatchNorm2d  # which has the same parameters and buffers


class CpuSyncBatchNorm2d(nn.BatchNorm2d):
    """Does on a CPU what nn.SyncBatchNorm, which is for GPUs alone, does there."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W], this process's shard
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        values = x.float() if x.dtype == torch.bfloat16 else x
        mine = values.new_tensor([values.numel() / values.shape[1]])
        *sums, count = SumOverProcesses.apply(torch.cat([values.sum(dim=(0, 2, 3)), mine])).split(values.shape[1])
        mean = sums[0] / count  # [C]
        centred = values - mean[:, None, None]
        variance = SumOverProcesses.apply(centred.square().sum(dim=(0, 2, 3))) / count  # [C]
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class SumOverProcesses(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of the gradients that all of them have for it."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        return SumOverProcesses.forward(ctx, gradients[0])
