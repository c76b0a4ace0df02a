"""Holds byot/loss.py to the plain loops of tests/reference.py, values and gradients, and to what DESIGN says of it.

B batch, C classes, D feature width, K classifiers, shallow to deep.
"""

import math
import random
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch

from byot.loss import self_distillation_loss
from byot.model import BranchOutputs
from tests.reference import Sized, reference_loss

NUM_CASES = 100
EDGE_BATCH_SIZES = (1, 2, 127, 128, 129, 257)
MAX_NUMBERS = 5000  # in the logits of one case: the loops are slow


class Case(NamedTuple):
    outputs: BranchOutputs  # float32
    labels: torch.Tensor
    weights: dict[str, Any]


def random_outputs(generator: torch.Generator, k: int, b: int, c: int, d: int, scale: float = 1.0) -> BranchOutputs:
    logits = torch.randn(k, b, c, generator=generator) * scale
    features = torch.randn(k, b, d, generator=generator).relu() * scale  # features follow a ReLU
    return BranchOutputs(tuple(logits), tuple(features))


def as_leaves(outputs: BranchOutputs, dtype: torch.dtype) -> BranchOutputs:
    logits, features = ([x.detach().to(dtype).clone().requires_grad_() for x in part] for part in outputs)
    return BranchOutputs(tuple(logits), tuple(features))


def gradient(leaf: torch.Tensor) -> torch.Tensor:
    """With the plain form the features have no part in the loss."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def draw_case(number: int) -> Case:
    rng = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    k = rng.randint(2, 5)
    # every edge with few classes, then one image with very many, then anything
    b = EDGE_BATCH_SIZES[number] if number < len(EDGE_BATCH_SIZES) else rng.randint(1, 257)
    if len(EDGE_BATCH_SIZES) <= number < 40:
        b = rng.randint(1, 8)
    c = min(rng.randint(2, 100), max(2, MAX_NUMBERS // (k * b)))
    d = min(rng.randint(1, 64), max(1, MAX_NUMBERS // (k * b)))
    weights = {
        "alpha": {0: 0.0, 1: 1.0}.get(number % 10, rng.random()),
        "temperature": math.exp(rng.uniform(math.log(0.5), math.log(10))),
        "beta": {0: 0.0, 1: 1.0}.get(number % 7, 10 ** rng.uniform(-7, 0)),
        "label_smoothing": 0.1 if number % 4 == 3 else 0.0,
    }
    outputs = random_outputs(generator, k, b, c, d, scale=rng.uniform(0.3, 3))
    return Case(outputs, torch.randint(0, c, (b,), generator=generator), weights)


def relative_error(found: torch.Tensor, expected: Sized, *, plain: bool) -> float:
    """Largest absolute error over the largest magnitude: of the result (`plain`) or of what it was summed from.

    A result of nothing but zeros must be met exactly.
    """
    error = (found.detach().double().flatten() - torch.tensor(expected.values, dtype=torch.float64)).abs().max().item()
    size = max(map(abs, expected.values)) if plain else expected.size
    return error / size if size else (0.0 if error == 0 else math.inf)


@pytest.mark.parametrize(
    ("loss_form", "teacher"),
    [*product(["reference", "paper", "plain"], ["deepest"]), *product(["reference", "paper"], ["ensemble"])],
)
def test_values_and_gradients_equal_the_loops(loss_form, teacher):
    seen = set()
    for number in range(NUM_CASES):
        case = draw_case(number)
        seen.add((len(case.outputs.logits), len(case.labels), case.weights["alpha"], case.weights["beta"]))
        how = {"loss_form": loss_form, "teacher": teacher, **case.weights}
        logits, features = ([x.tolist() for x in part] for part in case.outputs)
        expected = reference_loss(logits, features, case.labels.tolist(), **how)
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            outputs = as_leaves(case.outputs, dtype)
            terms = self_distillation_loss(outputs, case.labels, **how)
            terms.total.backward()
            pairs = [
                *zip(terms, expected[:4], strict=True),
                *zip(map(gradient, outputs.logits), expected.logit_gradients, strict=True),
                *zip(map(gradient, outputs.features), expected.feature_gradients, strict=True),
            ]
            errors = [relative_error(f, e, plain=dtype is torch.float64) for f, e in pairs]
            assert all(f.dtype == dtype for f, _ in pairs)
            assert max(errors) <= tolerance, f"case {number}, {dtype}: {errors}"
    # the cases are what they are meant to be
    num_classifiers, batch_sizes, alphas, betas = (set(column) for column in zip(*seen, strict=True))
    assert num_classifiers == {2, 3, 4, 5}
    assert batch_sizes >= set(EDGE_BATCH_SIZES)
    assert {0.0, 1.0} <= alphas
    assert 0.0 in betas


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_taken_to_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    half = as_leaves(random_outputs(generator, 4, 16, 10, 6, scale=3), dtype)
    labels = torch.randint(0, 10, (16,), generator=generator)
    terms = self_distillation_loss(half, labels, alpha=0.3, temperature=3, beta=0.01)
    full = BranchOutputs(*(tuple(x.detach().float() for x in part) for part in half))
    expected = self_distillation_loss(full, labels, alpha=0.3, temperature=3, beta=0.01)
    for a, b in zip(terms, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    terms.total.backward()
    assert all(x.grad is not None and x.grad.dtype == dtype for x in half.logits)


def test_weights_out_of_range_are_refused():
    outputs, labels = random_outputs(torch.Generator(), 4, 2, 7, 5), torch.tensor([0, 1])
    for name, value in (("alpha", 1.001), ("temperature", 0.0), ("beta", math.nan)):
        weights: dict[str, Any] = {"alpha": 0.1, "temperature": 3.0, "beta": 1e-6, name: value}
        with pytest.raises(ValueError, match=f"^{name} must"):
            self_distillation_loss(outputs, labels, **weights)
