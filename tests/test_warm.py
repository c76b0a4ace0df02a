"""A warm start lends what is comparable, tries anew what is not, and is the same after a restart."""

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from byot.config import TrainConfig
from byot.system.files import write_json
from search.records import DIVERGED, MEASURES, write_rows
from search.settings import SearchSettings
from search.space import DEFAULT_SPACE, Range, space_to_dict
from search.study import BudgetAwareSearch
from search.warm import WarmStart, load_warm_start, make_warm_start
from tests.test_study import MadeUpSearch, open_records

BASE = TrainConfig(recipe="reference", dataset="digits", width=4, epochs=18, val_fraction=0.2)
SETTINGS = SearchSettings(num_samples=40)


def row(number: int, role: str, status: str, value: float | None, **params: float) -> dict[str, Any]:
    epochs = {"completed": 18, "stopped": 2}.get(status, 0)
    params = {"alpha": 0.1, "temperature": 3.0, "beta": 1e-6, **params}
    row = {"trial_id": f"t{number:04d}", "role": role, "status": status, "epochs_done": epochs, **params}
    return {**row, **dict.fromkeys(MEASURES, value), "seconds": 1.0, "seed": 0, "error": ""}


@pytest.fixture
def searches(tmp_path: Path) -> Path:
    """A folder with the search `earlier`."""
    rows = [
        row(0, "reference", "completed", 70.0),
        row(1, "control", "completed", 90.0, alpha=0.0, beta=0.0),
        row(2, "sampled", "completed", 71.0, alpha=0.3),
        row(3, "sampled", "completed", 75.0, alpha=0.4),
        row(4, "sampled", "stopped", 20.0, alpha=0.9),
        {**row(5, "sampled", "failed", None, alpha=1.0), "error": f"{DIVERGED}the loss became nan"},
        {**row(6, "sampled", "failed", None, alpha=0.6), "error": "the worker died"},
        row(7, "sampled", "running", 30.0, alpha=0.7),
    ]
    write_json(tmp_path / "earlier" / "search.json", {"config": BASE.to_dict(), "metric": "val_accuracy"})
    write_rows(tmp_path / "earlier" / "trials.csv", rows, list(DEFAULT_SPACE))
    return tmp_path


def make(searches: Path, base: TrainConfig = BASE, name: str = "earlier", **settings: Any) -> WarmStart:
    return make_warm_start(searches, name, base, SearchSettings(**settings), DEFAULT_SPACE)


def test_the_same_training_lends_its_trials(searches: Path):
    warm = make(searches, BASE.with_settings(seed=5, device="cpu"))
    assert warm.points == []
    assert [(t.params["alpha"], t.epochs_done, t.values, t.completed) for t in warm.trials] == [
        (0.1, 18, [70.0], True),
        (0.3, 18, [71.0], True),
        (0.4, 18, [75.0], True),
        (0.9, 2, [20.0], False),
        (1.0, 0, [], False),
    ]


@pytest.mark.parametrize("change", [{"width": 8}, {"epochs": 30}, {"split_seed": 1}, {"lr": 0.05}])
def test_other_training_lends_its_best_settings(searches: Path, change: dict[str, Any]):
    warm = make(searches, BASE.with_settings(**change))
    assert warm.trials == []
    assert [point["alpha"] for point in warm.points] == [0.4, 0.3], "the reference's is tried anyway"


def test_another_metric_lends_its_best_settings(searches: Path):
    warm = make(searches, metric=("val_nll",))
    assert [point["alpha"] for point in warm.points] == [0.3, 0.4], "by that metric"


def test_what_lies_outside_the_space_is_left_out(searches: Path):
    space = {**DEFAULT_SPACE, "alpha": Range(0.0, 0.35)}
    warm = make_warm_start(searches, "earlier", BASE, SETTINGS, space)
    assert [trial.params["alpha"] for trial in warm.trials] == [0.1, 0.3]


def test_trials_at_another_learning_rate_are_not_taken_for_ones_at_this(searches: Path):
    """The earlier search had searched lr as well."""
    space = {**DEFAULT_SPACE, "lr": Range(0.01, 0.5, log=True)}
    rows = [row(n, "sampled", "completed", 70.0 + n, alpha=0.1 * n, lr=lr) for n, lr in enumerate((0.1, 0.3, 0.02), 1)]
    write_json(
        searches / "wide" / "search.json",
        {"config": BASE.to_dict(), "metric": "val_accuracy", "space": space_to_dict(space)},
    )
    write_rows(searches / "wide" / "trials.csv", rows, list(space))
    assert [trial.params["alpha"] for trial in make(searches, name="wide").trials] == [0.1]
    all_other = make(searches, BASE.with_settings(lr=0.2), name="wide")
    assert (all_other.trials, len(all_other.points)) == ([], 2), "the third is the reference's own"


def test_means_of_several_seeds_are_other_values(searches: Path):
    assert make(searches, seeds_per_trial=3).trials == []


def test_a_parameter_that_was_not_searched_has_the_value_it_had(searches: Path):
    space = {**DEFAULT_SPACE, "lr": Range(0.01, 0.5, log=True)}
    warm = make_warm_start(searches, "earlier", BASE, SETTINGS, space)
    assert {trial.params["lr"] for trial in warm.trials} == {0.1}


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere", "there is no search nowhere"), ("empty", "no trial"), ("broken", "trials.csv")],
)
def test_nothing_to_start_from(searches: Path, name: str, words: str):
    for folder in ("empty", "broken"):
        write_json(searches / folder / "search.json", {"config": BASE.to_dict(), "metric": "val_accuracy"})
    (searches / "broken" / "trials.csv").write_text("trial_id,alpha\nt0,x,y\n")
    with pytest.raises(ValueError, match=words):
        make(searches, name=name)


def test_told_trials_are_known_to_the_sampler(searches: Path, tmp_path: Path):
    (tmp_path / "new").mkdir()
    search = MadeUpSearch(tmp_path / "new", warm=make(searches))
    states = [TrialState.COMPLETE] * 3 + [TrialState.PRUNED] * 2
    assert search.states() == states
    assert [t.intermediate_values for t in search.searcher.study.trials[3:]] == [{2: 20.0}, {}]
    assert [search.suggest()["role"] for _ in range(3)] == ["reference", "control", "sampled"]


def test_points_are_tried_after_the_two_first_and_once(searches: Path, tmp_path: Path):
    (tmp_path / "new").mkdir()
    warm = make(searches, BASE.with_settings(width=8))
    proposals = []
    search = MadeUpSearch(tmp_path / "new", warm=warm)
    for _ in range(6):
        proposals.append(search.complete(50.0)["params"]["alpha"])
        search.restart()
    assert proposals[2:4] == [0.4, 0.3]
    assert not {0.4, 0.3} & set(proposals[4:])


def test_it_is_kept_with_the_search(searches: Path, tmp_path: Path):
    for warm in (make(searches), make(searches, BASE.with_settings(width=8))):
        warm.save(tmp_path / "new")
        assert load_warm_start(tmp_path / "new", DEFAULT_SPACE, SETTINGS.metric) == warm
    assert load_warm_start(tmp_path, DEFAULT_SPACE, SETTINGS.metric) is None
    for damage in (
        "{",
        "{}",
        '{"search": "a", "points": [], "trials": [{"params": {}}]}',
        '{"search": 1, "points": 3}',
    ):
        (tmp_path / "new" / "warm_start.json").write_text(damage)
        with pytest.raises(ValueError, match=r"warm_start\.json"):
            load_warm_start(tmp_path / "new", DEFAULT_SPACE, SETTINGS.metric)


def test_a_damaged_copy_cannot_propose_what_no_run_would_take(tmp_path: Path):
    for point in ({"alpha": 7.0, "temperature": 3.0, "beta": 1e-6}, {"alpha": "x"}, {"alpha": 0.5}):
        write_json(tmp_path / "warm_start.json", {"search": "s", "points": [point], "trials": []})
        with pytest.raises(ValueError, match=r"warm_start\.json"):
            load_warm_start(tmp_path, DEFAULT_SPACE, SETTINGS.metric)


def test_startup_trials_are_those_that_are_known(searches: Path, tmp_path: Path):
    """With enough known trials the first proposal of its own is no random one."""
    earlier = make(searches)
    many = earlier._replace(trials=[t for t in earlier.trials if t.completed] * 5)
    (tmp_path / "new").mkdir()
    alone = BudgetAwareSearch(open_records(tmp_path / "new"), DEFAULT_SPACE, first=[], num_samples=40, seed=0)
    cold = alone.suggest("x")["params"]
    (tmp_path / "other").mkdir()
    warm = BudgetAwareSearch(
        open_records(tmp_path / "other"), DEFAULT_SPACE, first=[], num_samples=40, seed=0, warm=many
    )
    assert warm.suggest("x")["params"] != cold
