"""How the terminal shows a run: a live line, or one every few seconds; rows; the final table."""

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

from tqdm import tqdm

from reporting.tables import figure_of
from runtime import distributed
from runtime.distributed import log
from utils import wrapped

MANY_CLASSES = 10  # above which the top-5 accuracy is shown
ROWS = 40  # under one header
# What is shown first if there is no room for all; log.txt has everything.
ROW = ("epoch", "acc1", "loss", "best", "left", "val loss", "kd", "EMA", "ce", "agree", "acc5")
STATUS = ("place", "left", "loss", "images/s", "lr", "memory", "kd", "ce")


class Terminal:
    """Shows how far a run is. Above rank 0 nothing is shown.

    In a terminal, one line is kept up to date; in a file or a pipe, a line is added every few
    seconds.

    Args:
        epochs: of the run.
        seconds: least time between two added lines; 0 for a line at every look at the device.
        num_classes: with few classes, the top-5 accuracy is not shown.
        first_step: optimizer steps that were done before this process began.
    """

    def __init__(
        self, epochs: int, seconds: float = 10, num_classes: int = 1000, first_step: int = 0
    ) -> None:
        self.epochs, self.seconds, self.num_classes = epochs, seconds, num_classes
        self.first_step, self.began = first_step, time.monotonic()
        self.shown = self.began  # when a line was last added
        self.bar: tqdm | None = None
        self.is_live = distributed.is_main_process() and sys.stdout.isatty()
        self.cells: dict[str, str] = {}  # of the first row below the last header
        self.header: dict[str, str] = {}  # those that fitted
        self.width = self.rows = 0  # of the terminal at the last header, and rows below it

    def step(
        self,
        epoch: int,
        done: int,
        updates: int,
        means: Mapping[str, float],
        lr: float,
        rate: float,
        memory: int | None,
    ) -> None:
        """Show a step of an epoch.

        Args:
            done, updates: optimizer steps of the epoch: done, and in all.
            means: loss and its parts since the last look.
            rate: images per second since then.
            memory: peak, in bytes; None if it is not known.
        """
        if not self.is_live and time.monotonic() - self.shown < self.seconds:
            return
        cells = {"place": f"Epoch {epoch} [{done:>{len(str(updates))}}/{updates}]"}
        cells["left"] = f"{self.time_left(epoch * updates + done, updates)} left"
        losses = loss_cells({f"train_{name}": value for name, value in means.items()})
        cells |= {name: f"{name} {text}" for name, text in losses.items()}
        cells |= {"lr": f"lr {lr:.2e}", "images/s": f"{rate:,.0f} images/s"}
        if memory is not None:
            cells["memory"] = f"{memory / 2**30:.2f} GiB"
        text = "  ".join(fitting(cells, STATUS, columns() - 1).values())
        if not self.is_live:
            log(text)
            self.shown = time.monotonic()
            return
        if self.bar is None:
            tqdm.monitor_interval = 0  # no thread that watches over it: workers may be forked
            self.bar = tqdm(file=sys.stdout, bar_format="{desc}", leave=False)
        self.bar.set_description_str(text)  # redraws the line

    def epoch(
        self, record: Mapping[str, float], best: float | None, rate: float, steps: int
    ) -> None:
        """Add the row of a finished epoch, below a header if its columns are new.

        Args:
            record: of log.txt.
            best: highest accuracy so far, this epoch included; None if nothing is evaluated.
            rate: images trained per second, over the epoch.
            steps: optimizer steps of the run so far.
        """
        self.clear()
        cells = {"epoch": f"{record['epoch']:5}"} | loss_cells(record)
        if "test_acc1" in record:
            cells["val loss"] = rounded(record["test_loss"])
            scores = {"acc1": record["test_acc1"], "best": best}
            scores |= {"EMA": record.get("test_acc1_ema"), "agree": record.get("test_agreement")}
            scores["acc5"] = record["test_acc5"] if self.num_classes > MANY_CLASSES else None
            cells |= {name: f"{score:.2f}" for name, score in scores.items() if score is not None}
        cells["left"] = self.time_left(steps, steps // (int(record["epoch"]) + 1))
        cells["images/s"] = f"{rate:,.0f}"
        # An epoch that is not evaluated has fewer cells than the header.
        is_new = not cells.keys() <= self.cells.keys() or self.width != columns()
        if is_new or self.rows % ROWS == 0:
            self.cells, self.width, self.rows = cells, columns(), 0
            heads = {name: f"{name:>{max(6, len(text))}}" for name, text in cells.items()}
            self.header = fitting(heads | {"epoch": "epoch"}, ROW, self.width)
            log("  ".join(self.header.values()))
        row = [f"{cells.get(name, ''):>{len(head)}}" for name, head in self.header.items()]
        log("  ".join(row).rstrip())
        self.rows += 1
        self.shown = time.monotonic()

    def time_left(self, step: int, updates: int) -> str:
        """Time to the end of the run if it goes on as since its start, evaluations included.

        Args:
            step: optimizer steps of the run so far.
            updates: optimizer steps of an epoch.
        """
        # A run that was stopped in an evaluation goes on with that, without a step.
        each = (time.monotonic() - self.began) / max(1, step - self.first_step)
        return clock(max(0, self.epochs * updates - step) * each)

    def clear(self) -> None:
        """Remove the live line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def columns() -> int:
    """How many characters a line may have: the terminal's width; 80 in a file or a pipe."""
    return shutil.get_terminal_size().columns


def fitting(cells: Mapping[str, str], importance: Sequence[str], width: int) -> dict[str, str]:
    """The cells that fit side by side, two spaces apart, in their order.

    Args:
        importance: names of cells, the most important first; cells without a name here come last.
    """
    order = {name: number for number, name in enumerate(importance)}
    kept, room = set(), width + 2
    for name in sorted(cells, key=lambda name: order.get(name, len(order))):
        if len(cells[name]) + 2 <= room:
            kept.add(name)
            room -= len(cells[name]) + 2
    return {name: text for name, text in cells.items() if name in kept}


def rounded(value: float) -> str:
    """A loss with four decimals, or with fewer of them if it would be longer than '12.345'."""
    return f"{value:.{max(0, min(4, 5 - len(f'{abs(value):.0f}')))}f}"


def loss_cells(record: Mapping[str, float]) -> dict[str, str]:
    """A training loss and its parts; a single part is the loss itself, which is shown once.

    Args:
        record: of log.txt.
    """
    words = {name: figure_of(name).word for name in record if name.startswith("train_")}
    cells = {word: rounded(record[name]) for name, word in words.items() if word}
    return cells if len(cells) > 2 else dict(list(cells.items())[:1])


def clock(seconds: float) -> str:
    """'0:01:23'"""
    return str(timedelta(seconds=round(seconds)))


def time_line(seconds: Mapping[str, float], since: str = "") -> str:
    """How a run's time was divided, such as '0:01:04: teacher 31 %, student 69 %'.

    Args:
        since: when the time began, such as ' since the restart'.
    """
    total = sum(seconds.values())
    parts = [f"{name} {100 * value / total:.0f} %" for name, value in seconds.items()]
    return f"{clock(total)}{since}: {', '.join(parts)}"


def aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of a name and a text, the texts below each other; commands are not broken."""
    width, lines = max(len(name) for name, _ in rows), []
    for name, text in rows:
        line = f"{name:{width}}  {text}"
        lines += [line] if " --" in text else wrapped(line, columns(), " " * (width + 2))
    return lines
