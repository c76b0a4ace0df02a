"""The best trials of a search and both controls, run again over fresh seeds until it is clear which is best.

confirmation.json              the arms with their values, the comparisons, the verdict, the configuration chosen
confirmation/ID-seed-N/        one run: metrics.jsonl, checkpoints while it goes on, result.json when it has ended

A seed is fresh: no trial had it. It sets the weights, the order of the images, their augmentation and which training
images are held out, the same for every arm; so what chose the arms does not flatter them here. The test set is never
read.
"""

import math
import shutil
from collections.abc import Collection
from errno import ENOENT
from pathlib import Path
from typing import Any, NamedTuple

import torch

from byot.config import TrainConfig
from byot.data import LabelledImages, load_images, split_validation
from byot.runs import StopAsked, restore_trainer, train_saving
from byot.search_files import CONFIRMATION, load_confirmation
from byot.system.files import read_json, write_json
from byot.system.lock import WORKER_WAIT_S, lock_folder
from byot.system.stopping import DivergedError, StoppedError
from byot.trainer import check_same_run
from search.records import Row, format_value, now, ranked
from search.settings import FRESH_SEEDS, SearchSettings
from search.significance import ERROR, MOST_RUNS_NAMED, Comparison, Judgement, judge
from search.space import ROLE_NAMES, Role, Space, first_points
from search.system.remote import Bucket, Kept, working_folder
from search.system.resources import Slots
from search.system.tasks import Task, run_tasks


class Arm(NamedTuple):
    """A configuration that is run again."""

    trial_id: str
    role: Role
    params: dict[str, float]

    def describe(self) -> str:
        return ROLE_NAMES.get(self.role, f"trial {self.trial_id}")

    def settings(self) -> str:
        return ", ".join(f"{name} {value:.3g}" for name, value in self.params.items())


class Run(NamedTuple):
    """One run of an arm."""

    arm: str  # its trial
    round: int  # from 0


def choose_arms(
    rows: list[Row], space: Space, base: TrainConfig, settings: SearchSettings, in_before: Collection[str] = ()
) -> list[Arm]:
    """The best different configurations, then the reference's setting and the control where they are not among them.

    Trials that were still in when fewer had been searched stay: a luckier single run does not put them out.
    """
    arms: list[Arm] = []
    rows_by_role = {row["role"]: row["trial_id"] for row in rows}
    for row in ranked(rows, settings.main_metric, settings.mode):
        params = {name: row[name] for name in space}
        asked = len(arms) < (settings.confirm or 0) or row["trial_id"] in in_before
        if asked and params not in [arm.params for arm in arms]:
            arms.append(Arm(row["trial_id"], row["role"], params))
    for point in first_points(space, base):
        if point.params not in [arm.params for arm in arms]:
            arms.append(Arm(rows_by_role.get(point.role, point.role), point.role, point.params))
    return arms


def do_run(
    config: TrainConfig, folder: Path, images: LabelledImages, threads: int, place: Bucket | None = None
) -> dict[str, Any]:
    """Train one arm with one seed, or the rest of it, and return its last epoch, with an error if it diverged.

    `place` is where its folder is kept, if not where it is.
    """
    torch.set_num_threads(threads)
    if place is None and not (folder.parents[1] / "trials").is_dir():  # a folder made here would be on this node alone
        raise FileNotFoundError(ENOENT, "the search's folder is not seen from here", str(folder.parents[1]))
    train, val = split_validation(images, fraction=config.val_fraction, seed=config.split_seed)
    with working_folder(folder, place) as (here, save), lock_folder(here, wait_s=WORKER_WAIT_S):
        trainer, _ = restore_trainer(config, train, val, here)
        try:
            for _ in train_saving(trainer, here, on_save=save):
                save()
            result = {"config": config.to_dict(), "error": "", **trainer.history[-1]}
        except DivergedError as error:
            result = {"config": config.to_dict(), "error": str(error)}
        write_json(here / "result.json", result)
        shutil.rmtree(here / "checkpoints", ignore_errors=True)
        save()
    return result


class Confirmation:
    """The runs of a search's best configurations over fresh seeds, and what they allow to say."""

    def __init__(
        self,
        folder: Path,
        rows: list[Row],
        space: Space,
        base: TrainConfig,
        settings: SearchSettings,
        num_val: int,
        kept: Kept | None = None,
    ) -> None:
        """Takes up what the folder has of earlier runs. `kept` is where it is kept, if not in itself."""
        self.folder = folder
        self.kept = kept or Kept()
        self.base = base
        self.metric = settings.main_metric
        self.sign = 1 if settings.mode == "max" else -1
        self.max_rounds = settings.confirm_seeds
        self.runs_a_trial = settings.seeds_per_trial
        self.least_sd = 100 / num_val if "accuracy" in self.metric else 0.0  # one image
        before = self._read_written()
        in_before = [arm["trial_id"] for arm in before["arms"] if arm.get("still_in")] if before else []
        self.arms = {arm.trial_id: arm for arm in choose_arms(rows, space, base, settings, in_before)}
        # Of the runs, until more are done.
        written: dict[str, Any] = before or {}
        self.origin: dict[str, Any] = {n: written[n] for n in ("commit", "versions", "hardware") if n in written}
        self.results: dict[Run, dict[str, Any]] = {}
        self._given: set[Run] = set()
        for run in (Run(arm, number) for number in range(self.max_rounds) for arm in self.arms):
            result = self._read_result(run)
            if result is not None:
                self.results[run] = result

    def drop_checkpoints(self) -> None:
        """Remove those of runs that have ended: one may have been killed just before it did that itself."""
        for folder in map(self.run_folder, self.results):
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            self.kept.drop_checkpoints(folder)

    def config(self, run: Run) -> TrainConfig:
        fresh = FRESH_SEEDS + run.round
        seeds = {"seed": self.base.seed + fresh, "split_seed": self.base.split_seed + fresh}
        return self.base.with_settings(**self.arms[run.arm].params, **seeds)

    def run_folder(self, run: Run) -> Path:
        return self.folder / "confirmation" / f"{run.arm}-seed-{self.config(run).seed}"

    def _read_result(self, run: Run) -> dict[str, Any] | None:
        """What a run that has ended found; None for one that has not, or whose record is damaged or another's."""
        try:
            result = read_json(self.run_folder(run) / "result.json")
            check_same_run(self.config(run), TrainConfig.from_dict(result.get("config")))
        except ValueError:
            return None
        value, error = result.get(self.metric), result.get("error")
        if not isinstance(error, str):
            return None
        measured = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return result if error or measured else None

    def _read_written(self) -> dict[str, Any] | None:
        """The record as it was last written; None where there is none or it is damaged: it is made anew."""
        try:
            return load_confirmation(self.folder)
        except ValueError:
            return None

    def value(self, run: Run) -> float:
        """Larger is better; NaN for a run that diverged."""
        result = self.results[run]
        return math.nan if result["error"] else self.sign * result[self.metric]

    def judge(self) -> Judgement:
        values = {}
        for arm in self.arms:
            runs = [Run(arm, number) for number in range(self.max_rounds)]
            done = next((i for i, run in enumerate(runs) if run not in self.results), self.max_rounds)
            values[arm] = [self.value(run) for run in runs[:done]]
        return judge(values, self.max_rounds, self.least_sd)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to run, and that is on disk."""
        written = self._read_written()
        return (
            self.judge().is_over
            and written is not None
            and (written["status"], written.get("max_seeds")) == ("finished", self.max_rounds)
            and [arm["trial_id"] for arm in written["arms"]] == list(self.arms)
        )

    def next_run(self) -> Run | None:
        """The next that is worth doing: round by round, of the arms still in."""
        judgement = self.judge()
        if judgement.is_over:
            return None
        for number in range(self.max_rounds):
            for arm in self.arms:
                run = Run(arm, number)
                if arm in judgement.remaining and run not in self.results and run not in self._given:
                    self._given.add(run)
                    return run
        return None

    def num_left(self, rounds: int) -> int:
        """How many runs so many rounds still take if no arm drops out that has not."""
        remaining = self.judge().remaining
        return sum(Run(arm, number) not in self.results for arm in remaining for number in range(rounds))

    def choice(self, judgement: Judgement) -> Arm | None:
        """The leader; but deep supervision alone, another method, only if no other can be the best. None: no leader."""
        names = [arm for arm in judgement.remaining if self.arms[arm].role != "control"] or judgement.remaining
        return self.arms[names[0]] if names else None

    def save(self, status: str) -> None:
        judgement = self.judge()
        choice = self.choice(judgement)
        record = {
            "search": self.folder.name,
            "status": status,
            "written_at": now(),
            "metric": self.metric,
            "mode": "max" if self.sign > 0 else "min",
            "confidence": 1 - ERROR,
            "max_seeds": self.max_rounds,
            "num_rounds": judgement.rounds,
            "arms": [
                arm._asdict()
                | {"values": self._measured(arm.trial_id), "still_in": arm.trial_id in judgement.remaining}
                for arm in self.arms.values()
            ],
            "comparisons": [one._asdict() | {"resolved": one.resolved} for one in judgement.comparisons.values()],
            "resolved": judgement.resolved,
            "verdict": self.verdict(judgement),
            **self.origin,
        }
        if choice is not None:  # as in best.json: retraining uses all training images
            config = self.base.with_settings(**choice.params, val_fraction=0.0)
            record |= {"choice": choice.trial_id, "config": config.to_dict()}
        write_json(self.folder / CONFIRMATION, record)
        self.kept.put(self.folder / CONFIRMATION)

    def _measured(self, arm: str) -> list[float | None]:
        """By round; None for a run that diverged or is not done."""
        last = max((run.round for run in self.results if run.arm == arm), default=-1)
        results = [self.results.get(Run(arm, number), {}) for number in range(last + 1)]
        return [result.get(self.metric) for result in results]

    # ------------------------------------------------------------ words

    def verdict(self, judgement: Judgement) -> list[str]:
        """Sentences: which configuration, by how much, how sure; or that it is not resolved, and what it would take."""
        if judgement.leader is None:
            return ["Of every setting a run diverged: there is nothing to choose."]
        leader = self.arms[judgement.leader]
        name = f"{leader.describe()} ({leader.settings()})"
        seeds = f"{judgement.rounds} fresh seed{'s' * (judgement.rounds != 1)}"
        if judgement.rounds == 0:
            sentences = ["Not resolved: no fresh seed has been run by all yet."]
        elif judgement.resolved:
            sentences = [f"Resolved after {seeds}: {name} is best."]
        elif len(judgement.remaining) > 1:
            sentences = [f"Not resolved after {seeds}: {name} leads."]
        else:
            sentences = [f"Not resolved: {name} is the only one of which no run diverged."]
        for other, arm in self.arms.items():
            one = judgement.comparisons.get(other)
            if other in judgement.diverged:
                told = "left out, a run of it diverged"
            elif one is not None:
                told = self._describe(one)
            else:
                told = "not compared yet"
            if other != judgement.leader and judgement.rounds:
                sentences.append(f"{_capital(arm.describe())} ({arm.settings()}): {told}.")
        choice = self.choice(judgement)
        if choice is not None and choice != leader:
            sentences.append(f"As that is not shown, {choice.describe()} is chosen, the best with distillation.")
        return sentences

    def _describe(self, one: Comparison) -> str:
        unit, digits = ("points", 2) if "accuracy" in self.metric else ("nats", 4)
        low, high = one.difference - one.half_width, one.difference + one.half_width
        behind = (
            f"{one.difference:.{digits}f} {unit} behind {self.arms[one.leader].describe()}, "
            f"{100 * (1 - ERROR):.0f} % interval {low:.{digits}f} to {high:.{digits}f}, {one.rounds} seeds: "
        )
        if one.resolved:
            return f"{behind}resolved"
        more = one.runs_needed
        runs = f"more than {MOST_RUNS_NAMED}" if more > MOST_RUNS_NAMED else f"about {more}"
        return f"{behind}not resolved, needs {runs} more run{'s' * (more != 1)} of each"


def confirm(
    confirmation: Confirmation, slots: Slots, stop_asked: StopAsked, deadline: float | None
) -> tuple[bool, str]:
    """Run what is worth running, on a Ray that is started; returns whether it is over and else what went wrong.

    Raises StoppedError when asked to stop, OSError where another driver goes on with it; what was begun goes on from
    its checkpoints another time.
    """
    import ray

    base = confirmation.base
    images = ray.put(load_images(base.dataset, base.data_dir, "train"))
    trouble = ""

    def take() -> Task[Run] | None:
        run = None if trouble else confirmation.next_run()
        if run is None:
            return None
        folder = confirmation.run_folder(run)
        place = confirmation.kept.place(folder)
        return Task(run, (confirmation.config(run), folder, images, slots.cpus, place))

    def has_to_stop() -> int:
        confirmation.kept.look()
        return stop_asked()

    confirmation.save("running")
    try:
        for run, result, error in run_tasks(do_run, take, slots, has_to_stop, deadline):
            if error:
                trouble = f"the run in {confirmation.run_folder(run)} failed: {error}"
                print(trouble, flush=True)
                continue
            before = confirmation.judge()
            confirmation.results[run] = result
            confirmation.kept.fetch_run(confirmation.run_folder(run))
            confirmation.save("running")
            told = result["error"] or f"{confirmation.metric} {format_value(result[confirmation.metric])}"
            name = confirmation.arms[run.arm].describe()
            print(f"round {run.round + 1}  {name}  seed {result['config']['seed']}  {told}", flush=True)
            for arm in set(before.remaining) - set(confirmation.judge().remaining):
                print(f"         {confirmation.arms[arm].describe()} is out", flush=True)
    except StoppedError:
        confirmation.save("interrupted")
        raise
    is_over = confirmation.judge().is_over
    confirmation.save("finished" if is_over else "interrupted")
    return is_over, trouble


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
