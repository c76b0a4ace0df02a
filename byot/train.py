"""Train one network by self distillation.

  python byot/train.py --model resnet18 --alpha 0.1 --temperature 3 --beta 1e-6
  python byot/train.py --best                      the best configuration a search found, on all training images
  python byot/train.py --resume NAME               go on with a run, by its name, folder or checkpoint file

  torchrun --nproc-per-node 4 byot/train.py …      on several GPUs, with the same batches and the same result

The same command goes on from the run's own last checkpoint. The run's folder is outputs/runs/NAME. Ctrl-C and SIGTERM
finish the step at hand and save.
"""

from importlib.util import find_spec

if find_spec("byot") is None:
    raise SystemExit("byot is not installed for this Python: activate its .venv, or pip install -r requirements.txt")

import argparse
import io
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, get_args

from byot.config import RECIPES_OWN, TrainConfig, check_range, recipe_defaults
from byot.console import classifier_table, fold, show_progress, waiting
from byot.search_files import find_best
from byot.system.cores import OtherWork, advise_threads
from byot.system.files import describe_refusal, set_aside
from byot.system.flags import Parser, add_settings, as_called, given_settings, one_sentence_errors, tell, this_command
from byot.system.lock import lock_folder
from byot.system.paths import absolute_path, check_name, check_writable, default_outputs, outputs_folder
from byot.system.stopping import StoppedError, TrainingError, catch_stop_signals
from byot.tracking import Tracker, Trackers, check_trackers, trackers_of

FIRST_SPEAKS_WITHIN_S = 30.0
MOST_THREADS = 1024


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
    start.add_argument("--resume", metavar="RUN", help="go on from this run, by its name, folder or checkpoint file")
    start_anew = "start anew; what the run's folder held is moved to runs/replaced/"
    parser.add_argument("--fresh", action="store_true", help=start_anew)
    parser.add_argument("--dry-run", action="store_true", help="print the network, its costs and the time it will take")
    parser.add_argument("--name", help="folder of the run under outputs/runs (default: made from the settings)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: one a core); use fewer on a busy machine"
    )
    parser.add_argument(
        "--track",
        nargs="+",
        action="extend",
        choices=get_args(Tracker),
        metavar="TRACK",
        help="tensorboard, wandb, mlflow or none: where each epoch's figures go, beside metrics.jsonl [tensorboard]",
    )
    parser.add_argument("--outputs", metavar="DIR", help="where runs and searches are kept (default: outputs/)")
    add_settings(parser, TrainConfig, defaults=recipe_defaults())
    return parser


def plan_run(arguments: argparse.Namespace) -> tuple[TrainConfig, Path, Path | None]:
    """Read the command line: the settings, the run's folder, and the checkpoint where one was named."""
    given = given_settings(arguments, TrainConfig)
    if arguments.threads is not None:
        check_range("threads", arguments.threads, low=1, high=MOST_THREADS)
    check_trackers(arguments.track or [])
    if "data_dir" in given:
        given["data_dir"] = str(absolute_path(given["data_dir"]))
    outputs = outputs_folder(arguments.outputs)
    name = None if arguments.name is None else check_name(arguments.name)
    if arguments.resume is not None:
        if name is not None:
            raise ValueError("--name is for a new run; a resumed one keeps its folder")
        if arguments.fresh:
            raise ValueError("--fresh starts a run anew and --resume goes on with one; give one of them")
        from byot.runs import find_run

        saved = find_run(arguments.resume, outputs)
        return saved.config.with_settings(**given), saved.folder, saved.checkpoint
    if arguments.best is not None:
        choice = find_best(outputs, arguments.best, given.get("model"), given.get("dataset"))
        if given.get("dataset") not in (None, choice.settings.get("dataset")):
            given.setdefault("image_size", None)  # the other data set's own
        settings = choice.settings
        if given.get("recipe") not in (None, settings.get("recipe")):
            settings = {name: value for name, value in settings.items() if name not in RECIPES_OWN}  # the other's own
        config = TrainConfig.from_dict({**settings, **given})
        as_searched = "epochs" in settings and "epochs" not in given
        told = f"alpha {config.alpha:.4g}, temperature {config.temperature:.4g}, beta {config.beta:.4g} "
        told += f"from {choice.source}; {config.epochs} epochs"
        print(fold(f"{told}{', as in the search: --epochs gives the run others' if as_searched else ''}"), flush=True)
    else:
        config = TrainConfig(**given)
    return config, check_writable(outputs / "runs" / (name or config.run_name())), None


def train(
    config: TrainConfig, folder: Path, checkpoint: Path | None, fresh: bool, trackers: list[Tracker] | None
) -> dict[str, Any]:
    """Do the run, or the rest of it, and return its result. Ends the program where that cannot be."""

    def go_on() -> str:
        if any((folder / "checkpoints").glob("epoch-*.pt")):
            return f"go on with: {shlex.join([*this_command(), '--resume', str(folder)])}"
        return "give the same command again: no checkpoint has been saved yet"

    other_work = OtherWork()
    with ExitStack() as held:
        try:
            with one_sentence_errors("train.py"), waiting("loading PyTorch and the images"):
                from byot.data import check_dataset
                from byot.runs import open_run, read_result, train_and_test
                from byot.system.distributed import joined_processes
                from byot.trainer import choose_device

                processes = held.enter_context(joined_processes(config.device))
                if fresh and processes.is_first and folder.exists():
                    choose_device(config.device)  # before anything is moved: with these no run could start
                    check_dataset(config.dataset, config.data_dir, config.image_size)
                    with lock_folder(folder):
                        print(f"what was in {folder} is now in {set_aside(folder)}")
                result = processes.broadcast(read_result(config, folder) if processes.is_first else None)
                if result is not None:
                    print(f"{folder} is finished already; --name or --fresh starts another run with these settings")
                    return result
                if processes.is_first:
                    held.enter_context(lock_folder(folder))
                if trackers is None:
                    trackers = trackers_of(folder)
                    check_trackers(trackers)
                asked = Trackers(trackers, partial(tell, "train.py"))
                run = open_run(config, folder, checkpoint, processes, asked)
            start = f"going on from {run.resumed_from}" if run.resumed_from else "starting"
            precision = "bf16" if run.trainer.autocast_dtype else "fp32"
            among = f", {processes.count} processes" if processes.count > 1 else ""
            told = f"{start}: {config.model} width {config.width} on {config.dataset}, "
            told += f"{len(run.trainer.train_images)} training images, {config.epochs} epochs, "
            print(fold(f"{told}{run.trainer.device.type}, {precision}{among}"), folder, sep="\n", flush=True)
            if processes.is_first and run.trainer.device.type == "cpu":
                import torch

                if advice := advise_threads(torch.get_num_threads(), other_work.cores()):
                    tell("train.py", advice)
            stop_asked = held.enter_context(catch_stop_signals())
            if not processes.is_first:
                return train_and_test(run, stop_asked=stop_asked)
            with show_progress(config, run.trainer.epoch) as (on_batch, on_epoch):
                return train_and_test(run, on_batch, on_epoch, stop_asked)
        except StoppedError as stopped:
            print(f"\nstopped and saved; {go_on()}", file=sys.stderr)
            raise SystemExit(128 + stopped.signal_number) from None
        except KeyboardInterrupt:
            print(f"\nstopped; {go_on()}", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None
        except TrainingError as error:
            tell("train.py", str(error))
        except BrokenPipeError:  # nobody reads what is printed any more: see one_sentence_errors
            raise
        except OSError as error:  # a full disk, most often; what was saved before is whole
            tell("train.py", f"{describe_refusal(error, folder)}; once it can, {go_on()}")
    raise SystemExit(1)


@contextmanager
def first_refuses() -> Iterator[None]:
    """Let the first process refuse a command in the name of all: torchrun ends the others when it has ended.

    If this process alone has to refuse, for example a folder that its machine lacks, it says so after a while.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    except SystemExit as refusal:
        if refusal.code:
            time.sleep(FIRST_SPEAKS_WITHIN_S)  # torchrun ends this process meanwhile
        print(said.getvalue(), end="", file=sys.stderr)
        raise


def main() -> None:
    is_first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started; it speaks for all
    with open(os.devnull, "w") as nowhere, nullcontext() if is_first else redirect_stdout(nowhere):
        with nullcontext() if is_first else first_refuses():
            arguments = build_parser().parse_args()
            with one_sentence_errors("train.py"):
                config, folder, checkpoint = plan_run(arguments)
                if arguments.threads is not None:
                    import torch

                    torch.set_num_threads(arguments.threads)
                if arguments.dry_run:
                    from byot.dry_run import describe_run

                    try:
                        print(describe_run(config))
                    except TrainingError as error:
                        tell("train.py", str(error))
                        raise SystemExit(1) from None
                    return
        result = train(config, folder, checkpoint, arguments.fresh, arguments.track)
        print(f"\ntest set, {result['num_test_images']} images, after epoch {config.epochs}")
        print(classifier_table(result, "test"))
        name = shlex.quote(folder.name if folder.parent == default_outputs() / "runs" else str(folder))
        exits = [f"byot/evaluate.py {name} --exits"] if config.num_classifiers > 1 else []
        scripts = [*exits, f"byot/predict.py {name} photo.jpg", f"analysis/report.py --run {name}"]
        print("", *(as_called(f"python {script}") for script in scripts), sep="\n")


if __name__ == "__main__":
    main()
