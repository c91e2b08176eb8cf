"""The loss of a training step, made from the flags."""

import argparse
from functools import partial

import torch.distributed
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from arguments.derived import is_mixed
from data.sources import ImageSource, Source
from datasets import Data
from distillation import DistillationLoss, PartlyLabeledLoss
from losses import DIVERGENCES, WeightedCrossEntropy, balanced_weights, dkd
from runtime import distributed
from utils import UserError


def make_loss(args: argparse.Namespace, data: Data) -> DistillationLoss:
    """The loss of a training step: on labels, and on the teacher's logits with --kd true."""
    alpha, temperature = args.kd_alpha if args.kd else 0.0, args.kd_temperature
    weights = class_weights(args, data.train)
    divergence = DIVERGENCES[args.kd_loss]
    if args.kd_loss == "dkd":
        divergence = partial(dkd, alpha=args.dkd_alpha, beta=args.dkd_beta)
    options = {
        "divergence": divergence,
        "standardized": args.kd_standardize,
        "ce_weight": args.ce_weight,
        "kd_weight": args.kd_weight,
        "warmup_epochs": args.kd_warmup_epochs,
    }
    if data.labeled_share == 1:
        return DistillationLoss(make_criterion(args, weights), alpha, temperature, **options)
    for flag, value in (("kd_loss", "dkd"), ("loss", "bce")):
        if getattr(args, flag) == value and not (flag == "loss" and alpha == 1):
            raise UserError(
                f"--{flag} {value}: needs a label for every image, and "
                f"{1 - data.labeled_share:.0%} of the training images have none; pass another "
                f"--{flag}, or only labeled images"
            )
    images = args.batch_size * args.update_freq * distributed.world_size()
    criterion: nn.Module = nn.CrossEntropyLoss()  # labels arrive mixed and smoothed
    if weights is not None:
        criterion = WeightedCrossEntropy(weights, args.smoothing, per_image=True)
    return PartlyLabeledLoss(criterion, alpha, temperature, data.labeled_share, images, **options)


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
    return balanced_weights(labeled, len(train.classes))


def make_criterion(args: argparse.Namespace, weights: torch.Tensor | None = None) -> nn.Module:
    """The loss on labels, which arrive mixed and smoothed if images are mixed.

    Args:
        weights: of the classes, (C,) float32; None if all are equal.
    """
    if args.loss == "bce":
        return BinaryCrossEntropy(args.smoothing, target_threshold=args.bce_target_thresh)
    if weights is not None:
        return WeightedCrossEntropy(weights, args.smoothing)
    if is_mixed(args):
        return SoftTargetCrossEntropy()
    if args.smoothing > 0:
        return LabelSmoothingCrossEntropy(args.smoothing)
    return nn.CrossEntropyLoss()
