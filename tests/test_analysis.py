"""analysis/: tables from files, the words the noise allows, figures, the page, and the command lines.

The search folders are made by hand, as search/records.py leaves them: finished, running, killed, empty.
"""

import ast
import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from analysis import best, report, retrain
from analysis.figures import draw_pictures, metric_range, to_svg
from analysis.listing import ranking_table, summary_table, trials_table
from analysis.trials import (
    find_role,
    find_search,
    load_curves,
    load_runs,
    load_search,
    load_trials,
    pareto_front,
    rank,
    retrained_runs,
    search_metrics,
    summarise_runs,
    trial_config,
)
from analysis.verdict import (
    accuracy_standard_error,
    compare_means,
    count_statuses,
    describe_metric,
    judge_retrained,
    judge_search,
    next_commands,
    noise_margin,
    runs_needed,
    within_noise,
)
from byot.config import TrainConfig
from byot.search_files import load_confirmation
from byot.system.files import write_json
from byot.system.paths import PROJECT_ROOT
from tests.helpers import assert_one_sentence, command_environment, command_line, run_command

ANALYSIS = PROJECT_ROOT / "analysis"
EPOCHS = 9
NUM_VAL_IMAGES = 5000
SUFFIXES = ("1", "2", "3", "4", "ensemble")
OFFSETS = (-11.5, -4.0, -0.5, 0.0, 1.0)  # of each classifier's accuracy against the deepest's
MEASURES = [
    "val_accuracy",
    *(f"val_accuracy_{s}" for s in SUFFIXES),
    "val_nll",
    "val_nll_ensemble",
    "val_ece",
    "val_ece_ensemble",
]
SPACE = {
    "alpha": {"low": 0.0, "high": 1.0, "log": False},
    "temperature": {"low": 1.0, "high": 10.0, "log": False},
    "beta": {"low": 1e-8, "high": 1e-3, "log": True},
}


# ---------------------------------------------------------------- searches made by hand


def trial(trial_id, accuracy=None, *, role="sampled", status="completed", epochs=EPOCHS, error="", **params):
    """One trial: what its row says, and the epochs its metrics.jsonl holds."""
    alpha = {"reference": 0.1, "control": 0.0}.get(role, 0.3)
    beta = {"reference": 1e-6, "control": 0.0}.get(role, 2.5e-7)
    return SimpleNamespace(
        trial_id=trial_id,
        accuracy=accuracy,
        role=role,
        status=status,
        epochs=epochs,
        error=error,
        params={"alpha": alpha, "temperature": 3.0, "beta": beta, **params},
    )


def measures(accuracy, prefix="val"):
    record = {}
    for suffix, offset in zip(SUFFIXES, OFFSETS, strict=True):
        record[f"{prefix}_accuracy_{suffix}"] = accuracy + offset
        record[f"{prefix}_nll_{suffix}"] = 4 * (1 - (accuracy + offset) / 100)
        record[f"{prefix}_ece_{suffix}"] = 5.0
    return record | {f"{prefix}_{m}": record[f"{prefix}_{m}_4"] for m in ("accuracy", "nll", "ece")}


def epoch_record(number, accuracy):
    return {
        "epoch": number,
        "lr": 0.1,
        "train_loss": 1.0,
        **measures(accuracy),
        "elapsed_s": 2.0,
        "images_per_s": 900.0,
    }


def write_trial_epochs(folder, one, epochs):
    """metrics.jsonl of a trial whose accuracy rises by a point an epoch to its last one."""
    path = folder / "trials" / one.trial_id / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    lines = [json.dumps(epoch_record(e, one.accuracy - (epochs - e))) for e in range(1, epochs + 1)]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def make_search(outputs, trials, *, name="search-1", started="2026-11-20T10:00:00+00:00", status="finished", **record):
    folder = outputs / "searches" / name
    config = TrainConfig(dataset="digits", width=4, epochs=EPOCHS, val_fraction=0.1)
    write_json(
        folder / "search.json",
        {
            "name": name,
            "status": status,
            "started_at": started,
            "finished_at": "2026-11-20T12:30:00+00:00" if status == "finished" else None,
            "config": config.to_dict(),
            "settings": {"num_samples": 8, "max_concurrent": None, "metric": "val_accuracy", "time_budget": None},
            "space": SPACE,
            "metric": "val_accuracy",
            "mode": "max",
            "num_samples": 8,
            "max_concurrent": 2,
            "num_train_images": 45000,
            "num_val_images": NUM_VAL_IMAGES,
            "commit": "1e1ae1d0aaf5bbcce00c0d9377ad9b6e8e50ad11",
            "versions": {"python": "3.11.7", "torch": "2.15.0"},
            "hardware": {"device": "cpu", "cpu": "AMD EPYC", "cpu_cores": 2, "threads": 1},
            **record,
        },
    )
    columns = ["trial_id", "role", "status", "epochs_done", *SPACE, *MEASURES, "seconds", "seed", "error"]
    with open(folder / "trials.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for one in trials:
            row = {"trial_id": one.trial_id, "role": one.role, "status": one.status, **one.params, "seed": 0}
            running = one.status == "running"  # its row is as old as its start
            row |= {"epochs_done": 0 if running else one.epochs, "seconds": 0.0 if running else 2.0 * one.epochs}
            if one.accuracy is not None:
                write_trial_epochs(folder, one, one.epochs)
                if not running:
                    row |= {m: v for m, v in measures(one.accuracy).items() if m in MEASURES}
            writer.writerow({**row, "error": one.error})
    return folder


def full_search(outputs, **options):
    """Every kind of trial: the best of them all was stopped, and one failed before its first epoch."""
    return make_search(
        outputs,
        [
            trial("d9c2825f", 77.2, role="reference"),
            trial("a30febcf", 77.6, role="control"),
            trial("1234e567", 77.9, alpha=0.2832109876543211),
            trial("00000012", 76.6),
            trial("94bed0ac", 73.0),
            trial("0e5", 90.0, status="stopped", epochs=3),
            trial("aaf72d0a", 12.0, status="failed", epochs=2, error="diverged: the loss became nan in epoch 3"),
            trial("nan", status="failed", epochs=0, error="OutOfMemoryError: <CUDA> out of memory"),
        ],
        **options,
    )


def make_run(outputs, config, accuracy, *, name=None):
    result = {"config": config.to_dict(), "num_train_images": 1438, "num_test_images": 359, "elapsed_s": 30.0}
    folder = outputs / "runs" / (name or config.run_name())
    write_json(folder / "result.json", {**result, **measures(accuracy, "test"), "commit": None})
    return folder


def retrain_by_hand(outputs, folder, accuracies):
    """Finished runs of trials: trial id -> test accuracies over the seeds 0, 1, …"""
    search, trials = load_search(folder), load_trials(folder)
    for trial_id, over_seeds in accuracies.items():
        config = trial_config(search, trials[trials["trial_id"] == trial_id].iloc[0])
        for seed, accuracy in enumerate(over_seeds):
            make_run(outputs, config.with_settings(seed=seed), accuracy)
    return search, trials, retrained_runs(load_runs(outputs), search, trials)


@pytest.fixture
def outputs(tmp_path):
    return tmp_path / "outputs"


@pytest.fixture
def folder(outputs):
    return full_search(outputs)


def run_main(module, monkeypatch, capsys, *arguments):
    """Exit code, output and errors of an entry point's main()."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__.split('.')[-1]}.py", *map(str, arguments)])
    try:
        module.main()
        code: object = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


# ---------------------------------------------------------------- trials


def test_trials_have_their_types_and_contents(folder):
    trials = load_trials(folder)
    types = trials.dtypes.astype(str).to_dict()
    assert {types[c] for c in ("trial_id", "role", "status", "error")} == {"str"}
    assert types["epochs_done"] == "int64"
    assert types["seed"] == "Int64"
    assert {types[c] for c in (*SPACE, *MEASURES, "seconds")} == {"float64"}
    # Ids that look like numbers or like nothing, and the exact parameters.
    ids = ["d9c2825f", "a30febcf", "1234e567", "00000012", "94bed0ac", "0e5", "aaf72d0a", "nan"]
    assert trials["trial_id"].tolist() == ids
    assert trials["alpha"][2] == 0.2832109876543211
    assert trials["error"].tolist()[:6] == [""] * 6
    never = trials.iloc[7]
    assert never["epochs_done"] == 0
    assert np.isnan(never[MEASURES].astype(float)).all()
    pd.testing.assert_frame_equal(load_trials(folder / "trials.csv"), trials)


def test_an_empty_search_gives_an_empty_table_of_the_same_types(outputs, folder):
    empty = load_trials(make_search(outputs, [], name="empty"))
    assert len(empty) == 0
    pd.testing.assert_series_equal(empty.dtypes, load_trials(folder).dtypes)
    curves = load_curves(outputs / "searches" / "empty")
    assert curves.columns.tolist() == ["trial_id", "epoch"]
    assert len(rank(empty, "val_accuracy", "max", EPOCHS)) == 0


def test_a_running_trial_is_brought_up_to_date_from_its_own_file(outputs):
    running = trial("b1", 60.0, status="running", epochs=5)
    folder = make_search(outputs, [trial("a1", 70.0), running, trial("c1", status="running")], status="running")
    trials = load_trials(folder)
    assert trials["epochs_done"].tolist() == [EPOCHS, 5, 0]
    assert trials["status"].tolist() == ["completed", "running", "running"]
    assert trials["val_accuracy"].tolist()[:2] == [70.0, 60.0]
    assert trials["val_accuracy_ensemble"][1] == 61.0
    assert trials["seconds"][1] == 10.0
    assert math.isnan(trials["val_accuracy"][2])


def test_a_killed_search_is_read_up_to_the_torn_line(outputs):
    folder = make_search(outputs, [trial("b1", 60.0, status="running", epochs=5)], status="running")
    path = folder / "trials" / "b1" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:100])
    assert load_trials(folder)["epochs_done"].tolist() == [4]
    assert load_trials(folder)["val_accuracy"].tolist() == [59.0]
    assert load_curves(folder)["epoch"].tolist() == [1, 2, 3, 4]
    # Gone on with after the kill: an epoch that is there twice counts once, as it was done last.
    path.write_text("".join(lines[:4]) + json.dumps(epoch_record(4, 58.5)) + "\n")
    assert load_curves(folder)["val_accuracy"].tolist() == [56.0, 57.0, 58.0, 58.5]


def test_a_finished_row_is_not_overruled_by_metrics(folder):
    path = folder / "trials" / "0e5" / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps(epoch_record(4, 91.0)) + "\n")
    stopped = load_trials(folder).set_index("trial_id").loc["0e5"]
    assert stopped["epochs_done"] == 3
    assert stopped["val_accuracy"] == 90.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a table of trials: it lacks the column trial_id"),
        ("trial_id,role\na,b\n", "lacks the column status"),
        ("trial_id,role,status,epochs_done,seconds,seed,error\na,sampled,comp", "row 2 has 3 cells instead of 7"),
        ("trial_id,role,status,epochs_done,seconds,seed,error\na,sampled,completed,x,1,0,\n", "row 2, invalid literal"),
        ("trial_id,role,status,epochs_done,seconds,seed,error\na,sampled,done,1,1,0,\n", "the status 'done'"),
        ("trial_id,role,status,epochs_done,seconds,seed,error,error\n", "has a column twice"),
        ("trial_id,role,status,epochs_done,seconds,seed,error\n" + "a,sampled,failed,1,1,0,\n" * 2, "a second time"),
        ('trial_id,role,status,epochs_done,seconds,seed,error\n"a', "cannot be read"),
    ],
)
def test_a_damaged_table_is_told_in_one_sentence(folder, text, message):
    (folder / "trials.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_trials(folder)
    assert "\n" not in str(error.value)


def test_missing_or_binary_tables(folder):
    (folder / "trials.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        load_trials(folder)
    (folder / "trials.csv").unlink()
    with pytest.raises(ValueError, match="no trial of that search has started yet"):
        load_trials(folder)


def test_the_newest_search_is_found_and_damaged_ones_passed_over(outputs, folder):
    newer = make_search(outputs, [], name="newer", started="2026-11-21T01:00:00+02:00")
    make_search(outputs, [], name="a-later-hour-but-earlier", started="2026-11-20T23:30:00+02:00")
    (make_search(outputs, [], name="damaged", started="2026-12-01T00:00:00Z") / "search.json").write_text('{"name"')
    assert find_search(outputs) == newer
    assert find_search(outputs, "search-1") == folder
    assert find_search(outputs, str(folder)) == folder
    with pytest.raises(ValueError, match=r"there is no search nowhere in .*; there are a-later.*, search-1$"):
        find_search(outputs, "nowhere")
    with pytest.raises(ValueError, match=r"no search is in .*: run python search/tune\.py first"):
        find_search(outputs / "elsewhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": None}, "lacks metric"),
        ({"mode": "maximum"}, "mode must be max or min"),
        ({"config": {"epochs": 0}}, "epochs must be at least 1"),
        ({"config": {"depth": 3}}, "unknown setting depth"),
        ({"space": ["alpha"]}, "space must be a table"),
    ],
)
def test_an_incomplete_record_is_told_in_one_sentence(outputs, changes, message):
    with pytest.raises(ValueError, match=message):
        load_search(make_search(outputs, [], **changes))


def test_ranking_never_mixes_budgets(folder):
    trials = load_trials(folder)
    ranked = rank(trials, "val_accuracy", "max", EPOCHS)
    # Not the stopped one with 90 %, nor the control, nor what failed.
    assert ranked["trial_id"].tolist() == ["1234e567", "d9c2825f", "00000012", "94bed0ac"]
    assert rank(trials, "val_nll", "min", EPOCHS)["trial_id"].tolist() == ranked["trial_id"].tolist()
    assert rank(trials, "val_accuracy", "max", EPOCHS + 1).empty
    control = find_role(trials, "control", "val_accuracy", EPOCHS)
    assert control is not None
    assert control["trial_id"] == "a30febcf"
    with pytest.raises(ValueError, match="the trials have no val_recall; they have val_accuracy"):
        rank(trials, "val_recall", "max", EPOCHS)


def test_of_equal_trials_the_first_started_ranks_first(outputs):
    trials = load_trials(make_search(outputs, [trial("z", 70.0), trial("a", 70.0), trial("m", 71.0)]))
    assert rank(trials, "val_accuracy", "max", EPOCHS)["trial_id"].tolist() == ["m", "z", "a"]


def test_ranking_agrees_with_the_best_json_of_a_search(folder):
    records = pytest.importorskip("search.records")
    row = records.best_row(records.read_rows(folder / "trials.csv"), "val_accuracy", "max")
    assert row["trial_id"] == rank(load_trials(folder), "val_accuracy", "max", EPOCHS)["trial_id"][0]


# ---------------------------------------------------------------- runs


def test_retrained_runs_are_those_with_a_trials_settings(outputs, folder):
    search, trials = load_search(folder), load_trials(folder)
    by_id = trials.set_index("trial_id")
    best_config = trial_config(search, by_id.loc["1234e567"])
    assert best_config.val_fraction == 0
    assert best_config.alpha == 0.2832109876543211
    control = trial_config(search, by_id.loc["a30febcf"])
    make_run(outputs, control, 77.0)
    make_run(outputs, best_config.with_settings(seed=1, device="cpu", data_dir="/elsewhere", precision="fp32"), 78.5)
    make_run(outputs, best_config, 78.0)
    make_run(outputs, best_config.with_settings(epochs=3), 60.0)
    make_run(outputs, best_config.with_settings(val_fraction=0.1), 1.0)  # not all training images
    make_run(outputs, best_config.with_settings(alpha=0.28), 2.0)
    make_run(outputs, best_config.with_settings(width=8), 3.0)
    (make_run(outputs, best_config.with_settings(seed=7), 4.0) / "result.json").write_text("{")
    runs = load_runs(outputs)
    assert len(runs) == 7
    found = retrained_runs(runs, search, trials)
    assert found["trial_id"].tolist() == ["1234e567"] * 3 + ["a30febcf"]
    assert found["role"].tolist() == ["sampled"] * 3 + ["control"]
    assert found["epochs"].tolist() == [3, EPOCHS, EPOCHS, EPOCHS]
    assert found["test_accuracy"].tolist() == [60.0, 78.0, 78.5, 77.0]
    summary = summarise_runs(found)
    assert summary["num_runs"].tolist() == [1, 2, 1]
    assert summary["test_accuracy_ensemble"].tolist() == [61.0, 79.25, 78.0]
    assert summary["test_accuracy_sd"][1] == pytest.approx(math.sqrt(0.125))
    assert np.isnan(summary["test_accuracy_sd"][[0, 2]]).all()
    rows = summary_table(search, summary, trials).rows
    assert rows[1][-2:] == ["78.25 ± 0.35", "79.25 ± 0.35"]
    assert rows[0][-1] == "61.00 ± \N{EN DASH}"


def test_no_runs_give_empty_tables_of_the_same_columns(outputs, folder):
    search, trials = load_search(folder), load_trials(folder)
    found = retrained_runs(load_runs(outputs), search, trials)
    assert found.empty
    assert found.columns[:3].tolist() == ["trial_id", "role", "run"]
    assert str(found["test_accuracy"].dtype) == "float64"
    assert summarise_runs(found).empty
    assert judge_retrained(search, trials, summarise_runs(found)) == []


# ---------------------------------------------------------------- what the noise allows to say


def test_standard_errors():
    assert accuracy_standard_error(75.0, 5000) == pytest.approx(100 * math.sqrt(0.75 * 0.25 / 5000))
    assert noise_margin(75.0, 75.0, 5000) == pytest.approx(2 * math.sqrt(2) * accuracy_standard_error(75.0, 5000))
    # All right is no certainty: one image of 144 is never more than noise.
    assert accuracy_standard_error(100.0, 144) > 0
    assert within_noise(100.0, 100 * 143 / 144, 144)
    assert not within_noise(100.0, 90.0, 144)


def test_welch_against_scipy():
    from scipy import stats

    a, b = [78.3, 78.9, 78.1, 78.6], [77.4, 77.9, 77.6]
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    (mean, sd), (other, other_sd) = ((float(np.mean(x)), float(np.std(x, ddof=1))) for x in (a, b))
    interval = compare_means(mean, sd, 4, other, other_sd, 3)
    assert interval is not None
    assert interval.difference - interval.half_width == pytest.approx(expected.low)
    assert interval.difference + interval.half_width == pytest.approx(expected.high)
    assert interval.resolved
    assert compare_means(78.0, math.nan, 1, 77.0, 0.3, 3) is None
    assert compare_means(78.0, 0.0, 2, 77.0, 0.0, 2) == (1.0, 0.0)


@pytest.mark.parametrize(("gap", "runs"), [(0.2, 36), (0.3, 16), (0.5, 6), (1.0, 3)])
def test_runs_needed_are_those_of_a_power_table(gap, runs):
    assert abs(runs_needed(gap, 0.3, 0.3) - runs) <= 1


def test_verdict_within_and_beyond_the_noise(folder):
    first, equals, reference, control, caution = judge_search(load_search(folder), load_trials(folder))
    assert first.startswith(
        f"Best of the 4 self-distilled trials that reached epoch {EPOCHS}: trial 1234e567, alpha 0.283,"
    )
    assert "77.90 % ± 0.59 (binomial standard error, 5,000 images)" in first
    assert equals.startswith("Of the 3 others, 2 lie within its noise")
    assert equals.endswith("d9c2825f, 00000012.")
    assert reference.startswith("Against the reference setting (alpha 0.1, temperature 3, beta 1e-06; 77.20 %):")
    assert reference.endswith("better by 0.70 points, within the noise.")
    assert control.endswith("better by 0.30 points, within the noise.")
    assert "single runs, one seed" in caution


def test_verdict_of_a_large_difference(outputs):
    trials = [trial("r", 70.0, role="reference"), trial("c", 80.0, role="control"), trial("a", 75.0)]
    folder = make_search(outputs, trials)
    _, equals, reference, control, _ = judge_search(load_search(folder), load_trials(folder))
    assert equals == "The other lies beyond its noise."
    assert reference.endswith("better by 5.00 points, beyond the noise.")
    assert control.endswith("worse by 5.00 points, beyond the noise.")


def test_verdict_where_the_reference_is_the_best_or_missing(outputs):
    folder = make_search(outputs, [trial("r", 75.0, role="reference"), trial("a", 60.0)])
    text = " ".join(judge_search(load_search(folder), load_trials(folder)))
    assert "The best is the reference setting itself: the search found nothing better." in text
    assert "Deep supervision alone has not reached the last epoch here" in text


def test_verdict_of_an_unfinished_or_empty_search(outputs, folder):
    running = make_search(outputs, [trial("a", 70.0, epochs=2, status="running")], name="running", status="running")
    for path in (running, make_search(outputs, [], name="empty")):
        sentences = judge_search(load_search(path), load_trials(path))
        assert sentences == [f"No trial has reached its last epoch ({EPOCHS}) yet, so there is nothing to compare."]
    interrupted = make_search(outputs, [trial("a", 70.0)], name="stopped", status="interrupted")
    sentences = judge_search(load_search(interrupted), load_trials(interrupted))
    assert sentences[0].startswith(f"The only self-distilled trial that has reached epoch {EPOCHS}: a,")
    assert sentences[-1] == "The search has not finished: all of this may change."
    assert count_statuses(load_trials(folder)) == "8 trials: 5 completed, 1 stopped, 2 failed"


def test_verdict_of_a_likelihood_claims_no_error(outputs):
    folder = full_search(outputs, metric="val_nll", mode="min")
    text = " ".join(judge_search(load_search(folder), load_trials(folder)))
    assert "validation NLL, classifier 4/4: 0.8840 nats." in text
    assert "better by 0.0280 nats." in text
    assert "the noise" not in text
    assert "binomial" not in text
    assert "one run gives no error of this measure" in text
    search, trials, runs = retrain_by_hand(outputs, folder, {"1234e567": [78.0, 78.2], "a30febcf": [70.0, 70.1]})
    head, _, control = judge_retrained(search, trials, summarise_runs(runs))
    assert head.startswith("Test NLL, classifier 4/4, of trial 1234e567 ")
    assert "better by 0.3220 nats" in control
    header = ranking_table(load_search(folder), load_trials(folder), 5).header
    assert "val_nll nats" in header
    assert "± se" not in header


def test_retrained_differences_are_resolved_or_not(outputs, folder):
    accuracies = {"1234e567": [78.0, 78.2, 78.1], "d9c2825f": [77.9, 78.3, 77.8], "a30febcf": [76.0, 76.2, 75.9]}
    search, trials, runs = retrain_by_hand(outputs, folder, accuracies)
    head, reference, control = judge_retrained(search, trials, summarise_runs(runs))
    assert head.startswith("Test accuracy, classifier 4/4, of trial 1234e567")
    assert head.endswith("78.10 ± 0.10 % (3 seeds, ± standard deviation).")
    assert "better by 0.10 points" in reference
    assert "not resolved" in reference
    assert control.endswith("(95 % interval +1.75 to +2.38): resolved.")


def test_one_seed_gives_no_verdict(outputs, folder):
    search, trials, runs = retrain_by_hand(outputs, folder, {"1234e567": [78.0], "d9c2825f": [70.0]})
    head, reference, control = judge_retrained(search, trials, summarise_runs(runs))
    assert head.endswith("78.00 % (one run).")
    assert reference.endswith("it takes at least two seeds of each to say whether the difference is real.")
    assert control == f"Deep supervision alone was not retrained for {EPOCHS} epochs."


def test_metrics_in_words():
    assert describe_metric("val_accuracy") == "validation accuracy, classifier 4/4"
    assert describe_metric("val_accuracy_2") == "validation accuracy, classifier 2/4"
    assert describe_metric("val_nll_ensemble") == "validation NLL, ensemble"


def test_commands_name_the_search_and_its_place(outputs, folder, monkeypatch):
    assert next_commands(folder, outputs)[0] == f"python byot/train.py --best search-1 --outputs {outputs}"
    monkeypatch.setenv("BYOT_OUTPUTS", str(outputs))
    assert next_commands(folder, outputs)[1] == "python analysis/retrain.py search-1 --top 3 --seeds 3"


# ---------------------------------------------------------------- tables and figures


def test_ranking_table_has_the_reference_and_the_control_below(folder):
    table = ranking_table(load_search(folder), load_trials(folder), top=1)
    assert [row[:3] for row in table.rows] == [
        ["1", "1234e567", "sampled"],
        ["2", "d9c2825f", "reference"],
        ["\N{EN DASH}", "a30febcf", "control"],
    ]
    assert table.header[-6:] == ["± se", "1/4", "2/4", "3/4", "4/4", "ensemble"]
    assert table.rows[0][-6:] == ["0.59", "66.40", "73.90", "77.40", "77.90", "78.90"]
    lines = table.to_text().splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert trials_table(load_trials(folder)).rows[-1][7:] == ["\N{EN DASH}"] * 7 + ["0"]


def draw(outputs, folder):
    search, trials = load_search(folder), load_trials(folder)
    retrained = retrained_runs(load_runs(outputs), search, trials)
    return draw_pictures(search, trials, load_curves(folder), retrained, summarise_runs(retrained))


@pytest.mark.parametrize("metric", ["val_accuracy", "val_nll"])
def test_every_figure_of_a_full_search_is_drawn(outputs, metric):
    folder = full_search(outputs, metric=metric, mode="max" if metric == "val_accuracy" else "min")
    retrain_by_hand(outputs, folder, {"1234e567": [78.0, 78.2], "a30febcf": [76.0]})
    pictures = draw(outputs, folder)
    names = ["history", "parameters", "curves", "classifiers", f"retrained-{EPOCHS}"]
    assert [p.name for p in pictures] == names
    for picture in pictures:
        assert picture.title
        assert picture.caption
        assert len(picture.alternative) > 40
        assert to_svg(picture.figure).lstrip().startswith(b"<?xml")
        for axes in picture.figure.axes:
            assert axes.get_legend() is None  # the legend stands outside the axes
    history, parameters = pictures[0].figure.axes[0], pictures[1].figure.axes
    assert history.get_ylabel().endswith("(%)" if metric == "val_accuracy" else "(nats)")
    assert [axes.get_xscale() for axes in parameters[:3]] == ["linear", "linear", "log"]


def confirm_by_hand(folder, **changes):
    """Run again over three fresh seeds: the best, and both controls, of which one was out after two."""
    arms = {"1234e567": ("sampled", [78.0, 78.4, 78.2]), "d9c2825f": ("reference", [77.9, 78.5, None])}
    arms["a30febcf"] = ("control", [70.0, 70.5])
    record = {
        "status": "finished",
        "num_rounds": 3,
        "metric": "val_accuracy",
        "choice": "1234e567",
        "verdict": ["Not resolved after 3 fresh seeds: trial 1234e567 leads.", "Deep supervision alone: resolved."],
        "arms": [{"trial_id": name, "role": role, "values": values} for name, (role, values) in arms.items()],
    }
    write_json(folder / "confirmation.json", record | changes)


def test_a_confirmation_is_shown_first(outputs, folder):
    confirm_by_hand(folder)
    html = report.render_page(folder, outputs)
    verdict = html[html.index('class="verdict"') :]
    assert verdict.index("Not resolved after 3 fresh seeds") < verdict.index("Best of the")
    search, trials = load_search(folder), load_trials(folder)
    none = retrained_runs(load_runs(outputs), search, trials)
    pictures = draw_pictures(search, trials, load_curves(folder), none, summarise_runs(none), load_confirmation(folder))
    (picture,) = (picture for picture in pictures if picture.name == "confirmation")
    assert "deep supervision alone -7.95" in picture.alternative, "of the seeds that both had"
    assert "the reference setting +0.00" in picture.alternative


def test_best_shows_the_confirmation(outputs, folder, monkeypatch, capsys):
    code, out, _ = run_main(best, monkeypatch, capsys, "--outputs", outputs)
    assert code == 0
    assert "fresh seeds" not in out
    confirm_by_hand(folder)
    code, out, _ = run_main(best, monkeypatch, capsys, "--outputs", outputs)
    assert code == 0
    assert "- Not resolved after 3 fresh seeds: trial 1234e567 leads." in out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"verdict": None}, "has no verdict"),
        ({"verdict": [1]}, "has no verdict"),
        ({"arms": {}}, "has no arms"),
        ({"verdict": []}, "has no verdict"),
        ({"arms": [{"trial_id": "a", "role": None, "values": []}]}, "has no arms"),
        ({"arms": [{"trial_id": "a", "role": "control", "values": ["x"]}]}, "has no arms"),
        ({"metric": 3}, "has no metric"),
        ({"choice": []}, "has no choice"),
        ({"num_rounds": None}, "has no num_rounds"),
    ],
)
def test_a_damaged_confirmation_is_told_in_one_sentence(outputs, folder, monkeypatch, capsys, changes, words):
    confirm_by_hand(folder, **changes)
    for module in (best, report):
        code, _, err = run_main(module, monkeypatch, capsys, "--outputs", outputs)
        assert code == 2
        assert_one_sentence(err, "confirmation.json", words)


def test_pareto_front_of_two_metrics(outputs):
    folder = full_search(outputs, settings={"metric": ["val_accuracy", "val_accuracy_1"], "seeds_per_trial": 2})
    search, trials = load_search(folder), load_trials(folder)
    assert search_metrics(search) == ["val_accuracy", "val_accuracy_1"]
    trials.loc[trials["trial_id"] == "00000012", "val_accuracy_1"] = 70.0
    modes = {"val_accuracy": "max", "val_accuracy_1": "max"}
    assert list(pareto_front(trials, modes, EPOCHS)["trial_id"]) == ["1234e567", "00000012"]
    assert list(pareto_front(trials, modes | {"val_accuracy_1": "min"}, EPOCHS)["trial_id"]) == [
        *("1234e567", "d9c2825f", "94bed0ac"),
    ]
    text = " ".join(judge_search(search, trials))
    assert "on the Pareto front" in text
    assert "1234e567 77.90 / 66.40; 00000012 76.60 / 70.00" in text
    assert "the mean of 2 runs" in text
    assert "front" in [picture.name for picture in draw(outputs, folder)]
    assert "each the mean of 2 runs" in report.render_page(folder, outputs)


def test_figures_of_searches_with_little_in_them(outputs):
    assert draw(outputs, make_search(outputs, [], name="empty")) == []
    failed = [trial("a", status="failed", epochs=0, error="x")]
    assert [p.name for p in draw(outputs, make_search(outputs, failed, name="failed"))] == ["history"]
    running = [trial("a", 40.0, status="running", epochs=1)]
    names = [p.name for p in draw(outputs, make_search(outputs, running, name="running", status="running"))]
    assert names == ["history", "parameters", "curves"]
    full = full_search(outputs, name="full")
    (full / "trials" / "1234e567" / "metrics.jsonl").unlink()  # the best one's
    assert len(draw(outputs, full)) == 4
    best_is_reference = [trial("a", 70.0, role="reference"), trial("b", 70.0, role="control")]
    pictures = draw(outputs, make_search(outputs, best_is_reference, name="two"))
    labels = [text.get_text() for text in pictures[3].figure.legends[0].get_texts()]
    assert labels == ["best: the reference setting", "deep supervision alone"]


def test_an_axis_shows_how_the_completed_trials_differ():
    values = pd.Series([10.0, 50.0, 77.0, 77.5, 78.0, math.nan])
    low, high = metric_range(values, values[2:5], "max")
    assert 70 < low < 77
    assert 78 < high < 79
    low, high = metric_range(-values, -values[2:5], "min")
    assert -79 < low < -78
    assert -77 < high < -70
    assert metric_range(values[:0], values[:0], "max") == (0.0, 1.0)


# ---------------------------------------------------------------- the page


class Page(HTMLParser):
    """What a test wants to know of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.images, self.links, self.text = [], [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        if tag == "img":
            self.images.append(attributes)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_verdict_tables_figures_and_commands(outputs, folder):
    retrain_by_hand(outputs, folder, {"1234e567": [78.0, 78.2], "a30febcf": [76.0]})
    html = report.render_page(folder, outputs)
    page = Page(html)
    assert page.tags.count("table") == 4  # best, retrained, all trials, what went wrong
    assert len(page.images) == 5
    assert all(len(image["alt"]) > 40 for image in page.images)
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)  # nothing from outside
    for sentence in judge_search(load_search(folder), load_trials(folder)):
        assert sentence in page.text
    assert "78.10 ± 0.14" in page.text
    assert "2.5 h from start to end" in page.text
    assert "OutOfMemoryError: <CUDA> out of memory" in page.text
    assert "<CUDA>" not in html
    assert "python search/tune.py --space space.toml --num-samples 8 --metric val_accuracy" in page.text
    assert "python byot/train.py --best search-1" in page.text
    assert "45,000 images to train on, 5,000 of the training set held out" in page.text


def test_the_commands_of_the_page_are_understood_by_the_search(outputs, folder, tmp_path):
    tune = pytest.importorskip("search.tune")
    space = pytest.importorskip("search.space")
    import shlex

    search = load_search(folder)
    path = tmp_path / "space.toml"
    path.write_text(report.space_file(search["space"]))
    assert space.space_to_dict(space.read_space(path)) == SPACE
    assert tomllib.loads(path.read_text()) == SPACE
    words = shlex.split(report.tune_command(search))[2:]
    words[1] = str(path)
    _, base, settings, _ = tune.plan_search(tune.build_parser().parse_args(words), outputs / "searches")
    assert base.to_dict() == search["config"]
    assert settings.num_samples == 8


@pytest.mark.parametrize(
    ("trials", "status", "words"),
    [
        ([], "running", "This search is still running, or it was killed: its files were last written"),
        ([], "finished", "No trial has started."),
        ([trial("a", 50.0, status="running", epochs=2)], "running", "1 trial: 1 running"),
        ([trial("a", 70.0)], "interrupted", "This search is interrupted."),
        ([trial("a", status="failed", epochs=0, error="x")], "finished", "nothing to compare"),
    ],
)
def test_pages_of_searches_that_did_not_get_far(outputs, trials, status, words):
    folder = make_search(outputs, trials, status=status)
    assert words in Page(report.render_page(folder, outputs)).text


def test_a_page_needs_no_optional_part_of_the_record(outputs):
    folder = full_search(outputs)
    record = json.loads((folder / "search.json").read_text())
    needed = ("name", "status", "config", "space", "metric", "mode")
    write_json(folder / "search.json", {key: record[key] for key in needed})
    page = Page(report.render_page(folder, outputs))
    assert "commit" not in page.tags
    assert "better by 0.70 points" in page.text
    assert "binomial" not in page.text  # how many validation images there were is not known


def test_a_long_table_is_folded(outputs):
    folder = make_search(outputs, [trial(f"t{i}", 70.0 + i / 10) for i in range(report.FOLDED_FROM)])
    assert "details" in Page(report.render_page(folder, outputs)).tags


# ---------------------------------------------------------------- command lines


def test_best_from_another_folder(tmp_path, outputs, folder):
    table = tmp_path / "ranking.csv"
    done = run_command(["--outputs", outputs, "--top", 2, "--csv", table], cwd=tmp_path, script="analysis/best.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "search search-1: finished"
    assert lines[2] == "8 trials: 5 completed, 1 stopped, 2 failed"
    assert [line.split()[:2] for line in lines[5:8]] == [
        ["1", "1234e567"],
        ["2", "d9c2825f"],
        ["\N{EN DASH}", "a30febcf"],
    ]
    assert "within the noise" in done.stdout
    assert f"  python byot/train.py --best search-1 --outputs {outputs}" in lines
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial_id"] for row in rows] == ["1234e567", "d9c2825f", "00000012", "94bed0ac"]
    assert float(rows[0]["alpha"]) == 0.2832109876543211


def test_report_from_another_folder(tmp_path, outputs, folder):
    done = run_command([folder, "--outputs", outputs], cwd=tmp_path, script="analysis/report.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    path = outputs / "reports" / "search-1.html"
    assert done.stdout == f"{path}\n"
    assert "<table>" in path.read_text()


@pytest.mark.parametrize("script", ["best.py", "report.py", "retrain.py"])
def test_help_answers_without_the_libraries(tmp_path, script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ANALYSIS / script)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        "print([m for m in ('torch', 'ray', 'pandas', 'matplotlib', 'numpy', 'optuna') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert f"usage: {script}" in done.stdout


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (best, ["nowhere"], "there is no search nowhere in"),
        (best, ["--top", "0"], "--top must be at least 1, not 0"),
        (best, ["--top", "many"], "invalid int value: 'many'"),
        (best, ["--csv", "/proc/x/y.csv"], "/proc/x/y.csv cannot be written"),
        (report, ["nowhere"], "there is no search nowhere in"),
        (report, ["--output", "/proc/x/y.html"], "/proc/x/y.html cannot be written"),
        (retrain, ["nowhere"], "there is no search nowhere in"),
        (retrain, ["--seeds", "0"], "--seeds must be at least 1, not 0"),
        (retrain, ["--epochs", "-1"], "--epochs must be at least 1, not -1"),
        (retrain, ["--gpus-per-run", "1.5"], "--gpus-per-run must be a fraction of 1 or a whole number, not 1.5"),
        (retrain, ["--gpus-per-run", "nan"], "--gpus-per-run must be a fraction of 1 or a whole number, not nan"),
        (retrain, ["--gpus-per-run", "64"], "64 GPUs each are asked for, but this machine has"),
        (retrain, ["--cpus-per-run", "4096"], "4096 CPU threads each are asked for, but this machine has"),
        (retrain, ["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_bad_input_is_told_in_one_sentence(outputs, folder, monkeypatch, capsys, module, arguments, message):
    code, out, err = run_main(module, monkeypatch, capsys, *arguments, "--outputs", outputs)
    assert code == 2
    assert out == ""
    assert err.startswith(f"{module.__name__.split('.')[-1]}.py: ")
    assert_one_sentence(err, message)


@pytest.mark.parametrize("module", [best, report, retrain])
def test_damaged_searches_are_told_in_one_sentence(outputs, folder, monkeypatch, capsys, module):
    (folder / "trials.csv").write_text("trial_id,role\n")
    code, _, err = run_main(module, monkeypatch, capsys, "search-1", "--outputs", outputs)
    assert code == 2
    assert_one_sentence(err, "is not a table of trials")
    (folder / "search.json").write_text("{")
    code, _, err = run_main(module, monkeypatch, capsys, "search-1", "--outputs", outputs)
    assert code == 2
    assert_one_sentence(err, "is not valid JSON")


def test_best_of_a_search_with_nothing_to_rank(outputs, monkeypatch, capsys):
    make_search(outputs, [], status="running")
    code, out, _ = run_main(best, monkeypatch, capsys, "--outputs", outputs)
    assert code == 0
    assert "search search-1: still running, or it was killed: its files were last written" in out
    assert "no trial yet" in out
    assert "nothing to compare" in out
    assert "next:" not in out


# ---------------------------------------------------------------- retraining


def test_configurations_to_retrain(outputs, folder):
    search, trials = load_search(folder), load_trials(folder)
    chosen = retrain.choose_configurations(search, trials, 1, with_controls=True)
    assert list(chosen) == ["1234e567", "d9c2825f", "a30febcf"]
    assert list(retrain.choose_configurations(search, trials, 1, with_controls=False)) == ["1234e567"]
    # The reference is the second best anyway; 94bed0ac has the settings of 00000012, which ranks before it.
    assert list(retrain.choose_configurations(search, trials, 9, with_controls=True)) == [
        "1234e567",
        "d9c2825f",
        "00000012",
        "a30febcf",
    ]
    jobs = retrain.plan_jobs(chosen, outputs / "runs", 2, epochs=2)
    assert [(job.trial_id, job.config.seed) for job in jobs] == [(t, s) for s in (0, 1) for t in chosen]
    assert len({job.folder for job in jobs}) == 6
    assert all(job.config.epochs == 2 and job.config.val_fraction == 0 for job in jobs)


def test_the_best_retrained_with_seed_0_is_the_run_of_train_best(outputs, folder):
    records = pytest.importorskip("search.records")
    search, trials = load_search(folder), load_trials(folder)
    rows = records.read_rows(folder / "trials.csv")
    records.write_best(folder, search, records.best_row(rows, "val_accuracy", "max"), rows, list(SPACE))
    shipped = TrainConfig.from_dict(json.loads((folder / "best.json").read_text())["config"])
    job = retrain.plan_jobs(retrain.choose_configurations(search, trials, 1, with_controls=False), outputs / "runs", 1)[
        0
    ]
    assert job.config.run_name() == shipped.run_name()


def test_retraining_needs_a_completed_trial_and_the_data(outputs, folder, monkeypatch, capsys, tmp_path):
    make_search(outputs, [trial("a", 50.0, status="stopped", epochs=2)], name="none")
    code, _, err = run_main(retrain, monkeypatch, capsys, "none", "--outputs", outputs)
    assert (code, err) == (2, f"retrain.py: no trial of the search none has reached its last epoch ({EPOCHS}) yet\n")
    config = TrainConfig(epochs=EPOCHS, val_fraction=0.1)
    make_search(outputs, [trial("a", 50.0)], name="cifar", config=config.to_dict())
    gone = tmp_path / "gone"
    code, _, err = run_main(retrain, monkeypatch, capsys, "cifar", "--outputs", outputs, "--data-dir", gone)
    assert (code, err) == (2, f"retrain.py: the data folder {gone} does not exist\n")


def test_finished_runs_are_told_without_starting_ray(outputs, folder, monkeypatch, capsys):
    retrain_by_hand(outputs, folder, {"1234e567": [78.0, 78.2], "d9c2825f": [77.0, 77.1], "a30febcf": [76.0, 76.1]})
    monkeypatch.setattr(retrain, "run_jobs", None)
    code, out, _ = run_main(retrain, monkeypatch, capsys, "--top", 1, "--seeds", 2, "--outputs", outputs)
    assert code == 0
    assert "6 of 6 runs finished before" in out
    assert "1/6  trial 1234e567  seed 0  test accuracy 78.00 %  30 s  (finished before)" in out
    assert "78.10 ± 0.14" in out
    assert ": resolved." in out
    with open(folder / "retrained.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["trial_id"], row["seed"]) for row in rows] == [
        (trial_id, seed) for trial_id in ("1234e567", "d9c2825f", "a30febcf") for seed in ("0", "1")
    ]


@pytest.mark.parametrize(
    "reason", ["The current node timed out during startup.", "Timed out waiting for file /tmp/gcs_server_port."]
)
def test_a_ray_that_does_not_start_is_told_with_the_command_to_go_on(outputs, folder, monkeypatch, capsys, reason):
    import ray

    from search.system.resources import START_ATTEMPTS

    attempts = []

    def fail(**options):
        attempts.append(options)
        raise Exception(reason)

    monkeypatch.setattr(ray, "init", fail)
    code, out, err = run_main(retrain, monkeypatch, capsys, "--top", 1, "--seeds", 1, "--outputs", outputs)
    assert code == 1
    assert len(attempts) == START_ATTEMPTS
    assert "0 of 3 runs finished before" in out
    assert_one_sentence(err, f"Ray did not start ({reason})", f" search-1 --top 1 --seeds 1 --outputs {outputs}\n")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_retraining_survives_a_stop_and_a_failure(outputs, tmp_path):
    """Stopped by Ctrl-C after its first run; started again, one run fails; that one done, the rest is left alone.

    Its runs are long enough for the signal to come before the last, however slow the machine.
    """
    trials = [trial("1234e567", 60.0), trial("a30febcf", 50.0, role="control")]
    folder = make_search(outputs, trials)
    search = load_search(folder)
    chosen = retrain.choose_configurations(search, load_trials(folder), 1, with_controls=True)
    jobs = retrain.plan_jobs(chosen, outputs / "runs", 2, epochs=2)
    blocked = jobs[-1].folder / "metrics.jsonl"
    blocked.mkdir(parents=True)  # a folder where the run wants a file
    arguments = ["--top", 1, "--seeds", 2, "--epochs", 2, "--outputs", outputs]

    with subprocess.Popen(
        command_line("analysis/retrain.py", *arguments, "--max-concurrent", 1),
        cwd=tmp_path,
        env=command_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C goes to the whole group
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert "0 of 4 runs finished before" in lines[0]
    assert lines[1].startswith("1/4  trial 1234e567  seed 0  test accuracy ")
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.endswith(f"--epochs 2 --outputs {outputs} --max-concurrent 1\n")
    assert "go on with: " in err
    assert " search-1 --top 1" in err
    first = (jobs[0].folder / "result.json").stat().st_mtime_ns

    again = run_command(arguments, cwd=tmp_path, script="analysis/retrain.py")
    assert again.returncode == 1, again.stderr
    assert "(finished before)" in again.stdout
    assert re.search(r"trial a30febcf  seed 1  failed: IsADirectoryError: .*metrics\.jsonl", again.stdout)
    assert "1 of 4 runs failed" in again.stderr
    assert "Traceback" not in again.stderr
    assert (jobs[0].folder / "result.json").stat().st_mtime_ns == first

    from byot.runs import train_run

    blocked.rmdir()
    train_run(jobs[-1].config, jobs[-1].folder, threads=1)
    last = run_command(arguments, cwd=tmp_path, script="analysis/retrain.py")
    assert last.returncode == 0, last.stderr
    assert last.stdout.count("(finished before)") == 4
    runs = retrained_runs(load_runs(outputs), search, load_trials(folder))
    assert runs["run"].tolist() == [job.folder.name for job in (jobs[0], jobs[2], jobs[1], jobs[3])]
    with open(folder / "retrained.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    assert "1234e567  sampled       2  2" in last.stdout


# ---------------------------------------------------------------- arrows


@pytest.mark.parametrize("path", sorted(ANALYSIS.glob("*.py")), ids=lambda path: path.name)
def test_analysis_reads_files_alone(path):
    """Only retrain.py may import Ray, the search and the trainer; the others know byot's stdlib modules alone."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    assert "optuna" not in imported
    if path.name == "retrain.py":
        return
    tops = {name.partition(".")[0] for name in imported}
    assert not tops & {"ray", "optuna", "torch", "torchvision", "search"}
    byot = {name for name in imported if name.startswith("byot")}
    assert byot <= {"byot.config", "byot.system.flags", "byot.system.files", "byot.search_files"}
