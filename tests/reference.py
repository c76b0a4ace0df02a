"""The self-distillation loss and its gradients as plain Python loops in float64: what byot/loss.py is held to.

Nothing is shared with byot and nothing is differentiated by a library: the gradients are written down.

B batch, C classes, D feature width, K classifiers, shallow to deep: [-1] is the deepest, the teacher.
"""

import math
from typing import NamedTuple

Matrix = list[list[float]]


class Sized(NamedTuple):
    """Numbers, and how large the numbers were that they were added up from.

    `size` is what a rounding error is relative to: a divergence is a small difference of large logarithms, and a
    logarithm of a sum near 1 is off by the precision itself, however small it is.
    """

    values: list[float]
    size: float


class ReferenceLoss(NamedTuple):
    total: Sized  # [1]
    label: Sized  # [K]
    distillation: Sized  # [K-1], [K] where the ensemble teaches
    hint: Sized  # [K-1]
    logit_gradients: list[Sized]  # K x [B * C], of the total, row by row
    feature_gradients: list[Sized]  # K x [B * D]


def weight_of_label(loss_form: str, is_deepest: bool, alpha: float) -> float:
    if loss_form == "plain":
        return 1.0 if is_deepest else 0.0
    return 1.0 if (loss_form == "paper" and is_deepest) else 1.0 - alpha


def log_softmax(row: list[float]) -> list[float]:
    largest = max(row)
    log_sum = math.log(math.fsum(math.exp(x - largest) for x in row))
    return [x - largest - log_sum for x in row]


def reference_loss(
    logits: list[Matrix],  # K x [B, C]
    features: list[Matrix],  # K x [B, D]
    labels: list[int],  # [B]
    *,
    alpha: float,
    temperature: float,
    beta: float,
    loss_form: str,
    label_smoothing: float = 0.0,
    teacher: str = "deepest",
) -> ReferenceLoss:
    num_classifiers, batch_size, num_classes, width = len(logits), len(labels), len(logits[0][0]), len(features[0][0])
    deepest = num_classifiers - 1
    if loss_form == "plain":
        alpha = beta = 0.0
    num_students = num_classifiers if teacher == "ensemble" else deepest  # the first so many
    label, label_sizes = [0.0] * num_classifiers, [0.0] * num_classifiers
    distillation, distillation_sizes = [0.0] * num_students, [0.0] * num_students
    hint = [0.0] * deepest
    logit_gradients, feature_gradients = [], []

    for i in range(num_classifiers):
        label_weight = weight_of_label(loss_form, i == deepest, alpha)
        gradient, largest_gradient = [], 0.0
        for b in range(batch_size):
            log_q = log_softmax(logits[i][b])
            taught = [
                math.fsum(z[b][c] for z in logits) / num_classifiers if teacher == "ensemble" else logits[deepest][b][c]
                for c in range(num_classes)
            ]
            softened_p = log_softmax([x / temperature for x in taught])
            softened_q = log_softmax([x / temperature for x in logits[i][b]])
            for c in range(num_classes):
                target = label_smoothing / num_classes + (1.0 - label_smoothing if c == labels[b] else 0.0)
                q = math.exp(log_q[c])
                label[i] -= target * log_q[c] / batch_size
                label_sizes[i] += target * (1.0 + abs(log_q[c])) / batch_size
                slope = label_weight * (q - target) / batch_size
                slope_size = label_weight * (q + target) / batch_size
                if i < num_students:
                    p, q = math.exp(softened_p[c]), math.exp(softened_q[c])
                    distillation[i] += temperature**2 * p * (softened_p[c] - softened_q[c]) / batch_size
                    size = p * (2.0 + abs(softened_p[c]) + abs(softened_q[c]))
                    distillation_sizes[i] += temperature**2 * size / batch_size
                    # d/dz of T^2 KL: T^2 * (1 / T) * (q - p)
                    slope += alpha * temperature * (q - p) / batch_size
                    slope_size += alpha * temperature * (q + p) / batch_size
                gradient.append(slope)
                largest_gradient = max(largest_gradient, slope_size)
        logit_gradients.append(Sized(gradient, largest_gradient))

        gradient = []
        for b in range(batch_size):
            for d in range(width):
                difference = features[i][b][d] - features[deepest][b][d]
                if i < deepest:
                    hint[i] += 128.0 * difference**2 / batch_size
                gradient.append(beta * 128.0 * 2.0 * difference / batch_size)  # 0 for the deepest: it is the teacher
        feature_gradients.append(Sized(gradient, max(abs(x) for x in gradient)))

    total, total_size = 0.0, 0.0
    for i in range(num_classifiers):
        label_weight = weight_of_label(loss_form, i == deepest, alpha)
        total += label_weight * label[i]
        total_size += label_weight * label_sizes[i]
        if i < num_students:
            total += alpha * distillation[i]
            total_size += alpha * distillation_sizes[i]
        if i < deepest:
            total += beta * hint[i]
            total_size += beta * hint[i]
    return ReferenceLoss(
        total=Sized([total], total_size),
        label=Sized(label, max(label_sizes)),
        distillation=Sized(distillation, max(distillation_sizes)),
        hint=Sized(hint, max(hint)),
        logit_gradients=logit_gradients,
        feature_gradients=feature_gradients,
    )
