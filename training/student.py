"""The student: created, seeded and averaged (EMA)."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import nn

import models
from arguments.derived import teachers_of
from models.classes import names_of_weights
from models.weights import load_finetune
from runtime import distributed
from runtime.device import avoid_faulty_kernel, channels_last, has_streams, record_event
from runtime.distributed import log
from runtime.randomness import RandomUse, seed_rng
from training import linear_probe
from utils import UserError, flags_for


def check_architectures(args: argparse.Namespace) -> None:
    """Raise UserError that names the flag if student or teacher are no architecture."""
    with flags_for(architecture="--model"):
        models.check_architecture(args.model)
    with flags_for(architecture="--teacher_arch"):
        for teacher in teachers_of(args):
            models.check_architecture(teacher.arch)


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
            args.drop,
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
            linear_probe.freeze_backbone(student, args.model, args.input_size)
    log(f"Model {args.model}: {sum(p.numel() for p in student.parameters()):,} parameters{origin}")
    if args.sync_bn and distributed.world_size() > 1:
        student = convert_sync_batchnorm(student)
    student = channels_last(student.to(device))
    return avoid_faulty_kernel(student) if device.type == "cpu" else student


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


class ModelEma(ModelEmaV3):
    """timm's moving average, whose update looks its tensors up in lists that are made once.

    timm asks both networks for a state_dict at every step: 0.6 ms for a ResNet-18, 3.6 ms for a
    ResNet-50. The lists hold places in the modules' dicts, so they also find a buffer that the
    network has replaced.

    An average in host memory, of weights on a GPU, is one update behind until it is read through
    `average`: the weights are copied without waiting, and added when the next ones are copied.
    """

    def __init__(self, student: nn.Module, **options: Any) -> None:
        super().__init__(student, **options)
        tensors = self.module.state_dict()
        # The floating ones, which are averaged, come first.
        keys = sorted(tensors, key=lambda key: not tensors[key].is_floating_point())
        self._floating = sum(tensor.is_floating_point() for tensor in tensors.values())
        self._averages, self._weights = (
            [_place_of(key, network) for key in keys] for network in (self.module, student)
        )
        # timm's own rounds bfloat16 at random, and takes longer.
        is_short = torch.bfloat16 in {tensor.dtype for tensor in tensors.values()}
        self._lerp_all = self._foreach_lerp_ if is_short else torch._foreach_lerp_
        self._copies: list[torch.Tensor] = []  # of the weights, in host memory
        device = next(student.parameters()).device
        if next(self.module.parameters()).device != device:
            pin = has_streams(device)
            self._copies = [torch.empty_like(tensors[key], pin_memory=pin) for key in keys]
        self._waiting: tuple[float, torch.Event | None] | None = None  # the copies' decay and end

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move the average toward the weights of the network that it was made of."""
        weights = [where[name] for where, name in self._weights]
        if not self._copies:
            self._add(weights, decay)
            return
        self._settle()
        device = weights[0].device
        torch._foreach_copy_(self._copies, weights, non_blocking=has_streams(device))
        self._waiting = decay, record_event(device) if has_streams(device) else None

    def _settle(self) -> None:
        if self._waiting is not None:
            decay, end = self._waiting
            if end is not None:
                end.synchronize()
            self._add(self._copies, decay)
            self._waiting = None

    def _add(self, weights: list[torch.Tensor], decay: float) -> None:
        averages, floating = [where[name] for where, name in self._averages], self._floating
        self._lerp_all(averages[:floating], weights[:floating], weight=1.0 - decay)
        if averages[floating:]:
            torch._foreach_copy_(averages[floating:], weights[floating:])

    @property
    @torch.no_grad()
    def average(self) -> nn.Module:
        """The averaged network, up to date."""
        self._settle()
        return self.module


def _place_of(key: str, network: nn.Module) -> tuple[dict[str, Any], str]:
    """The dict in which a module holds the tensor of that key of the state_dict, and its name."""
    path, _, name = key.rpartition(".")
    module = network.get_submodule(path)
    return module._parameters if name in module._parameters else module._buffers, name


def make_ema(args: argparse.Namespace, student: nn.Module) -> ModelEma | None:
    """A moving average of the student's weights, or None without --model_ema."""
    if not args.model_ema:
        return None
    return ModelEma(
        student,
        decay=args.model_ema_decay,
        use_warmup=args.model_ema_warmup,
        device=torch.device("cpu") if args.model_ema_force_cpu else None,
    )
