"""What happens in the driver while Ray runs a search: every event is recorded, told, and may end the search."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from byot.system.files import describe_refusal, write_text
from search.mirror import OptunaMirror
from search.records import DIVERGED, Row, SearchRecords, Status, format_value
from search.study import BudgetAwareSearch, RecordedAsha
from search.table import LiveTable, view_search
from search.trial import FAILED, PACE, UNWRITABLE

MAX_RETRIES = 3  # of a trial whose worker or node died before it did another epoch
MAX_FAILURES = 5  # of the first trials, or crashes one after another, before the search gives up


class SearchWatch(tune.Callback):
    """Records each trial that ends, once, and has a line printed for it; knows when the whole search has to stop.

    A trial has ended when it reached its last epoch, when ASHA stopped it or when it failed. One that is cut off with
    the search has not: it goes on with the search.
    """

    def __init__(
        self,
        records: SearchRecords,
        searcher: BudgetAwareSearch,
        scheduler: RecordedAsha,
        mirror: OptunaMirror,
        live: LiveTable,
        *,
        num_samples: int,
        deadline: float | None,
        stop_asked: Callable[[], int],
        tell_pace: Callable[[float], str] | None = None,
    ) -> None:
        """`tell_pace` says what the first speed that is known, in images a second, means for the search."""
        self.records = records
        self.searcher = searcher
        self.scheduler = scheduler
        self.mirror = mirror
        self.live = live
        self.num_samples = num_samples
        self.deadline = deadline  # on the monotonic clock
        self.stop_asked = stop_asked
        self.tell_pace = tell_pace  # until it has been told
        self.trouble = ""  # why the search cannot go on
        self.crashes_in_a_row = 0

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
            if epoch not in self.records.history[trial_id]:
                trial.run_metadata.num_failures = 0  # a trial that gets on is not given up, however often it is killed
                self.live.rate.add(time.monotonic(), self.records.work(epoch) - self.records.work(epoch - 1))
            self.records.add_epoch(trial_id, result)
            self._tell_pace(result)  # where an epoch has fewer steps than are timed

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        trial_id, last = trial.config["trial_id"], trial.last_result
        # Ray's running means of all that was reported, 90 kB a trial for as long as the search runs. Nobody reads them.
        trial.run_metadata.metric_analysis.clear()
        trial.run_metadata.metric_n_steps.clear()
        if FAILED in last:
            self._end(trial_id, "failed", last[FAILED])
        elif self.records.rows[trial_id]["epochs_done"] >= self.records.epochs:
            self._end(trial_id, "completed")
        elif trial_id in self.scheduler.stopped:
            self._end(trial_id, "stopped")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if trial.run_metadata.num_failures <= MAX_RETRIES:
            return  # Ray retries no trial whose worker died between two trials; the driver starts it again
        trial_id, path = trial.config["trial_id"], trial.error_file
        text = Path(path).read_text(errors="replace").strip() if path and Path(path).is_file() else "the worker died"
        reason = text.splitlines()[-1].strip()
        if "OutOfMemoryError" in text or "running low on memory" in text:
            reason = f"out of memory, as Ray's memory monitor saw it; fewer trials at once would help ({reason})"
        self._write(lambda: self._keep_error(trial_id, text))
        self._end(trial_id, "failed", reason)

    def _keep_error(self, trial_id: str, text: str) -> None:
        path = self.records.trial_folder(trial_id) / "error.txt"
        write_text(path, text + "\n")
        self.records.kept.put(path)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Ray calls this several times a second, whether anything has happened or not."""
        if not self.trouble:
            self._write(self.records.kept.look)
        self.catch_up()
        if self.live.is_due():
            self._show([trial.config["trial_id"] for trial in trials if trial.status == Trial.RUNNING])

    # ------------------------------------------------------------ what is made of it

    def catch_up(self, *, at_once: bool = False) -> None:
        """Bring trials.csv up to date, where it is behind. What could not be written is tried once more, at the end."""
        if self.records.is_behind and (at_once or not self.trouble):
            self._write(lambda: self.records.write_table(at_once=at_once))

    def _write(self, write: Callable[[], Any]) -> Any:
        """Write a record; where that cannot be, what was to be recorded is as if it had not happened yet."""
        try:
            return write()
        except OSError as error:
            self.trouble = describe_refusal(error, self.records.folder)
            return None

    def _end(self, trial_id: str, status: Status, error: str = "") -> None:
        if self.trouble or self.records.rows[trial_id]["status"] != "running":
            return
        row = self._write(lambda: self.records.end(trial_id, status, error))
        if row is None:
            return
        self.searcher.tell(row)
        self._write(lambda: self.mirror.add(row))
        self._print(row)
        self.crashes_in_a_row = self.crashes_in_a_row + 1 if status == "failed" and not _diverged(row) else 0
        ended = self.records.ended
        none_worked = len(ended) == MAX_FAILURES and all(r["status"] == "failed" for r in ended)
        if none_worked or self.crashes_in_a_row >= MAX_FAILURES:
            self.trouble = f"{MAX_FAILURES} trials failed one after another, the last one so: {error}"

    def has_to_stop(self) -> bool:
        return bool(self.trouble or self.stop_asked()) or self.out_of_time()

    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _tell_pace(self, result: dict[str, Any]) -> None:
        if self.tell_pace is not None:
            tell, self.tell_pace = self.tell_pace, None
            self.live.say(tell(result[PACE] if PACE in result else result["images_per_s"]))

    def _print(self, row: Row) -> None:
        metric, best = self.records.metric, self.records.best()
        line = f"{len(self.records.ended):>3}/{self.num_samples}  {row['trial_id']}  {row['status']:<9}"
        line += f"  {row['epochs_done']:>3} epochs  {metric} {format_value(row[metric])}"
        line += "".join(f"  {name} {row[name]:.3g}" for name in self.records.parameters)
        line += f"  {row['seconds']:.0f} s"
        if row["error"]:
            line += f"  {row['error']}"
        elif best is not None:
            line += f"  best {format_value(best[metric])}"
        self.live.say(line)

    def _show(self, running: list[str]) -> None:
        now = time.monotonic()
        view = view_search(
            self.records,
            running,
            num_samples=self.num_samples,
            stops_early=self.scheduler.stops_early,
            elapsed_s=now - self.live.began_at,
            epochs_per_s=self.live.rate.per_second(now, len(running)),
            epoch_work=self.live.rate.mean_work(),
            budget_s=None if self.deadline is None else self.deadline - now,
            stopping=self.has_to_stop(),
        )
        self.live.show(view)


class StopWatch(tune.Stopper):
    """Ends the search when its watch says so."""

    def __init__(self, watch: SearchWatch) -> None:
        self.watch = watch

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False  # single trials are stopped by the scheduler

    def stop_all(self) -> bool:
        return self.watch.has_to_stop()


def _diverged(row: Row) -> bool:
    return bool(row["error"].startswith(DIVERGED))
