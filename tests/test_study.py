"""The searcher and the scheduler do right what Ray's own do wrong: budgets, NaN, and a restart that changes nothing."""

import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler

from byot.config import TrainConfig
from byot.files import append_json_line
from search.records import DIVERGED, MEASURES, SearchRecords
from search.space import DEFAULT_SPACE, Range, first_points
from search.study import BudgetAwareSearch, RecordedAsha

EPOCHS = 18
CONTROLLER: Any = None  # the scheduler does without


def open_records(folder: Path, mode: str = "max") -> SearchRecords:
    return SearchRecords(
        folder, parameters=list(DEFAULT_SPACE), metric="val_accuracy", mode=mode, epochs=EPOCHS, seed=0
    )


def make_searcher(records: SearchRecords, num_samples: int = 40) -> BudgetAwareSearch:
    first = first_points(DEFAULT_SPACE, TrainConfig())
    return BudgetAwareSearch(records, DEFAULT_SPACE, first=first, num_samples=num_samples, seed=0)


class MadeUpSearch:
    """A search on disk whose trials report made-up values; `restart` throws away all that is not on the disk."""

    def __init__(self, folder: Path, mode: Any = "max") -> None:
        self.folder, self.mode = folder, mode
        (folder / "search.json").write_text("{}")
        self.restart()

    def restart(self) -> None:
        self.records = open_records(self.folder, self.mode)
        self.records.write_best = lambda: None  # type: ignore[method-assign]  # there is no search.json to speak of
        self.searcher = make_searcher(self.records)
        self.scheduler = RecordedAsha(self.records, mode=self.mode)

    def suggest(self) -> dict[str, Any]:
        return self.searcher.suggest("an id that Ray gave")

    def report(self, suggestion: dict[str, Any], epoch: int, value: float) -> str:
        record = {"epoch": epoch, "elapsed_s": 1.0, **dict.fromkeys(MEASURES, value)}
        append_json_line(self.records.trial_folder(suggestion["trial_id"]) / "metrics.jsonl", record)
        trial: Any = SimpleNamespace(trial_id="an id that Ray gave", config=suggestion)
        decision: str = self.scheduler.on_trial_result(CONTROLLER, trial, record)
        self.records.add_epoch(suggestion["trial_id"], record)
        return decision

    def end(self, suggestion: dict[str, Any], status: Any, error: str = "") -> None:
        self.searcher.tell(self.records.end(suggestion["trial_id"], status, error))

    def complete(self, value: float) -> dict[str, Any]:
        suggestion = self.suggest()
        self.report(suggestion, EPOCHS, value)
        self.end(suggestion, "completed")
        return suggestion

    def states(self) -> list[TrialState]:
        return [trial.state for trial in self.searcher.study.trials]


@pytest.fixture
def search(tmp_path: Path) -> MadeUpSearch:
    return MadeUpSearch(tmp_path)


@pytest.fixture
def begun(search: MadeUpSearch) -> MadeUpSearch:
    """A search past its two first points."""
    search.complete(50.0)
    search.complete(50.0)
    return search


def test_first_trials_and_what_the_study_knows_of_them(search: MadeUpSearch):
    first, second, third = (search.suggest() for _ in range(3))
    assert (first["role"], first["params"]) == ("reference", {"alpha": 0.1, "temperature": 3.0, "beta": 1e-6})
    assert (second["role"], second["params"]) == ("control", {"alpha": 0.0, "temperature": 3.0, "beta": 0.0})
    assert third["role"] == "sampled"
    assert all(DEFAULT_SPACE[name].holds(value) for name, value in third["params"].items())
    assert [one["trial_id"] for one in (first, second, third)] == ["t0000", "t0001", "t0002"]
    told = search.searcher.study.trials
    assert [trial.params for trial in told] == [first["params"], third["params"]], "never of the control"


def test_a_reference_outside_the_space_is_run_but_not_told(tmp_path: Path):
    space = {**DEFAULT_SPACE, "alpha": Range(0.3, 0.9)}
    first = first_points(space, TrainConfig())
    searcher = BudgetAwareSearch(open_records(tmp_path), space, first=first, num_samples=9, seed=0)
    assert searcher.suggest("x")["params"]["alpha"] == 0.1
    assert searcher.study.trials == []


def test_budgets_reach_the_study(begun: MadeUpSearch):
    complete, stopped = begun.complete(60.0), begun.suggest()
    begun.report(stopped, 1, 80.0)
    begun.report(stopped, 3, 99.0)
    begun.end(stopped, "stopped")
    assert complete["trial_id"] != stopped["trial_id"]
    trial = begun.searcher.study.trials[-1]
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {1: 80.0, 3: 99.0}
    assert begun.searcher.study.best_value == 60.0


def test_nan_and_crashes_end_their_optuna_trial(begun: MadeUpSearch):
    at_once, later, crash = begun.suggest(), begun.suggest(), begun.suggest()
    trial: Any = SimpleNamespace(config=at_once)
    assert (
        begun.scheduler.on_trial_result(CONTROLLER, trial, {"epoch": 1, "val_accuracy": math.nan})
        == TrialScheduler.STOP
    )
    begun.end(at_once, "failed", f"{DIVERGED}the loss became nan")
    begun.report(later, 5, 90.0)
    begun.end(later, "failed", f"{DIVERGED}the loss became nan")
    begun.report(crash, 1, 5.0)
    begun.end(crash, "failed", "the worker died")
    expected = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED, TrialState.FAIL]
    assert begun.states() == expected
    assert begun.searcher.study.trials[2].intermediate_values == {}, "however well it did before, it ranks last"
    begun.suggest()
    begun.restart()
    assert begun.states()[:4] == expected


def test_a_minimised_metric(tmp_path: Path):
    search = MadeUpSearch(tmp_path, mode="min")
    for value in (2.0, 0.1, 1.0):
        search.complete(value)
    assert search.searcher.study.best_value == 1.0  # the control's 0.1 was not told


def test_a_restart_changes_no_proposal(tmp_path: Path):
    """Whether the driver lived through or was started anew before every proposal."""
    proposals = []
    for name, restarts in (("whole", False), ("broken", True)):
        (tmp_path / name).mkdir()
        search = MadeUpSearch(tmp_path / name)
        running = search.suggest()
        for value in range(14):
            if restarts:
                search.restart()
                assert search.suggest() == running, "what is unfinished goes on first"
            search.complete(float(value))
        proposals.append([{k: row[k] for k in ("role", *DEFAULT_SPACE)} for row in search.records.rows.values()])
    assert proposals[0] == proposals[1]


def test_no_trial_of_the_study_stays_running(begun: MadeUpSearch):
    running = begun.suggest()
    begun.report(running, 1, 10.0)
    begun.restart()
    assert begun.states()[-1] == TrialState.RUNNING
    assert begun.suggest() == running
    begun.end(running, "stopped")
    assert begun.states() == [TrialState.COMPLETE, TrialState.PRUNED]
    begun.restart()
    assert begun.states() == [TrialState.COMPLETE, TrialState.PRUNED]


def test_searcher_and_scheduler_can_be_pickled(begun: MadeUpSearch):
    """Ray writes them into its own folder, whether it is ever read or not."""
    del begun.records.write_best
    assert pickle.loads(pickle.dumps(begun.searcher)).suggest("x")["trial_id"] == "t0002"
    pickle.dumps(begun.scheduler)


def test_asha_stops_the_worse(begun: MadeUpSearch):
    a, b, c = (begun.suggest() for _ in range(3))
    assert begun.report(a, 1, 1.0) == TrialScheduler.CONTINUE
    assert begun.report(a, 2, 50.0) == TrialScheduler.CONTINUE
    assert begun.report(b, 2, 40.0) == TrialScheduler.STOP
    assert begun.report(c, 2, 60.0) == TrialScheduler.CONTINUE
    assert begun.scheduler.stopped == {b["trial_id"]}


def test_first_points_run_whole_and_stop_no_other(search: MadeUpSearch):
    reference, control, a, b = (search.suggest() for _ in range(4))
    assert search.report(control, 2, 99.0) == TrialScheduler.CONTINUE
    assert search.report(reference, 2, 98.0) == TrialScheduler.CONTINUE
    assert search.report(a, 2, 50.0) == TrialScheduler.CONTINUE
    assert search.report(b, 2, 60.0) == TrialScheduler.CONTINUE
    assert search.report(reference, 6, 1.0) == TrialScheduler.CONTINUE
    assert search.report(reference, EPOCHS, 1.0) == TrialScheduler.STOP


def test_rungs_survive_a_restart(begun: MadeUpSearch):
    a, b, c, d = (begun.suggest() for _ in range(4))
    for trial, value in ((a, 60.0), (b, 50.0), (c, 70.0)):
        begun.report(trial, 2, value)
    begun.end(b, "stopped")
    begun.report(c, 3, 71.0)
    begun.restart()
    assert dict(begun.scheduler._brackets[0]._rungs)[2] == {"t0002": 60.0, "t0003": 50.0, "t0004": 70.0}
    assert begun.suggest() == a
    assert begun.report(c, 2, 70.0) == TrialScheduler.CONTINUE, "what it reports again"
    assert begun.report(c, 3, 71.0) == TrialScheduler.CONTINUE
    assert begun.report(d, 2, 55.0) == TrialScheduler.STOP
    # A trial that resumes past a rung, or ends, must not fill that rung with its late value.
    ended: Any = SimpleNamespace(trial_id="x", config=c)
    begun.scheduler.on_trial_complete(CONTROLLER, ended, {"epoch": 17, "val_accuracy": 99.0})
    assert dict(begun.scheduler._brackets[0]._rungs)[2]["t0004"] == 70.0


def test_a_trial_killed_before_its_judgement_is_judged_when_it_reports_again(begun: MadeUpSearch):
    a, b = begun.suggest(), begun.suggest()
    begun.report(a, 2, 50.0)
    begun.report(a, 3, 51.0)
    begun.report(b, 2, 40.0)  # the driver dies before it acts on the answer
    begun.restart()
    assert begun.suggest() == a
    assert begun.suggest() == b
    assert begun.report(b, 2, 40.0) == TrialScheduler.STOP


def test_a_trial_that_was_let_go_on_is_not_judged_again(begun: MadeUpSearch):
    """Not even if what came since would stop it now."""
    a, b, c = (begun.suggest() for _ in range(3))
    assert begun.report(a, 2, 10.0) == TrialScheduler.CONTINUE
    for other in (b, c):
        assert begun.report(other, 2, 50.0) == TrialScheduler.CONTINUE
    begun.restart()
    assert begun.report(a, 2, 10.0) == TrialScheduler.CONTINUE


def test_what_is_known_of_ended_trials_survives_the_loss_of_their_epochs(begun: MadeUpSearch):
    a, b = begun.suggest(), begun.suggest()
    for epoch, value in ((1, 40.0), (2, 60.0), (6, 70.0)):
        begun.report(a, epoch, value)
    begun.report(b, 2, 10.0)
    begun.end(a, "stopped")
    begun.end(b, "stopped")
    told = [trial.intermediate_values for trial in begun.searcher.study.trials]
    rungs = dict(begun.scheduler._brackets[0]._rungs)
    for path in begun.folder.glob("trials/*/metrics.jsonl"):
        path.write_text("")
    begun.restart()
    assert [trial.intermediate_values for trial in begun.searcher.study.trials] == told
    assert dict(begun.scheduler._brackets[0]._rungs) == rungs


def test_a_trial_left_out_is_followed_by_no_copy(begun: MadeUpSearch):
    proposed = [begun.complete(50.0)["params"] for _ in range(3)]
    (begun.folder / "trials" / "t0002" / "trial.json").write_text("{")
    (begun.folder / "trials.csv").unlink()
    begun.restart()
    assert len(begun.records.notes) == 1
    new = begun.suggest()
    assert new["trial_id"] == "t0005"
    assert new["params"] not in proposed


@pytest.mark.parametrize(("num_samples", "startup"), [(4, 2), (24, 6), (400, 10)])
def test_few_trials_are_not_all_random(tmp_path: Path, num_samples: int, startup: int):
    sampler: Any = make_searcher(open_records(tmp_path), num_samples).study.sampler
    assert sampler._n_startup_trials == startup
