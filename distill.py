"""From a folder of images to a small classifier that learned from a large one, with a verdict.

    python distill.py my_images --out my_model
    python distill.py my_images --labels few.csv --unlabeled pile --out my_model

Every step is a command of this project, printed before it runs, in a folder of its own below --out.
The same command goes on after an interruption.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import models
from arguments.flags import OF_TEACHER
from arguments.kinds import script_parser
from arguments.parsing import given_flags, parse
from deploy.model import ONNX_PACKAGES, missing_onnx_packages, network_from_checkpoint
from models.checkpoint import local_file
from pipeline.commands import HAND_OVER, Command, Commands
from pipeline.images import look
from pipeline.plan import Network, Plan, label_of
from pipeline.planning import PLAN, describe, make_plan
from pipeline.report import NOTHING, write_report
from reporting.runs import SCORE, read_run
from training.checkpoints import newest_checkpoint
from utils import UserError, exit_code, flags_for, make_folder, write_whole

SET_HERE = {"kd", "teacher_path", "teacher_arch", "model", "data_path", "unlabeled", "labels"}
SET_HERE |= {"eval_labels", "input_size", "seed", "output_dir", "resume", "eval", "teacher_cache"}


def get_parser() -> argparse.ArgumentParser:
    """The flags of this script; those of main.py follow after --."""
    usage = "IMAGES --out FOLDER [--flag value ...] [-- FLAGS of main.py]"
    parser, switch = script_parser("distill.py", usage, __doc__)
    add = parser.add_argument
    # fmt: off
    add("images", help="class folders, or a folder with train/ and val/, or what --labels names")
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder of everything written")
    add("--labels", default="", metavar="FILE", help="text file of paths below IMAGES and classes")
    add("--eval_labels", default="", metavar="FILE", help=
        "text file like --labels of the images that judge (default: a fifth of the labeled)")
    add("--unlabeled", default="", metavar="FOLDER", help=
        "folder of images without labels, or 'rest' for those below IMAGES without a label")
    add("--teacher", action="append", metavar="ARCH[=FILE]", help=
        "teacher to try, with a file of its weights; may be repeated")
    add("--student", metavar="ARCH[=FILE]", help="student, with a file of its weights")
    add("--input_size", type=int, metavar="N", help="side of the images in pixels")
    add("--seeds", type=int, metavar="N", help="trainings of each student (default: 4, or fewer)")
    add("--budget", default="2h", metavar="TIME", help="time for everything, such as 30m or 2h")
    add("--recipe", metavar="FILE", help="file of flags for the distilled students")
    switch("--always_distill", help=
        "distill even if no teacher is better than the student alone by more than the noise")
    switch("--plan", help="print the plan and stop")
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Distill what a command line asks for; returns the exit code."""
    stopped = "stopped; the same command goes on from here"
    return exit_code("distill.py", partial(distill, argv), stopped)


def distill(argv: Sequence[str] | None) -> None:
    """From images to a model and a verdict. Raises: UserError for what the user can correct."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args = get_parser().parse_args(words[:cut])
    more = words[cut + 1 :]
    check_flags(more)
    budget = seconds_of(args.budget)
    for flag, least in (("seeds", 1), ("input_size", 8)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}")
    check_networks(args)
    check_out(args)
    known = (args.out / PLAN).exists()
    files = args.labels, args.eval_labels, args.unlabeled
    images = look(args.images, *files, args.out / "images", known)
    plan, choices = make_plan(args, images, more, budget)
    commands = Commands(args.out, plan.seconds(), plan.jobs)
    print(describe(plan, choices, budget), flush=True)
    if args.plan:
        return

    scores = choose(plan, commands)
    teacher, kind = best_teacher(plan, scores)
    line, is_above = anything_to_move(plan, scores, (teacher, kind))
    print(f"\n{line}{warning_of_chance(plan, scores['alone'])}", flush=True)
    file = ""
    if is_above or args.always_distill:
        file = train_teacher(plan, commands, teacher, kind)
        verdict = train_students(plan, commands, teacher, file)
    else:
        verdict = {"verdict": "nothing to move"}
        train_students(plan, commands, None, "")
    student = hand_over(plan, verdict)
    temperature = calibrate(plan, commands, student)
    exported = export(plan, commands, student)
    summary = {
        "choose": scores,
        "teacher": [teacher.name, kind],
        "line": line,
        "verdict": verdict,
        "files": exported,
        "temperature": temperature,
    }
    write_whole(args.out / "result.json", json.dumps(summary, indent=1))
    page = write_report(plan, commands, summary, student, file, words)
    lines = last_words(plan, verdict, student, exported)
    print("\n" + "\n".join([*lines, f"A page to mail: {page}"]))


# --------------------------------------------------------------------------------- the plan


def seconds_of(budget: str) -> float:
    """'30m' -> 1800. Raises: UserError."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, unit = budget[:-1], budget[-1:].lower()
    try:
        seconds = float(number) * units[unit]
    except (ValueError, KeyError):
        seconds = 0
    if not 0 < seconds < math.inf:
        raise UserError(
            f"--budget {budget}: is no time; pass a number and a unit, such as 30m or 2h"
        )
    return seconds


def check_flags(more: Sequence[str]) -> None:
    """Raise UserError for flags of main.py that cannot work, or that this script sets."""
    given = given_flags(more).keys()
    for flag in sorted(given & SET_HERE):
        raise UserError(f"--{flag}: is set by distill.py; remove it from the flags after --")
    for flag in sorted(given & OF_TEACHER):
        raise UserError(f"--{flag}: is for distilled students alone; put it into --recipe FILE")
    parse(more)


def check_networks(args: argparse.Namespace) -> None:
    """Raise UserError for a network or a file that does not exist, before anything takes time."""
    for flag, texts in (("--student", [args.student]), ("--teacher", args.teacher or [])):
        for arch, _, file in (text.partition("=") for text in texts if text):
            with flags_for(architecture=flag, checkpoint=flag):
                models.check_architecture(arch)
                if file:
                    local_file(file)


def check_out(args: argparse.Namespace) -> None:
    """Raise UserError for an output folder among the images, or of another command."""
    out = args.out.resolve()
    if (out / "args.json").exists():
        raise UserError(f"--out {args.out}: holds a run of main.py; pass another folder")
    for flag, name in (("IMAGES", args.images), ("--unlabeled", args.unlabeled)):
        if name and name != "rest" and out.is_relative_to(Path(name).resolve()):
            raise UserError(f"--out {args.out}: lies inside {flag} {name}; pass a folder outside")
    make_folder(args.out)


# --------------------------------------------------------------------------------- the steps


def choose(plan: Plan, commands: Commands) -> dict[str, float]:
    """The accuracy in % of each way to make a teacher, and of the student alone.

    Each is trained on all but one part of the labeled images, and scored on that part.

    Returns: by 'ARCH, kind', and for 'alone'.
    """
    names: dict[str, list[str]] = {}
    tried: list[Command] = []
    for network, kind in [(plan.student, "alone"), *plan.teachers[: plan.scale.candidates]]:
        for fold in range(plan.images.folds):
            name = f"choose/{network.name}-{kind}/{fold}"
            names.setdefault(label_of(network, kind), []).append(name)
            if kind == "given":
                flags = ["--eval", "true", "--resume", network.file]
                flags += [*plan.device, *plan.images.flags(fold)]
                flags += ["--report", str(commands.out / f"{name}.json")]
            else:
                shown = plan.all_images if kind == "alone" else plan.images.labeled
                flags = plan.training(network, kind, fold, shown)
                flags += ["--output_dir", str(commands.out / name)]
            tried.append(Command(name, "main.py", flags))
    commands.run_all("choose", tried)
    return {
        label: statistics.mean(score_of(commands.out / name) for name in of_label)
        for label, of_label in names.items()
    }


def score_of(folder: Path) -> float:
    """The accuracy in % of the last epoch of a run, or of an evaluation with a report."""
    if folder.is_dir():
        return read_run(folder).figures[SCORE]
    report = json.loads(folder.with_suffix(".json").read_text(encoding="utf-8"))
    return max(one["acc1"] for one in report.values())


def best_teacher(plan: Plan, scores: dict[str, float]) -> tuple[Network, str]:
    """The way to make a teacher that scored best."""
    tried = plan.teachers[: plan.scale.candidates]
    return max(tried, key=lambda one: scores[label_of(*one)])


def anything_to_move(
    plan: Plan, scores: dict[str, float], best: tuple[Network, str]
) -> tuple[str, bool]:
    """Whether the teacher knows more than the student alone, by more than the noise.

    The noise is one standard error of the difference of two shares, so that one of six teachers
    that know nothing more passes; the verdict at the end would find that out, and a teacher that is
    stopped here could not.
    """
    images, label = plan.images.chosen_by, label_of(*best)
    teacher, alone = scores[label], scores["alone"]
    variance = sum(share * (100 - share) for share in (teacher, alone)) / images
    error = max(math.sqrt(variance), 100 / images)
    is_above = teacher - alone > error
    tried = "; ".join(f"{name} {score:.1f}" for name, score in scores.items())
    line = f"Accuracy in % on {images} images that choose: {tried}\n"
    line += f"Best teacher: {label}, {teacher - alone:+.1f} ± {error:.1f} points (standard error) "
    line += "beside the student alone: "
    if is_above:
        return line + "there is something to move", True
    line += "nothing to move, so the student alone is handed over, unless --always_distill is true"
    if teacher > alone:
        line += " (more labeled images could show that this teacher knows more)"
    return line, False


def warning_of_chance(plan: Plan, alone: float) -> str:
    """A line if the student is not better than the most common class by a standard error, else ''.

    That is the score of a student that always answers with the most common class.
    """
    chance = plan.images.chance
    if alone > chance + math.sqrt(chance * (100 - chance) / plan.images.chosen_by):
        return ""
    return (
        "\nWarning: always answering with the most common class scores as well as the student "
        f"alone ({chance:.1f} %), so this student may learn nothing from a teacher either; name a "
        "--student with weights (ARCH=FILE), or pass a larger --budget"
    )


def train_teacher(plan: Plan, commands: Commands, network: Network, kind: str) -> str:
    """The checkpoint of the teacher, trained on all labeled images unless only a fifth chose."""
    if kind == "given":
        return network.file
    if plan.images.folds == 1:
        folder = commands.out / f"choose/{network.name}-{kind}/0"
    else:
        folder = commands.out / "teacher"
        flags = plan.training(network, kind, None, plan.images.labeled)
        commands.run("teacher", "teacher", "main.py", [*flags, "--output_dir", str(folder)])
    return newest_checkpoint(folder)


def train_students(
    plan: Plan, commands: Commands, teacher: Network | None, file: str
) -> dict[str, Any]:
    """Train the student alone and distilled with each seed; returns compare.py's verdict.

    Args:
        teacher: None to train the student alone, once.
    """
    runs = commands.out / "students"
    jobs = []
    for seed in range(plan.scale.seeds if teacher else 1):
        for is_distilled in (False, True) if teacher else (False,):
            flags = plan.student_flags(teacher if is_distilled else None, file)
            folder = runs / f"kd={str(is_distilled).lower()},seed={seed}"
            if is_distilled:
                flags += ["--teacher_cache", str(runs / f"teacher_cache,seed={seed}")]
            flags += ["--seed", str(seed), "--output_dir", str(folder)]
            jobs.append(Command(f"students/{folder.name}", "main.py", flags))
    commands.run_all("students", jobs)
    if not teacher:
        return {"verdict": "nothing to move"}
    folders = sorted(str(path) for path in runs.iterdir() if path.name.startswith("kd="))
    text = commands.run_again("students", "verdict", "compare.py", folders)
    print(f"\n{text.read_text(encoding='utf-8')}", flush=True)
    log = commands.run_again("students", "verdict as JSON", "compare.py", ["--json", *folders])
    (verdict,) = json.loads(log.read_text(encoding="utf-8"))["verdicts"]
    return verdict


def hand_over(plan: Plan, verdict: dict[str, Any]) -> str:
    """The folder of the student to deploy: that of the first seed, which no score has chosen."""
    is_distilled = verdict.get("mean", -1) > 0
    return f"students/kd={str(is_distilled).lower()},seed=0"


def calibrate(plan: Plan, commands: Commands, student: str) -> float:
    """Fit a temperature for the student on the images that judge, which changes no prediction.

    Returns: the temperature of the weights that export.py chooses; 1 if these images allow none.
    """
    checkpoint = newest_checkpoint(commands.out / student)
    flags = ["--eval", "true", "--resume", checkpoint, "--calibrate", "true", *plan.device]
    commands.run(HAND_OVER, "calibrate", "main.py", [*flags, *plan.images.flags()])
    return network_from_checkpoint(checkpoint, "auto")[1].temperature


def export(plan: Plan, commands: Commands, student: str) -> list[str]:
    """Write the student as timm's folder, or as a program, and as ONNX if its packages are there.

    Returns: what was written.
    """
    checkpoint = newest_checkpoint(commands.out / student)
    in_timm = models.is_in_timm(plan.student.arch)
    formats = {"timm": "model"} if in_timm else {"pt2": "model.pt2"}
    if not missing_onnx_packages():
        formats["onnx"] = "model.onnx"
    else:
        print(f"No ONNX file: run {ONNX_PACKAGES}, then the same command", flush=True)
    for kind, name in formats.items():
        flags = [checkpoint, "--format", kind, "--out", str(commands.out / name)]
        flags += ["--with_preprocessing", "true"] if kind == "onnx" else []
        commands.run(HAND_OVER, f"export {kind}", "export.py", flags)
    return [str(commands.out / name) for name in formats.values()]


def last_words(
    plan: Plan, verdict: dict[str, Any], student: str, exported: Sequence[str]
) -> list[str]:
    """What the user reads at the end."""
    lines = []
    if "mean" in verdict:
        interval = f" ± {verdict['half_width']:.2f}" if verdict["half_width"] is not None else ""
        words = verdict["verdict"]
        words = f"makes {words}" if words.startswith("no difference") else words
        lines.append(
            f"Distillation {words}: {verdict['mean']:+.2f}{interval} points on "
            f"{plan.images.test:,} images that chose nothing"
        )
    else:
        lines.append(f"{NOTHING} of {plan.images.chosen_by:,} images")
    which = "distilled" if "kd=true" in student else "trained alone"
    lines.append(f"Handed over: the student {which}, seed 0: {', '.join(exported)}")
    lines.append(f"Use it: python predict.py {exported[0]} PHOTO")
    return lines


if __name__ == "__main__":
    sys.exit(main())
