"""The searcher and the scheduler: Optuna's samplers and Ray's ASHA, each told what it needs to judge by budgets.

Both, and the journal for optuna-dashboard, are made from the search's own records, whether it starts or goes on: there
is no other state to restore.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import Searcher

from byot.search_files import ConfirmationRecord, Range, Space, TrialRecord, is_inside, metric_mode
from search.records import SearchRecords
from search.settings import REDUCTION_FACTOR, Sampler
from search.space import FirstPoint, make_distributions
from search.trial import PACE
from search.warm import WarmStart, WarmTrial

MAX_STARTUP_TRIALS = 10  # Optuna's default number of random trials before TPE models anything
PRIOR_SHARE = 2 / 3  # of the random proposals lie around the reference's setting
PRIOR_SD = 0.2  # of the range


def study_directions(metrics: tuple[str, ...]) -> list[Literal["minimize", "maximize"]]:
    return ["maximize" if metric_mode(name) == "max" else "minimize" for name in metrics]


def is_known_to_sampler(trial: TrialRecord, space: Space) -> bool:
    """Tell whether the sampler learns from a trial.

    It does not from the control: that is another method, and its beta of 0 has no logarithm.
    """
    return trial.role != "control" and is_inside(space, trial.params)


def to_optuna(trial: TrialRecord, records: SearchRecords, space: Space) -> FrozenTrial:
    """Convert a trial to Optuna's form; one outside the space gets no parameters and no value there, only attributes.

    With a value, optuna-dashboard would call it the best, without its settings.

    Ray would call a trial stopped early complete, with the value it had then, so that low-epoch values compete with
    final ones. Here it is pruned, with its epochs: TPE then ranks by epochs first. A diverged one is pruned without
    any value, which ranks last; as failed its region would look unexplored. A crash says nothing of the region.
    """
    states = {"completed": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "running": TrialState.RUNNING}
    state = TrialState.PRUNED if trial.diverged else states.get(trial.status, TrialState.FAIL)
    known = is_known_to_sampler(trial, space)
    values: dict[str, Any] = {name: trial.measures[name] for name in records.metrics}
    if not known and state == TrialState.COMPLETE:
        state = TrialState.PRUNED
    has_curve = trial.status in ("completed", "stopped") and len(records.metrics) == 1  # Optuna has none for several
    return optuna.trial.create_trial(
        state=state,
        values=list(values.values()) if state == TrialState.COMPLETE else None,
        params=trial.params if known else {},
        distributions=make_distributions(space) if known else {},
        intermediate_values=records.curves[trial.trial_id] if has_curve else {},
        user_attrs={name: getattr(trial, name) for name in ("trial_id", "role", "status", "error", "seconds")}
        | ({} if known else trial.params | values),
    )


def warm_to_optuna(trial: WarmTrial, space: Space) -> FrozenTrial:
    """Make the trial of an earlier search that Optuna is to know: of one that was stopped, its last epoch alone."""
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE if trial.completed else TrialState.PRUNED,
        values=trial.values if trial.completed else None,
        params=trial.params,
        distributions=make_distributions(space),
        intermediate_values={trial.epochs_done: trial.values[0]} if len(trial.values) == 1 else {},
    )


class OptunaMirror:
    """The trials that have ended as an Optuna journal, optuna.log, that optuna-dashboard opens; made anew each time."""

    def __init__(self, records: SearchRecords, space: Space) -> None:
        self._records, self._space = records, space
        path = records.folder / "optuna.log"
        for old in (path, path.with_name("optuna.log.lock")):  # the lock is of a process that was killed
            old.unlink(missing_ok=True)
        self._study = optuna.create_study(
            study_name=records.folder.name,
            storage=JournalStorage(JournalFileBackend(str(path))),
            directions=study_directions(records.metrics),
        )
        for trial in records.ended:
            self.add(trial)

    def add(self, trial: TrialRecord) -> None:
        self._study.add_trial(to_optuna(trial, self._records, self._space))

    def tell_verdict(self, confirmation: ConfirmationRecord) -> None:
        """Note the trial that is the best over fresh seeds, whatever its single run says."""
        self._study.set_user_attr("best over fresh seeds", confirmation.final_choice)
        self._study.set_user_attr("verdict", " ".join(confirmation.verdict))


def make_sampler(name: Sampler, seed: int, startup: int) -> optuna.samplers.BaseSampler:
    """Make a sampler; of TPE and GP the first `startup` proposals are random."""
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
    return optuna.samplers.TPESampler(
        seed=seed,
        n_startup_trials=startup,
        multivariate=True,
        constant_liar=True,  # trials that run count as bad for the time, so that their likes are not proposed
    )


class BudgetAwareSearch(Searcher):
    """Proposes what is unfinished, then the first points, then what an Optuna sampler draws.

    Each proposal has a new study and sampler, made from the records. So proposal n depends only on the seed, n, the
    warm start, the trials begun before it and the results of those that have ended. A restart loses none of these.
    """

    def __init__(
        self,
        records: SearchRecords,
        space: Space,
        *,
        first: list[FirstPoint],
        tried: Sequence[FirstPoint] = (),
        num_samples: int,
        sampler: Sampler = "tpe",
        has_prior: bool = False,
        warm: WarmStart | None = None,
    ) -> None:
        super().__init__(metric=records.metric, mode=records.mode)
        self._records = records
        self._space = space
        self._startup = max(2, min(MAX_STARTUP_TRIALS, num_samples // 4))
        self._sampler = sampler
        self._prior = first[0].params if has_prior else None  # where random proposals are likely to lie
        self._unfinished = records.unfinished
        roles = [trial.role for trial in records.trials.values()]
        early = [*tried, *(FirstPoint("sampled", params) for params in (warm.points if warm else []))]
        self._first = [point for point in first if point.role not in roles] + early[roles.count("sampled") :]
        self._ended: dict[str, FrozenTrial] = {}
        self._earlier = [] if warm is None else [warm_to_optuna(trial, space) for trial in warm.trials]

    def make_study(self) -> optuna.Study:
        """Make a study of all trials begun, for the next proposal."""
        (seed,) = self._seeds().generate_state(1)
        study = optuna.create_study(
            directions=study_directions(self._records.metrics),
            sampler=make_sampler(self._sampler, int(seed), self._startup),
        )
        known = [trial for trial in self._records.trials.values() if is_known_to_sampler(trial, self._space)]
        study.add_trials([*self._earlier, *map(self._to_optuna, known)])
        return study

    def _to_optuna(self, trial: TrialRecord) -> FrozenTrial:
        """Make the trial that Optuna is to know; one that has ended is made once."""
        if trial.status == "running":
            return to_optuna(trial, self._records, self._space)
        if trial.trial_id not in self._ended:
            self._ended[trial.trial_id] = to_optuna(trial, self._records, self._space)
        return self._ended[trial.trial_id]

    def _seeds(self) -> np.random.SeedSequence:
        """Return what the next proposal is drawn from."""
        return np.random.SeedSequence((self._records.seed, self._records.next_number))

    def _draw_near(self) -> dict[str, Any]:
        """Draw a random proposal around the prior; nothing where the sampler is to propose.

        That is in a third of the random proposals, and once it knows enough: its own are random no more.
        """
        rng = np.random.default_rng(self._seeds())
        known = len(self._earlier) + sum(is_known_to_sampler(t, self._space) for t in self._records.trials.values())
        if self._prior is None or known >= self._startup or rng.random() > PRIOR_SHARE:
            return {}
        drawn = {}
        for name, bounds in self._space.items():
            place = rng.random()
            if isinstance(bounds, Range):  # what would leave it is reflected at its end
                place = 1 - abs(1 - abs(bounds.place(self._prior[name]) + PRIOR_SD * rng.standard_normal()) % 2)
            drawn[name] = bounds.at(place)
        return drawn

    def suggest(self, trial_id: str) -> dict[str, Any]:
        if self._unfinished:
            trial = self._unfinished.pop(0)
        elif self._first:
            trial = self._records.begin(*self._first.pop(0))
        else:
            params = self._draw_near() or self.make_study().ask(make_distributions(self._space)).params
            trial = self._records.begin("sampled", params)
        return {"trial_id": trial.trial_id, "role": trial.role, "params": trial.params}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: how a trial ended is in the records."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the records are the state."""


class RecordedAsha(AsyncHyperBandScheduler):
    """ASHA by epochs that records each judgement and fills its rungs from those records, since Ray restores none.

    With `stops_early` False no trial is stopped for being behind others.

    The first points always run to their last epoch and stand outside the rungs: compared with at the end, they must not
    stop whatever learns slower than they do at the start. A trial that diverged ends at once. A trial that goes on
    after a restart reports all its epochs again, so that no rung is filled with a later, better value; it is judged
    where it had not been.
    """

    def __init__(self, records: SearchRecords, *, stops_early: bool = True) -> None:
        super().__init__(
            time_attr="epoch",
            metric=records.metric,
            mode=records.mode,
            max_t=records.epochs,
            grace_period=records.grace,
            reduction_factor=REDUCTION_FACTOR,
        )
        self._records = records
        self.stops_early = stops_early
        self.stopped: set[str] = set()  # trial ids
        self._sign = 1.0 if records.mode == "max" else -1.0
        self._rungs: dict[float, dict[str, Any]] = dict(self._brackets[0]._rungs)  # epoch -> trial id -> value
        for trial_id, trial in records.trials.items():
            if trial.role != "sampled":
                continue
            judged = records.judged[trial_id]
            if judged is None:  # lost: all that it has passed, but for its last epoch if that may not have been judged
                judged = dict(records.curves[trial_id])
                if trial.status == "running":
                    judged.pop(trial.epochs_done, None)
            for epoch in set(self._rungs) & set(judged):
                self._rungs[epoch][trial_id] = self._sign * judged[int(epoch)]

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if PACE in result:
            return self.CONTINUE
        epoch, value = result["epoch"], result.get(self._records.metric)
        if value is None or not math.isfinite(value) or epoch >= self._max_t:
            return self.STOP
        if trial.config["role"] != "sampled" or not self.stops_early:
            return self.CONTINUE
        trial_id = trial.config["trial_id"]  # Ray's own id changes when the search goes on
        named: Any = SimpleNamespace(trial_id=trial_id)  # all that the bracket looks at
        decision: str = self._brackets[0].on_result(named, epoch, self._sign * value)
        if decision == self.STOP:
            self.stopped.add(trial_id)
        if epoch in self._rungs and epoch not in (self._records.judged[trial_id] or {}):
            with suppress(OSError):  # a full disk: not recorded, it will be judged again
                self._records.judge(trial_id, epoch, value, goes_on=decision == self.CONTINUE)
        return decision

    def _ignore(self, tune_controller: Any, trial: Trial, result: dict[str, Any] | None = None) -> None:
        """Do nothing: one bracket is for all, and a trial that ends must not fill rungs with its last value."""

    on_trial_add = on_trial_complete = on_trial_remove = _ignore
