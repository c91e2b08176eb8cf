"""The student: created, seeded and averaged (EMA)."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import nn

import models
from models.classes import names_of_weights
from models.weights import load_finetune
from runtime import distributed
from runtime.distributed import log
from runtime.randomness import RandomUse, seed_rng
from training import linear_probe
from utils import UserError, flags_for


def make_student(
    args: argparse.Namespace, device: torch.device, classes: Sequence[str], pretrained: bool = False
) -> nn.Module:
    """The network to train, on the device.

    Its initial weights are seeded, those of --finetune, or for `pretrained` those of timm.
    """
    seed_rng(device, RandomUse.WEIGHTS, args.seed)
    with flags_for(architecture="--model", checkpoint="--finetune"):
        student = models.create_model(
            args.model,
            len(classes),
            args.input_size,
            args.drop_path,
            pretrained=pretrained,
        )
        origin = ""
        if pretrained:
            # Else timm would keep a classifier of as many other classes.
            is_kept = names_of_weights(args.model, classes) == list(classes)
            if not is_kept:
                student.reset_classifier(len(classes))  # type: ignore[operator]
            classifier = "classifier of the same classes" if is_kept else "new classifier"
            origin = f" (timm's pre-trained weights, {classifier})"
        if args.head_init_scale != 1:
            scaled = [p for head in models.classifiers_of(student) for p in head.parameters()]
            if not scaled:
                raise UserError(
                    f"--head_init_scale {args.head_init_scale}: --model {args.model} does not tell "
                    "its classifier; add a method get_classifier, or remove the flag"
                )
            with torch.no_grad():
                for parameter in scaled:
                    parameter.mul_(args.head_init_scale)
        if args.finetune:
            log(load_finetune(student, args.finetune, args.model_key, args.model_prefix, classes))
        if args.linear_probe:
            linear_probe.freeze_backbone(student, args.input_size)
    log(f"Model {args.model}: {sum(p.numel() for p in student.parameters()):,} parameters{origin}")
    if args.sync_bn and distributed.world_size() > 1:
        student = convert_sync_batchnorm(student)
    # Never slower, and a quarter faster on convolutional networks.
    return student.to(device).to(memory_format=torch.channels_last)


@contextmanager
def explain_batch_norm() -> Iterator[None]:
    """Say what to do if BatchNorm has a single value per channel to normalize."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "--batch_size 1: this model's BatchNorm layers cannot train on a single image of this "
            "size; pass --batch_size 2 or more, or a larger --input_size"
        ) from error


def make_ema(args: argparse.Namespace, student: nn.Module) -> ModelEmaV3 | None:
    """A moving average of the student's weights, or None without --model_ema."""
    if not args.model_ema:
        return None
    return ModelEmaV3(
        student,
        decay=args.model_ema_decay,
        use_warmup=args.model_ema_warmup,
        device=torch.device("cpu") if args.model_ema_force_cpu else None,
    )
