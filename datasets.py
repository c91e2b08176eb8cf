"""From the flags to the images and the loaders of a run."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension
from torchvision.transforms import Compose

import models
import utils
from arguments.defaults import fill_data_defaults
from arguments.derived import (
    PRETRAINED,
    SMALL,
    TORCHVISION_SETS,
    follows_network,
    is_augmented,
    is_mixed,
    must_hold_out,
    teachers_of,
    unlabeled_of,
)
from data import pictures, transforms
from data.checks import (
    check_at_most,
    check_disjoint,
    check_same_classes,
    report_class_counts,
    warn_of_validation_copies,
)
from data.loaders import DeviceLoader, Stream, TransformedImages
from data.mixup import make_mixup
from data.order import EpochBatches, EvalBatches
from data.readers import (
    digits,
    image_folder,
    images_without_label,
    labeled_images,
    open_timm,
    open_torchvision,
)
from data.sources import (
    ImageSource,
    Source,
    StreamSource,
    forget_other_labels,
    held_out_identity,
    join,
    stratified,
    subset,
)
from data.transforms import ToNetwork, collate
from models.weights import read_checkpoint
from runtime import distributed, signals
from runtime.device import has_streams, local_rank
from runtime.distributed import log
from utils import UserError, flags_for


def open_split(
    args: argparse.Namespace, is_train: bool, classes: Sequence[str] | None = None
) -> Source:
    """Open the training or the test images that --data_set and --data_path name.

    Args:
        classes: the classes in their order, for a file of labels that may name only some of them.
    """
    if args.data_set == "DIGITS":
        return digits(is_train)
    if args.data_set in TORCHVISION_SETS:
        return open_torchvision(args.data_set, args.data_path or "data_cache", is_train)
    if args.data_set == "IMNET":
        folder = os.path.join(args.data_path, "train" if is_train else "val")
        with flags_for(folder="--data_path"):
            return image_folder(folder)
    if args.data_set == "image_folder":
        flag = "data_path" if is_train or not args.eval_data_path else "eval_data_path"
        file = "labels" if is_train else "eval_labels"
        with flags_for(folder=f"--{flag}", labels=f"--{file}"):
            if getattr(args, file):
                return labeled_images(getattr(args, file), getattr(args, flag), classes)
            return image_folder(getattr(args, flag))
    return open_timm(args.data_set, args, is_train)


def has_validation(args: argparse.Namespace) -> bool:
    """Whether there are validation images, as far as can be told without opening a data set."""
    if args.data_set == "IMNET":
        return os.path.isdir(os.path.join(args.data_path, "val"))
    if args.data_set == "image_folder":
        return bool(args.eval_data_path or args.eval_labels)
    return args.data_set in ("DIGITS", *TORCHVISION_SETS)


# ----------------------------------------------------------------------------------- subsets


def _hold_out(targets: np.ndarray, count: int) -> list[np.ndarray]:
    """Positions to hold out, and all others; both ascending."""
    # Fixed seed, so that a teacher and its students hold out the same images.
    held_out = stratified(targets, count, seed=0)
    is_other = np.ones(len(targets), bool)
    is_other[held_out] = False
    return [held_out, np.flatnonzero(is_other)]


def open_validation(args: argparse.Namespace, classes: Sequence[str] | None = None) -> Source:
    """The validation images alone: the held-out training images with --holdout.

    Args:
        classes: those of the model in their order, where it knows them.
    Raises: UserError for images that are missing.
    """
    if not args.holdout:
        return open_split(args, is_train=False, classes=classes)
    args = argparse.Namespace(**{**vars(args), "train_samples": None, "unlabeled": ""})
    _, val = open_splits(args)
    assert val is not None  # with --holdout
    return val


def is_flat(args: argparse.Namespace) -> bool:
    """Whether --data_path is a folder of images without labels, which --kd_alpha 1 does not need.

    Such a folder holds images that are not in class folders.
    """
    if not teachers_of(args) or args.kd_alpha < 1 or args.data_set not in ("IMNET", "image_folder"):
        return False
    if not os.path.isdir(args.data_path):
        return False
    is_split = args.data_set == "IMNET" and os.path.isdir(os.path.join(args.data_path, "train"))
    names = (entry.name for entry in os.scandir(args.data_path) if entry.is_file())
    return not is_split and any(has_file_allowed_extension(name, IMG_EXTENSIONS) for name in names)


def _open_flat(
    args: argparse.Namespace, teacher_classes: Callable[[], list[str]]
) -> tuple[ImageSource, Source | None]:
    """Images without labels, and validation images where there are any."""
    if args.holdout:
        raise UserError(f"--holdout {args.holdout}: the images have no labels; remove the flag")
    if has_validation(args):
        val = open_split(args, is_train=False)
        return images_without_label(args.data_path, val.classes), val
    log("No validation images: neither teacher nor student is scored")
    args.disable_eval, args.teacher_eval = True, False
    return images_without_label(args.data_path, teacher_classes()), None


def open_splits(
    args: argparse.Namespace, teacher_classes: Callable[[], list[str]] | None = None
) -> tuple[Source, Source | None]:
    """The training images and, where student or teacher is evaluated, the validation images.

    Args:
        args: holdout is set to a fifth of the images where nothing says what to validate on.
        teacher_classes: returns the classes of a folder of images without labels that has no
            validation images, see `is_flat`.
    Raises: UserError for data that is missing, empty, mismatched or too small.
    """
    unlabeled = unlabeled_of(args)
    train: Source
    val: Source | None = None
    if is_flat(args) and teacher_classes is not None:
        train, val = _open_flat(args, teacher_classes)
    else:
        train = open_split(args, is_train=True)
    all_images = train
    if isinstance(train, ImageSource):
        if must_hold_out(args) and not len(train.without_label()):
            _choose_holdout(args, train)
        if args.holdout:
            check_at_most("--holdout", args.holdout, len(train) - 1)
            choose = partial(_hold_out, train.targets, args.holdout)
            held_out, others = distributed.once_per_machine(choose)
            train, val = subset(train, others), subset(train, held_out)
        if args.train_samples:
            check_at_most("--train_samples", args.train_samples, len(train))
            sample = partial(stratified, train.targets, args.train_samples, args.data_seed)
            (chosen,) = distributed.once_per_machine(lambda: [sample()])
            if unlabeled == "rest":
                train = forget_other_labels(train, chosen)
            else:
                train = subset(train, chosen)
        if unlabeled not in ("", "rest"):
            with flags_for(folder="--unlabeled"):
                train = join(train, images_without_label(unlabeled, train.classes))
        if not args.eval and distributed.is_main_process() and not len(train.without_label()):
            learns_labels = not args.teacher_cache_only and not (args.kd and args.kd_alpha == 1)
            report_class_counts(train, learns_labels and args.class_weights == "none")
    elif args.holdout or args.train_samples or unlabeled:
        raise UserError(
            "--holdout, --train_samples and --unlabeled need an indexable data set; "
            f"{args.data_set} is a stream"
        )
    for_teacher = bool(teachers_of(args)) and args.teacher_eval and has_validation(args)
    if val is None and (for_teacher or not args.disable_eval):
        val = open_split(args, is_train=False, classes=train.classes)
        check_same_classes(train.classes, val.classes)
        if args.labels or args.eval_labels:
            folder = args.eval_data_path or args.data_path
            check_disjoint(all_images, val, os.path.relpath(folder, args.data_path))
    are_to_compare = not args.eval and distributed.is_main_process()
    if are_to_compare and isinstance(train, ImageSource) and isinstance(val, ImageSource):
        warn_of_validation_copies(train, val)
    if args.nb_classes and args.nb_classes != len(train.classes):
        raise UserError(
            f"--nb_classes {args.nb_classes}: the data has {len(train.classes)} classes; "
            "leave the flag out, since classes are counted"
        )
    return train, val


def _choose_holdout(args: argparse.Namespace, train: ImageSource) -> None:
    """Set holdout to a fifth of the images. Raises: UserError for a single class."""
    if len(train.classes) < 2:
        raise UserError(
            f"--data_path {args.data_path}: has a single class ({train.classes[0]}), so nothing "
            "can be learned; pass the folder that holds one folder of images per class"
        )
    args.holdout = max(1, len(train) // 5)
    log(
        f"{args.data_path} holds no validation images; {args.holdout} of its {len(train)} images, "
        "a fifth of each class, are held out for validation, the same ones in every run "
        "(--holdout N for another number)"
    )


@dataclass
class Data:
    """The loaders of a run, and what its checkpoints record of the data."""

    train_loader: DeviceLoader
    val_loader: DeviceLoader | None  # None where neither student nor teacher is evaluated
    # All training images once, as in an evaluation: for a linear probe that keeps their features.
    feature_loader: DeviceLoader | None
    train: Source
    val: Source | None
    classes: list[str]
    config: dict[str, Any]
    images: dict[str, Any]  # what tells the training images from others; {} for a stream
    labeled_share: float = 1.0  # the part of the training images that has a label


def build_data(
    args: argparse.Namespace, device: torch.device, views: int | None = None, fill: bool = False
) -> Data:
    """Open both splits, check that they belong together, and make the loaders.

    Args:
        args: batch_size is lowered where there are fewer images.
        views: number of views of the training images; None for a new view every epoch.
        fill: let the training loader show every image that a later run may show, whatever the batch
            size and the number of processes of that run: to fill a teacher cache.
    Raises: UserError for data that is missing, empty, mismatched or too small.
    """
    train, val = open_splits(args, partial(_classes_of_teacher, args))
    images = _same_images(train, "training")
    if val is not None and distributed.world_size() > 1:
        _same_images(val, "validation")
    if val is not None and args.holdout:
        images["held_out"] = held_out_identity(val)
    _fit_batches(args, len(train))
    config = data_config(args) | {"classes": train.classes}
    to_network = ToNetwork(config, device)
    loader_keywords = _loader_keywords(args, device)
    train_loader = _train_loader(train, args, config, to_network, loader_keywords, views, fill)
    val_loader = feature_loader = None
    if val is not None:
        val_loader = build_eval_loader(args, val, config, device)
    if not is_augmented(args) and isinstance(train, ImageSource):
        feature_loader = build_eval_loader(args, train, config, device, shared=True)
    else:
        train_loader.start_workers()
    share = 1.0
    if isinstance(train, ImageSource):
        share -= len(train.without_label()) / len(train)
    loaders = train_loader, val_loader, feature_loader
    return Data(*loaders, train, val, train.classes, config, images, share)


def _classes_of_teacher(args: argparse.Namespace) -> list[str]:
    """The names of the teacher's classes, for images that have no labels."""
    if args.teacher_classes:
        with flags_for(text="--teacher_classes"):
            return utils.read_lines(args.teacher_classes)
    path = teachers_of(args)[0].path
    with flags_for(checkpoint="--teacher_path"):
        names = None if path == PRETRAINED else read_checkpoint(path).classes
    if names is None:
        raise UserError(
            f"--data_path {args.data_path}: the images have no labels, and the teacher {path} does "
            "not name its classes; name each of its outputs with --teacher_classes FILE"
        )
    return names


def _same_images(source: Source, name: str) -> dict[str, Any]:
    """What tells the images of a source from others (ImageSource.identity); {} for a stream.

    All processes compare the number of images, and one per machine also names and labels, which the
    processes of a machine share. Collective; the run ends where they differ.
    """
    values: dict[str, Any] = {"images": len(source)}
    if isinstance(source, ImageSource) and local_rank() == 0:
        values |= source.identity()
    same = distributed.require_same(values, f"{name} ")
    return same if isinstance(source, ImageSource) else {}


def _loader_keywords(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    _check_shared_memory(args)
    return {
        "num_workers": args.num_workers,
        "pin_memory": args.pin_mem and has_streams(device),
        "persistent_workers": args.num_workers > 0,
        "worker_init_fn": signals.leave_signals_to_the_trainer,
        "collate_fn": collate,
    }


def _fit_batches(args: argparse.Namespace, images: int) -> None:
    for line in fill_data_defaults(args, images):
        log(line)
    if not args.batch_size:
        raise UserError(
            f"{images} training image(s) are too few for {distributed.world_size()} process(es), "
            f"each of which needs {2 if is_mixed(args) else 1}; add images, use fewer processes, "
            "or pass --mixup 0 --cutmix 0"
        )


def build_eval_loader(
    args: argparse.Namespace,
    val: Source,
    config: dict[str, Any],
    device: torch.device,
    shared: bool | None = None,
) -> DeviceLoader:
    """Batches of the images of an evaluation, as a model of this data configuration expects them.

    Args:
        shared: whether every image comes once over all processes, or else on each process; None for
            what --dist_eval says.
    """
    batch_size = 2 * args.batch_size  # no activations are kept for a backward pass
    transform, to_network = transforms.eval_transform(config), ToNetwork(config, device)
    loader_keywords = _loader_keywords(args, device)
    if isinstance(val, StreamSource):
        val.stream.transform = Compose([pictures.decode_of_stream, transform])
        stream = Stream(val.stream, loader_keywords | {"batch_size": batch_size}, is_train=False)
        return DeviceLoader(stream, stream, to_network)
    order = EvalBatches(len(val), batch_size, args.dist_eval if shared is None else shared)
    images = TransformedImages(val, transform, seed=None)
    loader = DeviceLoader(
        order, DataLoader(images, batch_sampler=order, **loader_keywords), to_network
    )
    loader.start_workers()
    return loader


def _train_loader(
    train: Source,
    args: argparse.Namespace,
    config: dict[str, Any],
    to_network: ToNetwork,
    loader_keywords: dict[str, Any],
    views: int | None,
    fill: bool,
) -> DeviceLoader:
    if is_augmented(args):
        transform = transforms.train_transform(args, config)
    else:
        transform = transforms.eval_transform(config)
    partial_labels = isinstance(train, ImageSource) and len(train.without_label()) > 0
    mixup = make_mixup(args, len(train.classes), partial_labels)
    if isinstance(train, StreamSource):
        if views:
            raise UserError(
                f"--teacher_views {views}: needs images in a fixed order, which the stream "
                f"{args.data_set} does not have; use a folder, or leave the flag out"
            )
        train.stream.transform = Compose([pictures.decode_of_stream, transform])
        stream = Stream(
            train.stream, loader_keywords | {"batch_size": args.batch_size}, is_train=True
        )
        return DeviceLoader(stream, stream, to_network, mixup)
    count, batch_size, unit = len(train), args.batch_size, None
    if fill:
        # Cover every image that a later run may show, whatever its batch size; no activations are
        # kept for a backward pass, so twice the batch fits.
        batch_size, unit = 2 * batch_size, mixup.unit if mixup else 1
    order = EpochBatches(count, batch_size, args.data_seed, views, unit)
    images = TransformedImages(train, transform, args.data_seed)
    host_batches = DataLoader(images, batch_sampler=order, **loader_keywords)
    return DeviceLoader(order, host_batches, to_network, mixup)


def _check_shared_memory(args: argparse.Namespace) -> None:
    """Workers pass batches through /dev/shm; a small one (Docker: 64 MB) ends in 'Bus error'."""
    if not args.num_workers or not os.path.isdir("/dev/shm"):
        return
    status = os.statvfs("/dev/shm")
    free = status.f_bavail * status.f_frsize
    batch = 3 * args.input_size**2 * 2 * args.batch_size  # 8-bit pixels of an evaluation batch
    needed = 2 * args.num_workers * batch * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if needed > free:
        raise UserError(
            f"--num_workers {args.num_workers}: their batches may take {needed / 2**20:.0f} MiB of "
            f"/dev/shm, which has {free / 2**20:.0f}; pass --num_workers 0, or docker "
            "--shm-size=8g"
        )


# ------------------------------------------------------------------------ what a network sees


def data_config(args: argparse.Namespace, saved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a model trained with these arguments expects; kept in every checkpoint.

    Args:
        saved: the data configuration of a checkpoint, which holds where no flag was given.
    Returns: input_size (pixels), mean and std (of RGB in 0…1), crop_pct, crop_mode and
        interpolation.
    """
    size = args.input_size
    imagenet = args.imagenet_default_mean_and_std
    if args.crop_pct:
        crop_pct = args.crop_pct
    elif size < SMALL or size >= 384:
        crop_pct = 1.0
    else:
        crop_pct = 224 / 256
    config = {
        "input_size": size,
        "mean": list(IMAGENET_DEFAULT_MEAN if imagenet else IMAGENET_INCEPTION_MEAN),
        "std": list(IMAGENET_DEFAULT_STD if imagenet else IMAGENET_INCEPTION_STD),
        "crop_pct": crop_pct,
        # As in the ConvNeXt script: from 384 pixels up the whole image is warped, not cropped.
        "crop_mode": "squash" if size >= 384 and not args.crop_pct else "center",
        "interpolation": "bicubic",
    }
    if follows_network(args) and "imagenet_default_mean_and_std" not in args.given:
        told = models.input_config(args.model)
        config |= {name: told[name] for name in ("mean", "std") if name in told}
    if saved:
        names = {"interpolation"}
        if "imagenet_default_mean_and_std" not in args.given:
            names |= {"mean", "std"}
        if "crop_pct" not in args.given and size == saved.get("input_size"):
            names |= {"crop_pct", "crop_mode"}
        config |= {name: saved[name] for name in names if name in saved}
    return config
