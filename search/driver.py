"""One search from its plan to its end: Ray started, the time estimated, the trials run, the result told."""

import io
import logging
import shlex
import shutil
import signal
import sys
import time
import warnings
from contextlib import nullcontext, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from byot.config import TrainConfig, work_after
from byot.data import LabelledImages, load_images, split_validation
from byot.runs import StopAsked
from byot.system.files import describe_refusal, remove_leftovers
from byot.system.flags import one_sentence_errors
from byot.system.provenance import find_commit, find_versions, provenance
from byot.system.stopping import StoppedError, catch_stop_signals
from search.messages import describe_confirmation, describe_time, verdict
from search.records import SearchRecords, now, save_search, table_columns
from search.settings import SearchSettings, choose_grace, share_of_gpu
from search.space import Space, first_points, space_to_dict
from search.system.remote import Kept
from search.system.resources import RayStartError, Share, Slots, check_nodes, describe_nodes, share, start_ray
from search.table import LiveTable

if TYPE_CHECKING:
    from search.callback import SearchWatch
    from search.race import Confirmation
    from search.trial import TrialSetup  # importing it imports Ray
    from search.warm import WarmStart


class SearchPlan(NamedTuple):
    """A search that is to start or to go on."""

    folder: Path
    base: TrainConfig  # the settings that are not searched
    settings: SearchSettings
    space: Space
    address: str | None  # of a Ray cluster; None: this machine
    retry_failed: bool = False
    warm: "WarmStart | None" = None
    recorded: dict[str, Any] | None = None  # what search.json said; None: new, or nothing can be read of it
    kept: Kept = Kept()  # where, if not in the folder alone


class SearchData(NamedTuple):
    train: LabelledImages
    val: LabelledImages


def load_search_data(base: TrainConfig) -> SearchData:
    """The training images, cut in two; the test set is never opened. Raises ValueError for what is missing."""
    images = load_images(base.dataset, base.data_dir, "train")
    train, val = split_validation(images, fraction=base.val_fraction, seed=base.split_seed)
    assert val is not None
    return SearchData(train, val)


def check_same_search(plan: SearchPlan, data: SearchData) -> None:
    """Raise ValueError if a search that is to go on would find other images or trials than those it has."""
    folder, asked = plan.folder, table_columns(list(plan.space))
    if (folder / "trials.csv").is_file():
        with open(folder / "trials.csv", encoding="utf-8", errors="replace") as table:
            header = table.readline().strip().split(",")
        whole = header[-1:] == asked[-1:]
        if whole and header != asked:
            raise ValueError(
                f"the trials in {folder} are of another search space; give the --space it was started with"
            )
    if plan.recorded is None:
        return
    found = {"num_train_images": len(data.train.labels), "num_val_images": len(data.val.labels)}
    for name, number in found.items():
        before = plan.recorded.get(name)
        if before != number:
            raise ValueError(
                f"the search {folder.name} was started with {name} {before}, the data set has {number} now; "
                "give the --data-dir it was started with"
            )


def read_records(plan: SearchPlan) -> SearchRecords:
    """What the search's folder holds of its trials."""
    for folder in (plan.folder, plan.folder / "state", *plan.folder.glob("trials/t*")):
        remove_leftovers(folder)
    return SearchRecords(
        plan.folder,
        parameters=list(plan.space),
        metric=plan.settings.main_metric,
        further_metrics=plan.settings.metric[1:],
        mode=plan.settings.mode,
        epochs=plan.base.epochs,
        seed=plan.base.seed,
        grace=choose_grace(plan.base, plan.settings, plan.recorded),
        work=partial(work_after, plan.base),
        kept=plan.kept,
    )


def check_num_samples(plan: SearchPlan, records: SearchRecords) -> None:
    """Raise ValueError if there are more trials than are asked for."""
    if len(records.rows) > plan.settings.num_samples:
        raise ValueError(f"{plan.folder} has {len(records.rows)} trials already: give that --num-samples or more")


def open_records(plan: SearchPlan) -> SearchRecords:
    """The same; what was found damaged is told, and what failed is to be tried again if that is asked for."""
    records = read_records(plan)
    for note in records.notes:
        print(f"tune.py: {note}", file=sys.stderr)
    if plan.retry_failed:
        print(f"{records.retry_failed()} failed trials are tried again")
    return records


def run_search(plan: SearchPlan, data: SearchData, room: Slots | Share) -> int:
    """Run a search, or the rest of it; the caller holds its folder's lock. Returns the exit code.

    0: finished; 1: it cannot go on, or no trial finished; 128 and the signal's number: stopped on the way. `room` is
    what is asked for where the resources are known only once Ray has joined the cluster.
    """
    try:
        records = open_records(plan)
        with one_sentence_errors("tune.py"):
            check_num_samples(plan, records)
        if plan.recorded is not None and is_complete(plan, records):
            records.search = plan.recorded
            records.write_tables()
            confirmation = find_confirmation(plan, data, records)
            if confirmation is not None:
                _record_settings(plan)
                if confirmation.judge().is_over and not confirmation.is_done:  # fewer are asked for than were run
                    confirmation.drop_checkpoints()
                    confirmation.save("finished")
            if confirmation is None or confirmation.is_done:
                print(f"{plan.folder} is finished already; --num-samples adds trials, --fresh starts it anew")
                return tell_result(plan, records)
        start_ray(room if isinstance(room, Slots) else None, plan.address)
        return _run_on_ray(plan, data, room, records)
    except RayStartError as error:
        print(f"tune.py: Ray did not start ({error})", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\nstopped; {_go_on(plan)}", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        print(f"tune.py: {describe_refusal(error, plan.folder)}; once it can, {_go_on(plan)}", file=sys.stderr)
    return 1


def _run_on_ray(plan: SearchPlan, data: SearchData, room: Slots | Share, records: SearchRecords) -> int:
    import ray  # once it is started, with its settings in the environment

    try:
        if isinstance(room, Slots):
            slots = room
        else:
            found = ray.cluster_resources()
            with one_sentence_errors("tune.py"):
                slots = share(room, int(found.get("CPU", 0)), int(found.get("GPU", 0)), "the cluster")
                check_nodes(plan.folder, slots, plan.kept.bucket)
        has_gpus = torch.cuda.is_available() or plan.address is not None
        if slots.gpus == 0 and has_gpus and plan.base.device in ("auto", "cuda"):
            plan = plan._replace(base=plan.base.with_settings(device="cpu"))  # a worker would see its node's GPUs
        if plan.settings.trials_per_gpu == "auto" and slots.num_gpus:
            slots = _share_by_measuring(plan, data, slots)
        _log_to_file(plan.folder / "search.log")
        budget_s = plan.settings.time_budget_s()
        deadline = None if budget_s is None else time.monotonic() + budget_s
        with catch_stop_signals() as stop_asked:  # after ray.init, which has a handler of its own
            code = 0
            if plan.recorded is None or not is_complete(plan, records):  # None: new, or only search.json is lost
                code = _run(plan, data, slots, records, deadline, stop_asked)
            confirmation = find_confirmation(plan, data, records) if code == 0 and is_complete(plan, records) else None
            if confirmation is not None and not confirmation.is_done:
                confirmation.drop_checkpoints()
                confirmation.origin = _origin(plan, slots)
                print(f"\n{describe_confirmation(confirmation, list(records.rows.values()), slots)}", flush=True)
                code = _confirm(plan, confirmation, slots, deadline, stop_asked)
        return code or tell_result(plan, records)
    finally:
        ray.shutdown()


def is_complete(plan: SearchPlan, records: SearchRecords) -> bool:
    """Whether all trials have ended."""
    return len(records.ended) >= plan.settings.num_samples


def find_confirmation(plan: SearchPlan, data: SearchData, records: SearchRecords) -> "Confirmation | None":
    """What is to be run again over fresh seeds, and what of it is done; None where there is nothing to run again."""
    if plan.settings.confirm is None or records.best() is None:
        return None
    from search.race import Confirmation

    rows = list(records.rows.values())
    return Confirmation(plan.folder, rows, plan.space, plan.base, plan.settings, len(data.val.labels), plan.kept)


def _record_settings(plan: SearchPlan) -> None:
    """Let search.json know what is to be confirmed, before anything of it is done."""
    if plan.recorded is not None and plan.recorded.get("settings") != plan.settings.to_dict():
        save_search(plan.folder, plan.recorded | {"settings": plan.settings.to_dict()}, plan.kept)


def _origin(plan: SearchPlan, slots: Slots) -> dict[str, Any]:
    """Commit, versions and hardware for a record."""
    record = provenance(torch.device("cuda" if slots.gpus and torch.cuda.is_available() else "cpu"))
    if plan.address is not None:  # the driver's machine may have no GPU
        record["hardware"] |= describe_nodes(slots)
    return record


def _confirm(
    plan: SearchPlan, confirmation: "Confirmation", slots: Slots, deadline: float | None, stop_asked: StopAsked
) -> int:
    """Run the best again over fresh seeds; returns the exit code."""
    from search.race import confirm

    try:
        is_over, trouble = confirm(confirmation, slots, stop_asked, deadline)
    except StoppedError as stopped:
        print(f"stopped; {_go_on(plan)}", flush=True)
        return 128 + stopped.signal_number
    if trouble:
        print(f"tune.py: {trouble}; when that is mended, {_go_on(plan)}", file=sys.stderr)
        return 1
    if not is_over:
        print(f"{plan.settings.time_budget} are over; {_go_on(plan)}", flush=True)
    return 0


def _share_by_measuring(plan: SearchPlan, data: SearchData, slots: Slots) -> Slots:
    """Put so many trials on each GPU as are quickest together; says what was measured."""
    from search.probe import best_number, find_trials_per_gpu
    from search.trial import TrialSetup

    setup = TrialSetup(plan.base, plan.folder, plan.settings.main_metric, slots.cpus, timed=None)
    found = find_trials_per_gpu(setup, data.train, slots.cpus, slots.num_cpus)
    best = best_number(found)
    told = ", ".join(f"{images_per_s:.0f} with {trials}" for trials, images_per_s in found)
    print(f"{best} trials a GPU (images/s in all: {told})", flush=True)
    asked = Share(slots.cpus, share_of_gpu(best), plan.settings.max_concurrent)
    return share(asked, slots.num_cpus, slots.num_gpus, "the machine")


def _run(
    plan: SearchPlan,
    data: SearchData,
    slots: Slots,
    records: SearchRecords,
    deadline: float | None,
    stop_asked: StopAsked,
) -> int:
    """Run the trials; returns the exit code."""
    from search.trial import TrialSetup

    folder, base, settings, space = plan.folder, plan.base, plan.settings, plan.space
    is_new = plan.recorded is None
    setup = TrialSetup(
        base,
        folder / "trials",
        settings.main_metric,
        slots.cpus,
        timed=records.next_id if is_new else None,
        num_seeds=settings.seeds_per_trial,
        place=plan.kept.place(folder / "trials"),
    )
    record = dict(plan.recorded or {})
    record |= {
        "name": folder.name,  # it may have been moved
        "status": "running",
        "started_at": record.get("started_at", now()),
        "finished_at": None,
        "config": base.to_dict(),
        "settings": settings.to_dict(),
        "space": space_to_dict(space),
        "metric": settings.main_metric,
        "mode": settings.mode,
        "num_samples": settings.num_samples,
        "grace_epochs": records.grace,
        "max_concurrent": slots.max_concurrent,
        "num_train_images": len(data.train.labels),
        "num_val_images": len(data.val.labels),
    }
    if is_new and plan.warm is not None:
        plan.kept.put(plan.warm.save(folder))
        record |= {"warm_start": plan.warm.search}
    if is_new:
        record |= _origin(plan, slots)
    else:
        record |= {"commit": find_commit(), "versions": find_versions()}
    save_search(folder, record, plan.kept)
    records.search = record
    records.write_tables()
    print(f"search {folder.name}: {settings.num_samples} trials of {base.model} width {base.width} on {base.dataset}")
    where = plan.kept.bucket or folder
    print(f"{len(data.train.labels)} images to train on, {len(data.val.labels)} to compare on, {where}", flush=True)
    if is_new and plan.warm is not None:
        print(plan.warm.describe(), flush=True)
    if not is_new:
        print(
            f"{len(records.ended)} trials have ended, {len(records.unfinished)} go on from their checkpoints, "
            f"{settings.num_samples - len(records.rows)} are to come",
            flush=True,
        )
    live = LiveTable()
    while True:
        before = len(records.ended)
        watch = _fit(plan, data, slots, setup, records, live, deadline, stop_asked)
        setup = setup._replace(timed=None)
        missing = settings.num_samples - len(records.ended)
        # Some may be missing because their worker died before they began: as long as others end, they are begun again.
        if missing <= 0 or watch.has_to_stop() or len(records.ended) == before:
            break
    finished = missing <= 0 or (watch.out_of_time() and not watch.trouble and not stop_asked())
    if not watch.trouble:  # with it the store may be what is gone
        for row in records.unfinished:
            plan.kept.fetch_run(records.trial_folder(row["trial_id"]))
    with suppress(OSError) if watch.trouble else nullcontext():
        status = "finished" if finished else "interrupted"
        save_search(folder, record | {"status": status, "finished_at": now()}, plan.kept)
    if watch.trouble:
        print(f"\n{records.to_text()}\n", flush=True)
        retry = ["--retry-failed"] if any(row["status"] == "failed" for row in records.ended) else []
        print(f"tune.py: {watch.trouble}; when that is mended, {_go_on(plan, *retry)}", file=sys.stderr)
        return 1
    if not finished:
        print(f"\n{records.to_text()}\n")
        print(f"stopped with {missing} of {settings.num_samples} trials to end; {_go_on(plan)}", flush=True)
        return 128 + stop_asked() if stop_asked() else 1
    if missing > 0:
        print(f"{settings.time_budget} are over with {missing} trials to end; {_go_on(plan)}", flush=True)
    return 0


def _fit(
    plan: SearchPlan,
    data: SearchData,
    slots: Slots,
    setup: "TrialSetup",
    records: SearchRecords,
    live: LiveTable,
    deadline: float | None,
    stop_asked: StopAsked,
) -> "SearchWatch":
    """Let Ray run what is unfinished and what is to come."""
    from ray import tune
    from ray.tune.error import TuneError
    from ray.tune.execution import class_cache

    from search.callback import MAX_RETRIES, SearchWatch, StopWatch
    from search.mirror import OptunaMirror
    from search.study import BudgetAwareSearch, RecordedAsha
    from search.trial import run_trial

    settings, base = plan.settings, plan.base
    sizes = (len(data.train.labels), len(data.val.labels))
    searcher = BudgetAwareSearch(
        records,
        plan.space,
        first=first_points(plan.space, base),
        num_samples=settings.num_samples,
        seed=base.seed,
        sampler=settings.sampler,
        warm=plan.warm,
    )
    scheduler = RecordedAsha(records, mode=settings.mode, stops_early=settings.stops_early, patience=settings.patience)
    watch = SearchWatch(
        records,
        searcher,
        scheduler,
        OptunaMirror(records, plan.space),
        live,
        num_samples=settings.num_samples,
        deadline=deadline,
        stop_asked=stop_asked,
        tell_pace=None if setup.timed is None else lambda speed: describe_time(speed, base, settings, slots, *sizes),
    )
    to_run = settings.num_samples - len(records.ended)
    if to_run == 0:  # only search.json was missing
        return watch
    class_cache.DEFAULT_ENV_VARS.clear()  # with it Ray would start new workers beside those it has started already
    ray_folder = plan.folder / "ray"
    shutil.rmtree(ray_folder, ignore_errors=True)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(run_trial, setup=setup, train=data.train, val=data.val),
            {"CPU": slots.cpus, "GPU": slots.gpus},
        ),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=to_run,
            max_concurrent_trials=slots.max_concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=ray_folder.name,
            storage_path=str(plan.folder),
            verbose=0,
            callbacks=[watch],
            stop=StopWatch(watch),
            failure_config=tune.FailureConfig(max_failures=MAX_RETRIES),
        ),
    )
    try:
        with redirect_stdout(LogWriter()), live:
            tuner.fit()
    except TuneError as error:
        logging.getLogger("ray.tune").exception("the search was broken off")
        watch.trouble = watch.trouble or f"Ray gave up ({str(error).strip().splitlines()[-1]}; more is in search.log)"
    watch.catch_up(at_once=True)
    return watch


def _go_on(plan: SearchPlan, *more: str) -> str:
    elsewhere = [] if plan.folder.parent.name == "searches" else ["--storage-path", str(plan.folder.parent)]
    place = elsewhere if plan.kept.bucket is None else ["--storage-path", plan.kept.bucket.url]
    outputs = [] if elsewhere else ["--outputs", str(plan.folder.parents[1])]
    address = ["--address", plan.address] if plan.address else []
    command = [sys.executable, *sys.argv[:1], "--name", plan.folder.name, *place, *outputs, *address, "--resume", *more]
    return f"go on with: {shlex.join(command)}"


def tell_result(plan: SearchPlan, records: SearchRecords) -> int:
    """Print what a finished search found; returns the exit code, 1 if no trial reached its last epoch."""
    print(f"\n{records.to_text()}\n")
    if not (plan.folder / "best.json").is_file():
        print(f"no trial reached its last epoch; what went wrong is in {plan.folder}", flush=True)
        return 1
    print(verdict(plan.folder, plan.kept.bucket))
    return 0


class LogWriter(io.TextIOBase):
    """A file whose lines go to the log."""

    def write(self, text: str) -> int:
        for line in filter(str.strip, text.splitlines()):
            logging.getLogger("ray.tune").warning(line)
        return len(text)


def _log_to_file(path: Path) -> None:
    """Send what Ray, Optuna and Python warnings have to say to a file; the terminal is for the trials."""
    import optuna  # noqa: F401  which gives its logger another handler when it is imported

    logging.raiseExceptions = False  # a full disk is told once, where records cannot be written
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    for name in ("ray", "optuna", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
