"""Gathers what the page about a distillation shows, and writes the page."""

import csv
import io
import json
import math
import os
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from data.pictures import decode
from deploy.comparison import size_of
from pipeline.commands import HAND_OVER, Command, Commands
from pipeline.images import Images
from pipeline.plan import KINDS, Plan, label_of
from reporting import metrics, page
from reporting.plots import page_pictures
from reporting.runs import SCORE, Group, group_runs, read_json, read_run
from reporting.tables import COSTS, cell, heading_of
from utils import UserError, write_whole

MOST_IN_MATRIX = 20  # classes; of more, the page has what the terminal shows
MOST_MISTAKES = 12  # images
SIDE, TINY = 160, 64  # pixels of the images on the page, and below which they become squares
TONES = {"helps": "good", "hurts": "bad"}
NOTHING = "Nothing to move: no teacher is better than the student alone by more than the noise"

Reports = Mapping[str, dict[str, Any]]  # of 'alone', 'distilled' and 'teacher'
Answers = Mapping[str, list[tuple[str, float]]]  # class and probability, per image


def write_report(
    plan: Plan,
    commands: Commands,
    result: Mapping[str, Any],
    student: str,
    teacher_file: str,
    words: Sequence[str],
) -> Path:
    """Let student and teacher answer for the images that judge, and write report.html.

    Args:
        result: what result.json holds.
        student: the folder of the run that is handed over, below --out.
        teacher_file: '' if there is nothing to move.
        words: of this command line.
    """
    runs = [read_run(folder) for folder in sorted((commands.out / "students").glob("kd=*"))]
    groups = {("distilled" if g.settings["kd"] else "alone"): g for g in group_runs(runs)}
    name = "distilled" if "kd=true" in student else "alone"
    files = {name: result["files"][0]} | ({"teacher": teacher_file} if teacher_file else {})
    paths, targets = link(plan.images)
    answers = ask(commands, files, plan.images.folder / "test")
    reports = {key: report_of(a, targets, plan.images.classes) for key, a in answers.items()}
    report = reports[name]
    wrong = sum(one["images"] for one in report["confusions"])
    shown = page.matrix(report)
    if len(plan.images.classes) > MOST_IN_MATRIX:
        shown = f"<pre>{page.escape(chr(10).join(metrics.report_lines(report, 100)))}</pre>"
    sizes = [(f"{size_of(Path(file)):.2f} MB", file) for file in result["files"]]
    steps = [(what, f"python {shlex.join(line)}") for what, line in commands.finished.items()]
    use = ("Name the classes of images", f"python predict.py {result['files'][0]} PHOTO")
    again = ("Make all of this again", f"python distill.py {shlex.join(words)}")
    sections = {
        "Student and teacher": page.table(costs(groups, reports), "main")
        + page.paragraphs(notes(plan, groups, result), "soft"),
        "Training and calibration": pictures(groups, reports),
        f"Answers of the student ({name}, seed 0)": shown,
        f"Images that it gets wrong ({min(wrong, MOST_MISTAKES)} of {wrong}, the surest first)": (
            page.cards(mistakes(plan.images, paths, targets, answers, name), "photos")
        ),
        "What was tried as a teacher": page.table(tried(plan, result))
        + page.paragraphs(["Accuracy on labeled images that judge nothing else."], "soft"),
        "Model and commands": page.facts(sizes)
        + page.commands([use, again])
        + page.folded("Each step", page.commands(steps)),
        "Data and versions": page.facts(facts(plan.images, runs[0].folder)),
    }
    if not wrong:
        sections = {heading: html for heading, html in sections.items() if "wrong" not in heading}
    title = f"{plan.student.arch} for the images of {plan.images.root}"
    verdict = result["verdict"]
    tone, lines = TONES.get(verdict["verdict"], "open"), sentences(plan, groups, reports, result)
    file = commands.out / "report.html"
    write_whole(file, page.page(title, headline(verdict), tone, lines, sections))
    return file


# ---------------------------------------------------------------------------------- answers


def link(images: Images) -> tuple[list[str], list[int]]:
    """Number the images that judge by links in one folder; returns their files and classes."""
    with open(images.folder / "test.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    paths = [os.path.join(images.root, path) for path, _ in rows]
    folder = images.folder / "test"
    folder.mkdir(exist_ok=True)
    for number, path in enumerate(paths):
        name = folder / f"{number:07}{os.path.splitext(path)[1]}"
        if not os.path.lexists(name):
            name.symlink_to(path)
    return paths, [images.classes.index(name) for _, name in rows]


def ask(commands: Commands, files: Mapping[str, str], folder: Path) -> Answers:
    """What each network answers for the images of a folder, in the order of their names."""
    flags = [str(folder), "--format", "jsonl", "--top_k", "1"]
    jobs = {name: Command(f"answers/{name}", "predict.py", [files[name], *flags]) for name in files}
    commands.run_all(HAND_OVER, list(jobs.values()))
    answers = {}
    for name, job in jobs.items():
        lines = commands.log_of(job.name).read_text(encoding="utf-8").splitlines()
        best = [json.loads(line)["classes"][0] for line in lines if line.startswith("{")]
        answers[name] = [(one["name"], one["probability"]) for one in best]
    return answers


def report_of(
    answers: Sequence[tuple[str, float]], targets: Sequence[int], classes: Sequence[str]
) -> dict[str, Any]:
    """metrics.report without the cross-entropy."""
    places = {name: place for place, name in enumerate(classes)}
    predictions = torch.tensor([places[name] for name, _ in answers])
    confidences = torch.tensor([probability for _, probability in answers])
    numbers, unknown = torch.arange(len(answers)), torch.full((len(answers),), math.nan)
    columns = numbers, torch.tensor(targets), predictions, confidences, unknown
    return metrics.report(metrics.Answers(*columns), classes)


def mistakes(
    images: Images, paths: Sequence[str], targets: Sequence[int], answers: Answers, name: str
) -> list[tuple[str, bytes, str, str]]:
    """Cards of the images that the student gets wrong, those first of which it is surest."""
    truths = [images.classes[target] for target in targets]
    wrong = [n for n, truth in enumerate(truths) if answers[name][n][0] != truth]
    chosen = sorted(wrong, key=lambda n: -answers[name][n][1])[:MOST_MISTAKES]
    result = []
    for n in chosen:
        lines = [("true", truths[n])]
        for network, given in answers.items():
            who = network if network == "teacher" else "student"
            lines.append((who, f"{given[n][0]}, {100 * given[n][1]:.0f}\N{NO-BREAK SPACE}%"))
        image = Image.fromarray(np.asarray(decode(paths[n], paths[n])))
        method = Image.Resampling.BICUBIC if max(image.size) >= TINY else Image.Resampling.NEAREST
        jpeg = io.BytesIO()
        ImageOps.contain(image, (SIDE, SIDE), method).save(jpeg, "JPEG", quality=85)
        file = os.path.basename(paths[n])
        result.append((file, jpeg.getvalue(), "image/jpeg", page.facts(lines)))
    return result


# ------------------------------------------------------------------------------------ words


def headline(verdict: Mapping[str, Any]) -> str:
    """The verdict as a title."""
    words = verdict["verdict"]
    if "mean" not in verdict:
        return f"{NOTHING} of the images that choose"
    if verdict["half_width"] is None:
        return f"Distillation: {words}"
    gain = f"{verdict['mean']:+.1f} ± {verdict['half_width']:.1f} points"
    return f"Distillation {words}: {gain}" if words in TONES else f"Distillation: {words} ({gain})"


def sentences(
    plan: Plan, groups: Mapping[str, Group], reports: Reports, result: Mapping[str, Any]
) -> list[str]:
    """The verdict as one would write it in a letter."""
    verdict, number = result["verdict"], f"{plan.images.test:,}"
    means = {name: statistics.mean(group.values(SCORE)) for name, group in groups.items()}
    alone = means["alone"]
    lines = [f"Trained alone, the student names {alone:.1f} % of {number} images correctly"]
    if "mean" in verdict:
        lines[0] += f"; distilled {means['distilled']:.1f} %; "
        lines[0] += f"its teacher {reports['teacher']['acc1']:.1f} %"
    lines[0] += "."
    if verdict.get("half_width") is not None:
        low, high = (verdict["mean"] + sign * verdict["half_width"] for sign in (-1, 1))
        lines.append(
            f"The difference is {verdict['mean']:+.1f} points, and its 95 % interval goes from "
            f"{low:+.1f} to {high:+.1f} points ({verdict['seeds']} seeds, in pairs)."
        )
    elif "mean" not in verdict:
        lines += result["line"].splitlines()
    error = math.sqrt(alone * (100 - alone) / plan.images.test)
    lines.append(
        f"These {number} images were neither trained on nor used for a choice. Different images "
        f"would give different accuracies: the standard error of {alone:.1f} % is {error:.1f} "
        "points."
    )
    return lines


def costs(groups: Mapping[str, Group], reports: Reports) -> list[list[str]]:
    """A row per figure: what the networks are worth, and what they cost."""
    names = (SCORE, "test_ece", *COSTS)
    columns = {f"student {key}": {n: g.values(n) for n in names} for key, g in groups.items()}
    if "teacher" in reports:
        run = next(iter(groups["distilled"].runs.values()))
        columns["teacher"] = {n: [v] for n, v in run.cost("teacher").items() if n in COSTS}
        columns["teacher"] |= run.latencies["teacher"]
        columns["teacher"] |= {f"test_{n}": [reports["teacher"][n]] for n in ("acc1", "ece")}
    rows = [["", *columns]]
    for name in names:
        cells = [cell(known.get(name, []), name) for known in columns.values()]
        rows.append([heading_of(name), *cells])
    counts = [known.get("parameters") for known in columns.values()]
    sizes = [f"{4 * count[0] / 1e6:.2f}" if count else "" for count in counts]
    return [*rows, ["MB on disk, float32", *sizes]]


def notes(plan: Plan, groups: Mapping[str, Group], result: Mapping[str, Any]) -> list[str]:
    """What was trained on, and what the figures are."""
    lines = []
    for name, group in groups.items():
        shown = f"{group.settings['epochs']} epochs over {plan.images.labeled:,} labeled images"
        if name == "distilled" and plan.images.unlabeled:
            shown += f" and {plan.images.unlabeled:,} without labels"
        lines.append(f"Student {name}: {shown}; seeds: {', '.join(map(str, group.runs))}.")
    lines.append(
        "Accuracy and calibration error: mean ± standard deviation over the seeds, last epoch. "
        "Latency: median and range on the machine below."
    )
    if result["temperature"] != 1:
        lines.append(
            f"The student that is handed over divides its logits by {result['temperature']:.2f}, "
            f"fitted on the {plan.images.test:,} images that judge, which changes no answer. Its "
            "calibration error on different images may be larger than the picture shows."
        )
    return lines


def tried(plan: Plan, result: Mapping[str, Any]) -> list[list[str]]:
    """Each way to make a teacher, its accuracy, and what came of it."""
    scores, rows = result["choose"], [["", "accuracy %", ""]]
    rows.append([f"{plan.student.arch}, the student alone", f"{scores['alone']:.1f}", ""])
    for network, kind in plan.teachers:
        score, outcome = scores.get(label_of(network, kind)), "dropped"
        if score is None:
            outcome = "not tried, for --budget"
        elif [network.name, kind] == result["teacher"] and "mean" in result["verdict"]:
            outcome = "the teacher"
        accuracy = "" if score is None else f"{score:.1f}"
        rows.append([f"{network.arch}, {kind}: {KINDS[kind]}", accuracy, outcome])
    return rows


def facts(images: Images, run: Path) -> list[tuple[str, str]]:
    """What identifies the data, and the versions and the machine of a run."""
    known = {name: str(value) for name, value in read_json(run / "environment.json").items()}
    return [
        ("written", time.strftime("%Y-%m-%d %H:%M")),
        ("images", f"{images.root}, identity {images.identity}"),
        ("classes", f"{len(images.classes)}: {', '.join(images.classes)}"),
        ("labeled", f"{images.labeled:,} train and choose, {images.test:,} judge"),
        ("without labels", f"{images.unlabeled:,}"),
        *((name, text) for name, text in known.items() if name != "command"),
    ]


def pictures(groups: Mapping[str, Group], reports: Reports) -> str:
    """Accuracy over the training, and calibration; or how to get the pictures."""
    curves = {
        name: [
            {100 * (epoch + 1) / run.args["epochs"]: score for epoch, score in run.curve.items()}
            for run in group.runs.values()
        ]
        for name, group in groups.items()
    }
    try:
        progress, reliability = page_pictures(curves, reports)
    except UserError as error:
        return page.paragraphs([f"The pictures: {error}, then run the same command again"])
    sure = "Answers of similar confidence, and the part of them that is right. Larger points stand "
    sure += "for more images; below the dotted line a network is too sure of itself."
    captions = {
        "Accuracy over the training": "Lines: mean over the seeds; bands: worst to best seed.",
        "Reliability": sure,
    }
    return page.cards(
        [
            (title, svg, "image/svg+xml", page.paragraphs([f"{title}. {words}"]))
            for (title, words), svg in zip(captions.items(), (progress, reliability), strict=True)
        ],
        "drawings",
    )
