"""A warm start lends what is comparable, tries anew what is not, and is the same after a restart."""

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from byot.config import TrainConfig
from byot.search_files import CONFIRMATION, DIVERGED, ArmRecord, Range, space_to_dict, write_trials
from byot.system.files import write_json
from search.settings import SearchSettings
from search.space import DEFAULT_SPACE
from search.warm import WarmStart, load_warm_start, make_warm_start
from tests.made_up import BASE, make_trial, search_record
from tests.test_study import MadeUpSearch, make_searcher, open_records

SETTINGS = SearchSettings(num_samples=40)


@pytest.fixture
def searches(tmp_path: Path) -> Path:
    """A folder with the search `earlier`."""
    trials = [
        make_trial("t0000", 70.0, role="reference"),
        make_trial("t0001", 90.0, role="control", alpha=0.0, beta=0.0),
        make_trial("t0002", 71.0, alpha=0.3),
        make_trial("t0003", 75.0, alpha=0.4),
        make_trial("t0004", 20.0, status="stopped", epochs_done=2, alpha=0.45),
        make_trial("t0005", status="failed", epochs_done=0, error=f"{DIVERGED}the loss became nan", alpha=0.5),
        make_trial("t0006", status="failed", epochs_done=0, error="the worker died", alpha=0.6),
        make_trial("t0007", 30.0, status="running", epochs_done=1, alpha=0.7),
    ]
    write_json(tmp_path / "earlier" / "search.json", search_record())
    write_trials(tmp_path / "earlier" / "trials.csv", trials, DEFAULT_SPACE)
    return tmp_path


def make(searches: Path, base: TrainConfig = BASE, name: str = "earlier", **settings: Any) -> WarmStart:
    return make_warm_start(searches, name, base, SearchSettings(**settings), DEFAULT_SPACE)


def test_the_same_training_lends_its_trials_to_the_sampler(searches, tmp_path):
    warm = make(searches, BASE.with_settings(seed=5, device="cpu"))
    assert warm.points == []
    assert [(t.params["alpha"], t.epochs_done, t.values, t.completed) for t in warm.trials] == [
        (0.1, 6, [70.0], True),
        (0.3, 6, [71.0], True),
        (0.4, 6, [75.0], True),
        (0.45, 2, [20.0], False),
        (0.5, 0, [], False),
    ]
    search = MadeUpSearch(tmp_path / "new", warm=warm)
    known = search.known()
    assert [trial.state for trial in known] == [TrialState.COMPLETE] * 3 + [TrialState.PRUNED] * 2
    assert [trial.intermediate_values for trial in known[3:]] == [{2: 20.0}, {}]
    assert [search.suggest()["role"] for _ in range(3)] == ["reference", "control", "sampled"]


@pytest.mark.parametrize(
    ("change", "settings", "alphas"),
    [
        ({"width": 8}, {}, [0.4, 0.3]),  # the reference's is tried anyway
        ({"epochs": 30}, {}, [0.4, 0.3]),
        ({"split_seed": 1}, {}, [0.4, 0.3]),
        ({"lr": 0.05}, {}, [0.4, 0.3]),
        ({}, {"metric": ("val_nll",)}, [0.3, 0.4]),  # best by that metric
        ({}, {"seeds_per_trial": 3}, [0.4, 0.3]),  # means of several seeds are other values
    ],
)
def test_other_training_and_other_values_lend_the_best_settings(searches, change, settings, alphas):
    warm = make(searches, BASE.with_settings(**change), **settings)
    assert warm.trials == []
    assert [point["alpha"] for point in warm.points] == alphas


def test_images_of_another_folder_are_other_data(searches):
    flowers = BASE.with_settings(dataset="imagefolder", data_dir="/flowers")
    write_json(searches / "earlier" / "search.json", search_record(flowers))
    assert make(searches, flowers).trials
    assert make(searches, flowers.with_settings(data_dir="/cats")).trials == []


def test_what_was_confirmed_over_fresh_seeds_is_tried_before_the_best_single_run(searches):
    arms = [ArmRecord("t0002", "sampled", {"alpha": 0.3}, [71.0], still_in=True)._asdict()]
    record = {"status": "finished", "metric": "val_accuracy", "choice": "t0002", "num_rounds": 1, "verdict": ["So."]}
    write_json(searches / "earlier" / CONFIRMATION, record | {"arms": arms})
    assert [point["alpha"] for point in make(searches, BASE.with_settings(width=8)).points] == [0.3, 0.4]


def test_another_space(searches):
    narrow = {**DEFAULT_SPACE, "alpha": Range(0.0, 0.35)}
    warm = make_warm_start(searches, "earlier", BASE, SETTINGS, narrow)
    assert [trial.params["alpha"] for trial in warm.trials] == [0.1, 0.3], "what lies outside is left out"
    wide = {**DEFAULT_SPACE, "lr": Range(0.01, 0.5, log=True)}
    warm = make_warm_start(searches, "earlier", BASE, SETTINGS, wide)
    assert {trial.params["lr"] for trial in warm.trials} == {0.1}, "what was not searched had one value"


def test_trials_at_another_learning_rate_are_not_taken_for_ones_at_this(searches):
    """The earlier search had searched lr as well."""
    space = {**DEFAULT_SPACE, "lr": Range(0.01, 0.5, log=True)}
    trials = [make_trial(f"t{n}", 70.0 + n, alpha=0.1 * n, lr=lr) for n, lr in enumerate((0.1, 0.3, 0.02), 1)]
    write_json(searches / "wide" / "search.json", search_record(space=space_to_dict(space)))
    write_trials(searches / "wide" / "trials.csv", trials, space)
    assert [trial.params["alpha"] for trial in make(searches, name="wide").trials] == [0.1]
    all_other = make(searches, BASE.with_settings(lr=0.2), name="wide")
    assert (all_other.trials, len(all_other.points)) == ([], 2), "the third is the reference's own"


@pytest.mark.parametrize(("name", "words"), [("empty", "no trial"), ("broken", "trials.csv")])
def test_nothing_to_start_from(searches, name, words):
    write_json(searches / name / "search.json", search_record())
    if name == "broken":
        (searches / name / "trials.csv").write_text("trial_id,alpha\nt0,x,y\n")
    with pytest.raises(ValueError, match=words):
        make(searches, name=name)


def test_points_are_tried_after_the_two_first_and_once(searches, tmp_path):
    search = MadeUpSearch(tmp_path / "new", warm=make(searches, BASE.with_settings(width=8)))
    alphas = []
    for _ in range(6):
        alphas.append(search.complete(50.0)["params"]["alpha"])
        search.restart()
    assert alphas[2:4] == [0.4, 0.3]
    assert not {0.4, 0.3} & set(alphas[4:])


def test_it_is_kept_with_the_search(searches, tmp_path):
    for warm in (make(searches), make(searches, BASE.with_settings(width=8))):
        warm.save(tmp_path / "new")
        assert load_warm_start(tmp_path / "new", DEFAULT_SPACE, SETTINGS.metric) == warm
    with pytest.raises(ValueError, match=r"warm_start\.json is missing"):
        load_warm_start(tmp_path, DEFAULT_SPACE, SETTINGS.metric)


POINT = {"alpha": 0.5, "temperature": 3.0, "beta": 1e-6}
TRIAL = {"params": POINT, "epochs_done": 6, "values": [70.0], "completed": True}


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {"points": 3},
        {"points": [POINT | {"alpha": 7.0}]},
        {"points": [{"alpha": 0.5}]},
        {"trials": [{"params": POINT}]},
        *({"trials": [TRIAL | {"values": values}]} for values in ([], [1.0, 2.0], ["x"], [None])),
        {"trials": [TRIAL | {"epochs_done": "6"}]},
    ],
)
def test_a_damaged_copy_cannot_propose_what_no_run_would_take(tmp_path, damage):
    write_json(tmp_path / "warm_start.json", {"search": "s", "points": [], "trials": [], **damage} if damage else {})
    with pytest.raises(ValueError, match=r"warm_start\.json"):
        load_warm_start(tmp_path, DEFAULT_SPACE, SETTINGS.metric)


def test_startup_trials_are_those_that_are_known(searches, tmp_path):
    """With enough known trials the first proposal of its own is no random one."""
    earlier = make(searches)
    many = earlier._replace(trials=[trial for trial in earlier.trials if trial.completed] * 5)
    cold, warm = (
        make_searcher(open_records(tmp_path / str(i)), warm=warm, first=[]).suggest("x")["params"]
        for i, warm in enumerate((None, many))
    )
    assert cold != warm
