"""What stays the same over the epochs of a run."""

import argparse
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed

from utils import UserError


@dataclass(frozen=True)
class LoopSettings:
    """What stays the same over the epochs of a run."""

    device: torch.device
    amp_dtype: torch.dtype | None  # None: no autocast
    update_freq: int  # batches accumulated into one optimizer step
    clip_grad: float | None  # maximum gradient norm
    seed: int
    print_freq: int = 10  # most optimizer steps between two looks at the loss; each costs a sync

    def autocast(self) -> AbstractContextManager:
        """Autocast to `amp_dtype`, or nothing."""
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)


def loop_settings(args: argparse.Namespace, device: torch.device) -> LoopSettings:
    """What stays the same over the epochs of a run."""
    dtype = amp_dtype(args, device)
    return LoopSettings(device, dtype, args.update_freq, args.clip_grad, args.seed)


def amp_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, or None without --use_amp."""
    if not args.use_amp:
        return None
    name = args.amp_dtype
    if device.type == "cpu" and name == "float16":
        raise UserError("--amp_dtype float16: the CPU trains in bfloat16; leave the flag out")
    return getattr(torch, name)
