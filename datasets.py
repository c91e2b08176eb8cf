"""From the flags to the images and the loaders of a run."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

import models
import utils
from arguments.defaults import fill_data_defaults
from arguments.derived import (
    FROM_FILES,
    PRETRAINED,
    SMALL,
    TORCHVISION_SETS,
    data_flag,
    follows_network,
    has_validation,
    is_augmented,
    is_mixed,
    must_hold_out,
    names_tars,
    teachers_of,
    unlabeled_of,
)
from data import checks, readers, tars, transforms
from data.loaders import DeviceLoader, Stream, TransformedImages
from data.mixup import MixingSettings, make_mixup
from data.order import EpochBatches, EvalBatches
from data.readers import images_without_label
from data.sources import (
    ImageSource,
    Joined,
    Source,
    StreamSource,
    Subset,
    forget_other_labels,
    hash_of_plain,
    held_out_identity,
    stratified,
)
from data.transforms import Augmentation, ToNetwork, collate
from models.checkpoint import read_checkpoint
from runtime import distributed, signals
from runtime.device import default_amp_dtype, has_streams, local_rank
from runtime.distributed import log
from utils import UserError, few, flags_for, is_hidden


def open_split(
    args: argparse.Namespace, is_train: bool, classes: Sequence[str] | None = None
) -> Source:
    """Open the training or the test images that --data_set and --data_path name.

    Args:
        classes: the classes in their order, for a file of labels that may name only some of them.
    """
    if args.data_set == "DIGITS":
        return readers.digits(is_train)
    if args.data_set in TORCHVISION_SETS:
        return readers.open_torchvision(args.data_set, args.data_path or "data_cache", is_train)
    if args.data_set in ("IMNET", *FROM_FILES):
        flag, path = _place(args, is_train)
        file = "labels" if is_train else "eval_labels"
        labels = getattr(args, file)
        with flags_for(folder=f"--{flag}", labels=f"--{file}"):
            if args.data_set == "tars":
                return tars.images_in_tars(path, classes, labels)
            if labels:
                return readers.labeled_images(labels, path, classes)
            return readers.image_folder(path)
    batch_size = args.batch_size or 1  # not yet chosen
    folder, seed, classes_of_stream = args.data_path, args.data_seed, args.nb_classes
    return readers.open_timm(args.data_set, folder, is_train, batch_size, seed, classes_of_stream)


def _place(args: argparse.Namespace, is_train: bool) -> tuple[str, str]:
    """The flag that names the training or the validation images, and their folder or tar files."""
    if args.eval_data_path and not is_train:
        return "eval_data_path", args.eval_data_path
    if not args.data_path:
        what = f"--data_set {args.data_set}: the training images are needed too"
        raise UserError(f"{what}; pass --data_path FOLDER")
    if args.data_set == "IMNET" and not os.path.isdir(args.data_path):
        remedy = "pass a folder that holds train/ and val/, or class folders"
        raise UserError(f"--data_path {args.data_path}: is not a folder; {remedy}")
    part = os.path.join(args.data_path, "train" if is_train else "val")
    is_split = args.data_set == "IMNET" or args.data_set == "tars" and os.path.isdir(part)
    return "data_path", part if is_split else args.data_path


def hold_out(source: ImageSource, count: int) -> tuple[Subset, Subset]:
    """The images of training, and so many that are held out of it for validation. Collective."""
    checks.check_at_most("--holdout", count, len(source) - 1)

    def choose() -> list[np.ndarray]:
        # Fixed seed, so that a teacher and its students hold out the same images.
        held_out = stratified(source.targets, count, seed=0)
        is_other = np.ones(len(source), bool)
        is_other[held_out] = False
        return [np.flatnonzero(is_other), held_out]

    others, held_out = distributed.once_per_machine(choose)
    return Subset(source, others), Subset(source, held_out)


def open_validation(
    args: argparse.Namespace, classes: Sequence[str] | None = None, holdout: int | None = None
) -> Source:
    """The validation images alone, or so many held-out training images; by default --holdout.

    Args:
        classes: those of the model in their order, if it knows them.
    """
    if not (holdout := holdout or args.holdout):
        return open_split(args, is_train=False, classes=classes)
    source = open_split(args, is_train=True)
    if not isinstance(source, ImageSource):
        raise _not_indexable(args)
    return hold_out(source, holdout)[1]


def _not_indexable(args: argparse.Namespace) -> UserError:
    return UserError(
        "--holdout, --train_samples and --unlabeled need an indexable data set; "
        f"{args.data_set} is a stream"
    )


def is_flat(args: argparse.Namespace) -> bool:
    """Whether --data_path is a folder of images without labels, which --kd_alpha 1 does not need.

    Such a folder holds images that are not in class folders. --labels also says which are used.
    """
    if not teachers_of(args) or args.kd_alpha < 1 or args.labels:
        return False
    if args.data_set == "tars":
        with flags_for(folder="--data_path"):
            return not tars.have_classes(_place(args, True)[1])
    if args.data_set not in ("IMNET", "image_folder") or not os.path.isdir(args.data_path):
        return False
    if args.data_set == "IMNET" and os.path.isdir(os.path.join(args.data_path, "train")):
        return False
    names = [name for name in os.listdir(args.data_path) if not is_hidden(name)]
    images = (name for name in names if has_file_allowed_extension(name, IMG_EXTENSIONS))
    return any(os.path.isfile(os.path.join(args.data_path, name)) for name in images)


class Splits(NamedTuple):
    """The images of a run."""

    train: Source
    val: Source | None  # None if neither student nor teacher is evaluated
    held_out: int | None  # training images in `val`; None if `val` has images of its own


def open_splits(args: argparse.Namespace, with_validation: bool = True) -> Splits:
    """The training images and, if student or teacher is evaluated, the validation images.

    Args:
        with_validation: False to leave validation images of their own closed.
    Raises: UserError for data that is missing, empty, mismatched or too small.
    """
    val: Source | None = None
    holdout = None
    if is_flat(args):
        train, val = _open_flat(args)
    else:
        train = open_split(args, is_train=True)
        if with_validation and len(train.classes) < 2:
            raise UserError(
                f"{data_flag(args)}: has a single class ({few(train.classes)}), so nothing can be "
                "learned; pass the folder that holds one folder of images per class"
            )
        holdout = _choose_holdout(args, train)
        if with_validation and not holdout:
            val = _open_validation_of(args, train)
    if isinstance(train, ImageSource):
        if holdout:
            train, val = hold_out(train, holdout)
        train = _choose_training(args, train)
    elif args.holdout or args.train_samples or unlabeled_of(args):
        raise _not_indexable(args)
    if args.nb_classes and args.nb_classes != len(train.classes):
        raise UserError(
            f"--nb_classes {args.nb_classes}: the data has {len(train.classes)} classes; "
            "leave the flag out, since classes are counted"
        )
    return Splits(train, val, holdout)


def _open_flat(args: argparse.Namespace) -> tuple[Source, Source | None]:
    """Images without labels, and validation images if there are any."""
    if args.holdout:
        raise UserError(f"--holdout {args.holdout}: the images have no labels; remove the flag")
    val = open_split(args, is_train=False) if has_validation(args) else None
    classes = val.classes if val is not None else _classes_of_teacher(args)
    with flags_for(folder="--data_path"):
        if args.data_set == "tars":
            return tars.tars_without_label(_place(args, True)[1], classes), val
        return images_without_label(args.data_path, classes), val


def _choose_holdout(args: argparse.Namespace, train: Source) -> int | None:
    """--holdout, or a fifth of the images if nothing says which images are for validation."""
    if not must_hold_out(args):
        return args.holdout
    assert isinstance(train, ImageSource)  # from a folder
    count = max(1, len(train) // 5)
    of_each = " of each class" if np.bincount(train.targets).min() >= 5 else ""
    log(
        f"{args.data_path} holds no validation images; {count} of its {len(train)} images, a fifth"
        f"{of_each}, are held out for validation, the same images in every run (--holdout N for "
        "another number)"
    )
    return count


def _open_validation_of(args: argparse.Namespace, train: Source) -> Source | None:
    """The validation images that belong to the training images, if they are to be scored."""
    for_teacher = bool(teachers_of(args)) and args.teacher_eval and has_validation(args)
    if args.disable_eval and not for_teacher:
        return None
    val = open_split(args, is_train=False, classes=train.classes)
    checks.check_same_classes(train.classes, val.classes)
    if args.labels or args.eval_labels:
        folder = args.eval_data_path or args.data_path
        checks.check_disjoint(train, val, os.path.relpath(folder, args.data_path))
    return val


def _choose_training(args: argparse.Namespace, train: ImageSource) -> ImageSource:
    """What --train_samples and --unlabeled make of the images of training. Collective."""
    unlabeled = unlabeled_of(args)
    if args.train_samples:
        checks.check_at_most("--train_samples", args.train_samples, len(train))
        sample = train.targets, args.train_samples, args.data_seed
        (chosen,) = distributed.once_per_machine(lambda: [stratified(*sample)])
        choose = forget_other_labels if unlabeled == "rest" else Subset
        train = choose(train, chosen)
    if unlabeled not in ("", "rest"):
        open_all = tars.tars_without_label if names_tars(unlabeled) else images_without_label
        with flags_for(folder="--unlabeled"):
            train = Joined(train, open_all(unlabeled, train.classes))
    return train


def _report_splits(args: argparse.Namespace, splits: Splits) -> None:
    """Print what a user should know of the images before they are trained on; on rank 0."""
    train, val, held_out = splits
    checks.warn_of_similar_classes(train.classes)
    if not isinstance(train, ImageSource) or not distributed.is_main_process():
        return
    checks.warn_of_dark_images(train)
    if not len(train.without_label()):
        learns_labels = not args.teacher_cache_only and not (args.kd and args.kd_alpha == 1)
        checks.report_class_counts(train, learns_labels and args.class_weights == "none")
    if isinstance(val, ImageSource):
        if held_out:
            checks.warn_of_missing_classes(
                val, "validation", "raise --holdout, or add images of them"
            )
        checks.warn_of_validation_copies(train, val)


def check_outputs(args: argparse.Namespace) -> None:
    """Raise UserError for an output folder among the images, which would look like a class."""
    if args.data_set not in ("IMNET", "image_folder") or args.labels:
        return
    images = [
        args.data_path,
        args.eval_data_path,
        "" if args.unlabeled == "rest" else args.unlabeled,
    ]
    roots = {os.path.realpath(path): path for path in images if path}
    for flag in ("output_dir", "teacher_cache", "log_dir"):
        path = getattr(args, flag)
        if not path or path == "none":
            continue
        real = os.path.realpath(path)
        for root, name in roots.items():
            inside = os.path.relpath(real, root).split(os.sep)
            # Beside the folders train and val there is room for other folders.
            is_beside = name == args.data_path and args.data_set == "IMNET" and not is_flat(args)
            if inside[0] != os.pardir and (not is_beside or inside[0] in (".", "train", "val")):
                raise UserError(
                    f"--{flag} {path}: lies inside the images of {name}, which it would spoil; "
                    "pass a folder outside of it"
                )


def complete(args: argparse.Namespace, device: torch.device, splits: Splits | None = None) -> None:
    """Choose what depends on the device, the network and the images; then args stays as it is.

    Only the default learning rate comes later, since it depends on the network.

    `val_images`, which is no flag, becomes the number of the validation images and a hash of what
    tells them from others: '360:0123456789abcdef'.

    Args:
        splits: the images of a training run; None for an evaluation.
    Raises: UserError for too few images.
    """
    if args.use_amp and not args.amp_dtype:
        args.amp_dtype = default_amp_dtype(device)
    if not args.teacher_dtype:  # the one to which autocast would convert the weights at each step
        has_autocast = args.use_amp and (args.teacher_device or device.type).startswith(device.type)
        args.teacher_dtype = args.amp_dtype if has_autocast else "float32"
    if splits is None:
        args.batch_size = args.batch_size or 32  # of a file that no run wrote
        return
    if follows_network(args) and not args.resume and "input_size" not in args.given:
        with flags_for(architecture="--model"):
            args.input_size = models.input_config(args.model).get("input_size", args.input_size)
    args.holdout = splits.held_out
    args.val_images = None
    if splits.val is not None:
        identity = _same_images(splits.val, "validation") or {"images": len(splits.val)}
        args.val_images = f"{len(splits.val)}:{hash_of_plain(identity)}"
    elif not args.disable_eval:
        log("No validation images: neither teacher nor student is scored")
        args.disable_eval, args.teacher_eval = True, False
    images = len(splits.train)
    for line in fill_data_defaults(args, images):
        log(line)
    if not args.batch_size:
        raise UserError(
            f"{images} training image(s) are too few for {distributed.world_size()} process(es), "
            f"each of which needs {2 if is_mixed(args) else 1}; add images, use fewer processes, "
            "or pass --mixup 0 --cutmix 0"
        )


@dataclass
class Data:
    """The loaders of a run, and what its checkpoints record of the data."""

    train_loader: DeviceLoader
    val_loader: DeviceLoader | None  # None if neither student nor teacher is evaluated
    # All training images once, as in an evaluation: for a linear probe that keeps their features.
    feature_loader: DeviceLoader | None
    train: Source
    val: Source | None
    classes: list[str]
    config: dict[str, Any]
    images: dict[str, Any]  # identifies the training images; {} for a stream
    labeled_share: float = 1.0  # the part of the training images that has a label


def build_data(args: argparse.Namespace, device: torch.device) -> Data:
    """Open both splits, check that they belong together, and make the loaders.

    With --teacher_cache_only the training loader yields every image that a later run may be
    trained on, whatever the batch size and the number of processes of that run.

    Args:
        args: what depends on the images is filled in, see `complete`.
    Raises: UserError for data that is missing, empty, mismatched or too small.
    """
    splits = open_splits(args)
    _report_splits(args, splits)
    if args.check_data:  # first, since anything else ends at the first file that is missing
        checks.check_images([splits.train, splits.val], args.num_workers)
    complete(args, device, splits)
    train, val, held_out = splits
    images = _same_images(train, "training")
    if val is not None and held_out:
        images["held_out"] = held_out_identity(val)
    config = data_config(args) | {"classes": train.classes}
    train_loader = _train_loader(args, train, config, device)
    val_loader = feature_loader = None
    if val is not None:
        val_loader = build_eval_loader(args, val, config, device)
        val_loader.is_read = args.check_data
    if args.linear_probe and not is_augmented(args) and isinstance(train, ImageSource):
        feature_loader = build_eval_loader(args, train, config, device, shared=True)
    else:
        train_loader.start_workers()
    share = 1.0
    if isinstance(train, ImageSource):
        share -= len(train.without_label()) / len(train)
    loaders = train_loader, val_loader, feature_loader
    return Data(*loaders, train, val, train.classes, config, images, share)


def teacher_classes(args: argparse.Namespace) -> list[str] | None:
    """The names in the file of --teacher_classes; None without that flag."""
    if not args.teacher_classes:
        return None
    with flags_for(text="--teacher_classes"):
        return utils.read_lines(args.teacher_classes)


def _classes_of_teacher(args: argparse.Namespace) -> list[str]:
    """The names of the teacher's classes, for images that have no labels."""
    if given := teacher_classes(args):
        return given
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
    """What identifies the images of a source (ImageSource.identity); {} for a stream.

    All processes compare the number of images, and one per machine also names and labels, which the
    processes of a machine share. Collective; the run ends if they differ.
    """
    values: dict[str, Any] = {"images": len(source)}
    if isinstance(source, ImageSource) and local_rank() == 0:
        values |= source.identity()
    same = distributed.require_same(values, f"{name} ")
    return same if isinstance(source, ImageSource) else {}


def _loader_keywords(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What both loaders give to torch's DataLoader.

    Raises: UserError if /dev/shm, through which workers pass batches, is small (64 MB in Docker):
        the run would end in a 'Bus error'.
    """
    if args.num_workers and os.path.isdir("/dev/shm"):
        status = os.statvfs("/dev/shm")
        free = status.f_bavail * status.f_frsize
        batch = 3 * args.input_size**2 * 2 * args.batch_size  # 8-bit pixels of an evaluation batch
        needed = 2 * args.num_workers * batch * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if needed > free:
            raise UserError(
                f"--num_workers {args.num_workers}: their batches may take {needed / 2**20:.0f} "
                f"MiB of /dev/shm, which has {free / 2**20:.0f}; pass --num_workers 0, or docker "
                "--shm-size=8g"
            )
    return {
        "num_workers": args.num_workers,
        "pin_memory": args.pin_mem and has_streams(device),
        "persistent_workers": args.num_workers > 0,
        "worker_init_fn": signals.start_worker,
        "collate_fn": collate,
    }


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
        stream = Stream(val.stream, transform, batch_size, loader_keywords, is_train=False)
        return DeviceLoader(stream, stream, to_network)
    order = EvalBatches(len(val), batch_size, args.dist_eval if shared is None else shared)
    images = TransformedImages(val, transform, seed=None)
    loader = DeviceLoader(
        order, DataLoader(images, batch_sampler=order, **loader_keywords), to_network
    )
    loader.start_workers()
    return loader


T = TypeVar("T")


def from_flags(kind: type[T], args: argparse.Namespace) -> T:
    """A dataclass whose fields are flags, filled from the flags."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(args, name) for name in names})


def _train_loader(
    args: argparse.Namespace, train: Source, config: dict[str, Any], device: torch.device
) -> DeviceLoader:
    if is_augmented(args):
        transform = transforms.train_transform(from_flags(Augmentation, args), config)
    else:
        transform = transforms.eval_transform(config)
    batch_size, views, seed = args.batch_size, args.teacher_views, args.data_seed
    mixup = make_mixup(
        from_flags(MixingSettings, args),
        len(train.classes),
        batch_size=batch_size,
        seed=seed,
        partial_labels=isinstance(train, ImageSource) and len(train.without_label()) > 0,
    )
    to_network, loader_keywords = ToNetwork(config, device), _loader_keywords(args, device)
    if isinstance(train, StreamSource):
        if views:
            raise UserError(
                f"--teacher_views {views}: needs images in a fixed order, which the stream "
                f"{args.data_set} does not have; use a folder, or leave the flag out"
            )
        stream = Stream(train.stream, transform, batch_size, loader_keywords, is_train=True)
        return DeviceLoader(stream, stream, to_network, mixup)
    unit = None
    if args.teacher_cache_only:
        # Cover every image that a later run may be trained on, whatever its batch size; no
        # activations are kept for a backward pass, so twice the batch fits.
        batch_size, unit = 2 * batch_size, mixup.unit if mixup else 1
    order = EpochBatches(len(train), batch_size, seed, views, unit)
    images = TransformedImages(train, transform, seed)
    host_batches = DataLoader(images, batch_sampler=order, **loader_keywords)
    return DeviceLoader(order, host_batches, to_network, mixup)


def data_config(args: argparse.Namespace, saved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a model trained with these arguments expects; kept in every checkpoint.

    Args:
        saved: the data configuration of a checkpoint, which holds if no flag was given.
    Returns: input_size (pixels), mean and std (of RGB in 0…1), crop_pct, crop_mode and
        interpolation.
    """
    size = args.input_size
    if args.crop_pct:
        crop_pct = args.crop_pct
    elif size < SMALL or size >= 384:
        crop_pct = 1.0
    else:
        crop_pct = 224 / 256
    config = {
        "input_size": size,
        **models.normalization(args.imagenet_default_mean_and_std),
        "crop_pct": crop_pct,
        # As in the ConvNeXt script: from 384 pixels up the whole image is warped, not cropped.
        "crop_mode": "squash" if size >= 384 and not args.crop_pct else "center",
        "interpolation": "bicubic",
    }
    if follows_network(args) and "imagenet_default_mean_and_std" not in args.given:
        of_network = models.input_config(args.model)
        config |= {name: of_network[name] for name in ("mean", "std") if name in of_network}
    if saved:
        names = {"interpolation"}
        if "imagenet_default_mean_and_std" not in args.given:
            names |= {"mean", "std"}
        if "crop_pct" not in args.given and size == saved.get("input_size"):
            names |= {"crop_pct", "crop_mode"}
        config |= {name: saved[name] for name in names if name in saved}
    return config
