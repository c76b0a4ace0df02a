"""The three losses of self distillation.

B batch, C classes, D feature width, K classifiers, ordered shallow to deep: [-1] is the deepest, the teacher.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from byot.config import ALPHA, BETA, TEMPERATURE, LossForm, Teacher, check_range
from byot.model import BranchOutputs

HINT_BATCH_SIZE = 128  # the batch size at which the reference quotes beta


class LossTerms(NamedTuple):
    """The total to minimise and its unweighted parts, each a batch mean, shallow to deep."""

    total: Tensor  # []
    label: Tensor  # [K]
    distillation: Tensor  # [K-1], [K] where the ensemble teaches
    hint: Tensor  # [K-1]


def self_distillation_loss(
    outputs: BranchOutputs,
    labels: Tensor,  # [B]
    *,
    alpha: float,
    temperature: float,
    beta: float,
    loss_form: LossForm = "reference",
    label_smoothing: float = 0.0,
    teacher: Teacher = "deepest",
) -> LossTerms:
    """Weigh the label, distillation and hint losses of all classifiers into one total.

    With logits z_i and pooled features f_i of classifier i, K the deepest, detached wherever it teaches:

        label_i        = mean_b CE(z_i, y)
        distillation_i = T^2 mean_b KL(softmax(z_K / T) || softmax(z_i / T))      i < K
        hint_i         = 128 mean_b sum_d (f_i,d - f_K,d)^2                       i < K
        total          = (1 - alpha) sum_i label_i + alpha sum_i distillation_i + beta sum_i hint_i

    `loss_form="paper"` keeps weight 1 on label_K. With "plain" the total is label_K alone: the trunk is trained as an
    ordinary ResNet, the baseline. `teacher="ensemble"` puts the mean of all logits, detached, in the place of z_K in
    every distillation_i and adds distillation_K: the deepest classifier learns from it too. `label_smoothing` e mixes
    the labels with e / C for every class, in label_i alone. All terms are in nats but the hint. Half-precision inputs
    are taken to float32 first.

    Raises ValueError for alpha outside [0, 1], temperature <= 0 or beta < 0.
    Source: Zhang et al., ICCV 2019, section 3; weights and the hint's scale from luanyunteng's implementation; the
    ensemble as teacher from Lee et al., "Students are the best teacher", 2021.
    """
    check_range("alpha", alpha, **ALPHA)
    check_range("temperature", temperature, **TEMPERATURE)
    check_range("beta", beta, **BETA)
    logits = _at_least_float32(torch.stack(outputs.logits))  # [K, B, C]
    features = _at_least_float32(torch.stack(outputs.features))  # [K, B, D]
    num_classifiers, batch_size, _ = logits.shape

    label = F.cross_entropy(
        logits.flatten(0, 1), labels.repeat(num_classifiers), reduction="none", label_smoothing=label_smoothing
    )
    label = label.view(num_classifiers, batch_size).mean(dim=1)

    if teacher == "ensemble":
        teacher_logits, student_logits = logits.mean(dim=0), logits
    else:
        teacher_logits, student_logits = logits[-1], logits[:-1]
    softened = F.log_softmax(teacher_logits.detach() / temperature, dim=1)  # [B, C]
    students = F.log_softmax(student_logits / temperature, dim=2)  # [K-1 or K, B, C]
    divergence = (softened.exp() * (softened - students)).sum(dim=2)  # [K-1 or K, B]
    distillation = temperature**2 * divergence.mean(dim=1)

    squared_distance = (features[:-1] - features[-1].detach()).square().sum(dim=2)  # [K-1, B]
    hint = HINT_BATCH_SIZE * squared_distance.mean(dim=1)

    if loss_form == "plain":
        return LossTerms(label[-1], label, distillation, hint)
    label_total = (1 - alpha) * label.sum()
    if loss_form == "paper":
        label_total = label_total + alpha * label[-1]
    total = label_total + alpha * distillation.sum() + beta * hint.sum()
    return LossTerms(total, label, distillation, hint)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
