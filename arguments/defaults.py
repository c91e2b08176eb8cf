"""Defaults that follow from other flags, from this machine's cores, and from the images."""

import argparse
import os

from arguments.derived import SMALL, holds_class_folders, is_mixed, names_tars

# Side of the images in pixels; every other data set is taken for photographs.
NATIVE_SIZE = {"DIGITS": 8, "MNIST": 28, "FashionMNIST": 28, "CIFAR": 32, "CIFAR10": 32}
MIRRORED_CHANGES_MEANING = {"DIGITS", "MNIST"}


def fill_defaults(args: argparse.Namespace) -> None:
    """Choose what was not given from the other flags and from this machine's cores.

    What depends on the number of training images is left to `fill_data_defaults`.
    """
    is_labeled = bool(args.labels or args.eval_labels)
    if names_tars(args.data_path):
        args.data_set = args.data_set or "tars"
    args.data_set = args.data_set or ("IMNET" if args.data_path or is_labeled else "DIGITS")
    if args.data_set == "IMNET" and (is_labeled or holds_class_folders(args.data_path)):
        args.data_set = "image_folder"
    native_size = NATIVE_SIZE.get(args.data_set, 224)
    if args.model is None:
        is_small = (args.input_size or native_size) < SMALL
        args.model = "cifar_resnet20" if is_small else "convnext_tiny"
    if args.input_size is None:
        args.input_size = native_size if args.model.startswith(("cifar_", "mnist_")) else 224
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


def fill_data_defaults(args: argparse.Namespace, images: int) -> list[str]:
    """Choose what depends on the number of training images, known once the data is open.

    That is the batch size, if it is not given or too large, and the number of loader workers.

    Returns: lines for the user: a value that is not used as given, images that are left out.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    lines = []
    most = _batch_size(args, images // processes)
    typed = f"--batch_size {args.batch_size}" if args.batch_size else ""
    if args.batch_size is None:
        args.batch_size = min(most, default_batch_size(images // processes // args.update_freq))
    elif args.batch_size > most:
        args.batch_size = most
        if most:  # else the run cannot start
            lines.append(
                f"{typed} on {processes} process(es) is more than the {images} training images: "
                f"batches of {most} are used"
            )
    total = args.batch_size * processes
    if not total:
        return lines
    if "num_workers" not in args.given:
        args.num_workers = min(args.num_workers, max(1, images // total))
    left_out = images % total
    if left_out and args.teacher_views == 1:
        lines.append(
            f"Warning: --teacher_views 1: {left_out} of {images} images do not fill a batch and "
            "are never trained on; pass --teacher_views 2 or more, which use every image"
        )
    elif left_out > 0.1 * images:
        batches = f"--batch_size {args.batch_size}" if typed else f"Batches of {args.batch_size}"
        line = f"{batches}: {left_out} of {images} images do not fill a batch and are left out of "
        line += "each epoch, different images in the next"
        if smaller := _better_batch_size(args, images, processes):
            line += f"; --batch_size {smaller} leaves out {images % (smaller * processes)}"
        lines.append(line)
    return lines


def _better_batch_size(args: argparse.Namespace, images: int, processes: int) -> int:
    """The largest batch size below --batch_size that leaves out fewer images; 0 for none."""
    total = args.batch_size * processes
    for batches in range(images // total + 1, images // processes + 1):
        size = _batch_size(args, images // batches // processes)
        if size and images % (size * processes) < images % total:
            return size
    return 0


def default_batch_size(images: int) -> int:
    """The largest power of two from 8 to 64 with which the images make 50 batches; else 8."""
    return next((size for size in (64, 32, 16) if images >= 50 * size), 8)


def is_sgd(opt: str) -> bool:
    """Whether an optimizer of timm's is a form of SGD, by its name."""
    return "sgd" in opt or opt.endswith("momentum")


def _batch_size(args: argparse.Namespace, images: int) -> int:
    """The largest batch size up to a number of images; even if images are mixed."""
    return images - images % 2 if is_mixed(args) else images


def usable_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores_per_process() -> float:
    """Processor cores of this machine for each process of the run."""
    return usable_cores() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
