"""Decides on a search, once: from its command line, from what is recorded of it, and from what this machine has."""

import argparse
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from byot.config import NOT_IDENTITY, RECIPES, TrainConfig
from byot.data import LabelledImages, load_images, split_validation
from byot.runs import StopAsked
from byot.search_files import (
    CONFIRMATION,
    LAST_COLUMNS,
    SEARCHABLE,
    SearchRecord,
    Space,
    list_searches,
    load_confirmation,
    load_search,
    space_to_dict,
)
from byot.system.distributed import ALONE
from byot.system.files import UnreadableError, errors_in, refusals_at, set_aside
from byot.system.flags import flag_name, given_settings, tell
from byot.system.lock import LOCK_FILE, is_locked, lock_folder
from byot.system.paths import absolute_path, check_name, check_writable, outputs_folder
from byot.tracking import check_trackers
from byot.trainer import choose_device, records_graphs
from search.records import KEPT, SearchRecords
from search.settings import FRESH_SEEDS, VAL_FRACTION, SearchSettings
from search.space import DEFAULT_SPACE, choose_space, read_point
from search.system.remote import COPY_OF, Bucket, Store, copied_from, open_bucket
from search.system.resources import ResourceRequest, Resources, resolve, this_machine
from search.warm import WARM_START, WarmStart, load_warm_start, make_warm_start

# What may change from one part of a search to the next.
MAY_CHANGE = (
    *NOT_IDENTITY,
    *("num_samples", "time_budget", "max_concurrent", "gpus_per_trial", "cpus_per_trial"),
    *("confirm", "confirm_seeds", "margin", "track"),
)


class SearchPlan(NamedTuple):
    """A search that is to start or to go on, with all it takes."""

    store: Store
    base: TrainConfig  # the settings that are not searched
    settings: SearchSettings
    space: Space
    train: LabelledImages
    val: LabelledImages
    resources: Resources | None  # None: known once Ray has joined the cluster
    address: str | None = None  # of a Ray cluster; None: this machine
    retry_failed: bool = False
    warm: WarmStart | None = None
    recorded: SearchRecord | None = None  # what search.json says; None: new, or nothing can be read of it

    @property
    def folder(self) -> Path:
        return self.store.folder


class Session(NamedTuple):
    """A search that runs: its plan, what each of its trials gets, its records, and when it has to stop."""

    plan: SearchPlan
    resources: Resources
    records: SearchRecords
    stop_asked: StopAsked
    deadline: float | None  # on the monotonic clock


def make_plan(arguments: argparse.Namespace, held: ExitStack) -> SearchPlan:
    """Decide on the search that the command line means; its lock, and its lease in an object store, go to `held`.

    Raises ValueError for what cannot be done here. Nothing is set aside and no lease is taken until the plan is whole;
    it is made again only where another driver changed the search meanwhile.
    """
    if arguments.address is not None and not arguments.address.strip():
        raise ValueError("--address must be auto or the address of a Ray cluster, such as 10.0.0.1:6379")
    given = given_settings(arguments, TrainConfig)
    if "data_dir" in given:
        given["data_dir"] = str(absolute_path(given["data_dir"]))
    outputs = outputs_folder(arguments.outputs)
    place = arguments.storage_path
    bucket = open_bucket(place) if place is not None and "://" in place else None
    searches = check_writable(outputs / "searches" if bucket or place is None else place)
    store = Store(searches / _choose_name(arguments, given, searches, bucket), bucket, KEPT)
    held.enter_context(lock_folder(store.folder))
    if running := [
        folder.name for folder in sorted(searches.iterdir()) if folder != store.folder and is_locked(folder)
    ]:
        tell("tune.py", f"also running here: {', '.join(running)}; the searches share the machine")
    if not arguments.fresh:
        store.pull()
    plan = _decide(arguments, given, store, bucket)
    with refusals_at(str(store)):
        if _take(plan, held, fresh=arguments.fresh):
            plan = _decide(arguments, given, store, bucket)
    return plan


def _take(plan: SearchPlan, held: ExitStack, *, fresh: bool) -> bool:
    """Set aside what a fresh start replaces, and take the lease in the object store.

    Returns whether another driver has changed the search since it was planned.
    """
    store = plan.store
    if fresh and any(path.name != LOCK_FILE for path in store.folder.iterdir()):
        print(f"what was in {store.folder} is now in {set_aside(store.folder)}")
        held.enter_context(lock_folder(store.folder))
    if told := held.enter_context(store.lease()):
        tell("tune.py", told)
    if aside := store.set_aside(leftovers=not fresh):
        print(f"what was in {store} is now in {aside}")
    if store.bucket is None or fresh:
        return False
    store.pull()
    recorded = None
    with suppress(UnreadableError):
        recorded = load_search(store.folder)
    return recorded != plan.recorded


# ---------------------------------------------------------------- which search


def _choose_name(arguments: argparse.Namespace, given: dict[str, Any], searches: Path, bucket: Bucket | None) -> str:
    if arguments.name is not None:
        return check_name(arguments.name)
    if not arguments.resume:
        base = trial_settings(given)
        return f"{base.model}-w{base.width}-{base.dataset}-e{base.epochs}"
    if bucket is None:
        return newest_unfinished(searches, given, str(searches))
    wanted = ("search.json", "state/search.json", "best.json", CONFIRMATION)
    records = [name for name in bucket.files() if name.partition("/")[2] in wanted]
    with TemporaryDirectory() as looked_at:
        bucket.fetch(records, Path(looked_at))
        return check_name(newest_unfinished(Path(looked_at), given, str(bucket)))


def newest_unfinished(searches: Path, given: dict[str, Any], where: str) -> str:
    """Return the name of the unfinished search of this model and data set that was started last.

    A copy of a search that is kept in an object store does not count: it goes on with --storage-path and its URL.
    """
    found = [
        (str(search.fields.get("started_at")), folder.name)
        for folder, search in list_searches(searches)
        if not (folder / COPY_OF).exists()
        and all(getattr(search.config, name) == given[name] for name in ("model", "dataset") if name in given)
        and _is_unfinished(folder, search)
    ]
    if not found:
        raise ValueError(f"no unfinished search is in {where}; name one with --name, or start one without --resume")
    return max(found)[1]


def _is_unfinished(folder: Path, search: SearchRecord) -> bool:
    """Check whether trials, or runs over fresh seeds that were asked for, are still to be done."""
    if search.status != "finished":
        return True
    if not search.settings["confirm"] or not (folder / "best.json").is_file():  # no trial reached its last epoch
        return False
    try:
        confirmation = load_confirmation(folder)
    except ValueError:
        return True
    return confirmation is None or confirmation.status != "finished"


def is_new(folder: Path) -> bool:
    """Check that a folder holds no search: nothing, or only what a search leaves that was killed before it began."""
    before = (LOCK_FILE, COPY_OF, WARM_START, "search.log")
    return all(path.name in before or path.suffix == ".tmp" or path.is_dir() for path in folder.rglob("*"))


# ---------------------------------------------------------------- with which settings


def trial_settings(given: dict[str, Any]) -> TrainConfig:
    """Return the settings of the trials: those given, else what a search has."""
    base = TrainConfig(**{"val_fraction": VAL_FRACTION, **given})
    return base if "epochs" in given else base.with_settings(epochs=RECIPES[base.recipe].trial_epochs)


def _decide(arguments: argparse.Namespace, given: dict[str, Any], store: Store, bucket: Bucket | None) -> SearchPlan:
    """Decide on all but the lease. Raises ValueError for what cannot be done."""
    folder, searches = store.folder, store.folder.parent
    base = trial_settings(given)
    if base.loss_form == "plain":
        raise ValueError("loss_form plain has no weights to search: it is one run of byot/train.py")
    if base.val_fraction == 0:
        raise ValueError("val_fraction must be above 0 in a search: trials are compared on the images held out")
    given_search = given_settings(arguments, SearchSettings)
    settings = SearchSettings(**given_search)
    path = None if arguments.space is None else absolute_path(arguments.space)
    space = choose_space(path, fixed=given)
    recorded = None
    if bucket is None and not arguments.fresh and (place := copied_from(folder)):
        raise ValueError(f"{folder} is a copy of {place}: go on with --storage-path and its URL")
    if not arguments.fresh and not is_new(folder):
        recorded = _load_record(folder, arguments.resume)
    elif arguments.resume:
        raise ValueError(f"there is no search {folder.name} in {bucket or searches}")
    if recorded is not None:
        asked = {**base.to_dict(), **settings.to_dict(), "space": space_to_dict(space)}
        named = {*given, *given_search, *(() if space == DEFAULT_SPACE else ("space",))}
        typed = {name: asked[name] for name in named}
        base, settings, space = _as_recorded(folder, recorded, typed if arguments.resume else asked, typed)
    _check_seeds(base, settings)
    check_trackers(settings.track)
    for point in settings.try_:
        read_point(point, space, base)
    resources = None
    if arguments.address is None:
        resources = resolve(resource_request(settings), *this_machine(base.device))
        check_gpus(base, resources)
        records_graphs(base.acceleration, choose_device(base.device if resources.gpus else "cpu"), ALONE)
    train, val = load_search_data(base)
    if recorded is not None:
        _check_images(folder, recorded, num_train_images=len(train.labels), num_val_images=len(val.labels))
    if not arguments.fresh:
        _check_trials(folder, settings, space)
    warm = None
    if settings.warm_start is not None and recorded is None:
        warm = _make_warm_start(settings.warm_start, base, settings, space, searches, bucket)
    elif settings.warm_start is not None:
        warm = load_warm_start(folder, space, settings.metric)
    return SearchPlan(
        store=store,
        base=base,
        settings=settings,
        space=space,
        train=train,
        val=val,
        resources=resources,
        address=arguments.address,
        retry_failed=arguments.retry_failed,
        warm=warm,
        recorded=recorded,
    )


def check_gpus(base: TrainConfig, resources: Resources) -> None:
    """Raise ValueError if trials are to train on CUDA and get no GPU."""
    if base.device == "cuda" and not resources.gpus:
        raise ValueError("device cuda needs a GPU for each trial, and they get none: see --gpus-per-trial")


def load_search_data(base: TrainConfig) -> tuple[LabelledImages, LabelledImages]:
    """Load the training images, cut in two; the test set is never opened. Raises ValueError for what is missing."""
    images = load_images(base.dataset, base.data_dir, "train", base.image_size)
    train, val = split_validation(images, fraction=base.val_fraction, seed=base.split_seed)
    assert val is not None
    return train, val


def resource_request(settings: SearchSettings) -> ResourceRequest:
    gpus = None if isinstance(settings.gpus_per_trial, str) else settings.gpus_per_trial
    return ResourceRequest(settings.cpus_per_trial, gpus, settings.max_concurrent)


def _load_record(folder: Path, resume: bool) -> SearchRecord | None:
    """Return what the search's folder says of it; None where that is lost and this command says it again."""
    if not any((folder / name).exists() for name in ("search.json", "state/search.json", "trials")):
        raise ValueError(f"{folder} exists and holds no search: choose another --name")
    try:
        return load_search(folder)
    except UnreadableError as error:
        if resume:
            raise
        tell("tune.py", f"{error}: its settings are taken from this command")
        return None


def _as_recorded(
    folder: Path, recorded: SearchRecord, asked: dict[str, Any], given: dict[str, Any]
) -> tuple[TrainConfig, SearchSettings, Space]:
    """Return the settings a search was started with, but for the flags that are given and may change.

    Raises ValueError where `asked` has something else.
    """
    with errors_in(folder / "search.json"):
        settings = SearchSettings.from_dict(recorded.settings)
    before = {**recorded.config.to_dict(), **settings.to_dict(), "space": space_to_dict(recorded.space)}
    changed = [name for name, value in asked.items() if name not in MAY_CHANGE and value != before[name]]
    if changed:
        values = {name: " ".join(v) if isinstance(v := before[name], list) else v for name in changed}
        said = ", ".join(
            f"no {flag_name(name)}" if value in (None, "") else f"{flag_name(name)} {value}"
            for name, value in values.items()
        )
        raise ValueError(
            f"the search {folder.name} was started with {said} and can only go on so: "
            "another --name or --fresh starts another search"
        )
    new = {name: value for name, value in given.items() if name in MAY_CHANGE}
    base = recorded.config.with_settings(**{name: new.pop(name) for name in NOT_IDENTITY if name in new})
    if new.get("num_samples", settings.num_samples) < settings.num_samples:
        raise ValueError(
            f"the search {folder.name} was started with --num-samples {settings.num_samples}, "
            f"which can grow but not shrink to {new['num_samples']}"
        )
    return base, replace(settings, **{"time_budget": None, **new}), recorded.space


# ---------------------------------------------------------------- checked


def _check_seeds(base: TrainConfig, settings: SearchSettings) -> None:
    """Raise ValueError if some run of the search would have a seed too large."""
    base.with_settings(seed=base.seed + settings.seeds_per_trial - 1)
    if settings.confirm:
        last = FRESH_SEEDS + settings.confirm_seeds - 1
        base.with_settings(seed=base.seed + last, split_seed=base.split_seed + last)


def _check_trials(folder: Path, settings: SearchSettings, space: Space) -> None:
    """Raise ValueError if the trials that are there are more than are asked for, or of another space."""
    number = len(list((folder / "trials").glob("t*")))
    if number > settings.num_samples:
        raise ValueError(f"{folder} has {number} trials already: give that --num-samples or more")
    if not (folder / "trials.csv").is_file():
        return
    with open(folder / "trials.csv", encoding="utf-8", errors="replace") as table:
        header = table.readline().strip().split(",")
    searched = [name for name in header if name in SEARCHABLE]
    if header[-1] == LAST_COLUMNS[-1] and searched != list(space):  # a torn header is made anew
        raise ValueError(f"the trials in {folder} are of another search space; give the --space it was started with")


def _check_images(folder: Path, recorded: SearchRecord, **found: int) -> None:
    """Raise ValueError if the search was started with other numbers of images."""
    for name, number in found.items():
        before = recorded.fields.get(name)
        if before != number:
            raise ValueError(
                f"the search {folder.name} was started with {name} {before}, the data set has {number} now; "
                "give the --data-dir it was started with"
            )


def _make_warm_start(
    earlier: str, base: TrainConfig, settings: SearchSettings, space: Space, searches: Path, bucket: Bucket | None
) -> WarmStart:
    """Make what the search is to be started with. Raises ValueError where there is nothing of it.

    An earlier search that is not here is looked for in the object store.
    """
    with TemporaryDirectory() as looked_at:
        if bucket is not None and not (searches / earlier).exists():
            with suppress(ValueError):  # the path of a folder is no name in the bucket
                records = [f"{check_name(earlier)}/{record}" for record in ("search.json", "trials.csv", CONFIRMATION)]
                bucket.fetch(records, Path(looked_at))
                if any(Path(looked_at).iterdir()):
                    searches = Path(looked_at)
        return make_warm_start(searches, earlier, base, settings, space)
