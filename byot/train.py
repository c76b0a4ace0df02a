"""Train one network by self distillation.

  python byot/train.py --model resnet18 --alpha 0.1 --temperature 3 --beta 1e-6
  python byot/train.py --best                      the best configuration a search found, on all training images
  python byot/train.py --resume outputs/runs/NAME  go on from a run's folder or one checkpoint file

The same command goes on from the run's own last checkpoint. The run's folder is outputs/runs/NAME.
"""

import argparse
import sys
from pathlib import Path

from byot.config import TrainConfig, absolute_path, check_name, outputs_folder
from byot.flags import Parser, add_settings, given_settings, one_sentence_errors
from byot.searched import find_best


def build_parser() -> Parser:
    parser = Parser(prog="train.py", description=__doc__)
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--best",
        nargs="?",
        const="",
        metavar="SEARCH",
        help="take the settings a search found best (default: the newest finished one); other flags go over them",
    )
    start.add_argument("--resume", type=Path, metavar="PATH", help="go on from this run folder or checkpoint file")
    parser.add_argument("--name", help="folder of the run under outputs/runs (default: made from the settings)")
    parser.add_argument("--outputs", metavar="DIR", help="where runs and searches are kept (default: outputs/)")
    add_settings(parser, TrainConfig)
    return parser


def plan_run(arguments: argparse.Namespace) -> tuple[TrainConfig, Path, Path | None]:
    """From the command line: the settings, the run's folder, and the checkpoint where one was named."""
    given = given_settings(arguments, TrainConfig)
    if given.get("data_dir"):
        given["data_dir"] = str(absolute_path(given["data_dir"]))
    outputs = outputs_folder(arguments.outputs)
    if arguments.resume is not None:
        if arguments.name is not None:
            raise ValueError("--name is for a new run; a resumed one keeps its folder")
        from byot.runs import find_checkpoint
        from byot.trainer import check_same_run

        folder, config, checkpoint = find_checkpoint(absolute_path(arguments.resume))
        asked = config.with_settings(**given)
        check_same_run(asked, config)
        return asked, folder, checkpoint
    if arguments.best is not None:
        defaults = TrainConfig(**given)
        choice = find_best(outputs, arguments.best, defaults.model, defaults.dataset)
        config = TrainConfig.from_dict({**choice.settings, **given})
        print(
            f"alpha {config.alpha:.4g}, temperature {config.temperature:.4g}, beta {config.beta:.4g} "
            f"from {choice.source}",
            flush=True,
        )
    else:
        config = TrainConfig(**given)
    return config, outputs / "runs" / check_name(arguments.name or config.run_name()), None


def main() -> None:
    arguments = build_parser().parse_args()
    with one_sentence_errors("train.py"):
        config, folder, checkpoint = plan_run(arguments)

        from byot.console import classifier_table, show_progress
        from byot.runs import finish_run, open_run, read_result
        from byot.trainer import DivergedError

        result = read_result(config, folder)
        run = None if result else open_run(config, folder, checkpoint)
    if run is not None:
        start = f"going on from {run.resumed_from}" if run.resumed_from else "starting"
        precision = "bf16" if run.trainer.autocast_dtype else "fp32"
        print(
            f"{start}: {config.model} width {config.width} on {config.dataset}, {len(run.trainer.train_images)} "
            f"training images, {config.epochs} epochs, {run.trainer.device.type}, {precision}\n{folder}",
            flush=True,
        )
        try:
            with show_progress(run.trainer.epoch, config.epochs) as (on_batch, on_epoch):
                result = finish_run(run, on_batch, on_epoch)
        except KeyboardInterrupt:
            print(f"\nstopped; go on with: python byot/train.py --resume {folder}", file=sys.stderr)
            raise SystemExit(130) from None
        except DivergedError as error:
            print(f"train.py: {error}", file=sys.stderr)
            raise SystemExit(1) from None
    else:
        print(f"{folder} is finished already; --name starts another run with these settings")
    assert result is not None
    print(f"\ntest set, {result['num_test_images']} images, after epoch {config.epochs}")
    print(classifier_table(result, "test"))


if __name__ == "__main__":
    main()
