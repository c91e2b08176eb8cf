"""How the terminal shows a run: a live line, or one every few seconds; rows; the final table."""

import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

from tqdm import tqdm

from runtime import distributed
from runtime.distributed import log

MANY_CLASSES = 10  # above which the top-5 accuracy is shown
LOSSES = ("loss", "ce", "kd")  # of the training losses, those that are shown


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
            memory: peak, in bytes; None where it is not known.
        """
        left = (updates - done) * images / rate
        losses = "  ".join(f"{name} {means[name]:.4f}" for name in LOSSES if name in means)
        place = f"Epoch {epoch} [{done:>{len(str(updates))}}/{updates}]"
        text = f"{losses}  lr {lr:.2e}  {rate:,.0f} images/s"
        if memory is not None:
            text += f"  {memory / 2**30:.2f} GiB"
        if self.is_live:
            if self.bar is None:
                self.bar = status_line()
            run = left + (self.epochs - epoch - 1) * updates * images / rate
            self.bar.total, self.bar.n = updates, done
            # Redraws the line, the most important first: the rest is cut in a narrow terminal.
            self.bar.set_description_str(f"{place} {clock(left)} left, run {clock(run)}  {text}  ")
        elif time.monotonic() - self.shown >= self.seconds:
            log(f"{place}  {text}  epoch {clock(left)} left")
            self.shown = time.monotonic()

    def epoch(self, record: Mapping[str, float], best: float | None, rate: float) -> None:
        """Add the row of a finished epoch.

        Args:
            record: of log.txt.
            best: highest accuracy so far, this epoch included; None where nothing is evaluated.
            rate: images trained per second, over the epoch.
        """
        self.clear()
        width = len(str(self.epochs - 1))
        cells = [f"Epoch {record['epoch']:>{width}}"]
        cells.append(f"train loss {record['train_loss']:.4f}" if "train_loss" in record else "")
        if "train_kd" in record:  # without labels there is no ce
            parts = [name for name in ("ce", "kd") if f"train_{name}" in record]
            cells += [f"{name} {record[f'train_{name}']:.4f}" for name in parts]
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
        log("  ".join(cell for cell in cells if cell))
        self.shown = time.monotonic()

    def clear(self) -> None:
        """Remove the live line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


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


# ------------------------------------------------------------------------ the end of a run


def summary_table(columns: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A table with one column per network and one row per name that any of them has.

    Args:
        columns: heading -> name of a row -> text.
    """
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(column.get(name, "") for column in columns.values())] for name in names]
    return table([["", *columns], *rows])


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned cells, the first of each row to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:{widths[0]}}", *cells]).rstrip())
    return lines


def time_line(seconds: Mapping[str, float]) -> str:
    """How a run's time was divided, such as 'teacher 31 %, student 60 %'."""
    total = sum(seconds.values())
    parts = [f"{name} {100 * value / total:.0f} %" for name, value in seconds.items()]
    return f"{clock(total)}: {', '.join(parts)}"


def aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of a name and a text, the texts below each other."""
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {text}" for name, text in rows]
