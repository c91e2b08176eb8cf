"""The optimizer, and its learning rate and weight decay at every step."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info
from torch import nn

import models
from arguments.defaults import is_sgd
from arguments.kinds import as_typed
from runtime import distributed
from runtime.distributed import log
from utils import UserError


def cosine_schedule(base: float, final: float, steps: int, warmup_steps: int = 0) -> np.ndarray:
    """Linear warm-up to `base`, then half a cosine from `base` toward `final`.

    The warm-up begins one of its steps above 0, since a step at 0 would train nothing, and ends at
    `base`, as in the ConvNeXt script. Loshchilov and Hutter, SGDR, 2017, eq. 5, without restarts.
    Returns: (steps,) float64, one value per optimizer step.
    """
    warmup = np.linspace(0.0, base, warmup_steps + 1)[1:]
    phase = np.arange(steps - warmup_steps) / max(1, steps - warmup_steps)
    return np.concatenate([warmup, final + 0.5 * (base - final) * (1 + np.cos(math.pi * phase))])


def step_schedule(
    base: float, rate: float, milestones: Sequence[int], steps: int, warmup_steps: int = 0
) -> np.ndarray:
    """Linear warm-up to `base` as in `cosine_schedule`, then times `rate` at each milestone.

    He et al. 2016, section 4.2, and the usual schedule of distillation on CIFAR-100.

    Args:
        milestones: optimizer steps; the first step with a lower value.
    Returns: (steps,) float64, one value per optimizer step.
    """
    warmup = np.linspace(0.0, base, warmup_steps + 1)[1:]
    passed = np.searchsorted(milestones, np.arange(warmup_steps, steps), side="right")
    return np.concatenate([warmup, base * rate**passed])


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay of every optimizer step of the run, (steps,) each."""

    lr: np.ndarray
    weight_decay: np.ndarray

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the values of one optimizer step."""
        for group in optimizer.param_groups:
            # Python floats: weights_only would refuse a NumPy float in the optimizer's state.
            # timm sets lr_scale with --layer_decay.
            group["lr"] = float(self.lr[step]) * group.get("lr_scale", 1.0)
            if group["weight_decay"] > 0:
                group["weight_decay"] = float(self.weight_decay[step])


def check_optimizer(args: argparse.Namespace) -> None:
    """Raise UserError for an optimizer that does not exist, or that ignores a flag that is given.

    timm drops such flags without a word.
    """
    if args.teacher_cache_only:
        return
    try:
        info = get_optimizer_info(args.opt.split("_")[-1])  # lookahead_adamw is an adamw
    except ValueError as error:
        raise UserError(f"--opt {args.opt}: {error}; see timm.optim.list_optimizers()") from error
    takes = {"opt_betas": info.has_betas, "opt_eps": info.has_eps, "momentum": info.has_momentum}
    for flag in [flag for flag in takes if flag in args.given and not takes[flag]]:
        raise UserError(f"--{flag}: --opt {args.opt} has no such setting; remove the flag")
    if args.opt_betas and info.has_betas and len(args.opt_betas) != info.num_betas:
        raise UserError(
            f"--opt_betas: --opt {args.opt} needs {info.num_betas} numbers, not "
            f"{len(args.opt_betas)}; pass {info.num_betas}"
        )


FEW_STEPS_LR = 2e-3  # the most that `default_lr` raises the rate to
FEW_STEPS_LR_OF_LAYER_NORM = 5e-4  # the same for networks without BatchNorm
LEAST_WAY = 3.0  # what `default_lr` wants the rate times the steps to be


def default_lr(args: argparse.Namespace, student: nn.Module, images: int) -> float:
    """The peak learning rate, chosen on held-out images (docs/distributed.md).

    Args:
        images: of an epoch, over all processes.
    """
    batch = args.batch_size * distributed.world_size()
    total_batch = batch * args.update_freq
    if is_sgd(args.opt):
        # He et al. 2016, section 4.2: 0.1 at a batch of 128.
        return 0.1 * (total_batch / 128) ** 0.5
    if args.linear_probe:
        # One step of Adam moves each weight by about the rate, and so an output by the rate times
        # the sum of the sizes of the features, which grows with their number (docs/teachers.md).
        weight = next(p for p in models.classifier_of(student).parameters() if p.ndim > 1)
        return 2 / weight.shape[1]  # (C, D, …)
    # 4e-3 at 4096 as in the ConvNeXt script. Adam's noise scale grows with sqrt(batch) (Malladi et
    # al. 2022), not with the batch.
    lr = 4e-3 * (total_batch / 4096) ** 0.5
    if args.finetune or args.pretrained:
        return lr
    # Adam moves a weight by at most about lr per step, so few steps from scratch need a higher one.
    # ConvNeXts and transformers bear less of that than networks with BatchNorm.
    has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in student.modules())
    most = FEW_STEPS_LR if has_batch_norm else FEW_STEPS_LR_OF_LAYER_NORM
    steps = args.epochs * math.ceil(images // batch / args.update_freq)
    return max(lr, min(most, LEAST_WAY / steps))


def make_optimizer(
    args: argparse.Namespace, network: nn.Module, device: torch.device
) -> torch.optim.Optimizer:
    """timm's optimizer of that name, for a network or part of one; fused if torch has that."""
    keywords = {"eps": args.opt_eps}
    if args.opt_betas:
        keywords["betas"] = args.opt_betas
    try:
        fused = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD
        if get_optimizer_class(args.opt, bind_defaults=False) in fused and device.type != "mps":
            keywords["fused"] = True  # one kernel per step, and no wait for fp16's overflow check
        optimizer = create_optimizer_v2(
            network,
            opt=args.opt,
            lr=args.lr,
            weight_decay=args.weight_decay,
            momentum=args.momentum,
            layer_decay=args.layer_decay if args.layer_decay != 1 else None,
            **keywords,
        )
        if isinstance(optimizer, torch.optim.SGD):
            begin_momentum(optimizer)
        return optimizer
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"--opt {args.opt}: {error}; see timm.optim.list_optimizers()") from error


def begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Give SGD its momentum from the start: zeros, with which the first step is the same.

    Else the fused kernel makes the buffers in the first step, uninitialized, and leaves them so
    if the gradient scaler skips that step.
    """
    for group in optimizer.param_groups:
        if group["momentum"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def clip_gradients(gradients: list[torch.Tensor], most: float | None) -> torch.Tensor:
    """The norm of all gradients as one vector, () on their device; scales them down in place if the
    norm is above `most`.

    The same bits as torch's get_total_norm and clip_grad_norm_, which group the tensors by device
    and dtype at each call and so take half as long again, whatever the network.
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if most:
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def make_schedule(args: argparse.Namespace, steps_per_epoch: int) -> Schedule:
    """Learning rate and weight decay of every optimizer step of the run."""
    steps, warmup = args.epochs * steps_per_epoch, warmup_steps(args, steps_per_epoch)
    if args.sched == "cosine" and args.min_lr > args.lr:
        raise UserError(
            f"--min_lr {args.min_lr}: above {args.lr:.3g}, the peak that was chosen by default; "
            "pass a smaller --min_lr, or a --lr"
        )
    if warmup > steps:
        raise UserError(
            f"--warmup_steps {warmup}: longer than the run of {steps} steps; shorten it"
        )
    decay_end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    if args.sched == "step":
        milestones = [epoch * steps_per_epoch for epoch in args.decay_epochs]
        lr = step_schedule(args.lr, args.decay_rate, milestones, steps, warmup)
    else:
        lr = cosine_schedule(args.lr, args.min_lr, steps, warmup)
    return Schedule(
        lr=lr,
        weight_decay=cosine_schedule(args.weight_decay, decay_end, steps),
    )


def warmup_steps(args: argparse.Namespace, steps_per_epoch: int) -> int:
    """Optimizer steps of linear warm-up."""
    return int(
        args.warmup_steps if args.warmup_steps >= 0 else args.warmup_epochs * steps_per_epoch
    )


SCHEDULE_FLAGS = {"epochs", "lr", "warmup_epochs", "warmup_steps"}
SCHEDULE_FLAGS |= {"sched", "min_lr", "decay_epochs", "decay_rate"}


def report_schedule(
    args: argparse.Namespace,
    schedule: Schedule,
    steps_per_epoch: int,
    first_step: int,
    changes: Mapping[str, tuple[Any, Any]],
) -> None:
    """Print the schedule, and what a changed recipe does to it in a resumed run."""
    line = f"{len(schedule.lr)} optimizer steps, {warmup_steps(args, steps_per_epoch)} of them "
    line += f"warm-up; learning rate {args.lr:.3g}"
    if args.sched == "step":
        line += f", times {args.decay_rate:g} after {as_typed(args.decay_epochs)} epochs"
    log(line)
    if changes.keys() & SCHEDULE_FLAGS:
        old_values = {name: old for name, (old, _) in changes.items()}
        before = make_schedule(argparse.Namespace(**{**vars(args), **old_values}), steps_per_epoch)
        old = before.lr[first_step] if first_step < len(before.lr) else before.lr[-1]
        log(
            f"Warning: the learning rate goes on from {schedule.lr[first_step]:.3g} at step "
            f"{first_step}; with the earlier flags it would be {old:.3g}"
        )
