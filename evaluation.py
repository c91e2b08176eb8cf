"""Which images score a checkpoint, its scores, and a temperature that calibrates its logits."""

import argparse
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed

import datasets
import utils
from arguments.derived import (
    FROM_FILES,
    data_flag,
    has_validation,
    must_hold_out,
    names_tars,
)
from arguments.parsing import follow_checkpoint, given_flags, parse
from data.checks import check_images
from data.sources import Source, held_out_identity
from datasets import build_eval_loader, data_config
from distillation import SelectClasses
from engine import evaluate
from models.calibration import Tempered, write_temperature
from models.checkpoint import Checkpoint, Weights
from models.classes import match_classes
from models.weights import load_network
from reporting import metrics, summary
from reporting.terminal import MANY_CLASSES, columns
from runtime import distributed
from runtime.distributed import log
from training.settings import loop_settings
from training.student import make_student
from utils import UserError, flags_for


class Scored(NamedTuple):
    """The images of an evaluation."""

    config: dict[str, Any]  # what the network is fed, see datasets.data_config
    images: Source
    classes: list[str]  # of the network, in the order of its logits
    positions: list[int] | None  # of the images' classes among the logits; None for all in order


def evaluation_args(checkpoint: Checkpoint, flags: Sequence[str] = ()) -> argparse.Namespace:
    """The arguments with which `main.py --eval true --resume FILE` and these flags would score.

    Raises: UserError for flags that cannot work.
    """
    argv = ["--eval", "true", "--resume", checkpoint.path, "--device", "cpu", *flags]
    return parse(argv, follow_checkpoint(checkpoint.run_args, given_flags(argv), is_eval=True))


def open_scored(args: argparse.Namespace, checkpoint: Checkpoint) -> Scored:
    """Open the images that score the checkpoint of --resume.

    Classes are matched by name; data with only some of the classes is scored on those.

    Args:
        args: of an evaluation; `holdout` is set if the training held images out.
    Raises: UserError for data that is missing, has different classes, or was trained on.
    """
    if "data_set" not in checkpoint.run_args and not {"data_set", "data_path"} & set(args.given):
        raise UserError(
            f"--eval true: {args.resume} does not name the data that it was trained on; pass "
            "--data_path"
        )
    check_saved_paths(args)
    config = data_config(args, checkpoint.data)
    if args.calibrate:
        require_other_images(args)
        args.holdout = None  # the checkpoint's: those images are for the temperature
    if must_hold_out(args):
        args.holdout = checkpoint.run_args.get("holdout")
        if not args.holdout:
            raise UserError(
                f"{data_flag(args)}: holds no folder val; pass the folder that holds it, "
                "or --data_set image_folder --eval_data_path FOLDER to score all images of class "
                f"folders ({args.resume} held out none of its training images)"
            )
    val = datasets.open_validation(args, checkpoint.classes)
    check_held_out(args, checkpoint, val)
    classes = checkpoint.classes or val.classes
    other = f"--eval_data_path {args.eval_data_path}"
    flag = other if scores_other_folder(args) else data_flag(args)
    with flags_for(classes=f"{flag}:"):
        positions = match_classes(val.classes, classes)
    return Scored(config, val, classes, positions)


def scores_other_folder(args: argparse.Namespace) -> bool:
    """Whether the scored images are those of --eval_data_path."""
    return bool(args.eval_data_path and not args.holdout)


def check_saved_paths(args: argparse.Namespace) -> None:
    """Raise UserError for data that the checkpoint names and that is not found from here."""
    of_images = "eval_data_path" if scores_other_folder(args) else "data_path"
    for flag in (of_images, "labels", "eval_labels"):
        path = getattr(args, flag)
        exists = names_tars(path) or not path or os.path.exists(path)  # tar files: find_shards
        if flag not in args.given and not exists:
            raise UserError(
                f"--{flag} {path}: not found from this folder; {args.resume} was trained with that "
                f"path, which the evaluation follows; pass --{flag} with where the data is now"
            )


def check_held_out(args: argparse.Namespace, checkpoint: Checkpoint, val: Source) -> None:
    """Ensure that held-out images are not scored by a network that was trained on them. Collective.

    A --holdout on the command line may be meant for different data, so a warning is enough then.

    Raises: UserError if the checkpoint's training held out different images.
    """
    was = checkpoint.run_args
    if not args.holdout or not was:
        return
    held_out = checkpoint.images.get("held_out")
    is_by_flag = "holdout" in args.given
    if held_out is None:  # not noted by earlier versions
        is_other = {"data_set", "data_path"} & set(args.given)
        is_believed = was.get("holdout") == args.holdout if is_by_flag else not is_other
    else:
        is_believed = held_out == held_out_identity(val)
    if is_believed:
        return
    flag = f"{data_flag(args)} --holdout {args.holdout}"
    what = f"these are not the images that the training of {args.resume} held out"
    if not is_by_flag:
        raise UserError(
            f"{flag}: {what}, so it may have seen them; pass those images, or score others with "
            "--data_set image_folder --eval_data_path FOLDER"
        )
    log(f"Warning: {flag}: {what}; it may have been trained on them")


def require_other_images(args: argparse.Namespace) -> None:
    """Raise UserError if --calibrate would fit its temperature on the images that it scores."""
    has_val = args.data_set not in FROM_FILES or has_validation(args)
    if "holdout" in args.given or not has_val:
        flag = f"--holdout {args.holdout}" if "holdout" in args.given else data_flag(args)
        raise UserError(
            f"--calibrate true: {flag} leaves only the held-out images to score, and the "
            "temperature is fitted on those; pass data that also has validation images, such as "
            "--eval_data_path FOLDER"
        )


def images_to_calibrate(args: argparse.Namespace, checkpoint: Checkpoint) -> Source | None:
    """The training images that the training of a checkpoint held out; None if it held out none."""
    holdout = checkpoint.run_args.get("holdout")
    if not holdout:
        log(
            f"Warning: --calibrate true: the training of {args.resume} held out no images, so the "
            "temperature is fitted on the images that are scored, and no calibrated scores are "
            "reported, which would say little about different images"
        )
        return None
    held_out = datasets.open_validation(args, checkpoint.classes, holdout)
    if checkpoint.images.get("held_out") != held_out_identity(held_out):
        raise UserError(
            f"--calibrate true: {data_flag(args)} does not have the images that the "
            f"training of {args.resume} held out; pass the data of the training"
        )
    return held_out


def keep_temperature(weights: Weights, temperature: float, problem: str, suffix: str) -> None:
    """Report a fitted temperature and keep it beside the checkpoint, for export.py and predict.py.

    Args:
        problem: why no temperature could be fitted, or ''.
    """
    log(f"temperature{suffix} {temperature:.4f}")
    if problem:
        log(f"Warning: --calibrate true: no temperature can be fitted, {problem}; it stays 1")
    if not distributed.is_main_process():
        return
    try:
        path = write_temperature(weights, temperature)  # also 1, in place of an earlier one
        if not problem:
            log(f"Kept in {path}; export.py and predict.py divide the logits by the temperature")
    except UserError as error:  # the scores stay right
        log(f"Warning: the temperature is lost: {error}")


def score_checkpoint(
    args: argparse.Namespace, checkpoint: Checkpoint, device: torch.device
) -> None:
    """`--eval true`: score the weights of a checkpoint as the checkpoint says.

    Model, data, normalization and crop are those of the training run unless a flag changes them.
    Mixed precision is used only if a flag asks for it, since predictions do not use it either.
    Classes are matched by name; data with only some of the classes is scored on those.
    """
    datasets.complete(args, device)
    config, val, classes, positions = open_scored(args, checkpoint)
    log(
        f"Data {args.data_set}{f' in {args.data_path}' if args.data_path else ''}: {len(val)} "
        f"{'held-out ' if args.holdout else ''}images, {len(val.classes)} classes; "
        f"{config['input_size']} pixels, on {device}"
    )
    for name, (old, new) in utils.changes(checkpoint.data, config).items():
        log(f"Warning: scored with {name} {new}, but the checkpoint was trained with {old}")
    if checkpoint.run_args.get("use_amp") and not args.use_amp:
        log("Scored in float32; the run's own scores are in mixed precision (--use_amp true)")
    if len(val.classes) < len(classes):
        log(f"Scored on {len(val.classes)} of the {len(classes)} classes of the checkpoint")

    if args.check_data:
        check_images([val], args.num_workers)
    settings = loop_settings(args, device)
    loader = build_eval_loader(args, val, config, device)
    held_out = fitted = None
    if args.calibrate:
        held_out = images_to_calibrate(args, checkpoint)
        fitted = build_eval_loader(args, held_out or val, config, device, shared=False)
    student = make_student(args, device, classes)
    network = SelectClasses(student, positions)
    reports = {}
    both = ["false", "true"] if checkpoint.has_ema else ["false"]
    for use_ema in both if args.use_ema == "auto" else [args.use_ema]:
        name, suffix = ("ema", "_ema") if use_ema == "true" else ("student", "")
        with flags_for(checkpoint="--resume", use_ema="--use_ema"):
            weights = load_network(student, checkpoint, use_ema)
        scores, answers, _ = evaluate(loader, network, settings, args.dist_eval)
        report = metrics.report(metrics.join(answers, args.dist_eval), val.classes)
        if fitted is not None:
            answering = student if held_out else network
            known = evaluate(fitted, answering, settings, shared=False, keep_logits=True)
            targets = torch.cat([batch.targets for batch in known.answers]).cpu()
            logits = torch.cat(list(known.logits.values()))
            temperature, problem = metrics.fit_temperature(logits, targets)
            keep_temperature(weights, temperature, problem, suffix)
            report["temperature"] = temperature
        if held_out:
            tempered = Tempered(network, temperature)
            scaled = evaluate(loader, tempered, settings, args.dist_eval).scores
            scores |= {f"{name}_calibrated": scaled[name] for name in ("loss", "ece")}
            report |= {"nll_calibrated": scaled["loss"], "ece_calibrated": scaled["ece"]}
        log(f"Scored on {summary.images_scored(len(val), bool(args.holdout))}:")
        for score, value in scores.items():
            if score != "acc5" or len(val.classes) > MANY_CLASSES:
                log(f"test_{score}{suffix} {value:.4f}")
        reports[name] = report
        log("\n".join(metrics.report_lines(report, columns())))
    with flags_for(output="--report"):
        summary.write_report(args.report, reports)
