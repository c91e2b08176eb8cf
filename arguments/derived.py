"""What follows from the flags: the teachers, the views, whether images are mixed or held out."""

import argparse
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from utils import is_hidden

SMALL = 64  # below this side, images are padded and cropped as for CIFAR, at one scale
TORCHVISION_SETS = ("CIFAR", "CIFAR10", "MNIST", "FashionMNIST")
FROM_FILES = ("image_folder", "tars")  # images wherever they lie: labels and splits have flags
DATA_SETS = ("DIGITS", "IMNET", *FROM_FILES, *TORCHVISION_SETS)
# What folders of training and of validation images are called, in lower case. A folder that holds
# one of them is not taken for a folder of class folders.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev", "eval", "test", "testing"),
}


PRETRAINED = "pretrained"  # in --teacher_path: timm's own weights of the architecture


class Teacher(NamedTuple):
    """One teacher of the command line."""

    arch: str
    path: str
    weight: float


def teachers_of(args: argparse.Namespace) -> list[Teacher]:
    """The teachers that a run asks; none without --kd true or with --kd_alpha 0.

    Raises: ValueError if the numbers of architectures, files and weights differ.
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
    """Names of the visible folders in a folder, sorted; none if it cannot be listed."""
    try:
        with os.scandir(path or "") as entries:
            return sorted(e.name for e in entries if e.is_dir() and not is_hidden(e.name))
    except OSError:
        return []


def is_split_name(name: str) -> bool:
    """Whether this is what a folder of training or validation images is usually called."""
    return any(name.lower() in names for names in SPLIT_NAMES.values())


def name_both_splits(names: Iterable[str]) -> bool:
    """Whether some of these names say training, and others validation."""
    words = {name.lower() for name in names}
    return not any(words.isdisjoint(of_split) for of_split in SPLIT_NAMES.values())


def holds_class_folders(path: str | None) -> bool:
    """Whether a folder holds other folders, and none with the name of a split such as train."""
    names = folders_in(path)
    return bool(names) and not any(map(is_split_name, names))


def names_tars(path: str | None) -> bool:
    """Whether this is a path, glob or list of tar files, compressed ones included."""
    return bool(re.search(r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))$", path or ""))


def has_validation(args: argparse.Namespace) -> bool:
    """Whether there are validation images, as far as this is known without opening a data set."""
    if args.data_set in FROM_FILES and (args.eval_data_path or args.eval_labels):
        return True
    if args.data_set in ("IMNET", "tars"):
        return bool(args.data_path) and os.path.isdir(os.path.join(args.data_path, "val"))
    return args.data_set in ("DIGITS", *TORCHVISION_SETS)


def must_hold_out(args: argparse.Namespace) -> bool:
    """Whether a run evaluates, but nothing says which images of a folder are for that.

    A fifth of the images is then held out, as by --holdout.
    """
    is_evaluated = args.eval or not args.disable_eval
    is_told = args.holdout or has_validation(args)
    return args.data_set in FROM_FILES and is_evaluated and not is_told


def is_own_module(arch: str) -> bool:
    """Whether a network is made by a function of the user's own, named MODULE:FACTORY."""
    return ":" in arch and arch.partition(":")[0] not in ("hf-hub", "hf_hub", "local-dir")


def follows_network(args: argparse.Namespace) -> bool:
    """Whether the student says its input size and normalization, if no flag does."""
    return args.pretrained or is_own_module(args.model)


def data_flag(args: argparse.Namespace) -> str:
    """The flag that names the data, with its value."""
    return f"--data_path {args.data_path}" if args.data_path else f"--data_set {args.data_set}"


def unlabeled_of(args: argparse.Namespace) -> str:
    """The source of unlabeled images: a folder or 'rest'; '' if no teacher is asked."""
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
    """Whether training images are changed. Without --no_aug, only a linear probe leaves them."""
    return not (args.no_aug or args.linear_probe) or any(
        getattr(args, flag) != value for flag, value in NO_AUGMENTATION.items()
    )


def is_mixed(args: argparse.Namespace) -> bool:
    """Whether images are mixed by mixup or cutmix."""
    return args.mixup > 0 or args.cutmix > 0 or bool(args.cutmix_minmax)


def views_of(args: argparse.Namespace) -> range:
    """The views that a run shows, or those of --teacher_cache_range.

    Returns: an empty range if --teacher_cache_range is not within the views of the run.
    """
    count = min(args.teacher_views or args.epochs, args.epochs)
    first, _, last = (args.teacher_cache_range or f"0:{count}").partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(last) <= count):
        return range(0)
    return range(int(first), int(last))
