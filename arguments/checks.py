"""Checks of the command line that need no data: ranges, names, files, and flags without effect."""

import argparse
import difflib
import itertools
import math
import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from arguments.derived import (
    DATA_SETS,
    FROM_FILES,
    PRETRAINED,
    SPLIT_NAMES,
    folders_in,
    is_mixed,
    is_own_module,
    is_split_name,
    must_hold_out,
    name_both_splits,
    names_tars,
    teachers_of,
    views_of,
)
from arguments.flags import FLAGS, Need
from arguments.kinds import as_typed
from utils import UserError, is_url, missing_file


def _require(args: argparse.Namespace, flag: str, holds: object, remedy: str) -> None:
    if not holds:
        raise UserError(f"{_shown(args, flag)}: {remedy}")


def _shown(args: argparse.Namespace, flag: str) -> str:
    return f"--{flag} {as_typed(getattr(args, flag))}"


def check_numbers(values: Mapping[str, Any]) -> None:
    """Raise UserError for a number outside the range of its flag."""
    for flag in FLAGS.values():
        value = values.get(flag.name)
        if value is not None and flag.kind.remedy:
            numbers = value if isinstance(value, list) else [value]
            if not all(map(flag.kind.holds, numbers)):
                raise UserError(f"--{flag.name} {as_typed(value)}: {flag.kind.remedy}")


def check_distillation(args: argparse.Namespace) -> None:
    """Raise UserError if the flags of the teacher do not belong together."""
    if args.teacher_cache_only and not (args.kd and args.teacher_cache and args.kd_alpha > 0):
        raise UserError(
            "--teacher_cache_only true needs --teacher_cache FOLDER to fill, --kd true with its "
            "teacher, and --kd_alpha above 0"
        )
    if not args.kd:
        return
    missing = [f"--{f}" for f in ("teacher_path", "teacher_arch") if not getattr(args, f)]
    if missing:
        raise UserError(f"--kd true needs {' and '.join(missing)}")
    archs, paths = args.teacher_arch.split(","), args.teacher_path.split(",")
    if len(archs) != len(paths):
        raise UserError(
            f"--teacher_arch names {len(archs)} and --teacher_path {len(paths)} teachers; "
            "pass as many architectures as files, separated by commas"
        )
    if args.teacher_weights:
        try:
            weights = [float(weight) for weight in args.teacher_weights.split(",")]
        except ValueError:
            weights = []
        holds = len(weights) == len(archs) and all(0 < w < math.inf for w in weights)
        remedy = f"pass {len(archs)} number(s) above 0, separated by commas"
        _require(args, "teacher_weights", holds, remedy)
    if args.kd_loss == "dkd" and args.kd_alpha > 0 and not args.eval:
        if not (args.dkd_alpha or args.dkd_beta):
            raise UserError(
                "--dkd_alpha 0 and --dkd_beta 0: leave nothing of --kd_loss dkd; pass one above 0"
            )
        remedy = "needs one class per image, and {}; {}"
        mixed = remedy.format("mixup and cutmix mix them", "pass --mixup 0 --cutmix 0")
        _require(args, "kd_loss", not is_mixed(args), mixed)
        without = remedy.format("--unlabeled adds images without one", "pass kl, dist, hard or bce")
        _require(args, "kd_loss", not args.unlabeled, without)


def check_combinations(args: argparse.Namespace) -> None:
    """Raise UserError for flags that contradict each other."""
    require = partial(_require, args)
    if args.data_set in ("IMNET", *FROM_FILES):
        if not (args.data_path or (args.eval and args.eval_data_path and not args.holdout)):
            raise UserError(f"--data_set {args.data_set}: needs a folder; pass --data_path FOLDER")
        if args.data_set != "tars":
            check_folders(args)
    remedy = "no such file; pass a text file with a path and a class per line"
    for flag in [flag for flag in ("labels", "eval_labels") if flag in args.given]:
        require(flag, os.path.isfile(getattr(args, flag)), remedy)
    if args.unlabeled == "rest":
        remedy = "means the images that --train_samples leaves out; pass --train_samples N too"
        require("unlabeled", bool(args.train_samples), remedy)
    elif args.unlabeled:
        holds_images = os.path.isdir(args.unlabeled) or names_tars(args.unlabeled)
        remedy = "is not a folder; pass a folder of images, tar files ('pile/*.tar'), or rest"
        require("unlabeled", holds_images, remedy)
    remedy = f"must be below the number of epochs ({args.epochs}); lower it or raise --epochs"
    require("start_epoch", args.start_epoch < args.epochs, remedy)
    remedy = f"longer than the run of {args.epochs} epochs; shorten it or leave it out"
    for flag in ("warmup_epochs", "kd_warmup_epochs"):
        require(flag, getattr(args, flag) <= args.epochs, remedy)
    if args.class_weights != "none":
        require("class_weights", args.loss == "ce", "weighs --loss ce; pass that, or none")
    if args.sched == "step":
        check_milestones(args)
    else:
        remedy = f"above --lr {args.lr}, the peak; pass a smaller --min_lr, or a larger --lr"
        require("min_lr", args.lr is None or args.min_lr <= args.lr, remedy)
    if args.opt_betas:
        require("opt_betas", len(args.opt_betas) > 1, "pass two numbers, such as 0.9 0.999")
    if args.cutmix_minmax:
        # timm draws a whole number of pixels from the first up to below the second.
        least, most = (int(args.input_size * ratio) for ratio in args.cutmix_minmax)
        remedy = "pass the smaller ratio first; at --input_size {} the ratios must differ by {:.2g}"
        side = args.input_size
        require("cutmix_minmax", least < most, remedy.format(side, 1 / side))
    if is_mixed(args) and args.batch_size and not args.eval:
        remedy = "mixup and cutmix need an even batch size, or pass --mixup 0 --cutmix 0"
        require("batch_size", args.batch_size % 2 == 0, remedy)
    if args.pretrained and is_own_module(args.model):
        raise UserError(
            f"--pretrained true: timm has no weights of --model {args.model}; load them in that "
            "function, or pass --finetune FILE"
        )
    remedy = "beside --pretrained true, which starts from other weights; remove one of the two"
    require("finetune", not (args.finetune and args.pretrained), remedy)
    if args.linear_probe and not args.eval:
        has_weights = bool(args.finetune or args.pretrained)
        remedy = "needs weights to start from; pass --finetune FILE or --pretrained true"
        require("linear_probe", has_weights, remedy)
        remedy = "trains on labels alone, without a teacher; remove --kd true or --linear_probe"
        require("linear_probe", not args.kd, remedy)
    if args.eval and not args.resume:
        raise UserError("--eval true: needs a checkpoint to score; pass --resume FILE")
    if args.teacher_cache_range and args.teacher_cache_only:
        all_views = min(args.teacher_views or args.epochs, args.epochs)
        remedy = f"needs a part of 0:{all_views}, such as 0:{max(1, all_views // 2)}"
        require("teacher_cache_range", bool(views_of(args)), remedy)


def check_milestones(args: argparse.Namespace) -> None:
    """Raise UserError if the learning rate of --sched step would never or wrongly be lowered."""
    epochs = args.decay_epochs
    if not epochs and args.epochs < 2:
        raise UserError(f"--epochs {args.epochs}: too few for --sched step; pass 2 or more")
    if not epochs:
        usual = sorted({args.epochs // 2, args.epochs * 3 // 4})
        raise UserError(
            "--sched step: needs the epochs after which the learning rate is lowered; pass "
            f"--decay_epochs, such as {as_typed(usual)}"
        )
    is_rising = all(a < b for a, b in itertools.pairwise(epochs))
    _require(args, "decay_epochs", is_rising, "pass each epoch once, in ascending order")
    remedy = f"{epochs[-1]} is not below the number of epochs ({args.epochs}); lower it"
    _require(args, "decay_epochs", epochs[-1] < args.epochs, remedy)


def check_folders(args: argparse.Namespace) -> None:
    """Raise UserError if the folders in --data_path are neither train and val nor classes."""
    path, names = args.data_path, folders_in(args.data_path)
    splits = [name for name in names if is_split_name(name)]
    learns_no_label = teachers_of(args) and args.kd_alpha == 1
    if learns_no_label and not splits:
        return  # images without labels may lie there in any way
    is_likely = name_both_splits(names) and not (args.eval or args.holdout or learns_no_label)
    are_classes = args.data_set == "image_folder" and not args.labels
    if are_classes and splits and (is_likely or must_hold_out(args)):
        raise UserError(
            f"--data_path {path}: holds {' and '.join(splits)}, which look like splits, not "
            "classes; pass --data_set IMNET for a folder with train and val, or --eval_data_path "
            "with the folder of validation images, or --holdout N if they are classes"
        )
    if os.path.isfile(path or ""):
        raise UserError(
            f"--data_path {path}: is a file; pass a folder of images (unpack an archive first)"
        )
    if args.data_set != "IMNET" or not os.path.isdir(path):
        return
    needed = {"train": not args.eval or args.holdout}
    needed["val"] = not args.holdout and (args.eval or not args.disable_eval)
    for part in needed:
        if not needed[part] or os.path.isdir(os.path.join(path, part)):
            continue
        others = [name for name in names if name.lower() in SPLIT_NAMES[part]]
        problem = f"--data_path {path}: holds no folder {part}"
        if others:
            first = {p: [n for n in names if n.lower() in SPLIT_NAMES[p]] for p in SPLIT_NAMES}
            train, val = (os.path.join(path, (first[p] or [p])[0]) for p in SPLIT_NAMES)
            train = "" if args.eval else f"--data_path {train} "
            raise UserError(
                f"{problem}, but {' and '.join(others)}; rename {others[0]} to {part}, or pass "
                f"--data_set image_folder {train}--eval_data_path {val}"
            )
        classes = [name for name in names if not is_split_name(name)]
        remedy = "pass the folder that holds train and val, or one that holds only class folders"
        if args.eval:
            remedy = "pass the folder that holds val, or --data_set image_folder --eval_data_path "
            remedy += "with a folder of class folders"
        elif part == "val":
            remedy = "add it, or pass --holdout N, which holds out training images"
        if classes and splits and not args.eval:
            remedy += f"; if {splits[0]} and {classes[0]} are classes, pass --data_set image_folder"
            remedy += " --holdout N"
        raise UserError(f"{problem}; {remedy}")


REMEDIES = {
    "without": "add that, or remove {}",
    "with": "remove {}",
    "beside": "remove one of the two",
}


def without_effect(args: argparse.Namespace) -> dict[Need, list[str]]:
    """The flags of the command line that do nothing in this run, by the first need that fails."""
    idle: dict[Need, list[str]] = {}
    for flag in FLAGS.values():
        if flag.name in args.given:
            for need in flag.needs:
                if not need.holds(args):
                    idle.setdefault(need, []).append(flag.name)
                    break
    return idle


def check_effects(args: argparse.Namespace) -> None:
    """Raise UserError for a flag without effect, unless its switch is on the command line too."""
    for need, idle in without_effect(args).items():
        if not any(switch in args.given for switch in need.switches):
            flags = " and ".join(_shown(args, flag) for flag in idle)
            verb, noun = ("has", "the flag") if len(idle) == 1 else ("have", "the flags")
            remedy = REMEDIES[need.otherwise.split()[0]].format(noun)
            raise UserError(f"{flags} {verb} no effect {need.otherwise}; {remedy}")


def effects_line(args: argparse.Namespace) -> str:
    """One line that names the flags without effect that are not refused; '' for none."""
    parts = [
        f"{', '.join(f'--{flag}' for flag in idle)} ({need.otherwise})"
        for need, idle in without_effect(args).items()
    ]
    return f"Without effect in this run: {'; '.join(parts)}" if parts else ""


def check_names(args: argparse.Namespace) -> None:
    """Raise UserError for names of nothing, before anything is read.

    Names of data sets, augmentation policies and files of weights. Those of architectures are known
    once timm is imported, see models.check_architecture.
    """
    data_set = args.data_set
    if "/" not in data_set and data_set not in (*DATA_SETS, "folder"):
        similar = difflib.get_close_matches(data_set, DATA_SETS, n=2, cutoff=0.5)
        known = f"did you mean {' or '.join(similar)}? Known are" if similar else "known are"
        raise UserError(
            f"--data_set {data_set}: no such data set; {known} {', '.join(DATA_SETS)} (CIFAR has "
            "100 classes), folder (read by timm) and timm's hfds/…, hfids/…, tfds/…, wds/… and "
            "torch/…"
        )
    if args.aa and not AUGMENTATION_POLICY.fullmatch(args.aa):
        raise UserError(
            f"--aa {args.aa}: timm knows no such policy; pass rand, augmix, original, originalr, "
            "v0, v0r or 3a, with options such as rand-m9-mstd0.5-inc1, or none for no policy"
        )
    teachers = teachers_of(args)
    for teacher in teachers:
        if teacher.path == PRETRAINED and is_own_module(teacher.arch):
            raise UserError(
                f"--teacher_path {PRETRAINED}: timm has no weights of --teacher_arch "
                f"{teacher.arch}; pass the file of its weights"
            )
    files = [("teacher_path", teacher.path) for teacher in teachers]
    files += [("finetune", args.finetune), ("resume", args.resume)]
    for flag, path in files:
        is_file = path and path != PRETRAINED and not is_url(path)
        if is_file and (problem := missing_file(path)):
            raise UserError(f"--{flag} {problem}")


# timm's notation (timm/data/auto_augment.py). timm itself would ignore an option without a number.
_NUMBER = r"\d+(?:\.\d+)?"
AUGMENTATION_POLICY = re.compile(
    rf"rand(?:-(?:(?:m|n|mmax|inc)\d+|(?:p|mstd){_NUMBER}|t(?:weights|3a|3aw)))*"
    rf"|augmix(?:-(?:(?:m|w|d|b)\d+|(?:a|mstd){_NUMBER}))*"
    rf"|(?:original|originalr|v0|v0r|3a)(?:-mstd{_NUMBER})?"
)
