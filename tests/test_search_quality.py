"""Searches in simulated time spend what they are given, replay what was recorded and call the real classes."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState

from benchmarks.quality import families, search_quality
from benchmarks.quality.curves import RECORDED_SPACE, Curve, curves_path, save_curves
from benchmarks.quality.families import NUM_LOOKED_AT, SYNTHETIC, load_family
from benchmarks.quality.search_quality import METHODS, FewEpochs, Ours, Proposal, make_method, simulate
from byot.search_files import MEASURES, space_to_dict
from byot.system.files import read_json

EPOCHS = 3
CORNERS = {"low": (0.1, 2.0, 1e-7), "high": (0.9, 9.0, 1e-4)}  # alpha, temperature, beta
PLANTED = {  # (corner or role, seed): val_accuracy by epoch
    ("low", 0): [10.0, 20.0, 30.0],
    ("low", 1): [11.0, 21.0, 34.0],
    ("high", 0): [42.0, 50.0],  # diverged
    ("high", 1): [41.0, 51.0, 62.0],
    ("reference", 0): [1.0, 2.0, 36.0],
    ("control", 0): [1.0, 2.0, 99.0],  # another method: no answer to a search
}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recorded family of two configurations and the two settings that are tried first.

    A proposal takes the curve of the nearest alone.
    """
    monkeypatch.setattr(families, "NUM_NEIGHBOURS", 1)
    header = {"space": space_to_dict(RECORDED_SPACE), "config": {"recipe": "reference", "epochs": EPOCHS}}
    numbers: dict[str, int] = {"reference": -2, "control": -1, "low": 0, "high": 1}
    curves = []
    for (name, seed), values in PLANTED.items():
        role: Any = "sampled" if name in CORNERS else name
        place = CORNERS.get(name, (0.0, 3.0, 0.0 if name == "control" else 1e-6))
        params = dict(zip(RECORDED_SPACE, place, strict=True))
        curves.append(Curve(numbers[name], role, seed, params, dict.fromkeys(MEASURES, values), 1.0))
    save_curves(curves_path("digits", tmp_path), header, curves)
    return tmp_path


@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_every_way_of_ending(name, planted, monkeypatch):
    """Diverged, stopped and complete trials; what a method's own study then knows is what it should."""
    monkeypatch.setattr(search_quality, "NUM_WHOLE_TRIALS", 120 // EPOCHS)
    family = load_family("digits", planted)
    method: Any = make_method(name, family, 0)
    outcome = simulate(method, family, budget=120, seed=0)
    # Those that are best after one epoch diverge later.
    assert outcome.num_completed > 0 or name == "few epochs"
    assert len(outcome.regret) == 120
    assert outcome.regret.min() >= 0.0, "the control is never what was found"
    study: Any = method.searcher.make_study() if isinstance(method, Ours) else method.searcher._ot_study
    states = [trial.state for trial in study.trials]
    # Ours tells Optuna of every end; Ray's tell of a NaN is refused, and its trial runs for ever.
    running = states.count(TrialState.RUNNING)
    if name == "few epochs":
        assert running <= search_quality.NUM_WORKERS
    elif isinstance(method, Ours):
        assert running == search_quality.NUM_WORKERS
    else:
        assert running > search_quality.NUM_WORKERS
    complete = [trial.value for trial in study.trials if trial.state == TrialState.COMPLETE]
    if name == "few epochs":
        first_values = {curve[method.few - 1] for curve in PLANTED.values()}
        assert set(complete) <= first_values
    elif isinstance(method, Ours) or name in ("tpe", "random"):
        assert set(complete) <= {curve[-1] for curve in PLANTED.values() if len(curve) == EPOCHS}
        assert len(complete) == outcome.num_completed
    else:
        assert len(complete) > outcome.num_completed, "Ray calls stopped trials complete"


def test_the_best_after_few_epochs_go_on(monkeypatch):
    monkeypatch.setattr(search_quality, "NUM_WHOLE_TRIALS", 20)
    family = load_family("acc", Path("no such folder"))
    method: Any = make_method("few epochs", family, 0)
    trained: dict[str, list[int]] = {}
    values: dict[str, float] = {}

    def report(trial: Proposal, epoch: int, value: float) -> bool:
        trained.setdefault(trial.trial_id, []).append(epoch)
        if epoch == method.few:
            values[trial.trial_id] = value
        return FewEpochs.report(method, trial, epoch, value)

    monkeypatch.setattr(method, "report", report)
    simulate(method, family, budget=20 * family.epochs, seed=0)
    whole = {trial_id for trial_id, epochs in trained.items() if epochs == list(range(1, family.epochs + 1))}
    began_short = sorted(values, key=lambda trial_id: int(trial_id))[: method.num_short - search_quality.NUM_WORKERS]
    best = max(began_short, key=lambda trial_id: values[trial_id])
    assert best in whole
    assert len(whole) >= search_quality.BEST_FEW


def test_recorded_values_are_replayed(planted):
    family = load_family("digits", planted)
    rng = np.random.default_rng(0)
    cases: list[tuple[tuple[float, ...], str, float]] = [
        ((0.4, 3.0, 1e-8), "low", 32.0),
        ((0.6, 8.0, 1e-3), "high", 31.0),  # the diverged run counts as 0 %
        # The logarithm of beta alone decides: 1e-5 is nearer to 1e-4 than to 1e-7 only there.
        ((0.5, 5.5, 1e-5), "high", 31.0),
    ]
    for place, name, truth in cases:
        params = dict(zip(RECORDED_SPACE, place, strict=True))
        runs = [family.train(params, rng) for _ in range(30)]
        recorded = {tuple(values) for (which, _), values in PLANTED.items() if which == name}
        assert {tuple(run.values) for run in runs} == recorded
        assert {run.truth for run in runs} == {truth}
    assert (family.best, family.typical) == (36.0, 31.5)  # the reference's; never the control's


def test_a_proposal_between_configurations_takes_their_mean(planted, monkeypatch):
    monkeypatch.setattr(families, "NUM_NEIGHBOURS", 2)
    family = load_family("digits", planted)
    low, high = (np.array(CORNERS[name]) for name in ("low", "high"))
    middle = dict(zip(RECORDED_SPACE, (low + high) / 2, strict=True)) | {"beta": float(np.sqrt(low[2] * high[2]))}
    runs = [family.train(middle, np.random.default_rng(seed)) for seed in range(20)]
    assert all(run.truth == pytest.approx((32.0 + 31.0) / 2) for run in runs)
    means = [np.add(PLANTED["low", seed], PLANTED["high", 1]) / 2 for seed in (0, 1)]
    found = [any(np.allclose(run.values, mean) for mean in means) for run in runs if len(run.values) == EPOCHS]
    assert any(found), "unless the neighbour diverged in that run"


@pytest.mark.parametrize("name", SYNTHETIC)
def test_the_best_of_a_synthetic_family(name):
    """No configuration is better than what regret is measured from, and training ends at the truth but for noise."""
    family = load_family(name, Path("no such folder"))
    rng = np.random.default_rng(1)
    drawn = [
        {name: bounds.at(place) for (name, bounds), place in pairs}
        for pairs in (list(zip(family.space.items(), rng.random(4), strict=True)) for _ in range(2000))
    ]
    runs = [family.train(params, rng) for params in drawn]
    truths = np.array([run.truth for run in runs])
    assert truths.max() <= family.best < truths.max() + 0.05
    assert abs(truths.mean() - family.typical) < 4 * truths.std() / math.sqrt(len(truths)) + 1 / NUM_LOOKED_AT
    errors = np.array([run.values[-1] - run.truth for run in runs])
    assert errors.std() == pytest.approx(families.NOISE, rel=0.1)
    assert all(len(run.values) == family.epochs for run in runs)


def test_the_command(tmp_path, monkeypatch, call, works):
    monkeypatch.setattr(search_quality, "NUM_WHOLE_TRIALS", 4)
    record, figure = tmp_path / "made" / "record.json", tmp_path / "figure.png"
    arguments = ["--families", "acc", "--seeds", 2, "--output", record, "--figure", figure]
    code, out, _ = call(search_quality, *arguments)  # matplotlib may say that it builds its cache of fonts
    assert code == 0
    assert works(search_quality, *arguments[:4]) == out, "the same seeds, the same searches"
    found = read_json(record)
    assert found["versions"]["ray"]
    acc = found["families"]["acc"]
    assert acc["budget"] == acc["grid"][-1] == 4 * 27
    assert set(acc["methods"]) == set(METHODS)
    for name, row in acc["methods"].items():
        assert METHODS[name][0] in out
        assert len(row["regret"]) == len(row["half_width"]) == len(acc["grid"])
        assert row["final"]["mean"] == pytest.approx(np.mean(row["final_by_seed"])) == pytest.approx(row["regret"][-1])
        paired = np.subtract(row["final_by_seed"], acc["methods"]["stock"]["final_by_seed"])
        assert row["minus_stock"]["mean"] == pytest.approx(paired.mean())
        assert len(set(row["final_by_seed"])) == 2, "another seed, another search"
    assert acc["methods"]["random"]["reaches_random_at"] <= acc["budget"]
    assert figure.read_bytes().startswith(b"\x89PNG")
