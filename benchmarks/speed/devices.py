"""Whether this device computes what the CPU does: the same steps from the same weights, in each way and precision.

  python benchmarks/speed/devices.py --data-dir DIR                    ResNet18 at width 64, 20 steps

Held to the CPU's eager float32 steps: the mean losses over the steps, and what the network says of the images after
them. The learning rate is small, so that rounding does not grow. Exit code 1 where a difference is larger than the
precision explains.
"""

import sys
from typing import Any

from benchmarks.speed.train_speed import some_images
from byot.config import Acceleration, Precision, TrainConfig
from byot.data import LabelledImages
from byot.system.files import write_json
from byot.system.flags import Parser, one_line, one_sentence_errors
from byot.system.paths import absolute_path
from byot.system.provenance import provenance
from byot.trainer import Trainer, choose_device

LARGEST: dict[Precision, float] = {"fp32": 1e-3, "bf16": 2e-2}  # relative difference; TF32 multiplies with 10 bits
WAYS: dict[str, tuple[Acceleration, ...]] = {
    "cpu": ("none",),
    "mps": ("none",),
    "cuda": ("none", "graph", "compile"),
}


def build_parser() -> Parser:
    parser = Parser(prog="devices.py", description=__doc__)
    parser.add_argument("--model", default="resnet18", help="[resnet18]")
    parser.add_argument("--width", type=int, default=64, help="[64]")
    parser.add_argument("--batch-size", type=int, default=128, help="[128]")
    parser.add_argument("--steps", type=int, default=20, help="[20]")
    parser.add_argument("--data-dir", metavar="DIR", help="CIFAR-100 (default: random images)")
    parser.add_argument("--output", metavar="FILE", help="write the record here as JSON")
    return parser


def measure(config: TrainConfig, images: LabelledImages) -> dict[str, float]:
    """Train one epoch on the images: the mean label losses of the classifiers, the whole loss, and NLLs afterwards."""
    trainer = Trainer(config, images)
    metrics = next(iter(trainer))
    found = {f"train_label_{i}": value for i, value in enumerate(metrics.label, start=1)}
    after = trainer.evaluate_on(images)
    return found | {"train_loss": metrics.loss} | {f"nll_{i}": value for i, value in enumerate(after.nll, start=1)}


def compare(config: TrainConfig, images: LabelledImages) -> list[dict[str, Any]]:
    """One row for each way and precision of this device: its largest relative difference from the CPU."""
    expected = measure(config.with_settings(device="cpu", precision="fp32", acceleration="none"), images)
    rows = []
    for way in WAYS[choose_device(config.device).type]:
        for precision, largest in LARGEST.items():
            row: dict[str, Any] = {"way": way, "precision": precision, "allowed": largest, "agrees": False, "error": ""}
            try:
                found = measure(config.with_settings(precision=precision, acceleration=way), images)
            except Exception as error:  # whatever a compiler or a driver raises: the other ways are tried all the same
                rows.append(row | {"error": f"{type(error).__name__}: {one_line(str(error))}"})
                continue
            differences = {name: abs(found[name] - value) / abs(value) for name, value in expected.items()}
            worst = max(differences, key=lambda name: differences[name])
            agrees = differences[worst] <= largest
            rows.append(row | {"agrees": agrees, "of": worst, "largest_difference": differences[worst]})
    return rows


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("devices.py"):
        config = TrainConfig(
            recipe="reference",
            model=arguments.model,
            width=arguments.width,
            batch_size=arguments.batch_size,
            epochs=10_000,
            lr=1e-3,
        )
        if not 1 <= arguments.steps <= 1000:
            raise ValueError(f"--steps must be from 1 to 1000, not {arguments.steps}")
        images = some_images(arguments.data_dir, arguments.steps * arguments.batch_size)
    rows = compare(config, images)
    print("way      precision  largest relative difference from the CPU")
    for row in rows:
        told = row["error"]
        if not told:
            verdict = "agrees" if row["agrees"] else f"MORE than {row['allowed']:g}"
            told = f"{row['largest_difference']:.2e} ({row['of']}): {verdict}"
        print(f"{row['way']:<7}  {row['precision']:<9}  {told}")
    if arguments.output:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "data_dir")}
        record = {"settings": settings, "rows": rows, **provenance(choose_device("auto"))}
        write_json(absolute_path(arguments.output), record)
    sys.exit(0 if all(row["agrees"] for row in rows) else 1)


if __name__ == "__main__":
    main()
