"""Measures speed and memory of training against a plain loop that works as the reference implementation does.

  python benchmarks/speed/train_speed.py                               ResNet18 and 50 at widths 64 and 16
  python benchmarks/speed/train_speed.py --models resnet18 --widths 16 --steps 10 --data-dir DIR

Both train the same images in turns within one process, so that what else the machine does falls on both; the ratio is
the median over the rounds. Both train by the reference's recipe, ours too at full resolution from the first step on. On
a CPU the process keeps freed memory, for both. The share of the peak is the arithmetic of one step, forward and
backward, over what a large matrix product reaches in the same precision in the same round. Memory is the growth of a
process of its own over a few steps: resident memory on a CPU, allocated memory on a GPU.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.speed.reference_loop import ReferenceLoop
from byot.config import TrainConfig
from byot.console import text_table
from byot.data import LabelledImages, load_images
from byot.system.cuda_graph import WARMUP_CALLS
from byot.system.distributed import ALONE
from byot.system.flags import Parser, one_sentence_errors
from byot.trainer import Trainer, choose_device, records_graphs

MATMUL_SIZE = {"cpu": 2048, "mps": 4096, "cuda": 8192}
MEMORY_STEPS = {"cpu": 3, "cuda": 50}  # a CUDA graph is recorded within them
GIB = 2**30
KIND = "cuda" if torch.cuda.is_available() else "cpu"


def some_images(data_dir: str | None, number: int) -> LabelledImages:
    """Load the first images of CIFAR-100, or make random ones."""
    if data_dir is not None:
        images, labels, _ = load_images("cifar100", data_dir, "train")
        return LabelledImages(images[:number], labels[:number])
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
    return LabelledImages(pixels, generator.integers(0, 100, number))


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    n = MATMUL_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds(lambda: a @ b)
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(3))


def step_flops(trainer: Trainer, batch_size: int) -> int:
    """Count the operations of a forward and backward pass; a multiplication and addition count as two."""
    images = torch.zeros(batch_size, 3, 32, 32, device=trainer.device)
    with FlopCounterMode(display=False) as counter:
        sum(z.sum() for z in trainer.model(images).logits).backward()
    trainer.optimizer.zero_grad()
    return counter.get_total_flops()


def measure(config: TrainConfig, data: LabelledImages, rounds: int, at_least_s: float, workers: int) -> dict[str, Any]:
    """Train both in turns and put the figures of all rounds together."""
    ours, reference = Trainer(config, data), ReferenceLoop(config, data.images, data.labels, workers)
    flops_per_image = step_flops(ours, config.batch_size) / config.batch_size
    epochs, num_images = ours.epochs(), len(data.labels)
    dtype = ours.autocast_dtype or torch.float32
    if KIND == "cuda":  # a graph is recorded before anything is timed
        while ours.epoch * num_images <= WARMUP_CALLS * config.batch_size:
            next(epochs)
    taken: list[tuple[float, float, float]] = []
    started = time.perf_counter()
    while len(taken) < rounds + 1 or time.perf_counter() - started < at_least_s:
        both = seconds(lambda: next(epochs)), seconds(lambda: list(reference.epoch()))
        taken.append((num_images / both[0], num_images / both[1], matmul_flops_per_s(ours.device, dtype)))
    speed, reference_speed, peak = np.array(taken[1:]).T  # the first round warms up
    return {
        "model": config.model,
        "width": config.width,
        "threads": torch.get_num_threads(),
        "rounds": len(speed),
        "precision": str(dtype).removeprefix("torch."),
        "gflop_per_image": flops_per_image / 1e9,
        "images_per_s": median(speed),
        "reference_images_per_s": median(reference_speed),
        "ratio": median(speed / reference_speed),
        "ratios": (speed / reference_speed).tolist(),
        "matmul_gflop_per_s": median(peak) / 1e9,
        "share_of_matmul_peak": median(speed * flops_per_image / peak),
    }


def memory_growth_gib(of: str, config: TrainConfig, data: LabelledImages, threads: int, workers: int) -> float:
    """Measure by how much this process grows from before the network is built to after a few steps."""
    torch.set_num_threads(threads)
    before = 0.0
    if KIND == "cpu":
        before = resident_gib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the most held so far is from now on what is held now
    if of == "ours":
        next(Trainer(config, data).epochs())
    else:
        list(ReferenceLoop(config, data.images, data.labels, workers).epoch())
    return torch.cuda.max_memory_allocated() / GIB if KIND == "cuda" else resident_gib("VmHWM") - before


def resident_gib(field: str) -> float:
    """Read the memory that this process holds (VmRSS) or has held at most (VmHWM), on Linux."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / GIB


def measure_memory(config: TrainConfig, data_dir: str | None, threads: int, workers: int) -> dict[str, float]:
    data = some_images(data_dir, MEMORY_STEPS[KIND] * config.batch_size)
    ours, reference = (
        common.in_fresh_process(memory_growth_gib, of, config, data, threads, workers) for of in ("ours", "reference")
    )
    return {"memory_gib": ours, "reference_memory_gib": reference, "memory_ratio": ours / reference}


SHOWN = ("images_per_s", "reference_images_per_s", "ratio", "share_of_matmul_peak", "memory_gib", "memory_ratio")


def main() -> None:
    parser = Parser(prog="train_speed.py", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"], metavar="MODEL")
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 16], metavar="WIDTH")
    parser.add_argument("--steps", type=common.number(1), default=2, help="steps of each in a round [2]")
    parser.add_argument("--rounds", type=common.number(1), default=3, help="at least so many [3]")
    parser.add_argument("--seconds", type=float, default=60, help="more rounds until so many are over [60]")
    parser.add_argument("--threads", type=common.number(1), default=1, help="CPU threads [1]")
    parser.add_argument("--workers", type=common.number(0), default=0, help="of the plain loop's DataLoader [0]")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--acceleration", default="auto", help="of our steps: auto, none, graph or compile [auto]")
    parser.add_argument("--data-dir", type=common.data_dir, metavar="DIR", help="CIFAR-100 (default: random images)")
    parser.add_argument("--output", type=common.file_to_write, metavar="FILE", help="write the record here as JSON")
    arguments = parser.parse_args()
    with one_sentence_errors("train_speed.py"):
        base = TrainConfig(
            recipe="reference", epochs=10_000, batch_size=arguments.batch_size, acceleration=arguments.acceleration
        )
        configs = [base.with_settings(model=m, width=w) for m in arguments.models for w in arguments.widths]
        records_graphs(base.acceleration, choose_device(base.device), ALONE)  # or says why it cannot
        data = some_images(arguments.data_dir, arguments.steps * arguments.batch_size)
    torch.set_num_threads(arguments.threads)
    rows = []
    for config in configs:
        row = measure(config, data, arguments.rounds, arguments.seconds, arguments.workers)
        rows.append(row | measure_memory(config, arguments.data_dir, arguments.threads, arguments.workers))
        print(f"{config.model}, width {config.width}: {row['ratio']:.2f} times the plain loop's speed", flush=True)
    cells = [[f"{row['model']}, width {row['width']}", *(f"{row[name]:.4g}" for name in SHOWN)] for row in rows]
    print(text_table(["", *SHOWN], cells))
    settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "data_dir")}
    common.save_record(arguments.output, {"settings": settings, "rows": rows}, KIND)


if __name__ == "__main__":
    main()
