"""Divergences between student and teacher logits, and class weights, each with its source."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def kl_per_image(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """`kl_divergence` per image, (B,) float32; the mean is the divergence of the batch."""
    return _kl(student_logits, teacher_logits, temperature, "none").sum(dim=-1) * temperature**2


def _kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float, how: str) -> torch.Tensor:
    log_q, log_p = (F.log_softmax(x.float() / temperature, dim=-1) for x in (student, teacher))
    # With probabilities, p * log p would be NaN if p rounds to 0.
    return F.kl_div(log_q, log_p, reduction=how, log_target=True)


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
    divergence = _kl(student_logits, teacher_logits, temperature, "sum")
    return divergence * (temperature**2 / len(student_logits))


def standardize(logits: torch.Tensor) -> torch.Tensor:
    """Each row of logits with mean 0 and standard deviation 1, (B, C) float32.

    Sun et al., 'Logit Standardization in Knowledge Distillation', CVPR 2024, eq. 8.
    """
    logits = logits.float()
    centered = logits - logits.mean(dim=-1, keepdim=True)
    return centered / (logits.std(dim=-1, keepdim=True) + 1e-7)


def kl(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """`kl_divergence`; the labels are not used."""
    return kl_divergence(student_logits, teacher_logits, temperature)


def dkd(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> torch.Tensor:
    """T^2 * (alpha * TCKD + beta * NCKD): Zhao et al., 'Decoupled KD', CVPR 2022, eq. 7.

    TCKD is the KL divergence between (p[y], 1 - p[y]) of teacher and student, NCKD that between
    their distributions over the other classes. KL itself is TCKD + (1 - p_teacher[y]) * NCKD.

    Args:
        targets: (B,) int64 class indices.
        alpha, beta: 1 and 8 for CIFAR-100 at T 4; 1 and 1 for ImageNet at T 1.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)  # (B, C)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    is_target = F.one_hot(targets, student.shape[1]).bool()  # (B, C)

    def split(log_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log of (p[y], 1 - p[y]), (B, 2), and (B, C) log of p[c] / (1 - p[y])."""
        rest = log_p.masked_fill(is_target, -math.inf).logsumexp(dim=-1, keepdim=True)
        return torch.cat([log_p.gather(1, targets[:, None]), rest], dim=1), log_p - rest

    (s_binary, s_others), (t_binary, t_others) = split(student), split(teacher)
    tckd = F.kl_div(s_binary, t_binary, reduction="batchmean", log_target=True)
    of_class = t_others.exp() * (t_others - s_others)  # (B, C)
    nckd = of_class.masked_fill(is_target, 0).sum(dim=-1).mean()
    return temperature**2 * (alpha * tckd + beta * nckd)


def dist(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """T^2 * (inter + intra): Huang et al., 'DIST', NeurIPS 2022, eq. 8 to 10.

    1 - Pearson's correlation of the probabilities of student and teacher: inter over the classes of
    each image, intra over the images of the batch for each class. The labels are not used.
    """
    student = (student_logits.float() / temperature).softmax(dim=-1)  # (B, C)
    teacher = (teacher_logits.float() / temperature).softmax(dim=-1)

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Mean over the rows of 1 - correlation."""
        a, b = (x - x.mean(dim=1, keepdim=True) for x in (a, b))
        return 1 - F.cosine_similarity(a, b, dim=1, eps=1e-8).mean()

    inter, intra = distance(student, teacher), distance(student.T, teacher.T)
    return temperature**2 * (inter + intra)


def hard(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """CE(student, argmax(teacher)), without a temperature: Touvron et al., 'DeiT', 2021, eq. 3."""
    return F.cross_entropy(student_logits.float(), teacher_logits.argmax(dim=-1))


def bce(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """T^2 * BCE(sigmoid(student/T), sigmoid(teacher/T)), summed over classes, mean over the batch.

    Each class is a question of its own, as in BCE on labels (Wightman et al., 'ResNet strikes
    back', 2021). The labels are not used.
    """
    loss = F.binary_cross_entropy_with_logits(
        student_logits.float() / temperature,
        (teacher_logits.float() / temperature).sigmoid(),
        reduction="sum",
    )
    return loss * (temperature**2 / len(student_logits))


# (student_logits (B, C), teacher_logits (B, C), targets, temperature) -> () float32: a mean over
# the batch (of `dist` also over the classes), with T^2 for all but `hard`.
Divergence = Callable[..., torch.Tensor]
# By the name for --kd_loss.
DIVERGENCES: dict[str, Divergence] = {d.__name__: d for d in (kl, dkd, dist, hard, bce)}


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
