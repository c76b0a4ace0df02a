"""analysis/: tables from files, the words the noise allows, figures, the page, and the command lines.

The search folders are made by hand, as a search leaves them: finished, running, killed, empty.
"""

import base64
import csv
import gzip
import json
import math
import os
import re
import shlex
import signal
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import matplotlib.pyplot as plt
import numpy as np
import pytest
import ray

from analysis import best, report, retrain
from analysis.effects import FEWEST_TRIALS, find_margin, fit_effects
from analysis.explore import draw_interactive, packed_plotly
from analysis.figures import draw_pictures, to_svg
from analysis.listing import ranking_table, summary_table, trials_table
from analysis.trials import load_curves, load_runs, load_trials, retrained_runs, summarise_runs, trial_config
from analysis.verdict import accuracy_standard_error, judge_retrained, judge_search, noise_margin
from byot.config import CLASSIFIERS, TrainConfig
from byot.search_files import (
    MEASURES,
    Choices,
    Range,
    load_confirmation,
    load_search,
    read_trials,
    space_to_dict,
    write_best,
    write_trials,
)
from byot.system.files import append_json_line, read_json, write_json, write_json_lines
from search.plan import make_plan
from search.settings import SearchSettings
from search.space import DEFAULT_SPACE, read_space
from search.tune import build_parser
from tests.helpers import PROJECT, assert_one_sentence, run_command, start_command, text_of
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


def make_search(outputs, trials, *, name="search-1", status="finished", config=CONFIG, **fields):
    """A search whose trials' accuracies rise by a point an epoch."""
    folder = outputs / "searches" / name
    found = {"num_train_images": 45000, "num_val_images": 5000, "commit": "1e1ae1d0", "versions": {"torch": "2.15.0"}}
    write_json(folder / "search.json", search_record(config, name=name, status=status, **found | fields))
    rows = []
    for one in trials:
        if one.measures["val_accuracy"] is not None:
            first = one.measures["val_accuracy"] - one.epochs_done
            lines = [{"epoch": e, **measures(first + e), "elapsed_s": 2.0} for e in range(1, one.epochs_done + 1)]
            write_json_lines(folder / "trials" / one.trial_id / "metrics.jsonl", lines)
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


def make_run(outputs, config, accuracy, precision="fp32"):
    result = {"config": config.to_dict(), "num_train_images": 1438, "num_test_images": 359, "elapsed_s": 30.0}
    result["precision"] = precision
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
    return search, trials, retrained_runs(load_runs(outputs), search, trials)


@pytest.fixture
def outputs(tmp_path):
    return tmp_path / "outputs"


@pytest.fixture
def folder(outputs):
    return full_search(outputs)


def judge(folder):
    return judge_search(load_search(folder), load_trials(folder))


@pytest.fixture
def call(call, outputs):
    return lambda module, *arguments: call(module, *arguments, "--outputs", outputs)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- trials
def test_trials_are_read_as_they_were_written(outputs, folder):
    trials = load_trials(str(folder))  # as docs/analyse.md has it
    # Ids that look like numbers or like nothing, and the exact parameters.
    ids = ["d9c2825f", "a30febcf", "1234e567", "00000012", "94bed0ac", "0e5", "aaf72d0a", "nan"]
    assert trials["trial_id"].tolist() == ids
    assert trials["alpha"][2] == 0.2832109876543211
    assert trials["error"].tolist()[:6] == [""] * 6
    assert np.isnan(trials.iloc[7][list(MEASURES)].astype(float)).all()
    empty = make_search(outputs, [], name="empty")
    both = load_trials(folder, empty)
    assert list(both.columns) == ["folder", *trials.columns]
    assert both["folder"].tolist() == [str(folder)] * len(trials)
    assert load_curves(folder, empty)["folder"].eq(str(folder)).all()
    assert load_trials(empty).dtypes["val_accuracy"] == trials.dtypes["val_accuracy"]
    assert load_curves(empty).empty
    (empty / "trials.csv").unlink()
    with pytest.raises(ValueError, match="no trial of that search has started yet"):
        load_trials(empty)


def test_a_running_trial_is_brought_up_to_date_from_its_own_file(outputs):
    running = trial("b1", 60.0, status="running", epochs=5)
    stopped = trial("a1", 70.0, status="stopped", epochs=3)
    folder = make_search(outputs, [stopped, running, trial("c1", status="running")], status="running")
    append_json_line(folder / "trials" / "a1" / "metrics.jsonl", {"epoch": 4, "val_accuracy": 91.0})
    trials = load_trials(folder)
    assert trials["epochs_done"].tolist() == [3, 5, 0], "what has ended is as the table has it"
    assert trials["status"].tolist() == ["stopped", "running", "running"]
    assert trials["val_accuracy"].tolist()[:2] == [70.0, 60.0]
    assert (trials["val_accuracy_ensemble"][1], trials["seconds"][1]) == (61.0, 10.0)
    assert math.isnan(trials["val_accuracy"][2])
    assert load_curves(folder)["val_accuracy"].tolist()[-5:] == [56.0, 57.0, 58.0, 59.0, 60.0]


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
    make_run(outputs, config.with_settings(seed=2), 70.0, precision="bf16")
    make_run(outputs, config.with_settings(epochs=3), 60.0)
    for other in ({"val_fraction": 0.1}, {"alpha": 0.28}, {"width": 8}):
        make_run(outputs, config.with_settings(**other), 1.0)
    make_run(outputs, config.with_settings(seed=7), 4.0).write_text("{")
    found = retrained_runs(load_runs(outputs), search, trials)
    assert found["trial_id"].tolist() == ["1234e567"] * 4 + ["a30febcf"]
    assert found["role"].tolist() == ["sampled"] * 4 + ["control"]
    assert found["epochs"].tolist() == [3, *[EPOCHS] * 4]
    assert found["test_accuracy"].tolist() == [60.0, 70.0, 78.0, 78.5, 77.0]
    rows = summary_table(summarise_runs(found), trials).rows
    assert [row[-2:] for row in rows[:3]] == [
        [f"60.00 ± {DASH}", f"61.00 ± {DASH}"],
        [f"70.00 ± {DASH}", f"71.00 ± {DASH}"],
        ["78.25 ± 0.35", "79.25 ± 0.35"],
    ], "what was computed in another precision is not pooled"
    make_run(outputs, config.with_settings(seed=1), 79.5).parent.rename(outputs / "runs" / "again")
    found = retrained_runs(load_runs(outputs), search, trials)
    again = summarise_runs(found).set_index("trial_id").loc["1234e567"].iloc[-1]
    assert (again["num_runs"], again["test_accuracy"]) == (2, 78.5), "of the seeds, of which one was run twice"


# ---------------------------------------------------------------- what the noise allows to say
def test_standard_errors():
    assert accuracy_standard_error(75.0, 5000) == pytest.approx(100 * math.sqrt(0.75 * 0.25 / 5000))
    assert noise_margin(75.0, 75.0, 5000) == pytest.approx(2 * math.sqrt(2) * accuracy_standard_error(75.0, 5000))
    # All right is no certainty: one image of 144 is never more than noise.
    assert accuracy_standard_error(100.0, 144) > 0
    assert noise_margin(100.0, 100 * 143 / 144, 144) > 100 / 144


def test_verdict_within_and_beyond_the_noise(outputs, folder):
    first, equals, reference, control, caution = judge(folder)
    assert first.startswith(f"Best of 4 self-distilled trials that reached epoch {EPOCHS}: 1234e567, alpha 0.283,")
    assert "77.90 % ± 0.59 (binomial standard error, 5,000 images)" in first
    assert "2 of 3 others lie" in equals
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


def test_verdict_of_searches_that_have_not_all_trials(outputs):
    text = " ".join(judge(make_search(outputs, [trial("r", 75.0, role="reference"), trial("a", 60.0)], name="no")))
    assert f"The best is {REFERENCE} itself: the search found nothing better." in text
    assert "Deep supervision alone has not reached the last epoch here" in text
    running = make_search(outputs, [trial("a", 70.0, epochs=2, status="running")], name="running", status="running")
    for path in (running, make_search(outputs, [], name="empty")):
        assert judge(path) == [f"No trial has reached its last epoch ({EPOCHS}) yet, so there is nothing to compare."]
    interrupted = make_search(outputs, [trial("a", 70.0)], name="stopped", status="interrupted")
    assert judge(interrupted)[-1] == "The search has not finished: all of this may change."


def test_verdict_of_a_likelihood_claims_no_error(outputs):
    folder = full_search(outputs, metric="val_nll", mode="min")
    text = " ".join(judge(folder))
    assert "validation NLL, classifier 4/4: 0.8840 nats." in text
    assert "better by 0.0280 nats." in text
    assert "the noise" not in text
    assert "binomial" not in text
    accuracies = {"1234e567": [78.0, 78.2, 78.4], "a30febcf": [70.0, 70.1, 70.5]}
    search, trials, retrained = retrain_by_hand(outputs, folder, accuracies)
    against_control = judge_retrained(search, trials, retrained)[2]
    assert "better by 0.3200 nats (95 % interval +0.3101 to +0.3299, 3 seeds): resolved." in against_control
    confirmed = judge_retrained(search, trials, retrained, "a30febcf")
    assert "of trial a30febcf (chosen over fresh seeds)" in confirmed[0]
    header = ranking_table(load_search(folder), load_trials(folder), 5).header
    assert "val_nll nats" in header
    assert "± se" not in header


@pytest.mark.parametrize(
    ("accuracies", "head", "reference", "control"),
    [
        (
            {"1234e567": [78.0, 78.2, 78.1], "d9c2825f": [77.9, 78.3, 77.8], "a30febcf": [76.0, 76.2, 75.9]},
            "78.10 ± 0.10 % (3 runs, ± standard deviation).",
            "not resolved; were the difference this large, about",
            "better by 2.07 points (95 % interval +1.37 to +2.76, 3 seeds): resolved.",
        ),
        (
            {"1234e567": [78.0], "d9c2825f": [70.0]},
            "78.00 % (one run).",
            "to compare them takes at least two seeds, each run with both settings.",
            f"Deep supervision alone was not retrained for {EPOCHS} epochs in fp32.",
        ),
    ],
    ids=["three seeds", "one seed"],
)
def test_retrained_differences_are_resolved_or_not(outputs, folder, accuracies, head, reference, control):
    sentences = judge_retrained(*retrain_by_hand(outputs, folder, accuracies))
    assert sentences[0].startswith("Test accuracy, classifier 4/4, of trial 1234e567")
    for sentence, words in zip(sentences, (head, reference, control), strict=True):
        assert words in sentence


# ---------------------------------------------------------------- tables and figures
def test_ranking_table_has_the_reference_and_the_control_below(folder):
    table = ranking_table(load_search(folder), load_trials(folder), top=1)
    assert [row[0] for row in table.rows] == ["1", "2", DASH]
    assert [row[2] for row in table.rows] == ["sampled", "reference", "control"]
    assert table.header[-6:] == ["± se", "1/4", "2/4", "3/4", "4/4", "ensemble"]
    assert table.rows[0][-6:] == ["0.59", "66.40", "73.90", "77.40", "77.90", "78.90"]
    assert len(set(map(len, table.to_text().splitlines()))) == 1, "all lines end at one column"
    assert trials_table(load_trials(folder)).rows[-1][7:] == [DASH] * 7 + ["0"]


def draw(outputs, folder):
    search, trials = load_search(folder), load_trials(folder)
    retrained = retrained_runs(load_runs(outputs), search, trials)
    confirmation = load_confirmation(folder)
    return draw_pictures(search, trials, load_curves(folder), retrained, summarise_runs(retrained), confirmation)


def labels_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(("metric", "mode", "unit"), [("val_accuracy", "max", "(%)"), ("val_nll", "min", "(nats)")])
def test_every_figure_of_a_full_search_is_drawn(outputs, metric, mode, unit):
    folder = full_search(outputs, metric=metric, mode=mode)
    retrain_by_hand(outputs, folder, {"1234e567": [78.0, 78.2], "a30febcf": [76.0]})
    pictures = draw(outputs, folder)
    assert list(pictures) == ["history", "parameters", "curves", "classifiers", f"retrained-{EPOCHS}-fp32"]
    for figure, words in pictures.values():
        assert len(words) > 40
        assert to_svg(figure).lstrip().startswith(b"<?xml")
    history, parameters = pictures["history"][0], pictures["parameters"][0]
    assert history.axes[0].get_ylabel().endswith(unit)
    assert [axes.get_xscale() for axes in parameters.axes] == ["linear", "linear", "log"]
    marks = {"best", REFERENCE, "deep supervision alone", "completed", "stopped early", "failed"}
    assert all(marks <= set(labels_of(figure)) for figure in (history, parameters))


@pytest.fixture
def confirmation(folder):
    """The best and both controls were run again over three fresh seeds, one of them was out after two."""
    arms = {"1234e567": ("sampled", [78.0, 78.4, 78.2]), "d9c2825f": ("reference", [77.9, 78.5, None])}
    arms["a30febcf"] = ("control", [70.0, 70.5])
    record = {
        **{"status": "finished", "num_rounds": 3, "metric": "val_accuracy", "choice": "1234e567"},
        "verdict": ["Not resolved after 3 fresh seeds: trial 1234e567 leads.", "Deep supervision alone: resolved."],
        "arms": [{"trial_id": i, "role": role, "params": {}, "values": v} for i, (role, v) in arms.items()],
    }
    write_json(folder / "confirmation.json", record)
    return record


@pytest.mark.usefixtures("confirmation")
def test_a_confirmation_is_shown_first(outputs, folder, works):
    page = report.render_page(folder, outputs)
    verdict = page[page.index('class="verdict"') :]
    assert verdict.index("Not resolved after 3 fresh seeds") < verdict.index("Best of")
    _, words = draw(outputs, folder)["confirmation"]
    assert "deep supervision alone -7.95" in words, "of the seeds that both had"
    assert f"{REFERENCE} +0.00" in words
    assert "- Not resolved after 3 fresh seeds: trial 1234e567 leads." in works(best)


def test_an_unfinished_confirmation_chooses_nothing_yet(outputs, folder, confirmation, works):
    more = "nothing is chosen by them yet"
    assert more not in works(best)
    write_json(folder / "confirmation.json", confirmation | {"status": "interrupted"})
    assert more in works(best)
    assert more in report.render_page(folder, outputs)


@pytest.mark.parametrize("changes", [{"verdict": [1]}, {"arms": {}}, {"choice": []}, {"num_rounds": "3"}])
def test_a_damaged_confirmation_is_told_in_one_sentence(folder, confirmation, refused, changes):
    write_json(folder / "confirmation.json", confirmation | changes)
    refused(best, words=("confirmation.json", *changes))


def test_pareto_front_of_two_metrics(outputs):
    settings = SearchSettings(metric=("val_accuracy", "val_accuracy_1"), seeds_per_trial=2).to_dict()
    folder = full_search(outputs, settings=settings)
    trials = read_trials(folder / "trials.csv")
    trials[3] = replace(trials[3], measures=trials[3].measures | {"val_accuracy_1": 70.0})
    write_trials(folder / "trials.csv", trials, DEFAULT_SPACE)
    text = " ".join(judge(folder))
    assert ": 1234e567 77.90 / 66.40; 00000012 76.60 / 70.00." in text
    assert "the mean of 2 runs" in text
    assert "2 trials are on the front" in draw(outputs, folder)["front"][1]
    assert "each the mean of 2 runs" in report.render_page(folder, outputs)


def test_figures_of_searches_with_little_in_them(outputs):
    full = full_search(outputs, name="full")
    (full / "trials" / "1234e567" / "metrics.jsonl").unlink()  # the best one's
    assert len(draw(outputs, full)) == 4
    best_is_reference = [trial("a", 70.0, role="reference"), trial("b", 70.0, role="control")]
    pictures = draw(outputs, make_search(outputs, best_is_reference, name="two"))
    assert labels_of(pictures["classifiers"][0]) == [f"best: {REFERENCE}", "deep supervision alone"]


def test_interactive_figures_show_the_trials_of_the_search_and_nothing_else(outputs, folder):
    search, trials, curves = load_search(folder), load_trials(folder), load_curves(folder)
    figures = {name: json.loads(figure) for name, figure in draw_interactive(search, trials, curves).items()}
    assert list(figures) == ["parallel", "contour", "importances", "lines"]
    lines = [dict(line["customdata"]) for line in figures["parallel"]["data"] if "customdata" in line]
    assert [line["val_accuracy"] for line in lines] == ["77.2", "77.9", "76.6", "73"], "no control, none stopped"
    assert all(list(line) == ["val_accuracy", "alpha", "beta"] for line in lines), "the temperature is always the same"
    curves_of = {line["name"]: line["y"] for line in figures["lines"]["data"]}
    assert set(curves_of) == {"d9c2825f", "1234e567", "00000012", "94bed0ac", "0e5"}
    assert curves_of["0e5"] == curves[curves["trial_id"] == "0e5"]["val_accuracy"].to_list()
    assert gzip.decompress(base64.b64decode(packed_plotly())).startswith(b"/*")
    few = trials[trials["trial_id"] != "94bed0ac"]
    assert draw_interactive(search, few, curves) == {}
    assert 'class="plot"' not in report.render_page(make_search(outputs, [trial("a", 70.0)], name="one"), outputs)


def search_with_effects(outputs, seed, num_trials=24, **fields):
    """Accuracy falls with the distance of alpha from 0.4 and has noise; the control is far from that."""
    generator = np.random.default_rng(seed)
    trials = [trial("c", 40.0, role="control")]
    for number in range(num_trials):
        alpha, temperature, beta = generator.random(), generator.uniform(1, 10), 10 ** generator.uniform(-8, -3)
        accuracy = 70 - 40 * (alpha - 0.4) ** 2 + generator.normal(scale=0.3)
        trials.append(trial(f"t{number}", accuracy, alpha=alpha, temperature=temperature, beta=beta))
    space = space_to_dict({**DEFAULT_SPACE, "alpha": Range(0.0, 1.0)})
    return make_search(outputs, trials, name=f"effects-{seed}", space=space, **fields)


def effects_of(folder):
    return fit_effects(load_search(folder), load_trials(folder))


@pytest.mark.parametrize(("metric", "mode"), [("val_accuracy", "max"), ("val_nll", "min")])
def test_effects_find_what_matters_and_what_does_not(outputs, metric, mode):
    folder = search_with_effects(outputs, 0, metric=metric, mode=mode)
    effects = effects_of(folder)
    is_flat = {name: effect.is_flat for name, effect in effects.items()}
    assert is_flat == {"alpha": False, "temperature": True, "beta": True}
    low, high = effects["alpha"].near_best(mode, find_margin(load_search(folder)))
    assert 0.2 < low <= 0.45, "0.3 points are lost at a distance of 0.09"
    assert 0.35 <= high < 0.6
    figure, words = draw(outputs, folder)["effects"]
    assert "alpha: best from " in words
    assert "temperature: no effect is shown" in words
    assert [axes.get_xscale() for axes in figure.axes] == ["linear", "linear", "log"]


def test_the_bands_of_effects_hold_the_truth(outputs):
    """Nearly as often as they say: how smooth the surface is has to be found out, too."""
    missed = []
    for seed in range(10):
        effects = effects_of(search_with_effects(outputs, seed))
        alpha, beta = effects["alpha"], effects["beta"]
        truth = 70 - 40 * (alpha.values - 0.4) ** 2
        missed += [*(np.abs(alpha.mean - truth) > alpha.half_width)]
        mean = np.trapezoid(truth, alpha.values) / np.ptp(alpha.values)
        missed += [*(np.abs(beta.mean - mean) > beta.half_width)]
    assert np.mean(missed) < 0.12
    assert effects_of(search_with_effects(outputs, 99, num_trials=FEWEST_TRIALS - 1)) == {}


# ---------------------------------------------------------------- the page
def test_the_page_holds_verdict_tables_figures_and_commands(outputs, folder):
    retrain_by_hand(outputs, folder, {"1234e567": [78.0, 78.2], "a30febcf": [76.0]})
    page = report.render_page(folder, outputs)
    assert page.count("<table") == 4  # best, retrained, all trials, what went wrong
    assert page.count("<img") == len(re.findall(r'alt="[^"]{40}', page)) == 5
    assert page.count('class="plot"') == 4
    assert page.count("<figcaption") == 5 + 4
    links = re.findall(r'(?:src|href)="([^"]*)', page)
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links)  # nothing from outside
    for words in (
        *judge(folder),
        "78.10 ± 0.14",
        "2.5 h from start to end",
        "OutOfMemoryError: <CUDA> out of memory",
        f"Retrained for {EPOCHS} epochs",
        "python byot/train.py --best search-1",
        "45,000 images to train on, 5,000 of the training set held out",
    ):
        assert words in text_of(page)
    assert "<CUDA>" not in page


def test_the_commands_of_the_page_are_understood_by_the_search(outputs, folder, tmp_path):
    record = read_json(folder / "search.json")
    choices = {"teacher": {"choices": ["deepest", "ensemble"]}}
    write_json(folder / "search.json", {**record, "space": record["space"] | choices})
    assert "teacher deepest or ensemble" in text_of(report.render_page(folder, outputs))
    search = load_search(folder)
    path = tmp_path / "space.toml"
    path.write_text(report.space_file(search.space))
    assert read_space(path) == search.space == {**DEFAULT_SPACE, "teacher": Choices(["deepest", "ensemble"])}
    words = shlex.split(report.tune_command(search))
    assert words[:4] == ["python", "search/tune.py", "--space", "space.toml"]
    arguments = build_parser().parse_args([*words[2:3], str(path), *words[4:], "--outputs", str(outputs)])
    with ExitStack() as held:
        plan = make_plan(arguments, held)
    assert plan.base == CONFIG
    assert plan.settings == SearchSettings(confirm=0)


@pytest.mark.parametrize(
    ("trials", "status", "num_pictures", "words"),
    [
        ([], "running", 0, "This search is still running, or it was killed: its files were last written"),
        ([trial("a", status="running", epochs=0)], "running", 1, "1 trial: 1 running"),
        ([trial("a", 50.0, status="running", epochs=1)], "running", 3, "1 trial: 1 running"),
        ([trial("a", status="failed", epochs=0, error="x")], "finished", 1, "nothing to compare"),
    ],
)
def test_pages_of_searches_that_did_not_get_far(outputs, trials, status, num_pictures, words):
    page = report.render_page(make_search(outputs, trials, status=status), outputs)
    assert page.count("<img") == num_pictures
    assert words in text_of(page)


def test_a_page_needs_no_optional_part_of_the_record(outputs, folder):
    needed = ("name", "status", "config", "settings", "space", "metric")
    record = read_json(folder / "search.json")
    write_json(folder / "search.json", {key: record[key] for key in needed})
    text = text_of(report.render_page(folder, outputs))
    assert "better by 0.70 points" in text
    assert "binomial standard error, " not in text  # how many validation images there were is not known


# ---------------------------------------------------------------- command lines
def test_best_and_report_from_another_folder(tmp_path, outputs, folder):
    table = tmp_path / "ranking.csv"
    done = run_command(["--outputs", outputs, "--top", 2, "--csv", table], cwd=tmp_path, script="analysis/best.py")
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert (lines[0], lines[2]) == ("search search-1: finished", "8 trials: 5 completed, 1 stopped, 2 failed")
    assert [line.split()[1] for line in lines[5:8]] == ["1234e567", "d9c2825f", "a30febcf"]
    assert "within the noise" in done.stdout
    assert f"  python byot/train.py --best search-1 --outputs {outputs}" in lines
    rows = rows_of(table)
    assert [row["trial_id"] for row in rows] == ["1234e567", "d9c2825f", "00000012", "94bed0ac"]
    assert float(rows[0]["alpha"]) == 0.2832109876543211
    done = run_command([folder, "--outputs", outputs], cwd=tmp_path, script="analysis/report.py")
    page = outputs / "reports" / "search-1.html"
    assert (done.stdout, done.stderr) == (f"{page}\n", "")
    assert "<table>" in page.read_text()


# ---------------------------------------------------------------- retraining
def test_configurations_to_retrain(outputs, folder):
    search, trials = load_search(folder), read_trials(folder / "trials.csv")
    assert list(retrain.choose_configurations(search, trials, 1, with_baselines=False)) == ["1234e567"]
    # The reference is the second best anyway; 94bed0ac has the settings of 00000012, which ranks before it.
    every = retrain.choose_configurations(search, trials, 9, with_baselines=True)
    assert sorted(every) == sorted(["1234e567", "d9c2825f", "00000012", "a30febcf"])
    chosen = retrain.choose_configurations(search, trials, 1, with_baselines=True)
    assert list(chosen) == ["1234e567", "d9c2825f", "a30febcf"]
    confirmed = retrain.choose_configurations(search, trials, 1, with_baselines=True, confirmed="00000012")
    assert list(confirmed) == ["00000012", "d9c2825f", "a30febcf"]
    jobs = retrain.plan_jobs(chosen, outputs / "runs", 2, epochs=2)
    assert [(job.trial_id, job.config.seed) for job in jobs] == [(t, s) for s in (0, 1) for t in chosen]
    assert all(job.config.epochs == 2 and job.config.val_fraction == 0 for job in jobs)
    write_best(folder, search, trials)  # train.py --best has the run of the best one with seed 0
    of_best = TrainConfig.from_dict(read_json(folder / "best.json")["config"])
    assert retrain.plan_jobs(chosen, outputs / "runs", 1)[0].config.run_name() == of_best.run_name()


def test_retraining_needs_a_completed_trial(outputs, refused):
    make_search(outputs, [trial("a", 50.0, status="stopped", epochs=2)], name="none")
    refused(retrain, "none", words=(f"retrain.py: no trial of the search none has reached its last epoch ({EPOCHS})",))


def test_finished_runs_are_told_without_starting_ray(outputs, folder, monkeypatch, works):
    monkeypatch.setattr(ray, "init", None)
    retrain_by_hand(outputs, folder, {"1234e567": [78.0, 78.2], "d9c2825f": [77.0, 77.1], "a30febcf": [76.0, 76.1]})
    out = works(retrain, "--top", 1, "--seeds", 2)
    assert "6 of 6 runs finished before" in out
    assert "1/6  trial 1234e567  seed 0  test accuracy 78.00 %  30 s  (finished before)" in out
    assert "78.10 ± 0.14" in out
    assert ": not resolved; were" in out, "two seeds say next to nothing"
    runs = [(row["trial_id"], row["seed"]) for row in rows_of(folder / "retrained.csv")]
    assert runs == [(trial_id, seed) for trial_id in ("1234e567", "d9c2825f", "a30febcf") for seed in ("0", "1")]


def test_a_ray_that_does_not_start_is_told_with_the_command_to_go_on(outputs, folder, monkeypatch, call):
    error = Exception("Timed out waiting for file /tmp/gcs_server_port.")
    monkeypatch.setattr(ray, "init", Mock(side_effect=error))
    code, out, err = call(retrain, "--top", 1, "--seeds", 1)
    assert code == 1
    assert "0 of 3 runs finished before" in out
    assert_one_sentence(err, "Ray did not start (Timed out", f" search-1 --top 1 --seeds 1 --outputs {outputs}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_retraining_survives_a_stop_and_a_failure(outputs, tmp_path):
    """Stopped by Ctrl-C after its first run; started again, one run fails and the others end.

    Its runs are long enough for the signal to come before the last, however slow the machine.
    """
    folder = make_search(outputs, [trial("1234e567", 60.0), trial("a30febcf", 50.0, role="control")])
    search = load_search(folder)
    chosen = retrain.choose_configurations(search, read_trials(folder / "trials.csv"), 1, with_baselines=True)
    jobs = retrain.plan_jobs(chosen, outputs / "runs", 2, epochs=2)
    blocked = jobs[-1].folder / "metrics.jsonl"
    blocked.mkdir(parents=True)  # a folder where the run wants a file
    arguments = ["--top", 1, "--seeds", 2, "--epochs", 2, "--outputs", outputs]

    with start_command([*arguments, "--max-concurrent", 1], cwd=tmp_path, script="analysis/retrain.py") as process:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert lines[1].startswith("1/4  trial 1234e567  seed 0  test accuracy ")
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "go on with: " in err
    assert err.endswith(f" search-1 --top 1 --seeds 2 --epochs 2 --outputs {outputs} --max-concurrent 1\n")
    first = (jobs[0].folder / "result.json").stat().st_mtime_ns

    again = run_command(arguments, cwd=tmp_path, script="analysis/retrain.py", code=1)
    assert re.search(r"trial a30febcf  seed 1  failed: IsADirectoryError: .*metrics\.jsonl", again.stdout)
    assert "1 of 4 runs failed" in again.stderr
    runs = [row["run"] for row in rows_of(folder / "retrained.csv")]
    assert runs == [job.folder.name for job in (jobs[0], jobs[2], jobs[1])]
    assert "Traceback" not in again.stderr
    assert (jobs[0].folder / "result.json").stat().st_mtime_ns == first


def test_the_notebook_runs():
    """Its cells one after the other, and three figures."""
    plt.switch_backend("agg")
    notebook = read_json(PROJECT / "analysis" / "search.ipynb")
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    try:
        for i, cell in enumerate(cells):
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), f"cell {i}", "exec"), names)
        assert len(plt.get_fignums()) == 3
        assert set(names["effects"]) == {"alpha", "temperature", "beta"}
    finally:
        plt.close("all")
