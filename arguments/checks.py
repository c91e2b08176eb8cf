"""Checks of the command line that need no data: ranges, names, files, and flags without effect."""

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from arguments.derived import (
    DATA_SETS,
    PRETRAINED,
    SMALL,
    SPLIT_NAMES,
    folders_in,
    is_mixed,
    is_own_module,
    is_split_name,
    must_hold_out,
    teachers_of,
    views_of,
)
from arguments.flags import (
    AUGMENTATION,
    EMA,
    KD,
    MIXING,
    OPTIMIZER,
    TEACHER,
    TEACHER_CACHE,
    as_typed,
    flags_of_group,
)
from utils import is_url, missing_file

# ------------------------------------------------------------------------------------ checks


def _require(
    parser: argparse.ArgumentParser, args: argparse.Namespace, flag: str, holds: bool, remedy: str
) -> None:
    if not holds:
        parser.error(f"{_shown(args, flag)}: {remedy}")


def _shown(args: argparse.Namespace, flag: str) -> str:
    return f"--{flag} {as_typed(getattr(args, flag))}"


class Range(NamedTuple):
    """The values that a numeric flag may have."""

    remedy: str  # 'must …'
    holds: Callable[[float], bool]  # False for NaN, since it compares as False


# Every numeric flag is here, so none can be NaN or infinite.
RANGES = {
    Range("must be a whole number", lambda value: True): "local_rank",
    Range(
        "must be 1 or more", lambda value: value >= 1
    ): "batch_size epochs update_freq recount eval_freq "
    "input_size teacher_input_size train_samples holdout nb_classes teacher_views "
    "teacher_cache_topk save_ckpt_freq save_ckpt_num save_ckpt_steps",
    Range("must be 0 or more", lambda value: value >= 0): "seed data_seed start_epoch num_workers "
    "warmup_epochs",
    Range("must be 0 or more, or -1 for unset", lambda value: value >= -1): "warmup_steps",
    Range("must be above 0 and finite", lambda value: 0 < value < math.inf): "kd_temperature "
    "clip_grad layer_decay",
    Range("must be 0 or more and finite", lambda value: 0 <= value < math.inf): "lr min_lr "
    "weight_decay weight_decay_end opt_eps head_init_scale color_jitter mixup cutmix print_seconds",
    Range("must lie in 0…1", lambda value: 0 <= value <= 1): "kd_alpha drop_path momentum reprob "
    "hflip mixup_prob mixup_switch_prob cutmix_minmax",
    Range("must be 0 or more and below 1", lambda value: 0 <= value < 1): "smoothing opt_betas "
    "model_ema_decay",
    Range("must be above 0 and at most 1", lambda value: 0 < value <= 1): "crop_pct",
    Range("must lie in 0…100, in percent", lambda value: 0 <= value <= 100): "teacher_min_acc1",
}
RANGE_OF = {flag: allowed for allowed, flags in RANGES.items() for flag in flags.split()}


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with code 2 for a number outside the range of its flag."""
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.type not in (int, float) or value is None:
            continue
        allowed = RANGE_OF[action.dest]  # a KeyError here: the new flag needs a range
        values = value if isinstance(value, list) else [value]
        _require(parser, args, action.dest, all(map(allowed.holds, values)), allowed.remedy)


def check_distillation(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with code 2 where the flags of the teacher do not belong together."""
    if args.teacher_cache_only and not (args.kd and args.teacher_cache and args.kd_alpha > 0):
        parser.error(
            "--teacher_cache_only true needs --teacher_cache FOLDER to fill, --kd true with its "
            "teacher, and --kd_alpha above 0"
        )
    if not args.kd:
        return
    missing = [f"--{f}" for f in ("teacher_path", "teacher_arch") if not getattr(args, f)]
    if missing:
        parser.error(f"--kd true needs {' and '.join(missing)}")
    archs, paths = args.teacher_arch.split(","), args.teacher_path.split(",")
    if len(archs) != len(paths):
        parser.error(
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
        _require(parser, args, "teacher_weights", holds, remedy)


def check_combinations(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with code 2 for flags that contradict each other."""

    def require(flag: str, holds: bool, remedy: str) -> None:
        _require(parser, args, flag, holds, remedy)

    if args.data_set in ("IMNET", "image_folder"):
        if not (args.data_path or (args.eval and args.eval_data_path and not args.holdout)):
            parser.error(f"--data_set {args.data_set}: needs a folder; pass --data_path FOLDER")
        check_folders(parser, args)
    remedy = "no such file; pass a text file with a path and a class per line"
    for flag in [flag for flag in ("labels", "eval_labels") if flag in args.given]:
        require(flag, os.path.isfile(getattr(args, flag)), remedy)
    if args.unlabeled == "rest":
        remedy = "means the images that --train_samples leaves out; pass --train_samples N too"
        require("unlabeled", bool(args.train_samples), remedy)
    elif args.unlabeled:
        is_folder = os.path.isdir(args.unlabeled)
        remedy = "is not a folder; pass a folder of images, or rest"
        require("unlabeled", is_folder, remedy)
    remedy = f"must be below the number of epochs ({args.epochs}); lower it or raise --epochs"
    require("start_epoch", args.start_epoch < args.epochs, remedy)
    remedy = f"longer than the run of {args.epochs} epochs; shorten it or leave it out"
    require("warmup_epochs", args.warmup_epochs <= args.epochs, remedy)
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
        parser.error(
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
    require("resume", bool(args.resume) or not args.eval, "--eval true needs a checkpoint to score")
    if args.teacher_cache_range and args.teacher_cache_only:
        all_views = min(args.teacher_views or args.epochs, args.epochs)
        remedy = f"needs a part of 0:{all_views}, such as 0:{max(1, all_views // 2)}"
        require("teacher_cache_range", bool(views_of(args)), remedy)


def check_folders(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with code 2 where the folders in --data_path are neither train and val nor classes."""
    path, names = args.data_path, folders_in(args.data_path)
    splits = [name for name in names if is_split_name(name)]
    if teachers_of(args) and args.kd_alpha == 1 and not splits:
        return  # images without labels may lie there in any way
    if args.data_set == "image_folder" and must_hold_out(args) and splits and not args.labels:
        parser.error(
            f"--data_path {path}: holds {' and '.join(splits)}, which are hardly classes; pass "
            "--data_set IMNET for a folder with train and val, or --eval_data_path with the folder "
            "of validation images, or --holdout N if they are classes"
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
            parser.error(
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
        parser.error(f"{problem}; {remedy}")


# ------------------------------------------------------------------------ flags without effect


class Dependence(NamedTuple):
    """Flags that have an effect only together with others.

    On the command line, a flag without effect is refused. But where one of `switches` is there too,
    as in a script that varies the switch, the flag is only reported.
    """

    flags: Sequence[str]
    works: Callable[[argparse.Namespace], Any]  # true where they have an effect
    otherwise: str  # 'without …', 'with …' or 'beside …', which decides the remedy
    switches: Sequence[str] = ()


REMEDIES = {
    "without": "add that, or remove {}",
    "with": "remove {}",
    "beside": "remove one of the two",
}


def dependences() -> list[Dependence]:
    """Every flag that other flags can leave without effect; the first row that applies counts."""
    kd, teacher, cache, optimizer, (ema, *of_ema), augmentation, mixing = map(
        flags_of_group, (KD, TEACHER, TEACHER_CACHE, OPTIMIZER, EMA, AUGMENTATION, MIXING)
    )
    # --teacher_views also repeats augmented epochs without a cache and without a teacher.
    of_cache = [flag for flag in cache if flag not in ("teacher_cache", "teacher_views")]
    asked = ["kd_temperature", *teacher, "teacher_cache", *of_cache, "unlabeled"]
    of_kd = ["teacher_path", "teacher_arch", "kd_alpha", *asked]
    of_start = "start_epoch pretrained finetune linear_probe model_key model_prefix".split()
    of_start += ["head_init_scale", "drop_path"]
    of_backbone = ["drop_path", "layer_decay", "compile", "sync_bn"]
    of_saving = "save_ckpt_freq save_ckpt_num save_ckpt_steps".split()
    output = [*of_saving, "save_ckpt", "auto_resume", "log_dir", "print_seconds"]
    of_training = [*optimizer, ema, *of_ema, *of_start, *output, "update_freq"]
    not_scored = [*of_training, *kd, *teacher, *cache, *augmentation, *mixing]
    not_scored += "epochs compile train_samples unlabeled disable_eval eval_freq".split()
    not_filled = [*of_training, "output_dir", "resume"]
    ratios = ["mixup", "cutmix", "cutmix_minmax"]

    row = Dependence
    return [
        row(not_scored, lambda a: not a.eval, "with --eval true", ["eval"]),
        row(
            not_filled,
            lambda a: not a.teacher_cache_only,
            "with --teacher_cache_only true",
            ["teacher_cache_only"],
        ),
        row(
            of_backbone,
            lambda a: not a.linear_probe,
            "with --linear_probe true",
            ["linear_probe"],
        ),
        row(of_kd, lambda a: a.kd, "without --kd true", ["kd"]),
        row(
            asked,
            lambda a: not a.kd or a.kd_alpha > 0,
            "with --kd_alpha 0",
            ["kd_alpha"],
        ),
        row(["use_ema"], lambda a: a.kd or a.eval, "without --kd true or --eval true", ["kd"]),
        row(of_cache, lambda a: a.teacher_cache, "without --teacher_cache FOLDER"),
        row(
            ["teacher_cache_range"],
            lambda a: a.teacher_cache_only,
            "without --teacher_cache_only true",
        ),
        row(["teacher_min_acc1"], lambda a: a.teacher_eval, "without --teacher_eval true"),
        row(
            ["eval_freq", "model_ema_eval"],
            lambda a: not a.disable_eval,
            "with --disable_eval true",
            ["disable_eval"],
        ),
        row(
            ["dist_eval"],
            lambda a: not a.disable_eval or teachers_of(a),
            "with --disable_eval true",
            ["disable_eval"],
        ),
        row(["teacher_weights"], lambda a: "," in a.teacher_arch, "with a single teacher"),
        row(
            ["smoothing", "class_weights"],
            lambda a: not a.kd or a.kd_alpha < 1,
            "with --kd_alpha 1, which ignores labels",
            ["kd_alpha"],
        ),
        row(["amp_dtype"], lambda a: a.use_amp, "without --use_amp true", ["use_amp"]),
        row(of_ema, lambda a: a.model_ema, "without --model_ema true", ["model_ema"]),
        row(["model_key", "model_prefix"], lambda a: a.finetune, "without --finetune FILE"),
        row(["warmup_epochs"], lambda a: a.warmup_steps < 0, "beside --warmup_steps"),
        row(
            ["weight_decay_end"],
            lambda a: a.weight_decay > 0,
            "with --weight_decay 0",
            ["weight_decay"],
        ),
        row(["color_jitter"], lambda a: not a.aa or "3a" in a.aa, "without --aa none", ["aa"]),
        row(
            ["train_interpolation"],
            lambda a: a.aa or a.input_size >= SMALL,
            f"with --aa none and images below {SMALL} pixels",
            ["aa", "input_size"],
        ),
        row(["remode", "recount"], lambda a: a.reprob > 0, "with --reprob 0", ["reprob"]),
        row(["cutmix"], lambda a: not a.cutmix_minmax, "beside --cutmix_minmax"),
        row(["mixup_prob", "mixup_mode"], is_mixed, "without --mixup or --cutmix", ratios),
        row(
            ["mixup_switch_prob"],
            lambda a: a.mixup > 0 and (a.cutmix > 0 or a.cutmix_minmax),
            "without both --mixup and --cutmix",
            ratios,
        ),
        row(["data_path"], lambda a: a.data_set != "DIGITS", "beside --data_set DIGITS"),
        row(
            ["eval_data_path", "labels", "eval_labels"],
            lambda a: a.data_set == "image_folder",
            "without --data_set image_folder",
        ),
        row(["eval_data_path", "eval_labels"], lambda a: not a.holdout, "beside --holdout"),
        row([*of_saving, "auto_resume"], lambda a: a.output_dir, "without --output_dir FOLDER"),
        row(of_saving, lambda a: a.save_ckpt, "with --save_ckpt false", ["save_ckpt"]),
    ]


def without_effect(args: argparse.Namespace) -> list[tuple[Dependence, list[str]]]:
    """The flags of the command line that do nothing in this run, by what they depend on."""
    left, found = set(args.given), []
    for dependence in dependences():
        idle = [flag for flag in dependence.flags if flag in left]
        if idle and not dependence.works(args):
            found.append((dependence, idle))
            left -= set(idle)
    return found


def check_effects(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with code 2 for a flag without effect, unless its switch is on the command line too."""
    for dependence, idle in without_effect(args):
        if not any(switch in args.given for switch in dependence.switches):
            flags = " and ".join(_shown(args, flag) for flag in idle)
            verb, noun = ("has", "the flag") if len(idle) == 1 else ("have", "the flags")
            remedy = REMEDIES[dependence.otherwise.split()[0]].format(noun)
            parser.error(f"{flags} {verb} no effect {dependence.otherwise}; {remedy}")


def effects_line(args: argparse.Namespace) -> str:
    """One line that names the flags without effect that are not refused; '' for none."""
    found = [
        f"{', '.join(f'--{flag}' for flag in idle)} ({dependence.otherwise})"
        for dependence, idle in without_effect(args)
    ]
    return f"Without effect in this run: {'; '.join(found)}" if found else ""


def check_names(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with code 2 for names of nothing, before anything is read.

    Names of data sets, augmentation policies and files of weights. Those of architectures are known
    once timm is imported, see models.check_architecture.
    """
    data_set = args.data_set
    if "/" not in data_set and data_set not in (*DATA_SETS, "folder"):
        parser.error(f"--data_set {unknown_data_set(data_set)}")
    if args.aa and not AUGMENTATION_POLICY.fullmatch(args.aa):
        parser.error(
            f"--aa {args.aa}: timm knows no such policy; pass rand, augmix, original, originalr, "
            "v0, v0r or 3a, with options such as rand-m9-mstd0.5-inc1, or none for no policy"
        )
    teachers = teachers_of(args)
    for teacher in teachers:
        if teacher.path == PRETRAINED and is_own_module(teacher.arch):
            parser.error(
                f"--teacher_path {PRETRAINED}: timm has no weights of --teacher_arch "
                f"{teacher.arch}; pass the file of its weights"
            )
    files = [("teacher_path", teacher.path) for teacher in teachers]
    files += [("finetune", args.finetune), ("resume", args.resume)]
    for flag, path in files:
        is_file = path and path != PRETRAINED and not is_url(path)
        if is_file and (problem := missing_file(path)):
            parser.error(f"--{flag} {problem}")


# timm's notation (timm/data/auto_augment.py). timm itself would ignore an option without a number.
_NUMBER = r"\d+(?:\.\d+)?"
AUGMENTATION_POLICY = re.compile(
    rf"rand(?:-(?:(?:m|n|mmax|inc)\d+|(?:p|mstd){_NUMBER}|t(?:weights|3a|3aw)))*"
    rf"|augmix(?:-(?:(?:m|w|d|b)\d+|(?:a|mstd){_NUMBER}))*"
    rf"|(?:original|originalr|v0|v0r|3a)(?:-mstd{_NUMBER})?"
)


def unknown_data_set(name: str) -> str:
    """The error for a data set that neither we nor timm know, with similar names."""
    similar = difflib.get_close_matches(name, DATA_SETS, n=2, cutoff=0.5)
    guess = f"did you mean {' or '.join(similar)}? " if similar else ""
    return (
        f"{name}: no such data set; {guess}Known are {', '.join(DATA_SETS)} (CIFAR has 100 "
        "classes), folder (read by timm) and timm's hfds/…, hfids/…, tfds/…, wds/… and torch/…"
    )
