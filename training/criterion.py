"""The loss of a training step, made from the flags."""

import argparse

import torch.distributed
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

import losses
from arguments.derived import is_mixed
from data.sources import ImageSource, Source
from datasets import Data
from distillation import DistillationLoss, PartlyLabeledLoss
from runtime import distributed
from utils import UserError


def make_loss(args: argparse.Namespace, data: Data) -> DistillationLoss:
    """The loss of a training step: on labels, and on the teacher's logits with --kd true."""
    alpha, temperature = args.kd_alpha if args.kd else 0.0, args.kd_temperature
    weights = class_weights(args, data.train)
    if data.labeled_share == 1:
        return DistillationLoss(make_criterion(args, weights), alpha, temperature)
    images = args.batch_size * args.update_freq * distributed.world_size()
    criterion = nn.CrossEntropyLoss(weight=weights)  # labels arrive mixed and smoothed
    return PartlyLabeledLoss(criterion, alpha, temperature, data.labeled_share, images)


def class_weights(args: argparse.Namespace, train: Source) -> torch.Tensor | None:
    """The weight of each class in the label loss; None if all weights are equal.

    Raises: UserError for a stream, whose labels are not known.
    """
    if args.class_weights == "none":
        return None
    if not isinstance(train, ImageSource):
        raise UserError(
            f"--class_weights {args.class_weights}: the stream {args.data_set} cannot be counted "
            "per class before training; use a folder, or remove the flag"
        )
    labeled = train.targets[train.targets < len(train.classes)]
    return losses.balanced_weights(labeled, len(train.classes))


def make_criterion(args: argparse.Namespace, weights: torch.Tensor | None = None) -> nn.Module:
    """The loss on labels; where images are mixed, labels arrive mixed and smoothed already.

    With weights w of the classes, it is torch's CrossEntropyLoss(weight=w), with l = -log softmax
    of the logits, smoothing s and C classes. For labels y of a batch of B images, a weighted mean:

        (1-s) * sum_i w[y_i] l_i[y_i] / W + (s/C) * sum_i sum_c w[c] l_i[c] / W,  W = sum_i w[y_i]

    and for mixed and smoothed labels p, of which torch divides by the number of images:

        sum_i sum_c w[c] p_i[c] l_i[c] / B

    W belongs to one batch of one process. With several processes or --update_freq, the gradient is
    the mean of those of the batches, each of which weighs the same: for labels that are not mixed,
    an image then counts w[y] / W of its own batch, not of the whole step.

    Args:
        weights: (C,) float32; None for plain means.
    """
    if weights is not None:
        smoothing = 0.0 if is_mixed(args) else args.smoothing
        return nn.CrossEntropyLoss(weight=weights, label_smoothing=smoothing)
    if is_mixed(args):
        return SoftTargetCrossEntropy()
    if args.smoothing > 0:
        return LabelSmoothingCrossEntropy(args.smoothing)
    return nn.CrossEntropyLoss()
