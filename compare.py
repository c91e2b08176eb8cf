"""Compare finished runs: a table over seeds, what differs, and whether that is more than the noise.

    python compare.py runs/*

Reads args.json and log.txt of each run. Runs whose flags differ only in the seed are one group. For
each pair of groups that differ in one flag, the accuracies of the last epoch are paired by seed:
the mean difference with its 95 % interval (Student's t), and what follows from it.
"""

import argparse
import itertools
import json
import math
import re
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from arguments.flags import DATA_FLAGS, NOT_RECIPE, OF_TEACHER, as_typed
from reporting import tables
from reporting.tables import COSTS, figure_of, heading_of

# Flags that do not change what a run computes, or only how it is repeated.
NOT_COMPARED = NOT_RECIPE | {"seed", "data_seed", "teacher_cache", "teacher_cache_only"}
NOT_COMPARED |= {"teacher_cache_range", "teacher_eval", "teacher_min_acc1", "check_data"}
SCORE = "test_acc1"
CONFIDENCE = 0.95
MANY_PAIRS = 5  # verdicts in one table, of which some may be chance


class BadRun(Exception):
    """A folder that does not hold a finished run; the message says what to do."""


@dataclass
class Run:
    """A finished run."""

    folder: Path
    args: dict[str, Any]
    records: list[dict[str, float]]  # of log.txt, one per epoch
    summary: dict[str, Any]  # of summary.json; empty for a run of an earlier version

    @property
    def seed(self) -> int:
        return self.args["seed"]

    @property
    def last(self) -> dict[str, float]:
        return self.records[-1]

    @property
    def figures(self) -> dict[str, float]:
        """What the table may show: scores of the last epoch, speed, and costs of the student."""
        speed = {k: v for k, v in self.summary.items() if k == "images_per_second"}
        return self.last | speed | self.cost("student")

    def cost(self, network: str) -> dict[str, float]:
        """Parameters, multiply-adds and milliseconds of 'student' or 'teacher', where known."""
        known = self.summary.get("costs", {}).get(network, {})
        return {name: value for name, value in known.items() if value is not None}

    def settings(self) -> dict[str, Any]:
        """The flags that make a group: without seeds, and without those that have no effect."""
        skipped = NOT_COMPARED if self.args.get("kd") else NOT_COMPARED | OF_TEACHER
        return {name: value for name, value in self.args.items() if name not in skipped}

    def settings_without_seed(self) -> dict[str, Any]:
        """The same, and a file that is named by the seed, such as teacher_0/best.pth, is one."""
        found, seed = self.settings(), rf"(?<!\d){self.seed}(?!\d)"
        for name in ("teacher_path", "finetune"):
            if isinstance(found.get(name), str):
                found[name] = re.sub(seed, "SEED", found[name])
        return found


@dataclass
class Group:
    """Runs that differ only in their seed."""

    settings: dict[str, Any]
    runs: dict[int, Run] = field(default_factory=dict)  # by seed
    name: str = ""

    @property
    def given(self) -> set[str]:
        """The flags on the command lines of its runs."""
        return {name for run in self.runs.values() for name in run.args["given"]}

    def takes(self, run: Run) -> bool:
        """Whether a run has the flags of this group."""
        first = next(iter(self.runs.values()))
        same_file = run.settings() == first.settings()
        return same_file or run.settings_without_seed() == first.settings_without_seed()

    def values(self, column: str) -> list[float]:
        """A figure of each run that has it."""
        return [run.figures[column] for run in self.runs.values() if column in run.figures]


def read_run(folder: Path) -> Run:
    """Read a run; raises BadRun where it is not one, or is not finished."""
    try:
        args = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        lines = (folder / "log.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, json.JSONDecodeError) as error:
        raise BadRun(
            f"{folder}: no run of main.py ({error}); pass folders of --output_dir"
        ) from error
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break  # cut short by a kill
    done = records[-1]["epoch"] + 1 if records else 0
    if done < args["epochs"]:
        raise BadRun(f"{folder}: {done} of {args['epochs']} epochs are done; finish it first")
    if SCORE not in records[-1]:
        raise BadRun(f"{folder}: its last epoch was not evaluated; train without --disable_eval")
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        summary = {}  # of an earlier version
    return Run(folder, args, records, summary)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs by their settings, in the order given; raises BadRun where a group has a seed twice."""
    groups: list[Group] = []
    for run in runs:
        group = next((group for group in groups if group.takes(run)), None)
        if group is None:
            groups.append(group := Group(run.settings()))
        if other := group.runs.get(run.seed):
            raise BadRun(
                f"{run.folder}: has the flags and the seed of {other.folder}; leave one of them out"
            )
        group.runs[run.seed] = run
        if group.settings != run.settings():
            group.settings = run.settings_without_seed()
    distilled = [group.settings for group in groups if group.settings.get("kd")]
    varied = [name for name, _ in differences([group.settings for group in groups])]
    told = [n for n in varied if n not in OF_TEACHER]
    told += [name for name, _ in differences(distilled) if name in OF_TEACHER]
    for group in groups:
        parts = [f"{n}={as_typed(group.settings[n])}" for n in told if n in group.settings]
        group.name = " ".join(parts) or "all runs"
    return groups


def differences(settings: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """The flags that are not the same in all settings, with the value in each."""
    names = dict.fromkeys(name for one in settings for name in one)
    found = [(name, [one.get(name) for one in settings]) for name in names]
    return [(name, values) for name, values in found if any(v != values[0] for v in values)]


# ------------------------------------------------------------------------------ the verdict


def t_quantile(confidence: float, freedom: int) -> float:
    """How far from 0 Student's t lies at most with this probability, on either side.

    With t = sqrt(freedom) * tan(angle), the density is proportional to cos(angle)^(freedom - 1)
    (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7); integrated by Gauss's rule
    and inverted by bisection.
    """
    nodes, weights = np.polynomial.legendre.leggauss(128)

    def mass(angle: float) -> float:
        return angle / 2 * (weights * np.cos(angle / 2 * (nodes + 1)) ** (freedom - 1)).sum()

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        if mass(middle) < confidence * mass(math.pi / 2):
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


@dataclass
class Verdict:
    """What a changed flag did to the accuracy, in percentage points."""

    flag: str
    before: str  # names of the groups
    after: str
    seeds: int  # that both groups have
    mean: float = 0.0
    half_width: float = math.nan  # of the 95 % interval; NaN for a single seed
    deviation: float = math.nan  # of the differences

    @property
    def words(self) -> str:
        """'helps', 'hurts' or what else follows."""
        if self.seeds < 2:
            return "no verdict from one seed" if self.seeds else "no seed in common"
        if abs(self.mean) > self.half_width:
            return "helps" if self.mean > 0 else "hurts"
        more = self.seeds_needed() - self.seeds
        needed = f"; {more} more seed(s) would show a difference of this size" if more > 0 else ""
        return f"no difference larger than the noise{needed if more < 1000 else ''}"

    def seeds_needed(self) -> int:
        """The seeds with which a mean and a deviation like these would be more than the noise."""
        seeds = self.seeds
        while seeds < 10_000 and self.mean:
            width = t_quantile(CONFIDENCE, seeds - 1) * self.deviation / math.sqrt(seeds)
            if abs(self.mean) > width:
                return seeds
            seeds = seeds + 1 if seeds < 100 else seeds + seeds // 20
        return 10_000

    def line(self) -> str:
        """The verdict in one line."""
        change = f"{self.before} → {self.after}"
        if self.seeds < 2:
            return f"{change}: {self.words}"
        interval = f"{self.mean:+.2f} ± {self.half_width:.2f} points, {self.seeds} seeds"
        return f"{change}: {self.words} ({interval})"


def verdict(flag: str, before: Group, after: Group) -> Verdict:
    """Compare two groups by the accuracies of the seeds that both have."""
    seeds = sorted(before.runs.keys() & after.runs.keys())
    gains = [after.runs[seed].last[SCORE] - before.runs[seed].last[SCORE] for seed in seeds]
    if len(seeds) < 2:
        return Verdict(flag, before.name, after.name, len(seeds), gains[0] if gains else 0.0)
    deviation = statistics.stdev(gains)
    half_width = t_quantile(CONFIDENCE, len(seeds) - 1) * deviation / math.sqrt(len(seeds))
    names = before.name, after.name
    return Verdict(flag, *names, len(seeds), statistics.mean(gains), half_width, deviation)


def verdicts(groups: Sequence[Group]) -> list[Verdict]:
    """One per pair of groups that differ in one flag; --kd brings its own flags with it."""
    found = []
    for first, second in itertools.combinations(groups, 2):
        typed = first.given | second.given  # defaults may follow the flag that was changed
        names = [n for n, _ in differences([first.settings, second.settings]) if n in typed]
        if "kd" in names:
            names = [name for name in names if name not in OF_TEACHER]
        if len(names) == 1 and names[0] not in DATA_FLAGS:
            found.append(verdict(names[0], first, second))
    return found


# ----------------------------------------------------------------------------- what is shown


def table(groups: Sequence[Group], width: int | None = None, with_cost: bool = False) -> str:
    """One row per group: mean ± deviation over the seeds of each score of the last epoch.

    Args:
        with_cost: show what the student costs to use, too.
        width: columns of the terminal; where the table is wider, each group becomes a paragraph.
    """
    shown = columns_of(groups, with_cost)
    heads = ["", "seeds", "epochs", *map(heading_of, shown)]
    if SCORE in shown:
        heads.insert(4, "best %")
    rows = []
    for group in groups:
        runs = list(group.runs.values())
        cells = [group.name, str(len(runs)), str(runs[0].args["epochs"])]
        cells += [spread(group.values(name), figure_of(name).decimals) for name in shown]
        best = [max(record.get(SCORE, 0.0) for record in run.records) for run in runs]
        cells.insert(4, spread(best))
        rows.append(cells)
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    if width is None or sum(widths) + 2 * len(widths) <= width:
        return "\n".join(tables.table([heads, *rows]))
    lines = []
    for row in rows:
        lines += [row[0], *(f"  {h}: {c}" for h, c in zip(heads[1:], row[1:], strict=True) if c)]
    return "\n".join(lines)


def columns_of(groups: Sequence[Group], with_cost: bool) -> list[str]:
    """The figures that a table of these groups shows: of EMA and teacher the accuracy alone."""
    runs = [run for group in groups for run in group.runs.values()]
    names = dict.fromkeys(name for run in runs for name in run.figures)
    wanted = {"images_per_second", *(COSTS if with_cost else ())}

    def is_shown(name: str) -> bool:
        curve, figure = tables.split_name(name)
        return name in wanted or curve == "test" or (curve != "" and figure == "acc1")

    return [name for name in tables.in_order(names) if is_shown(name) and heading_of(name)]


def spread(values: Sequence[float], decimals: int = 2) -> str:
    """'96.88 ± 0.76', without a deviation for a single value, or for one that never varies."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):,.{decimals}f}"
    if len(values) == 1 or (decimals == 0 and len(set(values)) == 1):
        return mean
    return f"{mean} ± {statistics.stdev(values):,.{decimals}f}"


def teacher_costs(groups: Sequence[Group]) -> list[str]:
    """What the teachers cost to use, one line per architecture and file."""
    lines: dict[str, None] = {}
    for run in (run for group in groups for run in group.runs.values()):
        if known := run.cost("teacher"):
            costs = [
                f"{heading_of(name)} {spread([known[name]], figure_of(name).decimals)}"
                for name in COSTS
                if name in known and not name.startswith("ms")
            ]
            lines[f"Teacher {run.args['teacher_arch']}: {', '.join(costs)}"] = None
    return list(lines)


def as_json(groups: Sequence[Group], found: Sequence[Verdict]) -> str:
    """Everything that is printed, for other programs."""
    rows = [
        {
            "settings": group.name,
            "runs": {str(seed): str(run.folder) for seed, run in group.runs.items()},
            "scores": {name: group.values(name) for name in columns_of([group], True)},
        }
        for group in groups
    ]
    told = []
    for one in found:
        values = vars(one) | {"verdict": one.words}
        told.append({k: None if v != v else v for k, v in values.items()})  # NaN is not JSON
    return json.dumps({"groups": rows, "verdicts": told}, indent=1)


def plot(groups: Sequence[Group], path: Path) -> None:
    """Draw the mean accuracy over the epochs; an α × T grid as a heat map beside it.

    Raises: BadRun where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BadRun(f"--plot draws with matplotlib ({error}); pip install matplotlib") from error
    grid = grid_of(groups)
    figure = Figure(figsize=(12 if grid else 7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2 if grid else 1, squeeze=False)[0]
    for number, group in enumerate(groups):
        curves = [
            {r["epoch"] + 1: r[SCORE] for r in run.records if SCORE in r}
            for run in group.runs.values()
        ]
        epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [statistics.mean(curve[epoch] for curve in curves) for epoch in epochs]
        style = "-" if number < 10 else "--"  # matplotlib has ten colors
        axes[0].plot(epochs, means, style, label=group.name, linewidth=1.5)
    axes[0].set(xlabel="epoch", ylabel="test accuracy %, mean over seeds")
    axes[0].grid(color="#E5E5E5")
    axes[0].legend(fontsize=8, frameon=False)
    if grid:
        alphas, temperatures, accuracies = grid
        image = axes[1].imshow(accuracies, aspect="auto", cmap="viridis")
        axes[1].set_xticks(range(len(temperatures)), [f"{t:g}" for t in temperatures])
        axes[1].set_yticks(range(len(alphas)), [f"{a:g}" for a in alphas])
        axes[1].set(xlabel="kd_temperature", ylabel="kd_alpha", title="test accuracy %")
        for row, column in itertools.product(range(len(alphas)), range(len(temperatures))):
            value = accuracies[row][column]
            if value == value:
                color = "black" if image.norm(value) > 0.6 else "white"  # legible on viridis
                axes[1].text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
        figure.colorbar(image, ax=axes[1])
    figure.savefig(path)


def grid_of(groups: Sequence[Group]) -> tuple[list[float], list[float], list[list[float]]] | None:
    """alphas, temperatures and the mean accuracy of each pair; None where they do not vary both."""
    distilled = [group for group in groups if group.settings.get("kd")]
    names = [name for name, _ in differences([group.settings for group in distilled])]
    if set(names) != {"kd_alpha", "kd_temperature"}:
        return None
    axis = ("kd_alpha", "kd_temperature")
    alphas, temperatures = (sorted({group.settings[name] for group in distilled}) for name in axis)
    means = [[math.nan] * len(temperatures) for _ in alphas]
    for group in distilled:
        row = alphas.index(group.settings["kd_alpha"])
        column = temperatures.index(group.settings["kd_temperature"])
        means[row][column] = statistics.mean(group.values(SCORE))
    return alphas, temperatures, means


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the runs of a command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument(
        "--cost",
        action="store_true",
        help="also show parameters, multiply-adds and latency of student and teacher",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--plot", type=Path, help="draw the curves to this file, such as a .png")
    args = parser.parse_args(argv)
    runs, left_out = [], []
    for folder in args.runs:
        if not folder.is_dir() or (folder.name.startswith("teacher_cache")):
            continue  # runs/* also names what a sweep keeps beside its runs
        try:
            runs.append(read_run(folder))
        except BadRun as error:
            left_out.append(str(error))
    for message in left_out:
        print(f"Left out: {message}", file=sys.stderr)
    try:
        if not runs:
            raise BadRun("no finished run among the folders; pass folders of --output_dir")
        groups = group_runs(runs)
        if args.plot:
            plot(groups, args.plot)
    except BadRun as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    found = verdicts(groups)
    if args.json:
        print(as_json(groups, found))
        return 0
    columns = None if not sys.stdout.isatty() else shutil.get_terminal_size().columns
    print(table(groups, columns, args.cost))
    for line in teacher_costs(groups) if args.cost else ():
        print(line)
    if found:
        print("\nAccuracy of the last epoch, paired by seed, with its 95 % interval:")
    for one in found:
        print(one.line())
    if len(found) >= MANY_PAIRS:
        by_chance = (1 - CONFIDENCE) * len(found)
        print(
            f"Of {len(found)} pairs, about {by_chance:.1f} would look different by chance alone; "
            "confirm what you choose with other seeds"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
