"""Time that a training step costs the CPU beside the network's own work.

On a GPU that is the time in which nothing new is launched. Two networks leave almost nothing to
compute: one has a single parameter, one has as many tensors as a ResNet-50. A bare loop of torch
with the same optimizer is the base; a second one also asks the teacher, clips and averages, in as
few lines as that takes. Every variant trains on the same batches, in the project's own loop. Rounds
alternate, and the time is that of the process, so neighbors on the machine matter little.
"""

import cProfile
import pstats
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from torch import nn

import engine
from benchmarks.steps import ALPHA, TEMPERATURE, MemoryLoader, Pair, prepare_process
from distillation import DistillationLoss, StudentWithDistillation
from losses import kl_divergence
from training.optimizer import Schedule
from training.settings import LoopSettings
from training.student import ModelEma

STEPS = 200  # of a round
SHOWN = 12  # functions of the table
BATCHES = Pair("", "", pixels=2, classes=10, batch_size=2, steps=STEPS)
NETWORKS = {"one parameter": (1, 0), "161 parameters, 159 buffers": (161, 53)}
BARE, BARE_FULL, FULL = "bare", "bare: online, EMA, clipped", "online, EMA, clipped"
VARIANTS = (BARE, BARE_FULL, "plain", "online", FULL)


class Scaled(nn.Module):
    """A mean of pixels times a sum of parameters: as little as a network can compute.

    Args:
        norms: BatchNorm layers, whose buffers (two float32, one int64 each) lie beside.
    """

    def __init__(self, parameters: int, norms: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.ones(10) for _ in range(parameters))
        for number in range(norms):
            self.register_buffer(f"mean{number}", torch.zeros(10))
            self.register_buffer(f"var{number}", torch.ones(10))
            self.register_buffer(f"batches{number}", torch.tensor(0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 10)"""
        first, *others = self.weights
        weight = torch.stack([first, *others]).sum(dim=0) if others else first
        return images[:, 0, 0, :1] * weight


class Variant:
    """A network in one of the loops."""

    def __init__(self, name: str, size: tuple[int, int], loader: MemoryLoader) -> None:
        self.name, self.loader = name, loader
        self.student = Scaled(*size)
        self.optimizer = create_optimizer_v2(
            self.student, opt="adamw", lr=1e-4, weight_decay=0.05, fused=True
        )
        is_taught, self.is_full = "online" in name, "clipped" in name
        self.criterion = SoftTargetCrossEntropy()
        self.loss = DistillationLoss(self.criterion, ALPHA if is_taught else 0.0, TEMPERATURE)
        self.model = StudentWithDistillation(self.student, Scaled(1, 0) if is_taught else None)
        self.ema = ModelEma(self.student) if self.is_full else None

    def run(self) -> None:
        """Train one round."""
        if self.name.startswith(BARE):
            self._run_bare()
            return
        constant = np.full(STEPS, 1e-4)
        engine.train_one_epoch(
            model=self.model,
            criterion=self.loss,
            loader=self.loader,
            optimizer=self.optimizer,
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            schedule=Schedule(constant, constant),
            epoch=0,
            settings=LoopSettings(torch.device("cpu"), None, 1, 1.0 if self.is_full else None, 0),
            ema=self.ema,
        )

    def _run_bare(self) -> None:
        for batch in self.loader:
            student_logits = self.student(batch.images)
            loss = self.criterion(student_logits, batch.targets)
            if self.is_full:
                with torch.no_grad():
                    teacher_logits = self.model.teacher(batch.images)
                kd = kl_divergence(student_logits, teacher_logits, TEMPERATURE)
                loss = torch.lerp(loss, kd, ALPHA)
            loss.backward()
            if self.is_full:
                nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.ema is not None:
                self.ema.update(self.student)


def measure(rounds: int) -> list[dict[str, Any]]:
    """One row per network: microseconds per step of each variant, and of its functions."""
    prepare_process()
    torch.set_num_threads(1)
    loader = MemoryLoader(BATCHES, STEPS, torch.device("cpu"), torch.channels_last)
    rows = []
    for network, size in NETWORKS.items():
        variants = [Variant(name, size, loader) for name in VARIANTS]
        times: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for number in range(-1, rounds):  # one to warm up
            for variant in random.Random(number).sample(variants, len(variants)):
                seconds = _process_seconds(variant.run)
                if number >= 0:
                    times[variant.name].append(1e6 * seconds / STEPS)
        pairs = [*((name, BARE) for name in VARIANTS[1:]), (FULL, BARE_FULL)]
        beyond = {
            f"{name}, beyond {base}": statistics.median(
                map(float.__sub__, times[name], times[base])
            )
            for name, base in pairs
        }
        row = {"network": network, "bare": statistics.median(times[BARE]), "beyond": beyond}
        rows.append(row | {"functions": _functions(variants[-1])})
    return rows


def _process_seconds(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _functions(variant: Variant) -> list[tuple[str, float, float]]:
    """The functions with the most time of their own: name, calls and microseconds per step.

    cProfile slows Python's functions down, so these are shares rather than times.
    """
    with cProfile.Profile() as profile:
        variant.run()
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    rows = [
        (f"{Path(file).name}:{name}" if line else name, calls / STEPS, 1e6 * own / STEPS)
        for (file, line, name), (_, calls, own, _, _) in stats.items()
    ]
    return sorted(rows, key=lambda row: -row[2])[:SHOWN]
