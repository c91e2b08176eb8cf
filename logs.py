"""Everything that a run reports: lines in the terminal, `log.txt` and TensorBoard."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import runtime
import utils
from runtime import log
from utils import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SECONDS_BETWEEN_LOOKS = 5  # at the signals of other processes, where steps are slow
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


# ------------------------------------------------------------------------ within an epoch


@dataclass
class Progress:
    """How far an epoch has come: what a checkpoint inside it must hold, plain values only."""

    updates: int = 0  # optimizer steps done
    batches: int = 0  # batches that count in the means
    sums: dict[str, float] = field(default_factory=dict)  # of the loss and its parts over those
    skipped: int = 0  # steps that the gradient scaler left out

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any] | None) -> Progress | None:
        """Read from a checkpoint; None where that was not written inside an epoch."""
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
    teacher_logits: torch.Tensor | None  # (B, C)
    targets: torch.Tensor  # (B,) or (B, C)


class History:
    """Keeps the scalars of an epoch on the device and fetches them only when they are printed.

    Fetching a scalar waits for the device, so a step that is not printed never waits.

    Args:
        epoch: number of the epoch, for the printed lines.
        updates: optimizer steps of the epoch.
        lr, weight_decay: (steps,) of every optimizer step of the run.
        print_freq: most optimizer steps between two printed lines; fewer where steps are slow.
        scaler: where it is enabled, it leaves out steps that are not finite.
        progress: how far an interrupted run came in this epoch.
    """

    def __init__(
        self,
        epoch: int,
        updates: int,
        lr: np.ndarray,
        weight_decay: np.ndarray,
        device: torch.device,
        print_freq: int,
        scaler: torch.amp.GradScaler,
        writer: SummaryWriter | None,
        progress: Progress,
    ) -> None:
        self.epoch, self.updates, self.lr, self.weight_decay = epoch, updates, lr, weight_decay
        self.device, self.print_freq, self.scaler = device, print_freq, scaler
        self.every = 0  # optimizer steps between two printed lines; 0 until steps were timed
        self.writer = writer
        self.waiting: list[StepScalars] = []  # batches whose scalars are still to be computed
        self.waiting_bytes = 0
        self.tables: list[torch.Tensor] = []  # (batches, metrics + 1) each, since the last fetch
        self.norms: list[torch.Tensor] = []  # gradient norms, () each, one per optimizer step
        self.batches_per_update: list[int] = []
        self.batches_since_update = 0
        self.images = 0  # since the last fetch, on this process
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
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor | None,
        targets: torch.Tensor,
    ) -> None:
        """Note a batch. Scalars of its logits are computed for many batches at once, since these
        small kernels would cost the same for each batch."""
        student_logits = student_logits.detach()
        scalars = StepScalars(loss.detach(), parts, student_logits, teacher_logits, targets)
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
        if teachers[0] is not None and "labeled" not in columns:  # else labels are missing
            columns["teacher_acc1"] = accuracy(torch.stack(teachers), torch.stack(targets))
        if self.names != list(columns):  # the first batches; a checkpoint may hold other names
            sums = dict(zip(self.names, self.sums, strict=True))
            self.names = list(columns)
            self.sums = np.array([sums.get(name, 0.0) for name in self.names])
        largest = torch.stack(students).flatten(1).abs().amax(dim=1).float()
        self.tables.append(torch.stack([*columns.values(), largest], dim=1))
        self.waiting, self.waiting_bytes = [], 0

    def end_update(self, update: int, grad_norm: torch.Tensor) -> None:
        """Note an optimizer step; print a line where one is due."""
        self.norms.append(grad_norm.detach())
        self.batches_per_update.append(self.batches_since_update)
        self.batches_since_update = 0
        if runtime.world_size() == 1:
            self.stop = runtime.received_signal()  # free: there is no other process to ask
        if (update + 1) % (self.every or self.print_freq) == 0 or update + 1 == self.updates:
            steps, seconds = len(self.norms), self.stopwatch.seconds()
            self._fetch(update)
            self._look(seconds / steps)
        elif not self.every:
            self._look(self.stopwatch.seconds())

    def _look(self, seconds: float) -> None:
        """Ask the other processes for signals, and plan when to do so again. Collective.

        Args:
            seconds: duration of an optimizer step.
        """
        most = max(1, SECONDS_BETWEEN_LOOKS / seconds)
        # Divisors, so that lines come at the same steps whatever the earlier lines were.
        divisors = [n for n in range(1, self.print_freq + 1) if self.print_freq % n == 0]
        every = max(n for n in divisors if n <= most)
        self.stop, negative = runtime.largest([runtime.received_signal(), -every], self.device)
        self.every = -negative

    def flush(self, updates: int) -> Progress:
        """Fetch and print what is waiting; returns what a checkpoint after `updates` must hold.

        Raises: UserError where a loss or gradient was not finite.
        """
        if self.norms:
            self._fetch(updates - 1)
        sums = dict(zip(self.names, self.sums.tolist(), strict=True))
        return Progress(updates, self.count, sums, self.skipped)

    def _fetch(self, update: int) -> None:
        self._compute()
        first = self.epoch * self.updates + update + 1 - len(self.norms)
        table = torch.cat(self.tables)  # (batches, metrics + 1)
        norms = torch.stack(self.norms).float()  # (optimizer steps,)
        largest = table[:, -1].clone()
        runtime.all_reduce_(table)
        runtime.all_reduce_(largest, dist.ReduceOp.MAX)
        rows = (table[:, :-1] / runtime.world_size()).cpu().numpy()
        step_norms, largest_logits = norms.cpu().numpy(), largest.cpu().numpy()
        images = self.images * runtime.world_size()

        step_of_row = np.repeat(np.arange(len(step_norms)), self.batches_per_update)
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
        for values in rows[is_finite]:  # one by one, so that no sum depends on when it is fetched
            self.sums += values
        self.count += int(is_finite.sum())
        if self.writer is not None:
            with events_in(self.writer.log_dir):
                self._write(self.writer, first, rows, step_of_row, step_norms)
        means = dict(zip(self.names, rows.mean(axis=0), strict=True))
        if list(means) == ["loss", "ce"]:
            del means["ce"]  # the same number: nothing is distilled
        log(
            f"Epoch {self.epoch} [{update + 1:>{len(str(self.updates))}}/{self.updates}]  "
            + "  ".join(f"{name} {mean:.4f}" for name, mean in means.items())
            + f"  lr {self.lr[first + len(step_norms) - 1]:.2e}"
            + f"  {self.stopwatch.rate(images):.0f} images/s"
        )
        self.tables, self.norms, self.batches_per_update, self.images = [], [], [], 0

    def _write(
        self,
        writer: SummaryWriter,
        first: int,
        rows: np.ndarray,
        step_of_row: np.ndarray,
        norms: np.ndarray,
    ) -> None:
        for index, norm in enumerate(norms):
            step = first + index
            means = rows[step_of_row == index].mean(axis=0, dtype=np.float64)
            for name, mean in zip(self.names, means, strict=True):
                writer.add_scalar(f"train/{name}", mean, step)
            writer.add_scalar("opt/lr", self.lr[step], step)
            writer.add_scalar("opt/weight_decay", self.weight_decay[step], step)
            writer.add_scalar("opt/grad_norm", norm, step)

    def _not_finite(self, step: int, loss: float, largest: float, norm: float) -> UserError:
        return UserError(
            f"loss {loss} with gradient norm {norm:.3g} at step {step} (epoch {self.epoch}), "
            f"learning rate {self.lr[step]:.3g}, largest logit {largest:.3g}. No checkpoint was "
            "written after this happened; lower --lr, pass --clip_grad 1.0, or use "
            "--amp_dtype bfloat16"
        )

    def means(self) -> dict[str, float]:
        """Means over the batches that counted, if any did, and the last lr of the epoch."""
        means = {}
        if self.count:
            means = dict(zip(self.names, (self.sums / self.count).tolist(), strict=True))
        means["lr"] = float(self.lr[(self.epoch + 1) * self.updates - 1])
        return means | ({"skipped_steps": self.skipped} if self.scaler.is_enabled() else {})


class Stopwatch:
    """Images per second since the last reading."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since `rate` was last called."""
        return time.perf_counter() - self.started

    def rate(self, images: int) -> float:
        """Images per second since this was last called."""
        now = time.perf_counter()
        rate, self.started = images / (now - self.started), now
        return rate


# ------------------------------------------------------------------------- after each epoch


def scores_of(record: Mapping[str, float]) -> dict[str, float]:
    """The part of an epoch's record that was measured on the validation images."""
    return {n: value for n, value in record.items() if n.startswith(("test_", "teacher_"))}


class Recorder:
    """Reports every epoch: a printed line, `log.txt` and TensorBoard; does nothing above rank 0.

    Args:
        path: log.txt, which holds one JSON object per epoch; None for no file.
        writer: TensorBoard, or None.
    """

    def __init__(self, path: Path | None, writer: SummaryWriter | None) -> None:
        self.path, self.writer = path, writer

    @classmethod
    def open(
        cls, args: dict[str, Any], device: torch.device, start_epoch: int, first_step: int
    ) -> Recorder:
        """Open the files of a run that starts at this epoch and optimizer step.

        Beside log.txt, args.json holds the arguments and environment.json what they ran on.

        What an interrupted run wrote of later epochs is dropped, since they will be run again; so
        log.txt is the same whether or not the run was interrupted.
        """
        path = writer = None
        output_dir, log_dir = args["output_dir"], args["log_dir"]
        if output_dir and runtime.is_main_process():
            path = Path(output_dir) / "log.txt"
            drop_lines_from(path, start_epoch)
            write_whole(path.with_name("args.json"), json.dumps(args, indent=1))
            found = environment(device)
            write_whole(path.with_name("environment.json"), json.dumps(found, indent=1))
        if log_dir and runtime.is_main_process():
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            utils.make_folder(log_dir)
            _leave_errors_to_main_thread()
            with events_in(log_dir):
                writer = SummaryWriter(log_dir, purge_step=first_step)
        return cls(path, writer)

    def write(self, record: dict[str, Any]) -> None:
        """Print the scores of an epoch and keep its record."""
        scores = scores_of(record)
        if any(name.startswith("test_") for name in scores):
            log(f"Epoch {record['epoch']}  " + "  ".join(f"{n} {v:.4f}" for n, v in scores.items()))
        if self.path is not None:
            append_line(self.path, json.dumps(record))
        if self.writer is not None:
            with events_in(self.writer.log_dir):
                for name, value in scores.items():
                    self.writer.add_scalar(name.replace("_", "/", 1), value, record["epoch"])
                self.writer.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self.writer is not None:
            with events_in(self.writer.log_dir):
                self.writer.close()


@contextmanager
def events_in(folder: str) -> Iterator[None]:
    """Raise UserError where the file system refuses TensorBoard's file in a folder."""
    try:
        yield
    except OSError as error:
        raise utils.could_not_write(Path(folder) / "events.out.tfevents", error, "log") from error


def _leave_errors_to_main_thread() -> None:
    """Keep TensorBoard's writing thread from printing a traceback where it fails.

    The main thread raises the same error with its next call.
    """
    report = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        is_writer = type(failed.thread).__name__ == "_AsyncWriterThread"  # internal to tensorboard
        if not (is_writer and isinstance(failed.exc_value, OSError)):
            report(failed)

    threading.excepthook = hook


def append_line(path: Path, line: str) -> None:
    """Append a line and flush it to the disk. Raises: UserError where the file system refuses."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise utils.could_not_write(path, error) from error


def drop_lines_from(path: Path, epoch: int) -> None:
    """Keep only the lines of log.txt of epochs before `epoch`."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    kept = []
    for line in text.splitlines():
        try:
            is_kept = json.loads(line)["epoch"] < epoch
        except json.JSONDecodeError:
            is_kept = False  # cut short by a kill: its epoch will be run again
        if is_kept:
            kept.append(line + "\n")
    write_whole(path, "".join(kept))


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is always the old or the new one.

    Raises: UserError where the file system refuses.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise utils.could_not_write(path, error) from error


def environment(device: torch.device) -> dict[str, Any]:
    """What a run ran on, in plain values: command, versions, commit, device, processes, threads."""
    packages = ("torch", "torchvision", "timm", "numpy", "pillow")
    is_cuda = device.type == "cuda"
    return {
        "command": shlex.join(sys.argv),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name(device) if is_cuda else str(device),
        "processes": runtime.world_size(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The commit of this code, with '-dirty' after changes; None outside a git repository."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return None
    return done.stdout.strip() or None
