"""The names of scores and loss parts, and tables of them as text; imports no torch."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Figure(NamedTuple):
    """How one figure of a run is shown. A name without an entry below is shown by that name."""

    chart: str  # of TensorBoard: family and name
    heading: str  # in tables, with the unit; "" leaves it out there
    decimals: int = 2
    word: str = ""  # in the terminal's lines; "" leaves it out there


FIGURES = {
    # Training losses and their parts.
    "train_loss": Figure("loss/total", "training loss", 4, "loss"),
    "train_ce": Figure("loss/ce", "training cross-entropy", 4, "ce"),
    "train_kd": Figure("loss/kd", "distillation loss", 4, "kd"),
    "train_kd_labeled": Figure("loss/kd_labeled", "distillation loss, labeled", 4),
    "train_kd_unlabeled": Figure("loss/kd_unlabeled", "distillation loss, unlabeled", 4),
    "train_labeled": Figure("opt/labeled_share", "labeled share"),
    "train_teacher_acc1": Figure("acc/teacher_on_training_images", "teacher on training images %"),
    "train_lr": Figure("opt/lr", "learning rate", 6),
    "train_skipped_steps": Figure("opt/skipped_steps", "skipped steps", 0),
    # Scores, without the test_ or teacher_ before and the _ema behind them.
    "acc1": Figure("acc/acc1", "accuracy %"),
    "acc5": Figure("acc/acc5", ""),
    "loss": Figure("loss/ce", "cross-entropy", 4),
    "ece": Figure("acc/calibration_error", "calibration error %"),
    "agreement": Figure("fidelity/agreement", "agreement %"),
    "kl": Figure("fidelity/kl", "KL", 4),
    # Speed and costs, in summary.json.
    "images_per_second": Figure("", "images/s", 0),
    "parameters": Figure("", "parameters", 0),
    "multiply_adds": Figure("", "multiply-adds", 0),
    "ms_single": Figure("", "ms for 1 image"),
    "ms_large": Figure("", "ms for 32 images", 1),
}
LATENCIES = ("ms_single", "ms_large")
COSTS = ("parameters", "multiply_adds", *LATENCIES)


def split_name(name: str) -> tuple[str, str]:
    """A score of log.txt as (curve, figure): test_acc1_ema -> (test_ema, acc1); else ("", name)."""
    curve, _, figure = name.partition("_")
    if curve not in ("test", "teacher"):
        return "", name
    if figure.endswith("_ema"):
        return f"{curve}_ema", figure.removesuffix("_ema")
    return curve, figure


def figure_of(name: str) -> Figure:
    """How a figure is shown, by its name in log.txt or summary.json."""
    _, figure = split_name(name)
    plain = figure.removeprefix("train_")
    family = "scores" if plain == figure else "loss"
    return FIGURES.get(figure) or Figure(f"{family}/{plain}", plain, 4, plain)


def heading_of(name: str) -> str:
    """The heading of a figure in a table whose columns are figures; '' for one that has none."""
    heading = figure_of(name).heading
    words = {"test_ema": "EMA ", "teacher": "teacher "}
    return heading and words.get(split_name(name)[0], "") + heading


def in_order(names: Iterable[str]) -> list[str]:
    """Names of figures in the order of FIGURES, then those without an entry there."""
    order = {name: number for number, name in enumerate(FIGURES)}
    return sorted(names, key=lambda name: order.get(split_name(name)[1], len(order)))


def cell(values: Sequence[float], name: str) -> str:
    """'96.88 ± 0.76', mean and deviation; the mean alone if the values are one or equal counts.

    Of a latency, which a busy machine lengthens, the median and the range: '0.71 (0.68 to 1.02)'.
    """
    decimals = figure_of(name).decimals
    if not values:
        return ""
    if not all(map(math.isfinite, values)):
        return "not finite"
    if name in LATENCIES:
        middle, low, high = (
            f"{value:,.{decimals}f}"
            for value in (statistics.median(values), min(values), max(values))
        )
        return middle if len(values) == 1 else f"{middle} ({low} to {high})"
    mean = f"{statistics.mean(values):,.{decimals}f}"
    if len(values) == 1 or (decimals == 0 and len(set(values)) == 1):
        return mean
    return f"{mean} ± {statistics.stdev(values):,.{decimals}f}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned cells, the first of each row to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:{widths[0]}}", *cells]).rstrip())
    return lines
