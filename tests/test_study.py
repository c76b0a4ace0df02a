"""The searcher and the scheduler do right what Ray's own do wrong: budgets, NaN, and a restart that changes nothing."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState

from analysis.trials import load_trials
from byot.config import TrainConfig
from byot.search_files import DIVERGED, MEASURES, Choices, Range, Space, read_trials
from byot.system.files import append_json_line
from search.records import SearchRecords
from search.space import DEFAULT_SPACE, FirstPoint, first_points
from search.study import PRIOR_SD, BudgetAwareSearch, RecordedAsha, to_optuna
from tests.made_up import open_records

EPOCHS = 18
CONTROLLER: Any = None  # the scheduler does without


def make_searcher(records: SearchRecords, num_samples: int = 40, **options: Any) -> BudgetAwareSearch:
    options.setdefault("first", first_points(DEFAULT_SPACE, TrainConfig()))
    return BudgetAwareSearch(records, DEFAULT_SPACE, num_samples=num_samples, **options)


class MadeUpSearch:
    """A search on disk whose trials report made-up values; `restart` throws away all that is not on the disk."""

    def __init__(self, folder: Path, *metrics: str, stops_early: bool = True, seed: int = 0, **options: Any) -> None:
        """`options` are the searcher's."""
        self.folder, self.metrics, self.seed = folder, metrics, seed
        self.stops_early, self.options = stops_early, options
        self.restart()

    def restart(self) -> None:
        self.records = open_records(self.folder, *self.metrics, epochs=EPOCHS, seed=self.seed)
        self.searcher = make_searcher(self.records, **self.options)
        self.scheduler = RecordedAsha(self.records, stops_early=self.stops_early)

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
        self.records.end(suggestion["trial_id"], status, error)

    def complete(self, value: float) -> dict[str, Any]:
        suggestion = self.suggest()
        self.report(suggestion, EPOCHS, value)
        self.end(suggestion, "completed")
        return suggestion

    def known(self) -> list[FrozenTrial]:
        """The trials as Optuna knows them."""
        return self.searcher.make_study().trials

    def rung(self, epoch: int) -> dict[str, float]:
        recorded: dict[str, float] = dict(self.scheduler._brackets[0]._rungs)[epoch]
        return recorded


@pytest.fixture
def search(tmp_path: Path) -> MadeUpSearch:
    return MadeUpSearch(tmp_path)


@pytest.fixture
def begun(search: MadeUpSearch) -> MadeUpSearch:
    """A search past its two first points."""
    search.complete(50.0)
    search.complete(50.0)
    return search


def test_first_trials_and_what_the_study_knows_of_them(search):
    first, second, third = (search.suggest() for _ in range(3))
    assert (first["role"], first["params"]) == ("reference", {"alpha": 0.1, "temperature": 3.0, "beta": 1e-6})
    assert (second["role"], second["params"]) == ("control", {"alpha": 0.0, "temperature": 3.0, "beta": 0.0})
    assert third["role"] == "sampled"
    assert all(DEFAULT_SPACE[name].holds(value) for name, value in third["params"].items())
    assert [one["trial_id"] for one in (first, second, third)] == ["t0000", "t0001", "t0002"]
    assert [trial.params for trial in search.known()] == [first["params"], third["params"]], "never of the control"


def test_settings_to_try_follow_the_first_two_and_each_is_begun_once(tmp_path):
    tried = [FirstPoint("sampled", {"alpha": alpha, "temperature": 2.0, "beta": 1e-5}) for alpha in (0.3, 0.9)]
    search = MadeUpSearch(tmp_path, tried=tried)
    alphas = []
    for _ in range(5):
        alphas.append(search.complete(50.0)["params"]["alpha"])
        search.restart()
    assert alphas[:4] == [0.1, 0.0, 0.3, 0.9]
    assert alphas[4] not in alphas[:4]


def test_a_dashboard_is_shown_no_best_trial_without_parameters(begun):
    """The control is there with its value, and is no candidate."""
    (control,) = (trial for trial in begun.records.ended if trial.role == "control")
    shown = to_optuna(control, begun.records, DEFAULT_SPACE)
    assert (shown.state, shown.params) == (TrialState.PRUNED, {})
    assert shown.user_attrs["val_accuracy"] == control.measures["val_accuracy"] == 50.0
    assert (shown.user_attrs["alpha"], shown.user_attrs["beta"]) == (0.0, 0.0)


def test_a_reference_outside_the_space_is_run_but_not_known(tmp_path):
    space = {**DEFAULT_SPACE, "alpha": Range(0.3, 0.9)}
    first = first_points(space, TrainConfig())
    searcher = BudgetAwareSearch(open_records(tmp_path, epochs=EPOCHS), space, first=first, num_samples=9)
    assert searcher.suggest("x")["params"]["alpha"] == 0.1
    assert searcher.make_study().trials == []


def test_what_optuna_knows_of_each_end(begun):
    """Stopped trials by their epochs, diverged ones without any value, whether the driver lived through or not."""
    begun.complete(60.0)
    stopped, at_once, later, crash, running = (begun.suggest() for _ in range(5))
    begun.report(stopped, 1, 80.0)
    begun.report(stopped, 3, 99.0)
    begun.end(stopped, "stopped")
    trial: Any = SimpleNamespace(config=at_once)
    assert begun.scheduler.on_trial_result(CONTROLLER, trial, {"epoch": 1, "val_accuracy": math.nan}) == "STOP"
    begun.end(at_once, "failed", f"{DIVERGED}the loss became nan")
    begun.report(later, 5, 90.0)
    begun.end(later, "failed", f"{DIVERGED}the loss became nan")
    begun.report(crash, 1, 5.0)
    begun.end(crash, "failed", "the worker died")
    begun.report(running, 1, 5.0)
    for _ in range(2):
        ends = [(trial.state.name, trial.value, trial.intermediate_values) for trial in begun.known()]
        assert ends == [
            ("COMPLETE", 50.0, {EPOCHS: 50.0}),
            ("COMPLETE", 60.0, {EPOCHS: 60.0}),
            ("PRUNED", None, {1: 80.0, 3: 99.0}),
            ("PRUNED", None, {}),
            ("PRUNED", None, {}),
            ("FAIL", None, {}),
            ("RUNNING", None, {}),
        ]
        begun.restart()
    assert begun.suggest() == running


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_a_restart_changes_no_proposal(tmp_path, sampler):
    """Whether the driver lived through or was started anew before every proposal."""
    proposals = []
    for name, restarts in (("whole", False), ("broken", True)):
        (tmp_path / name).mkdir()
        search = MadeUpSearch(tmp_path / name, sampler=sampler, has_prior=sampler == "tpe")
        running = search.suggest()
        for value in range(14):
            if restarts:
                search.restart()
                assert search.suggest() == running, "what is unfinished goes on first"
            search.complete(float(value))
        proposals.append([(trial.role, trial.params) for trial in search.records.trials.values()])
    assert proposals[0] == proposals[1]


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_a_choice_is_proposed_recorded_and_learnt_from(tmp_path, sampler):
    space: Space = {**DEFAULT_SPACE, "teacher": Choices(["deepest", "ensemble"])}
    first = first_points(space, TrainConfig())
    proposed = []
    for number in range(12):  # each time anew from what is on disk
        records = SearchRecords(tmp_path, parameters=[*space], metrics=("val_accuracy",), epochs=2, grace=2, seed=0)
        options: dict[str, Any] = {"first": first, "num_samples": 12, "sampler": sampler, "has_prior": True}
        params = BudgetAwareSearch(records, space, **options).suggest("x")["params"]
        proposed.append(params["teacher"])
        records.add_epoch(f"t{number:04d}", {"epoch": 2, "elapsed_s": 1.0, "val_accuracy": float(number)})
        records.end(f"t{number:04d}", "completed")
    assert proposed[:2] == ["deepest", "deepest"], "the teacher of a run that says nothing else"
    assert set(proposed) == {"deepest", "ensemble"}
    assert [trial.params["teacher"] for trial in read_trials(tmp_path / "trials.csv")] == proposed
    assert load_trials(tmp_path)["teacher"].tolist() == proposed


def test_random_proposals_lie_around_the_references_setting_or_everywhere(tmp_path):
    """The first of 200 seeds: two thirds within two standard deviations of it, and a third anywhere."""
    reference = DEFAULT_SPACE["temperature"].place(3.0)
    near = {}
    for has_prior in (True, False):
        places = []
        for seed in range(200):
            records = open_records(tmp_path / f"{has_prior}-{seed}", seed=seed)
            params = make_searcher(records, has_prior=has_prior)._draw_near()
            assert all(DEFAULT_SPACE[name].holds(value) for name, value in params.items())
            places += [DEFAULT_SPACE["temperature"].place(params["temperature"])] if params else []
        near[has_prior] = places
    assert near[False] == []
    assert 0.55 < len(near[True]) / 200 < 0.77
    inside = [place for place in near[True] if abs(place - reference) < 2 * PRIOR_SD]
    assert 0.9 < len(inside) / len(near[True]) <= 1, "what would leave the range is reflected"


def test_asha_stops_the_worse(begun):
    a, b, c = (begun.suggest() for _ in range(3))
    reports = [(a, 1, 1.0), (a, 2, 50.0), (b, 2, 40.0), (c, 2, 60.0)]
    assert [begun.report(*report) for report in reports] == ["CONTINUE", "CONTINUE", "STOP", "CONTINUE"]
    assert begun.scheduler.stopped == {b["trial_id"]}


def test_first_points_run_whole_and_stop_no_other(search):
    reference, control, a, b = (search.suggest() for _ in range(4))
    reports = [(control, 2, 99.0), (reference, 2, 98.0), (a, 2, 50.0), (b, 2, 60.0), (reference, 6, 1.0)]
    assert [search.report(*report) for report in reports] == ["CONTINUE"] * 5
    assert search.report(reference, EPOCHS, 1.0) == "STOP"


def test_rungs_survive_a_restart(begun):
    a, b, c, d = (begun.suggest() for _ in range(4))
    for trial, value in ((a, 60.0), (b, 50.0), (c, 70.0)):
        begun.report(trial, 2, value)
    begun.end(b, "stopped")
    begun.report(c, 3, 71.0)
    begun.restart()
    assert begun.rung(2) == {"t0002": 60.0, "t0003": 50.0, "t0004": 70.0}
    assert begun.suggest() == a
    again = [(c, 2, 70.0), (c, 3, 71.0), (d, 2, 55.0)]
    assert [begun.report(*report) for report in again] == ["CONTINUE", "CONTINUE", "STOP"]
    # A trial that resumes past a rung, or ends, must not fill that rung with its late value.
    ended: Any = SimpleNamespace(trial_id="x", config=c)
    begun.scheduler.on_trial_complete(CONTROLLER, ended, {"epoch": 17, "val_accuracy": 99.0})
    assert begun.rung(2)["t0004"] == 70.0


def test_a_trial_is_judged_once_also_if_the_driver_dies_before_it_acts_on_that(begun):
    a, b, c = (begun.suggest() for _ in range(3))
    for report in ((a, 2, 10.0), (b, 2, 50.0), (c, 2, 5.0)):
        begun.report(*report)
    begun.restart()
    assert [begun.suggest() for _ in range(3)] == [a, b, c]
    assert begun.report(c, 2, 5.0) == "STOP"
    assert begun.report(a, 2, 10.0) == "CONTINUE", "what came since would stop it now"


def test_what_is_known_of_ended_trials_survives_the_loss_of_their_epochs(begun):
    a, b = begun.suggest(), begun.suggest()
    for epoch, value in ((1, 40.0), (2, 60.0), (6, 70.0)):
        begun.report(a, epoch, value)
    begun.report(b, 2, 10.0)
    begun.end(a, "stopped")
    begun.end(b, "stopped")
    before = [trial.intermediate_values for trial in begun.known()], begun.rung(2), begun.rung(6)
    for path in begun.folder.glob("trials/*/metrics.jsonl"):
        path.write_text("")
    begun.restart()
    assert ([trial.intermediate_values for trial in begun.known()], begun.rung(2), begun.rung(6)) == before


def test_a_trial_left_out_is_followed_by_no_copy(begun):
    proposed = [begun.complete(50.0)["params"] for _ in range(3)]
    (begun.folder / "trials" / "t0002" / "trial.json").write_text("{")
    (begun.folder / "trials.csv").unlink()
    begun.restart()
    assert len(begun.records.notes) == 1
    new = begun.suggest()
    assert new["trial_id"] == "t0005"
    assert new["params"] not in proposed


@pytest.mark.parametrize(("num_samples", "startup"), [(4, 2), (24, 6), (400, 10)])
def test_few_trials_are_not_all_random(tmp_path, num_samples, startup):
    sampler: Any = make_searcher(open_records(tmp_path, epochs=EPOCHS), num_samples).make_study().sampler
    assert sampler._n_startup_trials == startup


def test_no_scheduler_stops_nothing_but_what_diverges(tmp_path):
    search = MadeUpSearch(tmp_path, stops_early=False)
    trials = [search.suggest() for _ in range(5)]
    for value, trial in zip((70.0, 60.0, 50.0, 40.0, 30.0), trials, strict=True):
        decisions = [search.report(trial, epoch, value) for epoch in range(1, EPOCHS + 1)]
        assert decisions == ["CONTINUE"] * (EPOCHS - 1) + ["STOP"], "at its end"
    nan: Any = SimpleNamespace(config=trials[0])
    assert search.scheduler.on_trial_result(CONTROLLER, nan, {"epoch": 3, "val_accuracy": math.nan}) == "STOP"


def test_several_metrics_reach_the_study(tmp_path):
    search = MadeUpSearch(tmp_path, "val_accuracy", "val_nll", stops_early=False)
    for value in (50.0, 60.0, 70.0):
        search.complete(value)
    assert [direction.name for direction in search.searcher.make_study().directions] == ["MAXIMIZE", "MINIMIZE"]
    assert [trial.values for trial in search.known()] == [[v, v] for v in (50.0, 70.0)]
    stopped = search.suggest()
    search.report(stopped, 2, 90.0)
    search.end(stopped, "stopped")
    assert [trial.state for trial in search.known()] == [TrialState.COMPLETE] * 2 + [TrialState.PRUNED]
    assert search.suggest()["role"] == "sampled"
