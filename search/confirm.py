"""The best trials of a search and both controls, run again over fresh seeds until it is clear which is best.

confirmation.json              the arms with their values, the comparisons, the verdict, the configuration chosen
confirmation/ID-seed-N/        one run: metrics.jsonl, checkpoints while it goes on, result.json when it has ended

A seed is fresh: no trial had it. It sets the weights, the order of the images, their augmentation and which training
images are held out, the same for every arm; so what chose the arms does not flatter them here. The test set is never
read.
"""

import math
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from byot.config import TrainConfig
from byot.data import LabelledImages, load_images, split_validation
from byot.files import read_json, write_json
from byot.lock import WORKER_WAIT_S, lock_folder
from byot.provenance import provenance
from byot.runs import StopAsked, restore_trainer, train_saving
from byot.searched import CONFIRMATION
from byot.stopping import DivergedError, StoppedError
from byot.trainer import check_same_run
from search.cluster import Slots
from search.confirmation import ERROR, MOST_RUNS_NAMED, Comparison, Judgement, judge
from search.records import Row, now, ranked
from search.settings import SearchSettings
from search.space import Role, Space, first_points
from search.tasks import Task, run_tasks

FRESH = 1000  # the first fresh seed is so much above the search's own
ROLE_NAMES = {"reference": "the reference's setting", "control": "deep supervision alone"}


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


def choose_arms(rows: list[Row], space: Space, base: TrainConfig, settings: SearchSettings) -> list[Arm]:
    """The best different configurations, then the reference's setting and the control where they are not among them."""
    arms: list[Arm] = []
    rows_by_role = {row["role"]: row["trial_id"] for row in rows}
    for row in ranked(rows, settings.main_metric, settings.mode):
        params = {name: row[name] for name in space}
        if len(arms) < (settings.confirm or 0) and params not in [arm.params for arm in arms]:
            arms.append(Arm(row["trial_id"], row["role"], params))
    for point in first_points(space, base):
        if point.params not in [arm.params for arm in arms]:
            arms.append(Arm(rows_by_role.get(point.role, point.role), point.role, point.params))
    return arms


def do_run(config: TrainConfig, folder: Path, images: LabelledImages, threads: int) -> dict[str, Any]:
    """Train one arm with one seed, or the rest of it, and return its last epoch, with an error if it diverged."""
    torch.set_num_threads(threads)
    train, val = split_validation(images, fraction=config.val_fraction, seed=config.split_seed)
    with lock_folder(folder, wait_s=WORKER_WAIT_S):
        trainer, _ = restore_trainer(config, train, val, folder, may_compile=False)
        try:
            for _ in train_saving(trainer, folder):
                pass
            result = {"config": config.to_dict(), "error": "", **trainer.history[-1]}
        except DivergedError as error:
            result = {"config": config.to_dict(), "error": str(error)}
        write_json(folder / "result.json", result)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


class Confirmation:
    """The runs of a search's best configurations over fresh seeds, and what they allow to say."""

    def __init__(
        self, folder: Path, rows: list[Row], space: Space, base: TrainConfig, settings: SearchSettings, num_val: int
    ) -> None:
        """Takes up what the folder has of earlier runs."""
        self.folder = folder
        self.base = base
        self.metric = settings.main_metric
        self.sign = 1 if settings.mode == "max" else -1
        self.max_rounds = settings.confirm_seeds
        self.least_sd = 100 / num_val if "accuracy" in self.metric else 0.0  # one image
        self.arms = {arm.trial_id: arm for arm in choose_arms(rows, space, base, settings)}
        self.results: dict[Run, dict[str, Any]] = {}
        self._given: set[Run] = set()
        for run in (Run(arm, number) for number in range(self.max_rounds) for arm in self.arms):
            result = self._read_result(run)
            if result is not None:
                self.results[run] = result

    def config(self, run: Run) -> TrainConfig:
        fresh = FRESH + run.round
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
        return result if result.get("error") or isinstance(result.get(self.metric), int | float) else None

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
        try:
            written = read_json(self.folder / CONFIRMATION)
        except ValueError:
            return False
        return self.judge().is_over and written.get("status") == "finished"

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

    def choice(self, judgement: Judgement) -> Arm:
        """The leader; but deep supervision alone, another method, only if no other can be the best."""
        names = [arm for arm in judgement.remaining if self.arms[arm].role != "control"]
        return self.arms[names[0] if names else judgement.leader]

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
            "comparisons": [
                one._asdict() | {"resolved": one.resolved}
                for other, one in judgement.comparisons.items()
                if other != judgement.leader
            ],
            "resolved": len(judgement.remaining) == 1,
            "choice": choice.trial_id,
            "verdict": self.verdict(judgement),
            # As in best.json: retraining uses all training images.
            "config": {**self.base.with_settings(**choice.params).to_dict(), "val_fraction": 0.0},
            **provenance(torch.device("cpu")),
        }
        write_json(self.folder / CONFIRMATION, record)

    def _measured(self, arm: str) -> list[float | None]:
        runs = sorted(run for run in self.results if run.arm == arm)
        return [None if self.results[run]["error"] else self.results[run][self.metric] for run in runs]

    # ------------------------------------------------------------ words

    def verdict(self, judgement: Judgement) -> list[str]:
        """Sentences: which configuration, by how much, how sure; or that it is not resolved, and what it would take."""
        leader = self.arms[judgement.leader]
        name = leader.describe()
        seeds = f"{judgement.rounds} fresh seed{'s' * (judgement.rounds != 1)}"
        if len(judgement.remaining) == 1:
            first = f"Resolved after {seeds}: {name} is best ({leader.settings()})."
        else:
            first = f"Not resolved after {seeds}: {name} leads ({leader.settings()})."
        sentences = [first]
        for arm in self.arms.values():
            if arm.trial_id == judgement.leader:
                continue
            one = judgement.comparisons.get(arm.trial_id)
            diverged = [run for run in self.results if run.arm == arm.trial_id and self.results[run]["error"]]
            if diverged:
                sentences.append(f"{_capital(arm.describe())} ({arm.settings()}): out, a run of it diverged.")
            elif one is None:
                sentences.append(f"{_capital(arm.describe())} ({arm.settings()}): not compared yet.")
            else:
                sentences.append(f"{_capital(arm.describe())} ({arm.settings()}): {self._describe(one)}.")
        choice = self.choice(judgement)
        if choice != leader:
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

    Raises StoppedError when asked to stop; what was begun goes on from its checkpoints another time.
    """
    import ray

    base = confirmation.base
    images = ray.put(load_images(base.dataset, base.data_dir, "train"))
    trouble = ""

    def take() -> Task[Run] | None:
        late = deadline is not None and time.monotonic() > deadline
        run = None if late or trouble else confirmation.next_run()
        if run is None:
            return None
        return Task(run, do_run, (confirmation.config(run), confirmation.run_folder(run), images, slots.cpus))

    confirmation.save("running")
    try:
        for run, result, error in run_tasks(take, slots, stop_asked):
            if error:
                trouble = f"the run in {confirmation.run_folder(run)} failed: {error}"
                continue
            before = confirmation.judge()
            confirmation.results[run] = result
            judgement = confirmation.judge()
            confirmation.save("running")
            measured = result["error"] or f"{confirmation.metric} {result[confirmation.metric]:.2f}"
            print(
                f"round {run.round + 1}  {confirmation.arms[run.arm].describe()}  seed {result['config']['seed']}  "
                f"{measured}",
                flush=True,
            )
            for arm in before.remaining:
                if arm not in judgement.remaining:
                    print(f"         {confirmation.arms[arm].describe()} is out", flush=True)
    except StoppedError:
        confirmation.save("interrupted")
        raise
    is_over = confirmation.judge().is_over
    confirmation.save("finished" if is_over else "interrupted")
    return is_over, trouble


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
