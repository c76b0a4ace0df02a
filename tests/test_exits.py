"""Holds early exit to slow loops: who leaves where, at what cost, how thresholds are fitted, what is told of it."""

import json
import math
import re
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from analysis.verdict import describe_metric
from benchmarks.plans import RESULTS
from byot import evaluate as evaluate_command
from byot import exit_report
from byot.config import TrainConfig
from byot.data import LabelledImages, load_images, split_validation
from byot.exit_report import aurc, auroc, calibration_error, collect_logits, judge_oracle, make_answers, rank_classes
from byot.exits import (
    NEVER,
    Answers,
    ExitCosts,
    ExitRule,
    Outcome,
    cross_fitted_accuracy,
    fit_temperatures,
    fit_thresholds,
    fit_to_cost,
    fit_to_drop,
    load_rule,
    measure_costs,
    predict_early,
)
from byot.metrics import evaluate
from byot.model import BranchedResNet, fold_batch_norms
from byot.runs import find_run, load_network, train_run
from byot.search_files import MEASURES, read_trials, write_trials
from byot.system.distributed import ALONE, Processes
from byot.system.files import read_json, read_json_lines, write_json
from byot.trainer import choose_autocast_dtype
from search.settings import SearchSettings
from tests.helpers import PROJECT, Call, assert_one_sentence
from tests.test_distributed import in_processes
from tests.test_metrics import Answers as FixedAnswers
from tests.test_model import stir_batch_norms

PLAIN = ExitRule((1.0,) * 4, (NEVER, NEVER, NEVER, 0.0))
COSTS = ExitCosts((30, 25, 25, 20), (5, 3, 2, 1))
COSTS_OF_THREE = ExitCosts((40, 30, 30), (2, 2, 1))


@pytest.fixture(scope="module")
def network() -> BranchedResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BranchedResNet("resnet18", num_classes=7, width=8).eval()
    stir_batch_norms(model)
    return model.to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def images() -> Tensor:
    drawn = torch.randn(50, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return drawn.contiguous(memory_format=torch.channels_last)


def quantile_rule(network: BranchedResNet, images: Tensor, shares: tuple[float, ...]) -> ExitRule:
    """A rule by which about such a share of all images is sure enough for each exit; 0 asks nobody."""
    temperatures = (0.7, 1.5, 2.0, 1.1)
    with torch.inference_mode():
        outputs = [(z / t).softmax(1).amax(1) for z, t in zip(network(images).logits, temperatures, strict=True)]
    thresholds = [float(c.quantile(1 - share)) if share else NEVER for c, share in zip(outputs, shares, strict=False)]
    return ExitRule(temperatures, (*thresholds, 0.0))


# ---------------------------------------------------------------- prediction
def test_when_nobody_is_asked_the_deepest_answers_to_the_last_bit(network, images):
    """And no branch is run."""
    with torch.inference_mode():
        expected = network(images).logits[-1]
    refusals = [
        branch.register_forward_pre_hook(lambda *_: pytest.fail("a branch was run")) for branch in network.branches
    ]
    logits, exits = predict_early(network, images, PLAIN)
    for refusal in refusals:
        refusal.remove()
    assert torch.equal(logits, expected)
    assert exits.tolist() == [3] * len(images)


@pytest.mark.parametrize("shares", [(0.3, 0.4, 0.5), (0.0, 0.5, 0.0), (0.5, 0.0, 0.9), (0.0, 0.0, 0.2)])
def test_each_image_leaves_at_the_first_exit_that_is_sure(network, images, shares):
    """As one by one with all exits computed; a stage sees those alone that have not left before it."""
    rule = quantile_rule(network, images, shares)
    expected: list[tuple[int, Tensor]] = []
    with torch.inference_mode():
        for image in images:
            all_logits = [z[0].double() for z in network(image[None]).logits]
            for i in range(4):
                scaled = [math.exp(float(z) / rule.temperatures[i]) for z in all_logits[i]]
                if max(scaled) / sum(scaled) >= rule.thresholds[i]:
                    expected.append((i, all_logits[i]))
                    break
    seen: list[int] = []
    hooks = [
        stage.register_forward_pre_hook(lambda _, given: seen.append(len(given[0]))) for stage in network.trunk.stages()
    ]
    logits, exits = predict_early(network, images, rule)
    for hook in hooks:
        hook.remove()
    assert exits.tolist() == [i for i, _ in expected]
    assert len(set(exits.tolist())) == 1 + sum(share > 0 for share in shares), "the rule would test nothing"
    torch.testing.assert_close(logits.double(), torch.stack([z for _, z in expected]), rtol=1e-4, atol=1e-4)
    assert seen == [int((exits >= i).sum()) for i in range(4)]


def test_once_all_have_left_no_later_stage_runs(network, images):
    refusal = network.trunk.layer3.register_forward_pre_hook(lambda *_: pytest.fail("stage 3 was run"))
    _, exits = predict_early(network, images, ExitRule((1.0,) * 4, (NEVER, 0.0, 0.5, 0.0)))
    refusal.remove()
    assert exits.tolist() == [1] * len(images)


def test_a_broken_network_gets_an_answer_too(network, images):
    logits, exits = predict_early(network, images * math.nan, ExitRule((1.0,) * 4, (0.5, 0.5, 0.5, 0.0)))
    assert exits.tolist() == [3] * len(images)
    assert logits.isnan().all()


# ---------------------------------------------------------------- cost
@pytest.mark.parametrize(("model", "size"), [("resnet18", 32), ("resnet50", 32), ("resnet18", 8)])
def test_costs_are_what_torch_counts(model, size):
    """Part by part, on images of noise; the trunk's are the plain network's. ResNet18's are published: 0.56 G."""
    network = BranchedResNet(model, num_classes=10, width=16).eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(torch.randn(1, 3, size, size))
    counted = {name: sum(kinds.values()) // 2 for name, kinds in counter.get_flop_counts().items()}
    costs = measure_costs(network, size)
    layers = [counted[f"BranchedResNet.trunk.layer{i}"] for i in range(1, 5)]
    assert costs.stages == (counted["BranchedResNet.trunk.conv1"] + layers[0], *layers[1:])
    branches = [counted[f"BranchedResNet.branches.{i}"] for i in range(3)]
    assert costs.classifiers == (*branches, counted["BranchedResNet.trunk.fc"])
    plain = BranchedResNet(model, num_classes=10, width=16, branch=None).eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        plain(torch.zeros(1, 3, size, size))
    assert costs.plain == counter.get_total_flops() // 2
    if (model, size) == ("resnet18", 32):
        assert measure_costs(BranchedResNet(model, num_classes=10), size).plain == pytest.approx(0.556e9, rel=2e-3)


def test_an_image_pays_for_the_branches_it_asked():
    assert COSTS.plain == 101
    everybody, some = (0.9, 0.9, 0.9, 0.0), (0.9, NEVER, 0.9, 0.0)
    assert COSTS.of_exits(everybody) == pytest.approx([35 / 101, 63 / 101, 90 / 101, 111 / 101])
    assert [COSTS.of_exits(some)[i] for i in (0, 2, 3)] == pytest.approx([35 / 101, 87 / 101, 108 / 101])
    assert COSTS.of_exits(PLAIN.thresholds)[-1] == 1
    assert COSTS.alone() == pytest.approx([35 / 101, 58 / 101, 82 / 101, 1])


# ---------------------------------------------------------------- fitting
def test_temperatures_have_the_least_nll():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (400,), generator=generator)
    logits = torch.randn(3, 400, 5, generator=generator) + 2 * nn.functional.one_hot(labels, 5)
    logits = logits * torch.tensor([0.3, 1.0, 4.0])[:, None, None]
    found = fit_temperatures(logits, labels)
    for z, temperature in zip(logits.double(), found, strict=True):
        nll = [float(nn.functional.cross_entropy(z / (temperature * f), labels)) for f in (0.99, 1, 1.01)]
        assert nll[1] < min(nll[0], nll[2])
    assert found[2] / found[0] > 3, "the louder needs the higher one"
    assert fit_temperatures(0.5 * nn.functional.one_hot(labels, 5)[None], labels) == pytest.approx((0.05,))
    assert fit_temperatures(0.5 * nn.functional.one_hot((labels + 1) % 5, 5)[None], labels) == pytest.approx((20.0,))


def make_up_answers(num_images: int, num_exits: int, seed: int) -> Answers:
    """Answers that are surer and more often right the deeper the exit; confidences are rounded, so some are equal."""
    generator = np.random.default_rng(seed)
    easy = generator.normal(size=num_images)
    known = np.stack([easy + 0.7 * i + 0.7 * generator.normal(size=num_images) for i in range(num_exits)])
    share = 1 / (1 + np.exp(-known))
    return Answers(share.round(2).astype(np.float32), generator.random(share.shape) < share)


def every_outcome(answers: Answers, costs: ExitCosts) -> list[Outcome]:
    """What every choice of thresholds comes to."""
    options = [[0.0, NEVER, *np.unique(row).tolist()] for row in answers.confidence[:-1]]
    return [answers.judge((*thresholds, 0.0), costs) for thresholds in product(*options)]


def test_thresholds_are_as_good_as_the_best_of_all():
    """Exactly with one early exit; with two, near it on average. The limit is always kept."""
    short = []
    for num_exits, num_images, seed in ((2, 40, 0), (2, 200, 1), (3, 40, 2), (3, 100, 3), (3, 100, 4)):
        answers = make_up_answers(num_images, num_exits, seed)
        costs = ExitCosts(COSTS.stages[:num_exits], COSTS.classifiers[-num_exits:])
        outcomes = every_outcome(answers, costs)
        for target in (min(costs.alone()), 0.6, 0.7, 0.85, 1.0):
            if target < min(costs.alone()):
                continue
            found = fit_thresholds(answers, costs, target)
            assert found == answers.judge(found.thresholds, costs)
            assert found.cost <= target + 1e-6
            best = max(outcome.accuracy for outcome in outcomes if outcome.cost <= target + 1e-9)
            short.append((num_exits, best - found.accuracy))
    assert max(value for num_exits, value in short if num_exits == 2) < 1e-6
    assert np.mean([value for num_exits, value in short if num_exits == 3]) < 0.5


def test_thresholds_keep_what_was_asked_on_other_images():
    """On average over fits on 300 images, where those that are best for the labels of these images do not."""
    other = make_up_answers(50_000, 3, 99)
    deepest = 100 * other.correct[-1].mean()
    drops, costs, best_for_labels, by_labels = [], [], [], []
    for seed in range(16):
        answers = make_up_answers(300, 3, seed)
        found = fit_to_drop(answers, COSTS_OF_THREE, 1.0)
        assert found == answers.judge(found.thresholds, COSTS_OF_THREE)
        assert found.accuracy >= 100 * answers.correct[-1].mean() - 1.0 - 1e-6
        drops.append(deepest - other.judge(found.thresholds, COSTS_OF_THREE).accuracy)
        costs.append(found.cost)
        fitted = fit_to_cost(answers, COSTS_OF_THREE, 0.6)
        assert fitted.cost <= 0.6 + 1e-6
        best_for_labels.append(fit_thresholds(answers, COSTS_OF_THREE, 0.6).accuracy - fitted.accuracy)
        rules = fitted.thresholds, fit_thresholds(answers, COSTS_OF_THREE, 0.6).thresholds
        better, worse = (other.judge(rule, COSTS_OF_THREE).accuracy for rule in rules)
        by_labels.append(better - worse)
    assert np.mean(drops) < 1.3
    assert np.mean(costs) < 0.92
    assert np.mean(best_for_labels) > 0.5, "the labels are fitted"
    assert np.mean(by_labels) > 0.1, "which is noise"


def test_exits_that_do_not_pay_are_not_asked():
    """A branch that costs more than the stages after it, and one that knows nothing."""
    answers = make_up_answers(300, 3, 0)
    dear = ExitCosts((40, 40, 20), (5, 30, 1))
    assert fit_to_drop(answers, dear, 1).thresholds[1] == NEVER
    ignorant = Answers(answers.confidence.copy(), answers.correct.copy())
    ignorant.confidence[0], ignorant.correct[0] = 0.1, False
    assert fit_to_drop(ignorant, COSTS_OF_THREE, 1).thresholds[0] == NEVER
    assert fit_to_drop(answers, COSTS_OF_THREE, 1).thresholds[0] <= 1


def test_a_target_below_the_cheapest_exit_is_refused():
    with pytest.raises(ValueError, match=r"at least 0\.347"):
        fit_to_cost(make_up_answers(40, 4, 0), COSTS, 0.3)


def test_cross_fitting_judges_each_half_with_the_other():
    answers = make_up_answers(201, 4, 3)
    right = 0
    for fitted, judged in ((0, 1), (1, 0)):
        confidence, correct = answers.confidence[:, fitted::2], answers.correct[:, fitted::2]
        thresholds = fit_thresholds(Answers(confidence, correct), COSTS, 0.6).thresholds
        for n in range(judged, 201, 2):
            first = next(i for i in range(4) if answers.confidence[i, n] >= np.float32(thresholds[i]))
            right += bool(answers.correct[first, n])
    assert cross_fitted_accuracy(answers, COSTS, 0.6) == pytest.approx(100 * right / 201)
    cheapest = cross_fitted_accuracy(answers, COSTS, 0.1)
    assert cheapest == pytest.approx(100 * answers.correct[0].mean()), "where none costs so little"


# ---------------------------------------------------------------- measures
def test_measures_equal_their_loops():
    answers = make_up_answers(120, 4, 5)
    confidence, correct = answers.confidence[1], answers.correct[1]
    pairs = [(float(a > b) + float(a == b) / 2) for a in confidence[correct] for b in confidence[~correct]]
    assert auroc(confidence, correct) == pytest.approx(np.mean(pairs))
    assert auroc(confidence, np.ones(120, dtype=bool)) is None
    surest = sorted(range(120), key=lambda n: -confidence[n])
    risks = [sum(not correct[n] for n in surest[:k]) / k for k in range(1, 121)]
    assert aurc(confidence, correct) == pytest.approx(100 * np.mean(risks))
    logits = torch.tensor(np.log([confidence, 1 - confidence])).T[None]  # two classes, of which 0 is right or not
    labels = torch.tensor(np.where(confidence > 0.5, ~correct, correct).astype(int))
    two = make_answers(logits, labels, (1.0,))
    model: Any = FixedAnswers([logits[0]])
    found = evaluate(model, [(torch.arange(120.0)[:, None, None, None], labels)], autocast_dtype=None)
    assert calibration_error(two.confidence[0], two.correct[0]) == pytest.approx(found.ece[0], rel=1e-5)
    oracle = judge_oracle(answers.correct, COSTS)
    exits = [next((i for i in range(4) if answers.correct[i, n]), 3) for n in range(120)]
    assert oracle["cost"] == pytest.approx(np.mean([COSTS.of_exits((0.5,) * 4)[i] for i in exits]))
    assert oracle["accuracy"] == pytest.approx(100 * answers.correct.any(axis=0).mean())


def test_classes_are_ranked_by_where_their_images_leave():
    labels, exits = np.array([5, 5, 2, 2, 9, 9, 9, 0]), np.array([0, 1, 3, 3, 2, 2, 1, 2])
    assert rank_classes(exits, labels, tuple("abcdefghij")) == {
        "earliest": [{"class": "f", "mean_exit": 1.5}, {"class": "j", "mean_exit": pytest.approx(8 / 3)}],
        "latest": [{"class": "c", "mean_exit": 4}, {"class": "a", "mean_exit": 3}],
    }


# ---------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "held out"
    settings = TrainConfig(dataset="digits", width=4, epochs=4, lr=0.05, val_fraction=0.2, device="cpu")
    train_run(settings, folder)
    return folder


@pytest.fixture
def call(call: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setattr(exit_report, "TIMED_S", 0.02)
    return partial(call, evaluate_command)


def test_the_command_fits_on_held_out_images_and_tells_what_the_test_set_says(run, works):
    out = works(run, "--exits", "--max-drop", 2)
    assert max(map(len, out.splitlines()[1:])) <= 80, "the first line is a path"
    assert "fitted on 287 held-out training images" in out
    assert "trained on" not in out
    rule, record = load_rule(run), read_json(run / "exits.json")
    assert rule is not None
    assert (record["asked"], record["num_images"], record["epoch"]) == ({"max_drop": 2.0}, 287, 4)
    saved = find_run(run)
    model, normalisation = load_network(run)
    model = fold_batch_norms(model)
    _, held_out = split_validation(load_images("digits", None, "train"), fraction=0.2, seed=0)
    assert held_out is not None
    answers = make_answers(*collect_logits(model, normalisation, saved.config, held_out), rule.temperatures)
    fitted = answers.judge(rule.thresholds, measure_costs(model, 8))
    assert (record["accuracy"], record["cost"]) == pytest.approx((fitted.accuracy, fitted.cost))
    assert fitted.accuracy >= record["deepest_accuracy"] - 2
    assert fitted.cost < 0.9, "on digits most need no four stages"

    told = json.loads(works(run, "--exits", "--max-drop", 2, "--format", "json"))
    assert {name: told[name] for name in record} == record | {"checkpoint": told["checkpoint"]}
    test = load_images("digits", None, "test")
    x = (torch.tensor(test.images) / 255 - torch.tensor(normalisation.mean)) / torch.tensor(normalisation.std)
    dtype = choose_autocast_dtype(saved.config.precision, torch.device("cpu"))
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits, exits = predict_early(model, x.permute(0, 3, 1, 2), rule)
    row = told["test"]["table"][0]
    right = (logits.argmax(1).numpy() == test.labels).mean()
    assert row["accuracy"] == pytest.approx(100 * right, abs=0.3)  # one image, where bf16 rounds another way
    assert row["left"] == pytest.approx((100 * np.bincount(exits, minlength=4) / len(exits)).tolist(), abs=0.6)
    shown = re.search(r"^drop 2 +([\d.]+) +([\d.]+) ", out, re.MULTILINE)
    assert shown is not None
    assert (float(shown[1]), float(shown[2])) == pytest.approx((row["accuracy"], row["cost"]), abs=0.006)
    assert [one["batch_size"] for one in told["test"]["time"]] == [1, 128]


@pytest.mark.parametrize(("module", "code", "shown"), [(exit_report, 2, 0), (evaluate_command, 1, 1)])
def test_a_full_disk_is_told_and_loses_nothing_that_was_measured(run, call, monkeypatch, module, code, shown):
    monkeypatch.setattr(module, "write_json", Mock(side_effect=OSError(28, "No space left on device")))
    found, out, err = call(run, "--exits", "--max-drop", 2)
    assert (found, out.count("fitted on 287 held-out training images")) == (code, shown)
    assert_one_sentence(err, str(run), "No space left on device")


def test_test_labels_do_not_matter(run, works, monkeypatch):
    files, printed = [], []
    for seed in (None, 1):

        def load(
            dataset: str, data_dir: str | None, split: Any, image_size: int, seed: int | None = seed
        ) -> LabelledImages:
            images = load_images(dataset, data_dir, split)
            if seed is None or split == "train":
                return images
            return LabelledImages(images.images, np.random.default_rng(seed).permutation(images.labels))

        for module in ("byot.data", "byot.exit_report"):
            monkeypatch.setattr(f"{module}.load_images", load)
        printed.append(works(run, "--exits", "--target-cost", 0.6))
        files.append((run / "exits.json").read_bytes())
        monkeypatch.undo()
    assert files[0] == files[1]
    assert printed[0] != printed[1]


def test_images_that_were_trained_on_are_called_so(tmp_path, works):
    train_run(TrainConfig(dataset="digits", width=4, epochs=1, device="cpu"), tmp_path / "all")
    out = works(tmp_path / "all", "--exits", "--target-cost", 0.7)
    assert "these images were trained on: the exits look surer than they are" in out
    record = read_json(tmp_path / "all" / "exits.json")
    assert (record["fitted_on"], record["num_images"]) == (exit_report.SEEN, 143)


def test_what_cannot_be_asked_is_refused_in_a_sentence(run, refused, plain_run):
    (run / "exits.json").unlink(missing_ok=True)
    for given, word in (
        ((run, "--max-drop", 1), "--exits"),
        ((run, "--exits", "--max-drop", 1, "--target-cost", 0.5), "not allowed with"),
        ((run, "--exits", "--max-drop", -1), "max_drop must lie between 0 and 100"),
        ((run, "--exits", "--target-cost", 0.1), "the cheapest exit"),
        ((run, "--exits", "--target-cost", "nan"), "target_cost must be"),
        ((plain_run, "--exits"), "loss_form plain"),
    ):
        refused(*given, words=(word,))
    assert not (run / "exits.json").exists()
    assert not (plain_run / "exits.json").exists()


def test_a_rule_is_read_back_or_refused(tmp_path):
    assert load_rule(tmp_path) is None
    rule = ExitRule((1.0, 0.5, 2.0, 1.0), (NEVER, 0.5, 0.5, 0.0))
    write_json(tmp_path / "exits.json", rule._asdict())
    assert load_rule(tmp_path) == rule
    for changes, word in (
        ({"temperatures": [1.0]}, "temperatures must be 4 numbers, one for each exit, not 1"),
        ({"thresholds": [NEVER, 0.5, 0.5, 0.5, 0.0]}, "thresholds must be 4 numbers, one for each exit, not 5"),
        ({"temperatures": [1.0, 0.0, 1.0, 1.0]}, "above 0"),
        ({"temperatures": "1"}, "must be numbers"),
        ({"thresholds": [10**400, 0.5, 0.5, 0.0]}, "must be numbers"),
        ({"thresholds": [0.5, 0.5, 0.5, None]}, "must be numbers"),
        ({"thresholds": [0.5] * 4}, "last threshold"),
    ):
        write_json(tmp_path / "exits.json", rule._asdict() | changes)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / "exits.json")) + ".*" + word):
            load_rule(tmp_path)
    (tmp_path / "exits.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_rule(tmp_path)


def test_the_page_s_example_runs(run, works):
    works(run, "--exits")
    example = (PROJECT / "docs/exits.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(example.replace("outputs/runs/NAME", str(run)), names)
    assert names["logits"].shape == (8, 10)
    assert set(names["exits"].tolist()) <= {0, 1, 2, 3}


# ---------------------------------------------------------------- metrics of a search
def test_every_epoch_measures_the_mean_and_early_exit(run):
    records = read_json_lines(run / "metrics.jsonl")
    assert len(records) == 4
    for record in records:
        mean = np.mean([record[f"val_accuracy_{i}"] for i in range(1, 5)])
        assert record["val_accuracy_mean"] == pytest.approx(mean)
    saved = find_run(run)
    model, normalisation = load_network(run)
    _, held_out = split_validation(load_images("digits", None, "train"), fraction=0.2, seed=0)
    assert held_out is not None
    answers = make_answers(*collect_logits(model, normalisation, saved.config, held_out), (1.0,) * 4)
    expected = cross_fitted_accuracy(answers, measure_costs(model, 8), 0.5)
    assert records[-1]["val_exit_accuracy"] == pytest.approx(expected)
    assert {"test_accuracy_mean", "test_exit_accuracy"} <= set(read_json(run / "result.json"))


def exit_accuracy(processes: Processes) -> list[float | None]:
    """Of answers that are known beforehand, in uneven shards, of which the second time one has a batch more."""
    return [exit_accuracy_of(num_images, processes) for num_images in (203, 151)]


def exit_accuracy_of(num_images: int, processes: Processes) -> float | None:
    logits = 3 * torch.randn(4, num_images, 6, generator=torch.Generator().manual_seed(0))
    labels = logits.sum(dim=0).argmax(dim=1)
    model: Any = FixedAnswers(list(logits))
    rows = list(processes.shard(torch.arange(num_images)).split(50))  # as byot.batches.in_order does
    batches = [(rows.float()[:, None, None, None], labels[rows]) for rows in rows]
    return evaluate(model, batches, autocast_dtype=None, costs=COSTS, processes=processes).exit_accuracy


@pytest.mark.slow
def test_several_processes_measure_what_one_does():
    alone = exit_accuracy(ALONE)
    assert all(accuracy is not None and 0 < accuracy < 100 for accuracy in alone)
    assert in_processes(3, exit_accuracy) == [alone] * 3


def test_a_single_image_has_no_halves():
    model: Any = FixedAnswers([torch.tensor([[1.0, 0.0]])] * 4)
    images, label = torch.zeros(1, 3, 1, 1), torch.tensor([0])
    record = evaluate(model, [(images, label)], autocast_dtype=None, costs=COSTS).to_record("val")
    assert "val_exit_accuracy" not in record
    assert record["val_accuracy_mean"] == 100


@pytest.mark.parametrize("name", ["cifar100-w16", "cifar100-w16-e6", "search-tiny"])
def test_older_tables_are_read_and_written_with_the_new_columns(name, tmp_path):
    folder = RESULTS / "searches" / name
    new = {"val_accuracy_mean", "val_exit_accuracy"}
    assert new <= set(MEASURES)
    assert not new & set((folder / "trials.csv").read_text().splitlines()[0].split(","))
    trials = read_trials(folder / "trials.csv")
    assert all(trial.measures[name] is None for trial in trials for name in new)
    write_trials(tmp_path / "trials.csv", trials, trials[0].params)
    assert read_trials(tmp_path / "trials.csv") == trials
    trials = [trial.after_epoch(7, dict.fromkeys(new, 50.0), 1.0) for trial in trials]
    write_trials(tmp_path / "trials.csv", trials, trials[0].params)
    assert read_trials(tmp_path / "trials.csv") == trials


def test_a_search_may_optimise_both():
    settings = SearchSettings(metric=("val_exit_accuracy", "val_accuracy_mean"))
    assert (settings.mode, settings.main_metric) == ("max", "val_exit_accuracy")
    assert [describe_metric(metric) for metric in settings.metric] == [
        "validation accuracy, early exit at half the cost",
        "validation accuracy, mean of the classifiers",
    ]
