"""Measures a network: sums are kept on the device and read once an epoch.

B batch, C classes, K classifiers, shallow to deep; K = 1 is the deepest alone, which has no ensemble. S classifiers are
taught: K - 1, or K where the ensemble teaches. Accuracies are percent, NLL is nats an image, ECE is percent.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from byot.config import exit_numbers
from byot.exits import Answers, ExitCosts, cross_fitted_accuracy
from byot.loss import LossTerms
from byot.model import BranchedResNet
from byot.system.distributed import ALONE, Processes

ECE_BINS = 15
EXIT_COST = 0.5  # mean cost at which early exit is measured; the plain deepest network costs 1


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracy, negative log-likelihood and expected calibration error of the K classifiers, then of the ensemble.

    Each tuple has K + 1 numbers, or one where K is 1: there is no ensemble then.
    """

    num_images: int
    accuracy: tuple[float, ...]  # percent
    nll: tuple[float, ...]  # nats
    ece: tuple[float, ...]  # percent
    exit_accuracy: float | None = None  # percent, of early exit at half the cost; None where it was not measured

    def to_record(self, prefix: str) -> dict[str, float]:
        """Name the numbers `val_accuracy_1` to `val_accuracy_4` and `val_accuracy_ensemble`.

        `val_accuracy` is the deepest classifier's, which is number 4 also where it is alone. Of several classifiers
        `val_accuracy_mean` is the mean, without the ensemble, and `val_exit_accuracy` is that of early exit.
        """
        record: dict[str, float] = {}
        for measure in ("accuracy", "nll", "ece"):
            values = getattr(self, measure)
            classifiers, ensemble = (values, ()) if len(values) == 1 else (values[:-1], values[-1:])
            record[f"{prefix}_{measure}"] = classifiers[-1]
            record |= {f"{prefix}_{measure}_{i}": value for i, value in numbered(classifiers)}
            record |= {f"{prefix}_{measure}_ensemble": value for value in ensemble}
        if len(self.accuracy) > 1:
            record[f"{prefix}_accuracy_mean"] = fmean(self.accuracy[:-1])
        if self.exit_accuracy is not None:
            record[f"{prefix}_exit_accuracy"] = self.exit_accuracy
        return record


def numbered(classifiers: tuple[float, ...]) -> Iterable[tuple[int, float]]:
    """Number K values as the stages that their classifiers follow: the last one is always 4."""
    return zip(exit_numbers(len(classifiers)), classifiers, strict=True)


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """One epoch: the training losses and accuracies while it ran, and the validation after it where there is one."""

    epoch: int  # from 1
    lr: float  # of the last step
    loss: float
    label: tuple[float, ...]  # K
    distillation: tuple[float, ...]  # S
    hint: tuple[float, ...]  # K-1
    accuracy: tuple[float, ...]  # K, percent, on the augmented batches as they were trained on
    val: Evaluation | None
    elapsed_s: float
    images_per_s: float  # of training alone

    def to_record(self) -> dict[str, Any]:
        """Make the flat dict that metrics.jsonl, TensorBoard and a trial's report hold."""
        record: dict[str, Any] = {"epoch": self.epoch, "lr": self.lr, "train_loss": self.loss}
        for name in ("label", "accuracy"):
            record |= {f"train_{name}_{i}": value for i, value in numbered(getattr(self, name))}
        for name in ("distillation", "hint"):
            record |= {f"train_{name}_{i}": value for i, value in enumerate(getattr(self, name), start=1)}
        if self.val is not None:
            record |= self.val.to_record("val")
        return record | {"elapsed_s": self.elapsed_s, "images_per_s": self.images_per_s}


class TrainingSums:
    """Adds up all loss terms and correct answers over an epoch's images, in one tensor on the device.

    The tensor stays the same, so that a step recorded as a CUDA graph can add to it. Each of several processes adds up
    its own images; what is read is the sum over all.
    """

    def __init__(
        self, num_classifiers: int, num_students: int, device: torch.device, processes: Processes = ALONE
    ) -> None:
        self._sizes = [1, num_classifiers, num_students, num_classifiers - 1, num_classifiers]
        self._sums = torch.zeros(sum(self._sizes), dtype=_sum_dtype(device), device=device)
        self._processes = processes
        self.num_images = 0  # over all processes; whoever calls `add` counts them: a replayed graph runs no Python

    def reset(self) -> None:
        self._sums.zero_()
        self.num_images = 0

    def add(self, terms: LossTerms, logits: tuple[Tensor, ...], labels: Tensor) -> None:
        """Add a batch, its terms being means over it."""
        with torch.no_grad():
            correct = (torch.stack(logits).argmax(dim=2) == labels).float().mean(dim=1)  # [K]
            batch = torch.cat([terms.total[None], terms.label, terms.distillation, terms.hint, correct])
            self._sums += batch * len(labels)

    def read_loss(self) -> float:
        """Read the mean total loss so far, which stays NaN or infinite once a step's was; waits for the device."""
        return self._processes.all_reduce_sum(self._sums[0]).item() / self.num_images

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._processes.all_reduce_sum(self._sums).cpu(), "num_images": self.num_images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up saved sums. Raises ValueError where they are of other classifiers."""
        if state["sums"].shape != self._sums.shape:
            raise ValueError(f"its sums over an epoch are {len(state['sums'])} numbers, not {len(self._sums)}")
        self.reset()
        if self._processes.is_first:
            self._sums.copy_(state["sums"])
        self.num_images = state["num_images"]

    def read(self) -> tuple[tuple[float, ...], ...]:
        """Read the means: (total,), label [K], distillation [S], hint [K-1], accuracy [K] in percent."""
        means = self._processes.all_reduce_sum(self._sums).cpu() / self.num_images
        total, label, distillation, hint, correct = means.split(self._sizes)
        parts = (total, label, distillation, hint, correct * 100)
        return tuple(tuple(part.tolist()) for part in parts)


@torch.inference_mode()
def evaluate(
    model: BranchedResNet,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    autocast_dtype: torch.dtype | None,
    costs: ExitCosts | None = None,
    processes: Processes = ALONE,
) -> Evaluation:
    """Run the network over the batches of all processes. The ensemble is the mean of the K softmaxes, where K > 1.

    Given the costs of the exits, K > 1, early exit is measured too, at half the cost and without temperatures.
    ECE: predictions go into 15 equal bins of confidence; sum over bins of |accuracy - mean confidence| times the bin's
    share of the images (Guo et al., 2017).
    """
    model.eval()
    sums: Tensor | None = None  # [K+1, 2 + bins]: correct, nll, then per bin correct - confidence
    seen = 0
    answers: list[tuple[Tensor, Tensor]] = []  # of each batch: confidence and correctness [K, B]
    for images, labels in batches:
        with torch.autocast(images.device.type, autocast_dtype, enabled=autocast_dtype is not None):
            logits = torch.stack(model(images).logits)  # [K, B, C]
        log_probabilities = logits.float().log_softmax(dim=2)
        probabilities = log_probabilities.exp()
        if len(logits) > 1:
            ensemble = probabilities.mean(dim=0, keepdim=True)
            probabilities = torch.cat([probabilities, ensemble])  # [K+1, B, C]
            log_probabilities = torch.cat([log_probabilities, ensemble.clamp_min(1e-38).log()])
        confidence, predicted = probabilities.max(dim=2)  # [K+1, B]
        correct = (predicted == labels).float()
        target = labels.expand_as(predicted)[..., None]
        nll = -log_probabilities.gather(2, target)[..., 0]
        bins = (confidence.nan_to_num() * ECE_BINS).long().clamp(max=ECE_BINS - 1)
        gaps = torch.zeros(len(bins), ECE_BINS, device=bins.device).scatter_add_(1, bins, correct - confidence)
        batch = torch.cat([correct.sum(1, keepdim=True), nll.sum(1, keepdim=True), gaps], dim=1)
        sums = batch.to(_sum_dtype(batch.device)) if sums is None else sums + batch
        seen += len(labels)
        if costs is not None:
            answers.append((confidence[:-1].nan_to_num(), correct[:-1] > 0))
    assert sums is not None, "no images to evaluate"
    num_images = int(processes.all_reduce_sum(torch.tensor(seen, device=sums.device)))
    sums = processes.all_reduce_sum(sums).cpu() / num_images
    return Evaluation(
        num_images=num_images,
        accuracy=tuple((sums[:, 0] * 100).tolist()),
        nll=tuple(sums[:, 1].tolist()),
        ece=tuple((sums[:, 2:].abs().sum(dim=1) * 100).tolist()),
        exit_accuracy=None if costs is None else _exit_accuracy(answers, costs, processes),
    )


def _exit_accuracy(answers: list[tuple[Tensor, Tensor]], costs: ExitCosts, processes: Processes) -> float | None:
    """Bring the answers to all batches together, in the images' order; None of a single image, which has no halves."""
    mine = tuple(torch.cat(part, dim=1).cpu() for part in zip(*answers, strict=True))
    confidence, correct = (torch.cat(part, dim=1).numpy() for part in zip(*processes.all_gather(mine), strict=True))
    return cross_fitted_accuracy(Answers(confidence, correct), costs, EXIT_COST) if correct.shape[1] > 1 else None


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
