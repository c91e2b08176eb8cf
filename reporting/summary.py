"""The end of a run: a table of its networks, summary.json, and its last page in TensorBoard."""

import copy
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

import models
import utils
from arguments.flags import DATA_FLAGS, NOT_RECIPE
from arguments.kinds import as_typed
from data.sources import ImageSource
from data.transforms import eval_transform
from datasets import Data
from distillation import TeacherAdapter
from models import cost
from models.cost import Cost
from models.fusion import fuse_layers
from reporting import metrics
from reporting.tables import COSTS, FIGURES, figure_of, in_order, split_name, table
from reporting.tensorboard import PICTURES, Board
from reporting.terminal import aligned, columns, time_line
from runtime import distributed
from runtime.distributed import log
from utils import UserError, first_line, write_whole

CURVES = {"student": "test", "EMA": "test_ema", "teacher": "teacher"}  # networks -> their scores
BEST = {"student": "best", "EMA": "best-ema"}  # columns of the table -> names of checkpoints


def show_mistakes(data: Data, answers: metrics.Answers, board: Board) -> None:
    """Show the wrongly classified validation images with the largest losses in TensorBoard."""
    assert isinstance(data.val, ImageSource)
    wrong = (answers.predictions != answers.targets).nonzero()[:, 0]
    worst = wrong[answers.losses[wrong].argsort(descending=True)][:PICTURES].tolist()
    transform = eval_transform(data.config)
    pictures, captions = [], []
    for index in worst:
        pixels, _ = transform(data.val.load(int(answers.places[index])))
        pictures.append(Image.fromarray(pixels))
        label, taken = (data.classes[a[index]] for a in (answers.targets, answers.predictions))
        captions.append(f"{label}\ntaken for {taken} {answers.confidences[index]:.2f}")
    board.pictures("validation_mistakes", pictures, captions)


@dataclass
class Outcome:
    """How a run ended."""

    scores: Mapping[str, float]  # of the last evaluated epoch, as in log.txt
    best: Mapping[str, float]  # accuracy that each of the best checkpoints was saved with
    costs: Mapping[str, Cost | None]  # of student and teacher
    seconds: Mapping[str, float]  # of this process since its start, by what they were spent on
    images: int  # trained in these seconds, on all processes
    memory: int | None  # peak, in bytes; None if it is not known
    reports: Mapping[str, Any]  # of student and EMA, see metrics.report; empty without evaluation
    scored_on: str = ""  # the images of the scores, such as '360 validation images'
    is_resumed: bool = False  # whether an earlier process did a part of the run


def scores_by_network(outcome: Outcome) -> dict[str, dict[str, str]]:
    """The first table at the end of a run: network -> row -> text."""
    networks: dict[str, dict[str, str]] = {}
    for network, curve in CURVES.items():
        column = {}
        if (best := outcome.best.get(BEST.get(network, ""))) is not None:
            column["accuracy %, best epoch"] = f"{best:.2f}"
        for name in in_order(n for n in outcome.scores if split_name(n)[0] == curve):
            figure = figure_of(name)
            is_accuracy = figure is FIGURES["acc1"]
            row = "accuracy %, last epoch" if is_accuracy else figure.heading
            if row:
                column[row] = f"{outcome.scores[name]:.{figure.decimals}f}"
        if column:
            networks[network] = column
    return networks


def cost_text(spent: Cost, name: str, with_range: bool) -> str:
    """A part of what a network costs, and of a latency the fastest and slowest round."""
    value, decimals = getattr(spent, name), figure_of(name).decimals
    if value is None:
        return ""
    low, high = (f"{limit:,.{decimals}f}" for limit in spent.ranges.get(name, (value, value)))
    text = f"{value:,.{decimals}f}"
    return f"{text} ({low}–{high})" if with_range and low != high else text


def cost_table(costs: Mapping[str, Cost | None]) -> list[str]:
    """What the networks cost, with the ranges of the latencies if the terminal is wide enough."""
    known = {network: cost for network, cost in costs.items() if cost is not None}
    wide, narrow = (
        summary_table(
            {
                network: {figure_of(name).heading: cost_text(cost, name, ranges) for name in COSTS}
                for network, cost in known.items()
            }
        )
        for ranges in (True, False)
    )
    return wide if max(map(len, wide)) <= columns() else narrow


def summary_table(columns: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A table with one column per network and one row per name that any of them has.

    Args:
        columns: heading -> name of a row -> text.
    """
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(column.get(name, "") for column in columns.values())] for name in names]
    return table([["", *columns], *rows])


def costs_of(student: nn.Module, teacher: Any, input_size: int) -> dict[str, Cost | None]:
    """What student and teacher cost to use; None for a teacher that was not loaded.

    Args:
        teacher: RunTeacher.model.
    """
    loaded = getattr(teacher, "teacher", teacher)  # what a cache asks for missing logits
    modules = list(loaded.modules()) if isinstance(loaded, nn.Module) else []
    adapters = [module for module in modules if isinstance(module, TeacherAdapter)]
    try:
        of_teacher = [cost.cost_of(a, input_size, a.parameters_before_fusing) for a in adapters]
        # Fused as the teacher is, and as export.py writes the student.
        parameters = sum(p.numel() for p in student.parameters())
        fused = fuse_layers(copy.deepcopy(student), input_size)
        return {
            "student": cost.cost_of(fused, input_size, parameters),
            "teacher": cost.total(of_teacher) if of_teacher else None,
        }
    except Exception as error:  # whatever a network of one's own raises: the run itself is saved
        log(f"Warning: parameters and latency could not be measured: {first_line(error)}")
        return {"student": None, "teacher": None}


def settings_of(args: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a run on TensorBoard's page HPARAMS: its recipe, as far as it was typed."""
    first = {"KD": args["kd"], "Model": args["model"], "Teacher": "none"}
    main = ["lr", "epochs", "batch_size", "seed"]
    if args["kd"]:
        first["Teacher"] = args["teacher_arch"]
        main += ["kd_alpha", "kd_temperature"]
    typed = [name for name in args["given"] if name not in NOT_RECIPE and name not in DATA_FLAGS]
    skipped = {"kd", "model", "teacher_arch", "teacher_path", "teacher_cache"}
    names = [name for name in dict.fromkeys([*main, *typed]) if name not in skipped]
    return first | {name: args[name] for name in names}


def check_report(path: Path) -> None:
    """Raise UserError if the file of --report cannot be written, before anything is computed."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; pass the name of a file", "folder")
    utils.make_folder(path.parent)


def write_report(path: str, reports: Mapping[str, Any]) -> None:
    """Write the file of --report, on rank 0; nothing for ''."""
    if path and distributed.is_main_process():
        write_whole(Path(path), json.dumps(reports, indent=1, ensure_ascii=False))
        log(f"Report: {path}")


def write_summary(folder: Path, outcome: Outcome) -> None:
    """Write summary.json beside log.txt."""
    costs = {name: asdict(cost) for name, cost in outcome.costs.items() if cost is not None}
    values = {
        "scores": dict(outcome.scores),
        "scored_on": outcome.scored_on,
        "best": dict(outcome.best),
        "costs": costs,
        "seconds": dict(outcome.seconds),
        # Evaluation and saving included.
        "images_per_second": outcome.images / sum(outcome.seconds.values()),
        "peak_memory": outcome.memory,
    }
    write_whole(folder / "summary.json", json.dumps(values, indent=1))


def lines_of(
    outcome: Outcome, args: Mapping[str, Any], folder: Path | None, board: Path | None
) -> Iterator[str]:
    """The lines at the end of a run: its table, its classes, and what to do next.

    Args:
        args: the flags of the run.
        folder: of the checkpoints; None if nothing was saved.
        board: TensorBoard's folder; None without one.
    """
    if scores := scores_by_network(outcome):
        yield from ["", *([f"Scored on {outcome.scored_on}:"] if outcome.scored_on else ())]
        yield from summary_table(scores)
    if any(outcome.costs.values()):
        yield from ["", *cost_table(outcome.costs)]
    if outcome.reports:
        yield from ["", *metrics.report_lines(outcome.reports["student"], columns())]
    since = " since the restart" if outcome.is_resumed else ""
    rows = [("Time", time_line(outcome.seconds, since))]
    if outcome.memory is not None:
        rows.append(("Peak memory", f"{outcome.memory / 2**30:.2f} GiB"))
    if folder is not None:
        path = checkpoint_of(folder, outcome.best)
        files = f"{folder}/log.txt, summary.json"
        rows.append(("Files", f"{files}, {path.name}" if path else files))
        if path is not None:
            rows += commands(args, folder, path)
    if board is not None:
        rows.append(("TensorBoard", f"tensorboard --logdir {shlex.quote(str(board))}"))
    yield from ["", *aligned(rows)]


def images_scored(count: int, is_held_out: bool) -> str:
    """Which images gave a score: '60 validation images', or '40 held-out training images'."""
    return f"{count:,} {'held-out training' if is_held_out else 'validation'} images"


def checkpoint_of(folder: Path, best: Mapping[str, float]) -> Path | None:
    """The checkpoint of a run with the best accuracy, of student or EMA; else its newest.

    Args:
        best: accuracy that each of the best checkpoints was saved with.
    """
    names = sorted(best, key=lambda name: -best[name])  # of equal ones the student's comes first
    paths = [path for name in names if (path := folder / f"checkpoint-{name}.pth").exists()]
    newest = sorted(folder.glob("checkpoint-*.pth"), key=lambda path: path.stat().st_mtime)
    return next(iter([*paths, *reversed(newest)]), None)


def commands(args: Mapping[str, Any], folder: Path, checkpoint: Path) -> list[tuple[str, str]]:
    """What one may do with a checkpoint, as names and commands for the current folder."""
    path = shlex.quote(str(checkpoint))
    rows = [("Evaluate", f"{program('main')} --eval true --resume {path}")]
    # A format that needs no further package.
    kind, out = ("timm", "student") if models.is_in_timm(args["model"]) else ("pt2", "student.pt2")
    out = shlex.quote(str(folder / out))
    rows.append(("Export", f"{program('export')} {path} --format {kind} --out {out}"))
    if not args["kd"]:
        same = [name for name in args["given"] if name in DATA_FLAGS or name == "input_size"]
        flags = [f"--{name} {typed(args[name])}" for name in same]
        teacher = f"--kd true --teacher_arch {shlex.quote(args['model'])} --teacher_path {path}"
        words = [program("main"), "--model STUDENT", teacher, *flags, "--output_dir FOLDER"]
        rows.append(("Distill", " ".join(words)))
    return [*rows, ("Train longer", "the same command with a larger --epochs")]


def typed(value: Any) -> str:
    """A value as one types it in a shell."""
    values = value if isinstance(value, list) else [value]
    return " ".join(shlex.quote(as_typed(one)) for one in values)


def program(name: str) -> str:
    """The start of a command: 'python main.py', with the path that the user typed, if any."""
    path = Path(__file__).resolve().parent.parent / f"{name}.py"
    started = Path(sys.argv[0])
    if started.name == "main.py" and started.resolve().parent == path.parent:
        return f"python {shlex.quote(str(started.with_name(path.name)))}"
    return f"python {shlex.quote(os.path.relpath(path))}"
