"""A confirmation says which is best only when it knows: equal settings stay unresolved, real gaps are found."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm, t

from benchmarks.quality.winner_test import simulate as simulate_case
from byot.config import TrainConfig
from byot.search_files import TrialRecord, find_best
from byot.system.files import read_json, write_json
from search.race import Arm, Confirmation, Run, choose_arms
from search.settings import FRESH_SEEDS, SearchSettings
from search.significance import ERROR, FIRST_LOOK, MOST_RUNS_NAMED, SPENDING, Comparison, judge, look_levels
from search.space import DEFAULT_SPACE
from search.system.remote import Store
from tests.made_up import make_trial
from tests.test_study import EPOCHS, MadeUpSearch

SD = 0.3  # points, of a run; what its seed does to all arms comes on top
MAX_ROUNDS = 8


def simulate(truth: list[float], seed: int, max_rounds: int = MAX_ROUNDS) -> dict[str, list[float]]:
    noise = np.random.default_rng(seed)
    rounds = noise.normal(0, SD, max_rounds)
    return {str(arm): list(value + rounds + noise.normal(0, SD, max_rounds)) for arm, value in enumerate(truth)}


NEAR = {"control": -5.0, "reference": 0.0, "a": 0.01, "b": 0.02}


def test_the_looks_spend_the_error_and_no_more():
    """Sums of normal differences of a known spread: in 5 % of cases a look finds something."""
    levels = look_levels(ERROR, MAX_ROUNDS)
    sums = np.random.default_rng(0).normal(size=(40_000, MAX_ROUNDS)).cumsum(axis=1)
    rounds = np.arange(FIRST_LOOK, MAX_ROUNDS + 1)
    found = np.abs(sums[:, FIRST_LOOK - 1 :]) / np.sqrt(rounds) > norm.isf(np.array(levels) / 2)
    assert found.any(axis=1).mean() == pytest.approx(ERROR, abs=0.003)
    assert found[:, :-1].any(axis=1).mean() == pytest.approx(ERROR * (7 / 8) ** SPENDING, abs=0.003)
    assert look_levels(ERROR, FIRST_LOOK) == pytest.approx([ERROR], rel=0.02), "the only look has all of it"


@pytest.mark.parametrize(
    ("case", "column", "least", "most"),
    [
        ("two equal, far ahead", "wrong_winner", 0.0, 0.09),
        ("two equal, far ahead, one of them 6.3 times as noisy", "wrong_winner", 0.0, 0.09),
        ("five equal, one 5 times as noisy", "wrong_winner", 0.0, 0.09),
        ("one ahead by 1.67", "right_winner", 0.42, 0.66),
        ("one ahead by 2", "right_winner", 0.66, 0.88),
        ("one ahead by 3", "right_winner", 0.97, 1.0),
        ("one ahead by 3", "num_runs", 0, 39),
        ("five equal, margin 2", "equal", 0.8, 1.0),
        ("one ahead by 2, margin 2", "wrong_equal", 0.0, 0.09),
    ],
)
def test_how_often_it_is_right(case, column, least, most):
    """The quick form of results/benchmarks/winner-test.md; the bounds allow for 200 simulations in place of 4,000."""
    assert least <= simulate_case(case, 200)[column] <= most


def test_interval_is_that_of_the_paired_t_test():
    values = {"a": [71.2, 70.9, 71.6, 70.7], "b": [70.1, 70.6, 70.2, 70.4]}
    one = judge(values, max_rounds=9).comparisons["b"]
    differences = np.subtract(values["a"], values["b"])
    level = look_levels(ERROR, 9)[4 - FIRST_LOOK]
    half_width = t.isf(level / 2, df=3) * differences.std(ddof=1) / math.sqrt(4)
    assert one.difference == pytest.approx(differences.mean())
    assert one.half_width() == pytest.approx(half_width, rel=1e-6)


def test_of_equals_the_simplest_is_taken():
    noise = np.random.default_rng(0)
    values = {arm: list(70 + ahead + noise.normal(0, 0.08, MAX_ROUNDS)) for arm, ahead in NEAR.items()}
    found = judge(values, MAX_ROUNDS, 0.3, simplest=("control", "reference"))
    assert (found.chosen, found.is_over, found.resolved) == ("reference", True, False)
    assert set(found.equivalent) == {"reference", "a", "b"}, "the control is shown to be worse"
    assert found.rounds < MAX_ROUNDS
    assert found.leader != "reference"
    assert judge(values, MAX_ROUNDS, 0.3).chosen == found.leader, "of sampled settings the leader is taken"
    assert judge(values, MAX_ROUNDS, 0.02, simplest=("control", "reference")).equivalent == []


def test_judged_round_by_round_or_at_once_is_the_same():
    values = simulate([71.0, 70.9, 70.0, 69.0, 70.0], 3)
    at_once = judge(values, MAX_ROUNDS)
    stepwise: dict[str, list[float]] = {arm: [] for arm in values}
    for number in range(MAX_ROUNDS):
        for arm in judge(stepwise, MAX_ROUNDS).remaining:
            stepwise[arm].append(values[arm][number])
    assert judge(stepwise, MAX_ROUNDS) == at_once
    assert sum(map(len, stepwise.values())) < sum(map(len, values.values())), "arms that are out are not run on"


def test_a_diverged_run_takes_its_arm_out():
    found = judge({"a": [70.0, 71.0], "b": [math.nan], "c": [70.5]}, MAX_ROUNDS)
    assert (found.remaining, found.diverged, found.rounds, found.is_over) == (["c", "a"], ["b"], 1, False)
    alone = judge({"a": [70.0, 71.0], "b": [90.0, math.nan]}, MAX_ROUNDS)
    assert (alone.remaining, alone.is_over, alone.resolved) == (["a"], True, False)
    none = judge({"a": [math.nan], "b": [math.nan]}, MAX_ROUNDS)
    assert (none.leader, none.is_over, none.resolved) == (None, True, False)


def test_what_was_out_against_a_leader_that_diverged_is_compared_anew():
    """B was put out by A alone; when A turns out to diverge, B and C have to be compared."""
    a = [80.0, 80.1, 80.2, 80.1]
    b, c = [70.0, 70.1, 70.3], [70.5, 70.2, 70.4, 70.3]
    before = judge({"a": a, "b": b, "c": c}, MAX_ROUNDS)
    assert before.remaining == ["a"]
    after = judge({"a": [*a, math.nan], "b": b, "c": c}, MAX_ROUNDS)
    assert set(after.remaining) == {"b", "c"}
    assert not after.is_over


def test_before_the_third_round_nothing_is_said():
    found = judge({"a": [90.0, 91.0, 92.0], "b": [10.0, 11.0]}, MAX_ROUNDS)
    assert (found.comparisons, found.is_over, found.leader, found.rounds) == ({}, False, "a", 2)
    assert judge({"a": [], "b": []}, MAX_ROUNDS).rounds == 0
    assert judge({"a": [1.0]}, MAX_ROUNDS).is_over, "one arm alone needs no test"


def test_a_chance_coincidence_is_no_certainty():
    """Few validation images give equal differences now and then; their spread of 0 would resolve anything."""
    values = {"a": [71.0, 73.0, 70.0], "b": [70.0, 72.0, 69.0]}
    assert judge(values, MAX_ROUNDS).comparisons["b"].resolved
    assert not judge(values, MAX_ROUNDS, least_sd=100 / 143).comparisons["b"].resolved


@pytest.mark.parametrize("gap", [0.3, 0.5])
def test_the_runs_said_to_be_needed_resolve_it_in_four_cases_of_five(gap):
    rounds = 4
    needed = Comparison("0", "1", gap, math.sqrt(2) * SD, rounds, MAX_ROUNDS).runs_needed
    values = [simulate([70.0 + gap, 70.0], seed, rounds + needed) for seed in range(150)]
    resolved = sum(judge(one, rounds + needed).comparisons["1"].resolved for one in values)
    assert resolved >= 0.75 * 150
    fewer = [judge(one, rounds + needed // 2) for one in values]
    assert sum(one.resolved for one in fewer) < 0.75 * 150, "half as many would not do"
    assert Comparison("a", "b", 0.0, SD, 8, 8).runs_needed > MOST_RUNS_NAMED


# ---------------------------------------------------------------- of a search
TRIALS = [
    make_trial("t0000", 70.0, role="reference"),
    make_trial("t0001", 75.0, role="control", alpha=0.0, beta=0.0),
    make_trial("t0002", 71.0, alpha=0.3),
    make_trial("t0003", 72.0, alpha=0.4),
    make_trial("t0004", 72.0, alpha=0.4),
    make_trial("t0005", 99.0, alpha=0.9, status="stopped"),
]
BASE = TrainConfig(dataset="digits", width=4, epochs=2, val_fraction=0.2, seed=7)


def open_confirmation(folder: Path, top: int = 1, more: tuple[TrialRecord, ...] = (), **changed: Any) -> Confirmation:
    settings = SearchSettings(confirm=top, confirm_seeds=4, **changed)
    return Confirmation(Store(folder), [*TRIALS, *more], DEFAULT_SPACE, BASE, settings, num_val=287)


def run_all(confirmation: Confirmation, truth: dict[str, float], most: int = 99) -> list[Run]:
    """Do what is asked for, with made-up values; what is found is on the disk."""
    noise = np.random.default_rng(0)
    done: list[Run] = []
    while len(done) < most and (run := confirmation.next_run()) is not None:
        config = confirmation.config(run).to_dict()
        result = {"config": config, "error": "", confirmation.metric: truth[run.arm] + noise.normal(0, SD)}
        write_json(confirmation.run_folder(run) / "result.json", result)
        confirmation.results[run] = result
        done.append(run)
    confirmation.save("finished" if most == 99 else "interrupted")
    return done


def test_the_best_different_settings_and_both_controls():
    controls = [Arm(trial.trial_id, trial.role, trial.params) for trial in TRIALS[:2]]
    for top, expected in (
        (1, ["t0003", "t0000", "t0001"]),
        (2, ["t0003", "t0002", "t0000", "t0001"]),
        (9, ["t0003", "t0002", "t0000", "t0001"]),  # the reference is among the best: it is run once
    ):
        assert [arm.trial_id for arm in choose_arms(TRIALS, BASE, "val_accuracy", top, controls)] == expected


def test_seeds_are_fresh_and_shared(tmp_path):
    confirmation = open_confirmation(tmp_path)
    configs = {arm: confirmation.config(Run(arm, 2)) for arm in confirmation.arms}
    assert {config.seed for config in configs.values()} == {7 + FRESH_SEEDS + 2}
    assert {config.split_seed for config in configs.values()} == {FRESH_SEEDS + 2}
    assert configs["t0001"].alpha == 0
    assert all(config.val_fraction == BASE.val_fraction for config in configs.values())


def test_a_clear_winner_is_chosen_and_taken_by_train_once_it_is_finished(tmp_path):
    folder = tmp_path / "searches" / "s"
    write_json(folder / "best.json", {"config": {**BASE.to_dict(), "alpha": 0.9}})
    confirmation = open_confirmation(folder)
    confirmation.save("interrupted")
    assert find_best(tmp_path, "s", "resnet18", "digits").settings["alpha"] == 0.9
    run_all(confirmation, {"t0003": 80.0, "t0000": 70.0, "t0001": 75.0})
    assert confirmation.is_done
    record = read_json(folder / "confirmation.json")
    assert (record["choice"], record["resolved"], record["status"]) == ("t0003", True, "finished")
    assert "Resolved" in record["verdict"][0]
    assert "deep supervision alone" in " ".join(record["verdict"]).lower()
    choice = find_best(tmp_path, "s", "resnet18", "digits")
    assert (choice.settings["alpha"], choice.settings["val_fraction"], choice.settings["seed"]) == (0.4, 0.0, 7)
    assert "confirmed" in choice.source


def test_deep_supervision_alone_may_win_and_is_taken_among_equals(tmp_path):
    clear, near = open_confirmation(tmp_path / "clear"), open_confirmation(tmp_path / "near", margin=2.0)
    unclear = open_confirmation(tmp_path / "unclear", margin=0.0)
    run_all(clear, {"t0003": 70.0, "t0000": 70.0, "t0001": 80.0})
    run_all(near, {"t0003": 70.0, "t0000": 60.0, "t0001": 70.05})
    run_all(unclear, {"t0003": 70.0, "t0000": 60.0, "t0001": 70.05})
    told = [" ".join(one.verdict(one.judge())) for one in (clear, near, unclear)]
    assert [one.judge().chosen for one in (clear, near)] == ["t0001", "t0001"]
    for text, words in zip(told, ("Resolved after", "Equal within 2.00 points", "Not resolved after"), strict=True):
        assert text.startswith(words)
    assert ["Self distillation showed nothing" in text for text in told] == [True, True, False]
    assert "more run" in told[2]
    assert not open_confirmation(tmp_path / "near").is_done, "another margin is another question"


def test_it_goes_on_where_it_was_stopped(tmp_path):
    """A damaged record, and one of other settings, is a run that has not been done."""
    truth = {"t0003": 70.1, "t0000": 70.0, "t0001": 70.05}
    whole = run_all(open_confirmation(tmp_path / "whole"), truth)
    first = open_confirmation(tmp_path / "broken")
    run_all(first, truth, most=5)
    changed = first.results[whole[3]] | {"config": first.config(whole[3]).with_settings(alpha=0.77).to_dict()}
    write_json(first.run_folder(whole[3]) / "result.json", changed)
    (first.run_folder(whole[4]) / "result.json").write_text("{")
    assert run_all(open_confirmation(tmp_path / "broken"), truth) == whole[3:]


def test_a_diverged_run_is_told(tmp_path):
    confirmation = open_confirmation(tmp_path)
    confirmation.results[Run("t0003", 0)] = {"error": "the loss became nan in epoch 1"}
    run_all(confirmation, {"t0000": 70.0, "t0001": 60.0})
    assert "a run of it diverged" in " ".join(confirmation.verdict(confirmation.judge()))
    assert confirmation.judge().chosen == "t0000"
    for arm in ("t0000", "t0001"):
        confirmation.results[Run(arm, 0)] = {"error": "the loss became nan"}
    confirmation.save("finished")
    assert "none can be chosen" in read_json(tmp_path / "confirmation.json")["verdict"][0]


def test_the_only_one_that_did_not_diverge_is_chosen_and_it_is_said(tmp_path):
    confirmation = open_confirmation(tmp_path)
    confirmation.results[Run("t0003", 0)] = {"error": "", "val_accuracy": 70.0}
    for arm in ("t0000", "t0001"):
        confirmation.results[Run(arm, 0)] = {"error": "the loss became nan"}
    first, *others = confirmation.verdict(confirmation.judge())
    assert first.startswith("Not resolved: trial t0003 (alpha 0.4")
    assert first.endswith("is the only one of which no run diverged.")
    assert len([sentence for sentence in others if "a run of it diverged" in sentence]) == 2


def test_a_confirmed_setting_stays_when_more_trials_come(tmp_path):
    """One of them had a luckier single run; it is compared with what was confirmed, and does not replace it unseen."""
    run_all(open_confirmation(tmp_path), {"t0003": 80.0, "t0000": 70.0, "t0001": 75.0})
    later = open_confirmation(tmp_path, more=(make_trial("t0009", 90.0, alpha=0.7),))
    assert set(later.arms) == {"t0009", "t0003", "t0000", "t0001"}
    assert not later.is_done
    assert {run.arm for run in run_all(later, {"t0009": 70.0, "t0000": 70.0, "t0001": 75.0})} == {"t0009"}
    assert later.judge().chosen == "t0003"


def test_fewer_are_asked_for_than_were_run(tmp_path):
    run_all(open_confirmation(tmp_path, top=2), {"t0003": 80.0, "t0002": 70.0, "t0000": 70.0, "t0001": 75.0})
    fewer = open_confirmation(tmp_path, top=1)
    assert fewer.judge().is_over
    assert not fewer.is_done, "the record is of other arms"


def test_a_metric_that_is_minimised(tmp_path):
    confirmation = open_confirmation(tmp_path, top=9, metric=("val_nll",))
    run_all(confirmation, {"t0000": 20.0, "t0001": 10.0, "t0002": 30.0, "t0003": 40.0})
    judgement = confirmation.judge()
    assert judgement.remaining == ["t0001"]
    assert re.search(r": worse by \d+\.\d{4} nats \(95 % interval -", " ".join(confirmation.verdict(judgement)))


# ---------------------------------------------------------------- a planted optimum, although single runs are noisy
OPTIMUM = {"alpha": 0.55, "temperature": 5.0, "beta": 1e-5}
BEST = 78.0  # percent, of the optimum
PLANTED_BASE = TrainConfig(dataset="digits", epochs=EPOCHS, val_fraction=0.1)
NUM_SAMPLES = 60


def true_accuracy(params: dict[str, float]) -> float:
    """Falls off by 1.5 points where alpha is 0.25 away, or the temperature 3, or beta a factor of 30."""
    far = ((params["alpha"] - OPTIMUM["alpha"]) / 0.25) ** 2 + (
        (params["temperature"] - OPTIMUM["temperature"]) / 3
    ) ** 2
    beta = max(params["beta"], 1e-9)  # deep supervision alone has none
    return BEST - 1.5 * (far + (math.log(beta / OPTIMUM["beta"]) / math.log(30)) ** 2)


@pytest.mark.parametrize("seed", range(2))
def test_it_is_found_and_confirmed(tmp_path, seed):
    noise = np.random.default_rng(seed)
    search = MadeUpSearch(tmp_path, num_samples=NUM_SAMPLES, seed=seed)
    for _ in range(NUM_SAMPLES):
        suggestion = search.suggest()
        final, status = true_accuracy(suggestion["params"]) + noise.normal(0, SD), "completed"
        for epoch in range(1, EPOCHS + 1):
            value = final * (1 - 0.8 * math.exp(-epoch / 3)) if epoch < EPOCHS else final
            if search.report(suggestion, epoch, value) == "STOP" and epoch < EPOCHS:
                status = "stopped"
                break
        search.end(suggestion, status)

    settings = SearchSettings(confirm=3, confirm_seeds=8)
    trials = list(search.records.trials.values())
    confirmation = Confirmation(Store(tmp_path), trials, DEFAULT_SPACE, PLANTED_BASE, settings, num_val=5000)
    run_all(confirmation, {name: true_accuracy(arm.params) for name, arm in confirmation.arms.items()})

    judgement = confirmation.judge()
    assert judgement.chosen is not None
    choice = confirmation.arms[judgement.chosen]
    reference = next(arm for arm in confirmation.arms.values() if arm.role == "reference")
    assert true_accuracy(choice.params) > BEST - 1, "found"
    assert true_accuracy(reference.params) < BEST - 5, "which is worth finding"
    for role in ("reference", "control"):
        arm = next(arm.trial_id for arm in confirmation.arms.values() if arm.role == role)
        assert arm not in judgement.remaining, "confirmed: both controls are resolved to be worse"
