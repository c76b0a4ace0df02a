"""Fits the exits of a trained run, and measures on the test set what they are worth: byot/evaluate.py RUN --exits.

N images, B batch, C classes, K classifiers, each an exit, shallow to deep. Accuracies, ECE and AURC are percent, AUROC
is a share; costs are multiply-adds, as a share of those of the plain deepest network.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from byot.batches import in_order, place_images
from byot.class_names import CLASS_NAMES
from byot.config import CLASSIFIERS, TrainConfig
from byot.console import text_table
from byot.data import LabelledImages, Normalisation, load_images, split_validation, take
from byot.exits import (
    RULE_FILE,
    Answers,
    ExitCosts,
    ExitRule,
    Outcome,
    confidences,
    exit_alone,
    find_exits,
    fit_temperatures,
    fit_to_cost,
    fit_to_drop,
    measure_costs,
    predict_early,
)
from byot.metrics import ECE_BINS
from byot.model import BranchedResNet, fold_batch_norms
from byot.runs import SavedRun, check_classes, load_network
from byot.system.files import refusals_at, write_json
from byot.system.paths import check_writable
from byot.system.provenance import provenance
from byot.trainer import EVAL_BATCH_SIZE, choose_autocast_dtype, choose_device

SEEN_FRACTION = 0.1  # of the training images, to fit on where a run held none out
TABLE_COSTS = (0.25, 0.5, 0.75, 1.0)
CURVE_POINTS = 9  # of a figure, from the cheapest exit's cost to 1
MOST_CLASSES_NAMED = 3  # that leave earliest, and latest
TIMED_BATCHES = (1, 128)
TIMED_IMAGES = 1024
TIMED_S = 1.0  # for each rule at each of them
TEST_FILE = "exits-test.json"
HELD_OUT, SEEN = "held-out training images", "training images that were trained on"
SEEN_SENTENCE = "these images were trained on: the exits look surer than they are;\ntrain with --val-fraction 0.1"


class Asked(NamedTuple):
    """The target that thresholds are fitted for; one of the two is set."""

    max_drop: float | None = None  # points of accuracy below the deepest classifier, at most, for the least cost
    target_cost: float | None = None  # at most, for the best accuracy

    def __str__(self) -> str:
        return f"drop {self.max_drop:g}" if self.target_cost is None else f"cost {self.target_cost:g}"


class FittedExits(NamedTuple):
    """A run's network, how it computes, its rule, and what else was fitted on the same images."""

    model: BranchedResNet
    normalisation: Normalisation
    config: TrainConfig
    rule: ExitRule
    costs: ExitCosts
    table: dict[Asked, Outcome | None]  # None: no exit costs so little
    curve: list[Outcome]
    record: dict[str, Any]  # what exits.json holds


# ---------------------------------------------------------------- fitting


def fit_exits(saved: SavedRun, config: TrainConfig, asked: Asked) -> FittedExits:
    """Fit a saved network's exits on training images it was not trained on, and write exits.json into its folder.

    Where the run held none out, a tenth of those it was trained on take their place, and the record says so. Raises
    ValueError for a plain network, for a target below the cheapest exit, and for other images than the run's.
    """
    if config.num_classifiers == 1:
        raise ValueError(f"{saved.folder} is of loss_form plain, whose one classifier is no early exit")
    check_writable(saved.folder)
    images = load_images(config.dataset, config.data_dir, "train", config.image_size)
    check_classes(saved, images)
    model, normalisation = load_network(saved)
    costs = measure_costs(model, images.images.shape[1])
    if asked.target_cost is not None:
        costs.check_target(asked.target_cost)
    train, held_out = split_validation(images, fraction=config.val_fraction, seed=config.split_seed)
    if len(train.labels) != saved.state["num_train_images"]:
        raise ValueError(
            f"the run was trained on {saved.state['num_train_images']} images, the data set has {len(train.labels)} "
            "now; give the --data-dir it was trained from"
        )
    seen = held_out is None
    if held_out is None:
        _, held_out = split_validation(images, fraction=SEEN_FRACTION, seed=config.split_seed)
    assert held_out is not None
    device = choose_device(config.device)
    model = fold_batch_norms(model).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    logits, labels = collect_logits(model, normalisation, config, held_out)
    temperatures = fit_temperatures(logits, labels)
    answers = make_answers(logits, labels, temperatures)
    table: dict[Asked, Outcome | None] = {}
    for one in (asked, *(Asked(target_cost=cost) for cost in TABLE_COSTS)):
        if one.max_drop is not None:
            table[one] = fit_to_drop(answers, costs, one.max_drop)
        elif one.target_cost is not None and one.target_cost >= min(costs.alone()):
            table[one] = fit_to_cost(answers, costs, one.target_cost)
        else:
            table[one] = None
    curve = [fit_to_cost(answers, costs, cost) for cost in np.linspace(min(costs.alone()), 1, CURVE_POINTS).tolist()]
    chosen = table[asked]
    assert chosen is not None
    rule = ExitRule(temperatures, chosen.thresholds)
    record = {
        **rule._asdict(),
        "asked": {name: value for name, value in asked._asdict().items() if value is not None},
        "fitted_on": SEEN if seen else HELD_OUT,
        "num_images": len(labels),
        "accuracy": chosen.accuracy,
        "deepest_accuracy": 100 * float(answers.correct[-1].mean()),
        "cost": chosen.cost,
        "exit_costs": costs.of_exits(rule.thresholds),
        "multiply_adds": {"plain": costs.plain, **costs._asdict()},
        "checkpoint": saved.checkpoint.name,
        "epoch": saved.state["epoch"],
        **provenance(device),
    }
    with refusals_at(saved.folder):
        write_json(saved.folder / RULE_FILE, record)
    return FittedExits(model, normalisation, config, rule, costs, table, curve, record)


@torch.inference_mode()
def collect_logits(
    model: BranchedResNet, normalisation: Normalisation, config: TrainConfig, images: LabelledImages
) -> tuple[Tensor, Tensor]:
    """Run all exits over the images: logits [K, N, C] and labels [N], on the CPU."""
    logits, labels = [], []
    for batch, batch_labels in _batches(model, normalisation, config, images):
        with _autocast(batch, config):
            logits.append(torch.stack(model(batch).logits).float().cpu())
        labels.append(batch_labels.cpu())
    return torch.cat(logits, dim=1), torch.cat(labels)


def make_answers(logits: Tensor, labels: Tensor, temperatures: tuple[float, ...]) -> Answers:
    """Compare logits [K, N, C] with labels [N]."""
    confidence = confidences(logits, torch.tensor(temperatures)[:, None, None])
    return Answers(confidence.numpy(), (logits.argmax(dim=2) == labels).numpy())


def _batches(
    model: BranchedResNet,
    normalisation: Normalisation,
    config: TrainConfig,
    images: LabelledImages,
    batch_size: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(model.parameters()).device
    source = place_images(images, device, config.placement)
    return in_order(source, batch_size or EVAL_BATCH_SIZE[device.type], normalisation)


def _autocast(images: Tensor, config: TrainConfig) -> torch.autocast:
    dtype = choose_autocast_dtype(config.precision, images.device)
    return torch.autocast(images.device.type, dtype, enabled=dtype is not None)


# ---------------------------------------------------------------- measuring


def measure_exits(fitted: FittedExits, test: LabelledImages) -> dict[str, Any]:
    """Measure on the test images what the fitted exits are worth; nothing is chosen here."""
    logits, labels = collect_logits(fitted.model, fitted.normalisation, fitted.config, test)
    temperatures, costs = fitted.rule.temperatures, fitted.costs
    answers = make_answers(logits, labels, temperatures)
    confidence, correct = answers
    raw = make_answers(logits, labels, (1.0,) * len(temperatures)).confidence
    names = list(CLASSIFIERS.values())[: len(correct)]
    class_names = test.class_names or CLASS_NAMES[fitted.config.dataset]
    ensembles, all_asked = judge_ensembles(logits, labels, temperatures), costs.of_exits((0.0,) * len(correct))
    exits = [
        {
            "exit": names[i],
            "accuracy": 100 * float(correct[i].mean()),
            "cost": costs.alone()[i],
            "ensemble_accuracy": ensembles[i],
            "ensemble_cost": all_asked[i],
            "temperature": temperatures[i],
            "threshold": fitted.rule.thresholds[i],
            "ece_before": calibration_error(raw[i], correct[i]),
            "ece": calibration_error(confidence[i], correct[i]),
            "auroc_before": auroc(raw[i], correct[i]),
            "auroc": auroc(confidence[i], correct[i]),
            "aurc_before": aurc(raw[i], correct[i]),
            "aurc": aurc(confidence[i], correct[i]),
        }
        for i in range(len(correct))
    ]
    table = []
    for asked, outcome in fitted.table.items():
        row: dict[str, Any] = {"asked": str(asked)}
        if outcome is not None:
            got = answers.judge(outcome.thresholds, costs)
            left = np.bincount(find_exits(confidence, outcome.thresholds), minlength=len(correct))
            row |= {"accuracy": got.accuracy, "cost": got.cost, "thresholds": outcome.thresholds}
            row["left"] = (100 * left / left.sum()).tolist()
        table.append(row)
    curve = [answers.judge(outcome.thresholds, costs) for outcome in fitted.curve]
    return {
        "num_images": len(labels),
        "exits": exits,
        "table": table,
        "curve": [{"accuracy": point.accuracy, "cost": point.cost} for point in curve],
        "oracle": judge_oracle(correct, costs),
        "overthinking": 100 * float((correct[:-1].any(axis=0) & ~correct[-1]).mean()),
        "classes": rank_classes(find_exits(confidence, fitted.rule.thresholds), labels.numpy(), class_names),
        "time": [time_exits(fitted, test, batch_size) for batch_size in TIMED_BATCHES],
    }


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Compute the ECE as byot.metrics does, of one classifier's answers [N]."""
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence.astype(float), minlength=ECE_BINS)
    return 100 * float(np.abs(gaps).sum()) / len(confidence)


def auroc(confidence: np.ndarray, correct: np.ndarray) -> float | None:
    """Compute how often a right answer is surer than a wrong one, equals counting half; None where all are alike."""
    num_right, num_wrong = int(correct.sum()), int((~correct).sum())
    if not num_right or not num_wrong:
        return None
    ranks = float(rankdata(confidence)[correct].sum())
    return (ranks - num_right * (num_right + 1) / 2) / (num_right * num_wrong)


def aurc(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Compute the mean, over n = 1 … N, of the errors among the n surest answers, in percent (Geifman et al., 2019)."""
    wrong = ~correct[np.argsort(-confidence, kind="stable")]
    return 100 * float((np.cumsum(wrong) / np.arange(1, len(wrong) + 1)).mean())


def judge_ensembles(logits: Tensor, labels: Tensor, temperatures: tuple[float, ...]) -> list[float]:
    """Compute the accuracies of the means of the first 1, 2, … K softmaxes, in percent: logits [K, N, C]."""
    probabilities = (logits / torch.tensor(temperatures)[:, None, None]).softmax(dim=2)
    correct = probabilities.cumsum(dim=0).argmax(dim=2) == labels
    return (100 * correct.double().mean(dim=1)).tolist()


def judge_oracle(correct: np.ndarray, costs: ExitCosts) -> dict[str, float]:
    """Say what leaving at the first exit that is right would come to; all branches are asked on the way."""
    exits = np.where(correct.any(axis=0), correct.argmax(axis=0), len(correct) - 1)
    cost = np.asarray(costs.of_exits((0.0,) * len(correct)))[exits].mean()
    return {"accuracy": 100 * float(correct.any(axis=0).mean()), "cost": float(cost)}


def rank_classes(exits: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """Find the classes that leave earliest and latest, by the mean number of their images' exits, counted from 1."""
    counts = np.bincount(labels)
    means = np.bincount(labels, weights=exits + 1.0) / np.maximum(counts, 1)
    present = np.flatnonzero(counts)
    ranked = present[np.argsort(means[present], kind="stable")]
    most = min(MOST_CLASSES_NAMED, len(ranked) // 2)
    ends = {"earliest": ranked[:most], "latest": ranked[::-1][:most]}
    return {end: [{"class": names[c], "mean_exit": float(means[c])} for c in chosen] for end, chosen in ends.items()}


@torch.inference_mode()
def time_exits(fitted: FittedExits, test: LabelledImages, batch_size: int) -> dict[str, Any]:
    """Time early exit, as asked and at the costs of the table, and each exit alone, in turns on the same batches.

    In milliseconds an image; the deepest exit alone is the plain network. None stands where no exit costs so little.
    """
    images = take(test, np.arange(0, len(test.labels), max(1, len(test.labels) // TIMED_IMAGES))[:TIMED_IMAGES])
    batches = [batch for batch, _ in _batches(fitted.model, fitted.normalisation, fitted.config, images, batch_size)]
    num_exits = len(fitted.rule.thresholds)
    alone = [exit_alone(i, num_exits) for i in range(num_exits)]
    in_table = [outcome.thresholds for outcome in fitted.table.values() if outcome is not None]
    rules = [ExitRule(fitted.rule.temperatures, thresholds) for thresholds in (*alone, *in_table)]
    passed_s, num_images = np.zeros(len(rules)), 0
    with _autocast(batches[0], fitted.config):
        for rule in rules * 2:
            _time_one(fitted.model, batches[0], rule)  # the first calls are slower
        turn = 0
        while passed_s.mean() < TIMED_S:
            batch = batches[turn % len(batches)]
            for i in range(len(rules))[:: 1 if turn % 2 else -1]:
                passed_s[i] += _time_one(fitted.model, batch, rules[i])
            num_images += len(batch)
            turn += 1
    ms = (1000 * passed_s / num_images).tolist()
    exits_ms, found = ms[:num_exits], iter(ms[num_exits:])
    table_ms = [None if outcome is None else next(found) for outcome in fitted.table.values()]
    return {
        "batch_size": batch_size,
        "num_images": num_images,
        "plain_ms": exits_ms[-1],
        "early_ms": table_ms[0],  # as asked
        "exits_ms": exits_ms,
        "table_ms": table_ms,
    }


def _time_one(model: BranchedResNet, batch: Tensor, rule: ExitRule) -> float:
    started = time.perf_counter()
    logits, _ = predict_early(model, batch, rule)
    logits.sum().item()  # waits for the device
    return time.perf_counter() - started


# ---------------------------------------------------------------- telling


def format_exits(record: Mapping[str, Any], test: Mapping[str, Any]) -> str:
    """Write what was fitted and measured, at most 80 columns wide."""
    names = [row["exit"] for row in test["exits"]]
    fitted = [
        f"fitted on {record['num_images']} {record['fitted_on']}:",
        f"{record['accuracy']:.2f} % at cost {record['cost']:.3f}; the deepest classifier alone "
        f"{record['deepest_accuracy']:.2f} % at cost 1",
    ]
    if record["fitted_on"] == SEEN:
        fitted.append(SEEN_SENTENCE)
    exits = [
        (
            row["exit"],
            f"{row['accuracy']:.2f}",
            f"{row['cost']:.3f}",
            f"{row['temperature']:.3f}",
            f"{row['ece_before']:.2f}",
            f"{row['ece']:.2f}",
            "-" if row["auroc"] is None else f"{row['auroc']:.4f}",
            f"{row['aurc']:.2f}",
            "never" if row["threshold"] > 1 else f"{row['threshold']:.4f}",
        )
        for row in test["exits"]
    ]
    times = [
        (
            str(row["batch_size"]),
            f"{row['plain_ms']:.3f}",
            f"{row['early_ms']:.3f}",
            f"{100 * (1 - row['early_ms'] / row['plain_ms']):.1f}",
        )
        for row in test["time"]
    ]
    oracle = test["oracle"]
    found = [
        f"oracle, leaving at the first exit that is right: {oracle['accuracy']:.2f} % at cost {oracle['cost']:.3f}",
        f"right at an earlier exit and wrong at {names[-1]}: {test['overthinking']:.2f} % of the images",
        *_class_lines(test["classes"]),
    ]
    parts = [
        *fitted,
        "",
        "each exit alone, on the test images; accuracy, ECE and AURC in percent:",
        text_table(
            ("exit", "accuracy", "cost", "temperature", "ECE before", "after", "AUROC", "AURC", "threshold"), exits
        ),
        "",
        "early exit, on the test images; last the percent that leaves at each exit:",
        text_table(("asked", "accuracy", "cost got", *names), list(_table_rows(test))),
        "",
        *found,
        "",
        text_table(("batch", "plain ms/image", "early exit ms/image", "time saved %"), times),
    ]
    return "\n".join(parts)


def _table_rows(test: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for row in test["table"]:
        if "accuracy" in row:
            shares = (f"{share:.1f}" for share in row["left"])
            yield row["asked"], f"{row['accuracy']:.2f}", f"{row['cost']:.3f}", *shares
        else:
            yield row["asked"], "no exit", "so cheap", *["-"] * len(test["exits"])


def _class_lines(classes: Mapping[str, Any]) -> Iterable[str]:
    for end, chosen in classes.items():
        if chosen:
            listed = ", ".join(f"{one['class']} ({one['mean_exit']:.2f})" for one in chosen)
            yield f"classes that leave {end}, with their mean exit: {listed}"
