"""Runs the best trials of a search and both baselines again over fresh seeds, until it is clear which is best.

confirmation.json              the arms with their values, the comparisons, the verdict, the configuration chosen
confirmation/ID-seed-N/        one run: metrics.jsonl, checkpoints while it goes on, result.json when it has ended

A seed is fresh: no trial had it. It sets the weights, the order of the images, their augmentation and which training
images are held out, the same for every arm; so what chose the arms does not flatter them here. The test set is never
read.
"""

import math
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from errno import ENOENT
from pathlib import Path
from typing import Any, NamedTuple

import torch

from byot.config import TrainConfig
from byot.console import show_runs
from byot.data import LabelledImages, load_images, split_validation
from byot.runs import StopAsked, restore_trainer, train_saving
from byot.search_files import (
    CONFIRMATION,
    ROLE_NAMES,
    ConfirmationRecord,
    Role,
    Space,
    TrialRecord,
    format_parameter,
    format_value,
    is_number,
    load_confirmation,
    ranked,
    settings_of,
    to_retrain,
    to_unit,
    unit,
)
from byot.system.files import read_json, write_json
from byot.system.lock import WORKER_WAIT_S, lock_folder
from byot.system.stopping import DivergedError, StoppedError
from byot.trainer import check_same_run
from search.records import now
from search.settings import FRESH_SEEDS, SearchSettings
from search.significance import ERROR, FIRST_LOOK, Judgement, describe, judge
from search.space import first_points
from search.system.remote import Store, working_folder
from search.system.resources import Resources
from search.system.tasks import Task, run_tasks

SIMPLEST_FIRST: tuple[Role, ...] = ("control", "reference")  # then the sampled settings


class Arm(NamedTuple):
    """A configuration that is run again."""

    trial_id: str
    role: Role
    params: dict[str, Any]  # with the loss weights that were not searched

    def describe(self) -> str:
        return ROLE_NAMES.get(self.role, f"trial {self.trial_id}")

    def settings(self) -> str:
        return ", ".join(f"{name} {format_parameter(value)}" for name, value in self.params.items())


class Run(NamedTuple):
    """One run of an arm."""

    arm: str  # its trial
    round: int  # from 0


def to_arm(trial: TrialRecord, base: TrainConfig) -> Arm:
    return Arm(trial.trial_id, trial.role, settings_of(base, trial.role, trial.params))


def choose_arms(
    trials: Iterable[TrialRecord],
    base: TrainConfig,
    metric: str,
    top: int,
    baselines: list[Arm],
    in_before: Collection[str] = (),
    first: Iterable[Arm] = (),
) -> list[Arm]:
    """Choose the best different configurations, those in `first` before all, then the baselines not among them.

    Trials in `in_before`, still in before more were searched, stay: a luckier single run does not put them out.
    """
    arms = list(first)
    for trial in ranked(trials, metric):
        asked = len(arms) < top or trial.trial_id in in_before
        arm = to_arm(trial, base)
        if asked and arm.params not in [other.params for other in arms]:
            arms.append(arm)
    return arms + [baseline for baseline in baselines if baseline.params not in [arm.params for arm in arms]]


def do_run(config: TrainConfig, folder: Path, images: LabelledImages, threads: int, store: Store) -> dict[str, Any]:
    """Train one arm with one seed, or the rest of it, and return its last epoch, with an error if it diverged."""
    torch.set_num_threads(threads)
    if store.bucket is None and not (store.folder / "trials").is_dir():  # made here, it would be on this node alone
        raise FileNotFoundError(ENOENT, "the search's folder is not seen from here", str(store.folder))
    train, val = split_validation(images, fraction=config.val_fraction, seed=config.split_seed)
    with working_folder(folder, store) as (here, save), lock_folder(here, wait_s=WORKER_WAIT_S):
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
        store: Store,
        trials: list[TrialRecord],
        space: Space,
        base: TrainConfig,
        settings: SearchSettings,
        num_val: int,
    ) -> None:
        """Take up what the folder has of earlier runs."""
        self.store = store
        self.folder = store.folder
        self.base = base
        self.metric = settings.main_metric
        self.mode = settings.mode
        self.max_rounds = settings.confirm_seeds
        self.margin = to_unit(self.metric, settings.margin)
        self.runs_a_trial = settings.seeds_per_trial
        self.least_sd = 100 / num_val if "accuracy" in self.metric else 0.0  # one image
        written = self._read_written()
        in_before = [arm.trial_id for arm in written.arms if arm.still_in] if written else []
        ids = {trial.role: trial.trial_id for trial in trials}
        baselines = [
            Arm(ids.get(role, role), role, settings_of(base, role, params))
            for role, params in first_points(space, base)
        ]
        arms = choose_arms(trials, base, self.metric, settings.confirm, baselines, in_before)
        self.arms = {arm.trial_id: arm for arm in arms}
        before = written.fields if written else {}  # where the runs were made, until more are
        origin = ("commit", "versions", "hardware")
        self.origin: dict[str, Any] = {name: before[name] for name in origin if name in before}
        self.runs = [Run(arm, number) for number in range(self.max_rounds) for arm in self.arms]
        self.results = {run: result for run in self.runs if (result := self._read_result(run)) is not None}
        self._given: set[Run] = set()

    def drop_checkpoints(self) -> None:
        """Remove those of runs that have ended: one may have been killed just before it did that itself."""
        for run in self.results:
            self.store.drop_checkpoints(self.run_folder(run))

    def config(self, run: Run) -> TrainConfig:
        fresh = FRESH_SEEDS + run.round
        seeds = {"seed": self.base.seed + fresh, "split_seed": self.base.split_seed + fresh}
        return self.base.with_settings(**self.arms[run.arm].params, **seeds)

    def run_folder(self, run: Run) -> Path:
        return self.folder / "confirmation" / f"{run.arm}-seed-{self.config(run).seed}"

    def _read_result(self, run: Run) -> dict[str, Any] | None:
        """Read what a run found; None if it has not ended, or its record is damaged or of other settings."""
        try:
            result = read_json(self.run_folder(run) / "result.json")
            check_same_run(self.config(run), TrainConfig.from_dict(result.get("config")))
        except ValueError:
            return None
        error = result.get("error")
        return result if isinstance(error, str) and (error or is_number(result.get(self.metric))) else None

    def _read_written(self) -> ConfirmationRecord | None:
        """Read the record as it was last written; None where there is none or it is damaged: it is made anew."""
        with suppress(ValueError):
            return load_confirmation(self.folder)
        return None

    def value(self, run: Run) -> float:
        """Return the metric, so that larger is better; NaN for a run that diverged."""
        result = self.results[run]
        return math.nan if result["error"] else result[self.metric] * (1 if self.mode == "max" else -1)

    def judge(self) -> Judgement:
        values: dict[str, list[float]] = {arm: [] for arm in self.arms}
        for run in self.runs:
            if run in self.results and len(values[run.arm]) == run.round:  # none before it is missing
                values[run.arm].append(self.value(run))
        simplest = [name for role in SIMPLEST_FIRST for name, arm in self.arms.items() if arm.role == role]
        return judge(values, self.max_rounds, self.margin, simplest=simplest, least_sd=self.least_sd)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to run, and that is on disk."""
        written = self._read_written()
        return (
            self.judge().is_over
            and written is not None
            and written.status == "finished"
            and (written.fields.get("max_seeds"), written.fields.get("margin")) == (self.max_rounds, self.margin)
            and [arm.trial_id for arm in written.arms] == list(self.arms)
        )

    def next_run(self) -> Run | None:
        """Return the next that is worth doing: round by round, of the arms still in."""
        judgement = self.judge()
        waiting = (run for run in self.runs if run.arm in judgement.remaining and run not in self.results)
        run = next((run for run in waiting if run not in self._given), None)
        if run is None or judgement.is_over:
            return None
        self._given.add(run)
        return run

    def num_left(self, rounds: int) -> int:
        """Count the runs that so many rounds still take if no arm drops out that has not."""
        remaining = self.judge().remaining
        return sum(run.arm in remaining and run.round < rounds and run not in self.results for run in self.runs)

    def save(self, status: str) -> None:
        judgement = self.judge()
        record: dict[str, Any] = {
            "search": self.folder.name,
            "status": status,
            "written_at": now(),
            "metric": self.metric,
            "mode": self.mode,
            "confidence": 1 - ERROR,
            "max_seeds": self.max_rounds,
            "margin": self.margin,
            "num_rounds": judgement.rounds,
            "arms": [
                arm._asdict() | {"values": self._measured(trial_id), "still_in": trial_id in judgement.remaining}
                for trial_id, arm in self.arms.items()
            ],
            "comparisons": [
                one._asdict() | {"half_width": one.half_width(), "resolved": one.resolved}
                for one in judgement.comparisons.values()
            ],
            "resolved": judgement.resolved,
            "equivalent": judgement.equivalent,
            "verdict": self.verdict(judgement),
            **self.origin,
        }
        if judgement.chosen is not None:  # as in best.json: retraining uses all training images
            arm = self.arms[judgement.chosen]
            record |= {"choice": arm.trial_id, "config": to_retrain(self.base, arm.role, arm.params).to_dict()}
        write_json(self.folder / CONFIRMATION, record)
        self.store.push(self.folder / CONFIRMATION)

    def _measured(self, arm: str) -> list[float | None]:
        """Return the metric by round; None for a run that diverged or is not done."""
        last = max((run.round for run in self.results if run.arm == arm), default=-1)
        return [self.results.get(Run(arm, number), {}).get(self.metric) for number in range(last + 1)]

    # ------------------------------------------------------------ words

    def verdict(self, judgement: Judgement) -> list[str]:
        """Say which configuration, by how much, how sure; or that it is not resolved, and what it would take."""
        if judgement.leader is None or judgement.chosen is None:
            return ["A run of every setting diverged, so none can be chosen."]
        leader, chosen = self.arms[judgement.leader], self.arms[judgement.chosen]
        name = f"{leader.describe()} ({leader.settings()})"
        seeds = f"{judgement.rounds} fresh seed{'s' * (judgement.rounds != 1)}"
        if judgement.resolved:
            sentences = [f"Resolved after {seeds}: {name} is best."]
        elif judgement.equivalent:
            names = ", ".join(self.arms[arm].describe() for arm in judgement.equivalent)
            margin = f"{format_value(self.metric, self.margin)} {unit(self.metric, 'points')}"
            why = "is the simplest" if chosen.role in SIMPLEST_FIRST else "leads"
            sentences = [
                f"Equal within {margin} after {seeds}: {names}.",
                f"Chosen: {chosen.describe()} ({chosen.settings()}), which {why}.",
            ]
        elif len(judgement.remaining) == 1:
            sentences = [f"Not resolved: {name} is the only one of which no run diverged."]
        elif judgement.rounds == 0:
            sentences = ["Not resolved: no fresh seed has been run by all yet."]
        else:
            how = ", and is chosen" if judgement.is_over else " so far"
            sentences = [f"Not resolved after {seeds}: {name} leads{how}."]
        if chosen.role == "control" and (judgement.resolved or judgement.equivalent):
            sentences.append("Self distillation showed nothing here that deep supervision alone does not give.")
        for other, arm in self.arms.items() if judgement.rounds or judgement.diverged else ():
            against, told = "", f"not compared: that takes {FIRST_LOOK} seeds"
            if other in judgement.diverged:
                told = "left out, a run of it diverged"
            elif one := judgement.comparisons.get(other):
                against, told = f" against {self.arms[one.arm].describe()}", describe(self.metric, one.reversed())
            if other != judgement.leader:
                sentence = f"{arm.describe()} ({arm.settings()}){against}: {told}."
                sentences.append(sentence[0].upper() + sentence[1:])
        if len(judgement.comparisons) > 1:
            sentences.append(f"Each interval holds by itself with {100 * (1 - ERROR):.0f} %, not all at once.")
        return sentences


def confirm(
    confirmation: Confirmation, resources: Resources, stop_asked: StopAsked, deadline: float | None
) -> tuple[bool, str]:
    """Run what is worth running, on a Ray that is started; return whether it is over, and what went wrong, if anything.

    Raises StoppedError when asked to stop, OSError where another driver goes on with it; what was begun goes on from
    its checkpoints another time.
    """
    import ray

    base, metric, store = confirmation.base, confirmation.metric, confirmation.store
    images = ray.put(load_images(base.dataset, base.data_dir, "train", base.image_size))
    trouble = ""

    def take() -> Task[Run] | None:
        run = None if trouble else confirmation.next_run()
        if run is None:
            return None
        folder = confirmation.run_folder(run)
        return Task(run, (confirmation.config(run), folder, images, resources.cpus, store))

    def has_to_stop() -> int:
        store.watch_lease()
        return stop_asked()

    confirmation.save("running")
    try:
        with show_runs(base) as (say, show):
            num_left = confirmation.num_left(confirmation.max_rounds)

            def on_look(running: Collection[Run]) -> None:
                num_ended = len(confirmation.results)
                show(map(confirmation.run_folder, running), num_ended, num_ended + num_left)

            for run, result, error in run_tasks(do_run, take, resources, has_to_stop, deadline, on_look):
                if error:
                    trouble = f"the run in {confirmation.run_folder(run)} failed: {error}"
                    say(trouble)
                    continue
                before = confirmation.judge()
                confirmation.results[run] = result
                num_left = confirmation.num_left(confirmation.max_rounds)
                store.pull_run(confirmation.run_folder(run))
                confirmation.save("running")
                told = result["error"] or f"{metric} {format_value(metric, result[metric])}"
                name = confirmation.arms[run.arm].describe()
                say(f"round {run.round + 1}  {name}  seed {result['config']['seed']}  {told}")
                for arm in set(before.remaining) - set(confirmation.judge().remaining):
                    say(f"         {confirmation.arms[arm].describe()} is out")
    except StoppedError:
        confirmation.save("interrupted")
        raise
    is_over = confirmation.judge().is_over
    confirmation.save("finished" if is_over else "interrupted")
    return is_over, trouble
