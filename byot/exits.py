"""Early exit: an image leaves at the first classifier that is sure enough of it, and the later stages do not see it.

N images, B batch, C classes, K classifiers, each an exit, shallow to deep and numbered from 0; the last one is the
deepest. Costs are multiply-adds of one image, as a share of those of the plain deepest network: the trunk without
branches costs 1.
"""

import copy
import math
import shlex
import warnings
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from byot.config import NUM_CLASSIFIERS
from byot.model import BranchedResNet
from byot.search_files import is_number
from byot.system.checkpoint import list_checkpoints
from byot.system.files import UnreadableError, errors_in, read_json
from byot.system.flags import as_called

RULE_FILE = "exits.json"
NEVER = 2.0  # a threshold that no confidence reaches
TEMPERATURES = (0.05, 20.0)
TEMPERATURE_STEPS = 24  # halvings of that range, which is logarithmic: to 4e-7 of a temperature
COST_WEIGHTS = (1e-6, 1e3)  # how much accuracy, as a share, a cost of 1 is worth
COST_STEPS = 10  # halvings of the range of costs
COST_WEIGHT_STEPS = 12  # halvings of that range, which is logarithmic
ROUNDING = 1e-9  # of an accuracy in percent or a cost that is compared with its limit
MOST_SWEEPS = 20  # over the exits, until no threshold changes; two to five in practice


class ExitRule(NamedTuple):
    """Where an image leaves: K numbers each."""

    temperatures: tuple[float, ...]  # the logits are divided by it before the softmax
    # An image leaves at the first exit whose confidence, its largest probability, reaches the threshold; the last is 0.
    # Above 1 nobody asks that exit, and its branch is not run.
    thresholds: tuple[float, ...]


def load_rule(folder: Path) -> ExitRule | None:
    """Read the rule of a run's folder, None where none was made. Raises ValueError where the file is damaged."""
    path = folder / RULE_FILE
    if not path.is_file():
        return None
    record = read_json(path)
    with errors_in(path):
        rule = ExitRule(*(_read_numbers(record.get(name), name) for name in ExitRule._fields))
        for name, values in rule._asdict().items():
            if len(values) != NUM_CLASSIFIERS:
                raise ValueError(f"{name} must be {NUM_CLASSIFIERS} numbers, one for each exit, not {len(values)}")
        if min(rule.temperatures) <= 0:
            raise ValueError(f"temperatures must be above 0, not {min(rule.temperatures):g}")
        if rule.thresholds[-1] != 0:
            raise ValueError(f"the last threshold must be 0, not {rule.thresholds[-1]:g}")
    return rule


def exits_command(run: Path | str) -> str:
    """Write the command that fits and measures the exits of a run, given by name, folder or checkpoint."""
    return as_called(f"python byot/evaluate.py {shlex.quote(str(run))} --exits")


def describe_age(folder: Path, record: Mapping[str, Any], used: Path | None = None) -> str | None:
    """Say so, in a sentence, where a record of a run's exits is of another checkpoint than `used`, else the newest."""
    checkpoint = used or next(iter(list_checkpoints(folder / "checkpoints")), None)
    if checkpoint is None or record.get("checkpoint") in (None, checkpoint.name):
        return None
    is_this = "the network is that of" if used else "the run's newest checkpoint is"
    command = exits_command(used or folder)
    return f"the exits were fitted on {record['checkpoint']} and {is_this} {checkpoint.name}: {command} fits them again"


def warn_of_age(folder: Path, used: Path | None = None) -> None:
    """Warn where a run's exits.json is of another checkpoint than `used`, else its newest; damaged, it is ignored."""
    with suppress(UnreadableError):
        if age := describe_age(folder, read_json(folder / RULE_FILE), used):
            warnings.warn(age, stacklevel=2)


def _read_numbers(values: Any, name: str) -> tuple[float, ...]:
    if not isinstance(values, list) or not values or not all(map(is_number, values)):
        raise ValueError(f"{name} must be numbers, not {values!r:.40}")
    return tuple(map(float, values))


# ---------------------------------------------------------------- prediction


@torch.inference_mode()
def predict_early(model: BranchedResNet, images: Tensor, rule: ExitRule) -> tuple[Tensor, Tensor]:
    """Classify normalised images [B, 3, H, W]; a later stage runs on those that go on, and on nothing once none does.

    The network is in evaluation mode. Returns the logits [B, C] of the exit that answered, as the classifier gave them,
    and its number [B]. Where no early exit is asked, they are those of `model(images)` to the last bit.
    """
    rows = torch.arange(len(images), device=images.device)  # those that go on
    answers: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, logits, exit
    x = model.trunk.stem(images)
    stages = model.trunk.stages()
    assert len(rule.thresholds) == len(rule.temperatures) == len(stages)
    for i, (stage, temperature, threshold) in enumerate(zip(stages, *rule, strict=True)):
        x = stage(x)
        if threshold > 1:
            continue
        logits, _ = model.classify(i, x)
        leaves = confidences(logits, temperature) >= threshold
        if i == len(stages) - 1:
            leaves = torch.ones_like(leaves)  # whatever the confidence is, NaN even
        leaving, staying = leaves.nonzero()[:, 0], (~leaves).nonzero()[:, 0]
        if len(leaving) > 0:
            answers.append((rows[leaving], logits[leaving], torch.full_like(leaving, i)))
            if len(staying) == 0:
                break
            rows, x = rows[staying], x[staying]  # which, unlike index_select, keeps channels last in memory
    answered, logits, exits = (torch.cat(parts) for parts in zip(*answers, strict=True))
    order = answered.argsort()
    return logits[order], exits[order]


def confidences(logits: Tensor, temperatures: float | Tensor) -> Tensor:
    """Compute the largest probability of the softmax at a temperature: [..., C] -> [...]."""
    return (logits.float() / temperatures).softmax(dim=-1).amax(dim=-1)


def exit_alone(i: int, num_exits: int) -> tuple[float, ...]:
    """Make the thresholds by which all images leave at exit i, the first that is asked."""
    return (NEVER,) * i + (0.0,) * (num_exits - i)


def find_exits(confidence: np.ndarray, thresholds: tuple[float, ...]) -> np.ndarray:
    """Find where images leave whose confidence [K, N] is known: [N]."""
    reached = confidence >= np.asarray(thresholds, dtype=confidence.dtype)[:, None]
    reached[-1] = True
    return reached.argmax(axis=0)


# ---------------------------------------------------------------- cost


class ExitCosts(NamedTuple):
    """Multiply-adds of the convolutions and linear layers for one image, K numbers each."""

    stages: tuple[int, ...]  # the first has the stem too
    classifiers: tuple[int, ...]  # the branches, then the last linear layer

    @property
    def plain(self) -> int:
        """Multiply-adds of the network without branches, whose cost is 1."""
        return sum(self.stages) + self.classifiers[-1]

    def of_exits(self, thresholds: tuple[float, ...]) -> tuple[float, ...]:
        """Compute the cost of leaving at each exit: the trunk up to there and all branches asked on the way."""
        asked = np.asarray(thresholds) <= 1
        costs = np.cumsum(self.stages) + np.cumsum(np.where(asked, self.classifiers, 0))
        return tuple((costs / self.plain).tolist())

    def alone(self) -> tuple[float, ...]:
        """Compute the cost of each exit where all images leave there and no other is asked."""
        costs = np.cumsum(self.stages) + np.asarray(self.classifiers)
        return tuple((costs / self.plain).tolist())

    def check_target(self, target_cost: float) -> None:
        """Raise ValueError for a mean cost below that of the cheapest exit."""
        least = min(self.alone())
        if target_cost < least:
            told = math.ceil(1000 * least) / 1000  # rounded down it would be refused
            raise ValueError(f"target_cost must be at least {told:.3f}, the cost of the cheapest exit")


@torch.inference_mode()
def measure_costs(model: BranchedResNet, image_size: int) -> ExitCosts:
    """Count the multiply-adds for an image of so many pixels a side, from the shapes of what the layers give.

    A copy runs on one black image: the first use of torch's meta device takes seconds.
    """
    model = copy.deepcopy(model).eval()
    done = 0

    def count(layer: Any, _: Any, output: Tensor) -> None:
        nonlocal done
        done += output.numel() * layer.weight[0].numel()  # what is added up for each output

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    after = [0]  # each stage, each classifier
    x = model.trunk.stem(torch.zeros(1, 3, image_size, image_size, device=model.trunk.fc.weight.device))
    for i, stage in enumerate(model.trunk.stages()):
        x = stage(x)
        after.append(done)
        model.classify(i, x)
        after.append(done)
    parts = [end - start for start, end in pairwise(after)]
    return ExitCosts(tuple(parts[::2]), tuple(parts[1::2]))


# ---------------------------------------------------------------- fitting


def fit_temperatures(logits: Tensor, labels: Tensor) -> tuple[float, ...]:
    """Find for each exit the temperature between 0.05 and 20 at which its NLL is least: logits [K, N, C], labels [N].

    The NLL is convex in the inverse temperature, whose slope's sign halves the range (Guo et al., 2017).
    """
    logits = logits.float()
    target = logits.gather(2, labels.expand(len(logits), -1)[..., None])[..., 0].mean(dim=1)  # [K]
    low, high = (torch.full_like(target, -math.log(bound)) for bound in reversed(TEMPERATURES))
    for _ in range(TEMPERATURE_STEPS):
        middle = (low + high) / 2  # the logarithm of the inverse temperature
        probabilities = (logits * middle.exp()[:, None, None]).softmax(dim=2)
        slope = (probabilities * logits).sum(dim=2).mean(dim=1) - target
        low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
    return tuple((-(low + high) / 2).exp().tolist())


class Outcome(NamedTuple):
    """What thresholds come to on images whose answers are known."""

    thresholds: tuple[float, ...]
    accuracy: float  # percent
    cost: float  # the mean


class Answers(NamedTuple):
    """What every exit says of N images."""

    confidence: np.ndarray  # float32 [K, N]
    correct: np.ndarray  # [K, N]: bool, or how likely the answer is right

    def choose(self, images: slice) -> Self:
        return type(self)(*(part[:, images] for part in self))

    def judge(self, thresholds: tuple[float, ...], costs: ExitCosts) -> Outcome:
        """Measure what these thresholds come to."""
        exits = find_exits(self.confidence, thresholds)
        accuracy = 100 * float(self.correct[exits, np.arange(len(exits))].mean())
        return Outcome(thresholds, accuracy, float(np.asarray(costs.of_exits(thresholds))[exits].mean()))


def fit_to_cost(answers: Answers, costs: ExitCosts, target_cost: float) -> Outcome:
    """Find the thresholds of the best accuracy to be expected at a mean cost, of answers at fitted temperatures.

    Each answer counts as right by its confidence, which a temperature has made a probability, and not by its label.
    Labels are noise here: thresholds that are best for some thousand of them are worse on other images.
    """
    expected = Answers(answers.confidence, answers.confidence.astype(float))
    return answers.judge(fit_thresholds(expected, costs, target_cost).thresholds, costs)


def fit_to_drop(answers: Answers, costs: ExitCosts, max_drop: float) -> Outcome:
    """Find the least cost whose thresholds lose at most so many points of accuracy to the deepest classifier.

    Beside the temperatures of the answers the cost is the one number that is fitted to labels. Bisection finds it, as
    if accuracy never fell as cost grows: where it does, the cost found keeps to the drop but may not be the least.
    """
    num_exits = len(answers.confidence)
    found = answers.judge(exit_alone(num_exits - 1, num_exits), costs)
    floor = found.accuracy - max_drop - ROUNDING
    low, high = min(costs.alone()), 1.0
    for _ in range(COST_STEPS):
        middle = (low + high) / 2
        outcome = fit_to_cost(answers, costs, middle)
        if outcome.accuracy >= floor:
            found, high = outcome, middle
        else:
            low = middle
    return found


def fit_thresholds(answers: Answers, costs: ExitCosts, target_cost: float) -> Outcome:
    """Find the best accuracy at a mean cost of at most `target_cost`.

    For each set of exits that may be asked, accuracy - weight * cost is raised by coordinate ascent and the weight
    found by bisection. The costs that this reaches have gaps between them: what is left of the limit is then spent by
    coordinate ascent within it. Raises ValueError for a target below the cheapest exit.
    """
    costs.check_target(target_cost)
    limit = target_cost + ROUNDING
    order = np.argsort(-answers.confidence, axis=1, kind="stable")
    found: list[Outcome] = []
    for asked in product((False, True), repeat=len(order) - 1):
        kept: Outcome | None = None
        low, high = map(math.log, COST_WEIGHTS)
        for _ in range(COST_WEIGHT_STEPS):
            weight = math.exp((low + high) / 2)
            start = exit_alone(len(asked), len(order))
            outcome = _ascend(answers, order, costs, asked, start, weight)
            if outcome.cost <= limit:
                kept, high = outcome, math.log(weight)
            else:
                low = math.log(weight)
        if kept is not None:
            found.append(_ascend(answers, order, costs, asked, kept.thresholds, COST_WEIGHTS[0], limit))
    return max(found, key=lambda outcome: (outcome.accuracy, -outcome.cost))


def cross_fitted_accuracy(answers: Answers, costs: ExitCosts, target_cost: float) -> float:
    """Measure the accuracy, in percent, at a mean cost: each half of N > 1 images with thresholds fitted on the other.

    The halves are the images of even and of odd place. Where no exit costs so little, the target is the cheapest
    exit's cost.
    """
    halves = [answers.choose(slice(place, None, 2)) for place in (0, 1)]
    target_cost = max(target_cost, min(costs.alone()))
    right = 0.0
    for fitted_on, judged in (halves, reversed(halves)):
        thresholds = fit_thresholds(fitted_on, costs, target_cost).thresholds
        right += judged.judge(thresholds, costs).accuracy * judged.correct.shape[1]
    return right / answers.correct.shape[1]


def _ascend(
    answers: Answers,
    order: np.ndarray,
    costs: ExitCosts,
    asked: tuple[bool, ...],
    start: tuple[float, ...],
    weight: float,
    limit: float = math.inf,
) -> Outcome:
    """Raise accuracy - weight * cost, one threshold after the other, each to its best given the others.

    `order` has each exit's images by falling confidence. The exits are taken from deep to shallow: what becomes of the
    images that go on is known by then, and which images come depends on the shallower exits alone. No step
    goes beyond a mean cost of `limit`, which the start keeps.
    """
    confidence, correct = answers
    stage_costs, classifier_costs = (np.asarray(part) / costs.plain for part in costs)
    thresholds = start
    for _ in range(MOST_SWEEPS):
        before = thresholds
        come = [np.ones(len(order[0]), dtype=bool)]  # to each exit
        for row, threshold in zip(confidence[:-1], thresholds[:-1], strict=True):
            come.append(come[-1] & (row < threshold))
        right = correct[-1].astype(float)  # what becomes of an image that goes on from exit i, and its cost from there
        cost = np.full(len(right), classifier_costs[-1] + stage_costs[-1])
        for i in reversed(range(len(asked))):
            if asked[i]:
                without = (*thresholds[:i], NEVER, *thresholds[i + 1 :])
                rows = order[i][come[i][order[i]]]
                gained = np.cumsum(correct[i][rows] - right[rows])  # if so many of the surest leave
                saved = np.cumsum(cost[rows]) - classifier_costs[i] * len(rows)
                value, never = gained + weight * saved, 0.0
                if limit < math.inf:
                    mean_cost = answers.judge(without, costs).cost
                    value[mean_cost - saved / len(right) > limit] = -math.inf
                    never = 0.0 if mean_cost <= limit else -math.inf
                threshold = _best_threshold(confidence[i][rows], value, never)
                thresholds = (*thresholds[:i], threshold, *thresholds[i + 1 :])
                leaves = confidence[i] >= threshold
                right = np.where(leaves, correct[i], right)
                cost = np.where(leaves, 0.0, cost) + (classifier_costs[i] if threshold <= 1 else 0.0)
            cost = cost + stage_costs[i]
        if thresholds == before:
            break
    return answers.judge(thresholds, costs)


def _best_threshold(confidence: np.ndarray, value: np.ndarray, never: float) -> float:
    """Find the threshold of the greatest value, from images by falling confidence and the values if so many leave.

    It lies halfway between the last that leaves and the first that stays; equals leave together. `never` is the value
    if none leaves.
    """
    if len(value) == 0:
        return NEVER
    value[:-1][confidence[:-1] == confidence[1:]] = -math.inf
    last = int(value.argmax())
    if value[last] <= never:
        return NEVER
    if last == len(value) - 1:
        return 0.0
    halfway = (confidence[last] + confidence[last + 1]) / 2
    return float(halfway if halfway > confidence[last + 1] else confidence[last])
