"""Each recipe's optimizer: torch's SGD, or SGD whose filters step by orthogonalised gradients (Muon).

torch's SGD comes without torch's compiler, whose import takes every process, a search's workers too, over a second:
torch.optim imports the compiler when it is first used, only to keep itself out of what is compiled.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from byot.config import RECIPES, TrainConfig
from byot.model import BranchedResNet

DISABLED = "__dynamo_disable"  # attribute of a function: what to call in its place, so that it is not compiled
# Of Newton and Schulz's iteration: they bring every singular value from 0.01 to 1 near 1 in five rounds.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_ROUNDS = 5
FILTER_STEP = 0.25  # of the learning rate: by what share of its norm a filter bank moves in a step


class SGD(torch.optim.SGD):
    """The same steps and the same state."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))  # without what imports the compiler around it


class Muon(SGD):
    """SGD but for the groups marked `orthogonal`, of convolution weights [out, in, h, w].

    Each of those is taken as a matrix [out, in * h * w] with its norm kept at sqrt(rank). It moves along its momentum
    (Nesterov's), all of whose singular values have been brought near 1, by a quarter of the learning rate: every
    direction of a filter bank learns at the same speed, and the step is relative to the weights, as batch normalisation
    makes only their direction matter. They have no weight decay: their norm is fixed.
    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; the fixed norm as in the
    same author's airbench.
    """

    def __init__(self, groups: list[dict[str, Any]], *, product_dtype: torch.dtype, **settings: Any) -> None:
        """`product_dtype` is what the products of matrices are computed in."""
        super().__init__(groups, **settings)
        self.product_dtype = product_dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["orthogonal"]:
                for weight in group["params"]:
                    self._orthogonal_step(weight, group)
        super().step()  # skips what has no gradient

    def _orthogonal_step(self, weight: Tensor, group: dict[str, Any]) -> None:
        gradient = weight.grad
        if gradient is None:
            return
        state = self.state[weight]  # made by asking for it
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        direction = orthogonalise(gradient.add(momentum, alpha=group["momentum"]).flatten(1), self.product_dtype)
        rank = min(direction.shape)
        weight.mul_(rank**0.5 / weight.norm())
        weight.sub_(direction.view(weight.shape) * (FILTER_STEP * group["lr"]))
        weight.grad = None


def orthogonalise(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix [M, N] with its singular vectors and all of its singular values near 1, between about 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix).to(dtype)
    x = x / (x.norm() + 1e-7)
    for _ in range(NEWTON_SCHULZ_ROUNDS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if is_tall else x).to(matrix.dtype)


def make_optimizer(model: BranchedResNet, config: TrainConfig, autocast_dtype: torch.dtype | None = None) -> SGD:
    """The recipe's optimizer. The modern one has no weight decay on normalisation layers and biases."""
    settings: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "fused": True}
    if RECIPES[config.recipe].optimizer == "sgd":
        return SGD(model.parameters(), weight_decay=config.weight_decay, **settings)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m is not model.trunk.conv1]
    filters = [convolution.weight for convolution in convolutions]
    known = set(filters)
    others = [parameter for parameter in model.parameters() if parameter not in known]
    groups = [
        {"params": filters, "orthogonal": True, "weight_decay": 0.0},
        {"params": [p for p in others if p.ndim > 1], "orthogonal": False, "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim == 1], "orthogonal": False, "weight_decay": 0.0},
    ]
    return Muon(groups, product_dtype=autocast_dtype or torch.float32, nesterov=True, **settings)


def leave_compiler_unimported() -> None:
    """Put in place what optimizers would find after the import; where torch has changed, nothing happens."""
    for method in vars(torch.optim.Optimizer).values():
        wrapped = getattr(method, "__wrapped__", None)
        if wrapped is not None and not hasattr(wrapped, DISABLED):
            setattr(wrapped, DISABLED, wrapped)


leave_compiler_unimported()
