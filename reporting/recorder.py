"""The records of a run: log.txt, and what terminal and TensorBoard are given."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data.loaders import Batch
from reporting.runs import read_records
from reporting.tables import figure_of, split_name
from reporting.tensorboard import (
    PICTURES,
    Board,
    answer_text,
    board_folder,
    label_text,
    to_pictures,
)
from reporting.terminal import MANY_CLASSES, Terminal
from runtime import distributed
from runtime.device import has_streams, peak_memory
from utils import append_line, write_whole

# ------------------------------------------------------------------------- after each epoch


def scores_of(record: Mapping[str, float]) -> dict[str, float]:
    """The part of an epoch's record that was measured on the validation images."""
    return {n: value for n, value in record.items() if n.startswith(("test_", "teacher_"))}


class Recorder:
    """Reports a run to terminal, `log.txt` and TensorBoard; without files, only to the terminal.

    Args:
        terminal: shows lines; None for a terminal with defaults.
        path: log.txt, which holds one JSON object per epoch; None for no file.
        board: TensorBoard, or None.
        images_per_step: of an optimizer step, on all processes.
        config: what the student is shown (see datasets.data_config), and the class names.
        device: whose memory is printed.
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
        images_per_step = args["batch_size"] * args["update_freq"] * distributed.world_size()
        if distributed.is_main_process():
            machine = environment(device)
            if args["output_dir"]:
                path = Path(args["output_dir"]) / "log.txt"
                drop_lines_from(path, start_epoch)
                write_whole(path.with_name("args.json"), json.dumps(args, indent=1))
                write_whole(path.with_name("environment.json"), json.dumps(machine, indent=1))
            folder = board_folder(args["log_dir"], args["output_dir"], first_step > 0)
            if folder is not None:
                board = Board(folder, first_step * images_per_step)
                board.text("command", machine["command"])
                board.text("settings", json.dumps(args, indent=1))
                board.text("environment", json.dumps(machine, indent=1))
        classes = len(config["classes"])
        terminal = Terminal(args["epochs"], args["print_seconds"], classes, first_step)
        return cls(terminal, path, board, images_per_step, config, device)

    def show_batch(self, batch: Batch, teacher_logits: torch.Tensor | None) -> None:
        """Show training images as the network sees them, with what the teacher says."""
        if self.board is None or batch.images.ndim != 4:  # features, in a linear probe
            return
        classes = self.config["classes"]
        images = batch.images[:PICTURES]
        captions = [label_text(target, classes) for target in batch.targets[:PICTURES].cpu()]
        if teacher_logits is not None:
            answers = [answer_text(row, classes) for row in teacher_logits[:PICTURES].cpu()]
            captions = [f"{c}\nteacher:\n{a}" for c, a in zip(captions, answers, strict=True)]
        pictures = to_pictures(images, self.config["mean"], self.config["std"])
        self.board.pictures("training_images", pictures, captions)

    def look(
        self,
        epoch: int,
        done: int,
        updates: int,
        means: dict[str, float],
        opt: dict[str, float],
        rate: float,
    ) -> None:
        """Report the optimizer steps since the last look.

        Args:
            done, updates: steps of the epoch that are done, and all of them.
            means: loss and its parts, means over these steps.
            opt: charts of the optimizer.
            rate: images per second.
        """
        memory = peak_memory(self.device)
        self.terminal.step(epoch, done, updates, means, opt["opt/lr"], rate, memory)
        if self.board is not None:
            values = {figure_of(f"train_{name}").chart: value for name, value in means.items()}
            seen = (epoch * updates + done) * self.images_per_step
            speed = {"speed/images_per_second": rate}
            self.board.scalars("train", values | opt | speed, seen)

    def write(self, record: dict[str, Any], steps: int, best: float | None, rate: float) -> None:
        """Print the row of an epoch and keep its record.

        Args:
            record: what log.txt is to hold.
            steps: optimizer steps of the run so far.
            best: highest accuracy so far; None if nothing is evaluated.
            rate: images trained per second.
        """
        self.terminal.epoch(record, best, rate, steps)
        if self.path is not None:
            append_line(self.path, json.dumps(record))
        if self.board is None:
            return
        curves: dict[str, dict[str, float]] = {}
        for name, value in scores_of(record).items():
            curve, score = split_name(name)
            if score != "acc5" or len(self.config["classes"]) > MANY_CLASSES:
                curves.setdefault(curve, {})[figure_of(name).chart] = value
        self.board.seen = steps * self.images_per_step
        for curve, values in curves.items():
            self.board.scalars(curve, values, self.board.seen)
        self.board.flush()

    def close(self) -> None:
        """Remove the live line and close the files."""
        self.terminal.clear()
        if self.board is not None:
            self.board.close()


def drop_lines_from(path: Path, epoch: int) -> None:
    """Keep only the lines of log.txt of epochs before `epoch`."""
    records = read_records(path) if path.exists() else []
    lines = [json.dumps(record) + "\n" for record in records if record["epoch"] < epoch]
    write_whole(path, "".join(lines))


def environment(device: torch.device) -> dict[str, Any]:
    """What a run ran on, in plain values: command, versions, commit, device, processes, threads."""
    packages = ("torch", "torchvision", "timm", "numpy", "pillow")
    gpu = torch.get_device_module(device) if has_streams(device) else None
    return {
        "command": shlex.join(sys.argv),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "machine": platform.platform(),
        "device": gpu.get_device_name(device) if gpu else str(device),
        "processes": distributed.world_size(),
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
