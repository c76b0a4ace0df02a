"""The searcher and the scheduler: Optuna's samplers and Ray's ASHA, each told what it needs to judge by budgets.

Both are made from the search's own records, whether it starts or goes on: there is no other state to restore.
"""

import math
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import Searcher

from search.records import CMA_STATE, DIVERGED, Row, SearchRecords
from search.settings import REDUCTION_FACTOR, Mode, Sampler, metric_mode
from search.space import FirstPoint, Space
from search.trial import PACE
from search.warm import WarmStart, WarmTrial

MAX_STARTUP_TRIALS = 10  # Optuna's default number of random trials before TPE models anything


def study_directions(records: SearchRecords) -> list[StudyDirection]:
    """Of each metric searched for."""
    modes = (records.mode, *map(metric_mode, records.metrics[1:]))
    return [StudyDirection.MAXIMIZE if mode == "max" else StudyDirection.MINIMIZE for mode in modes]


def make_distributions(space: Space) -> dict[str, BaseDistribution]:
    return {name: FloatDistribution(r.low, r.high, log=r.log) for name, r in space.items()}


def is_told(row: Row, space: Space) -> bool:
    """Whether the sampler learns of a trial.

    Not of deep supervision alone: it is another method, and its beta of 0 has no logarithm.
    """
    return row["role"] != "control" and all(bounds.holds(row[name]) for name, bounds in space.items())


def describe_end(row: Row, curve: dict[int, float]) -> tuple[TrialState, dict[int, float]]:
    """What Optuna is to know of a trial that has ended: its state and its values by epoch.

    Ray would call a trial stopped early complete, with the value it had then, so that low-epoch values compete with
    final ones. Here it is pruned, with its epochs: TPE then ranks by epochs first. A diverged one is pruned without
    any value, which ranks last; as failed its region would look unexplored. A crash says nothing of the region.
    """
    if row["status"] == "failed":
        return (TrialState.PRUNED if row["error"].startswith(DIVERGED) else TrialState.FAIL), {}
    return (TrialState.COMPLETE if row["status"] == "completed" else TrialState.PRUNED), curve


def to_optuna(row: Row, records: SearchRecords, space: Space) -> FrozenTrial:
    """A trial that has ended as Optuna keeps it; one outside the space has no parameters there, only attributes."""
    state, curve = describe_end(row, records.curve(row["trial_id"]))
    told = is_told(row, space)
    return optuna.trial.create_trial(
        state=state,
        values=[row[metric] for metric in records.metrics] if state == TrialState.COMPLETE else None,
        params={name: row[name] for name in space} if told else {},
        distributions=make_distributions(space) if told else {},
        intermediate_values=curve if len(records.metrics) == 1 else {},  # Optuna has none for several
        system_attrs=records.sampler_state.get(row["trial_id"]),
        user_attrs={key: row[key] for key in ("trial_id", "role", "status", "error", "seconds")}
        | ({} if told else {name: row[name] for name in space}),
    )


def warm_to_optuna(trial: WarmTrial, space: Space) -> FrozenTrial:
    """A trial of an earlier search as Optuna is to know it: of one that was stopped, its last epoch alone."""
    single = len(trial.values) == 1
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE if trial.completed else TrialState.PRUNED,
        values=trial.values if trial.completed else None,
        params=trial.params,
        distributions=make_distributions(space),
        intermediate_values={trial.epochs_done: trial.values[0]} if single else {},
    )


def make_sampler(name: Sampler, seed: int, startup: int) -> optuna.samplers.BaseSampler:
    """A sampler; of TPE and GP the first `startup` proposals are random."""
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
    if name == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed)  # its first generation is as wide as the space
    return optuna.samplers.TPESampler(
        seed=seed,
        n_startup_trials=startup,
        multivariate=True,
        constant_liar=True,  # trials that run count as bad for the time, so that their likes are not proposed
    )


class BudgetAwareSearch(Searcher):
    """Proposes what is unfinished, then the first points, then what an Optuna sampler draws.

    What is proposed as number n depends on the seed, on n, on the earlier search it was warmed with and on the trials
    begun before, of those that had ended also on how, and on nothing that a restart would lose.
    """

    def __init__(
        self,
        records: SearchRecords,
        space: Space,
        *,
        first: list[FirstPoint],
        num_samples: int,
        seed: int,
        sampler: Sampler = "tpe",
        warm: WarmStart | None = None,
    ) -> None:
        super().__init__(metric=records.metric, mode=records.mode)
        self._records = records
        self._space = space
        self._num_samples = num_samples
        self._seed = seed
        self._sampler_name = sampler
        self._unfinished = records.unfinished
        roles = [row["role"] for row in records.rows.values()]
        self._first = [point for point in first if point.role not in roles]
        if warm is not None:  # of its points those that have not been begun: the first that the study proposed
            self._first += [FirstPoint("sampled", params) for params in warm.points[roles.count("sampled") :]]
        self._trials: dict[str, optuna.Trial] = {}  # by our trial id, those that run and of which the sampler learns
        self.study = optuna.create_study(directions=study_directions(records), sampler=self._sampler(0))
        for trial in warm.trials if warm is not None else ():
            self.study.add_trial(warm_to_optuna(trial, space))
        for row in records.rows.values():
            if is_told(row, space):
                if row["status"] == "running":
                    self._ask(row)
                else:
                    self.study.add_trial(to_optuna(row, records, space))

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """A sampler of its own for each proposal: a long-lived one has a generator that a restart would lose."""
        seed = int(np.random.SeedSequence((self._seed, number)).generate_state(1)[0])
        startup = max(2, min(MAX_STARTUP_TRIALS, self._num_samples // 4))
        return make_sampler(self._sampler_name, seed, startup)

    def _ask(self, row: Row) -> None:
        """Let the study know that a trial with these parameters runs."""
        self.study.enqueue_trial({name: row[name] for name in self._space})
        trial = self.study.ask(make_distributions(self._space))
        for name, value in self._records.sampler_state.get(row["trial_id"], {}).items():
            self.study._storage.set_trial_system_attr(trial._trial_id, name, value)  # Optuna has no open way
        self._trials[row["trial_id"]] = trial

    def suggest(self, trial_id: str) -> dict[str, Any]:
        if self._unfinished:
            row = self._unfinished.pop(0)
        elif self._first:
            point = self._first.pop(0)
            row = self._records.begin(point.role, point.params)
            if is_told(row, self._space):
                self._ask(row)
        else:
            self.study.sampler = self._sampler(self._records.next_number)
            trial = self.study.ask(make_distributions(self._space))
            kept = self.study._storage.get_trial_system_attrs(trial._trial_id)
            state = {name: value for name, value in kept.items() if name.startswith(CMA_STATE)}
            row = self._records.begin("sampled", trial.params, state)
            self._trials[row["trial_id"]] = trial
        params = {name: row[name] for name in self._space}
        return {"trial_id": row["trial_id"], "role": row["role"], "params": params}

    def tell(self, row: Row) -> None:
        """Let the study know how a trial ended."""
        trial = self._trials.pop(row["trial_id"], None)
        if trial is None:
            return
        state, curve = describe_end(row, self._records.curve(row["trial_id"]))
        if len(self._records.metrics) == 1:
            for epoch, value in sorted(curve.items()):
                trial.report(value, epoch)
        values = [row[metric] for metric in self._records.metrics] if state == TrialState.COMPLETE else None
        self.study.tell(trial, values, state)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Ray's word that a trial ended says not how; `tell` is called for those that really did."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records are the state."""


class RecordedAsha(AsyncHyperBandScheduler):
    """ASHA by epochs that records each judgement and fills its rungs from those records, since Ray restores none.

    With `stops_early` False no trial is stopped for being behind others. With `patience` one is stopped that has had no
    better epoch for so many.

    The first points always run to their last epoch and stand outside the rungs: compared with at the end, they must not
    stop whatever learns slower than they do at the start. A trial that diverged ends at once. A trial that goes on
    after a restart reports all its epochs again, so that no rung is filled with a later, better value; it is judged
    where it had not been.
    """

    def __init__(
        self, records: SearchRecords, *, mode: Mode, stops_early: bool = True, patience: int | None = None
    ) -> None:
        super().__init__(
            time_attr="epoch",
            metric=records.metric,
            mode=mode,
            max_t=records.epochs,
            grace_period=records.grace,
            reduction_factor=REDUCTION_FACTOR,
        )
        self._metric_name = records.metric
        self._records = records
        self.stops_early = stops_early
        self._patience = patience
        self.stopped: set[str] = set()  # trial ids
        self._sign = 1.0 if mode == "max" else -1.0
        for trial_id, row in records.rows.items():
            if row["role"] != "sampled":
                continue
            judged = records.judged[trial_id]
            if judged is None:  # lost: all that it has passed, but for its last epoch if that may not have been judged
                judged = records.curve(trial_id)
                if row["status"] == "running":
                    judged.pop(row["epochs_done"], None)
            for epoch, recorded in self._brackets[0]._rungs:
                if epoch in judged:
                    recorded[trial_id] = self._sign * judged[int(epoch)]

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Nothing: there is one bracket for all."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if PACE in result:
            return self.CONTINUE
        value = result.get(self._metric_name)
        if value is None or not math.isfinite(value) or result["epoch"] >= self._max_t:
            return self.STOP
        if trial.config["role"] != "sampled":
            return self.CONTINUE
        trial_id = trial.config["trial_id"]  # Ray's own id changes when the search goes on
        if self._is_on_plateau(trial_id, result["epoch"], value):
            self.stopped.add(trial_id)
            return self.STOP
        if not self.stops_early:
            return self.CONTINUE
        named: Any = SimpleNamespace(trial_id=trial_id)  # all that the bracket looks at
        rung = dict(self._brackets[0]._rungs).get(result["epoch"])
        decision: str = self._brackets[0].on_result(named, result["epoch"], self._sign * value)
        if decision == self.STOP:
            self.stopped.add(trial_id)
        if rung is not None and result["epoch"] not in (self._records.judged[trial_id] or {}):
            with suppress(OSError):  # a full disk: not recorded, it will be judged again
                self._records.judge(trial_id, result["epoch"], value, goes_on=decision == self.CONTINUE)
        return decision

    def _is_on_plateau(self, trial_id: str, epoch: int, value: float) -> bool:
        """Whether the best of the trial's epochs so far, the earliest of equals, is `patience` epochs ago."""
        if self._patience is None:
            return False
        curve = self._records.curve(trial_id) | {epoch: value}  # it may know later epochs: one that goes on tells again
        best = max((e for e in curve if e <= epoch), key=lambda e: (self._sign * curve[e], -e))
        return epoch - best >= self._patience

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Nothing: a trial that ends must not fill rungs with its last value."""

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Nothing: as above."""
