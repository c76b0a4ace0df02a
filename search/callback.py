"""Takes in what Ray tells the driver of a search: every event is recorded, told, and may end the search."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.result import AUTO_RESULT_KEYS

from byot.search_files import Status, TrialRecord, format_parameter, format_value, settings_of
from byot.system.files import describe_refusal, write_text
from byot.tracking import Trackers, Tracking
from search.messages import describe_time
from search.plan import Session
from search.space import first_points, read_point
from search.study import BudgetAwareSearch, OptunaMirror, RecordedAsha
from search.table import LiveTable
from search.trial import FAILED, PACE, UNWRITABLE

MAX_RETRIES = 3  # of a trial whose worker or node died before it did another epoch
MAX_FAILURES = 5  # of the first trials, or crashes one after another, before the search gives up


class SearchWatch(tune.Callback, tune.Stopper):
    """Records each trial that ends, once, and has a line printed for it; ends the whole search where it has to stop.

    A trial has ended when it reached its last epoch, when ASHA stopped it or when it failed. One that is cut off with
    the search has not: it goes on with the search.
    """

    def __init__(self, session: Session, live: LiveTable, *, tells_pace: bool = False) -> None:
        """With `tells_pace` it tells what the first speed that is known means for the search."""
        plan, records = session.plan, session.records
        self.session = session
        self.records = records
        self.searcher = BudgetAwareSearch(
            records,
            plan.space,
            first=first_points(plan.space, plan.base),
            tried=[read_point(point, plan.space, plan.base) for point in plan.settings.try_],
            num_samples=plan.settings.num_samples,
            sampler=plan.settings.sampler,
            has_prior=plan.settings.prior == "reference" and plan.settings.sampler != "random",
            warm=plan.warm,
        )
        self.scheduler = RecordedAsha(records, stops_early=plan.settings.stops_early)
        self.mirror = OptunaMirror(records, plan.space)
        self.live = live
        self.num_samples = plan.settings.num_samples
        self.tells_pace = tells_pace  # until it has been told
        self.trouble = ""  # why the search cannot go on
        self.crashes_in_a_row = 0
        self.trackers = Trackers(plan.settings.track, live.say)
        self.tracked: dict[str, Tracking] = {}  # the trials that run

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        """Ray pickles its callbacks for a state of its own, which is never read; the plan has all images."""
        return object, ()

    # ------------------------------------------------------------ what Ray tells

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if UNWRITABLE in result:
            self.trouble = result[UNWRITABLE]
        elif PACE in result:
            self._tell_pace(result)
        elif FAILED not in result:
            trial_id = trial.config["trial_id"]
            epoch = result["epoch"]
            if epoch not in self.records.curves[trial_id]:
                trial.run_metadata.num_failures = 0  # a trial that gets on is not given up, however often it is killed
                self.live.add_epoch(self.records.work(epoch) - self.records.work(epoch - 1))
            self.records.add_epoch(trial_id, result)
            known = self.records.trials[trial_id]
            if known.status == "running" and (tracking := self._track(known)) is not None:
                numbers = (name for name, value in result.items() if type(value) in (int, float))
                tracking.log({name: result[name] for name in numbers if name not in AUTO_RESULT_KEYS})
            self._tell_pace(result)  # where an epoch has fewer steps than are timed

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        trial_id, last = trial.config["trial_id"], trial.last_result
        # Ray's running means of all that was reported, 90 kB a trial for as long as the search runs. Nobody reads them.
        trial.run_metadata.metric_analysis.clear()
        trial.run_metadata.metric_n_steps.clear()
        if FAILED in last:
            self._end(trial_id, "failed", last[FAILED])
        elif self.records.trials[trial_id].epochs_done >= self.records.epochs:
            self._end(trial_id, "completed")
        elif trial_id in self.scheduler.stopped:
            self._end(trial_id, "stopped")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if trial.run_metadata.num_failures <= MAX_RETRIES:
            return  # Ray retries no trial whose worker died between two trials; the driver starts it again
        trial_id, told = trial.config["trial_id"], trial.error_file
        text = Path(told).read_text(errors="replace").strip() if told and Path(told).is_file() else "the worker died"
        reason = text.splitlines()[-1].strip()
        if "OutOfMemoryError" in text or "running low on memory" in text:
            reason = f"out of memory, as Ray's memory monitor saw it; fewer trials at once would help ({reason})"
        path = self.records.trial_folder(trial_id) / "error.txt"
        self._write(lambda: write_text(path, text + "\n"))
        if path.is_file():
            self._write(lambda: self.records.store.push(path))
        self._end(trial_id, "failed", reason)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Ray calls this several times a second, whether anything has happened or not."""
        if not self.trouble:
            self._write(self.records.store.watch_lease)
        if self.live.is_due():
            self.live.show(
                self.records,
                [trial.config["trial_id"] for trial in trials if trial.status == Trial.RUNNING],
                num_samples=self.num_samples,
                stops_early=self.scheduler.stops_early,
                deadline=self.session.deadline,
                stopping=self.stop_all(),
            )

    # ------------------------------------------------------------ what is made of it

    def _write(self, write: Callable[[], Any]) -> Any:
        """Write a record. Where that fails, keep why: what was to be recorded counts as not having happened yet."""
        try:
            return write()
        except OSError as error:
            self.trouble = describe_refusal(error, self.records.folder)
            return None

    def _end(self, trial_id: str, status: Status, error: str = "") -> None:
        if self.trouble or self.records.trials[trial_id].status != "running":
            return
        trial = self._write(lambda: self.records.end(trial_id, status, error))
        if trial is None:
            return
        self._write(lambda: self.mirror.add(trial))
        self._print(trial)
        if (tracking := self._track(trial)) is not None:
            measures = {name: value for name, value in trial.measures.items() if value is not None}
            tracking.end(measures, failed=status == "failed")
            self.tracked.pop(trial_id)
        self.crashes_in_a_row = self.crashes_in_a_row + 1 if status == "failed" and not trial.diverged else 0
        ended = self.records.ended
        none_worked = len(ended) == MAX_FAILURES and all(other.status == "failed" for other in ended)
        if none_worked or self.crashes_in_a_row >= MAX_FAILURES:
            self.trouble = f"{MAX_FAILURES} trials failed one after another, the last one so: {error}"

    def _track(self, trial: TrialRecord) -> Tracking | None:
        """Open a trial in the trackers that are asked for; None where there are none."""
        if self.trackers.names and trial.trial_id not in self.tracked:
            plan = self.session.plan
            settings = plan.base.to_dict() | settings_of(plan.base, trial.role, trial.params) | {"role": trial.role}
            # Not in the trial's own folder: an object store has no place for it, and would take it away.
            folder = plan.folder / "tracking" / trial.trial_id
            opened = self._write(lambda: Tracking(self.trackers, folder, settings, plan.folder.name))
            if opened is not None:
                self.tracked[trial.trial_id] = opened
        return self.tracked.get(trial.trial_id)

    def close(self) -> None:
        """Close what is open of the trials that go on with the search."""
        for tracking in self.tracked.values():
            tracking.end({})
        self.tracked = {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False  # single trials are stopped by the scheduler

    def stop_all(self) -> bool:
        return bool(self.trouble or self.session.stop_asked()) or self.out_of_time()

    def out_of_time(self) -> bool:
        return self.session.deadline is not None and time.monotonic() > self.session.deadline

    def _tell_pace(self, result: dict[str, Any]) -> None:
        if self.tells_pace:
            self.tells_pace = False
            speed = result.get(PACE) or result["images_per_s"]
            self.live.say(describe_time(speed, self.session.plan, self.session.resources))

    def _print(self, trial: TrialRecord) -> None:
        metric, best = self.records.metric, self.records.best()
        line = f"{len(self.records.ended):>3}/{self.num_samples}  {trial.trial_id}  {trial.status:<9}"
        line += f"  {trial.epochs_done:>3} epochs  {metric} {format_value(metric, trial.measures[metric])}"
        line += "".join(f"  {name} {format_parameter(trial.params[name])}" for name in self.records.parameters)
        line += f"  {trial.seconds:.0f} s"
        if trial.error:
            line += f"  {trial.error}"
        elif best is not None:
            line += f"  best {format_value(metric, best.measures[metric])}"
        self.live.say(line)
