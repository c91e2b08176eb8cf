"""The means of an epoch's steps, copied from the device only every few steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from data.loaders import Batch
from reporting.recorder import Recorder
from reporting.timing import Stopwatch
from runtime import distributed, signals
from runtime.device import fetch, has_streams
from training.optimizer import Schedule
from training.settings import LoopSettings
from utils import UserError

SECONDS_BETWEEN_LOOKS = 5  # at the signals of other processes, if steps are slow
WAITING_BYTES = 2**24  # logits and targets kept on the device until their scalars are computed


def accuracy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Percent of rows whose largest logit is their class; for soft targets, their main class.

    Args:
        logits: (…, B, C).
        targets: (…, B) int64, or (…, B, C) probabilities.
    Returns: (…) float32.
    """
    classes = targets.argmax(dim=-1) if targets.ndim == logits.ndim else targets
    return 100 * (logits.argmax(dim=-1) == classes).mean(dim=-1, dtype=torch.float32)


@dataclass
class Progress:
    """How far an epoch has come: what a checkpoint inside it must hold, plain values only."""

    updates: int = 0  # optimizer steps done
    batches: int = 0  # batches that count in the means
    sums: dict[str, float] = field(default_factory=dict)  # of the loss and its parts over those
    skipped: int = 0  # steps that the gradient scaler left out

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any] | None) -> Progress | None:
        """Read from a checkpoint; None if that was not written inside an epoch."""
        if not saved:
            return None
        sums = saved["sums"]
        if isinstance(sums, list):  # checkpoints without a format number hold the values alone
            names = ("loss", "ce", "kd", "teacher_acc1")
            sums = dict(zip(names, sums, strict=False))
        return cls(**{**saved, "sums": sums})


class StepScalars(NamedTuple):
    """What one batch leaves for the log; on the device, computed later."""

    loss: torch.Tensor  # ()
    parts: dict[str, torch.Tensor]  # () each
    student_logits: torch.Tensor  # (B, C)
    teacher_logits: torch.Tensor | None  # (B, C), if they are scored
    targets: torch.Tensor  # (B,) or (B, C)


class Look(NamedTuple):
    """The scalars of some optimizer steps, on their way to the host."""

    done: int  # steps of the epoch
    batches_per_update: list[int]
    tables: Callable[[], torch.Tensor]  # waits for (processes, batches, metrics + 1)
    norms: Callable[[], torch.Tensor]  # waits for (optimizer steps,)
    rate: float  # images per second


class History:
    """Keeps the scalars of an epoch on the device and looks at them only every few steps.

    Reading a scalar waits for the device, so a look copies them beside what the device computes,
    and they are read at the next look, or before anything is saved. Without such a device they are
    read at once.

    Args:
        updates: optimizer steps of the epoch.
        settings: print_freq is the most optimizer steps between two looks; slow steps have fewer.
        scaler: leaves out steps that are not finite, if it is enabled.
        recorder: keeps what each look finds.
        progress: how far an interrupted run came in this epoch.
    """

    def __init__(
        self,
        epoch: int,
        updates: int,
        schedule: Schedule,
        settings: LoopSettings,
        scaler: torch.amp.GradScaler,
        recorder: Recorder,
        progress: Progress,
    ) -> None:
        self.epoch, self.updates, self.schedule, self.scaler = epoch, updates, schedule, scaler
        self.device, self.print_freq = settings.device, settings.print_freq
        self.every = 0  # optimizer steps between two looks; 0 until steps were timed
        self.recorder = recorder
        self.waiting: list[StepScalars] = []  # batches whose scalars are still to be computed
        self.waiting_bytes = 0
        self.tables: list[torch.Tensor] = []  # (batches, metrics + 1) each, since the last look
        self.looks: list[Look] = []  # those that are not read yet
        self.plans: list[Callable[[], list[int]]] = []  # answers of all processes, not read yet
        self.norms: list[torch.Tensor] = []  # gradient norms, () each, one per optimizer step
        self.batches_per_update: list[int] = []
        self.batches_since_update = 0
        self.images = 0  # since the last look, on this process
        self.names = list(progress.sums)
        self.sums = np.array(list(progress.sums.values()))
        self.count = progress.batches
        self.skipped = progress.skipped
        self.stop = 0  # number of a signal that asks every process to stop, or 0
        self.stopwatch = Stopwatch()

    def add_batch(
        self,
        loss: torch.Tensor,
        parts: dict[str, torch.Tensor],
        outputs: tuple[Any, ...],
        batch: Batch,
    ) -> None:
        """Note a batch. Scalars of its logits are computed for many batches at once, since these
        small kernels would cost the same for each batch.

        Args:
            outputs: of the model, see engine.TrainedModel.
        """
        student_logits, teacher_logits = outputs[0].detach(), outputs[1]
        if self.epoch == 0 and not (self.count or self.waiting or self.tables or self.looks):
            self.recorder.show_batch(batch, teacher_logits)
        if not batch.is_labeled:
            teacher_logits = None  # cannot be scored
        scalars = StepScalars(loss.detach(), parts, student_logits, teacher_logits, batch.targets)
        self.waiting.append(scalars)
        self.waiting_bytes += 3 * student_logits.nbytes
        if self.waiting_bytes >= WAITING_BYTES:
            self._compute()
        self.batches_since_update += 1
        self.images += len(student_logits)

    def _compute(self) -> None:
        if not self.waiting:
            return
        losses, parts, students, teachers, targets = zip(*self.waiting, strict=True)
        columns = {"loss": torch.stack(losses)}  # (batches,) each
        columns |= {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        if teachers[0] is not None:
            columns["teacher_acc1"] = accuracy(torch.stack(teachers), torch.stack(targets))
        if self.names != list(columns):  # the first batches; a checkpoint may hold different names
            sums = dict(zip(self.names, self.sums, strict=True))
            self.names = list(columns)
            self.sums = np.array([sums.get(name, 0.0) for name in self.names])
        largest = torch.stack(students).flatten(1).abs().amax(dim=1).float()
        self.tables.append(torch.stack([*columns.values(), largest], dim=1))
        self.waiting, self.waiting_bytes = [], 0

    def end_update(self, update: int, grad_norm: torch.Tensor) -> None:
        """Note an optimizer step; look at the scalars if that is due."""
        self.norms.append(grad_norm.detach())
        self.batches_per_update.append(self.batches_since_update)
        self.batches_since_update = 0
        if distributed.world_size() == 1:
            self.stop = signals.received_signal()  # free: there is no other process to ask
        if (update + 1) % (self.every or self.print_freq) == 0 or update + 1 == self.updates:
            steps, seconds = len(self.norms), self.stopwatch.seconds()
            self._look(update)
            self._read(unread=1 if has_streams(self.device) else 0)
            self._plan(seconds / steps)
        elif not self.every:
            self._plan(self.stopwatch.seconds())

    def _plan(self, seconds: float) -> None:
        """Ask the other processes for signals, and plan when to do so again. Collective.

        Args:
            seconds: duration of an optimizer step.
        """
        most = max(1, SECONDS_BETWEEN_LOOKS / seconds)
        # Divisors, so that looks come at the same steps whatever the earlier ones were.
        divisors = [n for n in range(1, self.print_freq + 1) if self.print_freq % n == 0]
        every = max(n for n in divisors if n <= most)
        mine = [signals.received_signal(), -every]
        self.plans.append(distributed.begin_largest(mine, self.device))
        # On GPUs of several processes, read by the next call, so that no step waits.
        may_wait = distributed.world_size() == 1 or not has_streams(self.device)
        while len(self.plans) > (0 if may_wait else 1):
            self.stop, negative = self.plans.pop(0)()
            self.every = -negative

    def flush(self, updates: int) -> Progress:
        """Read what is waiting; returns what a checkpoint after `updates` must hold.

        Raises: UserError if a loss or gradient was not finite.
        """
        if self.norms:
            self._look(updates - 1)
        self._read()
        sums = dict(zip(self.names, self.sums.tolist(), strict=True))
        return Progress(updates, self.count, sums, self.skipped)

    def _look(self, update: int) -> None:
        """Start to copy the scalars since the last look. Collective."""
        self._compute()
        # Added by `_read`, in the order of the ranks: a reduction would round by the length of the
        # table, which depends on when the processes looked.
        tables = fetch(distributed.gather_tensor(torch.cat(self.tables)))
        norms = fetch(torch.stack(self.norms).float())
        rate = self.stopwatch.rate(self.images * distributed.world_size())
        self.looks.append(Look(update + 1, self.batches_per_update, tables, norms, rate))
        self.tables, self.norms, self.batches_per_update, self.images = [], [], [], 0

    def _read(self, unread: int = 0) -> None:
        """Read the looks but for the last `unread`, and record them.

        Raises: UserError if a loss or gradient was not finite.
        """
        while len(self.looks) > unread:
            self._record(self.looks.pop(0))

    def _record(self, look: Look) -> None:
        tables, step_norms = look.tables().numpy(), look.norms().numpy()
        total, largest_logits = sum(tables[:, :, :-1]), tables[:, :, -1].max(axis=0)
        rows = total / len(tables)  # (batches, metrics)
        first = self.epoch * self.updates + look.done - len(step_norms)

        step_of_row = np.repeat(np.arange(len(step_norms)), look.batches_per_update)
        is_finite = np.isfinite(rows[:, 0]) & np.isfinite(step_norms[step_of_row])
        stops = not is_finite.all()
        if self.scaler.is_enabled():
            # The scaler leaves such steps out and halves its scale, down to what shows that not
            # the scale is at fault. (It is saved, so this counts over epochs and restarts.)
            self.skipped += len(set(step_of_row[~is_finite]))
            stops = stops and self.scaler.get_scale() < 1
        if stops:
            row = int(np.argmin(is_finite))
            step, norm = first + step_of_row[row], step_norms[step_of_row[row]]
            raise self._not_finite(step, rows[row][0], largest_logits[row], norm)
        for values in rows[is_finite]:  # one by one, so that no sum depends on when it is read
            self.sums += values
        self.count += int(is_finite.sum())
        means = dict(zip(self.names, rows.mean(axis=0), strict=True))
        last = first + len(step_norms) - 1
        opt = {
            "opt/lr": self.schedule.lr[last],
            "opt/weight_decay": self.schedule.weight_decay[last],
            "opt/grad_norm": step_norms.mean(),
        }
        self.recorder.look(self.epoch, look.done, self.updates, means, opt, look.rate)

    def _not_finite(self, step: int, loss: float, largest: float, norm: float) -> UserError:
        lr = self.schedule.lr[step]
        return UserError(
            f"loss {loss} with gradient norm {norm:.3g} at step {step} (epoch {self.epoch}), "
            f"learning rate {lr:.3g}, largest logit {largest:.3g}. No checkpoint was written after "
            "this happened; lower --lr, pass --clip_grad 1.0, or use --amp_dtype bfloat16"
        )

    def means(self) -> dict[str, float]:
        """Means over the batches that counted, if any did, and the last lr of the epoch.

        Raises: UserError if a loss or gradient was not finite.
        """
        self._read()
        means = {}
        if self.count:
            means = dict(zip(self.names, (self.sums / self.count).tolist(), strict=True))
        means["lr"] = float(self.schedule.lr[(self.epoch + 1) * self.updates - 1])
        return means | ({"skipped_steps": self.skipped} if self.scaler.is_enabled() else {})
