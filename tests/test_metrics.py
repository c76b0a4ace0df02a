"""Holds byot/metrics.py to slow numpy loops over the logits of a small real network."""

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from byot.batches import DeviceImages, in_order
from byot.config import TrainConfig
from byot.data import Normalisation, load_images
from byot.loss import LossTerms
from byot.metrics import Evaluation, TrainingSums, evaluate
from byot.model import BranchedResNet
from byot.trainer import Trainer

CPU = torch.device("cpu")


class Trained(NamedTuple):
    """A network and the test images."""

    model: BranchedResNet
    images: DeviceImages
    normalisation: Normalisation

    def evaluate(self, batch_size: int) -> Evaluation:
        return evaluate(self.model, in_order(self.images, batch_size, self.normalisation), autocast_dtype=None)


@pytest.fixture(scope="module")
def trained() -> Trained:
    """A network after four epochs on the digits, sure of some answers and wrong in others, and the test images."""
    config = TrainConfig(dataset="digits", width=4, epochs=4, lr=0.05, device="cpu", precision="fp32")
    train, test = (load_images("digits", None, split) for split in ("train", "test"))
    trainer = Trainer(config, train)
    assert len(list(trainer)) == 4
    return Trained(trainer.model, DeviceImages(test, CPU), trainer.normalisation)


@pytest.fixture(scope="module")
def expected(trained: Trained) -> Evaluation:
    return slow_evaluation(trained)


def slow_evaluation(trained: Trained) -> Evaluation:
    """Image by image, bin by bin, in float64."""
    model, images = trained.model.eval(), trained.images
    with torch.inference_mode():
        outputs = [
            [z[0].double().numpy() for z in model(x).logits] for x, _ in in_order(images, 1, trained.normalisation)
        ]
    num_images = len(outputs)
    labels = images.labels.tolist()
    accuracy, nll, ece = [], [], []
    for k in range(5):
        right, negative_log_likelihood = 0, 0.0
        bins: list[list[tuple[bool, float]]] = [[] for _ in range(15)]
        for logits, label in zip(outputs, labels, strict=True):
            softmaxes = []
            for z in logits:
                e = np.exp(z - z.max())
                softmaxes.append(e / e.sum())
            p = softmaxes[k] if k < 4 else (softmaxes[0] + softmaxes[1] + softmaxes[2] + softmaxes[3]) / 4
            answer = int(p.argmax())
            right += answer == label
            negative_log_likelihood -= math.log(p[label])
            bins[min(int(p[answer] * 15), 14)].append((answer == label, float(p[answer])))
        accuracy.append(100 * right / num_images)
        nll.append(negative_log_likelihood / num_images)
        gap = 0.0
        for members in bins:
            if members:
                share_right = sum(correct for correct, _ in members) / len(members)
                confidence = sum(c for _, c in members) / len(members)
                gap += len(members) / num_images * abs(share_right - confidence)
        ece.append(100 * gap)
    return Evaluation(num_images=num_images, accuracy=tuple(accuracy), nll=tuple(nll), ece=tuple(ece))


@pytest.mark.parametrize("batch_size", [1, 7, 100, 1000])
def test_evaluation_equals_the_loop(trained, expected, batch_size):
    """Whatever the batch size; it changes no weight and no statistic."""
    assert len(set(expected.accuracy)) > 2, "a network whose classifiers all agree would test nothing"
    assert 40 < max(expected.accuracy) < 100
    before = {key: value.clone() for key, value in trained.model.train().state_dict().items()}
    found = trained.evaluate(batch_size)
    assert found.num_images == expected.num_images
    assert found.accuracy == pytest.approx(expected.accuracy, abs=1e-9)
    assert found.nll == pytest.approx(expected.nll, rel=1e-5)
    assert found.ece == pytest.approx(expected.ece, abs=1e-3)
    assert all(torch.equal(before[key], value) for key, value in trained.model.state_dict().items())


class Answers(torch.nn.Module):
    """A network that gives the logits it was built with."""

    def __init__(self, logits: list[torch.Tensor]) -> None:
        super().__init__()
        self.logits = logits
        self.computed_in: torch.dtype | None = None

    def forward(self, images: torch.Tensor) -> Any:
        self.computed_in = (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        chosen = images[:, 0, 0, 0].long()
        return SimpleNamespace(logits=tuple(z[chosen] for z in self.logits))


def test_evaluation_computes_in_the_asked_precision():
    model: Any = Answers([torch.zeros(2, 3)] * 4)
    for dtype in (None, torch.bfloat16):
        evaluate(model, [(torch.zeros(2, 3, 1, 1), torch.tensor([0, 1]))], autocast_dtype=dtype)
        assert model.computed_in == (dtype or torch.float32)


def evaluate_answers(logits: list[torch.Tensor], labels: list[int]) -> Evaluation:
    model: Any = Answers(logits)
    images = torch.arange(len(labels), dtype=torch.float32)[:, None, None, None].expand(-1, 3, 1, 1)
    return evaluate(model, [(images, torch.tensor(labels))], autocast_dtype=None)


def test_a_sure_network_is_measured_without_infinities():
    """Confidence 1 belongs to the last bin, and an answer that was given no chance costs its own logits' gap."""
    sure = torch.tensor([[200.0, 0.0], [200.0, 0.0]])
    found = evaluate_answers([sure] * 4, [0, 1])
    assert found.accuracy == (50.0,) * 5
    assert found.nll[:4] == pytest.approx((100.0,) * 4)
    assert 30 < found.nll[4] < math.inf  # the ensemble's probability underflows and is held at the smallest float
    assert found.ece == pytest.approx((50.0,) * 5)


def test_a_broken_network_gives_nan_rather_than_a_crash():
    """Weights can overflow in the very last step, after the loss was last looked at."""
    broken = torch.full((3, 4), math.nan)
    found = evaluate_answers([broken] * 4, [0, 1, 2])
    assert all(math.isnan(value) for value in found.nll)


def test_records_name_every_classifier():
    evaluation = Evaluation(num_images=3, accuracy=(1, 2, 3, 4, 5), nll=(6, 7, 8, 9, 10), ece=(11, 12, 13, 14, 15))
    record = evaluation.to_record("val")
    for measure in ("accuracy", "nll", "ece"):
        found = [record[f"val_{measure}_{end}"] for end in (1, 2, 3, 4, "ensemble")]
        assert found == list(getattr(evaluation, measure))
        assert record[f"val_{measure}"] == found[3]


def test_training_sums_are_means_over_images():
    generator = torch.Generator().manual_seed(0)
    sums = TrainingSums(4, 3, CPU)
    expected = np.zeros(1 + 4 + 3 + 3 + 4)
    num_images = 0
    for batch_size in (5, 1, 8):  # unequal batches: the mean is over images, not over batches
        terms = LossTerms(*(torch.rand(shape, generator=generator) for shape in ([], [4], [3], [3])))
        logits = tuple(torch.randn(4, batch_size, 6, generator=generator))
        labels = torch.randint(0, 6, (batch_size,), generator=generator)
        sums.add(terms, logits, labels)
        sums.num_images += len(labels)
        right = [sum(int(z[b].argmax()) == int(labels[b]) for b in range(batch_size)) for z in logits]
        parts = [float(terms.total), *terms.label.tolist(), *terms.distillation.tolist(), *terms.hint.tolist()]
        expected += np.array([batch_size * part for part in parts] + [100.0 * r for r in right])
        num_images += batch_size
    found = sums.read()
    assert [len(part) for part in found] == [1, 4, 3, 3, 4]
    assert [x for part in found for x in part] == pytest.approx(list(expected / num_images), rel=1e-6)


def test_sums_keep_no_graph_alive():
    """The reference's meters did."""
    leaf = torch.ones(4, requires_grad=True)
    sums = TrainingSums(4, 3, CPU)
    terms = LossTerms(leaf.sum(), leaf * 1, leaf[:3] * 1, leaf[:3] * 1)
    sums.add(terms, tuple(torch.zeros(4, 2, 3)), torch.tensor([0, 1]))
    assert not any(isinstance(v, torch.Tensor) and v.requires_grad for v in vars(sums).values())
