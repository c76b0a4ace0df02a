"""The page of one run and the file of test figures that it reads: made by hand, and left by a real run."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis import report
from analysis.run_figures import draw_run
from analysis.run_page import render_run_page
from byot import evaluate as evaluate_command
from byot import exit_report
from byot.config import TrainConfig
from byot.exit_report import judge_ensembles
from byot.runs import train_run
from byot.search_files import read_epochs
from byot.system.files import read_json, write_json
from tests.helpers import Call, text_of

SETTINGS = TrainConfig(dataset="digits", width=4, epochs=2, lr=0.05, val_fraction=0.2, device="cpu")
NAMES = ("1/4", "2/4", "3/4", "4/4")


def made_up_exits() -> dict[str, Any]:
    """A record as evaluate.py --exits leaves it, of round numbers that no other part of the page has."""
    exits = [
        {
            **{"exit": name, "accuracy": 41.25 + 10 * i, "cost": 0.25 * (i + 1)},
            **{"ensemble_accuracy": 41.25 + 9 * i, "ensemble_cost": 0.25 * (i + 1) + 0.05 * i},
            **{"temperature": 1.5 + i, "threshold": (2.0, 0.5, 0.625, 0.0)[i]},
            **{"ece_before": 11.5 + i, "ece": 2.25 + i, "aurc_before": 30.5, "aurc": 29.5 - i},
            **{"auroc_before": 0.71, "auroc": None if i == 3 else 0.7125},
        }
        for i, name in enumerate(NAMES)
    ]
    names = ("asked", "accuracy", "cost", "thresholds", "left")
    table = [
        dict(zip(names, ("drop 1", 70.75, 0.625, [2.0, 0.5, 0.625, 0.0], [0, 60, 30, 10]), strict=True)),
        {"asked": "cost 0.125"},
        dict(zip(names, ("cost 1", 71.5, 0.9375, [2.0, 2.0, 0.7, 0.0], [0, 0, 25, 75]), strict=True)),
    ]
    ms = {"exits_ms": [1.0, 2.0, 3.0, 4.0], "plain_ms": 4.0, "num_images": 1024}
    return {
        **{"checkpoint": "epoch-0002.pt", "epoch": 2, "fitted_on": exit_report.HELD_OUT, "num_images": 287},
        "hardware": {"device": "cpu", "threads": 1},
        "test": {
            **{"num_images": 10_000, "exits": exits, "table": table, "overthinking": 6.75},
            "curve": [{"accuracy": 60.0 + i, "cost": 0.9 - 0.1 * i} for i in range(3)],
            "oracle": {"accuracy": 83.5, "cost": 0.375},
            "classes": {
                "earliest": [{"class": "orange", "mean_exit": 1.5}],
                "latest": [{"class": "bear", "mean_exit": 3.5}],
            },
            "time": [
                {"batch_size": 1, "early_ms": 5.0, "table_ms": [5.0, None, 6.0], **ms},
                {"batch_size": 128, "early_ms": 3.0, "table_ms": [3.0, None, 3.5], **ms},
            ],
        },
    }


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A run that was measured and has neither a result nor metrics."""
    folder = tmp_path / "runs" / "made-up"
    write_json(folder / "config.json", SETTINGS.with_settings(dataset="cifar100").to_dict())
    write_json(folder / "exits-test.json", made_up_exits())
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs") / "runs" / "real"
    train_run(SETTINGS, folder)
    return folder


@pytest.fixture
def call(call: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    """In whose time each rule has a time of its own: its thresholds' sum in ms an image."""
    monkeypatch.setattr(exit_report, "_time_one", lambda _, batch, rule: len(batch) * sum(rule.thresholds) / 1000)
    return call


# ---------------------------------------------------------------- the page
def test_the_page_tells_what_was_measured(made_up):
    page = render_run_page(made_up)
    links = re.findall(r'(?:src|href)="([^"]*)', page)
    assert len(links) == page.count("<img") == 3
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links), "nothing from outside"
    text = text_of(page)
    for words in (
        "it has not finished its 2 epochs",
        "Early exit (drop 1) is right on 70.75 % at 0.625 of the plain network's multiply-adds, -0.50 points from 4/4",
        "With 1 image at a time it took 25 % more time than the plain network: 5.000 against 4.000 ms",
        "With 128 images at a time it took 25 % less time",
        "fitted on 287 held-out training images",
        "1/4 41.25 0.250 41.25 0.250 never asked",
        "3/4 61.25 0.750 59.25 0.850 0.6250",
        "drop 1 70.75 0.625 0.0 60.0 30.0 10.0 5.000 3.000",
        "cost 0.125 no exit so cheap",
        "4/4 4.500 14.50 5.25 0.7100 \N{EN DASH} 30.50 26.50",  # all right: no AUROC
        "6.75 % of the images are right at an earlier exit and wrong at 4/4. An oracle reaches 83.50 % at cost 0.375",
        "earliest orange 1.50 latest bear 3.50",
    ):
        assert words in text, words
    assert "trained on: the exits look surer" not in text


def test_figures_hold_the_numbers(made_up):
    test = read_json(made_up / "exits-test.json")["test"]
    pictures: Any = draw_run({}, test)
    axes = pictures["cost"][0].axes[0]
    assert axes.lines[0].get_xydata().tolist() == pytest.approx(np.array([[0.7, 62], [0.8, 61], [0.9, 60]]))
    points = {str(dots.get_label()): dots.get_offsets().tolist() for dots in axes.collections}
    assert points == {
        "early exit as asked: drop 1": [[0.625, 70.75]],
        **{f"{row['exit']} alone": [[row["cost"], row["accuracy"]]] for row in test["exits"]},
        "ensemble so far": [[row["ensemble_cost"], row["ensemble_accuracy"]] for row in test["exits"][1:]],
        "oracle": [[0.375, 83.5]],
    }
    batched = pictures["time"][0].axes[1]
    assert batched.lines[0].get_xydata().tolist() == [[3.0, 70.75], [3.5, 71.5]]
    bars = [(bar.get_x(), bar.get_width()) for bar in pictures["leaving"][0].axes[0].patches]
    assert bars == [(0, 0), (0, 0), (0, 60), (0, 0), (60, 30), (0, 25), (90, 10), (25, 75)]


def test_other_pages(made_up):
    """Exits fitted on what was trained on, of another checkpoint; a network that has none."""
    write_json(made_up / "exits-test.json", made_up_exits() | {"fitted_on": exit_report.SEEN})
    (made_up / "checkpoints").mkdir()
    (made_up / "checkpoints" / "epoch-0003.pt").touch()
    text = text_of(render_run_page(made_up))
    assert "These images were trained on: the exits look surer than they are" in text
    assert "The exits were fitted on epoch-0002.pt and the run's newest checkpoint is epoch-0003.pt" in text
    (made_up / "exits-test.json").unlink()
    write_json(made_up / "config.json", SETTINGS.with_settings(loss_form="plain").to_dict())
    assert "has one classifier, so it has no exits" in text_of(render_run_page(made_up))


def test_what_cannot_be_shown_is_refused_in_a_sentence(made_up, refused):
    outputs = made_up.parents[1]
    given = ("--outputs", outputs, "--run")
    record = made_up_exits()
    for broken, word in (
        ({**record, "test": {}}, "has no classes: python byot/evaluate.py"),
        ({**record, "test": 1}, "has no test: python byot/evaluate.py"),
        ({"test": record["test"]}, "has no checkpoint: python byot/evaluate.py"),
    ):
        write_json(made_up / "exits-test.json", broken)
        refused(report, *given, "made-up", words=(str(made_up / "exits-test.json"), word))
    for name, word in (("absent", "there is no run absent in"), (str(outputs), "nor a run's folder")):
        refused(report, *given, name, words=(word,))
    refused(report, "a-search", "--run", "made-up", words=("not allowed with",))
    assert not (outputs / "reports").exists()


# ---------------------------------------------------------------- a real run
def test_a_run_is_shown_before_and_after_its_exits_are_measured(run, works):
    outputs = run.parents[1]
    page = outputs / "reports" / "run-real.html"
    assert works(report, "--run", "real", "--outputs", outputs) == f"{page}\n"
    before = page.read_text()
    result = read_json(run / "result.json")
    assert before.count("<img") == 1, "the training"
    assert f"python byot/evaluate.py {run} --exits" in text_of(before)
    for suffix, name in (("1", "1/4"), ("ensemble", "ensemble")):
        assert f"{name} {result[f'test_accuracy_{suffix}']:.2f}" in text_of(before)

    told = works(evaluate_command, run, "--exits", "--format", "json")
    record = read_json(run / "exits-test.json")
    assert record == json.loads(told)
    assert (record["checkpoint"], record["epoch"]) == ("epoch-0002.pt", 2)
    assert "test" not in read_json(run / "exits.json")
    test = record["test"]
    assert test["exits"][3]["accuracy"] == pytest.approx(result["test_accuracy"], abs=1.2)  # of 359 images, in bf16
    assert len(test["curve"]) == exit_report.CURVE_POINTS
    assert test["curve"][0]["accuracy"] == pytest.approx(test["exits"][0]["accuracy"]), "the cheapest exit alone"
    for timed in test["time"]:
        assert (timed["plain_ms"], timed["early_ms"]) == (timed["exits_ms"][3], timed["table_ms"][0])
        assert timed["exits_ms"] == pytest.approx([0, 2, 4, 6]), "nobody asks the exits before it"
        expected = [sum(row["thresholds"]) if "accuracy" in row else None for row in test["table"]]
        assert timed["table_ms"] == [ms if ms is None else pytest.approx(ms) for ms in expected]
        assert None in expected, "no exit is so cheap as a quarter"

    page = run.parent / "page.html"
    assert works(report, "--run", run, "--output", page) == f"{page}\n"
    assert page.read_text().count("<img") == 4
    assert "fitted on 287 held-out training images" in text_of(page.read_text())
    lines: Any = draw_run(read_epochs(run / "metrics.jsonl"), None)["training"][0].axes[1].lines
    assert [len(line.get_xdata()) for line in lines] == [2] * 9, "four classifiers twice and the ensemble"


def test_exits_of_another_checkpoint_are_told_and_not_refused(run, works, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("epoch-0001.pt", "epoch-0002.pt"):
        (tmp_path / "checkpoints" / name).write_bytes((run / "checkpoints" / name).read_bytes())
    for given in ((tmp_path / "checkpoints" / "epoch-0001.pt", "--exits"), (tmp_path,)):
        words = "on epoch-0001.pt and the run's newest checkpoint is epoch-0002.pt: python byot/evaluate.py .* --exits"
        with pytest.warns(UserWarning, match=words):
            assert "1/4" in works(evaluate_command, *given)
    (tmp_path / "exits.json").write_text("{")
    works(evaluate_command, tmp_path)  # accuracies need no exits


# ---------------------------------------------------------------- measures
def test_ensembles_so_far_equal_their_loop():
    generator = torch.Generator().manual_seed(0)
    logits, labels = 2 * torch.randn(4, 60, 5, generator=generator), torch.randint(0, 5, (60,), generator=generator)
    temperatures = (0.5, 3.0, 1.0, 2.0)
    found = judge_ensembles(logits, labels, temperatures)
    for last in range(4):
        right = 0
        for n in range(60):
            mean = np.zeros(5)
            for k in range(last + 1):
                scaled = np.exp(logits[k, n].double().numpy() / temperatures[k])
                mean += scaled / scaled.sum() / (last + 1)
            right += int(mean.argmax()) == int(labels[n])
        assert found[last] == pytest.approx(100 * right / 60)
