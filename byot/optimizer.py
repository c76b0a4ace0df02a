"""SGD with momentum, and Muon: the same with orthogonalised gradients for the filters of convolutions.

The class does not derive from torch.optim.Optimizer, whose first instance imports torch's compiler: that would take
every process, a search's workers too, more than a second.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from byot.config import RECIPES, TrainConfig
from byot.model import BranchedResNet

# The coefficients of Newton-Schulz's iteration: in five rounds they bring every singular value from 0.01 to 1 near 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_ROUNDS = (3, 2)
SMALL_MATRIX = 64  # rows or columns up to which float32 is faster than bfloat16 on a CPU
FILTER_STEP = 0.25  # of the learning rate: the share of its norm by which a filter bank moves in a step


class Optimizer:
    """Moves the parameters of each group along their momentum.

    `param_groups` are dicts with `params`, their `weight_decay`, and whether they are `orthogonal`: convolution weights
    [out, in, h, w] that Muon trains. Muon takes a weight as a matrix [out, h * w * in] and keeps its norm at
    sqrt(rank). It brings all singular values of the momentum (Nesterov's) near 1 and moves the weight along that by a
    quarter of the learning rate. So every direction of a filter bank learns at the same speed, and the step is relative
    to the weight, of which batch normalisation makes only the direction matter.
    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; the fixed norm is from the
    same author's airbench.
    """

    def __init__(
        self, param_groups: list[dict[str, Any]], *, lr: float, momentum: float, nesterov: bool, muon_dtype: torch.dtype
    ) -> None:
        """`muon_dtype` is what Muon multiplies matrices in."""
        self.param_groups = param_groups
        device = param_groups[0]["params"][0].device
        self.lr = torch.tensor(lr, device=device)  # to be filled anew: a step recorded as a graph reads it where it is
        self.momentum, self.nesterov, self.muon_dtype = momentum, nesterov, muon_dtype
        self._buffers: dict[Tensor, Tensor] = {}  # the momentum of each parameter that has had a gradient

    def zero_grad(self) -> None:
        for parameter in self._parameters():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["orthogonal"]:
                for weight in parameters:
                    self._orthogonal_step(weight)
                continue
            buffers = [self._buffers.get(parameter) for parameter in parameters]
            sgd(
                parameters,
                [parameter.grad for parameter in parameters],
                buffers,  # makes those that are None, unless momentum is 0
                fused=True,
                weight_decay=group["weight_decay"],
                momentum=self.momentum,
                lr=self.lr,
                dampening=0.0,
                nesterov=self.nesterov,
                maximize=False,
            )
            self._buffers |= {p: buffer for p, buffer in zip(parameters, buffers, strict=True) if buffer is not None}

    def _orthogonal_step(self, weight: Tensor) -> None:
        assert weight.grad is not None
        if weight not in self._buffers:
            self._buffers[weight] = torch.zeros_like(weight)
        momentum = self._buffers[weight]
        torch.add(weight.grad, momentum, alpha=self.momentum, out=momentum)
        gradient = weight.grad.add(momentum, alpha=self.momentum).permute(0, 2, 3, 1)  # as channels-last memory has it
        direction = orthogonalise(gradient.flatten(1), self.muon_dtype)
        weight.mul_(min(direction.shape) ** 0.5 / weight.norm())
        weight.addcmul_(direction.view(gradient.shape).permute(0, 3, 1, 2), self.lr, value=-FILTER_STEP)

    def state_dict(self) -> dict[str, Any]:
        """Give the momentum and the settings in the format of torch's optimizers, parameters by their numbers."""
        numbers = {parameter: i for i, parameter in enumerate(self._parameters())}
        settings = {"lr": float(self.lr), "momentum": self.momentum, "nesterov": self.nesterov}
        groups = [
            {**settings, **group, "params": [numbers[parameter] for parameter in group["params"]]}
            for group in self.param_groups
        ]
        buffers = {numbers[parameter]: {"momentum_buffer": buffer} for parameter, buffer in self._buffers.items()}
        return {"state": buffers, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the momentum; the settings stay those of the run's configuration.

        Raises ValueError or KeyError where the state is not that of these parameters.
        """
        parameters = dict(enumerate(self._parameters()))
        buffers = {parameters[i]: found["momentum_buffer"] for i, found in state["state"].items()}
        if any(buffer.shape != parameter.shape for parameter, buffer in buffers.items()):
            raise ValueError("the shapes of the optimizer's buffers are not those of the parameters")
        self._buffers = {parameter: buffer.to(parameter) for parameter, buffer in buffers.items()}

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


def orthogonalise(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix [M, N] with its singular vectors and all singular values near 1, from about 0.7 to 1.2.

    Each round of Newton-Schulz multiplies X [m, n], m <= n, by P = a + b G + c G G, where G = X X^T. The factors need G
    alone, and G P P is that of the next round: so X is multiplied twice only, once more than needed, as rounding errors
    of G in bfloat16 would grow from round to round. That takes half the time of a multiplication each round.
    Source: Zhang, Amsel, Chen, Dao, "Gram Newton-Schulz", 2026.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    if min(matrix.shape) <= SMALL_MATRIX:
        dtype = torch.promote_types(dtype, torch.float32)
    x = (matrix.T if is_tall else matrix).to(dtype)
    x = x / (x.norm() + 1e-7)
    for rounds in NEWTON_SCHULZ_ROUNDS:
        gram = x @ x.T
        product = factor = _polynomial(gram, a, b, c)
        for _ in range(rounds - 1):
            gram = factor @ (gram @ factor)
            factor = _polynomial(gram, a, b, c)
            product = factor @ product
        x = product @ x
    return (x.T if is_tall else x).to(matrix.dtype)


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """Return a + b G + c G G of a square matrix G."""
    result = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    result.diagonal().add_(a)
    return result


def make_optimizer(model: BranchedResNet, config: TrainConfig, autocast_dtype: torch.dtype | None) -> Optimizer:
    """Build the recipe's optimizer. The modern one has no weight decay on normalisation layers and biases."""
    is_modern = RECIPES[config.recipe].optimizer == "muon"
    groups = [{"params": list(model.parameters()), "orthogonal": False, "weight_decay": config.weight_decay}]
    if is_modern:
        filters = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m is not model.trunk.conv1]
        known = set(filters)
        others = [parameter for parameter in model.parameters() if parameter not in known]
        groups = [
            {"params": filters, "orthogonal": True, "weight_decay": 0.0},
            {"params": [p for p in others if p.ndim > 1], "orthogonal": False, "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.ndim == 1], "orthogonal": False, "weight_decay": 0.0},
        ]
    muon_dtype = autocast_dtype or torch.float32
    return Optimizer(groups, lr=config.lr, momentum=config.momentum, nesterov=is_modern, muon_dtype=muon_dtype)
