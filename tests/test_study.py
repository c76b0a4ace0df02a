"""The searcher and the scheduler do right what Ray's own do wrong: budgets, NaN, and a restart that changes nothing."""

import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler

from byot.config import TrainConfig
from byot.system.files import append_json_line
from search.records import DIVERGED, MEASURES, Row, SearchRecords, pareto_front
from search.space import DEFAULT_SPACE, Range, first_points
from search.study import BudgetAwareSearch, RecordedAsha

EPOCHS = 18
CONTROLLER: Any = None  # the scheduler does without


def open_records(folder: Path, mode: str = "max", further: tuple[str, ...] = ()) -> SearchRecords:
    return SearchRecords(
        folder,
        parameters=list(DEFAULT_SPACE),
        metric="val_accuracy",
        further_metrics=further,
        mode=mode,
        epochs=EPOCHS,
        seed=0,
    )


def make_searcher(records: SearchRecords, num_samples: int = 40, seed: int = 0, **options: Any) -> BudgetAwareSearch:
    first = first_points(DEFAULT_SPACE, TrainConfig())
    return BudgetAwareSearch(records, DEFAULT_SPACE, first=first, num_samples=num_samples, seed=seed, **options)


class MadeUpSearch:
    """A search on disk whose trials report made-up values; `restart` throws away all that is not on the disk."""

    def __init__(self, folder: Path, mode: Any = "max", further: tuple[str, ...] = (), **options: Any) -> None:
        """`options` are the searcher's, and those of the scheduler."""
        self.folder, self.mode, self.further = folder, mode, further
        self.judging = {name: options.pop(name) for name in ("stops_early", "patience") if name in options}
        self.options = options
        (folder / "search.json").write_text("{}")
        self.restart()

    def restart(self) -> None:
        self.records = open_records(self.folder, self.mode, self.further)
        self.records.write_best = lambda: None  # type: ignore[method-assign]  # there is no search.json to speak of
        self.searcher = make_searcher(self.records, **self.options)
        self.scheduler = RecordedAsha(self.records, mode=self.mode, **self.judging)

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


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "cmaes"])
def test_a_restart_changes_no_proposal(tmp_path: Path, sampler: str):
    """Whether the driver lived through or was started anew before every proposal."""
    proposals = []
    for name, restarts in (("whole", False), ("broken", True)):
        (tmp_path / name).mkdir()
        search = MadeUpSearch(tmp_path / name, sampler=sampler)
        running = search.suggest()
        for value in range(26 if sampler == "cmaes" else 14):
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


# ---------------------------------------------------------------- other samplers, metrics and ways to stop


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes"])
def test_samplers_learn(tmp_path: Path, sampler: str):
    """Of an accuracy that falls with the distance from alpha 0.7 the later proposals are nearer than random ones."""
    search = MadeUpSearch(tmp_path, sampler=sampler)
    for _ in range(80 if sampler == "cmaes" else 40):
        suggestion = search.suggest()
        search.report(suggestion, EPOCHS, 90 - 40 * abs(suggestion["params"]["alpha"] - 0.7))
        search.end(suggestion, "completed")
    late = [abs(row["alpha"] - 0.7) for row in list(search.records.rows.values())[-12:]]
    assert sum(late) / len(late) < 0.15, "a random one is 0.29 away"


def test_cmaes_learns_from_its_own_proposals_after_a_restart(tmp_path: Path):
    search = MadeUpSearch(tmp_path, sampler="cmaes")
    for value in range(30):
        search.complete(float(value))
    state = search.records.sampler_state
    assert {kept["cma:generation"] for kept in state.values()} >= {0, 1, 2}
    assert any("cma:optimizer:0" in kept for kept in state.values())
    search.restart()
    assert search.records.sampler_state == state


def test_a_hostile_sampler_state_is_not_unpickled(tmp_path: Path):
    search = MadeUpSearch(tmp_path, sampler="cmaes")
    for value in range(30):
        search.complete(float(value))

    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "touched",)

    trial_id, _ = next((i, kept) for i, kept in search.records.sampler_state.items() if "cma:optimizer:0" in kept)
    path = tmp_path / "trials" / trial_id / "trial.json"
    record = json.loads(path.read_text())
    harmless, hostile = record["sampler_state"]["cma:optimizer:0"], pickle.dumps(Hostile()).hex()
    generation = {"cma:generation": record["sampler_state"]["cma:generation"]}
    for state in (
        {"cma:optimizer:0": hostile},
        {"cma:optimizer:1": harmless, "cma:optimizer:0": hostile},  # Optuna joins them by their numbers
        {"cma:optimizer:1": pickle.dumps(5).hex(), "cma:optimizer:0": hostile},
        {"cma:optimizer:0": pickle.dumps(5).hex()},
        {"cma:optimizer:1": harmless},
    ):
        record["sampler_state"] = generation | state
        path.write_text(json.dumps(record))
        search.restart()
        search.suggest()
        assert trial_id not in search.records.sampler_state
        assert not (tmp_path / "touched").exists()


def test_no_scheduler_stops_nothing_but_what_diverges(tmp_path: Path):
    search = MadeUpSearch(tmp_path, stops_early=False)
    search.complete(50.0)
    search.complete(50.0)
    trials = [search.suggest() for _ in range(4)]
    for value, trial in zip((60.0, 50.0, 40.0, 30.0), trials, strict=True):
        for epoch in range(1, EPOCHS):
            assert search.report(trial, epoch, value) == TrialScheduler.CONTINUE
        assert search.report(trial, EPOCHS, value) == TrialScheduler.STOP, "at its end"
    nan: Any = SimpleNamespace(config=trials[0])
    assert search.scheduler.on_trial_result(CONTROLLER, nan, {"epoch": 3, "val_accuracy": math.nan}) == "STOP"


def test_patience_ends_a_plateau(tmp_path: Path):
    search = MadeUpSearch(tmp_path, stops_early=False, patience=3)
    reference, control, trial = search.suggest(), search.suggest(), search.suggest()
    values = [50.0, 60.0, 59.0, 60.0, 58.0]
    decisions = [search.report(trial, epoch, value) for epoch, value in enumerate(values, start=1)]
    assert decisions == ["CONTINUE"] * 4 + ["STOP"], "its best, the earliest of equals, is three epochs ago"
    assert search.scheduler.stopped == {trial["trial_id"]}
    for first in (reference, control):
        assert [search.report(first, epoch, 1.0) for epoch in range(1, 9)] == ["CONTINUE"] * 8


def test_patience_judges_a_trial_that_goes_on_as_it_did_before(tmp_path: Path):
    search = MadeUpSearch(tmp_path, stops_early=False, patience=3)
    search.complete(50.0)
    search.complete(50.0)
    trial = search.suggest()
    for epoch, value in enumerate((50.0, 49.0, 48.0, 70.0), start=1):
        search.report(trial, epoch, value)
    search.restart()
    assert search.suggest() == trial
    again = [search.report(trial, epoch, value) for epoch, value in enumerate((50.0, 49.0, 48.0, 70.0), start=1)]
    assert again == ["CONTINUE"] * 3 + ["CONTINUE"]
    assert search.report(trial, 5, 1.0) == "CONTINUE"


def test_several_metrics_reach_the_study(tmp_path: Path):
    search = MadeUpSearch(tmp_path, further=("val_nll",), stops_early=False)
    for value in (50.0, 60.0, 70.0, 80.0):
        search.complete(value)
    assert [direction.name for direction in search.searcher.study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert [trial.values for trial in search.searcher.study.trials] == [[v, v] for v in (50.0, 70.0, 80.0)]
    stopped = search.suggest()
    search.report(stopped, 2, 90.0)
    search.end(stopped, "stopped")
    search.restart()
    assert search.states() == [TrialState.COMPLETE] * 3 + [TrialState.PRUNED]
    assert search.suggest()["role"] == "sampled"


def test_pareto_front():
    def row(trial_id: str, accuracy: float, nll: float, role: str = "sampled", status: str = "completed") -> Row:
        return {"trial_id": trial_id, "role": role, "status": status, "val_accuracy": accuracy, "val_nll": nll}

    rows = [
        row("t0", 70.0, 1.0),
        row("t1", 71.0, 1.2),
        row("t2", 69.0, 1.1),
        row("t3", 70.0, 1.0),
        row("t4", 99.0, 0.1, role="control"),
        row("t5", 99.0, 0.1, status="stopped"),
    ]
    assert [r["trial_id"] for r in pareto_front(rows, ("val_accuracy", "val_nll"))] == ["t1", "t0", "t3"]
    assert [r["trial_id"] for r in pareto_front(rows, ("val_accuracy",))] == ["t1"]
    assert pareto_front([], ("val_accuracy", "val_nll")) == []
