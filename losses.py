"""Divergences between student and teacher logits, and class weights, each with its source."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def kl_per_image(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """`kl_divergence` per image, (B,) float32; the mean is the divergence of the batch."""
    divergence = F.kl_div(
        F.log_softmax(student_logits.float() / temperature, dim=-1),
        F.log_softmax(teacher_logits.float() / temperature, dim=-1),
        reduction="none",
        log_target=True,
    )
    return divergence.sum(dim=-1) * temperature**2


def kl_divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """T^2 * KL(softmax(teacher/T) || softmax(student/T)), summed over classes, mean over the batch.

    T^2 keeps the size of the gradient independent of the temperature. Hinton, Vinyals and Dean,
    'Distilling the Knowledge in a Neural Network', 2015, section 2.1.

    Args:
        student_logits, teacher_logits: (B, C), any floating dtype; computed in float32.
        temperature: T > 0.
    Returns: () float32.
    """
    divergence = F.kl_div(
        F.log_softmax(student_logits.float() / temperature, dim=-1),
        F.log_softmax(teacher_logits.float() / temperature, dim=-1),
        reduction="sum",
        log_target=True,  # with probabilities, p * log p would be NaN if p rounds to 0
    )
    return divergence * (temperature**2 / len(student_logits))


def balanced_weights(targets: np.ndarray, classes: int) -> torch.Tensor:
    """N / (K * n_c) for a class with n_c of N images, if K classes have images; 0 without images.

    The weights of all images then have the mean 1 and the same sum in every class: 'balanced' in
    scikit-learn's compute_class_weight, after King and Zeng, 'Logistic regression in rare events
    data', 2001.

    Args:
        targets: (N,) class indices.
        classes: C, the number of classes.
    Returns: (C,) float32.
    """
    counts = torch.from_numpy(np.bincount(targets, minlength=classes))
    weights = len(targets) / (counts.count_nonzero() * counts)
    return torch.where(counts > 0, weights, 0.0).float()


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy in which a class weight belongs to an image, not to the terms of its label.

        sum_i w_i * CE(logits_i, p_i) / sum_i w_i,    w_i = sum_c w[c] q_i[c] / sum_c q_i[c]

    q is a label before smoothing, p after smoothing: the weight of an image is the mean weight of
    the classes that are mixed in it. torch's CrossEntropyLoss(weight) weighs each term of p
    instead, so that it is best to take a common class for a rare one as soon as w * s/C of the rare
    class exceeds w * (1-s + s/C) of the common class (pytorch/pytorch#104776). Without smoothing
    and mixing the two are equal.

    The sums are those of one batch of one process. Gradients of several processes or of
    --update_freq are averaged, so each batch counts the same, whatever its sum of weights is.

    Args:
        weights: w, (C,).
        smoothing: s in 0…1, below 1, of p = (1-s) q + s/C. Class indices are smoothed here;
            probabilities arrive smoothed.
        per_image: divide by the number of images instead of the sum of weights, as
            PartlyLabeledLoss needs. A row of p may then sum to less than 1, the labeled part of
            its image; an image without a label adds 0.
    """

    def __init__(self, weights: torch.Tensor, smoothing: float, per_image: bool = False) -> None:
        super().__init__()
        self.weights: torch.Tensor
        self.register_buffer("weights", weights)
        self.smoothing, self.per_image = smoothing, per_image

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(B, C) and (B,) class indices or (B, C) probabilities -> ()"""
        if targets.dim() == 1:
            smoothing, weights = self.smoothing, self.weights[targets]  # (B,)
        else:
            smoothing, labeled = 0.0, targets.sum(dim=1)  # (B,)
            added = self.smoothing * labeled * self.weights.mean()
            weights = (targets @ self.weights - added) / (1 - self.smoothing)
            weights = weights / labeled.clamp(min=torch.finfo(labeled.dtype).tiny)
        of_image = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        return (weights * of_image).sum() / (len(logits) if self.per_image else weights.sum())
