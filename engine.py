"""The loops: one epoch of training, one evaluation. They do not know about distillation."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn

from data.loaders import Batch, Loader
from reporting import metrics
from reporting.recorder import Recorder
from runtime import distributed
from runtime.device import send
from runtime.distributed import unwrap
from runtime.randomness import RandomUse, plant_seed, seed_of
from training.history import History, Progress
from training.optimizer import Schedule, clip_gradients
from training.settings import LoopSettings
from utils import UserError


class LogitsByPlaces(Protocol):
    """A teacher's logits (B, C) by the places of a batch: a dict, or what is cached on disk."""

    def __getitem__(self, places: range, /) -> torch.Tensor: ...


class TrainedModel(Protocol):
    """What `train_one_epoch` trains, such as distillation.StudentWithDistillation.

    Called with images (B, 3, H, W) and their key, it returns what the criterion takes before the
    targets: student_logits (B, C), teacher_logits (B, C) or None, and whatever else a loss needs.
    """

    student: nn.Module

    def __call__(self, images: torch.Tensor, key: tuple[int, range]) -> tuple[Any, ...]: ...

    def train(self, mode: bool = True) -> Any: ...

    def parameters(self, recurse: bool = True) -> Iterable[nn.Parameter]: ...

    def no_sync(self) -> AbstractContextManager: ...


# (*outputs of the TrainedModel, targets) -> (loss, parts)
Criterion = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]


def train_one_epoch(
    model: TrainedModel,
    criterion: Criterion,
    loader: Loader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    schedule: Schedule,
    epoch: int,
    settings: LoopSettings,
    ema: ModelEmaV3 | None = None,
    recorder: Recorder | None = None,
    progress: Progress | None = None,
    after_update: Callable[[History, int], None] | None = None,
) -> dict[str, float]:
    """Train for one epoch, or for what `progress` leaves of it.

    Args:
        criterion: is given the model's outputs as they come, and the targets.
        loader: batches of one size, on the device.
        ema: a moving average of the student, or None.
        recorder: keeps what happens; None for lines in the terminal alone.
        progress: how far an interrupted run came in this epoch.
        after_update: called after each optimizer step with the history and the steps done.
    Returns: means over the epoch's images on all processes: loss, its parts and what else History
        averages; the last lr; with a gradient scaler skipped_steps.
    Raises: UserError that names the step at which loss or gradient is not finite, before the epoch
        ends; with a gradient scaler such steps are left out and counted.
    """
    model.train()
    progress = progress or Progress()
    first_batch = progress.updates * settings.update_freq
    loader.set_epoch(epoch, first_batch)
    batches, freq = loader.batches_in_epoch, settings.update_freq
    updates = math.ceil(batches / freq)
    parameters = [p for p in model.parameters() if p.requires_grad]
    history = History(epoch, updates, schedule, settings, scaler, recorder or Recorder(), progress)
    # One per batch, so that dropout and drop path do not depend on what ran before: a run that
    # resumes here continues with the same numbers.
    key, rank = (RandomUse.STEP, settings.seed, epoch), distributed.rank()
    seeds = [seed_of(*key, number, rank) for number in range(first_batch, batches)]
    optimizer.zero_grad(set_to_none=True)
    for number, (batch, seed) in enumerate(zip(loader, seeds, strict=False), first_batch):
        update, part = divmod(number, freq)
        window = min(freq, batches - update * freq)  # the last window of an epoch may be shorter
        step = epoch * updates + update
        if part == 0:
            schedule.apply(optimizer, step)
        plant_seed(settings.device, seed)
        is_last = part == window - 1
        # Processes exchange gradients only once per optimizer step; before the last batch of a
        # window DDP just accumulates, which saves freq - 1 of freq exchanges.
        with nullcontext() if is_last else model.no_sync():
            with settings.autocast():
                outputs = model(batch.images, batch.key)
                loss, parts = criterion(*outputs, batch.targets)
            # Divided by the batches of this window, not by freq: so the gradient is the mean over
            # the images of the step also in the shorter window at the end of an epoch.
            scaler.scale(loss / window).backward()
        history.add_batch(loss, parts, outputs, batch)
        if not is_last:
            continue

        scaler.unscale_(optimizer)  # clipping and the log need the gradient's own size
        gradients = [p.grad for p in parameters if p.grad is not None]
        grad_norm = clip_gradients(gradients, settings.clip_grad)
        # No .item() here and no check of the loss: a sync per step would leave the GPU waiting.
        # History reads the numbers some steps later, and before anything is saved.
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update(unwrap(model.student), step=step + 1)
        history.end_update(update, grad_norm)
        if after_update is not None:
            after_update(history, update + 1)
    return history.means()


class Evaluation(NamedTuple):
    """What a network answered on images, and how well."""

    scores: dict[str, float]
    answers: list[metrics.Answers]  # of this process, batch by batch, on the settings' device
    logits: dict[range, torch.Tensor]  # (B, C) by the places of each batch, on the CPU, if kept


@torch.compiler.set_stance("force_eager")  # else each of its batch sizes would be compiled
@torch.inference_mode()
def evaluate(
    loader: Iterable[Batch],
    model: nn.Module,
    settings: LoopSettings,
    shared: bool = True,
    teacher_logits: LogitsByPlaces | None = None,
    keep_logits: bool = False,
) -> Evaluation:
    """Score a classifier: sums over images divided by their number, for any world and batch size.

    Args:
        loader: this process's batches on the device; together they hold every image once.
        model: images (B, 3, H, W) on the settings' device -> logits (B, C), on any device.
        shared: False if every process holds all images.
        teacher_logits: a teacher's logits (B, C) by the places of each batch.
        keep_logits: whether to return the logits too.
    Returns: an Evaluation with the scores loss (mean cross-entropy, no smoothing), acc1, acc5 and
        ece (expected calibration error) in percent; with teacher_logits also agreement (percent of
        images that both give the same class) and kl (mean KL(teacher || model) at temperature 1).
    Raises: UserError if the loss is not finite.
    """
    model.eval()
    device = settings.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    scales = {"loss": 1, "acc1": 100, "acc5": 100}
    scales |= {"agreement": 100, "kl": 1} if teacher_logits is not None else {}
    sums = torch.zeros(len(scales) + metrics.BINS, dtype=wide, device=device)
    count, answers, kept = 0, [], {}
    for batch in loader:
        with settings.autocast():
            logits = send(model(batch.images), device).float()  # (B, C)
        ranks = metrics.ranks_of(logits, batch.targets)  # (B,)
        loss = F.cross_entropy(logits, batch.targets, reduction="sum")
        totals = [loss, (ranks == 0).sum(), (ranks < 5).sum()]
        if teacher_logits is not None:
            expected = send(teacher_logits[batch.places], device)
            totals.append((logits.argmax(dim=1) == expected.argmax(dim=1)).sum())
            ours, theirs = F.log_softmax(logits, dim=-1), F.log_softmax(expected, dim=-1)
            totals.append(F.kl_div(ours, theirs, reduction="sum", log_target=True))
        if keep_logits:
            kept[batch.places] = logits.cpu()
        answers.append(metrics.answers_of(logits, batch.targets, batch.places))
        gaps = metrics.calibration_gaps(answers[-1].confidences.to(wide), ranks == 0)
        sums += torch.cat([torch.stack(totals).to(wide), gaps])
        count += len(batch.targets)
    sums = torch.cat([sums, torch.tensor([count], dtype=wide, device=device)])
    if shared:
        distributed.all_reduce_(sums)
    *totals_of_all, images = sums.tolist()
    totals_of_all, gaps_of_all = totals_of_all[: len(scales)], totals_of_all[len(scales) :]
    if not math.isfinite(totals_of_all[0]):
        raise UserError(
            "validation loss is not finite: the weights contain NaN or Inf; no checkpoint was "
            "written after this happened. Lower --lr, or pass --clip_grad 1.0"
        )
    pairs = zip(scales.items(), totals_of_all, strict=True)
    scores = {name: scale * (total / images) for (name, scale), total in pairs}
    scores["ece"] = metrics.calibration_error(gaps_of_all, images)
    return Evaluation(scores, answers, kept)
