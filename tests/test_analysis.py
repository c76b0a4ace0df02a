"""analysis/: tables from files, the words the noise allows, figures, the page, and the command lines.

The search folders are made by hand, as a search leaves them: finished, running, killed, empty.
"""

import csv
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from contextlib import ExitStack
from dataclasses import replace
from html.parser import HTMLParser
from statistics import fmean, stdev

import numpy as np
import pandas as pd
import pytest
import ray

from analysis import best, report, retrain
from analysis.figures import draw_pictures, metric_range, to_svg
from analysis.listing import ranking_table, summary_table, trials_table
from analysis.trials import (
    find_role,
    load_curves,
    load_runs,
    load_trials,
    rank,
    retrained_runs,
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
)
from byot.config import CLASSIFIERS, TrainConfig
from byot.search_files import (
    MEASURES,
    load_confirmation,
    load_search,
    read_trials,
    space_to_dict,
    write_best,
    write_trials,
)
from byot.system.files import read_json, write_json
from byot.system.paths import PROJECT_ROOT
from search.plan import make_plan
from search.settings import SearchSettings
from search.space import DEFAULT_SPACE, read_space
from search.tune import build_parser
from tests.helpers import assert_one_sentence, call_main, command_environment, command_line, run_command
from tests.made_up import make_trial, search_record

EPOCHS = 9
CONFIG = TrainConfig(dataset="digits", width=4, epochs=EPOCHS, val_fraction=0.1)
OFFSETS = (-11.5, -4.0, -0.5, 0.0, 1.0)  # of each classifier's accuracy against the deepest's
DASH = "\N{EN DASH}"
UNKNOWN = dict.fromkeys(MEASURES)
REFERENCE = "the reference's setting"


# ---------------------------------------------------------------- searches made by hand


def measures(accuracy, prefix="val"):
    record = {}
    for suffix, offset in zip(CLASSIFIERS, OFFSETS, strict=True):
        record[f"{prefix}_accuracy_{suffix}"] = accuracy + offset
        record[f"{prefix}_nll_{suffix}"] = 4 * (1 - (accuracy + offset) / 100)
        record[f"{prefix}_ece_{suffix}"] = 5.0
    return record | {f"{prefix}_{m}": record[f"{prefix}_{m}_4"] for m in ("accuracy", "nll", "ece")}


def trial(trial_id, accuracy=None, *, role="sampled", epochs=EPOCHS, **options):
    alpha, beta = {"reference": (0.1, 1e-6), "control": (0.0, 0.0)}.get(role, (0.3, 2.5e-7))
    known = {} if accuracy is None else {m: v for m, v in measures(accuracy).items() if m in MEASURES}
    fixed = {"role": role, "epochs_done": epochs, "seconds": 2.0 * epochs, "measures": known}
    return make_trial(trial_id, **fixed, **{"alpha": alpha, "beta": beta} | options)


def epoch_line(epoch, accuracy):
    return json.dumps({"epoch": epoch, **measures(accuracy), "elapsed_s": 2.0}) + "\n"


def make_search(outputs, trials, *, name="search-1", status="finished", config=CONFIG, **fields):
    """A search whose trials' accuracies rise by a point an epoch."""
    folder = outputs / "searches" / name
    found = {"num_train_images": 45000, "num_val_images": 5000, "commit": "1e1ae1d0", "versions": {"torch": "2.15.0"}}
    write_json(folder / "search.json", search_record(config, name=name, status=status, **found | fields))
    rows = []
    for one in trials:
        if one.measures["val_accuracy"] is not None:
            path = folder / "trials" / one.trial_id / "metrics.jsonl"
            path.parent.mkdir(parents=True)
            first = one.measures["val_accuracy"] - one.epochs_done
            path.write_text("".join(epoch_line(e, first + e) for e in range(1, one.epochs_done + 1)))
        as_begun = {"epochs_done": 0, "seconds": 0.0, "measures": UNKNOWN}  # of one that runs the row is that old
        rows.append(replace(one, **as_begun) if one.status == "running" else one)
    write_trials(folder / "trials.csv", rows, DEFAULT_SPACE)
    return folder


def full_search(outputs, **fields):
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
        **fields,
    )


def make_run(outputs, config, accuracy):
    result = {"config": config.to_dict(), "num_train_images": 1438, "num_test_images": 359, "elapsed_s": 30.0}
    path = outputs / "runs" / config.run_name() / "result.json"
    write_json(path, {**result, **measures(accuracy, "test"), "commit": None})
    return path


def retrain_by_hand(outputs, folder, accuracies):
    """Finished runs of trials: trial id -> test accuracies over the seeds 0, 1, …"""
    search, trials = load_search(folder), load_trials(folder)
    for trial_id, over_seeds in accuracies.items():
        config = trial_config(search, trials[trials["trial_id"] == trial_id].iloc[0])
        for seed, accuracy in enumerate(over_seeds):
            make_run(outputs, config.with_settings(seed=seed), accuracy)
    return search, trials, summarise_runs(retrained_runs(load_runs(outputs), search, trials))


@pytest.fixture
def outputs(tmp_path):
    return tmp_path / "outputs"


@pytest.fixture
def folder(outputs):
    return full_search(outputs)


def judge(folder):
    return judge_search(load_search(folder), load_trials(folder))


def run_main(module, monkeypatch, capsys, *arguments):
    return call_main(module, f"{module.__name__.split('.')[-1]}.py", arguments, monkeypatch, capsys)


# ---------------------------------------------------------------- trials


def test_trials_have_their_types_and_contents(outputs, folder):
    trials = load_trials(folder)
    types = trials.dtypes.astype(str).to_dict()
    assert {types[c] for c in ("trial_id", "role", "status", "error")} == {"str"}
    assert (types["epochs_done"], types["seed"]) == ("int64", "Int64")
    assert {types[c] for c in (*DEFAULT_SPACE, *MEASURES, "seconds")} == {"float64"}
    # Ids that look like numbers or like nothing, and the exact parameters.
    ids = ["d9c2825f", "a30febcf", "1234e567", "00000012", "94bed0ac", "0e5", "aaf72d0a", "nan"]
    assert trials["trial_id"].tolist() == ids
    assert trials["alpha"][2] == 0.2832109876543211
    assert trials["error"].tolist()[:6] == [""] * 6
    assert np.isnan(trials.iloc[7][list(MEASURES)].astype(float)).all()
    pd.testing.assert_frame_equal(load_trials(folder / "trials.csv"), trials)
    empty = make_search(outputs, [], name="empty")
    pd.testing.assert_series_equal(load_trials(empty).dtypes, trials.dtypes)
    assert load_curves(empty).empty
    assert rank(load_trials(empty), "val_accuracy").empty
    (empty / "trials.csv").unlink()
    with pytest.raises(ValueError, match="no trial of that search has started yet"):
        load_trials(empty)


def test_a_running_trial_is_brought_up_to_date_from_its_own_file(outputs):
    running = trial("b1", 60.0, status="running", epochs=5)
    folder = make_search(outputs, [trial("a1", 70.0), running, trial("c1", status="running")], status="running")
    trials = load_trials(folder)
    assert trials["epochs_done"].tolist() == [EPOCHS, 5, 0]
    assert trials["status"].tolist() == ["completed", "running", "running"]
    assert trials["val_accuracy"].tolist()[:2] == [70.0, 60.0]
    assert (trials["val_accuracy_ensemble"][1], trials["seconds"][1]) == (61.0, 10.0)
    assert math.isnan(trials["val_accuracy"][2])


def test_a_killed_search_is_read_up_to_the_torn_line(outputs):
    folder = make_search(outputs, [trial("b1", 60.0, status="running", epochs=5)], status="running")
    path = folder / "trials" / "b1" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:100])
    assert load_trials(folder)["epochs_done"].tolist() == [4]
    assert load_trials(folder)["val_accuracy"].tolist() == [59.0]
    # Gone on with after the kill: an epoch that is there twice counts once, as it was done last.
    path.write_text("".join(lines[:4]) + epoch_line(4, 58.5))
    assert load_curves(folder)["epoch"].tolist() == [1, 2, 3, 4]
    assert load_curves(folder)["val_accuracy"].tolist() == [56.0, 57.0, 58.0, 58.5]


def test_a_finished_row_is_not_overruled_by_metrics(folder):
    with open(folder / "trials" / "0e5" / "metrics.jsonl", "a") as file:
        file.write(epoch_line(4, 91.0))
    stopped = load_trials(folder).set_index("trial_id").loc["0e5"]
    assert (stopped["epochs_done"], stopped["val_accuracy"]) == (3, 90.0)


def test_ranking_never_mixes_budgets(folder):
    trials = load_trials(folder)
    # Not the stopped one with 90 %, nor the control, nor what failed.
    for metric in ("val_accuracy", "val_nll"):
        assert rank(trials, metric)["trial_id"].tolist() == ["1234e567", "d9c2825f", "00000012", "94bed0ac"]
    control = find_role(trials, "control", "val_accuracy")
    assert control is not None
    assert control["trial_id"] == "a30febcf"


# ---------------------------------------------------------------- runs


def test_retrained_runs_are_those_with_a_trials_settings(outputs, folder):
    search, trials = load_search(folder), load_trials(folder)
    assert retrained_runs(load_runs(outputs), search, trials).empty
    by_id = trials.set_index("trial_id")
    config = trial_config(search, by_id.loc["1234e567"])
    assert (config.val_fraction, config.alpha) == (0, 0.2832109876543211)
    make_run(outputs, trial_config(search, by_id.loc["a30febcf"]), 77.0)
    make_run(outputs, config.with_settings(seed=1, device="cpu", data_dir="/elsewhere", precision="fp32"), 78.5)
    make_run(outputs, config, 78.0)
    make_run(outputs, config.with_settings(epochs=3), 60.0)
    make_run(outputs, config.with_settings(val_fraction=0.1), 1.0)  # not all training images
    make_run(outputs, config.with_settings(alpha=0.28), 2.0)
    make_run(outputs, config.with_settings(width=8), 3.0)
    make_run(outputs, config.with_settings(seed=7), 4.0).write_text("{")
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
    rows = summary_table(summary, trials).rows
    assert rows[1][-2:] == ["78.25 ± 0.35", "79.25 ± 0.35"]
    assert rows[0][-1] == f"61.00 ± {DASH}"


# ---------------------------------------------------------------- what the noise allows to say


def test_standard_errors():
    assert accuracy_standard_error(75.0, 5000) == pytest.approx(100 * math.sqrt(0.75 * 0.25 / 5000))
    assert noise_margin(75.0, 75.0, 5000) == pytest.approx(2 * math.sqrt(2) * accuracy_standard_error(75.0, 5000))
    # All right is no certainty: one image of 144 is never more than noise.
    assert accuracy_standard_error(100.0, 144) > 0
    assert noise_margin(100.0, 100 * 143 / 144, 144) > 100 / 144


def test_welch_against_scipy():
    from scipy import stats

    a, b = [78.3, 78.9, 78.1, 78.6], [77.4, 77.9, 77.6]
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    interval = compare_means(fmean(a), stdev(a), 4, fmean(b), stdev(b), 3)
    assert interval is not None
    difference, half_width = interval
    assert (difference - half_width, difference + half_width) == pytest.approx((expected.low, expected.high))
    assert compare_means(78.0, math.nan, 1, 77.0, 0.3, 3) is None
    assert compare_means(78.0, 0.0, 2, 77.0, 0.0, 2) == (1.0, 0.0)


@pytest.mark.parametrize(("gap", "runs"), [(0.2, 36), (0.3, 16), (0.5, 6), (1.0, 3)])
def test_runs_needed_are_those_of_a_power_table(gap, runs):
    assert abs(runs_needed(gap, 0.3, 0.3) - runs) <= 1


def test_verdict_within_and_beyond_the_noise(outputs, folder):
    first, equals, reference, control, caution = judge(folder)
    assert first.startswith(f"Best of 4 self-distilled trials that reached epoch {EPOCHS}: 1234e567, alpha 0.283,")
    assert "77.90 % ± 0.59 (binomial standard error, 5,000 images)" in first
    assert "lie 2 of 3 others" in equals
    assert equals.endswith("d9c2825f, 00000012.")
    assert reference.startswith(f"Against {REFERENCE} (alpha 0.1, temperature 3, beta 1e-06; 77.20 %):")
    assert reference.endswith("better by 0.70 points, within the noise.")
    assert control.endswith("better by 0.30 points, within the noise.")
    assert "single runs" in caution
    far = [trial("r", 70.0, role="reference"), trial("c", 80.0, role="control"), trial("a", 75.0)]
    _, equals, reference, control, _ = judge(make_search(outputs, far, name="far"))
    assert equals == "No other lies within its noise."
    assert reference.endswith("better by 5.00 points, beyond the noise.")
    assert control.endswith("worse by 5.00 points, beyond the noise.")


def test_verdict_of_searches_that_have_not_all_trials(outputs, folder):
    text = " ".join(judge(make_search(outputs, [trial("r", 75.0, role="reference"), trial("a", 60.0)], name="no")))
    assert f"The best is {REFERENCE} itself: the search found nothing better." in text
    assert "Deep supervision alone has not reached the last epoch here" in text
    running = make_search(outputs, [trial("a", 70.0, epochs=2, status="running")], name="running", status="running")
    for path in (running, make_search(outputs, [], name="empty")):
        assert judge(path) == [f"No trial has reached its last epoch ({EPOCHS}) yet, so there is nothing to compare."]
    interrupted = make_search(outputs, [trial("a", 70.0)], name="stopped", status="interrupted")
    assert judge(interrupted)[-1] == "The search has not finished: all of this may change."
    assert count_statuses(load_trials(folder)) == "8 trials: 5 completed, 1 stopped, 2 failed"


def test_verdict_of_a_likelihood_claims_no_error(outputs):
    folder = full_search(outputs, metric="val_nll", mode="min")
    text = " ".join(judge(folder))
    assert "validation NLL, classifier 4/4: 0.8840 nats." in text
    assert "better by 0.0280 nats." in text
    assert "the noise" not in text
    assert "binomial" not in text
    assert "one run gives no error of this measure" in text
    head, _, control = judge_retrained(
        *retrain_by_hand(outputs, folder, {"1234e567": [78.0, 78.2], "a30febcf": [70.0, 70.1]})
    )
    assert head.startswith("Test NLL, classifier 4/4, of trial 1234e567 ")
    assert "better by 0.3220 nats (95 % interval +0.2943 to +0.3497): resolved." in control
    header = ranking_table(load_search(folder), load_trials(folder), 5).header
    assert "val_nll nats" in header
    assert "± se" not in header


def test_retrained_differences_are_resolved_or_not(outputs, folder):
    accuracies = {"1234e567": [78.0, 78.2, 78.1], "d9c2825f": [77.9, 78.3, 77.8], "a30febcf": [76.0, 76.2, 75.9]}
    head, reference, control = judge_retrained(*retrain_by_hand(outputs, folder, accuracies))
    assert head.startswith("Test accuracy, classifier 4/4, of trial 1234e567")
    assert head.endswith("78.10 ± 0.10 % (3 seeds, ± standard deviation).")
    assert "better by 0.10 points" in reference
    assert "not resolved. Were the difference this large, about" in reference
    assert control.endswith("(95 % interval +1.75 to +2.38): resolved.")


def test_one_seed_gives_no_verdict(outputs, folder):
    found = retrain_by_hand(outputs, folder, {"1234e567": [78.0], "d9c2825f": [70.0]})
    head, reference, control = judge_retrained(*found)
    assert head.endswith("78.00 % (one run).")
    assert reference.endswith("it takes at least two seeds of each to say whether the difference is real.")
    assert control == f"Deep supervision alone was not retrained for {EPOCHS} epochs."


def test_metrics_and_commands_in_words(outputs, folder, monkeypatch):
    assert describe_metric("val_accuracy") == "validation accuracy, classifier 4/4"
    assert describe_metric("val_accuracy_2") == "validation accuracy, classifier 2/4"
    assert describe_metric("val_nll_ensemble") == "validation NLL, ensemble"
    assert next_commands(folder, outputs)[0] == f"python byot/train.py --best search-1 --outputs {outputs}"
    monkeypatch.setenv("BYOT_OUTPUTS", str(outputs))
    assert next_commands(folder, outputs)[1] == "python analysis/retrain.py search-1 --top 3 --seeds 3"


# ---------------------------------------------------------------- tables and figures


def test_ranking_table_has_the_reference_and_the_control_below(folder):
    table = ranking_table(load_search(folder), load_trials(folder), top=1)
    assert [row[:3] for row in table.rows] == [
        ["1", "1234e567", "sampled"],
        ["2", "d9c2825f", "reference"],
        [DASH, "a30febcf", "control"],
    ]
    assert table.header[-6:] == ["± se", "1/4", "2/4", "3/4", "4/4", "ensemble"]
    assert table.rows[0][-6:] == ["0.59", "66.40", "73.90", "77.40", "77.90", "78.90"]
    lines = table.to_text().splitlines()
    assert len(lines) == 4
    assert len(set(map(len, lines))) == 1
    assert trials_table(load_trials(folder)).rows[-1][7:] == [DASH] * 7 + ["0"]


def draw(outputs, folder):
    search, trials = load_search(folder), load_trials(folder)
    retrained = retrained_runs(load_runs(outputs), search, trials)
    confirmation = load_confirmation(folder)
    return draw_pictures(search, trials, load_curves(folder), retrained, summarise_runs(retrained), confirmation)


def labels_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("metric", ["val_accuracy", "val_nll"])
def test_every_figure_of_a_full_search_is_drawn(outputs, metric):
    folder = full_search(outputs, metric=metric, mode="max" if metric == "val_accuracy" else "min")
    retrain_by_hand(outputs, folder, {"1234e567": [78.0, 78.2], "a30febcf": [76.0]})
    pictures = draw(outputs, folder)
    assert list(pictures) == ["history", "parameters", "curves", "classifiers", f"retrained-{EPOCHS}"]
    for figure, words in pictures.values():
        assert len(words) > 40
        assert to_svg(figure).lstrip().startswith(b"<?xml")
        assert all(axes.get_legend() is None for axes in figure.axes), "the legend stands outside the axes"
    history, parameters = pictures["history"][0], pictures["parameters"][0]
    assert history.axes[0].get_ylabel().endswith("(%)" if metric == "val_accuracy" else "(nats)")
    assert [axes.get_xscale() for axes in parameters.axes] == ["linear", "linear", "log"]
    for figure in (history, parameters):
        assert {"best", REFERENCE, "deep supervision alone", "completed", "stopped early", "failed"} <= set(
            labels_of(figure)
        )


def test_a_stopped_trial_does_not_look_like_a_finished_one(outputs, folder):
    axes = draw(outputs, folder)["history"][0].axes[0]
    faces = {points.get_label(): points.get_facecolor()[0].tolist() for points in axes.collections}
    assert faces["stopped early"] == [1, 1, 1, 1], "hollow"
    assert faces["completed"] != [1, 1, 1, 1]


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
        "arms": [{"trial_id": i, "role": role, "params": {}, "values": v} for i, (role, v) in arms.items()],
    }
    write_json(folder / "confirmation.json", record | changes)


def test_a_confirmation_is_shown_first(outputs, folder, monkeypatch, capsys):
    code, out, _ = run_main(best, monkeypatch, capsys, "--outputs", outputs)
    assert code == 0
    assert "fresh seeds" not in out
    confirm_by_hand(folder)
    html = report.render_page(folder, outputs)
    verdict = html[html.index('class="verdict"') :]
    assert verdict.index("Not resolved after 3 fresh seeds") < verdict.index("Best of")
    _, words = draw(outputs, folder)["confirmation"]
    assert "deep supervision alone -7.95" in words, "of the seeds that both had"
    assert f"{REFERENCE} +0.00" in words
    code, out, _ = run_main(best, monkeypatch, capsys, "--outputs", outputs)
    assert code == 0
    assert "- Not resolved after 3 fresh seeds: trial 1234e567 leads." in out


@pytest.mark.parametrize("changes", [{"verdict": [1]}, {"arms": {}}, {"choice": []}, {"num_rounds": "3"}])
def test_a_damaged_confirmation_is_told_in_one_sentence(outputs, folder, monkeypatch, capsys, changes):
    confirm_by_hand(folder, **changes)
    for module in (best, report):
        code, _, err = run_main(module, monkeypatch, capsys, "--outputs", outputs)
        assert code == 2
        assert_one_sentence(err, "confirmation.json", *changes)


def test_pareto_front_of_two_metrics(outputs):
    settings = SearchSettings(metric=("val_accuracy", "val_accuracy_1"), seeds_per_trial=2).to_dict()
    folder = full_search(outputs, settings=settings)
    trials = read_trials(folder / "trials.csv")
    trials[3] = replace(trials[3], measures=trials[3].measures | {"val_accuracy_1": 70.0})
    write_trials(folder / "trials.csv", trials, DEFAULT_SPACE)
    text = " ".join(judge(folder))
    assert "On the Pareto front of" in text
    assert ": 1234e567 77.90 / 66.40; 00000012 76.60 / 70.00." in text
    assert "the mean of 2 runs" in text
    assert "2 trials are on the front" in draw(outputs, folder)["front"][1]
    assert "each the mean of 2 runs" in report.render_page(folder, outputs)


def test_figures_of_searches_with_little_in_them(outputs):
    assert draw(outputs, make_search(outputs, [], name="empty")) == {}
    failed = [trial("a", status="failed", epochs=0, error="x")]
    assert list(draw(outputs, make_search(outputs, failed, name="failed"))) == ["history"]
    begun = [trial("a", status="running", epochs=0)]
    assert list(draw(outputs, make_search(outputs, begun, name="begun", status="running"))) == ["history"]
    running = [trial("a", 40.0, status="running", epochs=1)]
    pictures = draw(outputs, make_search(outputs, running, name="running", status="running"))
    assert list(pictures) == ["history", "parameters", "curves"]
    full = full_search(outputs, name="full")
    (full / "trials" / "1234e567" / "metrics.jsonl").unlink()  # the best one's
    assert len(draw(outputs, full)) == 4
    best_is_reference = [trial("a", 70.0, role="reference"), trial("b", 70.0, role="control")]
    pictures = draw(outputs, make_search(outputs, best_is_reference, name="two"))
    assert labels_of(pictures["classifiers"][0]) == [f"best: {REFERENCE}", "deep supervision alone"]


def test_an_axis_shows_how_the_completed_trials_differ():
    values = pd.Series([10.0, 50.0, 77.0, 77.5, 78.0, math.nan])
    low, high = metric_range(values, values[2:5], "max")
    assert 70 < low < 77
    assert 78 < high < 79
    assert metric_range(-values, -values[2:5], "min") == (-high, -low)
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
    assert len(page.images) == page.tags.count("figcaption") == 5
    assert all(len(image["alt"]) > 40 for image in page.images)
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)  # nothing from outside
    for sentence in judge(folder):
        assert sentence in page.text
    for words in (
        "78.10 ± 0.14",
        "2.5 h from start to end",
        "OutOfMemoryError: <CUDA> out of memory",
        f"Retrained for {EPOCHS} epochs",
        "python byot/train.py --best search-1",
        "45,000 images to train on, 5,000 of the training set held out",
    ):
        assert words in page.text
    assert "<CUDA>" not in html


def test_the_commands_of_the_page_are_understood_by_the_search(outputs, folder, tmp_path):
    search = load_search(folder)
    path = tmp_path / "space.toml"
    path.write_text(report.space_file(search.space))
    assert read_space(path) == search.space == DEFAULT_SPACE
    assert tomllib.loads(path.read_text()) == space_to_dict(DEFAULT_SPACE)
    words = shlex.split(report.tune_command(search))
    assert words[:4] == ["python", "search/tune.py", "--space", "space.toml"]
    arguments = build_parser().parse_args([*words[2:3], str(path), *words[4:], "--outputs", str(outputs)])
    with ExitStack() as held:
        plan = make_plan(arguments, held)
    assert plan.base == CONFIG
    assert plan.settings == SearchSettings()


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
    assert words in Page(report.render_page(make_search(outputs, trials, status=status), outputs)).text


def test_a_page_needs_no_optional_part_of_the_record(outputs, folder):
    needed = ("name", "status", "config", "settings", "space", "metric")
    record = read_json(folder / "search.json")
    write_json(folder / "search.json", {key: record[key] for key in needed})
    page = Page(report.render_page(folder, outputs))
    assert "better by 0.70 points" in page.text
    assert "binomial standard error, " not in page.text  # how many validation images there were is not known


def test_a_long_table_is_folded(outputs):
    folder = make_search(outputs, [trial(f"t{i}", 70.0 + i / 10) for i in range(report.FOLDED_FROM)])
    assert "details" in Page(report.render_page(folder, outputs)).tags


# ---------------------------------------------------------------- command lines


def test_best_from_another_folder(tmp_path, outputs, folder):
    table = tmp_path / "ranking.csv"
    done = run_command(["--outputs", outputs, "--top", 2, "--csv", table], cwd=tmp_path, script="analysis/best.py")
    assert (done.returncode, done.stderr) == (0, "")
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
    path = outputs / "reports" / "search-1.html"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}\n", "")
    assert "<table>" in path.read_text()


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
    search, trials = load_search(folder), read_trials(folder / "trials.csv")
    chosen = retrain.choose_configurations(search, trials, 1, with_controls=True)
    assert list(chosen) == ["1234e567", "d9c2825f", "a30febcf"]
    assert list(retrain.choose_configurations(search, trials, 1, with_controls=False)) == ["1234e567"]
    # The reference is the second best anyway; 94bed0ac has the settings of 00000012, which ranks before it.
    every = retrain.choose_configurations(search, trials, 9, with_controls=True)
    assert sorted(every) == sorted(["1234e567", "d9c2825f", "00000012", "a30febcf"])
    jobs = retrain.plan_jobs(chosen, outputs / "runs", 2, epochs=2)
    assert [(job.trial_id, job.config.seed) for job in jobs] == [(t, s) for s in (0, 1) for t in chosen]
    assert len({job.folder for job in jobs}) == 6
    assert all(job.config.epochs == 2 and job.config.val_fraction == 0 for job in jobs)
    write_best(folder, search, trials)  # train.py --best has the run of the best one with seed 0
    of_best = TrainConfig.from_dict(read_json(folder / "best.json")["config"])
    assert retrain.plan_jobs(chosen, outputs / "runs", 1)[0].config.run_name() == of_best.run_name()


def test_retraining_needs_a_completed_trial_and_the_data(outputs, folder, monkeypatch, capsys, tmp_path):
    make_search(outputs, [trial("a", 50.0, status="stopped", epochs=2)], name="none")
    code, _, err = run_main(retrain, monkeypatch, capsys, "none", "--outputs", outputs)
    assert (code, err) == (2, f"retrain.py: no trial of the search none has reached its last epoch ({EPOCHS}) yet\n")
    make_search(outputs, [trial("a", 50.0)], name="cifar", config=TrainConfig(epochs=EPOCHS, val_fraction=0.1))
    gone = tmp_path / "gone"
    code, _, err = run_main(retrain, monkeypatch, capsys, "cifar", "--outputs", outputs, "--data-dir", gone)
    assert (code, err) == (2, f"retrain.py: the data folder {gone} does not exist\n")


def test_finished_runs_are_told_without_starting_ray(outputs, folder, monkeypatch, capsys):
    monkeypatch.setattr(ray, "init", None)
    retrain_by_hand(outputs, folder, {"1234e567": [78.0, 78.2], "d9c2825f": [77.0, 77.1], "a30febcf": [76.0, 76.1]})
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


def test_a_ray_that_does_not_start_is_told_with_the_command_to_go_on(outputs, folder, monkeypatch, capsys):
    def fail(**_):
        raise Exception("Timed out waiting for file /tmp/gcs_server_port.")

    monkeypatch.setattr(ray, "init", fail)
    code, out, err = run_main(retrain, monkeypatch, capsys, "--top", 1, "--seeds", 1, "--outputs", outputs)
    assert code == 1
    assert "0 of 3 runs finished before" in out
    assert_one_sentence(err, "Ray did not start (Timed out", f" search-1 --top 1 --seeds 1 --outputs {outputs}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_retraining_survives_a_stop_and_a_failure(outputs, tmp_path):
    """Stopped by Ctrl-C after its first run; started again, one run fails; that one done, the rest is left alone.

    Its runs are long enough for the signal to come before the last, however slow the machine.
    """
    trials = [trial("1234e567", 60.0), trial("a30febcf", 50.0, role="control")]
    folder = make_search(outputs, trials)
    search = load_search(folder)
    chosen = retrain.choose_configurations(search, read_trials(folder / "trials.csv"), 1, with_controls=True)
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


def test_analysis_reads_files_alone():
    """Only retrain.py imports Ray, the search and the trainer."""
    code = (
        "import sys\n"
        "import analysis.best, analysis.figures, analysis.listing, analysis.report, analysis.trials, analysis.verdict\n"
        "print(sorted({'ray', 'optuna', 'torch', 'search', 'byot.runs'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
