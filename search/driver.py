"""Runs one search from its plan to its end: Ray started, the time estimated, the trials run, the result told."""

import io
import logging
import math
import os
import shlex
import shutil
import sys
import time
import warnings
from contextlib import ExitStack, closing, nullcontext, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from byot.config import work_after
from byot.console import fold, format_duration, say, waiting
from byot.search_files import SearchRecord, load_confirmation, space_to_dict
from byot.system.files import describe_refusal, remove_leftovers
from byot.system.flags import one_sentence_errors, tell, this_command
from byot.system.paths import default_outputs
from byot.system.provenance import provenance
from byot.system.stopping import catch_stop_signals
from search.messages import describe_confirmation, trials_table, verdict
from search.plan import SearchPlan, Session, check_gpus, resource_request
from search.probe import find_trials_per_gpu
from search.race import Confirmation, confirm
from search.records import SearchRecords, now, save_search
from search.settings import choose_grace
from search.system.resources import Resources, check_nodes, describe_nodes, joined_cluster, resolve, running_ray
from search.system.tasks import told_if_stopped
from search.table import LiveTable

if TYPE_CHECKING:  # importing them imports Ray, which reads its settings from the environment then
    from ray import tune

    from search.callback import SearchWatch


def run_search(plan: SearchPlan) -> int:
    """Run a search, or the rest of it; the caller holds its folder's lock. Returns or exits with the exit code.

    0: finished; 1: it cannot go on, or no trial finished; 128 and the signal's number: stopped on the way.
    """
    try:
        with told_if_stopped("tune.py", partial(go_on, plan)):
            records = open_records(plan)
            if _was_finished(plan, records):
                print(f"{plan.folder} is finished already; --num-samples adds trials, --fresh starts it anew")
                return tell_result(plan, records)
            with ExitStack() as held:
                with waiting("starting Ray"):
                    held.enter_context(running_ray(plan.resources, plan.address))
                return _run_on_ray(plan, records)
    except OSError as error:
        told = f"{describe_refusal(error, plan.folder)}; once it can, go on with: {go_on(plan)}"
        tell("tune.py", told)
        return 1


def _run_on_ray(plan: SearchPlan, records: SearchRecords) -> int:
    """Run what is left of the trials, then of the confirmation; returns the exit code."""
    resources = _find_resources(plan)
    _log_to_file(plan.folder / "search.log")
    budget_s, trials_s = plan.settings.time_budget_s(), plan.settings.trials_budget_s()
    deadline, trials_end = (None if s is None else time.monotonic() + s for s in (budget_s, trials_s))
    with catch_stop_signals() as stop_asked:  # after ray.init, which has a handler of its own
        session = Session(plan, resources, records, stop_asked, trials_end)
        code = 0
        if plan.recorded is None or not is_complete(plan, records):  # None: new, or only search.json is lost
            code = _run_trials(session)
        else:
            print(f"search {plan.folder.name}: all {len(records.ended)} trials have ended")
        if code == 0:
            code = _confirm(session._replace(deadline=deadline))
    return code or tell_result(plan, records)


def open_records(plan: SearchPlan) -> SearchRecords:
    """Read what the search's folder holds of its trials; tell what is damaged, and set to run what is tried again."""
    for folder in (plan.folder, plan.folder / "state", *plan.folder.glob("trials/t*")):
        remove_leftovers(folder)
    records = SearchRecords(
        plan.folder,
        parameters=list(plan.space),
        metrics=plan.settings.metric,
        epochs=plan.base.epochs,
        seed=plan.base.seed,
        grace=choose_grace(plan.base, plan.settings, plan.recorded),
        work=partial(work_after, plan.base),
        store=plan.store,
    )
    for note in records.notes:
        tell("tune.py", note)
    if plan.retry_failed:
        number = records.retry_failed()
        print(f"failed trials that are tried again: {number}")
    return records


def _was_finished(plan: SearchPlan, records: SearchRecords) -> bool:
    """Check whether nothing is left to do, and write what a kill may have left unwritten at the end."""
    if plan.recorded is None or not is_complete(plan, records):
        return False
    records.search = plan.recorded
    records.write_tables()
    confirmation = find_confirmation(plan, records)
    # It says what is to be confirmed before that is begun.
    fields = plan.recorded.fields | {"settings": plan.settings.to_dict(), "status": "finished"}
    fields["finished_at"] = fields.get("finished_at") or now()
    if fields != plan.recorded.fields:
        save_search(plan.folder, fields, plan.store)
    if confirmation is None:
        return True
    if confirmation.judge().is_over and not confirmation.is_done:  # fewer are asked for than were run
        confirmation.drop_checkpoints()
        confirmation.save("finished")
    return confirmation.is_done


def is_complete(plan: SearchPlan, records: SearchRecords) -> bool:
    """Whether all trials have ended."""
    return len(records.ended) >= plan.settings.num_samples


def find_confirmation(plan: SearchPlan, records: SearchRecords) -> Confirmation | None:
    """Return what is to be run again over fresh seeds, and what of it is done; None where there is nothing."""
    if not plan.settings.confirm or records.best() is None:
        return None
    trials = list(records.trials.values())
    return Confirmation(plan.store, trials, plan.space, plan.base, plan.settings, len(plan.val.labels))


def _find_resources(plan: SearchPlan) -> Resources:
    """Find what is known only once Ray runs: a cluster's resources, how many trials are quickest together on a GPU."""
    resources, request = plan.resources, resource_request(plan.settings)
    if resources is None:
        with one_sentence_errors("tune.py"):
            resources = resolve(request, *joined_cluster(plan.base.device))
            check_gpus(plan.base, resources)
            check_nodes(plan.store, resources)
    if plan.settings.gpus_per_trial == "auto" and resources.num_gpus:
        number = find_trials_per_gpu(plan.base, plan.train, resources, most=most_on_a_gpu(plan, resources))
        request = request._replace(gpus=1 / number)
        resources = resolve(request, resources.num_cpus, resources.num_gpus, "the machine")
    return resources


def most_on_a_gpu(plan: SearchPlan, resources: Resources) -> int:
    """Count the trials that each GPU gets when those that may run at once are spread over all GPUs."""
    room = resources.num_cpus // resources.cpus
    at_once = plan.settings.at_once(min(room, plan.settings.max_concurrent or room))
    return math.ceil(at_once / resources.num_gpus)


# ---------------------------------------------------------------- the trials


def _run_trials(session: Session) -> int:
    """Run the trials; returns the exit code."""
    plan, records = session.plan, session.records
    record = _begin(session)
    live = LiveTable()
    timed = records.next_id if plan.recorded is None else None  # the trial that reports its speed early
    while True:
        before = len(records.ended)
        watch = _run_tuner(session, live, timed)
        timed = None
        # Some may be missing because their worker died before they began: as long as others end, they are begun again.
        if is_complete(plan, records) or watch.stop_all() or len(records.ended) == before:
            return _end(session, watch, record)


def _begin(session: Session) -> dict[str, Any]:
    """Write search.json and tell what is to be done; returns what is written."""
    plan, resources, records, *_ = session
    settings, recorded = plan.settings, plan.recorded
    record: dict[str, Any] = {"started_at": now(), **({} if recorded is None else recorded.fields), **_origin(session)}
    record |= {
        "name": plan.folder.name,  # it may have been moved
        "status": "running",
        "finished_at": None,
        "config": plan.base.to_dict(),
        "settings": settings.to_dict(),
        "space": space_to_dict(plan.space),
        "metric": settings.main_metric,
        "mode": settings.mode,
        "num_samples": settings.num_samples,
        "grace_epochs": records.grace,
        "max_concurrent": settings.at_once(resources.max_concurrent),
        "num_train_images": len(plan.train.labels),
        "num_val_images": len(plan.val.labels),
    }
    told = [
        f"search {plan.folder.name}: {settings.num_samples} trials of {plan.base.model} width {plan.base.width} "
        f"on {plan.base.dataset}",
        f"{len(plan.train.labels)} images to train on, {len(plan.val.labels)} to compare on, {plan.store}",
    ]
    if recorded is None and plan.warm is not None:
        plan.store.push(plan.warm.save(plan.folder))
        record |= {"warm_start": plan.warm.search}
        told.append(plan.warm.describe())
    if recorded is not None:
        told.append(
            f"{len(records.ended)} trials have ended, {len(records.unfinished)} go on from their checkpoints, "
            f"{settings.num_samples - len(records.trials)} are to come"
        )
    save_search(plan.folder, record, plan.store)
    records.search = SearchRecord.from_dict(record)
    records.write_tables()
    say(fold("\n".join(told)))
    return record


def _origin(session: Session) -> dict[str, Any]:
    """Return commit, versions and hardware for a record."""
    resources, device = session.resources, "cpu"
    if resources.gpus and torch.cuda.is_available():
        device = "cuda"
    elif session.plan.base.device in ("auto", "mps") and torch.backends.mps.is_available():
        device = "mps"
    record = provenance(torch.device(device))
    if session.plan.address is not None:  # the driver's machine may have no GPU
        record["hardware"] |= describe_nodes(resources)
    return record


def _run_tuner(session: Session, live: LiveTable, timed: str | None) -> "SearchWatch":
    """Let Ray run what is unfinished and what is to come; returns what has watched it."""
    from ray.tune.error import TuneError

    from search.callback import SearchWatch

    watch = SearchWatch(session, live, tells_pace=timed is not None)
    if is_complete(session.plan, session.records):  # only search.json was missing
        return watch
    tuner = _make_tuner(session, watch, timed)
    try:
        with redirect_stdout(LogWriter()), live, closing(watch):
            tuner.fit()
    except TuneError as error:
        logging.getLogger("ray.tune").exception("the search was broken off")
        watch.trouble = watch.trouble or f"Ray gave up ({str(error).strip().splitlines()[-1]}; more is in search.log)"
    return watch


def _make_tuner(session: Session, watch: "SearchWatch", timed: str | None) -> "tune.Tuner":
    from ray import tune
    from ray.tune.execution import class_cache

    from search.callback import MAX_RETRIES
    from search.trial import TrialSetup, run_trial

    plan, resources, records, *_ = session
    settings = plan.settings
    setup = TrialSetup(plan.base, plan.store, settings.main_metric, resources.cpus, timed, settings.seeds_per_trial)
    class_cache.DEFAULT_ENV_VARS.clear()  # with it Ray would start new workers beside those it has started already
    shutil.rmtree(plan.folder / "ray", ignore_errors=True)
    return tune.Tuner(
        tune.with_resources(
            tune.with_parameters(run_trial, setup=setup, train=plan.train, val=plan.val),
            {"CPU": resources.cpus, "GPU": resources.gpus},
        ),
        tune_config=tune.TuneConfig(
            search_alg=watch.searcher,
            scheduler=watch.scheduler,
            num_samples=settings.num_samples - len(records.ended),
            max_concurrent_trials=settings.at_once(resources.max_concurrent),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(plan.folder),
            verbose=0,
            callbacks=[watch],
            stop=watch,
            failure_config=tune.FailureConfig(max_failures=MAX_RETRIES),
        ),
    )


def _end(session: Session, watch: "SearchWatch", record: dict[str, Any]) -> int:
    """Record and tell how the trials ended; returns the exit code."""
    plan, records = session.plan, session.records
    missing, number = plan.settings.num_samples - len(records.ended), session.stop_asked()
    in_time = missing <= 0 or (watch.out_of_time() and not number)
    status = "finished" if missing <= 0 or (in_time and not watch.trouble) else "interrupted"
    if not watch.trouble:  # with it the store may be what is gone
        for trial in records.unfinished:
            plan.store.pull_run(records.trial_folder(trial.trial_id))
    with suppress(OSError) if watch.trouble else nullcontext():
        save_search(plan.folder, record | {"status": status, "finished_at": now()}, plan.store)
    if watch.trouble or not in_time:
        say(f"\n{trials_table(records)}\n")
    if watch.trouble:
        crashed = any(trial.status == "failed" and not trial.diverged for trial in records.ended)
        retry = ["--retry-failed"] if crashed else []
        tell("tune.py", f"{watch.trouble}; when that is mended, go on with: {go_on(plan, *retry)}")
        return 1
    ended = f"{len(records.ended)} of {plan.settings.num_samples} trials have ended"
    if not in_time:
        say(f"stopped: {ended}; go on with: {go_on(plan)}")
        return 128 + number if number else 1
    if missing > 0:
        spent = format_duration(plan.settings.trials_budget_s() or 0.0)
        say(f"{spent} are over, and {ended}; go on with: {go_on(plan)}")
    return 0


# ---------------------------------------------------------------- after the trials


def _confirm(session: Session) -> int:
    """Run the best again over fresh seeds where that is asked for; returns the exit code."""
    plan, resources, records, stop_asked, deadline = session
    confirmation = find_confirmation(plan, records)
    if confirmation is None or confirmation.is_done:
        return 0
    confirmation.drop_checkpoints()
    confirmation.origin = _origin(session)
    say(f"\n{fold(describe_confirmation(confirmation, list(records.trials.values()), resources))}")
    is_over, trouble = confirm(confirmation, resources, stop_asked, deadline)
    if trouble:
        tell("tune.py", f"{trouble}; when that is mended, go on with: {go_on(plan)}")
        return 1
    if not is_over:
        spent = format_duration(plan.settings.time_budget_s() or 0.0)
        say(f"{spent} are over; go on with: {go_on(plan)}")
        return 0

    from search.study import OptunaMirror

    found = load_confirmation(plan.folder)
    assert found is not None, "it has just been written"
    OptunaMirror(records, plan.space).tell_verdict(found)
    return 0


def tell_result(plan: SearchPlan, records: SearchRecords) -> int:
    """Print what a finished search found; returns the exit code, 1 if no trial reached its last epoch."""
    say(f"\n{trials_table(records)}\n")
    if not (plan.folder / "best.json").is_file():
        say(f"no trial has reached its last epoch; what was recorded is in {plan.folder}")
        return 1
    searches = plan.folder.parent
    outputs = searches.parent if searches.name == "searches" else default_outputs()
    say(verdict(plan.folder, outputs, go_on(plan, "--confirm", "3")))
    return 0


def go_on(plan: SearchPlan, *more: str) -> str:
    """Return the command that goes on with the search, in any folder.

    Where nothing is recorded of it yet, that is the command that was given, for the same folder.
    """
    # Path.exists would fail where the storage is gone.
    if plan.recorded is None and not os.path.exists(plan.folder / "search.json"):  # noqa: PTH110
        return shlex.join([*this_command(), *sys.argv[1:], *more])
    searches = plan.folder.parent
    place = ["--outputs", str(searches.parent)] if searches.name == "searches" else ["--storage-path", str(searches)]
    if plan.store.bucket is not None:
        place += ["--storage-path", plan.store.bucket.url]
    address = [] if plan.address is None else ["--address", plan.address]
    command = [*this_command(), "--name", plan.folder.name, *place, *address]
    return shlex.join([*command, "--resume", *more])


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
