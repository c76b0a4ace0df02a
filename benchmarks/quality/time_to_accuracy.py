"""Accuracy against time: each recipe at several budgets of epochs, on a CPU, one run after the other.

  python benchmarks/quality/time_to_accuracy.py --data-dir DIR --output FILE --figure FILE
  python benchmarks/quality/time_to_accuracy.py --dataset digits --width 4 --budgets 1 2 --output FILE   a try

A tenth of the training images is held out, and accuracy is measured on it after each epoch; the test set is not read.
Seconds are those of training alone, without these measurements: the process's own, which other work on the machine
changes least, and those of the clock. Every finished run is saved at once: the same command goes on with what is
missing.
"""

import time
from itertools import product
from typing import Any, get_args

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from analysis.figures import BLUE, ORANGE, STYLE, WIDTH
from benchmarks.readme_tables import mean_and_sd, table
from byot.config import RecipeName, TrainConfig, work_after
from byot.data import LabelledImages, load_images, split_validation
from byot.system.files import read_json, write_json
from byot.system.flags import Parser, one_sentence_errors
from byot.system.paths import absolute_path, check_writable_file
from byot.system.provenance import provenance
from byot.trainer import Trainer

COLOURS: dict[RecipeName, str] = {"reference": ORANGE, "modern": BLUE}
MEASURES = ("val_accuracy", "val_accuracy_ensemble")
Run = dict[str, Any]  # of the record's "runs": config, one row an epoch, provenance


def clock() -> np.ndarray:
    """Seconds of this process and of the clock, each from some moment on."""
    return np.array([time.process_time(), time.perf_counter()])


def train(config: TrainConfig, train_images: LabelledImages, val_images: LabelledImages) -> Run:
    """Do a run and return its record."""
    trainer = Trainer(config, train_images, val_images)
    spent, began, trained = np.zeros(2), clock(), clock()

    def on_batch(done: int, images: int) -> None:
        nonlocal trained
        trained = clock()

    rows = []
    for metrics in trainer.epochs(on_batch):
        spent += trained - began
        record = metrics.to_record()
        cpu_s, wall_s = spent.round(2).tolist()
        rows.append({name: record[name] for name in ("epoch", *MEASURES)} | {"cpu_s": cpu_s, "wall_s": wall_s})
        began = clock()
    return {
        "config": {**config.to_dict(), "data_dir": None},
        "precision": "fp32" if trainer.autocast_dtype is None else "bf16",
        "num_train_images": len(train_images.labels),
        "num_val_images": len(val_images.labels),
        "epochs": rows,
        **provenance(torch.device("cpu")),
    }


def find_run(runs: list[Run], config: TrainConfig) -> Run | None:
    return next((run for run in runs if not config.differing_settings(TrainConfig.from_dict(run["config"]))), None)


def by_budget(runs: list[Run]) -> dict[tuple[RecipeName, int], list[Run]]:
    """The runs of each recipe and number of epochs, which differ in the seed."""
    found: dict[tuple[RecipeName, int], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run["config"]["recipe"], run["config"]["epochs"])):
        found.setdefault((run["config"]["recipe"], run["config"]["epochs"]), []).append(run)
    return found


def to_table(runs: list[Run]) -> str:
    """After the last epoch, mean ± standard deviation over the seeds; the arithmetic in epochs at full resolution."""
    rows = []
    for (recipe, epochs), same in by_budget(runs).items():
        last = [run["epochs"][-1] for run in same]
        accuracies = (mean_and_sd([row[name] for row in last]) for name in MEASURES)
        seconds = (f"{np.mean([row[name] for row in last]):,.0f}" for name in ("cpu_s", "wall_s"))
        work = work_after(TrainConfig.from_dict(same[0]["config"]), epochs)
        rows.append([f"`{recipe}`", str(epochs), f"{work:.1f}", str(len(same)), *accuracies, *seconds])
    return table(["recipe", "epochs", "in full epochs", "n", "4/4", "ensemble", "CPU s", "seconds"], rows)


def draw(runs: list[Run]) -> Figure:
    """The deepest classifier against CPU seconds and against epochs: the mean over seeds, a dot where a run ends."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        told: set[RecipeName] = set()
        for (recipe, epochs), same in by_budget(runs).items():
            for axes, name in zip(panels, ("cpu_s", "epoch"), strict=True):
                x, y = (np.mean([[row[m] for row in run["epochs"]] for run in same], 0) for m in (name, MEASURES[0]))
                axes.plot(x, y, color=COLOURS[recipe], linewidth=1.2, label="" if recipe in told else recipe)
                axes.plot(x[-1], y[-1], "o", color=COLOURS[recipe], markersize=4)
                axes.annotate(str(epochs), (x[-1], y[-1]), xytext=(4, 2), textcoords="offset points", fontsize=8)
            told.add(recipe)
        for axes, label in zip(panels, ("CPU seconds of training", "epochs"), strict=True):
            axes.set_xlabel(label)
            axes.set_xlim(left=0)
        panels[0].set_ylabel("validation accuracy, 4/4 (%)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(told))
    return figure


def build_parser() -> Parser:
    parser = Parser(prog="time_to_accuracy.py", description=__doc__)
    recipes = get_args(RecipeName)
    parser.add_argument("--data-dir", metavar="DIR", help="where CIFAR-100 is (default: data/, downloaded)")
    parser.add_argument("--dataset", choices=("cifar100", "digits"), default="cifar100", help="[cifar100]")
    parser.add_argument("--width", type=int, default=16, help="[16]")
    parser.add_argument("--budgets", nargs="+", type=int, default=[2, 4, 8, 16], metavar="EPOCHS", help="[2 4 8 16]")
    parser.add_argument("--recipes", nargs="+", choices=recipes, default=recipes, metavar="RECIPE", help="[all]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="[0]")
    parser.add_argument("--threads", type=int, default=1, help="of a run [1]")
    parser.add_argument("--output", metavar="FILE", required=True, help="the record, JSON")
    parser.add_argument("--figure", metavar="FILE", help="draw the figure here, PNG or SVG by its name")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("time_to_accuracy.py"):
        if arguments.threads < 1:
            raise ValueError(f"--threads must be at least 1, not {arguments.threads}")
        output = check_writable_file(arguments.output)
        figure = None if arguments.figure is None else check_writable_file(arguments.figure)
        if figure is not None and figure.suffix not in (".png", ".svg"):
            raise ValueError(f"--figure must end in .png or .svg, unlike {arguments.figure}")
        data_dir = None if arguments.data_dir is None else str(absolute_path(arguments.data_dir))
        configs = [
            TrainConfig(
                recipe=recipe,
                dataset=arguments.dataset,
                data_dir=data_dir,
                width=arguments.width,
                epochs=epochs,
                seed=seed,
                val_fraction=0.1,
                device="cpu",
            )
            for seed, epochs, recipe in product(
                *map(dict.fromkeys, (arguments.seeds, arguments.budgets, arguments.recipes))
            )
        ]
        runs = read_json(output).get("runs") if output.exists() else []
        if not isinstance(runs, list):
            raise ValueError(f"{output} is not a record of this program: give another --output")
        missing = [config for config in configs if find_run(runs, config) is None]
        images = load_images(arguments.dataset, data_dir, "train")
        train_images, val_images = split_validation(images, fraction=0.1, seed=configs[0].split_seed)
        assert val_images is not None
    torch.set_num_threads(arguments.threads)
    for config in missing:
        runs.append(train(config, train_images, val_images))
        write_json(output, {"runs": runs})
        last = runs[-1]["epochs"][-1]
        print(
            f"{config.recipe}, epochs {config.epochs}, seed {config.seed}: {last['val_accuracy']:.2f} %, "
            f"{last['cpu_s']:.0f} CPU s",
            flush=True,
        )
    asked = [run for config in configs if (run := find_run(runs, config)) is not None]
    print(to_table(asked))
    if figure is not None:
        figure.parent.mkdir(parents=True, exist_ok=True)
        draw(asked).savefig(figure, dpi=150)


if __name__ == "__main__":
    main()
