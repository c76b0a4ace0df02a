"""Test a trained network: accuracy, likelihood and calibration of every classifier and of their ensemble.

  python byot/evaluate.py NAME                     a run's last checkpoint, by its name or folder
  python byot/evaluate.py path/to/epoch-0200.pt    one checkpoint file
  python byot/evaluate.py NAME --exits --max-drop 0.5

Reads the test set; without --exits it writes nothing. With --exits it first fits when an image may leave early, on
held-out training images, and writes that to exits.json in the run's folder, what the test set then says to
exits-test.json: docs/exits.md.
"""

from importlib.util import find_spec

if find_spec("byot") is None:
    raise SystemExit("byot is not installed for this Python: activate its .venv, or pip install -r requirements.txt")

import json

from byot.config import check_range
from byot.console import classifier_table, waiting
from byot.system.files import describe_refusal, write_json
from byot.system.flags import Parser, one_sentence_errors, tell
from byot.system.paths import absolute_path

DEFAULT_MAX_DROP = 0.5


def build_parser() -> Parser:
    parser = Parser(prog="evaluate.py", description=__doc__)
    parser.add_argument("run", help="a run, by its name, folder or checkpoint file")
    parser.add_argument("--data-dir", metavar="DIR", help="where the data set is, if not where it was trained from")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="where to compute")
    parser.add_argument("--exits", action="store_true", help="fit and measure early exit")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="with --exits: the cheapest that loses at most POINTS against the deepest classifier "
        f"[{DEFAULT_MAX_DROP}]",
    )
    asked.add_argument(
        "--target-cost",
        type=float,
        metavar="SHARE",
        help="with --exits: the most accurate that costs at most SHARE of the plain network's multiply-adds",
    )
    parser.add_argument("--format", choices=("table", "json"), default="table", help="what to print")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("evaluate.py"), waiting("loading PyTorch, the network and the images"):
        any_asked = (arguments.max_drop, arguments.target_cost) != (None, None)
        if any_asked and not arguments.exits:
            raise ValueError("--max-drop and --target-cost are for early exit: give --exits too")
        if arguments.max_drop is not None:
            check_range("max_drop", arguments.max_drop, low=0, high=100)
        if arguments.target_cost is not None:
            check_range("target_cost", arguments.target_cost, above=0)

        from byot.data import check_dataset, load_images
        from byot.exits import warn_of_age
        from byot.runs import check_classes, evaluate_run, find_run

        saved = find_run(arguments.run)
        config = saved.config.with_settings(device=arguments.device)
        if arguments.data_dir is not None:
            config = config.with_settings(data_dir=str(absolute_path(arguments.data_dir)))
        record = {"checkpoint": str(saved.checkpoint), "epoch": saved.state["epoch"]}
        if arguments.exits:
            from byot.exit_report import TEST_FILE, Asked, fit_exits, format_exits, measure_exits

            check_dataset(config.dataset, config.data_dir, config.image_size)
            asked = Asked(arguments.max_drop, arguments.target_cost)
            fitted = fit_exits(saved, config, asked if any_asked else Asked(max_drop=DEFAULT_MAX_DROP))
        test = load_images(config.dataset, config.data_dir, "test", config.image_size)
        check_classes(saved, test)
        warn_of_age(saved.folder)
        if not arguments.exits:
            evaluation = evaluate_run(saved, config, test)
            record |= {"num_test_images": evaluation.num_images, **evaluation.to_record("test")}
            text = classifier_table(record, "test")
    if arguments.exits:
        with waiting("measuring the exits on the test set"):
            measured = measure_exits(fitted, test)
        record |= fitted.record | {"test": measured}
        text = format_exits(fitted.record, measured)
    if arguments.format == "json":
        print(json.dumps(record, indent=2))
    else:
        epoch = f"after epoch {saved.state['epoch']}/{config.epochs}"
        print(f"{saved.checkpoint}\n{config.dataset}, {len(test.labels)} test images, {epoch}")
        print(text)
    if arguments.exits:
        try:
            write_json(saved.folder / TEST_FILE, record)
        except OSError as error:  # what was measured has been printed
            tell("evaluate.py", describe_refusal(error, saved.folder))
            raise SystemExit(1) from error


if __name__ == "__main__":
    main()
