"""Search alpha, temperature and beta of self distillation with Optuna on Ray Tune.

  python search/tune.py --model resnet18                    on CIFAR-100, on every GPU there is
  python search/tune.py --dataset digits --width 16 --epochs 20
  python search/tune.py --model resnet18 --resume           go on after a stop or a crash, or with more --num-samples

The search sees the training images only: a tenth of them, stratified, is held out to compare trials. The setting of
the reference implementation is always tried first and deep supervision alone (alpha = beta = 0) second. At the end
both and the best others are run again over fresh seeds, at most --confirm-seeds, and a verdict says whether one is
better than the others. Everything is left in outputs/searches/NAME. The same command goes on with its own search,
--fresh starts it anew.
"""

from importlib.util import find_spec

if find_spec("byot") is None:
    raise SystemExit("byot is not installed for this Python: activate its .venv, or pip install -r requirements.txt")

from contextlib import ExitStack

from byot.config import TrainConfig, recipe_defaults
from byot.console import waiting
from byot.system.files import describe_refusal
from byot.system.flags import Parser, add_settings, one_sentence_errors, tell
from search.settings import VAL_FRACTION, SearchSettings
from search.space import DEFAULT_SPACE


def build_parser() -> Parser:
    parser = Parser(prog="tune.py", description=__doc__)
    parser.add_argument("--name", help="folder of the search (default: made from model, width, data set and epochs)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on with the named search, else the newest unfinished")
    start_anew = "start anew; what the search's folder held is moved to searches/replaced/"
    start.add_argument("--fresh", action="store_true", help=start_anew)
    parser.add_argument(
        "--retry-failed", action="store_true", help="run failed trials again, except those that diverged"
    )
    parser.add_argument(
        "--space",
        metavar="FILE",
        help="TOML file: a table with low, high and perhaps log, or with choices, for any of alpha, temperature, beta, "
        "lr, weight_decay, label_smoothing, teacher",
    )
    parser.add_argument("--address", help="address of a running Ray cluster, or auto (default: this machine alone)")
    parser.add_argument("--outputs", metavar="DIR", help="where runs and searches are kept (default: outputs/)")
    parser.add_argument(
        "--storage-path",
        metavar="DIR or URL",
        help="where this search is kept (default: OUTPUTS/searches); or an object store's URL, such as "
        "s3://BUCKET/FOLDER: its records are then in OUTPUTS/searches as well",
    )
    add_settings(parser, SearchSettings)
    searched = dict.fromkeys(DEFAULT_SPACE, "searched")
    defaults = {"val_fraction": VAL_FRACTION, **recipe_defaults("trial_epochs"), **searched}
    add_settings(parser, TrainConfig, omit=("batch_norm",), defaults=defaults)
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    try:
        with ExitStack() as held:
            with one_sentence_errors("tune.py"), waiting("loading PyTorch, Ray and the images"):
                from search.driver import run_search
                from search.plan import make_plan

                plan = make_plan(arguments, held)
            raise SystemExit(run_search(plan))
    except OSError as error:  # a full disk, most often
        tell("tune.py", describe_refusal(error, "the search's folder"))
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
