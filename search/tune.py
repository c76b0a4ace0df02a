"""Search alpha, temperature and beta of self distillation with Optuna on Ray Tune.

  python search/tune.py --model resnet18                    on CIFAR-100, on every GPU there is
  python search/tune.py --model resnet18 --dataset digits --width 16 --epochs 20
  python search/tune.py --model resnet18 --resume           go on after a stop or a crash, or with more --num-samples

The search sees the training images only: a tenth of them, stratified, is held out to compare trials. The setting of
the reference implementation is always tried first and deep supervision alone (alpha = beta = 0) second.
Everything is left in outputs/searches/NAME. The same command goes on with its own search, --fresh starts it anew.
"""

import argparse
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from byot.config import NOT_IDENTITY, RECIPES, TrainConfig, known_settings, recipe_defaults
from byot.search_files import load_confirmation
from byot.system.files import describe_refusal, errors_in, set_aside
from byot.system.flags import Parser, add_settings, flag_name, given_settings, one_sentence_errors
from byot.system.lock import LOCK_FILE, lock_folder
from byot.system.paths import absolute_path, check_name, check_writable, outputs_folder
from search.records import find_search, load_search
from search.settings import FRESH_SEEDS, SearchSettings
from search.space import DEFAULT_SPACE, Space, read_space, space_from_dict, space_to_dict
from search.system.remote import COPY_OF, Bucket, Kept, KeptInBucket, copied_from, is_url, open_bucket

if TYPE_CHECKING:  # importing them at once would cost every `--help`
    from search.driver import SearchData, SearchPlan
    from search.system.resources import Share, Slots
    from search.warm import WarmStart

SEARCHED = ("alpha", "temperature", "beta")
# What may change from one part of a search to the next.
FREE = (
    *NOT_IDENTITY,
    *("num_samples", "time_budget", "max_concurrent", "gpus_per_trial", "trials_per_gpu", "cpus_per_trial"),
    *("confirm", "confirm_seeds"),
)
VAL_FRACTION = 0.1


def build_parser() -> Parser:
    parser = Parser(prog="tune.py", description=__doc__)
    parser.add_argument("--name", help="folder of the search (default: made from model, width, data set and epochs)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on with the named search, else the newest unfinished")
    start_anew = "start anew; what the search's folder held is moved to searches/replaced/"
    start.add_argument("--fresh", action="store_true", help=start_anew)
    parser.add_argument("--retry-failed", action="store_true", help="going on, try again what failed but diverged not")
    parser.add_argument(
        "--space",
        metavar="FILE",
        help="TOML file: a table with low, high and log for each of alpha, temperature, beta, lr, weight_decay, "
        "label_smoothing",
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
    defaults = {"val_fraction": VAL_FRACTION, **recipe_defaults("trial_epochs")}
    add_settings(parser, TrainConfig, omit=(*SEARCHED, "batch_norm"), defaults=defaults)
    return parser


def trial_settings(given: dict[str, Any]) -> TrainConfig:
    """The settings of the trials, those given laid over what a search has where none are."""
    base = TrainConfig(**{"val_fraction": VAL_FRACTION, **given})
    return base if "epochs" in given else base.with_settings(epochs=RECIPES[base.recipe].trial_epochs)


def plan_search(arguments: argparse.Namespace, searches: Path) -> tuple[Path, TrainConfig, SearchSettings, Space]:
    """The folder, the trials' settings, the search's settings and the space.

    A search that is there already goes on as it was started; a flag that says otherwise raises ValueError.
    """
    given = given_settings(arguments, TrainConfig)
    if "data_dir" in given:
        given["data_dir"] = str(absolute_path(given["data_dir"]))
    base = trial_settings(given)
    if base.loss_form == "plain":
        raise ValueError("loss_form plain has no weights to search: it is one run of byot/train.py")
    if base.val_fraction == 0:
        raise ValueError("val_fraction must be above 0 in a search: trials are compared on the images held out")
    given_search = given_settings(arguments, SearchSettings)
    settings = SearchSettings(**given_search)
    given_search = {name: value for name, value in settings.to_dict().items() if name in given_search}
    space = DEFAULT_SPACE if arguments.space is None else read_space(absolute_path(arguments.space))
    if arguments.resume:
        folder = _find_resumable(searches, arguments.name, given)
        search = load_search(folder)
        asked = {**given, **given_search, **({} if arguments.space is None else {"space": space_to_dict(space)})}
    else:
        folder = searches / check_name(default_name(base) if arguments.name is None else arguments.name)
        if arguments.fresh or is_new(folder):
            return folder, base, settings, space
        if not any((folder / name).exists() for name in ("search.json", "state/search.json", "trials")):
            raise ValueError(f"{folder} exists and holds no search: choose another --name")
        try:
            search = load_search(folder)
        except ValueError as error:
            print(f"tune.py: {error}: its settings are taken from this command", file=sys.stderr)
            return folder, base, settings, space
        asked = {**base.to_dict(), **settings.to_dict(), "space": space_to_dict(space)}
    return folder, *_as_recorded(folder, search, asked, {**given, **given_search})


def default_name(base: TrainConfig) -> str:
    return f"{base.model}-w{base.width}-{base.dataset}-e{base.epochs}"


def is_new(folder: Path) -> bool:
    """Whether nothing but a lock, or the name of what it is to be a copy of, is in a search's folder."""
    return not folder.exists() or all(path.name in (LOCK_FILE, COPY_OF) for path in folder.iterdir())


def fetch_search(arguments: argparse.Namespace, searches: Path, bucket: Bucket, held: ExitStack) -> None:
    """Copy what an object store has of the search that is meant; its name goes to `arguments`, its lock to `held`."""
    given = given_settings(arguments, TrainConfig)
    if arguments.name is None and arguments.resume:
        arguments.name = _newest_in_bucket(bucket, given)
    elif arguments.name is None:
        arguments.name = default_name(trial_settings(given))
    folder = searches / check_name(arguments.name)
    if arguments.fresh:
        return
    held.enter_context(lock_folder(folder))
    KeptInBucket(bucket, folder).fetch()
    if arguments.resume and is_new(folder):
        raise ValueError(f"there is no search {arguments.name} in {bucket}")


def _newest_in_bucket(bucket: Bucket, given: dict[str, object]) -> str:
    """The name of the newest unfinished search of this model and data set."""
    with TemporaryDirectory() as looked_at:
        for name in filter(_is_name, bucket.folders()):
            _fetch_records(bucket, name, ("search.json", "state/search.json", "confirmation.json"), Path(looked_at))
        return _find_resumable(Path(looked_at), None, given, where=str(bucket)).name


def _is_name(text: str) -> bool:
    try:
        check_name(text)
    except ValueError:
        return False
    return True


def _fetch_records(bucket: Bucket, name: str, records: tuple[str, ...], folder: Path) -> None:
    """Copy these of a search's records, those that there are, to a folder of that name."""
    for record in records:
        with suppress(FileNotFoundError):
            bucket.fetch([f"{name}/{record}"], folder)


def _as_recorded(
    folder: Path, search: dict[str, Any], asked: dict[str, Any], given: dict[str, Any]
) -> tuple[TrainConfig, SearchSettings, Space]:
    """The settings a search was started with, but for the flags that are given and may change."""
    with errors_in(folder / "search.json"):
        recorded_base = TrainConfig.from_dict(search.get("config"))
        recorded_settings = SearchSettings(**known_settings(SearchSettings, search.get("settings")))
        space = space_from_dict(search.get("space"))
    recorded = {**recorded_base.to_dict(), **recorded_settings.to_dict(), "space": space_to_dict(space)}
    changed = [name for name, value in asked.items() if name not in FREE and value != recorded[name]]
    if changed:
        said = ", ".join(f"{flag_name(name)} {_as_typed(recorded[name])}" for name in changed)
        raise ValueError(
            f"the search {folder.name} was started with {said} and can only go on so: "
            "another --name or --fresh starts another search"
        )
    free = {name: value for name, value in given.items() if name in FREE}
    base = recorded_base.with_settings(**{n: v for n, v in free.items() if hasattr(recorded_base, n)})
    kept = {**recorded_settings.to_dict(), "time_budget": None}
    settings = SearchSettings(**{**kept, **{n: v for n, v in free.items() if n in kept}})
    if settings.num_samples < recorded_settings.num_samples:
        raise ValueError(
            f"the search {folder.name} was started with --num-samples {recorded_settings.num_samples}, "
            f"which can grow but not shrink to {settings.num_samples}"
        )
    return base, settings, space


def _as_typed(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def check_seeds(base: TrainConfig, settings: SearchSettings) -> None:
    """Raise ValueError if some run of the search would have a seed too large."""
    base.with_settings(seed=base.seed + settings.seeds_per_trial - 1)
    if settings.confirm is not None:
        last = FRESH_SEEDS + settings.confirm_seeds - 1
        base.with_settings(seed=base.seed + last, split_seed=base.split_seed + last)


def find_warm_start(
    searches: Path,
    folder: Path,
    base: TrainConfig,
    settings: SearchSettings,
    space: Space,
    *,
    is_new: bool,
    bucket: Bucket | None = None,
) -> "WarmStart | None":
    """What the search was started with, or is to be. Raises ValueError where that is lost, or nothing is there.

    An earlier search that is not here is looked for in the object store.
    """
    if settings.warm_start is None:
        return None
    from search.warm import FILE, load_warm_start, make_warm_start

    if is_new or find_search(folder) is None:
        with TemporaryDirectory() as looked_at:
            here = (searches / settings.warm_start).exists()
            if bucket is not None and not here and _is_name(settings.warm_start):
                _fetch_records(bucket, settings.warm_start, ("search.json", "trials.csv"), Path(looked_at))
                if any(Path(looked_at).iterdir()):
                    searches = Path(looked_at)
            return make_warm_start(searches, settings.warm_start, base, settings, space)
    found = load_warm_start(folder, space, settings.metric)
    if found is None:
        raise ValueError(f"{folder / FILE} is missing: without it the search cannot go on as it was started; --fresh")
    return found


def _is_unfinished(folder: Path, search: dict[str, Any]) -> bool:
    """Whether trials, or runs over fresh seeds that were asked for, are still to be done."""
    if search.get("status") != "finished":
        return True
    settings = search.get("settings")
    if not isinstance(settings, dict) or settings.get("confirm") is None:
        return False
    try:
        confirmation = load_confirmation(folder)
    except ValueError:
        return True
    return confirmation is None or confirmation["status"] != "finished"


def _find_resumable(searches: Path, name: str | None, given: dict[str, object], where: str = "") -> Path:
    """The named search, else the newest unfinished one of this model and data set; a person knows it as `where`."""
    if name is not None:
        if not (searches / check_name(name)).is_dir():
            raise ValueError(f"there is no search {name} in {searches}")
        return searches / name
    found = []
    for path in searches.glob("*/search.json"):
        try:
            if copied_from(path.parent):  # what it is a copy of goes on with its URL alone
                continue
            search = load_search(path.parent)
        except ValueError:  # damaged past repair; naming it says so
            continue
        config = search.get("config")
        same = isinstance(config, dict) and all(config.get(k) == given[k] for k in ("model", "dataset") if k in given)
        if same and _is_unfinished(path.parent, search):
            found.append((str(search.get("started_at")), path.parent))
    if not found:
        raise ValueError(
            f"no unfinished search is in {where or searches}; name one with --name, or start one without --resume"
        )
    return max(found)[1]


class Prepared(NamedTuple):
    """A search of which all is known that it takes to start it."""

    plan: "SearchPlan"
    data: "SearchData"
    room: "Slots | Share"


def prepare(
    arguments: argparse.Namespace, searches: Path, bucket: Bucket | None, before: Prepared | None = None
) -> Prepared:
    """What the command line and the search's records ask for. `before`: what they did a moment ago.

    Raises ValueError for what cannot be done here.
    """
    folder, base, settings, space = plan_search(arguments, searches)
    if bucket is None and not arguments.fresh and (place := copied_from(folder)):
        raise ValueError(f"{folder} is a copy of {place}: go on with --storage-path and its URL")

    from byot.step import choose_mode
    from byot.system.distributed import ALONE
    from byot.trainer import choose_device
    from search.driver import SearchPlan, load_search_data
    from search.system.resources import Share, share_machine

    # A cluster's resources are known only once Ray has connected to it.
    asked = Share(settings.cpus_per_trial, settings.gpus_asked_for, settings.max_concurrent)
    slots = share_machine(asked, base.device) if arguments.address is None else None
    if slots is not None:
        choose_mode(base.acceleration, choose_device(base.device), ALONE)
    check_seeds(base, settings)
    data = load_search_data(base) if before is None or before.plan.base != base else before.data
    warm = find_warm_start(searches, folder, base, settings, space, is_new=arguments.fresh, bucket=bucket)
    plan = SearchPlan(folder, base, settings, space, arguments.address, arguments.retry_failed, warm)
    return Prepared(plan, data, slots or asked)


def check_going_on(prepared: Prepared) -> None:
    """Raise ValueError if a search cannot go on so, as far as a copy of its records tells."""
    from search.driver import check_num_samples, check_same_search, read_records

    plan = prepared.plan._replace(recorded=find_search(prepared.plan.folder))
    check_same_search(plan, prepared.data)
    check_num_samples(plan, read_records(plan))


def take_over(bucket: Bucket, folder: Path, held: ExitStack, *, fresh: bool) -> Kept:
    """Let this process drive the search that an object store keeps; `held` is told to let it go.

    Its folder is then a copy of what no other driver changes any more. Raises ValueError where nothing can be written
    there.
    """
    kept = KeptInBucket(bucket, folder)
    try:
        if told := kept.take_over():
            print(f"tune.py: {told}", file=sys.stderr)
        held.callback(kept.let_go)
        if fresh and (aside := kept.set_aside()):
            print(f"what was in {kept.bucket} is now in {aside}")
        if not fresh:
            kept.fetch()
    except OSError as error:
        raise ValueError(describe_refusal(error, str(kept.bucket))) from error
    return kept


def main() -> None:
    arguments = build_parser().parse_args()
    try:
        with ExitStack() as held:
            raise SystemExit(search(arguments, held))
    except OSError as error:  # a full disk, most often
        reason = describe_refusal(error, "the search's folder")
        print(f"tune.py: {reason}", file=sys.stderr)
        raise SystemExit(1) from None


def search(arguments: argparse.Namespace, held: ExitStack) -> int:
    """Do what the command line says; the lock of the search's folder goes to `held`. Returns the exit code."""
    with one_sentence_errors("tune.py"):
        if arguments.address is not None and not arguments.address.strip():
            raise ValueError("--address must be auto or the address of a Ray cluster, such as 10.0.0.1:6379")
        outputs = outputs_folder(arguments.outputs)
        bucket = open_bucket(arguments.storage_path) if is_url(arguments.storage_path) else None
        in_folder = bucket is None and arguments.storage_path is not None
        searches = check_writable(arguments.storage_path if in_folder else outputs / "searches")
        if bucket is not None:
            fetch_search(arguments, searches, bucket, held)
        prepared = prepare(arguments, searches, bucket)

        from search.driver import check_same_search, run_search

        folder, kept = prepared.plan.folder, Kept()
        if arguments.fresh and folder.exists():
            with lock_folder(folder):
                print(f"what was in {folder} is now in {set_aside(folder)}")
        if bucket is None or arguments.fresh:
            held.enter_context(lock_folder(folder))
        if bucket is not None:
            if not arguments.fresh:  # a command that is refused must end nobody's search
                check_going_on(prepared)
            kept = take_over(bucket, folder, held, fresh=arguments.fresh)
            if not arguments.fresh:  # by now another driver may have done more
                prepared = prepare(arguments, searches, bucket, prepared)
        plan = prepared.plan._replace(recorded=find_search(folder), kept=kept)
        check_same_search(plan, prepared.data)
    return run_search(plan, prepared.data, prepared.room)


if __name__ == "__main__":
    main()
