"""Measures what each lever of a training recipe is worth: one change at a time, by seed, at equal arithmetic.

  python benchmarks/quality/recipe_levers.py --data-dir DIR          every row that results/recipe-levers.jsonl lacks
  python benchmarks/quality/recipe_levers.py --data-dir DIR --rows base sgd --seeds 1 2 --budget 8
  python benchmarks/quality/recipe_levers.py --table                 the tables of what is there: recipe-levers.md

CIFAR-100, ResNet18 with four classifiers, the reference's loss weights. A run trains on 45,000 of the training images
and is measured once, after its last step, on the 5,000 that a search holds out: levers are chosen by these figures, so
the test set is not read. Records of an earlier version, trained on all 50,000 images and measured on the test images,
have tables of their own. A budget of 3 is the arithmetic of three epochs at 32 pixels: smaller images earn epochs. The
project's Trainer does the steps, with the lever in place of the recipe's own.
"""

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Literal
from unittest.mock import patch

import torch

from benchmarks import common
from byot.batches import Batch
from byot.config import CLASSIFIERS, Teacher, TrainConfig, check_range
from byot.data import LabelledImages, load_images, split_validation
from byot.system.files import append_json_line, read_json_lines, write_text
from byot.system.flags import Parser, one_sentence_errors
from byot.system.paths import PROJECT_ROOT
from byot.system.provenance import provenance
from byot.system.stopping import DivergedError
from byot.trainer import Trainer
from search.probe import EnoughError

RECORDS = PROJECT_ROOT / "results" / "recipe-levers.jsonl"
TITLE = """# Levers of the recipe

Made by `benchmarks/quality/recipe_levers.py`, which says what each row is. Accuracies in percent, mean ± standard
deviation of n seeds; differences in points, paired by seed, ± half of a 95 % interval where n is above 1.
"""
MEASURED_ON = {  # the name of a record's accuracies: what they were measured on
    "val_accuracy": "5,000 held-out training images, trained on the other 45,000",
    "accuracy": "the test images, trained on all 50,000 (of an earlier version: the test set took part in choosing)",
}
GROWING = ((16, 0.4), (24, 0.75))


@dataclass(frozen=True, kw_only=True)
class Levers:
    """One recipe."""

    batch_size: int = 128
    lr: float = 0.2  # peak, of SGD
    momentum: float = 0.9
    warmup: float = 0.15  # share of the run
    cosine: bool = False
    optimizer: Literal["sgd", "muon"] = "muon"
    filter_step: float = 0.05  # peak, of Muon: share of a filter bank's norm
    sizes: tuple[tuple[int, float], ...] = GROWING  # (pixels, until this share of the run), then 32
    padding: int = 2
    cutout: int = 0  # pixels
    label_smoothing: float = 0.0
    teacher: Teacher = "deepest"

    def mean_cost(self) -> float:
        """Compute the mean cost of a step, in steps at 32 pixels."""
        cost = start = 0.0
        for size, until in (*self.sizes, (32, 1.0)):
            cost += (until - start) * (size / 32) ** 2
            start = until
        return cost

    def size(self, progress: float) -> int:
        return next((size for size, until in self.sizes if progress < until), 32)

    def schedule(self, progress: float) -> float:
        """Compute the share of the peak learning rate."""
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
    "cutout 8": replace(BASE, cutout=8),
    "cosine": replace(BASE, cosine=True),
    "warm-up 5 %": replace(BASE, warmup=0.05),
    "warm-up 30 %": replace(BASE, warmup=0.3),
    "momentum 0.95": replace(BASE, momentum=0.95),
    "momentum 0.85": replace(BASE, momentum=0.85),
}


class LeverTrainer(Trainer):
    """The project's trainer with a recipe's levers in place of the modern recipe's own."""

    def __init__(self, levers: Levers, config: TrainConfig, train: LabelledImages, budget: float) -> None:
        super().__init__(config, train)
        self.levers, self.done = levers, 0
        self.num_steps = round(len(train.labels) / levers.batch_size * budget / levers.mean_cost())
        if levers.optimizer == "sgd":
            self.optimizer.param_groups[0] |= {"orthogonal": False, "weight_decay": config.weight_decay}

    def train_step(self, batch: Batch, size: int, num_images: int) -> None:
        levers, progress = self.levers, self.done / self.num_steps
        self.optimizer.lr.fill_(levers.lr * levers.schedule(progress))
        super().train_step(batch, levers.size(progress), num_images)
        self.done += 1
        if self.done == self.num_steps:
            raise EnoughError


def train(levers: Levers, *, budget: float, width: int, seed: int, data_dir: str | None) -> dict[str, Any]:
    """Do one run and measure its accuracies on the held-out images, shallow to deep, then the ensemble's."""
    torch.set_num_threads(1)
    same = {name: getattr(levers, name) for name in ("batch_size", "lr", "momentum", "label_smoothing", "teacher")}
    config = TrainConfig(width=width, seed=seed, epochs=10_000, device="cpu", **same)
    images = load_images("cifar100", data_dir, "train")
    training, held_out = split_validation(images, fraction=0.1, seed=config.split_seed)
    assert held_out is not None
    with (
        patch("byot.batches.crop_padding", lambda config: levers.padding),
        patch("byot.batches.cutout_size", lambda config: levers.cutout),
        patch("byot.optimizer.FILTER_STEP", levers.filter_step / levers.lr),
    ):
        trainer = LeverTrainer(levers, config, training, budget)
        started = time.process_time()
        with suppress(EnoughError, DivergedError):  # what has diverged is measured as it is
            list(trainer)
        cpu_s = time.process_time() - started
    return {
        "val_accuracy": [round(value, 2) for value in trainer.evaluate_on(held_out).accuracy],
        "cpu_s": round(cpu_s),
        "num_steps": trainer.num_steps,
        "precision": "fp32" if trainer.autocast_dtype is None else "bf16",
    }


def run_row(row: str, budget: float, width: int, seed: int, data_dir: str | None) -> dict[str, Any]:
    result = train(ROWS[row], budget=budget, width=width, seed=seed, data_dir=data_dir)
    identity = {"row": row, "budget": budget, "width": width, "seed": seed}
    return {**identity, **result, "levers": asdict(ROWS[row]), **provenance(torch.device("cpu"))}


def make_tables(records: list[dict[str, Any]]) -> Iterator[str]:
    """Make one for each kind of images, budget and width: mean ± sd over seeds, paired differences to the base."""
    header = ("row", "n", *CLASSIFIERS.values(), "4/4 minus base", "CPU s")
    for measure, images in MEASURED_ON.items():
        measured = [record for record in records if measure in record]
        for budget, width in sorted({(record["budget"], record["width"]) for record in measured}):
            same = [record for record in measured if (record["budget"], record["width"]) == (budget, width)]
            base = {record["seed"]: record[measure][-2] for record in same if record["row"] == "base"}
            rows = []
            for row in ROWS:
                runs = [record for record in same if record["row"] == row]
                if not runs:
                    continue
                pairs = [(run[measure][-2], base[run["seed"]]) for run in runs if run["seed"] in base]
                difference = ""
                if row != "base" and pairs:
                    difference = common.format_difference(*zip(*pairs, strict=True))
                accuracies = map(common.mean_and_sd, zip(*(run[measure] for run in runs), strict=True))
                rows.append([row, str(len(runs)), *accuracies, difference, f"{fmean(r['cpu_s'] for r in runs):.0f}"])
            title = f"Width {width}, the arithmetic of {budget:g} epochs at 32 pixels, on {images}:"
            yield f"{title}\n\n{common.markdown(header, rows)}\n"


def main() -> None:
    parser = Parser(prog="recipe_levers.py", description=__doc__)
    parser.add_argument("--data-dir", type=common.data_dir, metavar="DIR", help="CIFAR-100 (default: downloaded)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", default=list(ROWS), help="[all]")
    parser.add_argument("--seeds", nargs="+", type=common.number(0), default=[1, 2, 3], metavar="S", help="[1 2 3]")
    parser.add_argument("--budget", type=float, default=8.0, metavar="B", help="epochs' arithmetic at 32 pixels [8]")
    parser.add_argument("--width", type=common.number(1, 1024), default=16, help="[16]")
    parser.add_argument("--workers", type=common.num_workers, default=1, help="runs at once, of one thread each [1]")
    parser.add_argument("--output", type=common.file_to_write, default=RECORDS, help="[results/recipe-levers.jsonl]")
    parser.add_argument("--table", action="store_true", help="only write the tables beside the records")
    arguments = parser.parse_args()
    asked = [(row, arguments.budget, arguments.width, seed) for seed in arguments.seeds for row in arguments.rows]
    with one_sentence_errors("recipe_levers.py"):
        check_range("--budget", arguments.budget, above=0, below=1000)
        if arguments.output.suffix == ".md":
            raise ValueError("--output is for the records: the tables are written beside them, as .md")
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        known = [r for r in read_json_lines(arguments.output) if "val_accuracy" in r]
        done = {(r["row"], r["budget"], r["width"], r["seed"]) for r in known}
        jobs = [(*run, arguments.data_dir) for run in asked if run not in done and not arguments.table]
        if jobs:
            load_images("cifar100", arguments.data_dir, "train")
    for record in common.run_all(run_row, jobs, arguments.workers):
        append_json_line(arguments.output, record)
        print(f"{record['row']}, seed {record['seed']}: {record['val_accuracy']} in {record['cpu_s']} s", flush=True)
    tables = "\n".join([TITLE, *make_tables(read_json_lines(arguments.output))])
    write_text(arguments.output.with_suffix(".md"), tables)
    print(tables)


if __name__ == "__main__":
    main()
