"""How the terminal shows a run: a live line, or one every few seconds; rows; the final table."""

import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

from tqdm import tqdm

from reporting.tables import figure_of
from runtime import distributed
from runtime.distributed import log

MANY_CLASSES = 10  # above which the top-5 accuracy is shown


class Terminal:
    """Shows how far a run is. Above rank 0 nothing is shown.

    In a terminal, one line is kept up to date; in a file or a pipe, a line is added every few
    seconds.

    Args:
        epochs: of the run.
        seconds: least time between two added lines; 0 for a line at every look at the device.
        num_classes: with few classes, the top-5 accuracy is not shown.
    """

    def __init__(self, epochs: int, seconds: float = 10, num_classes: int = 1000) -> None:
        self.epochs, self.seconds, self.num_classes = epochs, seconds, num_classes
        self.shown = time.monotonic()  # when a line was last added
        self.bar: tqdm | None = None
        self.is_live = distributed.is_main_process() and sys.stdout.isatty()

    def step(
        self,
        epoch: int,
        done: int,
        updates: int,
        means: Mapping[str, float],
        lr: float,
        rate: float,
        images: float,
        memory: int | None,
    ) -> None:
        """Tell about a step of an epoch.

        Args:
            done, updates: optimizer steps of the epoch: done, and in all.
            means: loss and its parts since the last look.
            rate: images per second since then.
            images: of an optimizer step.
            memory: peak, in bytes; None if it is not known.
        """
        left = (updates - done) * images / rate
        run = left + (self.epochs - epoch - 1) * updates * images / rate
        losses = "  ".join(loss_cells({f"train_{name}": value for name, value in means.items()}))
        place = f"Epoch {epoch} [{done:>{len(str(updates))}}/{updates}]"
        text = f"{losses}  lr {lr:.2e}  {rate:,.0f} images/s"
        if memory is not None:
            text += f"  {memory / 2**30:.2f} GiB"
        if self.is_live:
            if self.bar is None:
                self.bar = status_line()
            self.bar.total, self.bar.n = updates, done
            # Redraws the line, the most important first: the rest is cut in a narrow terminal.
            self.bar.set_description_str(f"{place} {clock(left)} left, run {clock(run)}  {text}  ")
        elif time.monotonic() - self.shown >= self.seconds:
            log(f"{place}  {text}  {clock(left)} left, run {clock(run)}")
            self.shown = time.monotonic()

    def epoch(self, record: Mapping[str, float], best: float | None, rate: float) -> None:
        """Add the row of a finished epoch.

        Args:
            record: of log.txt.
            best: highest accuracy so far, this epoch included; None if nothing is evaluated.
            rate: images trained per second, over the epoch.
        """
        self.clear()
        width = len(str(self.epochs - 1))
        cells = [f"Epoch {record['epoch']:>{width}}"]
        cells += loss_cells(record, "train ")
        if "test_acc1" in record:
            cells.append(f"test loss {record['test_loss']:.4f}")
            cells.append(f"acc1 {record['test_acc1']:6.2f} (best {best:6.2f})")
            if self.num_classes > MANY_CLASSES:
                cells.append(f"acc5 {record['test_acc5']:6.2f}")
            if "test_acc1_ema" in record:
                cells.append(f"EMA {record['test_acc1_ema']:6.2f}")
            if "test_agreement" in record:
                cells.append(f"agreement {record['test_agreement']:6.2f}")
        cells.append(f"{rate:,.0f} images/s")
        log("  ".join(cells))
        self.shown = time.monotonic()

    def clear(self) -> None:
        """Remove the live line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def loss_cells(record: Mapping[str, float], before: str = "") -> list[str]:
    """A training loss and its parts; a single part is the loss itself, which is shown once.

    Args:
        record: of log.txt.
    """
    figures = [(figure_of(name), record[name]) for name in record if name.startswith("train_")]
    cells = [f"{f.word} {value:.{f.decimals}f}" for f, value in figures if f.word]
    return [before + cells[0], *(cells[1:] if len(cells) > 2 else [])] if cells else []


def status_line() -> tqdm:
    """A line that is kept up to date and never longer than the terminal is wide."""
    tqdm.monitor_interval = 0  # no thread that watches over it: loader workers may be forked
    return tqdm(
        file=sys.stdout,
        bar_format="{desc}|{bar:8}|",
        dynamic_ncols=True,
        leave=False,
    )


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
    """Lines of a name and a text, the texts below each other."""
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {text}" for name, text in rows]
