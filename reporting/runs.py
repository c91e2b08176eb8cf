"""Finished runs as main.py leaves them, and groups of them that differ only in the seed.

Imports no torch.
"""

import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arguments.flags import NOT_RECIPE, OF_TEACHER, REPEAT, with_role
from arguments.kinds import as_typed
from reporting.plots import Curve
from reporting.tables import LATENCIES
from utils import UserError

NOT_COMPARED = NOT_RECIPE | with_role(REPEAT)
SCORE = "test_acc1"
# In args.json beside the flags.
VAL_IMAGES, TEACHER_HASHES, CHANGES = "val_images", "teacher_hashes", "changes"
NAMED_BY_SEED = ("teacher_path", "finetune")  # may be teacher_0/best.pth for seed 0, and so on


@dataclass
class Run:
    """A finished run."""

    folder: Path
    args: dict[str, Any]
    records: list[dict[str, float]]  # of log.txt, one per epoch
    summary: dict[str, Any]  # of summary.json; empty for a run that was killed as it ended
    device: str  # that latency was measured on
    settings: dict[str, Any] = field(default_factory=dict)  # what makes a group (see group_runs)
    latencies: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # by network

    @property
    def seed(self) -> int:
        return self.args["seed"]

    @property
    def val_images(self) -> str:
        """'360:01234567', number and hash of the validation images."""
        count, colon, digest = self.args[VAL_IMAGES].partition(":")
        return count + colon + digest[:8]

    @property
    def curve(self) -> Curve:
        """The accuracy of each evaluated epoch."""
        scores = {record["epoch"]: record.get(SCORE, math.nan) for record in self.records}
        return {int(epoch): score for epoch, score in scores.items() if math.isfinite(score)}

    @property
    def figures(self) -> dict[str, float]:
        """What the table may show: scores of the last epoch, speed, and costs of the student."""
        speed = {k: v for k, v in self.summary.items() if k == "images_per_second"}
        return self.records[-1] | speed | self.cost("student")

    def cost(self, network: str) -> dict[str, Any]:
        """Parameters, multiply-adds and milliseconds of 'student' or 'teacher', if known."""
        known = self.summary.get("costs", {}).get(network, {})
        return {name: value for name, value in known.items() if value is not None}


@dataclass
class Group:
    """Runs that differ only in their seed."""

    settings: dict[str, Any]
    runs: dict[int, Run] = field(default_factory=dict)  # by seed
    name: str = ""

    @property
    def given(self) -> set[str]:
        """The flags on the command lines of its runs."""
        return {name for run in self.runs.values() for name in run.args.get("given", ())}

    @property
    def changed(self) -> list[Run]:
        """The runs whose flags changed when they were resumed."""
        return [run for run in self.runs.values() if run.args.get(CHANGES)]

    def values(self, column: str) -> list[float]:
        """A figure of each run that has it; of latencies, every measurement of that network."""
        if column in LATENCIES:
            return next(iter(self.runs.values())).latencies.get("student", {}).get(column, [])
        return [run.figures[column] for run in self.runs.values() if column in run.figures]


def read_run(folder: Path) -> Run:
    """Read a run. Raises: UserError if the path is no run, or the run is not finished."""
    if not folder.exists():
        is_pattern = any(letter in folder.name for letter in "*?[")
        why = "nothing matches this pattern" if is_pattern else "no such folder"
        raise UserError(f"{folder}: {why}; pass folders of --output_dir")
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; pass the run's folder, such as {folder.parent}")
    if not (folder / "args.json").exists() and any(folder.glob("*/args.json")):
        raise UserError(f"{folder}: holds runs and is none itself; pass {folder}/*")
    try:
        args = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        records = read_records(folder / "log.txt")
        epochs, _, _ = (args[name] for name in ("epochs", "seed", VAL_IMAGES))
        done = records[-1]["epoch"] + 1 if records else 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{folder}: no run of main.py ({what}); pass folders of --output_dir"
        ) from error
    if done < epochs:
        raise UserError(f"{folder}: {done} of {epochs} epochs are done; finish it first")
    if SCORE not in records[-1]:
        raise UserError(f"{folder}: its last epoch was not evaluated; train without --disable_eval")
    if not math.isfinite(records[-1][SCORE]):
        raise UserError(f"{folder}: {SCORE} of its last epoch is {records[-1][SCORE]} in log.txt")
    summary, environment = (
        read_json(folder / f"{name}.json") for name in ("summary", "environment")
    )
    return Run(folder, args, records, summary, str(environment.get("device", "")))


def read_records(path: Path) -> list[dict[str, float]]:
    """The lines of log.txt without one that is damaged, such as the last one after a kill."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def read_json(path: Path) -> dict[str, Any]:
    """A file that a run may lack if it was killed as it ended; {} in that case."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs by their settings, in the order given. Raises: UserError if a group has a seed twice."""
    for run in runs:
        skipped = (
            NOT_COMPARED | {TEACHER_HASHES, CHANGES} | (set() if run.args.get("kd") else OF_TEACHER)
        )
        run.settings = {name: value for name, value in run.args.items() if name not in skipped}
        run.settings[VAL_IMAGES] = run.val_images
    for flag in NAMED_BY_SEED:
        replace_seeds(runs, flag)
    share_latencies(runs)
    groups: list[Group] = []
    for run in runs:
        group = next((group for group in groups if group.settings == run.settings), None)
        if group is None:
            groups.append(group := Group(run.settings))
        if twin := group.runs.get(run.seed):
            raise UserError(
                f"{run.folder}: has the flags and the seed of {twin.folder}; leave one of them out"
            )
        group.runs[run.seed] = run
    name_groups(groups)
    return groups


def replace_seeds(runs: Sequence[Run], flag: str) -> None:
    """Write SEED for the seed in paths such as teacher_0/best.pth, so that they count as equal.

    A number stands for the seed only if it equals the seed in every run whose path differs in
    nothing but numbers: two teachers that are each used with several seeds stay apart.
    """
    alike = defaultdict(list)
    for run in runs:
        if isinstance(path := run.settings.get(flag), str):
            alike[re.sub(r"\d+", "0", path)].append((run, re.split(r"(\d+)", path)))
    for members in alike.values():
        if len({run.seed for run, _ in members}) < 2:
            continue
        for place in range(1, len(members[0][1]), 2):  # numbers stand between the other parts
            if all(int(parts[place]) == run.seed for run, parts in members):
                for _, parts in members:
                    parts[place] = "SEED"
        for run, parts in members:
            run.settings[flag] = "".join(parts)


def share_latencies(runs: Sequence[Run]) -> None:
    """Give equal networks on equal devices all measurements of their latency."""
    pools: dict[Any, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run, (network, flag) in itertools.product(
        runs, (("student", "model"), ("teacher", "teacher_arch"))
    ):
        cost = run.cost(network)
        counts = cost.get("parameters"), cost.get("multiply_adds")
        run.latencies[network] = pools[network, run.args.get(flag), counts, run.device]
        for name in cost.keys() & set(LATENCIES):
            run.latencies[network][name] += [cost[name], *cost.get("ranges", {}).get(name, ())]


def name_groups(groups: Sequence[Group]) -> None:
    """Name each group by the flags in which the groups differ; '*' marks runs that changed."""
    typed = {VAL_IMAGES}.union(*(group.given for group in groups))
    distilled = [group.settings for group in groups if group.settings.get("kd")]
    varied = [n for n, _ in differences([g.settings for g in groups]) if n not in OF_TEACHER]
    varied += [name for name, _ in differences(distilled) if name in OF_TEACHER]
    for names in ([name for name in varied if name in typed], varied):
        for group in groups:
            known = {name: group.settings[name] for name in names if name in group.settings}
            parts = [f"no {n}" if v is None else f"{n}={as_typed(v)}" for n, v in known.items()]
            group.name = (" ".join(parts) or "all runs") + (" *" if group.changed else "")
        if len({group.name for group in groups}) == len(groups):
            return  # else groups differ in defaults alone, and these are named too


def differences(settings: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """The flags that are not the same in all settings, with the value in each."""
    names = dict.fromkeys(name for one in settings for name in one)
    values = [(name, [one.get(name) for one in settings]) for name in names]
    return [(name, column) for name, column in values if any(v != column[0] for v in column)]
