"""The command line, parsed and checked, with every default filled in.

Nothing here imports torch, so that a wrong value, file or architecture is reported at once.
"""

import argparse
import difflib
import importlib.util
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flags import get_args_parser

# Side of the images in pixels; every other data set is taken for photographs.
NATIVE_SIZE = {"DIGITS": 8, "MNIST": 28, "FashionMNIST": 28, "CIFAR": 32, "CIFAR10": 32}
MIRRORED_CHANGES_MEANING = {"DIGITS", "MNIST"}
SMALL = 64  # below this side, images are padded and cropped as for CIFAR, at one scale
TORCHVISION_SETS = ("CIFAR", "CIFAR10", "MNIST", "FashionMNIST")

# Flags that say where and how a run computes and what it writes, not what it computes. They are
# neither taken from a checkpoint nor compared with it.
NOT_RECIPE = frozenset(
    "given output_dir log_dir resume auto_resume start_epoch device teacher_device num_workers "
    "pin_mem compile dist_url local_rank eval use_ema dist_eval save_ckpt save_ckpt_freq "
    "save_ckpt_num save_ckpt_steps".split()
)
# Flags that name the data. A checkpoint knows its data by its contents, which may have moved.
DATA_FLAGS = ("data_set", "data_path", "eval_data_path", "holdout", "nb_classes")


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
    parser.set_defaults(**(saved or {}))
    args = parser.parse_args(argv)
    args.given = given_flags(argv)
    check_distillation(parser, args)
    check_numbers(parser, args)
    fill_defaults(args)
    check_combinations(parser, args)
    check_names(parser, args)
    return args


def given_flags(argv: list[str] | None) -> list[str]:
    """Names of the flags that a command line sets, whatever their values."""
    parser = get_args_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return sorted(vars(parser.parse_args(argv)))


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
    known = {action.dest for action in get_args_parser()._actions} - skipped
    if is_eval:
        known &= {"model", "input_size", "batch_size", *DATA_FLAGS}
    return {name: value for name, value in saved_args.items() if name in known}


def fill_defaults(args: argparse.Namespace) -> None:
    """Choose what was not given from the other flags and from this machine's cores."""
    args.data_set = args.data_set or ("IMNET" if args.data_path else "DIGITS")
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
    if args.lr is None:
        # Adam's noise scale grows with sqrt(batch) (Malladi et al. 2022), not with the batch.
        processes = int(os.environ.get("WORLD_SIZE", 1))
        total_batch = args.batch_size * args.update_freq * processes
        args.lr = 4e-3 * (total_batch / 4096) ** 0.5
    if args.num_workers is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.num_workers = min(10, max(1, usable_cores() // processes))


def fit_to_images(args: argparse.Namespace, images: int) -> list[str]:
    """Adapt the batch size to the number of training images, known once the data is open.

    Returns: lines for the user: a value that is not used as given, images that are left out.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    lines = []
    given, most = args.batch_size, _batch_size(args, images // processes)
    if given > most:
        args.batch_size = most
        lines.append(
            f"--batch_size {given} on {processes} process(es) is more than the {images} training "
            f"images: batches of {most} are used"
        )
    total = args.batch_size * processes
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


def _batch_size(args: argparse.Namespace, images: int) -> int:
    """The largest batch size of at most so many images; even where images are mixed."""
    return images - images % 2 if is_mixed(args) else images


def usable_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
        parser.error(f"--{flag} {getattr(args, flag)}: {remedy}")


def check_distillation(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with code 2 where the flags of the teacher do not belong together."""
    if args.kd:
        missing = [f"--{f}" for f in ("teacher_path", "teacher_arch") if not getattr(args, f)]
        if missing:
            parser.error(f"--kd true needs {' and '.join(missing)}")
    elif args.teacher_path or args.teacher_arch:
        parser.error("--teacher_path and --teacher_arch need --kd true; add it or remove them")

    archs, paths = (args.teacher_arch or "").split(","), (args.teacher_path or "").split(",")
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
        holds = len(weights) == len(archs) and all(0 < w < float("inf") for w in weights)
        remedy = f"pass {len(archs)} number(s) above 0, separated by commas"
        _require(parser, args, "teacher_weights", holds, remedy)

    if args.teacher_cache and not args.kd:
        parser.error(f"--teacher_cache {args.teacher_cache}: needs --kd true; add it")
    if args.teacher_cache_only and not (args.teacher_cache and args.kd_alpha > 0):
        parser.error(
            "--teacher_cache_only true needs --teacher_cache FOLDER to fill, --kd true with its "
            "teacher, and --kd_alpha above 0"
        )


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with code 2 for a number outside the range of its flag."""

    def require(flag: str, holds: bool, remedy: str) -> None:
        _require(parser, args, flag, holds, remedy)

    remedy = "must lie in 0…1 (0: labels only, 1: teacher only)"
    require("kd_alpha", 0 <= args.kd_alpha <= 1, remedy)
    remedy = "must be above 0, usually 2 to 6"
    require("kd_temperature", 0 < args.kd_temperature < float("inf"), remedy)
    for (
        flag
    ) in "batch_size epochs update_freq eval_freq save_ckpt_freq save_ckpt_num recount".split():
        require(flag, getattr(args, flag) >= 1, "must be 1 or more")
    for flag in "seed start_epoch lr min_lr weight_decay opt_eps num_workers".split():
        value = getattr(args, flag)
        require(flag, value is None or value >= 0, "must not be negative")
    above_zero = "input_size train_samples holdout nb_classes clip_grad layer_decay"
    above_zero += " save_ckpt_steps teacher_views teacher_cache_topk"
    for flag in above_zero.split():
        value = getattr(args, flag)
        require(flag, value is None or value > 0, "must be above 0")
    fractions = "drop_path smoothing reprob mixup_prob mixup_switch_prob model_ema_decay hflip"
    for flag in f"{fractions} crop_pct".split():
        value = getattr(args, flag)
        require(flag, value is None or 0 <= value <= 1, "must lie in 0…1")


def check_combinations(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with code 2 for flags that contradict each other."""

    def require(flag: str, holds: bool, remedy: str) -> None:
        _require(parser, args, flag, holds, remedy)

    if args.data_set in ("IMNET", "image_folder"):
        require("data_path", bool(args.data_path), f"--data_set {args.data_set} needs a folder")
    if args.data_set == "image_folder" and not (args.disable_eval or args.holdout):
        remedy = "--data_set image_folder needs a folder of validation images, or --holdout N"
        require("eval_data_path", bool(args.eval_data_path), remedy)
    remedy = f"longer than the run of {args.epochs} epochs; shorten it or leave it out"
    require("warmup_epochs", args.warmup_epochs <= args.epochs, remedy)
    if is_mixed(args) and not args.eval:
        remedy = "mixup and cutmix need an even batch size, or pass --mixup 0 --cutmix 0"
        require("batch_size", args.batch_size % 2 == 0, remedy)
    require("resume", bool(args.resume) or not args.eval, "--eval true needs a checkpoint to score")
    if args.teacher_cache_range:
        all_views = min(args.teacher_views or args.epochs, args.epochs)
        holds = args.teacher_cache_only and bool(views_of(args))
        remedy = (
            f"needs --teacher_cache_only true and a part of 0:{all_views}, "
            f"such as 0:{max(1, all_views // 2)}"
        )
        require("teacher_cache_range", holds, remedy)


def check_names(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with code 2 for files and architectures that do not exist, before anything is read."""
    known = architectures()
    teachers = teachers_of(args)
    for flag, archs in (("model", [args.model]), ("teacher_arch", [t.arch for t in teachers])):
        for arch in archs:
            is_hub_name = ":" in arch  # hf-hub:… and local-dir:… are looked up by timm
            if known and not is_hub_name and arch.split(".")[0] not in known:
                parser.error(f"--{flag} {unknown_architecture(arch, known)}")
    files = [("teacher_path", teacher.path) for teacher in teachers]
    files += [("finetune", args.finetune), ("resume", args.resume)]
    for flag, path in files:
        if path and not is_url(path) and (problem := missing_file(path)):
            parser.error(f"--{flag} {problem}")


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
    similar = difflib.get_close_matches(arch.split(".")[0], sorted(known), n=3, cutoff=0.4)
    remedy = f"did you mean {', '.join(similar)}?" if similar else "see timm.list_models()"
    return f"{arch}: timm knows no such architecture; {remedy}"
