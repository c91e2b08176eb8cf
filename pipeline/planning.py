"""Makes the plan: finds and times the networks, and fits the trainings into the budget."""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

from arguments.defaults import usable_cores
from arguments.derived import SMALL
from arguments.flags import OF_TEACHER
from arguments.parsing import command_words, given_flags, without
from models.checkpoint import local_file
from pipeline import rules
from pipeline.commands import Commands
from pipeline.images import Images
from pipeline.plan import KINDS, Network, Plan, Scale, Speed, batch_size, find_network, fit
from pipeline.rules import Choice
from reporting.tables import table
from runtime.device import default_device
from teacher.manifest import hash_of_file
from utils import UserError, changes, write_whole

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

    def size_of_teacher(has_weights: bool) -> int:  # which sees what its student sees
        return max(size(has_weights), rules.FOR_WEIGHTS if has_weights else 0)

    student_name = args.student or default_student
    student = find_network(student_name, "--student", images.classes, size)
    networks = [
        find_network(name, "--teacher", images.classes, size_of_teacher)
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
    file = args.out / "plan.json"
    if file.exists():
        known = json.loads(file.read_text(encoding="utf-8"))
        if changed := changes(known, identity):
            raise UserError(
                f"--out {args.out}: was begun with different {' and '.join(changed)}; pass "
                "another --out, or the earlier command"
            )
        plan.speeds = {name: Speed(*speed) for name, speed in known["speeds"].items()}
        plan.scale = Scale(*known["scale"])
    else:
        plan.speeds = {n.name: measure(n, plan, args.out) for n in {student, *networks}}
        plan.scale = fit(plan, budget, args.seeds)
        measured = {"speeds": plan.speeds, "scale": plan.scale}
        write_whole(file, json.dumps(identity | measured, indent=1))
    return plan, [choice, *choices]


def identity_of(network: Network) -> str:
    """Changes with a network, the size of its input, and the contents of its file of weights."""
    file = network.text.partition("=")[2]
    digest = hash_of_file(local_file(file)) if file else ""
    return " ".join(map(str, [*network, digest]))


def measure(network: Network, plan: Plan, out: Path) -> Speed:
    """Train on a few images, and read how long that took."""
    count = min(MEASURED, plan.images.labeled)
    epochs = 2 if network.size >= SMALL else 60  # a step of a small network takes a millisecond
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
