"""The loops: one epoch of training, one evaluation. What is learned from is the model's affair."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import utils
from distillation import unwrap
from utils import UserError, log

WAITING_BYTES = 2**24  # logits and targets kept on the device until their scalars are computed


@dataclass(frozen=True)
class LoopSettings:
    """What stays the same over a run's epochs."""

    device: torch.device
    amp_dtype: torch.dtype | None  # None: no autocast
    update_freq: int  # batches accumulated into one optimizer step
    clip_grad: float | None  # largest gradient norm
    seed: int
    print_freq: int = 10  # optimizer steps between two printed lines; each costs one device sync

    def autocast(self) -> Any:
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay of every optimizer step of the run, (steps,) each."""

    lr: np.ndarray
    weight_decay: np.ndarray

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        for group in optimizer.param_groups:
            # Python floats: a NumPy one in the optimizer's state would be refused by weights_only.
            group["lr"] = float(self.lr[step]) * group.get("lr_scale", 1.0)  # of layer decay
            if group["weight_decay"] > 0:
                group["weight_decay"] = float(self.weight_decay[step])


@dataclass
class Progress:
    """How far an epoch has come: what a checkpoint inside it must hold, plain values only."""

    updates: int = 0  # optimizer steps done
    batches: int = 0  # batches that count in the means
    sums: list[float] = field(default_factory=list)  # of loss and its parts over those batches
    skipped: int = 0  # steps that the gradient scaler left out


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    loader: Any,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    schedule: Schedule,
    epoch: int,
    settings: LoopSettings,
    ema: Any = None,
    writer: Any = None,
    progress: Progress | None = None,
    after_update: Callable[["History", int], None] | None = None,
) -> dict[str, float]:
    """Train for one epoch, or for what `progress` leaves of it.

    Args:
        model: a StudentWithDistillation; gives (student_logits, teacher_logits) for images.
        criterion: (student_logits, teacher_logits, targets) -> (loss, parts).
        loader: batches of one size: images (B, 3, H, W) float32 and targets, (B,) int64 or (B, C),
            on the device.
        ema: a timm ModelEmaV3 of the student, or None.
        writer: a TensorBoard SummaryWriter, or None.
        progress: how far an interrupted run came in this epoch.
        after_update: called with the history and the optimizer steps done after each of them.
    Returns: means over the epoch's images on all processes: loss, its parts, and the last lr.
    Raises: UserError that names the step where loss or gradient is not finite, before the epoch
        ends; with a gradient scaler such steps are left out and counted.
    """
    model.train()
    progress = progress or Progress()
    first_batch = progress.updates * settings.update_freq
    loader.set_epoch(epoch, first_batch)
    batches, freq = loader.batches_in_epoch, settings.update_freq
    updates = -(-batches // freq)
    parameters = [p for p in model.parameters() if p.requires_grad]
    history = History(epoch, updates, schedule, settings, scaler.is_enabled(), writer, progress)
    optimizer.zero_grad(set_to_none=True)
    for batch, (images, targets) in enumerate(loader, start=first_batch):
        update, part = divmod(batch, freq)
        window = min(freq, batches - update * freq)  # an epoch's last window may be shorter
        step = epoch * updates + update
        if part == 0:
            schedule.apply(optimizer, step)
        # Dropout and drop path depend on nothing that happened before this batch.
        utils.seed_rng(settings.device, settings.seed, epoch, batch, utils.rank())
        is_last = part == window - 1
        with nullcontext() if is_last else model.no_sync():
            with settings.autocast():
                student_logits, teacher_logits = model(images)
                loss, parts = criterion(student_logits, teacher_logits, targets)
            scaler.scale(loss / window).backward()
        history.add_batch(loss, parts, student_logits, teacher_logits, targets)
        if not is_last:
            continue

        scaler.unscale_(optimizer)
        if settings.clip_grad:
            grad_norm = nn.utils.clip_grad_norm_(parameters, settings.clip_grad)
        else:
            grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update(unwrap(model.student), step=step + 1)
        history.end_update(update, grad_norm)
        if after_update is not None:
            after_update(history, update + 1)
    return history.means()


def accuracy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Percent of rows whose largest logit is their class; of soft targets, the main one.

    Args:
        logits: (…, B, C).
        targets: (…, B) int64, or (…, B, C) probabilities.
    Returns: (…) float32.
    """
    classes = targets.argmax(dim=-1) if targets.ndim == logits.ndim else targets
    return 100 * (logits.argmax(dim=-1) == classes).mean(dim=-1, dtype=torch.float32)


class History:
    """Keeps an epoch's scalars on the device and fetches them only when they are printed."""

    def __init__(
        self,
        epoch: int,
        updates: int,
        schedule: Schedule,
        settings: LoopSettings,
        is_scaled: bool,
        writer: Any,
        progress: Progress,
    ) -> None:
        self.is_scaled = is_scaled
        self.epoch, self.updates, self.schedule = epoch, updates, schedule
        self.settings, self.writer = settings, writer
        self.names: list[str] = []
        self.waiting: list[tuple] = []  # batches whose scalars are still to be computed
        self.waiting_bytes = 0
        self.tables: list[torch.Tensor] = []  # (batches, metrics + 1) each, since the last fetch
        self.norms: list[torch.Tensor] = []  # () each, one an optimizer step
        self.batches_of_update: list[int] = []
        self.batches_since = 0  # the last optimizer step
        self.images = 0
        self.sums = np.array(progress.sums)
        self.count = progress.batches
        self.skipped = progress.skipped
        self.stop = 0  # the signal that asks every process to stop, or 0
        self.stopwatch = utils.Stopwatch()

    def add_batch(
        self,
        loss: torch.Tensor,
        parts: dict[str, torch.Tensor],
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor | None,
        targets: torch.Tensor,
    ) -> None:
        """Note a batch; what is asked of its logits is computed for many batches at once, since
        these small kernels would cost as much for each."""
        student_logits = student_logits.detach()
        self.waiting.append((loss.detach(), parts, student_logits, teacher_logits, targets))
        self.waiting_bytes += 3 * student_logits.nbytes
        if self.waiting_bytes >= WAITING_BYTES:
            self._compute()
        self.batches_since += 1
        self.images += len(student_logits)

    def _compute(self) -> None:
        if not self.waiting:
            return
        losses, parts, students, teachers, targets = zip(*self.waiting, strict=True)
        columns = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        columns = {"loss": torch.stack(losses)} | columns  # (batches,) each
        if teachers[0] is not None:
            columns["teacher_acc1"] = accuracy(torch.stack(teachers), torch.stack(targets))
        self.names = list(columns)
        largest = torch.stack(students).flatten(1).abs().amax(dim=1).float()
        self.tables.append(torch.stack([*columns.values(), largest], dim=1))
        self.waiting, self.waiting_bytes = [], 0

    def end_update(self, update: int, grad_norm: torch.Tensor) -> None:
        self.norms.append(grad_norm.detach())
        self.batches_of_update.append(self.batches_since)
        self.batches_since = 0
        if utils.world_size() == 1:
            self.stop = utils.stop_requested(self.settings.device)  # costs nothing: no other to ask
        if (update + 1) % self.settings.print_freq == 0 or update + 1 == self.updates:
            self._fetch(update)

    def progress(self, updates: int) -> Progress:
        """What a checkpoint after `updates` optimizer steps must hold."""
        if self.norms:
            self._fetch(updates - 1)
        return Progress(updates, self.count, self.sums.tolist(), self.skipped)

    def _fetch(self, update: int) -> None:
        self._compute()
        first = self.epoch * self.updates + update + 1 - len(self.norms)
        table = torch.cat(self.tables)  # (batches, metrics + 1)
        norms = torch.stack(self.norms).float()  # (optimizer steps,)
        largest = table[:, -1].clone()
        utils.all_reduce_(table)
        utils.all_reduce_(largest, dist.ReduceOp.MAX)
        table = (table[:, :-1] / utils.world_size()).cpu().numpy()
        norms, largest = norms.cpu().numpy(), largest.cpu().numpy()
        images = self.images * utils.world_size()

        owner = np.repeat(np.arange(len(norms)), self.batches_of_update)  # batch -> step

        is_finite = np.isfinite(table[:, 0]) & np.isfinite(norms[owner])
        if self.is_scaled:
            # The scaler leaves such steps out and lowers its scale; a whole window is too much.
            self.skipped += len(set(owner[~is_finite]))
            stops = len(norms) >= self.settings.print_freq and not is_finite.any()
        else:
            stops = not is_finite.all()
        if stops:
            row = int(np.argmin(is_finite))
            index = owner[row]
            raise self._not_finite(first + index, table[row], largest[row], norms[index])
        if not len(self.sums):
            self.sums = np.zeros(len(self.names))
        for row in table[is_finite]:  # one by one, so that no sum depends on where it was fetched
            self.sums += row
        self.count += int(is_finite.sum())
        if self.writer is not None:
            self._write(first, table, owner, norms)
        means = zip(self.names, table.mean(axis=0), strict=True)
        log(
            f"Epoch {self.epoch} [{update + 1:>{len(str(self.updates))}}/{self.updates}]  "
            + "  ".join(f"{name} {mean:.4f}" for name, mean in means)
            + f"  lr {self.schedule.lr[first + len(norms) - 1]:.2e}"
            + f"  {self.stopwatch.rate(images):.0f} images/s"
        )
        self.tables, self.norms, self.batches_of_update, self.images = [], [], [], 0
        self.stop = utils.stop_requested(self.settings.device)

    def _write(self, first: int, table: np.ndarray, owner: np.ndarray, norms: np.ndarray) -> None:
        for index, norm in enumerate(norms):
            step = first + index
            means = table[owner == index].mean(axis=0, dtype=np.float64)
            for name, mean in zip(self.names, means, strict=True):
                self.writer.add_scalar(f"train/{name}", mean, step)
            self.writer.add_scalar("opt/lr", self.schedule.lr[step], step)
            self.writer.add_scalar("opt/weight_decay", self.schedule.weight_decay[step], step)
            self.writer.add_scalar("opt/grad_norm", norm, step)

    def _not_finite(self, step: int, row: np.ndarray, largest: float, norm: float) -> UserError:
        return UserError(
            f"loss {row[0]} with gradient norm {norm:.3g} at step {step} (epoch {self.epoch}), "
            f"learning rate {self.schedule.lr[step]:.3g}, largest logit {largest:.3g}. Nothing was "
            "saved since; lower --lr, set --clip_grad 1.0, or use --amp_dtype bfloat16"
        )

    def means(self) -> dict[str, float]:
        """Over the epoch's batches that were learned from; and its last learning rate."""
        means = dict(zip(self.names, (self.sums / max(1, self.count)).tolist(), strict=True))
        means["lr"] = float(self.schedule.lr[(self.epoch + 1) * self.updates - 1])
        return means | ({"skipped_steps": self.skipped} if self.is_scaled else {})


@torch.inference_mode()
def evaluate(
    loader: Any,
    model: nn.Module,
    settings: LoopSettings,
    shared: bool = True,
    reference: list[torch.Tensor] | None = None,
    keep: list[torch.Tensor] | None = None,
) -> dict[str, float]:
    """Score a classifier: sums over images divided by their number, at any world and batch size.

    Args:
        loader: this process's batches on the device; together they hold every image once.
        model: images (B, 3, H, W) -> logits (B, C), on the settings' device.
        shared: False where every process holds all images.
        reference: a teacher's logits (B, C) for each batch of the loader.
        keep: the model's logits for each batch are appended to it, on the CPU.
    Returns: loss (mean cross-entropy, no smoothing), acc1 and acc5 in percent; with a reference
        also agreement (percent of images that both give one class) and kl (mean
        KL(teacher || model) at temperature 1).
    Raises: UserError where the loss is not finite.
    """
    model.eval()
    device = settings.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    names = ["loss", "acc1", "acc5"] + (["agreement", "kl"] if reference is not None else [])
    sums = torch.zeros(len(names), dtype=wide, device=device)
    count = 0
    for batch, (images, targets) in enumerate(loader):
        with settings.autocast():
            logits = model(images).float()  # (B, C)
        top = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (B, 5)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        totals = [loss, top[:, 0].sum(), top.sum()]
        if reference is not None:
            teacher = reference[batch].to(device, non_blocking=True)
            totals.append((logits.argmax(dim=1) == teacher.argmax(dim=1)).sum())
            log_probabilities = (F.log_softmax(x, dim=-1) for x in (logits, teacher))
            totals.append(F.kl_div(*log_probabilities, reduction="sum", log_target=True))
        if keep is not None:
            keep.append(logits.cpu())
        sums += torch.stack(totals).to(wide)
        count += len(targets)
    sums = torch.cat([sums, torch.tensor([count], dtype=wide, device=device)])
    if shared:
        utils.all_reduce_(sums)
    *totals, count = sums.tolist()
    if not math.isfinite(totals[0]):
        raise UserError(
            "the network's weights are not finite any more; nothing was saved since: "
            "lower --lr, or set --clip_grad 1.0"
        )
    means = {name: total / count for name, total in zip(names, totals, strict=True)}
    return {k: v if k in ("loss", "kl") else 100 * v for k, v in means.items()}
