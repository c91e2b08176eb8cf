"""The records of a run: means of its steps, `log.txt`, what terminal and TensorBoard are told."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
import torch.distributed as dist

import runtime
import utils
from board import (
    CHARTS,
    PICTURES,
    TRAINING_CHARTS,
    Board,
    answer_text,
    board_folder,
    label_text,
    to_pictures,
)
from terminal import MANY_CLASSES, Terminal
from utils import UserError

if TYPE_CHECKING:
    from loaders import Batch, Loader

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
    """Keeps the scalars of an epoch on the device and fetches them only every few steps.

    Fetching a scalar waits for the device, so most steps never wait.

    Args:
        epoch: number of the epoch, for the printed lines.
        updates: optimizer steps of the epoch.
        lr, weight_decay: (steps,) of every optimizer step of the run.
        print_freq: most optimizer steps between two looks; fewer where steps are slow.
        scaler: where it is enabled, it leaves out steps that are not finite.
        recorder: is told at every look.
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
        recorder: Recorder,
        progress: Progress,
    ) -> None:
        self.epoch, self.updates, self.lr, self.weight_decay = epoch, updates, lr, weight_decay
        self.device, self.print_freq, self.scaler = device, print_freq, scaler
        self.every = 0  # optimizer steps between two looks; 0 until steps were timed
        self.recorder = recorder
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
        batch: Batch,
    ) -> None:
        """Note a batch. Scalars of its logits are computed for many batches at once, since these
        small kernels would cost the same for each batch."""
        student_logits = student_logits.detach()
        scalars = StepScalars(loss.detach(), parts, student_logits, teacher_logits, batch.targets)
        if self.epoch == 0 and not (self.count or self.waiting or self.tables):
            self.recorder.show_batch(batch, teacher_logits)
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
        """Note an optimizer step; look at the scalars where that is due."""
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
        # Divisors, so that looks come at the same steps whatever the earlier ones were.
        divisors = [n for n in range(1, self.print_freq + 1) if self.print_freq % n == 0]
        every = max(n for n in divisors if n <= most)
        self.stop, negative = runtime.largest([runtime.received_signal(), -every], self.device)
        self.every = -negative

    def flush(self, updates: int) -> Progress:
        """Fetch what is waiting; returns what a checkpoint after `updates` must hold.

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
        means = dict(zip(self.names, rows.mean(axis=0), strict=True))
        last = first + len(step_norms) - 1
        opt = {
            "opt/lr": self.lr[last],
            "opt/weight_decay": self.weight_decay[last],
            "opt/grad_norm": step_norms.mean(),
        }
        self.recorder.look(
            self.epoch, update + 1, self.updates, means, opt, images, self.stopwatch.rate(images)
        )
        self.tables, self.norms, self.batches_per_update, self.images = [], [], [], 0

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


class TimeSplit:
    """Seconds of a run by what they were spent on; the rest is the student's.

    On a GPU, the time of the teacher is that of the device, and all others are those of the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        """Add what happens inside to a part of the time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._add(what, time.perf_counter() - started)

    @contextmanager
    def on_device(self, what: str) -> Iterator[None]:
        """The same for what the device computes, without waiting for it."""
        if self.device.type != "cuda":
            with self.spent_on(what):
                yield
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self.events.append((what, start, end))
        self._collect()

    def timed(self, loader: Loader) -> TimedLoader:
        """A loader for whose batches the waiting is timed."""
        return TimedLoader(loader, self)

    def parts(self) -> dict[str, float]:
        """Seconds by name; they add up to the time since this was made."""
        if self.events:
            torch.cuda.synchronize(self.device)
            self._collect()
        rest = time.perf_counter() - self.started - sum(self.seconds.values())
        return {"student": max(0.0, rest)} | self.seconds

    def _add(self, what: str, seconds: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds

    def _collect(self) -> None:
        while self.events and self.events[0][2].query():
            what, start, end = self.events.pop(0)
            self._add(what, start.elapsed_time(end) / 1000)


class TimedLoader:
    """A loader whose callers' waiting is timed; otherwise the loader itself."""

    def __init__(self, loader: Loader, times: TimeSplit) -> None:
        self.loader, self.times = loader, times

    @property
    def batches_in_epoch(self) -> int:
        """Batches of this process in a whole epoch."""
        return self.loader.batches_in_epoch

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch to begin with."""
        self.loader.set_epoch(epoch, first_batch)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        while True:
            with self.times.spent_on("waiting for data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


# ------------------------------------------------------------------------- after each epoch


def scores_of(record: Mapping[str, float]) -> dict[str, float]:
    """The part of an epoch's record that was measured on the validation images."""
    return {n: value for n, value in record.items() if n.startswith(("test_", "teacher_"))}


class Recorder:
    """Tells terminal, `log.txt` and TensorBoard what a run does; without files, only the terminal.

    Args:
        terminal: shows lines; None for a terminal with defaults.
        path: log.txt, which holds one JSON object per epoch; None for no file.
        board: TensorBoard, or None.
        images_per_step: of an optimizer step, on all processes.
        config: what the student is shown (see transforms.data_config), and the class names.
        device: whose memory is told.
    """

    def __init__(
        self,
        terminal: Terminal | None = None,
        path: Path | None = None,
        board: Board | None = None,
        images_per_step: int = 1,
        config: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.terminal = terminal or Terminal(epochs=1)
        self.path, self.board = path, board
        self.images_per_step, self.config = images_per_step, config or {}
        self.device = device or torch.device("cpu")

    @classmethod
    def open(
        cls,
        args: dict[str, Any],
        device: torch.device,
        config: Mapping[str, Any],
        start_epoch: int,
        first_step: int,
    ) -> Recorder:
        """Open the files of a run that starts at this epoch and optimizer step.

        Beside log.txt, args.json holds the arguments and environment.json what they ran on.

        What an interrupted run wrote of later epochs is dropped, since they will be run again; so
        log.txt is the same whether or not the run was interrupted.
        """
        path = board = None
        images_per_step = args["batch_size"] * args["update_freq"] * runtime.world_size()
        if runtime.is_main_process():
            found = environment(device)
            if args["output_dir"]:
                path = Path(args["output_dir"]) / "log.txt"
                drop_lines_from(path, start_epoch)
                write_whole(path.with_name("args.json"), json.dumps(args, indent=1))
                write_whole(path.with_name("environment.json"), json.dumps(found, indent=1))
            folder = board_folder(args["log_dir"], args["output_dir"], first_step > 0)
            if folder is not None:
                board = Board(folder, first_step * images_per_step)
                board.text("command", found["command"])
                board.text("settings", json.dumps(args, indent=1))
                board.text("environment", json.dumps(found, indent=1))
        terminal = Terminal(args["epochs"], args["print_seconds"], len(config["classes"]))
        return cls(terminal, path, board, images_per_step, config, device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def show_batch(self, batch: Batch, teacher_logits: torch.Tensor | None) -> None:
        """Show training images as the network sees them, with what the teacher says."""
        if self.board is None or batch.images.ndim != 4:  # features, in a linear probe
            return
        classes = self.config["classes"]
        images = batch.images[:PICTURES]
        captions = [label_text(target, classes) for target in batch.targets[:PICTURES].cpu()]
        if teacher_logits is not None:
            answers = [answer_text(row, classes) for row in teacher_logits[:PICTURES].cpu()]
            captions = [f"{c}\nteacher {a}" for c, a in zip(captions, answers, strict=True)]
        pictures = to_pictures(images, self.config["mean"], self.config["std"])
        self.board.pictures("training_images", pictures, captions)

    def look(
        self,
        epoch: int,
        done: int,
        updates: int,
        means: dict[str, float],
        opt: dict[str, float],
        images: int,
        rate: float,
    ) -> None:
        """Tell about the optimizer steps since the last look.

        Args:
            done, updates: steps of the epoch that are done, and all of them.
            means: loss and its parts, means over these steps.
            opt: charts of the optimizer.
            images: of these steps, on all processes.
            rate: images per second.
        """
        shown = dict(means)
        if set(means) == {"loss", "ce"}:
            del shown["ce"]  # the same number: nothing is distilled
        per_step = self.images_per_step
        memory = runtime.peak_memory(self.device)
        self.terminal.step(epoch, done, updates, shown, opt["opt/lr"], rate, per_step, memory)
        if self.board is not None:
            values = {TRAINING_CHARTS[name]: value for name, value in means.items()}
            seen = (epoch * updates + done) * self.images_per_step
            speed = {"speed/images_per_second": rate}
            self.board.scalars("train", values | opt | speed, seen)

    def write(self, record: dict[str, Any], seen: int, best: float | None, rate: float) -> None:
        """Print the row of an epoch and keep its record.

        Args:
            record: what log.txt is to hold.
            seen: optimizer steps of the run so far.
            best: highest accuracy so far; None where nothing is evaluated.
            rate: images trained per second.
        """
        self.terminal.epoch(record, best, rate)
        if self.path is not None:
            append_line(self.path, json.dumps(record))
        if self.board is None:
            return
        curves: dict[str, dict[str, float]] = {}
        for name, value in scores_of(record).items():
            curve, _, score = name.partition("_")
            if score.endswith("_ema"):
                curve, score = f"{curve}_ema", score.removesuffix("_ema")
            if score != "acc5" or len(self.config["classes"]) > MANY_CLASSES:
                curves.setdefault(curve, {})[CHARTS[score]] = value
        self.board.seen = seen * self.images_per_step
        for curve, values in curves.items():
            self.board.scalars(curve, values, self.board.seen)
        self.board.flush()

    def close(self) -> None:
        """Remove the live line and close the files."""
        self.terminal.clear()
        if self.board is not None:
            self.board.close()


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
