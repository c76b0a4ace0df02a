"""Records training curves of many configurations for search_quality.py, transfer.py and time_to_accuracy.py.

  python benchmarks/quality/curves.py digits                        4 parameters, 160 configurations, 2 seeds each
  python benchmarks/quality/curves.py cifar100-10 --data-dir DIR    10 classes of CIFAR-100, 3 parameters
  python benchmarks/quality/curves.py transfer --data-dir DIR       short runs and long ones of 12 configurations
  python benchmarks/quality/curves.py time --data-dir DIR           one configuration, both recipes, several budgets

Every configuration is trained to its last epoch, whatever its first epochs look like, on a CPU. The configurations are
the settings that every search tries first and the first points of a scrambled Sobol sequence, which covers the space
evenly. Each curve is saved when it is done: the same command goes on where it was stopped.
"""

import gzip
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from scipy.stats import qmc

from benchmarks import common
from byot.config import RecipeName, TrainConfig
from byot.data import LabelledImages, load_images, split_validation
from byot.search_files import MEASURES, Range, Role, Space, space_from_dict, space_to_dict
from byot.system.files import write_whole
from byot.system.flags import Parser, one_sentence_errors
from byot.system.paths import PROJECT_ROOT
from byot.system.provenance import provenance
from byot.system.stopping import DivergedError
from byot.trainer import Trainer, choose_autocast_dtype
from search.space import DEFAULT_SPACE, first_points

RECORDED_SPACE: Space = {**DEFAULT_SPACE, "alpha": Range(0.0, 1.0)}  # what a search took in when they were recorded
FOLDER = PROJECT_ROOT / "results" / "curves"
SOBOL_SEED = 0
CPU = torch.device("cpu")


class Family(NamedTuple):
    """What is trained, over which space and how often."""

    base: TrainConfig
    num_configurations: int  # those of the Sobol sequence
    num_first: int = 2  # of the settings that are tried first
    num_seeds: int = 1
    space: Space = RECORDED_SPACE
    classes: tuple[int, ...] | None = None  # of the data set; None: all


on_cpu = partial(TrainConfig, device="cpu")
LENGTHS: tuple[tuple[RecipeName, int], ...] = (("modern", 4), ("modern", 8), ("modern", 24), ("reference", 40))
TRANSFER = {
    f"{recipe}-e{epochs}": Family(
        on_cpu(recipe=recipe, width=8, epochs=epochs, val_fraction=0.2), num_configurations=12, num_seeds=2
    )
    for recipe, epochs in LENGTHS
}
TIME = {
    f"time-{recipe}-e{epochs}": Family(
        on_cpu(recipe=recipe, width=16, epochs=epochs, val_fraction=0.1), num_configurations=0, num_first=1
    )
    for epochs in (2, 4, 8, 16)
    for recipe in get_args(RecipeName)
}
FAMILIES = {
    "digits": Family(
        on_cpu(recipe="reference", dataset="digits", width=4, epochs=27, val_fraction=0.3),
        num_configurations=160,
        num_seeds=2,
        space={**RECORDED_SPACE, "lr": Range(1e-3, 1.0, log=True)},
    ),
    "cifar100-10": Family(
        on_cpu(recipe="reference", width=8, epochs=9, val_fraction=0.2),
        num_configurations=80,
        classes=tuple(range(0, 100, 10)),
    ),
    **TRANSFER,
    **TIME,
}
GROUPS = {"transfer": tuple(TRANSFER), "time": tuple(TIME)}


class Curve(NamedTuple):
    """One run: its place in the sequence, its parameters and what each epoch measured on validation images."""

    number: int  # -2, -1: the settings that are tried first
    role: Role
    seed: int
    params: dict[str, float]
    values: dict[str, list[float]]  # measure -> one value an epoch; shorter than the budget where the run diverged
    seconds: float  # all epochs, validation included
    cpu_s: tuple[float, ...] = ()  # of training alone, after each epoch; older records have none


class Curves(NamedTuple):
    """A family's file."""

    header: dict[str, Any]  # command, configuration, space, provenance
    curves: list[Curve]

    @property
    def config(self) -> TrainConfig:
        return TrainConfig.from_dict(self.header["config"])

    @property
    def space(self) -> Space:
        return space_from_dict(self.header["space"])

    def by_number(self) -> dict[int, list[Curve]]:
        """Collect the curves of each configuration, which differ in the seed."""
        found: dict[int, list[Curve]] = {}
        for curve in self.curves:
            found.setdefault(curve.number, []).append(curve)
        return found


def curves_path(family: str, folder: Path = FOLDER) -> Path:
    return folder / f"{family}.jsonl.gz"


def load_curves(path: Path) -> Curves:
    """Read a file of curves. Raises FileNotFoundError where nothing was recorded."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        header, *records = map(json.loads, file)
    return Curves(header, [Curve(**record) for record in records])


def load_all(names: Iterable[str], folder: Path) -> dict[str, Curves]:
    """Load those of the named families that are recorded."""
    return {name: load_curves(path) for name in names if (path := curves_path(name, folder)).exists()}


def save_curves(path: Path, header: dict[str, Any], curves: list[Curve]) -> None:
    ordered = sorted(curves, key=lambda curve: (curve.seed, curve.number))
    lines = [json.dumps(record) + "\n" for record in (header, *(curve._asdict() for curve in ordered))]
    write_whole(path, [gzip.compress("".join(lines).encode(), mtime=0)])


def configurations(family: Family) -> list[tuple[int, Role, dict[str, float]]]:
    """List number, role and parameters of all that is trained; parameters have four significant digits."""
    points = first_points(family.space, family.base)[: family.num_first]
    first = [(n, point.role, point.params) for n, point in enumerate(points, start=-2)]
    sequence = qmc.Sobol(len(family.space), seed=SOBOL_SEED).random_base2(family.num_configurations.bit_length())
    places = sequence[: family.num_configurations].tolist()
    rounded = [
        {
            name: float(f"{bounds.at(place):.4g}")
            for (name, bounds), place in zip(family.space.items(), point, strict=True)
        }
        for point in places
    ]
    return first + [(number, "sampled", params) for number, params in enumerate(rounded)]


@lru_cache(maxsize=1)  # a group has many families of the same images
def _images(name: str, data_dir: str | None) -> tuple[LabelledImages, LabelledImages]:
    """Load a family's images: those to train on and those held out."""
    base, classes = FAMILIES[name].base, FAMILIES[name].classes
    images = load_images(base.dataset, data_dir, "train")
    if classes is not None:
        chosen = np.isin(images.labels, classes)
        images = LabelledImages(images.images[chosen], images.labels[chosen])
    train, val = split_validation(images, fraction=base.val_fraction, seed=base.split_seed)
    assert val is not None
    return train, val


def train_curve(name: str, data_dir: str | None, seed: int, number: int, role: Role, params: dict[str, float]) -> Curve:
    torch.set_num_threads(1)
    trainer = Trainer(FAMILIES[name].base.with_settings(seed=seed, **params), *_images(name, data_dir))
    cpu_s, began, trained = [0.0], time.process_time(), 0.0

    def on_batch(done: int, images: int) -> None:
        nonlocal trained
        trained = time.process_time()

    with suppress(DivergedError):  # the epochs until then are its curve
        for _ in trainer.epochs(on_batch):
            cpu_s.append(round(cpu_s[-1] + trained - began, 2))
            began = time.process_time()
    values = {measure: [float(f"{record[measure]:.5g}") for record in trainer.history] for measure in MEASURES}
    seconds = sum(record["elapsed_s"] for record in trainer.history)
    return Curve(number, role, seed, params, values, round(seconds, 2), tuple(cpu_s[1:]))


def open_curves(name: str, data_dir: str | None, path: Path) -> Curves:
    """Read a family's file, or make its header. Raises ValueError for a file of other settings."""
    family, (train, val) = FAMILIES[name], _images(name, data_dir)
    if path.exists():
        known = load_curves(path)
        if family.base.differing_settings(known.config) or known.space != family.space:
            raise ValueError(f"{path} was recorded with other settings: give another --folder")
        return known
    header = {
        "command": f"python benchmarks/quality/curves.py {name}" + (" --data-dir DIR" if data_dir else ""),
        "config": {**family.base.to_dict(), "data_dir": None},
        "classes": family.classes,
        "space": space_to_dict(family.space),
        "num_train_images": len(train.labels),
        "num_val_images": len(val.labels),
        "precision": "fp32" if choose_autocast_dtype("auto", CPU) is None else "bf16",
        **provenance(CPU),
    }
    return Curves(header, [])


def record(name: str, data_dir: str | None, path: Path, known: Curves, num_workers: int) -> Iterator[Curve]:
    """Train what the file lacks and yield each curve, once it is in the file."""
    header, curves = known
    done = {(curve.seed, curve.number) for curve in curves}
    asked = [(seed, *one) for seed in range(FAMILIES[name].num_seeds) for one in configurations(FAMILIES[name])]
    jobs = [(name, data_dir, *job) for job in asked if job[:2] not in done]
    for curve in common.run_all(train_curve, jobs, num_workers):
        curves.append(curve)
        save_curves(path, header, curves)
        yield curve


def main() -> None:
    parser = Parser(prog="curves.py", description=__doc__)
    parser.add_argument("family", choices=(*FAMILIES, *GROUPS), help="what to record: a family or a group of them")
    parser.add_argument("--data-dir", type=common.data_dir, metavar="DIR", help="CIFAR-100")
    parser.add_argument("--workers", type=common.num_workers, default=1, help="runs at once, of one thread each [1]")
    parser.add_argument("--folder", type=common.path, default=FOLDER, metavar="DIR", help="[results/curves]")
    arguments = parser.parse_args()
    with one_sentence_errors("curves.py"):
        paths = {name: curves_path(name, arguments.folder) for name in GROUPS.get(arguments.family, [arguments.family])}
        known = {name: open_curves(name, arguments.data_dir, path) for name, path in paths.items()}
    for name, path in paths.items():
        for curve in record(name, arguments.data_dir, path, known[name], arguments.workers):
            end = curve.values["val_accuracy"][-1:] or [float("nan")]
            print(
                f"{name} {curve.role} {curve.number} seed {curve.seed}: {end[0]:.2f} %, {curve.seconds:.0f} s",
                flush=True,
            )
        print(f"all curves of {name} are in {path}", flush=True)


if __name__ == "__main__":
    main()
