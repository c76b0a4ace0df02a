"""What each lever of a training recipe is worth: one change at a time, paired by seed, at equal arithmetic.

  python benchmarks/quality/recipe_levers.py --data-dir DIR          every row that results/recipe-levers.jsonl lacks
  python benchmarks/quality/recipe_levers.py --data-dir DIR --rows base sgd --seeds 1 2 --budget 8
  python benchmarks/quality/recipe_levers.py --table                the table of what is there, results/recipe-levers.md

CIFAR-100, ResNet18 with four classifiers, the reference's loss weights, all 50,000 training images, the test set read
once, after the last step. A budget of 3 is the arithmetic of three epochs at 32 pixels: smaller images earn epochs. The
loop is written out here, with levers that the project has not taken over, so that they can be tried.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from analysis.trials import CLASSIFIER_NAMES
from benchmarks.quality.pool import make_pool
from benchmarks.readme_tables import mean_and_sd, paired_difference, table
from byot.batches import DeviceImages, as_tensors, constants, crop_and_flip, cut_out, in_order, normalise, resize
from byot.config import Teacher, TrainConfig
from byot.data import find_normalisation, load_images
from byot.loss import self_distillation_loss
from byot.metrics import evaluate
from byot.model import BranchedResNet
from byot.optimizer import orthogonalise
from byot.system.files import append_json_line, read_json_lines, write_text
from byot.system.flags import Parser, one_sentence_errors
from byot.system.paths import PROJECT_ROOT, absolute_path
from byot.system.provenance import provenance
from byot.trainer import build_model, choose_autocast_dtype

RECORDS = PROJECT_ROOT / "results" / "recipe-levers.jsonl"
TITLE = """# Levers of the recipe

Made by `benchmarks/quality/recipe_levers.py`, which says what each row is. Accuracies in percent, mean ± standard
deviation of n seeds; differences in points, paired by seed, ± half of a 95 % interval where n is above 1.

"""
CPU = torch.device("cpu")
GROWING = ((16, 0.4), (24, 0.75))


@dataclass(frozen=True, kw_only=True)
class Levers:
    """One recipe."""

    batch_size: int = 128
    lr: float = 0.2  # peak, of SGD
    momentum: float = 0.9
    weight_decay: float = 5e-4  # of what SGD trains
    decay_norms: bool = False
    warmup: float = 0.15  # share of the run
    cosine: bool = False
    optimizer: Literal["sgd", "muon"] = "muon"
    filter_step: float = 0.05  # peak, of Muon: share of a filter bank's norm
    sizes: tuple[tuple[int, float], ...] = GROWING  # (pixels, until this share of the run), then 32
    padding: int = 2
    alternating_flip: bool = False
    cutout: int = 0  # pixels
    label_smoothing: float = 0.0
    teacher: Teacher = "deepest"
    alpha: float = 0.1
    alpha_ramp: float = 0.0  # share of the run in which alpha grows from 0
    zero_init: bool = False  # of each block's last normalisation
    averaging: float = 0.0  # decay a step of an exponential moving average of the weights; that is tested

    def mean_cost(self) -> float:
        """Of a step, in steps at 32 pixels."""
        cost = start = 0.0
        for size, until in (*self.sizes, (32, 1.0)):
            cost += (until - start) * (size / 32) ** 2
            start = until
        return cost

    def size(self, progress: float) -> int:
        return next((size for size, until in self.sizes if progress < until), 32)

    def schedule(self, progress: float) -> float:
        """The share of the peak."""
        up = 0.05 + 0.95 * progress / self.warmup
        down = (1 - progress) / (1 - self.warmup)
        return min(up, 0.5 * (1 - math.cos(math.pi * min(1.0, down))) if self.cosine else down)


BASE = Levers()
ROWS: dict[str, Levers] = {
    "base": BASE,
    "sgd": replace(BASE, optimizer="sgd"),
    "sgd, whole images": replace(BASE, optimizer="sgd", sizes=()),
    "whole images": replace(BASE, sizes=()),
    "filter step 0.1": replace(BASE, filter_step=0.1),
    "filter step 0.025": replace(BASE, filter_step=0.025),
    "batch 256": replace(BASE, batch_size=256),
    "batch 512": replace(BASE, batch_size=512, lr=0.3, filter_step=0.07),
    "label smoothing 0.1": replace(BASE, label_smoothing=0.1),
    "ensemble teaches": replace(BASE, teacher="ensemble"),
    "padding 4": replace(BASE, padding=4),
    "alternating flip": replace(BASE, alternating_flip=True),
    "cutout 8": replace(BASE, cutout=8),
    "decay on norms": replace(BASE, decay_norms=True),
    "cosine": replace(BASE, cosine=True),
    "warm-up 5 %": replace(BASE, warmup=0.05),
    "warm-up 30 %": replace(BASE, warmup=0.3),
    "momentum 0.95": replace(BASE, momentum=0.95),
    "momentum 0.85": replace(BASE, momentum=0.85),
    "alpha ramp 50 %": replace(BASE, alpha_ramp=0.5),
    "zero init": replace(BASE, zero_init=True),
    "averaging 0.99": replace(BASE, averaging=0.99),
}


class Muon:
    """Of convolutions but the first; byot.optimizer.Muon says what it does."""

    def __init__(self, model: BranchedResNet, momentum: float, dtype: torch.dtype) -> None:
        self.filters = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 3]
        self.momenta = [torch.zeros_like(p) for p in self.filters]
        self.momentum, self.dtype = momentum, dtype

    @torch.no_grad()
    def step(self, size: float) -> None:
        for weight, momentum in zip(self.filters, self.momenta, strict=True):
            assert weight.grad is not None
            momentum.mul_(self.momentum).add_(weight.grad)
            direction = orthogonalise(weight.grad.add(momentum, alpha=self.momentum).flatten(1), self.dtype)
            weight.mul_(min(direction.shape) ** 0.5 / weight.norm())
            weight.sub_(direction.view(weight.shape), alpha=size)
            weight.grad = None


def train(levers: Levers, *, budget: float, width: int, seed: int, data_dir: str | None) -> dict[str, Any]:
    """One run; its test accuracies, shallow to deep, then the ensemble's."""
    torch.set_num_threads(1)
    data = load_images("cifar100", data_dir, "train")
    images, labels = as_tensors(data)
    normalisation = find_normalisation(TrainConfig(recipe="modern"), data.images)
    mean, std = constants(normalisation, CPU)
    dtype = choose_autocast_dtype("auto", CPU)
    model = build_model(TrainConfig(width=width, seed=seed)).to(memory_format=torch.channels_last)
    if levers.zero_init:
        for name, parameter in model.trunk.named_parameters():
            if name.endswith("bn2.weight"):
                torch.nn.init.zeros_(parameter)
    muon = Muon(model, levers.momentum, dtype or torch.float32) if levers.optimizer == "muon" else None
    by_sgd = [p for p in model.parameters() if muon is None or all(p is not f for f in muon.filters)]
    groups = [
        {"params": [p for p in by_sgd if p.ndim > 1], "weight_decay": levers.weight_decay},
        {"params": [p for p in by_sgd if p.ndim == 1], "weight_decay": levers.weight_decay * levers.decay_norms},
    ]
    sgd = torch.optim.SGD(groups, lr=levers.lr, momentum=levers.momentum, nesterov=True, fused=True)
    average: list[Tensor] = []
    steps = len(labels) // levers.batch_size
    total = round(steps * budget / levers.mean_cost())
    started = time.process_time()
    model.train()
    for step in range(total):
        epoch, place = divmod(step, steps)
        if place == 0:
            order, offsets, flips, centres = draw(levers, len(labels), seed, epoch)
        rows = slice(place * levers.batch_size, (place + 1) * levers.batch_size)
        progress = step / total
        share = levers.schedule(progress)
        for group in sgd.param_groups:
            group["lr"] = levers.lr * share
        chosen = order[rows]
        x = normalise(crop_and_flip(images[chosen], offsets[rows], flips[rows], levers.padding), mean, std)
        if levers.cutout:
            x = cut_out(x, centres[rows], levers.cutout)
        if levers.size(progress) != 32:
            x = resize(x, levers.size(progress))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            outputs = model(x)
        ramp = min(1.0, progress / levers.alpha_ramp) if levers.alpha_ramp else 1.0
        terms = self_distillation_loss(
            outputs,
            labels[chosen],
            alpha=levers.alpha * ramp,
            temperature=3.0,
            beta=1e-6,
            label_smoothing=levers.label_smoothing,
            teacher=levers.teacher,
        )
        model.zero_grad(set_to_none=True)
        terms.total.backward()
        if muon is not None:
            muon.step(levers.filter_step * share)
        sgd.step()
        if levers.averaging:
            with torch.no_grad():
                average = average or [p.clone() for p in model.parameters()]
                torch._foreach_lerp_(average, list(model.parameters()), 1 - levers.averaging)
    cpu_s = time.process_time() - started
    if average:
        use_average(model, average, normalise(images[:5120], mean, std))
    test = DeviceImages(load_images("cifar100", data_dir, "test"), CPU)
    found = evaluate(model, in_order(test, 256, normalisation), autocast_dtype=dtype)
    return {
        "accuracy": [round(value, 2) for value in found.accuracy],
        "cpu_s": round(cpu_s),
        "num_steps": total,
        "precision": "fp32" if dtype is None else "bf16",
    }


def draw(levers: Levers, num_images: int, seed: int, epoch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Order, offsets, flips and centres of an epoch, from (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    order = torch.randperm(num_images, generator=generator)
    offsets = torch.randint(0, 2 * levers.padding + 1, (num_images, 2), generator=generator)
    flips = torch.rand(num_images, generator=generator) < 0.5
    if levers.alternating_flip:  # every image mirrored in every second epoch
        first = torch.rand(num_images, generator=torch.Generator().manual_seed(seed)) < 0.5
        flips = (first ^ bool(epoch % 2))[order]
    return order, offsets, flips, torch.randint(0, 32, (num_images, 2), generator=generator)


@torch.no_grad()
def use_average(model: BranchedResNet, average: list[Tensor], images: Tensor) -> None:
    """Put averaged weights in, and statistics of batch normalisation that belong to them."""
    torch._foreach_copy_(list(model.parameters()), average)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None  # the plain mean over the batches
    for batch in images.split(256):
        model(batch)


def run_row(row: str, budget: float, width: int, seed: int, data_dir: str | None) -> dict[str, Any]:
    result = train(ROWS[row], budget=budget, width=width, seed=seed, data_dir=data_dir)
    identity = {"row": row, "budget": budget, "width": width, "seed": seed}
    return {**identity, **result, "levers": asdict(ROWS[row]), **provenance(CPU)}


def read_records(path: Path) -> list[dict[str, Any]]:
    return read_json_lines(path) if path.is_file() else []


def make_tables(records: list[dict[str, Any]]) -> Iterator[str]:
    """One of each budget and width: mean ± sd over the seeds, and the paired differences to the base row."""
    header = ("row", "n", *CLASSIFIER_NAMES, "4/4 minus base", "CPU s")
    for budget, width in sorted({(record["budget"], record["width"]) for record in records}):
        of_budget = [r for r in records if (r["budget"], r["width"]) == (budget, width)]
        base = {r["seed"]: r["accuracy"][-2] for r in of_budget if r["row"] == "base"}
        rows = []
        for row in ROWS:
            runs = [record for record in of_budget if record["row"] == row]
            if not runs:
                continue
            accuracies = [mean_and_sd(values) for values in zip(*(run["accuracy"] for run in runs), strict=True)]
            pairs = [(run["accuracy"][-2], base[run["seed"]]) for run in runs if run["seed"] in base]
            difference = "" if row == "base" or not pairs else describe_difference(pairs)
            rows.append([row, str(len(runs)), *accuracies, difference, f"{fmean(run['cpu_s'] for run in runs):.0f}"])
        yield f"Width {width}, the arithmetic of {budget:g} epochs at 32 pixels:\n\n{table(header, rows)}\n"


def describe_difference(pairs: list[tuple[float, float]]) -> str:
    """The mean difference, with half of its 95 % interval where there are several pairs."""
    if len(pairs) == 1:
        return f"{pairs[0][0] - pairs[0][1]:+.2f}"
    found = paired_difference(*zip(*pairs, strict=True))
    return f"{found.difference:+.2f} ± {found.half_width:.2f}"


def build_parser() -> Parser:
    parser = Parser(prog="recipe_levers.py", description=__doc__)
    parser.add_argument("--data-dir", metavar="DIR", help="where CIFAR-100 is (default: data/, downloaded)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", default=list(ROWS), help="[all]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="S", help="[1 2 3]")
    parser.add_argument("--budget", type=float, default=8.0, metavar="B", help="epochs' arithmetic at 32 pixels [8]")
    parser.add_argument("--width", type=int, default=16, help="[16]")
    parser.add_argument("--workers", type=int, default=1, help="runs at once, of one thread each [1]")
    parser.add_argument("--output", metavar="FILE", help="[results/recipe-levers.jsonl]")
    parser.add_argument("--table", action="store_true", help="only write the table beside the records")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("recipe_levers.py"):
        path = RECORDS if arguments.output is None else absolute_path(arguments.output)
        data_dir = None if arguments.data_dir is None else str(absolute_path(arguments.data_dir))
        done = {(r["row"], r["budget"], r["width"], r["seed"]) for r in read_records(path)}
        asked = [(row, arguments.budget, arguments.width, seed) for seed in arguments.seeds for row in arguments.rows]
        missing = [] if arguments.table else [run for run in asked if run not in done]
        if missing:
            load_images("cifar100", data_dir, "train")
    with make_pool(arguments.workers) as workers:
        for future in [workers.submit(run_row, *run, data_dir) for run in missing]:
            record = future.result()
            append_json_line(path, record)
            print(f"{record['row']}, seed {record['seed']}: {record['accuracy']} in {record['cpu_s']} s", flush=True)
    tables = "\n".join(make_tables(read_records(path)))
    write_text(path.with_suffix(".md"), TITLE + tables)
    print(tables)


if __name__ == "__main__":
    main()
