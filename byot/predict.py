"""Classify pictures with a trained network: the most probable classes, and the exit that answered.

  python byot/predict.py NAME photo.jpg      the network of the run's last checkpoint
  python byot/predict.py NAME photos/        every PNG, JPEG and WebP in a folder
  python byot/predict.py NAME photos/ --format csv > photos.csv

A file that is no image is named, and the others go on; the exit code is then 1.
"""

from importlib.util import find_spec

if find_spec("byot") is None:
    raise SystemExit("byot is not installed for this Python: activate its .venv, or pip install -r requirements.txt")

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from byot.config import NUM_CLASSIFIERS, check_range
from byot.console import text_table, waiting
from byot.system.flags import Parser, one_line, one_sentence_errors, tell
from byot.system.paths import absolute_path

if TYPE_CHECKING:  # importing it imports torch
    from byot.predictor import Prediction, Predictor

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")

Answers = Sequence[tuple[Path, "Prediction"]]


def build_parser() -> Parser:
    parser = Parser(prog="predict.py", description=__doc__)
    parser.add_argument("run", help="a run, by its name, folder or checkpoint file")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=5, help="how many classes to name [5]")
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table", help="what is printed [table]")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="where to compute")
    return parser


def find_images(given: Sequence[str]) -> list[Path]:
    """List the files named and, in order of their names, those in folders that end as images do.

    Raises ValueError where nothing is, or a folder has none.
    """
    found: list[Path] = []
    for text in given:
        absolute_path(text)
        path = Path(text).expanduser()
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS)
            if not inside:
                raise ValueError(f"{path} has no image: no name in it ends in {', '.join(ENDINGS)}")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(f"there is no image or folder at {path}")
    return found


def predict_files(predictor: "Predictor", files: Sequence[Path], top: int) -> Iterator[tuple[Path, "Prediction"]]:
    """Classify files batch by batch; one that is no image is named on standard error and left out."""
    import numpy as np

    from byot.predictor import to_pixels

    for start in range(0, len(files), predictor.batch_size):
        decoded = []
        for file in files[start : start + predictor.batch_size]:
            try:
                decoded.append((file, to_pixels(file, predictor.image_size)))
            except ValueError as error:
                tell("predict.py", one_line(str(error)))
        if decoded:
            read, pixels = zip(*decoded, strict=True)
            yield from zip(read, predictor.answer(np.stack(pixels), top), strict=True)


def print_table(answers: Answers, top: int) -> None:
    rows = []
    for file, found in answers:
        named = [f"{name} {probability:.1%}" for name, probability in found.top]
        rows.append((one_line(str(file)), f"{found.exit}/{NUM_CLASSIFIERS}", *named, f"{found.ms:.2f}"))
    places = [str(place) for place in range(1, top + 1)]
    print(text_table(("file", "exit", *places, "ms"), rows, num_text=2 + top, may_go=places[:0:-1]))


def print_json(answers: Answers, top: int) -> None:
    records = [
        {
            "file": str(file),
            "exit": found.exit,
            "ms": found.ms,
            "top": [{"name": name, "probability": probability} for name, probability in found.top],
        }
        for file, found in answers
    ]
    print(json.dumps(records, indent=2))


def print_csv(answers: Answers, top: int) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    columns = [column for i in range(1, top + 1) for column in (f"name_{i}", f"probability_{i}")]
    writer.writerow(("file", "exit", "ms", *columns))
    for file, found in answers:
        values = [value for pair in found.top for value in pair]
        writer.writerow((one_line(str(file)), found.exit, found.ms, *values))


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("predict.py"), waiting("loading PyTorch and the network"):
        files = find_images(arguments.images)

        from byot.exits import exits_command, warn_of_age
        from byot.predictor import Predictor
        from byot.runs import find_run

        saved = find_run(arguments.run)
        warn_of_age(saved.folder, saved.checkpoint)
        predictor = Predictor(saved, arguments.device)
        check_range("--top", arguments.top, low=1, high=len(predictor.class_names))
    if not predictor.stops_early and saved.config.num_classifiers > 1:
        command = exits_command(arguments.run)
        tell("predict.py", f"the deepest classifier answers; after `{command}` the network stops early")
    answers = list(predict_files(predictor, files, arguments.top))
    {"table": print_table, "json": print_json, "csv": print_csv}[arguments.format](answers, arguments.top)
    if len(answers) < len(files):
        sys.exit(1)


if __name__ == "__main__":
    main()
