"""The searcher and the scheduler: Optuna's TPE through Ray's OptunaSearch, Ray's ASHA, each mended where it errs."""

import math
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.optuna import OptunaSearch

from byot.files import read_json, write_json
from search.settings import REDUCTION_FACTOR, grace_epochs
from search.space import FirstPoint, Space

MAX_STARTUP_TRIALS = 10  # Optuna's default number of random trials before TPE models anything


class BudgetAwareOptunaSearch(OptunaSearch):
    """OptunaSearch that knows at which epoch each value was measured.

    Ray tells Optuna that a trial stopped early is complete, with the value it had when stopped, so that low-epoch
    values compete with final ones; and a NaN leaves its Optuna trial running for ever. Here a trial that reached its
    last epoch is COMPLETE, one stopped early or diverged is PRUNED with the epochs it reported (TPE then ranks by epoch
    first), one that crashed is FAIL. The first points are run before anything is sampled, and those outside the space
    never enter the study.
    """

    def __init__(
        self,
        space: Space,
        *,
        metric: str,
        mode: Literal["max", "min"],
        epochs: int,
        first: list[FirstPoint],
        num_samples: int,
        seed: int,
    ) -> None:
        sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=max(2, min(MAX_STARTUP_TRIALS, num_samples // 4))
        )
        super().__init__(
            {name: FloatDistribution(r.low, r.high, log=r.log) for name, r in space.items()},
            metric=metric,
            mode=mode,
            points_to_evaluate=[point.params for point in first if point.told],
            sampler=sampler,
        )
        self._metric_name = metric
        self._epochs = epochs
        self._waiting = list(first)

    def _study(self) -> optuna.Study:
        study: Any = self._ot_study  # OptunaSearch made it in __init__, since it was given a space
        return study

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        point = self._waiting.pop(0) if self._waiting else None
        if point is not None and not point.told:
            return {"params": point.params, "role": point.role}
        return {"params": super().suggest(trial_id), "role": "sampled" if point is None else point.role}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        trial = self._ot_trials.get(trial_id)
        value, epoch = result.get(self._metric_name), result.get("epoch")
        if trial is None or trial_id in self._completed_trials or value is None or epoch is None:
            return
        # A resumed trial reports epochs again; Optuna warns of a step reported twice.
        if math.isfinite(value) and epoch not in _reported(trial):
            trial.report(value, epoch)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self._ot_trials.get(trial_id)
        if trial is None or trial_id in self._completed_trials:
            return
        result = result or {}
        self.on_trial_result(trial_id, result)  # Ray does not pass on the result at which it stopped a trial
        self._completed_trials.add(trial_id)
        trial.set_user_attr("ray_trial_id", trial_id)
        value = result.get(self._metric_name)
        if error or value is None:
            self._study().tell(trial, state=TrialState.FAIL)
        elif math.isfinite(value) and result["epoch"] >= self._epochs:
            self._study().tell(trial, value)
        else:
            self._study().tell(trial, state=TrialState.PRUNED)


def _reported(trial: optuna.Trial) -> dict[int, float]:
    return trial.study._storage.get_trial(trial._trial_id).intermediate_values


class DurableAsha(AsyncHyperBandScheduler):
    """ASHA by epochs whose rungs are kept in a file, since Ray does not restore them.

    The first points always run to their last epoch and stand outside the rungs: compared with at the end, they must
    not stop whatever learns slower than they do at the start. A trial that diverged ends at once. A trial that goes on
    after a restart never fills rungs it has passed with its later, better values.
    """

    def __init__(self, *, metric: str, mode: Literal["max", "min"], epochs: int, rungs_file: Path) -> None:
        super().__init__(
            time_attr="epoch",
            metric=metric,
            mode=mode,
            max_t=epochs,
            grace_period=grace_epochs(epochs),
            reduction_factor=REDUCTION_FACTOR,
        )
        self._metric_name = metric
        self._rungs_file = rungs_file

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load_rungs()

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        value = result.get(self._metric_name)
        if value is not None and not math.isfinite(value):
            return self.STOP
        if trial.config["role"] != "sampled":
            return self.CONTINUE if result["epoch"] < self._max_t else self.STOP
        before = self._num_recorded()
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if self._num_recorded() != before:
            self._save_rungs()
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._trial_info.pop(trial.trial_id, None)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        self._trial_info.pop(trial.trial_id, None)

    def _num_recorded(self) -> int:
        return sum(len(recorded) for bracket in self._brackets for _, recorded in bracket._rungs)

    def _save_rungs(self) -> None:
        write_json(self._rungs_file, {str(epoch): recorded for epoch, recorded in self._brackets[0]._rungs})

    def _load_rungs(self) -> None:
        if self._rungs_file.is_file():
            saved = read_json(self._rungs_file)
            for epoch, recorded in self._brackets[0]._rungs:
                recorded.update(saved.get(str(epoch), {}))
