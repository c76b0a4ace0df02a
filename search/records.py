"""The trials of a search while it runs, in memory and on disk: all that it takes to go on after a stop or a crash."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from byot.search_files import (
    CONFIRMATION,
    MEASURES,
    Role,
    SearchRecord,
    Status,
    TrialRecord,
    is_number,
    metric_mode,
    ranked,
    read_epochs,
    read_trials,
    write_best,
    write_trials,
)
from byot.system.files import errors_in, read_json, write_json
from search.settings import Work
from search.system.remote import Store

# What an object store keeps of a search's folder: without the first there is no search.
KEPT = ("search.json", "trials.csv", "best.json", CONFIRMATION, "warm_start.json", "state", "trials", "confirmation")


class SearchRecords:
    """The trials of a search: proposed, measured epoch by epoch, ended."""

    def __init__(
        self,
        folder: Path,
        *,
        parameters: list[str],
        metrics: tuple[str, ...],
        epochs: int,
        seed: int,
        grace: int,
        work: Work = float,
        store: Store | None = None,
    ) -> None:
        """Read what the folder holds; a damaged trial.json is restored from trials.csv, and trials.csv from them.

        By the first of the `metrics` trials are ranked. `grace` is the number of epochs before a trial may be stopped,
        `work` what a trial's first so many take. `store` is where what is written is kept, if not in the folder alone.
        Here as later a record that cannot be written, or put there, raises OSError.
        """
        self.folder = folder
        self.store = store or Store(folder)
        self.parameters = parameters
        self.metrics = metrics
        self.metric = metrics[0]
        self.mode = metric_mode(self.metric)
        self.epochs = epochs
        self.grace = grace
        self.work = work
        self.seed = seed
        self.search: SearchRecord | None = None  # what search.json holds, for best.json to tell
        self.curves: dict[str, dict[int, float]] = {}  # trial id -> epoch -> value of the metric
        # Trial id -> epoch -> value with which ASHA let it go on or stopped it; None where that record is lost.
        self.judged: dict[str, dict[int, float] | None] = {}
        self.notes: list[str] = []  # what was found damaged, one sentence each
        self.trials = {trial.trial_id: trial for trial in self._read_trials()}

    def _read_trials(self) -> list[TrialRecord]:
        try:
            table = {trial.trial_id: self._check(trial) for trial in read_trials(self.folder / "trials.csv")}
        except ValueError as error:
            self.notes.append(f"{error}: trials.csv is made anew from the trials' own records")
            table = {}
        on_disk = {path.name for path in (self.folder / "trials").glob("t*") if path.is_dir()}
        trial_ids = sorted(on_disk | set(table), key=lambda trial_id: (trial_number(trial_id), trial_id))
        trials = [self._read_trial(trial_id, table.get(trial_id)) for trial_id in trial_ids]
        return [trial for trial in trials if trial is not None]

    def _check(self, trial: TrialRecord) -> TrialRecord:
        if set(trial.params) != set(self.parameters):
            raise ValueError(f"the trial {trial.trial_id} has other parameters than {', '.join(self.parameters)}")
        return trial

    def _read_trial(self, trial_id: str, in_table: TrialRecord | None) -> TrialRecord | None:
        folder = self.trial_folder(trial_id)
        epochs = read_epochs(folder / "metrics.jsonl")
        epochs = {epoch: numbers for epoch, numbers in epochs.items() if {self.metric, "elapsed_s"} <= set(numbers)}
        self.curves[trial_id] = {epoch: numbers[self.metric] for epoch, numbers in epochs.items()}
        trial, self.judged[trial_id] = in_table, None
        try:
            row = read_json(folder / "trial.json")
            with errors_in(folder / "trial.json"):
                trial = self._check(TrialRecord.from_row(row))
            self.judged[trial_id] = _by_epoch(row.get("judged"))
            curve = _by_epoch(row.get("curve"))
            if trial.status != "running" and curve is not None:  # metrics.jsonl may have been cut
                self.curves[trial_id] = curve
        except ValueError as error:
            if trial is None:
                self.notes.append(f"trial {trial_id} is left out: {error}, and trials.csv does not know it")
                aside = folder.with_name(f"damaged-{trial_id}-{datetime.now():%Y%m%d-%H%M%S-%f}")
                self.store.rename(folder, aside)
                return None
            self.notes.append(f"trial {trial_id} is taken from trials.csv: {error}")
            self._write_trial(trial)
        if trial.status == "running" and epochs:
            last = max(epochs)
            trial = trial.after_epoch(last, epochs[last], sum(numbers["elapsed_s"] for numbers in epochs.values()))
        return trial

    def trial_folder(self, trial_id: str) -> Path:
        return self.folder / "trials" / trial_id

    @property
    def ended(self) -> list[TrialRecord]:
        return [trial for trial in self.trials.values() if trial.status != "running"]

    @property
    def unfinished(self) -> list[TrialRecord]:
        return [trial for trial in self.trials.values() if trial.status == "running"]

    def best(self) -> TrialRecord | None:
        return next(iter(ranked(self.trials.values(), self.metric)), None)

    @property
    def next_number(self) -> int:
        return max(map(trial_number, self.trials), default=-1) + 1

    @property
    def next_id(self) -> str:
        return f"t{self.next_number:04d}"  # no spreadsheet takes it for a number

    def begin(self, role: Role, params: dict[str, Any]) -> TrialRecord:
        """Record a trial that is proposed, before anything of it is done."""
        trial = TrialRecord(
            trial_id=self.next_id,
            role=role,
            status="running",
            epochs_done=0,
            params=params,
            measures=dict.fromkeys(MEASURES),
            seconds=0.0,
            seed=self.seed,
            error="",
        )
        self.curves[trial.trial_id], self.judged[trial.trial_id] = {}, {}
        self._write_trial(trial)
        self.trials[trial.trial_id] = trial
        self.write_table()
        return trial

    def add_epoch(self, trial_id: str, record: dict[str, Any]) -> None:
        """Take in what a trial reported; an epoch reported again counts once, and one after its end not at all."""
        trial, curve, epoch = self.trials[trial_id], self.curves[trial_id], record["epoch"]
        if trial.status == "running":
            seconds = trial.seconds + (record["elapsed_s"] if epoch not in curve else 0.0)
            curve[epoch] = record[self.metric]
            self.trials[trial_id] = trial.after_epoch(epoch, record, seconds)

    def judge(self, trial_id: str, epoch: int, value: float, *, goes_on: bool) -> None:
        """Record that ASHA has judged a trial. One that it stops is written when it ends, a moment later."""
        self.judged[trial_id] = (self.judged[trial_id] or {}) | {epoch: value}
        if goes_on:
            self._write_trial(self.trials[trial_id])

    def end(self, trial_id: str, status: Status, error: str = "") -> TrialRecord:
        """Record how a trial ended. The checkpoints of one that will not go on are removed."""
        trial = replace(self.trials[trial_id], status=status, error=error)
        self._write_trial(trial)
        self.trials[trial_id] = trial
        if status == "stopped" or trial.diverged:
            self.store.drop_checkpoints(self.trial_folder(trial_id))
        self.store.pull_run(self.trial_folder(trial_id))
        self.write_table()
        if status == "completed":
            self.write_best()
        return trial

    def retry_failed(self) -> int:
        """Set the failed trials that may do better another time to running; returns how many."""
        failed = [trial for trial in self.ended if trial.status == "failed" and not trial.diverged]
        for trial in failed:
            self.trials[trial.trial_id] = replace(trial, status="running", error="")
            self._write_trial(self.trials[trial.trial_id])
        return len(failed)

    def _write_trial(self, trial: TrialRecord) -> None:
        known = {"judged": self.judged[trial.trial_id], "curve": self.curves[trial.trial_id]}
        path = self.trial_folder(trial.trial_id) / "trial.json"
        write_json(path, trial.to_row() | known)
        self.store.push(path)

    def write_tables(self) -> None:
        """Bring trials.csv and best.json in line with the trials' own records."""
        self.write_table()
        self.write_best()

    def write_table(self) -> None:
        write_trials(self.folder / "trials.csv", self.trials.values(), self.parameters)
        self.store.push(self.folder / "trials.csv")

    def write_best(self) -> None:
        if self.search is not None and self.best() is not None:
            write_best(self.folder, self.search, self.trials.values())
            self.store.push(self.folder / "best.json")


def trial_number(trial_id: str) -> int:
    """Return the place of a trial in the order of proposals; -1 for an id that another version gave."""
    return int(trial_id[1:]) if trial_id[:1] == "t" and trial_id[1:].isdecimal() else -1


def _by_epoch(table: Any) -> dict[int, float] | None:
    """Read epoch -> value from JSON, whose keys are text; None for anything else."""
    if not isinstance(table, dict) or not all(map(str.isdecimal, table)) or not all(map(is_number, table.values())):
        return None
    return {int(epoch): value for epoch, value in table.items()}


def save_search(folder: Path, record: dict[str, Any], store: Store | None = None) -> None:
    """Write search.json and its copy."""
    for path in (folder / "search.json", folder / "state" / "search.json"):
        write_json(path, record)
        if store is not None:
            store.push(path)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
