"""What stays the same over the epochs of a run."""

import argparse
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

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
    if args.use_amp and device.type == "cpu" and args.amp_dtype == "float16":
        raise UserError("--amp_dtype float16: the CPU trains in bfloat16; leave the flag out")
    dtype = getattr(torch, args.amp_dtype) if args.use_amp else None
    return LoopSettings(device, dtype, args.update_freq, args.clip_grad, args.seed)
