"""Pictures of runs: accuracy over the epochs, and over two settings; calibration."""

import io
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils import UserError

ENDINGS = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")
MANY_GROUPS = 6  # above which single runs would hide the bands
COLORS = 10  # of matplotlib's cycle; further groups get dashed lines

Curve = Mapping[int, float]  # epoch, as counted in log.txt -> accuracy in percent


class Grid(NamedTuple):
    """Accuracies over α and temperature, each of which varies."""

    alphas: Sequence[float]
    temperatures: Sequence[float]
    means: Sequence[Sequence[float]]  # (alphas, temperatures) in percent; NaN where there is no run


def check_picture(path: Path) -> None:
    """Raise UserError for a path that no picture can be written to."""
    if path.is_dir():
        raise UserError(
            f"{path}: is a folder; pass the name of a picture, such as curves.png", "output"
        )
    if path.suffix.lower() not in ENDINGS:
        raise UserError(
            f"{path}: is not the name of a picture; end it in {', '.join(ENDINGS)}", "output"
        )
    if not path.parent.is_dir():
        raise UserError(
            f"{path}: the folder {path.parent} does not exist; create it first", "output"
        )


def plot(groups: Mapping[str, Sequence[Curve]], grid: Grid | None, path: Path) -> None:
    """Draw the curves of each group of runs, and the grid as a heat map beside them.

    A group is its mean over the seeds, a band of ± the standard deviation, and each run as a thin
    line.

    Args:
        groups: name -> the curve of each run.
    Raises: UserError if matplotlib is missing or the file cannot be written.
    """
    figure = new_figure(12 if grid else 7, 4.5)
    axes = figure.subplots(1, 2 if grid else 1, squeeze=False)[0]
    draw_curves(axes[0], groups)
    if grid:
        figure.colorbar(draw_grid(axes[1], grid), ax=axes[1])
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); pass another file", "output"
        ) from error


def new_figure(width: float, height: float) -> Any:
    """A figure of matplotlib, in inches. Raises: UserError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"needs matplotlib ({error}); pip install matplotlib", "output") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def draw_curves(axes: Any, groups: Mapping[str, Sequence[Curve]]) -> None:
    """Mean, deviation and single runs of each group over the epochs.

    Args:
        axes: of matplotlib.
    """
    from matplotlib.ticker import MaxNLocator

    for number, (name, curves) in enumerate(groups.items()):
        epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
        scores = [[curve[epoch] for curve in curves] for epoch in epochs]
        means = [statistics.mean(values) for values in scores]
        style = {"color": f"C{number % COLORS}", "linestyle": "-" if number < COLORS else "--"}
        marker = "o" if len(epochs) == 1 else ""
        axes.plot(epochs, means, label=name, linewidth=1.8, marker=marker, **style)
        if len(curves) < 2:
            continue
        deviations = [statistics.stdev(values) for values in scores]
        pairs = list(zip(means, deviations, strict=True))
        low, high = [mean - s for mean, s in pairs], [mean + s for mean, s in pairs]
        axes.fill_between(epochs, low, high, color=style["color"], alpha=0.15, linewidth=0)
        for curve in curves if len(groups) <= MANY_GROUPS else ():
            axes.plot(epochs, [curve[e] for e in epochs], alpha=0.3, linewidth=0.6, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#E5E5E5")
    bottom = axes.get_ylim()[0]
    axes.set(
        xlabel="epoch, as in log.txt",
        ylabel="test accuracy %" + (f" (axis from {bottom:.0f})" if bottom > 0 else ""),
    )
    title = "mean and ± 1 standard deviation over seeds"
    title += "; thin: single runs" if len(groups) <= MANY_GROUPS else ""
    has_bands = any(len(curves) > 1 for curves in groups.values())
    axes.set_title(title if has_bands else "one run each", fontsize=8)
    axes.legend(fontsize=8, frameon=False)


def draw_grid(axes: Any, grid: Grid) -> Any:
    """A heat map with its numbers; returns the image of matplotlib."""
    rows, columns, means = grid
    image = axes.imshow(means, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
    axes.set(xlabel="kd_temperature", ylabel="kd_alpha")
    axes.set_title("test accuracy % of the last epoch, mean over seeds", fontsize=8)
    for row, column in itertools.product(range(len(rows)), range(len(columns))):
        value = means[row][column]
        if value == value:  # not NaN
            color = "black" if image.norm(value) > 0.6 else "white"  # legible on viridis
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
    return image


# ----------------------------------------------------------------------- pictures of a page

PAGE_COLORS = {"alone": "#C2571A", "distilled": "#1565C0", "teacher": "#2E7D32"}


def page_pictures(
    groups: Mapping[str, Sequence[Mapping[float, float]]], reports: Mapping[str, Mapping[str, Any]]
) -> tuple[bytes, bytes]:
    """Accuracy over the training, with a band from worst to best seed; accuracy over confidence.

    Args:
        groups: 'alone' and so on -> per seed, accuracy by the part of the training in %.
        reports: of metrics.report; also of 'teacher'.
    Returns: two SVG files. Raises: UserError if matplotlib is missing.
    """
    figures = [new_figure(5.2, 3.7) for _ in range(2)]
    progress, reliability = (figure.subplots() for figure in figures)
    for name, curves in groups.items():
        places = sorted(set.intersection(*(set(curve) for curve in curves)))
        scores = [[curve[place] for curve in curves] for place in places]
        color, means = PAGE_COLORS[name], [statistics.mean(values) for values in scores]
        progress.plot(places, means, "o-", color=color, label=f"student {name}")
        low, high = [min(values) for values in scores], [max(values) for values in scores]
        progress.fill_between(places, low, high, color=color, alpha=0.18, linewidth=0)
    if "teacher" in reports:
        style = {"color": PAGE_COLORS["teacher"], "linestyle": "--", "label": "teacher"}
        progress.axhline(reports["teacher"]["acc1"], **style)
    progress.set(xlabel="% of the training", ylabel="accuracy in %")
    reliability.plot([0, 100], [0, 100], color="#888888", linestyle=":", label="calibrated")
    for name, report in reports.items():
        x, y, images = (
            [one[k] for one in report["bins"]] for k in ("confidence", "acc1", "images")
        )
        color, label = PAGE_COLORS[name], name if name == "teacher" else f"student {name}"
        reliability.plot(x, y, "o-", markersize=3, color=color, alpha=0.5, label=label)
        areas = [300 * count / report["images"] for count in images]
        reliability.scatter(x, y, s=areas, color=color, alpha=0.7, linewidth=0)
    reliability.set(xlabel="mean confidence in %", ylabel="accuracy in %")
    files = []
    for figure, axes in zip(figures, (progress, reliability), strict=True):
        axes.grid(color="#E5E5E5")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=9, frameon=False)
        files.append(io.BytesIO())
        figure.savefig(files[-1], format="svg")
    return files[0].getvalue(), files[1].getvalue()
