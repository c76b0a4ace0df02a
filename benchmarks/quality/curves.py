"""Recorded training curves: real ones of many configurations, kept to replay searches on (search_quality.py).

  python benchmarks/quality/curves.py digits                        4 parameters, 160 configurations, 2 seeds each
  python benchmarks/quality/curves.py cifar100-10 --data-dir DIR    10 classes of CIFAR-100, 3 parameters
  python benchmarks/quality/curves.py modern-e4 --data-dir DIR      CIFAR-100, for transfer.py; also modern-e8, -e24,
                                                            reference-e40, with the same 12 configurations

Every configuration is trained to its last epoch, whatever its first epochs look like. The configurations are the first
points of a scrambled Sobol sequence, which covers the space evenly, and the two settings that every search tries first.
A file is made good after every curve: the same command goes on where it was stopped.
"""

import argparse
import gzip
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import as_completed
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import qmc

from benchmarks.quality.pool import make_pool
from byot.config import RecipeName, TrainConfig
from byot.data import LabelledImages, load_images, split_validation
from byot.system.files import write_whole
from byot.system.flags import Parser, one_sentence_errors
from byot.system.paths import PROJECT_ROOT, absolute_path
from byot.system.provenance import provenance
from byot.system.stopping import DivergedError
from byot.trainer import Trainer
from search.records import MEASURES
from search.space import DEFAULT_SPACE, Range, Role, Space, first_points, space_from_dict, space_to_dict

FOLDER = PROJECT_ROOT / "results" / "curves"
SOBOL_SEED = 0
TRANSFER: tuple[tuple[RecipeName, int], ...] = (("modern", 4), ("modern", 8), ("modern", 24), ("reference", 40))


class Family(NamedTuple):
    """What is trained, over which space and how often."""

    base: TrainConfig
    space: Space
    num_configurations: int  # those of the Sobol sequence
    num_seeds: int
    classes: tuple[int, ...] | None = None  # of the data set; None: all


FAMILIES = {
    "digits": Family(
        TrainConfig(recipe="reference", dataset="digits", width=4, epochs=27, val_fraction=0.3, device="cpu"),
        {**DEFAULT_SPACE, "lr": Range(1e-3, 1.0, log=True)},
        num_configurations=160,
        num_seeds=2,
    ),
    "cifar100-10": Family(
        TrainConfig(recipe="reference", dataset="cifar100", width=8, epochs=9, val_fraction=0.2, device="cpu"),
        DEFAULT_SPACE,
        num_configurations=80,
        num_seeds=1,
        classes=tuple(range(0, 100, 10)),
    ),
    # Short runs and long ones of the same configurations, for transfer.py.
    **{
        f"{recipe}-e{epochs}": Family(
            TrainConfig(recipe=recipe, width=8, epochs=epochs, val_fraction=0.2, device="cpu"),
            DEFAULT_SPACE,
            num_configurations=12,
            num_seeds=2,
        )
        for recipe, epochs in TRANSFER
    },
}


class Curve(NamedTuple):
    """One run: its place in the sequence, its parameters and what each epoch measured on validation images."""

    number: int  # -2, -1: the settings that are tried first
    role: Role
    seed: int
    params: dict[str, float]
    values: dict[str, list[float]]  # measure -> one value an epoch; shorter than the budget where the run diverged
    seconds: float


class Curves(NamedTuple):
    """A family's file."""

    header: dict[str, Any]  # command, configuration, space, provenance
    space: Space
    epochs: int
    curves: list[Curve]


def curves_path(family: str, folder: Path = FOLDER) -> Path:
    return folder / f"{family}.jsonl.gz"


def load_curves(path: Path) -> Curves:
    """Raises FileNotFoundError where nothing was recorded."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        header, *records = map(json.loads, file)
    space = space_from_dict(header["space"])
    return Curves(header, space, header["config"]["epochs"], [Curve(**record) for record in records])


def save_curves(path: Path, header: dict[str, Any], curves: list[Curve]) -> None:
    ordered = sorted(curves, key=lambda curve: (curve.seed, curve.number))
    lines = [json.dumps(record) + "\n" for record in (header, *(curve._asdict() for curve in ordered))]
    write_whole(path, gzip.compress("".join(lines).encode(), mtime=0))


def configurations(family: Family) -> list[tuple[int, Role, dict[str, float]]]:
    """Number, role and parameters of all that is trained; parameters have four significant digits."""
    found: list[tuple[int, Role, dict[str, float]]] = [
        (number, point.role, point.params)
        for number, point in enumerate(first_points(family.space, family.base), start=-2)
    ]
    sequence = qmc.Sobol(len(family.space), seed=SOBOL_SEED).random_base2(family.num_configurations.bit_length())
    for number, place in enumerate(sequence[: family.num_configurations]):
        params = {name: _at(bounds, float(u)) for (name, bounds), u in zip(family.space.items(), place, strict=True)}
        found.append((number, "sampled", params))
    return found


def _at(bounds: Range, share: float) -> float:
    low, high = (np.log(bounds.low), np.log(bounds.high)) if bounds.log else (bounds.low, bounds.high)
    value = low + share * (high - low)
    return float(f"{np.exp(value) if bounds.log else value:.4g}")


@cache
def _images(name: str, data_dir: str | None) -> tuple[LabelledImages, LabelledImages]:
    family = FAMILIES[name]
    images = load_images(family.base.dataset, data_dir, "train")
    if family.classes is not None:
        place = np.isin(images.labels, family.classes)
        images = LabelledImages(images.images[place], images.labels[place])
    train, val = split_validation(images, fraction=family.base.val_fraction, seed=family.base.split_seed)
    assert val is not None
    return train, val


def _train(name: str, data_dir: str | None, number: int, role: Role, seed: int, params: dict[str, float]) -> Curve:
    torch.set_num_threads(1)
    trainer = Trainer(FAMILIES[name].base.with_settings(seed=seed, **params), *_images(name, data_dir))
    try:
        for _ in trainer:
            pass
    except DivergedError:
        pass  # the epochs until then are its curve
    values = {measure: [float(f"{record[measure]:.5g}") for record in trainer.history] for measure in MEASURES}
    seconds = sum(record["elapsed_s"] for record in trainer.history)
    return Curve(number, role, seed, params, values, round(seconds, 2))


def record(name: str, data_dir: str | None, path: Path, num_workers: int) -> Iterator[Curve]:
    """Train what the file lacks and yield each curve, once it is in the file."""
    family = FAMILIES[name]
    train, val = _images(name, data_dir)
    if path.exists():
        known = load_curves(path)
        header, curves = known.header, known.curves
        changed = family.base.differing_settings(TrainConfig.from_dict(header["config"]))
        if changed or known.space != family.space:
            raise ValueError(f"{path} was recorded with other settings: give another --output")
    else:
        command = f"python benchmarks/quality/curves.py {name}" + (" --data-dir DIR" if data_dir else "")
        header = {
            "command": command,
            "config": {**family.base.to_dict(), "data_dir": None},
            "classes": family.classes,
            "space": space_to_dict(family.space),
            "num_train_images": len(train.labels),
            "num_val_images": len(val.labels),
            **provenance(torch.device("cpu")),
        }
        curves = []
    done = {(curve.number, curve.seed) for curve in curves}
    with make_pool(num_workers) as workers:
        asked = [
            workers.submit(_train, name, data_dir, number, role, seed, params)
            for seed in range(family.num_seeds)
            for number, role, params in configurations(family)
            if (number, seed) not in done
        ]
        try:
            for future in as_completed(asked):
                curves.append(future.result())
                save_curves(path, header, curves)
                yield curves[-1]
        finally:
            workers.shutdown(cancel_futures=True)


def build_parser() -> Parser:
    parser = Parser(prog="curves.py", description=__doc__)
    parser.add_argument("family", choices=FAMILIES, help="what to record")
    parser.add_argument("--data-dir", metavar="DIR", help="CIFAR-100")
    parser.add_argument("--workers", type=int, default=1, help="runs at once, of one thread each [1]")
    parser.add_argument("--output", metavar="FILE", help="[results/curves/FAMILY.jsonl.gz]")
    return parser


def main() -> None:
    arguments: argparse.Namespace = build_parser().parse_args()
    with one_sentence_errors("curves.py"):
        if not 1 <= arguments.workers <= (os.cpu_count() or 1):
            raise ValueError(
                f"--workers must be from 1 to the machine's {os.cpu_count()} CPUs, not {arguments.workers}"
            )
        data_dir = None if arguments.data_dir is None else str(absolute_path(arguments.data_dir))
        path = absolute_path(arguments.output or str(curves_path(arguments.family)))
        _images(arguments.family, data_dir)
    for curve in record(arguments.family, data_dir, path, arguments.workers):
        last = curve.values["val_accuracy"][-1:] or [float("nan")]
        print(f"{curve.role} {curve.number} seed {curve.seed}: {last[0]:.2f} % in {curve.seconds:.0f} s", flush=True)
    print(f"all curves are in {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
