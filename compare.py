"""Compare finished runs: a table over seeds, what differs, and whether that is more than the noise.

    python compare.py runs/*

Reads args.json, log.txt and summary.json of each run. Runs whose flags differ only in the seed are
one group. For each pair of groups that differ in one flag, the accuracies of the last epoch are
paired by seed: reporting/verdicts.py says what follows.
"""

import argparse
import itertools
import json
import math
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from arguments.flags import DATA_FLAGS, OF_TEACHER
from arguments.kinds import as_typed, script_parser
from reporting import tables
from reporting.plots import Grid, check_picture, plot
from reporting.runs import (
    CHANGES,
    SCORE,
    VAL_IMAGES,
    Group,
    Run,
    differences,
    group_runs,
    read_run,
)
from reporting.tables import COSTS, cell, heading_of
from reporting.verdicts import CONFIDENCE, Verdict
from utils import UserError, exit_code, few, flags_for

MANY_PAIRS = 5  # verdicts in one table, of which some may be chance


def judge(groups: Sequence[Group]) -> tuple[list[Verdict], list[str]]:
    """A verdict per pair of groups that differ in one flag; lines that say why others have none.

    --kd brings its own flags with it, and defaults may follow the flag that was changed. Images
    without labels lengthen the epochs of a distilled run, so a run without them may have more.
    """
    verdicts: list[Verdict] = []
    without: dict[str, list[str]] = defaultdict(list)  # reason -> what differs, one per pair
    for before, after in itertools.combinations(groups, 2):
        both = dict(differences([before.settings, after.settings]))
        typed = [name for name in both if name in before.given | after.given]
        if "kd" in typed:
            joined = before.settings.get("unlabeled") or after.settings.get("unlabeled")
            brought = OF_TEACHER | {"teacher_views"} | ({"epochs"} if joined else set())
            typed = [name for name in typed if name not in brought]
        if VAL_IMAGES in both:
            labels = " and ".join(sorted(both[VAL_IMAGES]))
            without["scored on different validation images"].append(labels)
        elif data := [name for name in typed if name in DATA_FLAGS]:
            without["trained on different data"].append(", ".join(data))
        elif len(typed) == 1:
            verdicts.append(verdict(typed[0], before, after, both))
        else:
            how = "in more than one flag" if typed else "in defaults alone"
            without[f"that differ {how}"].append(", ".join(typed or both))
    lines = [
        f"No verdict for {len(pairs)} pair(s) {reason}: {few(dict.fromkeys(pairs))}"
        for reason, pairs in without.items()
    ]
    return verdicts, lines


def verdict(flag: str, before: Group, after: Group, both: Mapping[str, Sequence[Any]]) -> Verdict:
    """Compare two groups by the accuracies of the seeds that both have.

    Args:
        both: the settings in which the groups differ, with the value in each.
    """
    seeds = sorted(before.runs.keys() & after.runs.keys())
    gains = [after.runs[s].figures[SCORE] - before.runs[s].figures[SCORE] for s in seeds]
    notes = [
        f"with --{name} {as_typed(was)} → {as_typed(now)}"
        for name, (was, now) in both.items()
        if name != flag and name not in OF_TEACHER and None not in (was, now)
    ]
    if changed := [str(run.folder) for run in before.changed + after.changed]:
        notes.append(f"* changed on the way: {few(changed)}")
    images = int(before.settings[VAL_IMAGES].partition(":")[0])  # the same in both
    return Verdict(flag, before.name, after.name, gains, 100 / images, notes)


def table(groups: Sequence[Group], width: int | None = None, with_cost: bool = False) -> str:
    """One row per group: mean ± deviation over the seeds of each score of the last epoch.

    Args:
        with_cost: also show what the student costs to use.
        width: columns of the terminal; if the table is wider, each group becomes a paragraph.
    """
    shown = columns_of(groups, with_cost)
    heads = ["", "seeds", "epochs", *map(heading_of, shown)]
    heads.insert(4, "best %")
    rows = []
    for group in groups:
        runs = list(group.runs.values())
        cells = [group.name, str(len(runs)), str(runs[0].args["epochs"])]
        cells += [cell(group.values(name), name) for name in shown]
        cells.insert(4, cell([max(run.curve.values()) for run in runs], SCORE))
        rows.append(cells)
    lines = tables.table([heads, *rows])
    if width is not None and max(map(len, lines)) > width:
        lines = []
        for row in rows:
            pairs = zip(heads[1:], row[1:], strict=True)
            lines += [row[0], *(f"  {head}: {text}" for head, text in pairs if text)]
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


def notes_on(groups: Sequence[Group]) -> list[str]:
    """What a reader of the table must know besides."""
    return [
        f"* {run.folder} changed on the way: {'; '.join(map(str, run.args[CHANGES]))}"
        for group in groups
        for run in group.changed
    ]


def teacher_costs(groups: Sequence[Group]) -> list[str]:
    """What the teachers cost to use, one line per network."""
    lines: dict[str, None] = {}
    for run in (run for group in groups for run in group.runs.values()):
        known = {name: [value] for name, value in run.cost("teacher").items() if name in COSTS}
        if known := known | run.latencies.get("teacher", {}):
            costs = [f"{heading_of(n)} {cell(known[n], n)}" for n in COSTS if n in known]
            lines[f"Teacher {run.args['teacher_arch']}: {', '.join(costs)}"] = None
    return list(lines)


def as_json(groups: Sequence[Group], verdicts: Sequence[Verdict], notes: Sequence[str]) -> str:
    """Everything that is printed, for other programs."""
    rows = [
        {
            "settings": group.name,
            "runs": {str(seed): str(run.folder) for seed, run in group.runs.items()},
            "scores": {name: group.values(name) for name in columns_of([group], True)},
        }
        for group in groups
    ]
    judged = [
        {
            "flag": one.flag,
            "before": one.before,
            "after": one.after,
            "verdict": one.words,
            "seeds": len(one.gains),
            "seeds_for_80_percent_power": one.seeds_needed(),
            **{name: getattr(one, name) for name in ("mean", "half_width", "deviation")},
            "notes": list(one.notes),
        }
        for one in verdicts
    ]
    everything = {"groups": rows, "verdicts": judged, "notes": list(notes)}
    # NaN, such as the deviation of a single seed, is not JSON.
    plain = json.loads(json.dumps(everything), parse_constant=lambda name: None)
    return json.dumps(plain, indent=1, ensure_ascii=False)


def grid_of(groups: Sequence[Group]) -> Grid | None:
    """The mean accuracies over α and temperature; None if anything else varies, or not both do."""
    distilled = [group for group in groups if group.settings.get("kd")]
    names = [name for name, _ in differences([group.settings for group in distilled])]
    if set(names) != {"kd_alpha", "kd_temperature"}:
        return None
    axis = ("kd_alpha", "kd_temperature")
    alphas, temperatures = (sorted({group.settings[name] for group in distilled}) for name in axis)
    means = [[math.nan] * len(temperatures) for _ in alphas]
    for group in distilled:
        row, column = group.settings["kd_alpha"], group.settings["kd_temperature"]
        means[alphas.index(row)][temperatures.index(column)] = statistics.mean(group.values(SCORE))
    return Grid(alphas, temperatures, means)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the runs of a command line; returns the exit code."""
    parser, _ = script_parser("compare.py", "RUNS... [--cost] [--json] [--plot FILE]", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="folders of finished runs")
    add("--cost", action="store_true", help="also show parameters, multiply-adds and latency")
    add("--json", action="store_true", help="print everything as JSON")
    add("--plot", type=Path, metavar="FILE", help="draw the curves to FILE, e.g. curves.png")
    return exit_code("compare.py", partial(compare, parser.parse_args(argv)))


def compare(args: argparse.Namespace) -> None:
    """Print the comparison, then draw it. Raises: UserError if there is nothing to compare."""
    with flags_for(output="--plot"):
        if args.plot:
            check_picture(args.plot)
        groups = group_runs(readable_runs(args.runs))
        verdicts, notes = judge(groups)
        notes = notes_on(groups) + notes
        if args.json:
            print(as_json(groups, verdicts, notes))
        else:
            print_comparison(groups, verdicts, notes, args.cost)
        if args.plot:
            curves = {g.name: [run.curve for run in g.runs.values()] for g in groups}
            plot(curves, grid_of(groups), args.plot)


def readable_runs(folders: Sequence[Path]) -> list[Run]:
    """The finished runs among some paths; the others are named on stderr, with the reason.

    Raises: UserError if there is no finished run.
    """
    runs = []
    for folder in folders:
        if folder.name == "sweep.json" or folder.name.startswith("teacher_cache"):
            continue  # runs/* also names what a sweep keeps beside its runs
        try:
            runs.append(read_run(folder))
        except UserError as error:
            print(f"Left out: {error}", file=sys.stderr)
    if not runs:
        raise UserError("no finished run among these paths; pass folders of --output_dir")
    return runs


def print_comparison(
    groups: Sequence[Group], verdicts: Sequence[Verdict], notes: Sequence[str], with_cost: bool
) -> None:
    """Print the table, the verdicts, and what must be known besides."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(table(groups, width, with_cost))
    for line in teacher_costs(groups) if with_cost else ():
        print(line)
    if verdicts:
        print("\nAccuracy of the last epoch, paired by seed, with its 95 % interval:")
    for one in verdicts:
        print(one.line())
    if len(verdicts) >= MANY_PAIRS:
        by_chance = (1 - CONFIDENCE) * len(verdicts)
        print(
            f"Of {len(verdicts)} pairs, about {by_chance:.1f} would look different by chance: "
            "confirm your choice with different seeds"
        )
    if notes:
        print("\n" + "\n".join(notes))


if __name__ == "__main__":
    sys.exit(main())
