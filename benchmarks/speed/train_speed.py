"""Training speed and memory of this project against a plain loop that works as the reference implementation does.

  python benchmarks/speed/train_speed.py                               ResNet18 and 50 at widths 64 and 16
  python benchmarks/speed/train_speed.py --models resnet18 --widths 16 --steps 10 --data-dir DIR

Both train the same images in turns within one process, so that what else the machine does falls on both; the ratio is
the median over the rounds. Both train by the reference's recipe, ours too at full resolution from the first step on. A
turn's first step finds its memory given back to the system: enough steps a turn show the speed of a long run. The share
of the peak is the arithmetic of one step, forward and backward, over what a large matrix product reaches in the same
precision in the same round. Memory is the growth of a process of its own over a few steps: resident memory on a CPU,
allocated memory on a GPU.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.reference_loop import ReferenceLoop
from byot.config import TrainConfig
from byot.data import LabelledImages, load_images
from byot.step import WARMUP_STEPS
from byot.system.files import write_json
from byot.system.flags import Parser, one_sentence_errors
from byot.system.paths import absolute_path
from byot.system.provenance import provenance
from byot.trainer import Trainer

MATMUL_SIZE = {"cpu": 2048, "mps": 4096, "cuda": 8192}
MEMORY_STEPS = {"cpu": 3, "cuda": 50}  # a CUDA graph is recorded within them
GIB = 2**30


def build_parser() -> Parser:
    parser = Parser(prog="train_speed.py", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"], metavar="MODEL")
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 16], metavar="WIDTH")
    parser.add_argument("--steps", type=int, default=2, help="steps of each in a round [2]")
    parser.add_argument("--rounds", type=int, default=3, help="at least so many [3]")
    parser.add_argument("--seconds", type=float, default=60, help="more rounds until so many are over [60]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [1]")
    parser.add_argument("--workers", type=int, default=0, help="of the plain loop's DataLoader [0]")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--acceleration", default="auto", help="of our steps: auto, none, graph or compile [auto]")
    parser.add_argument("--data-dir", metavar="DIR", help="CIFAR-100 (default: random images)")
    parser.add_argument("--output", metavar="FILE", help="write the record here as JSON")
    parser.add_argument("--memory-of", choices=["ours", "reference"], help=argparse.SUPPRESS)
    return parser


def some_images(data_dir: str | None, number: int) -> LabelledImages:
    if data_dir is not None:
        images, labels = load_images("cifar100", str(absolute_path(data_dir)), "train")
        return LabelledImages(images[:number], labels[:number])
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
    return LabelledImages(pixels, generator.integers(0, 100, number))


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    n = MATMUL_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(3))


def step_flops(trainer: Trainer, batch_size: int) -> int:
    """Operations of a forward and backward pass over one batch; a multiplication and addition count as two."""
    images = torch.zeros(batch_size, 3, 32, 32, device=trainer.device)
    with FlopCounterMode(display=False) as counter:
        sum(z.sum() for z in trainer.model(images).logits).backward()
    trainer.optimizer.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def measure(
    config: TrainConfig, data: LabelledImages, *, rounds: int, at_least_s: float, num_workers: int
) -> dict[str, Any]:
    """Train both in turns and put the figures of all rounds together."""
    ours = Trainer(config, data)
    reference = ReferenceLoop(config, data.images, data.labels, num_workers)
    flops = step_flops(ours, config.batch_size)
    epochs, num_images = ours.epochs(), len(data.labels)
    dtype = ours.autocast_dtype or torch.float32
    if ours.device.type == "cuda":  # a graph is recorded before anything is timed
        while ours.epoch * num_images <= WARMUP_STEPS * config.batch_size:
            next(epochs)
    taken: list[tuple[float, float, float]] = []
    started = time.perf_counter()
    while len(taken) < rounds + 1 or time.perf_counter() - started < at_least_s:
        ours_s = seconds(lambda: next(epochs))
        reference_s = seconds(lambda: list(reference.epoch()))
        peak = matmul_flops_per_s(ours.device, dtype)
        taken.append((num_images / ours_s, num_images / reference_s, peak))
    taken = taken[1:]  # the first warms up
    share = [images_per_s * flops / config.batch_size / peak for images_per_s, _, peak in taken]
    return {
        "model": config.model,
        "width": config.width,
        "threads": torch.get_num_threads(),
        "rounds": len(taken),
        "precision": str(dtype).removeprefix("torch."),
        "gflop_per_image": flops / config.batch_size / 1e9,
        "images_per_s": statistics.median(row[0] for row in taken),
        "reference_images_per_s": statistics.median(row[1] for row in taken),
        "ratio": statistics.median(row[0] / row[1] for row in taken),
        "ratios": [row[0] / row[1] for row in taken],
        "matmul_gflop_per_s": statistics.median(row[2] for row in taken) / 1e9,
        "share_of_matmul_peak": statistics.median(share),
    }


def memory_growth_gib(config: TrainConfig, data: LabelledImages, of: str, num_workers: int) -> float:
    """Of this process, from before the network is built to after a few steps."""
    cuda = torch.cuda.is_available()
    if not cuda:
        before = resident_gib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the most held so far is from now on what is held now
    if of == "ours":
        next(Trainer(config, data).epochs())
    else:
        list(ReferenceLoop(config, data.images, data.labels, num_workers).epoch())
    return torch.cuda.max_memory_allocated() / GIB if cuda else resident_gib("VmHWM") - before


def resident_gib(field: str) -> float:
    """Memory that this process holds (VmRSS) or has held at most (VmHWM), on Linux."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / GIB


def measure_memory(config: TrainConfig, arguments: argparse.Namespace) -> dict[str, float]:
    found = {}
    for of in ("ours", "reference"):
        flags = {
            "--memory-of": of,
            "--models": config.model,
            "--widths": config.width,
            "--threads": arguments.threads,
            "--batch-size": config.batch_size,
            "--acceleration": config.acceleration,
            "--workers": arguments.workers,
        }
        command = [sys.executable, __file__, *(str(word) for flag in flags.items() for word in flag)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[of] = json.loads(done.stdout)
    return {
        "memory_gib": found["ours"],
        "reference_memory_gib": found["reference"],
        "memory_ratio": found["ours"] / found["reference"],
    }


def to_text(rows: list[dict[str, Any]]) -> str:
    lines = ["model     width  images/s  reference  ratio  of matmul peak  memory GiB  reference  ratio"]
    for row in rows:
        lines.append(
            f"{row['model']:<8}  {row['width']:>5}  {row['images_per_s']:>8.1f}  {row['reference_images_per_s']:>9.1f}"
            f"  {row['ratio']:>5.2f}  {row['share_of_matmul_peak']:>14.2f}  {row['memory_gib']:>10.3f}"
            f"  {row['reference_memory_gib']:>9.3f}  {row['memory_ratio']:>5.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("train_speed.py"):
        configs = [
            TrainConfig(
                model=model,
                width=width,
                recipe="reference",
                epochs=10_000,
                batch_size=arguments.batch_size,
                acceleration=arguments.acceleration,
            )
            for model in arguments.models
            for width in arguments.widths
        ]
        for name in ("steps", "rounds", "threads"):
            if getattr(arguments, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(arguments, name)}")
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        steps = MEMORY_STEPS[kind] if arguments.memory_of else arguments.steps
        data = some_images(arguments.data_dir, steps * arguments.batch_size)
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(json.dumps(memory_growth_gib(configs[0], data, arguments.memory_of, arguments.workers)))
        return
    rows = []
    for config in configs:
        row = measure(
            config, data, rounds=arguments.rounds, at_least_s=arguments.seconds, num_workers=arguments.workers
        )
        row |= measure_memory(config, arguments)
        rows.append(row)
        print(to_text([row]) if len(rows) == 1 else to_text([row]).splitlines()[1], flush=True)
    if arguments.output:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "memory_of")}
        write_json(absolute_path(arguments.output), {"settings": settings, "rows": rows, **provenance(device)})


if __name__ == "__main__":
    main()
