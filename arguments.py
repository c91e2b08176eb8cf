"""The command line, parsed and checked, with every default filled in.

Nothing here imports torch, so that a wrong value, file or architecture is reported at once.
"""

import argparse
import difflib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flags import (
    AUGMENTATION,
    EMA,
    KD,
    MIXING,
    OPTIMIZER,
    TEACHER,
    TEACHER_CACHE,
    flags_of_group,
    get_args_parser,
)

# Side of the images in pixels; every other data set is taken for photographs.
NATIVE_SIZE = {"DIGITS": 8, "MNIST": 28, "FashionMNIST": 28, "CIFAR": 32, "CIFAR10": 32}
MIRRORED_CHANGES_MEANING = {"DIGITS", "MNIST"}
SMALL = 64  # below this side, images are padded and cropped as for CIFAR, at one scale
TORCHVISION_SETS = ("CIFAR", "CIFAR10", "MNIST", "FashionMNIST")
DATA_SETS = ("DIGITS", "IMNET", "image_folder", *TORCHVISION_SETS)
# What other scripts call our flags and data sets.
OTHER_FLAGS = {
    "alpha": "kd_alpha",
    "amp": "use_amp",
    "arch": "model",
    "data": "data_path",
    "data_dir": "data_path",
    "dataset": "data_set",
    "img_size": "input_size",
    "learning_rate": "lr",
    "num_classes": "nb_classes",
    "output": "output_dir",
    "temperature": "kd_temperature",
    "wd": "weight_decay",
    "workers": "num_workers",
}
OTHER_DATA_SETS = {"cifar100": "CIFAR", "imagenet": "IMNET"}
# What folders of training and of validation images are called, in lower case. A folder that holds
# one of them is not taken for a folder of class folders.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev", "eval", "test", "testing"),
}

# Flags that say where and how a run computes and what it writes, not what it computes. They are
# neither taken from a checkpoint nor compared with it.
NOT_RECIPE = frozenset(
    "given output_dir log_dir resume auto_resume start_epoch device teacher_device num_workers "
    "pin_mem compile dist_url local_rank eval use_ema dist_eval save_ckpt save_ckpt_freq "
    "save_ckpt_num save_ckpt_steps fast_cuda print_seconds report calibrate".split()
)
# Flags that name the data. A checkpoint knows its data by its contents, which may have moved.
DATA_FLAGS = (
    "data_set",
    "data_path",
    "eval_data_path",
    "labels",
    "eval_labels",
    "holdout",
    "nb_classes",
    "unlabeled",
)


# Flags that set nothing in a run without a teacher; --teacher_views also repeats epochs without.
OF_TEACHER = {*flags_of_group(KD), *flags_of_group(TEACHER), *flags_of_group(TEACHER_CACHE)}
OF_TEACHER = (OF_TEACHER | {"unlabeled", "use_ema"}) - {"kd", "teacher_views"}


def parse_args(
    argv: list[str] | None = None, saved: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """Parse and check the command line and fill in every default.

    Args:
        argv: the flags; None for those of this process.
        saved: values for flags that are not given, such as those in a checkpoint.
    Exits with code 2 and one line on stderr for a value that cannot work.
    """
    parser = get_args_parser()
    words = _words(parser, argv)
    parser.set_defaults(**(saved or {}))
    args, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(unknown_flags(unknown, [action.dest for action in parser._actions]))
    args.given = given_flags(words)
    unify_spelling(args)
    check_numbers(parser, args)
    check_distillation(parser, args)
    of_images = {*flags_of_group(AUGMENTATION), *flags_of_group(MIXING)}
    if args.linear_probe and not of_images & {*args.given, *(saved or ())}:
        vars(args).update(NO_AUGMENTATION)
    fill_defaults(args)
    if not args.resume or saved is not None:  # else the checkpoint's flags are still to come
        check_combinations(parser, args)
        check_effects(parser, args)
    check_names(parser, args)
    return args


def given_flags(words: list[str]) -> list[str]:
    """Names of the flags that a command line sets, whatever their values."""
    parser = get_args_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return sorted(vars(parser.parse_args(words)))


def _words(parser: argparse.ArgumentParser, argv: list[str] | None) -> list[str]:
    """A command line, or that of this process for None, with --batch-size as --batch_size."""
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        flag, equals, value = word.partition("=")
        underscored = flag[:2] + flag[2:].replace("-", "_")
        is_flag = underscored in parser._option_string_actions
        words.append(underscored + equals + value if is_flag else word)
    return words


def unknown_flags(words: Sequence[str], known: Collection[str]) -> str:
    """The error for words of a command line that belong to no flag, with similar flags."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    told = []
    for flag in flags:
        name = flag.lstrip("-").replace("-", "_")
        other = OTHER_FLAGS.get(name)
        similar = [other] if other else difflib.get_close_matches(name, known, n=2, cutoff=0.75)
        names = " or ".join(f"--{flag}" for flag in similar)
        told.append(f"{flag}; did you mean {names}?" if names else f"{flag}; see --help")
    return "unrecognized arguments: " + " ".join(told or [*words[:-1], f"{words[-1]}; see --help"])


def unify_spelling(args: argparse.Namespace) -> None:
    """Write values that can be spelled in several ways in one way.

    So checkpoints, teacher caches and every comparison see the same value.
    """
    for flag in ("teacher_path", "teacher_arch", "teacher_weights"):
        value = getattr(args, flag)
        if value is not None:  # 'a,b', 'a, b' and 'a b' name the same teachers
            words = [value] if isinstance(value, str) else value
            parts = [part.strip() for word in words for part in word.split(",")]
            setattr(args, flag, ",".join(os.path.expanduser(part) for part in parts if part))
    if args.aa.lower() == "none":
        args.aa = ""
    if args.data_set:
        names = {_plain(name): name for name in DATA_SETS} | OTHER_DATA_SETS
        args.data_set = names.get(_plain(args.data_set), args.data_set)


def _plain(name: str) -> str:
    return re.sub("[-_]", "", name.lower())


def follow_checkpoint(
    saved_args: Mapping[str, Any], given: Collection[str], is_eval: bool
) -> dict[str, Any]:
    """What a run takes from the arguments in a checkpoint where the command line says nothing.

    Args:
        is_eval: take the model and the data, but not the recipe of training.
    Returns: values for `parse_args(argv, saved=…)`.
    """
    skipped = set(NOT_RECIPE)
    if {"data_set", "data_path"} & set(given):
        skipped |= set(DATA_FLAGS)  # other data: none of the old flags belongs to it
    if {"eval_data_path", "eval_labels"} & set(given):
        skipped.add("holdout")  # was chosen where there were no validation images
    for flag, chosen in (("epochs", "warmup_epochs"), ("seed", "data_seed")):
        if flag in given and chosen not in saved_args.get("given", ()):
            skipped.add(chosen)  # was chosen by default for the earlier value of the flag
    known = {action.dest for action in get_args_parser()._actions} - skipped
    if is_eval:
        known &= {"model", "input_size", "batch_size", *DATA_FLAGS} - {"unlabeled"}
    return {name: value for name, value in saved_args.items() if name in known}


def fill_defaults(args: argparse.Namespace) -> None:
    """Choose what was not given from the other flags and from this machine's cores.

    What depends on the number of training images is left to `fit_to_images`.
    """
    is_labelled = bool(args.labels or args.eval_labels)
    args.data_set = args.data_set or ("IMNET" if args.data_path or is_labelled else "DIGITS")
    if args.data_set == "IMNET" and (is_labelled or holds_class_folders(args.data_path)):
        args.data_set = "image_folder"
    native_size = NATIVE_SIZE.get(args.data_set, 224)
    if args.model is None:
        is_small = (args.input_size or native_size) < SMALL
        args.model = "cifar_resnet20" if is_small else "convnext_tiny"
    if args.input_size is None:
        args.input_size = native_size if args.model.startswith("cifar_") else 224
    if args.hflip is None:
        args.hflip = 0.0 if args.data_set in MIRRORED_CHANGES_MEANING else 0.5
    if args.warmup_epochs is None:
        args.warmup_epochs = min(20, args.epochs / 5)
    if args.weight_decay is None:
        args.weight_decay = 1e-4 if is_sgd(args.opt) else 0.05
    if args.num_workers is None:
        args.num_workers = max(1, int(cores_per_process()))
    if args.data_seed is None:
        args.data_seed = args.seed


def fit_to_images(args: argparse.Namespace, images: int) -> list[str]:
    """Choose what depends on the number of training images, known once the data is open.

    The batch size, where it is not given or more than the images, and the learning rate.

    Returns: lines for the user: a value that is not used as given, images that are left out.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    lines = []
    if args.batch_size is None:
        args.batch_size = default_batch_size(images // processes // args.update_freq)
    given, most = args.batch_size, _batch_size(args, images // processes)
    if given > most:
        args.batch_size = most
        lines.append(
            f"--batch_size {given} on {processes} process(es) is more than the {images} training "
            f"images: batches of {most} are used"
        )
    total = args.batch_size * processes
    if "num_workers" not in args.given and total:
        args.num_workers = min(args.num_workers, max(1, images // total))
    # A probe's depends on the number of features, known once the network is made.
    if args.lr is None and total and (is_sgd(args.opt) or not args.linear_probe):
        steps = args.epochs * math.ceil(images // total / args.update_freq)
        args.lr = default_lr(args, total * args.update_freq, steps)
    left_out = images % total if total else 0
    if left_out and args.teacher_views == 1:
        lines.append(
            f"Warning: --teacher_views 1: {left_out} of {images} images do not fill a batch and "
            "are never shown; pass --teacher_views 2 or more, which show every image"
        )
    elif left_out > 0.1 * images:
        smaller = _batch_size(args, images // (images // total + 1) // processes)
        lines.append(
            f"--batch_size {args.batch_size}: {left_out} of {images} images do not fill a batch "
            f"and are left out of each epoch, other images in the next; --batch_size {smaller} "
            f"leaves out {images % (smaller * processes)}"
        )
    return lines


def default_batch_size(images: int) -> int:
    """The largest power of two from 8 to 64 with which the images make 50 batches; else 8."""
    return next((size for size in (64, 32, 16) if images >= 50 * size), 8)


FEW_STEPS_LR = 2e-3  # the most that `default_lr` raises the rate to
LEAST_WAY = 3.0  # what `default_lr` wants the rate times the steps to be


def default_lr(args: argparse.Namespace, total_batch: int, steps: int) -> float:
    """The peak learning rate.

    Args:
        total_batch: images per optimizer step, over all processes.
        steps: optimizer steps of the run.
    """
    if is_sgd(args.opt):
        # He et al. 2016, section 4.2: 0.1 at a batch of 128.
        return 0.1 * (total_batch / 128) ** 0.5
    # 4e-3 at 4096 as in the ConvNeXt script. Adam's noise scale grows with sqrt(batch) (Malladi et
    # al. 2022), not with the batch.
    lr = 4e-3 * (total_batch / 4096) ** 0.5
    if args.finetune or args.pretrained:
        return lr
    # Adam moves a weight by at most about lr per step, so few steps from scratch need a higher one.
    return max(lr, min(FEW_STEPS_LR, LEAST_WAY / steps))


def is_sgd(opt: str) -> bool:
    """Whether an optimizer of timm's is a form of SGD, by its name."""
    return "sgd" in opt or opt.endswith("momentum")


def _batch_size(args: argparse.Namespace, images: int) -> int:
    """The largest batch size of at most so many images; even where images are mixed."""
    return images - images % 2 if is_mixed(args) else images


def usable_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores_per_process() -> float:
    """Processor cores of this machine for each process of the run."""
    return usable_cores() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


PRETRAINED = "pretrained"  # in --teacher_path: timm's own weights of the architecture


class Teacher(NamedTuple):
    """One teacher of the command line."""

    arch: str
    path: str
    weight: float


def teachers_of(args: argparse.Namespace) -> list[Teacher]:
    """The teachers that a run asks; none without --kd true or with --kd_alpha 0.

    Raises: ValueError where architectures, files and weights do not match in number.
    """
    if not args.kd or args.kd_alpha == 0:
        return []
    archs, paths = args.teacher_arch.split(","), args.teacher_path.split(",")
    weights = args.teacher_weights.split(",") if args.teacher_weights else ["1"] * len(archs)
    return [
        Teacher(arch.strip(), path.strip(), float(weight))
        for arch, path, weight in zip(archs, paths, weights, strict=True)
    ]


def folders_in(path: str | None) -> list[str]:
    """Names of the folders in a folder, sorted; none where the folder cannot be listed."""
    try:
        with os.scandir(path or "") as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except OSError:
        return []


def is_split_name(name: str) -> bool:
    """Whether this is what a folder of training or validation images is usually called."""
    return any(name.lower() in names for names in SPLIT_NAMES.values())


def holds_class_folders(path: str | None) -> bool:
    """Whether a folder holds other folders, and none with the name of a split such as train."""
    names = folders_in(path)
    return bool(names) and not any(map(is_split_name, names))


def must_hold_out(args: argparse.Namespace) -> bool:
    """Whether a run evaluates, but nothing says which images of a folder are for that.

    A fifth of the images is then held out, as by --holdout.
    """
    has_validation = args.holdout or args.eval_data_path or args.eval_labels
    is_evaluated = args.eval or not args.disable_eval
    return args.data_set == "image_folder" and is_evaluated and not has_validation


def is_own_module(arch: str) -> bool:
    """Whether a network is made by a function of the user's own, named MODULE:FACTORY."""
    return ":" in arch and arch.partition(":")[0] not in ("hf-hub", "hf_hub", "local-dir")


def follows_network(args: argparse.Namespace) -> bool:
    """Whether the student says its input size and normalisation, where no flag does."""
    return args.pretrained or is_own_module(args.model)


def data_flag(args: argparse.Namespace) -> str:
    """The flag that names the data, with its value."""
    return f"--data_path {args.data_path}" if args.data_path else f"--data_set {args.data_set}"


def unlabelled_of(args: argparse.Namespace) -> str:
    """Where images without a label come from: a folder or 'rest'; '' where no teacher is asked."""
    return args.unlabeled if teachers_of(args) else ""


# Values of the flags of augmentation and mixing with which training images stay as they are.
NO_AUGMENTATION = {
    "aa": "",
    "color_jitter": 0.0,
    "hflip": 0.0,
    "reprob": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "cutmix_minmax": None,
}


def is_augmented(args: argparse.Namespace) -> bool:
    """Whether a linear probe changes its training images; every other run crops them at random."""
    return not args.linear_probe or any(
        getattr(args, flag) != value for flag, value in NO_AUGMENTATION.items()
    )


def is_mixed(args: argparse.Namespace) -> bool:
    """Whether images are mixed by mixup or cutmix."""
    return args.mixup > 0 or args.cutmix > 0 or bool(args.cutmix_minmax)


def views_of(args: argparse.Namespace) -> range:
    """The views that a run shows, or those of --teacher_cache_range.

    Returns: an empty range where --teacher_cache_range is not within the views of the run.
    """
    count = min(args.teacher_views or args.epochs, args.epochs)
    first, _, last = (args.teacher_cache_range or f"0:{count}").partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(last) <= count):
        return range(0)
    return range(int(first), int(last))


# ------------------------------------------------------------------------------------ checks


def _require(
    parser: argparse.ArgumentParser, args: argparse.Namespace, flag: str, holds: bool, remedy: str
) -> None:
    if not holds:
        parser.error(f"{_shown(args, flag)}: {remedy}")


def _shown(args: argparse.Namespace, flag: str) -> str:
    return f"--{flag} {as_typed(getattr(args, flag))}"


def as_typed(value: Any) -> str:
    """A value as one types it on the command line."""
    values = value if isinstance(value, list) else [value]
    return " ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)


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

    Names of data sets, augmentation policies, architectures and files of weights.
    """
    data_set = args.data_set
    if "/" not in data_set and data_set not in (*DATA_SETS, "folder"):
        parser.error(f"--data_set {unknown_data_set(data_set)}")
    if args.aa and not AUGMENTATION_POLICY.fullmatch(args.aa):
        parser.error(
            f"--aa {args.aa}: timm knows no such policy; pass rand, augmix, original, originalr, "
            "v0, v0r or 3a, with options such as rand-m9-mstd0.5-inc1, or none for no policy"
        )
    known = architectures()
    teachers = teachers_of(args)
    for flag, archs in (("model", [args.model]), ("teacher_arch", [t.arch for t in teachers])):
        for arch in archs:
            is_hub_name = ":" in arch  # hf-hub:… and local-dir:… are looked up by timm
            if known and not is_hub_name and arch.split(".")[0] not in known:
                parser.error(f"--{flag} {unknown_architecture(arch, known)}")
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


def is_url(path: str) -> bool:
    """Whether a checkpoint is named by its http address."""
    return path.startswith(("http://", "https://"))


def missing_file(path: str) -> str:
    """What is wrong with the path of a checkpoint file; '' where the file exists."""
    if os.path.isfile(path):
        return ""
    found = "is a folder" if os.path.isdir(path) else "no such file"
    return f"{path}: {found}; pass the path of a checkpoint file"


def architectures() -> set[str]:
    """Names of the architectures of timm and of models/, found without importing them.

    Importing timm takes seconds. All of its architectures are functions under a decorator, and
    those that were renamed are listed in a call, so reading the sources finds the names in 0.05 s.
    Returns: an empty set where timm is not found or its sources look different.
    """
    timm = importlib.util.find_spec("timm")
    if timm is None or not timm.submodule_search_locations:
        return set()
    names: set[str] = set()
    for package in (timm.submodule_search_locations[0], Path(__file__).parent):
        for file in (Path(package) / "models").glob("*.py"):
            source = file.read_text(encoding="utf-8")
            names.update(re.findall(r"^@register_model\s+def (\w+)\(", source, re.MULTILINE))
            _, _, renamed = source.partition("register_model_deprecations(__name__")
            names.update(re.findall(r"'(\w+)':", renamed))
    return names if len(names) > 100 else set()


def unknown_architecture(arch: str, known: set[str] | list[str]) -> str:
    """The error for an architecture that timm does not know, with similar names."""
    name = arch.split(".")[0]
    similar = [other for other in sorted(known) if other.endswith(f"_{name}")][:2]
    similar += difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.4)
    remedy = f"did you mean {', '.join(similar)}?" if similar else "see timm.list_models()"
    return f"{arch}: timm knows no such architecture; {remedy}"
