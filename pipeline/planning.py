"""Makes the plan: finds and times the networks, and fits the trainings into the budget."""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arguments.defaults import usable_cores
from arguments.derived import SMALL
from arguments.flags import OF_TEACHER
from arguments.parsing import command_words, given_flags, without
from models.checkpoint import local_file
from pipeline import rules
from pipeline.commands import RECORD, Commands
from pipeline.images import Images
from pipeline.plan import KINDS, Network, Plan, Scale, Speed, batch_size, find_network, fit
from pipeline.rules import Choice
from reporting.tables import table
from runtime.device import default_device
from teacher.manifest import hash_of_file
from utils import UserError, changes, read_commands, write_whole

PLAN = "plan.json"  # in --out
MEASURED = 64  # images whose training is timed
MOST_JOBS = 4  # trainings at the same time on a CPU


def make_plan(
    args: argparse.Namespace, images: Images, more: list[str], budget: float
) -> tuple[Plan, list[Choice]]:
    """Find the networks, measure them, and fit the trainings into the budget.

    What was measured and chosen is kept in plan.json, so that the same command goes on with it.
    """
    default_teacher, default_student = rules.default_networks(images.side)
    device = given_flags(more).get("device")
    is_slow = (device or default_device()) == "cpu"

    def size(has_weights: bool) -> int:
        return args.input_size or rules.input_size(images.side, has_weights, is_slow)

    student_name = args.student or default_student
    student = find_network(student_name, "--student", images.classes, size)
    networks = [
        find_network(name, "--teacher", images.classes, size)
        for name in args.teacher or [default_teacher]
    ]
    for network in networks:
        if network.parameters <= student.parameters:
            raise UserError(
                f"--student {student.arch}: has {student.parameters:,} parameters, and the teacher "
                f"{network.arch} {network.parameters:,}; pass a smaller --student"
            )
    augmentation, choice = rules.augmentation(student.size)
    loss, choices = rules.distillation(images.unlabeled)
    jobs = min(MOST_JOBS, usable_cores()) if is_slow else 1
    workers = [] if jobs == 1 else ["--num_workers", "0" if images.side < SMALL else "1"]
    common = [*augmentation, *workers, *more]
    recipe = without(command_words([f"@{args.recipe}"] if args.recipe else []), {"kd"})
    distilled, alone = [*loss, *recipe], without(recipe, OF_TEACHER)
    teachers = [(network, kind) for network in networks for kind in network.kinds]
    everything = Scale(1, 4, len(teachers))
    on = ["--device", device] if device else []
    plan = Plan(images, teachers, student, common, on, alone, distilled, {}, everything, jobs)
    identity = {
        "images": images.identity,
        "networks": [identity_of(network) for network in [student, *networks]],
        "flags": [*common, *distilled, f"--seeds {args.seeds} --budget {args.budget}"],
    }
    if known := known_plan(args.out, identity):
        plan.speeds = {name: Speed(*speed) for name, speed in known["speeds"].items()}
        plan.scale = Scale(*known["scale"])
    else:
        plan.speeds = {n.name: measure(n, plan, args.out) for n in {student, *networks}}
        plan.scale = fit(plan, budget, args.seeds)
        measured = {"speeds": plan.speeds, "scale": plan.scale}
        write_whole(args.out / PLAN, json.dumps(identity | measured, indent=1))
    return plan, [choice, *choices]


def known_plan(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """What this folder keeps of a plan; None without one, or if a plan alone has changed.

    Raises: UserError that names what differs from the identity of the plan.
    """
    if not (out / PLAN).exists():
        return None
    known = json.loads((out / PLAN).read_text(encoding="utf-8"))
    if not (changed := changes(known, identity)):
        return known
    if "images" not in changed and only_planned(out):
        return None
    what = " and ".join(told(name, *values) for name, values in changed.items())
    raise UserError(
        f"--out {out}: was begun with different {what}; pass another --out, or the earlier command"
    )


def only_planned(out: Path) -> bool:
    """Whether nothing was begun in this folder beyond what was timed for a plan."""
    finished = read_commands(out / RECORD)
    return all(name.startswith("plan/") for name in finished) and not (out / "choose").exists()


def told(name: str, was: Any, now: Any) -> str:
    """What changed in the identity of a plan, for an error."""
    if name != "flags":
        return name
    gone = " ".join(word for word in was if word not in now)
    new = " ".join(word for word in now if word not in was)
    return f"flags ({gone or 'none'} became {new or 'none'})"


def identity_of(network: Network) -> str:
    """Changes with a network, the size of its input, and the contents of its file of weights."""
    file = network.text.partition("=")[2]
    digest = hash_of_file(local_file(file)) if file else ""
    return " ".join(map(str, [*network, digest]))


def measure(network: Network, plan: Plan, out: Path) -> Speed:
    """Train on a few images, and read how long that took."""
    count = min(MEASURED, plan.images.labeled)
    is_tiny = network.size < SMALL and network.parameters < 500_000
    epochs = 60 if is_tiny else 2  # a step of a tiny network takes a millisecond
    folder = out / "plan" / network.name
    flags = [*plan.images.flags(), *network.flags, *plan.common, "--disable_eval", "true"]
    flags += ["--train_samples", str(count), "--epochs", str(epochs), "--save_ckpt", "false"]
    flags += ["--batch_size", str(batch_size(count, plan.all_images)), "--auto_resume", "false"]
    name = f"plan/{network.name}"
    commands = Commands(out, {"measure": 0}, plan.jobs)
    started = time.monotonic()
    commands.run_again("measure", name, "main.py", [*flags, "--output_dir", str(folder)])
    taken = time.monotonic() - started
    seconds = sum(json.loads((folder / "summary.json").read_text())["seconds"].values())
    return Speed(taken - seconds, seconds / (epochs * count))


def describe(plan: Plan, choices: Sequence[Choice], budget: float) -> str:
    """The plan as a person reads it: the images, the choices with their reasons, the times."""
    images, scale = plan.images, plan.scale
    lines = [
        f"Images    {images.labeled:,} labeled to train on, {images.unlabeled:,} without labels; "
        f"{images.test:,} judge; {len(images.classes)} classes, about {images.side} pixels",
    ]
    which = "all labeled images" if images.folds > 1 else "a fifth of the labeled images"
    lines.append(f"Chosen on {images.chosen_by:,} images: {which}, in {images.folds} part(s)")
    for network, kind in plan.teachers[: scale.candidates]:
        lines.append(f"Teacher   {network.arch}, {kind}: {KINDS[kind]}; {network.size} pixels")
    for network, kind in plan.teachers[scale.candidates :]:
        lines.append(f"Left out  {network.arch}, {kind}: does not fit into --budget")
    for network in dict.fromkeys([plan.student, *(network for network, _ in plan.teachers)]):
        if network.missing:
            lines.append(f"Warning: no weights of {network.arch}: {network.missing}")
        if plan.student.size < min(network.size, images.side):
            lines.append(
                f"Warning: {network.arch} was trained on images of {network.size} pixels, and sees "
                f"the student's images of {plan.student.size} pixels enlarged, of which it knows "
                f"less than its score says; pass --input_size {network.size}"
            )
    start = "its weights" if plan.student.weights else "random weights"
    lines.append(
        f"Student   {plan.student.arch} from {start}, {plan.student.size} pixels, "
        f"{plan.student.parameters:,} parameters; {scale.seeds} seeds alone and distilled"
    )
    lines.append("Choices")
    for choice in choices:
        lines.append(f"  {choice.what} {choice.value}: {choice.reason} ({choice.overruled_by})")
    if scale.share < 1:
        lines.append(f"  {scale.share:.0%} of the usual passes over the images, for --budget")
    seconds = plan.seconds()
    rows = [[name, f"about {math.ceil(value / 60)} min"] for name, value in seconds.items()]
    total = sum(seconds.values())
    rows.append(["together", f"about {math.ceil(total / 60)} min of {budget / 60:.0f}"])
    return "\n".join([*lines, *table([["Step", "time on this machine"], *rows])])
