"""What a checkpoint must hold to be a run's: checked before any of it is used.

The checksum shows damage alone: a whole file may come from another version, or be made by hand.
"""

import math
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from byot.config import TrainConfig


def check_state(path: Path, state: dict[str, Any]) -> TrainConfig:
    """The settings of the run that wrote this state. Raises ValueError, naming the file, for a state no run writes."""
    try:
        config = TrainConfig.from_dict(state.get("config"))
    except ValueError as error:
        raise ValueError(f"the checkpoint {path} was not written by this project: {error}") from error
    weights = state.get("model")
    if config.loss_form == "plain" and isinstance(weights, dict) and any("branches" in str(name) for name in weights):
        raise ValueError(
            f"the checkpoint {path} is of a version that built branches for loss_form plain too: start that run anew, "
            "with --fresh or another --name"
        )
    epoch, normalisation = state.get("epoch"), state.get("normalisation")
    if not (_is_count(epoch) and epoch <= config.epochs):
        raise _wrong(path, f"its epoch is not one of the {config.epochs} of its run")
    for name in ("step", "num_train_images"):
        if not _is_count(state.get(name)):
            raise _wrong(path, f"its {name} is not a count")
    history, sums = state.get("history"), state.get("sums")
    if not (isinstance(history, list) and all(isinstance(record, dict) for record in history)):
        raise _wrong(path, "its history is not a list of records")
    if [record.get("epoch") for record in history] != list(range(1, epoch + 1)):
        raise _wrong(path, "its history is not that of the epochs it has done")
    times = [record.get("elapsed_s") for record in (state, *history)]
    if not all(_is_number(time) and time >= 0 for time in times):
        raise _wrong(path, "its times are no numbers")
    if not (isinstance(sums, dict) and _is_count(sums.get("num_images")) and _is_sums(sums.get("sums"), config)):
        raise _wrong(path, "its sums are not those of an epoch")
    if not (isinstance(normalisation, dict) and set(normalisation) == {"mean", "std"}):
        raise _wrong(path, "its normalisation is not a mean and a std")
    if not all(_is_number(value) for values in normalisation.values() for value in _three(values)):
        raise _wrong(path, "its mean and std are not three numbers each")
    if not all(value > 0 for value in normalisation["std"]):
        raise _wrong(path, "its std is not above 0")
    return config


def check_weights(path: Path, state: dict[str, Any], model: nn.Module) -> None:
    """Raise ValueError, naming the file, unless its weights are this network's in names, shapes and types."""
    if not _same_kinds(state.get("model"), model.state_dict()):
        raise _wrong(path, "its weights are not those of the network in its settings")


def check_buffers(path: Path, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError, naming the file, unless its optimiser's buffers belong to this optimiser's parameters."""
    found = state.get("optimizer")
    found = found if isinstance(found, dict) else {}
    groups = found.get("param_groups")
    expected = optimizer.state_dict()["param_groups"]
    if not (isinstance(groups, list) and len(groups) == len(expected) and all(isinstance(g, dict) for g in groups)):
        raise _wrong(path, f"its optimizer has not the {len(expected)} groups of parameters")
    for group, mine in zip(groups, expected, strict=True):
        numbers = (group.get(name) for name in ("lr", "momentum", "weight_decay"))
        if group.get("params") != mine["params"] or not all(map(_is_number, numbers)):
            raise _wrong(path, "its optimizer is of other parameters")
    buffers = found.get("state")  # none of a parameter that has not had a gradient
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    kinds = {i: {"momentum_buffer": parameter} for i, parameter in enumerate(parameters)}
    if not isinstance(buffers, dict) or not all(
        i in kinds and _same_kinds(buffer, kinds[i]) for i, buffer in buffers.items()
    ):
        raise _wrong(path, "its optimizer's buffers do not fit its parameters")


def _wrong(path: Path, what: str) -> ValueError:
    return ValueError(f"the checkpoint {path} was not written by this project: {what}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sums(value: Any, config: TrainConfig) -> bool:
    total = 1 + 2 * config.num_classifiers + config.num_students + config.num_classifiers - 1
    return isinstance(value, Tensor) and value.shape == (total,) and value.is_floating_point() and not value.is_meta


def _three(values: Any) -> Any:
    return values if isinstance(values, tuple | list) and len(values) == 3 else (None,)


def _same_kinds(found: Any, expected: dict[Any, Tensor]) -> bool:
    """Whether two dicts have the same names and, under each, tensors of the same shape, type and layout."""
    if not isinstance(found, dict) or set(found) != set(expected):
        return False
    return all(isinstance(value, Tensor) and _kind(value) == _kind(expected[name]) for name, value in found.items())


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.layout, tensor.is_meta
