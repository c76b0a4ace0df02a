"""The searcher and the scheduler do right what Ray's own do wrong: budgets, NaN, rungs across a restart."""

import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler

from byot.config import TrainConfig
from search.space import DEFAULT_SPACE, first_points
from search.study import BudgetAwareOptunaSearch, DurableAsha

EPOCHS = 9
CONTROLLER: Any = None  # the scheduler does without


def make_searcher(mode: Any = "max", num_samples: int = 40) -> BudgetAwareOptunaSearch:
    return BudgetAwareOptunaSearch(
        DEFAULT_SPACE,
        metric="val_accuracy",
        mode=mode,
        epochs=EPOCHS,
        first=first_points(DEFAULT_SPACE, TrainConfig()),
        num_samples=num_samples,
        seed=0,
    )


def past_first_points(searcher: BudgetAwareOptunaSearch) -> BudgetAwareOptunaSearch:
    for name in ("reference", "control"):
        searcher.suggest(name)
        searcher.on_trial_complete(name, {"epoch": EPOCHS, "val_accuracy": 50.0})
    return searcher


def states(searcher: BudgetAwareOptunaSearch) -> list[TrialState]:
    return [trial.state for trial in searcher._study().trials]


def test_first_trials_and_what_the_study_knows_of_them():
    searcher = make_searcher()
    first, second, third = (searcher.suggest(str(i)) for i in range(3))
    assert first == {"params": {"alpha": 0.1, "temperature": 3.0, "beta": 1e-6}, "role": "reference"}
    assert second == {"params": {"alpha": 0.0, "temperature": 3.0, "beta": 0.0}, "role": "control"}
    assert third is not None
    assert third["role"] == "sampled"
    for trial_id in ("0", "1", "2"):
        searcher.on_trial_result(trial_id, {"epoch": 1, "val_accuracy": 10.0})
        searcher.on_trial_complete(trial_id, {"epoch": EPOCHS, "val_accuracy": 50.0})
    told = [trial.params for trial in searcher._study().trials]
    assert told == [first["params"], third["params"]]


def test_a_trial_stopped_early_is_pruned_with_its_epochs_and_never_the_best():
    searcher = past_first_points(make_searcher())
    searcher.suggest("stopped")
    searcher.on_trial_result("stopped", {"epoch": 1, "val_accuracy": 80.0})
    searcher.on_trial_complete("stopped", {"epoch": 3, "val_accuracy": 99.0})  # what stopped it comes only here
    trial = searcher._study().trials[-1]
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {1: 80.0, 3: 99.0}
    assert searcher._study().best_trial.user_attrs["ray_trial_id"] == "reference"


def test_nan_and_crashes_end_their_optuna_trial():
    searcher = past_first_points(make_searcher())
    for trial_id in ("nan at once", "nan later", "crash", "dead worker"):
        searcher.suggest(trial_id)
    searcher.on_trial_complete("nan at once", {"epoch": 1, "val_accuracy": math.nan})
    searcher.on_trial_result("nan later", {"epoch": 1, "val_accuracy": 5.0})
    searcher.on_trial_complete("nan later", {"epoch": 2, "val_accuracy": math.nan})
    searcher.on_trial_complete("crash", {"epoch": 1, "val_accuracy": 5.0}, error=True)
    searcher.on_trial_complete("dead worker", None, error=True)
    assert states(searcher)[1:] == [TrialState.PRUNED, TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL]
    assert searcher.suggest("next") is not None


def test_a_minimised_metric():
    searcher = make_searcher(mode="min")
    for trial_id, value in (("0", 2.0), ("1", 0.1), ("2", 1.0)):
        searcher.suggest(trial_id)
        searcher.on_trial_complete(trial_id, {"epoch": EPOCHS, "val_accuracy": value})
    assert searcher._study().best_value == 1.0  # the control's 0.1 was not told


def test_searcher_goes_on_after_saving(tmp_path: Path):
    whole, broken = past_first_points(make_searcher()), past_first_points(make_searcher())
    for trial_id in map(str, range(14)):
        for searcher in (whole, broken):
            assert searcher.suggest(trial_id) is not None
            searcher.on_trial_complete(trial_id, {"epoch": EPOCHS, "val_accuracy": float(trial_id)})
    broken.save(str(tmp_path / "searcher"))
    restored = make_searcher()
    restored.restore(str(tmp_path / "searcher"))
    assert restored.suggest("next") == whole.suggest("next")


class Trials:
    """Feeds a scheduler the results of made-up trials."""

    def __init__(self, scheduler: DurableAsha) -> None:
        self.scheduler = scheduler

    def report(self, trial_id: str, epoch: int, value: float, role: str = "sampled") -> str:
        trial: Any = SimpleNamespace(trial_id=trial_id, config={"role": role})
        if trial_id not in self.scheduler._trial_info:
            self.scheduler.on_trial_add(CONTROLLER, trial)
        return self.scheduler.on_trial_result(CONTROLLER, trial, {"epoch": epoch, "val_accuracy": value})


def make_scheduler(folder: Path) -> DurableAsha:
    return DurableAsha(metric="val_accuracy", mode="max", epochs=18, rungs_file=folder / "state" / "rungs.json")


def test_asha_stops_the_worse(tmp_path: Path):
    trials = Trials(make_scheduler(tmp_path))
    assert trials.report("a", 1, 1.0) == TrialScheduler.CONTINUE
    assert trials.report("a", 2, 50.0) == TrialScheduler.CONTINUE
    assert trials.report("b", 2, 40.0) == TrialScheduler.STOP
    assert trials.report("c", 2, 60.0) == TrialScheduler.CONTINUE


def test_first_points_run_whole_and_stop_no_other(tmp_path: Path):
    trials = Trials(make_scheduler(tmp_path))
    assert trials.report("control", 2, 99.0, role="control") == TrialScheduler.CONTINUE
    assert trials.report("reference", 2, 98.0, role="reference") == TrialScheduler.CONTINUE
    assert trials.report("a", 2, 50.0) == TrialScheduler.CONTINUE
    assert trials.report("b", 2, 60.0) == TrialScheduler.CONTINUE
    assert trials.report("reference", 6, 1.0, role="reference") == TrialScheduler.CONTINUE
    assert trials.report("reference", 18, 1.0, role="reference") == TrialScheduler.STOP


def test_asha_stops_a_trial_that_diverged(tmp_path: Path):
    trials = Trials(make_scheduler(tmp_path))
    assert trials.report("a", 1, math.nan) == TrialScheduler.STOP
    assert trials.report("b", 1, math.inf, role="control") == TrialScheduler.STOP


def test_rungs_survive_a_restart_though_the_pickle_is_older(tmp_path: Path):
    scheduler = make_scheduler(tmp_path)
    saved_at_the_start = pickle.dumps(scheduler)
    trials = Trials(scheduler)
    for trial_id, value in (("a", 50.0), ("b", 60.0), ("c", 70.0)):
        trials.report(trial_id, 2, value)
    restored = Trials(pickle.loads(saved_at_the_start))
    assert restored.report("d", 2, 55.0) == TrialScheduler.STOP
    # A trial that resumes past a rung, or ends, must not fill that rung with its late value.
    late: Any = SimpleNamespace(trial_id="c", config={"role": "sampled"})
    restored.scheduler.on_trial_complete(None, late, {"epoch": 17, "val_accuracy": 99.0})
    assert restored.scheduler._brackets[0]._rungs[-1][1]["c"] == 70.0


@pytest.mark.parametrize(("num_samples", "startup"), [(4, 2), (24, 6), (400, 10)])
def test_few_trials_are_not_all_random(num_samples: int, startup: int):
    sampler: Any = make_searcher(num_samples=num_samples)._study().sampler
    assert sampler._n_startup_trials == startup
