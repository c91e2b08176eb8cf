"""Divergences between student and teacher logits, and class weights, each with its source."""

import numpy as np
import torch
import torch.nn.functional as F


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
        log_target=True,  # with probabilities, p * log p would be NaN where p rounds to 0
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
