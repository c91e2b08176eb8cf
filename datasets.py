"""Images in, batches out: data sets, transforms, samplers and loaders."""

import argparse
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from timm.data import auto_augment, create_dataset, create_transform
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchvision import transforms

import utils
from utils import UserError

DIGITS_FILE = Path(__file__).parent / "data" / "digits.npz"
TORCHVISION = {
    "CIFAR": "CIFAR100",
    "CIFAR10": "CIFAR10",
    "MNIST": "MNIST",
    "FashionMNIST": "FashionMNIST",
}
# Native sizes; every other data set is taken for photographs.
NATIVE_SIZE = {"DIGITS": 8, "MNIST": 28, "FashionMNIST": 28, "CIFAR": 32, "CIFAR10": 32}
MIRRORED_CHANGES_MEANING = {"DIGITS", "MNIST"}
SMALL = 64  # below this many pixels: pad and crop as for CIFAR, not the random resized crop


# ------------------------------------------------------------------------------------ sources


class ImageSource(Dataset):
    """Images that can be asked for by index, as RGB PIL images without any transform.

    Args:
        load: index -> PIL image; a module-level function or a partial of one, so that it pickles.
        targets: (N,) class indices.
        classes: class names, in the order of the indices.
    """

    def __init__(
        self, load: Callable[[int], Image.Image], targets: Sequence[int], classes: Sequence[str]
    ) -> None:
        self.load = load
        # An array, not a list: forked workers would copy a list page by page as they count
        # references to its items, and memory would grow with every worker.
        self.targets = np.asarray(targets, dtype=np.int64)
        self.classes = [str(name) for name in classes]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.load(index), int(self.targets[index])


def _image_of_array(images: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(images[index]).convert("RGB")


def _image_of_path(paths: np.ndarray, index: int) -> Image.Image:
    return _open(path := os.fsdecode(paths[index]), path)


def _image_of_reader(reader: Any, index: int) -> Image.Image:
    # timm's ImageDataset replaces an image that it can't read by the next one; here it is an error.
    return _open(reader[index][0], reader.filename(index) if hasattr(reader, "filename") else index)


def _open(file: Any, name: Any) -> Image.Image:
    try:
        image = file if isinstance(file, Image.Image) else Image.open(file)
        if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
            grey = np.asarray(image, dtype=np.float32) * (255 / 65535)
            image = Image.fromarray(np.round(grey.clip(0, 255)).astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        raise UserError(
            f"--data_path: can't read the image {name} ({error}); repair it or take it out"
        ) from error


def _digits(is_train: bool) -> ImageSource:
    with np.load(DIGITS_FILE, allow_pickle=False) as file:
        chosen = file["is_test"] != is_train
        grey = np.round(file["images"][chosen] * (255 / 16)).astype(np.uint8)
        return ImageSource(
            partial(_image_of_array, grey), file["labels"][chosen], [str(d) for d in range(10)]
        )


def _torchvision(name: str, folder: str, is_train: bool) -> ImageSource:
    data_set = getattr(torchvision.datasets, TORCHVISION[name])
    try:
        # One process of each machine downloads, the others wait and find the files.
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            data_set(folder, train=is_train, download=True)
        if utils.world_size() > 1:
            torch.distributed.barrier()
        data = data_set(folder, train=is_train)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--data_set {name}: not in --data_path {folder}, and the download failed "
            f"({str(error).splitlines()[0]}); put torchvision's {TORCHVISION[name]} files there"
        ) from error
    return ImageSource(partial(_image_of_array, np.asarray(data.data)), data.targets, data.classes)


def _folder(folder: str, flag: str) -> ImageSource:
    if not os.path.isdir(folder):
        raise UserError(
            f"{flag}: {folder} is not a folder; it must hold a folder of images for each class"
        )
    try:
        found = torchvision.datasets.ImageFolder(folder)
    except FileNotFoundError as error:
        raise UserError(
            f"{flag}: {folder} holds no images, or a class folder in it is empty "
            f"({str(error).splitlines()[0]}); it must hold one folder of images a class"
        ) from error
    paths = np.array([os.fsencode(path) for path, _ in found.samples])  # bytes: see ImageSource
    return ImageSource(partial(_image_of_path, paths), found.targets, found.classes)


def _timm(name: str, args: argparse.Namespace, is_train: bool) -> Dataset:
    """Any data set of timm's `create_dataset`: a folder or tar, hfds/…, hfids/…, tfds/…, wds/…"""
    if name.lower().startswith(("hfds/", "hfids/")):
        _let_timm_import_hugging_face_datasets()
    try:
        data = create_dataset(
            name,
            root=args.data_path,
            split="train" if is_train else "validation",
            is_training=is_train,
            batch_size=args.batch_size,
            seed=args.seed,
        )
    except Exception as error:  # each reader has its own optional package and its own errors
        raise UserError(
            f"--data_set {name}: timm could not open it ({type(error).__name__}: {error}); "
            f"it knows DIGITS, IMNET, image_folder, {', '.join(TORCHVISION)} and timm's readers "
            "hfds/…, hfids/…, tfds/…, wds/… (each with its own package installed)"
        ) from error
    if isinstance(data, IterableDataset):
        if not args.nb_classes:
            raise UserError(
                f"--data_set {name} is a stream, which can't be counted; give --nb_classes"
            )
        data.classes = [str(label) for label in range(args.nb_classes)]
        return data
    reader = data.reader
    if hasattr(reader, "samples"):
        targets = [target for _, target in reader.samples]
    else:  # a table of Hugging Face datasets
        targets = reader.dataset[reader.label_key]
    if class_to_idx := getattr(reader, "class_to_idx", None):
        classes = sorted(class_to_idx, key=class_to_idx.get)
    else:
        classes = [str(label) for label in range(max(targets) + 1)]
    return ImageSource(partial(_image_of_reader, reader), targets, classes)


def _let_timm_import_hugging_face_datasets() -> None:
    """timm's hfds reader says `import datasets` and means Hugging Face's package of that name.

    So that package takes the name in sys.modules over; who imported this file keeps it.
    """
    ours = sys.modules["datasets"]
    if not hasattr(ours, "open_split"):
        return  # it already has
    here, path = Path(__file__).resolve().parent, sys.path[:]
    sys.path[:] = [folder for folder in path if Path(folder).resolve() != here]
    del sys.modules["datasets"]
    try:
        importlib.import_module("datasets")
    except ImportError as error:
        sys.modules["datasets"] = ours
        raise UserError(
            "--data_set hfds/… needs Hugging Face's package: pip install datasets"
        ) from error
    finally:
        sys.path[:] = path


def open_split(args: argparse.Namespace, is_train: bool) -> Dataset:
    """Open the training or the test images that --data_set and --data_path name."""
    if args.data_set == "DIGITS":
        return _digits(is_train)
    if args.data_set in TORCHVISION:
        return _torchvision(args.data_set, args.data_path or "data_cache", is_train)
    if args.data_set == "IMNET":
        return _folder(os.path.join(args.data_path, "train" if is_train else "val"), "--data_path")
    if args.data_set == "image_folder":
        if is_train:
            return _folder(args.data_path, "--data_path")
        return _folder(args.eval_data_path, "--eval_data_path")
    return _timm(args.data_set, args, is_train)


# ----------------------------------------------------------------------------------- subsets


def stratified(targets: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose `count` positions at random with every class in its proportion.

    Returns: (count,) positions, ascending.
    """
    rng = np.random.default_rng([seed, count])
    shuffled = rng.permutation(len(targets))
    by_class = shuffled[np.argsort(targets[shuffled], kind="stable")]
    # Every class lies in one run, so evenly spaced picks take each class in proportion.
    picks = (np.arange(count) + rng.random()) * len(targets) / count
    return np.sort(by_class[picks.astype(np.int64)])


def subset(source: ImageSource, positions: np.ndarray) -> ImageSource:
    """Some images of a source; of a subset too."""
    load = partial(_image_of_subset, source, positions)
    return ImageSource(load, source.targets[positions], source.classes)


def _image_of_subset(source: ImageSource, positions: np.ndarray, index: int) -> Image.Image:
    return source.load(positions[index])


# --------------------------------------------------------------------------------- transforms


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    # At full strength timm asks for 0 bits, which Pillow 13 refuses: one such image in some 600
    # would end an epoch of 'rand-m9-mstd0.5-inc1'. One bit is the strongest that exists.
    return auto_augment.posterize(image, max(1, bits_to_keep), **kwargs)


auto_augment.NAME_TO_OP.update(
    {name: _posterize for name in auto_augment.NAME_TO_OP if name.startswith("Posterize")}
)


def data_config(args: argparse.Namespace) -> dict[str, Any]:
    """What a model trained with these arguments must be shown; kept in every checkpoint.

    Returns: input_size (pixels), mean and std (of RGB in 0…1), crop_pct and crop_mode.
    """
    size = args.input_size
    imagenet = args.imagenet_default_mean_and_std
    if args.crop_pct:
        crop_pct = args.crop_pct
    elif size < SMALL or size >= 384:
        crop_pct = 1.0
    else:
        crop_pct = 224 / 256
    return {
        "input_size": size,
        "mean": list(IMAGENET_DEFAULT_MEAN if imagenet else IMAGENET_INCEPTION_MEAN),
        "std": list(IMAGENET_DEFAULT_STD if imagenet else IMAGENET_INCEPTION_STD),
        "crop_pct": crop_pct,
        # As in the ConvNeXt script: from 384 pixels up the whole image is warped, not cropped.
        "crop_mode": "squash" if size >= 384 and not args.crop_pct else "center",
    }


def train_transform(args: argparse.Namespace, config: dict[str, Any]) -> Callable:
    """timm's training transform; PIL image -> (3, input_size, input_size) float32, normalised."""
    size = config["input_size"]
    transform = create_transform(
        size,
        is_training=True,
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa or None,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        mean=config["mean"],
        std=config["std"],
    )
    if size < SMALL:
        # A crop of 8 % of a tiny image says nothing; CIFAR's pad-by-an-eighth and crop does.
        transform.transforms[0] = transforms.Compose(
            [
                transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
                transforms.RandomCrop(size, padding=size // 8, pad_if_needed=True),
            ]
        )
    return transform


def eval_transform(config: dict[str, Any]) -> Callable:
    """timm's evaluation transform; PIL image -> (3, input_size, input_size) float32, normalised."""
    return create_transform(
        config["input_size"],
        is_training=False,
        interpolation="bicubic",
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )


class TransformedImages(Dataset):
    """Images after their transform, whose randomness is a function of (seed, view, index) alone.

    So neither the number of workers nor what was loaded before changes an image. The key of an item
    is the pair (view, index); the view is the epoch.
    """

    def __init__(self, source: ImageSource, transform: Callable, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        view, index = key
        utils.seed_rng(torch.device("cpu"), self.seed, view, index)
        image, target = self.source[index]
        return self.transform(image), target


# -------------------------------------------------------------------------- samplers, loaders


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """One rank's share of an epoch's shuffled batches, as lists of (view, index).

    Batch b of rank r is block b * world + r of the epoch's permutation, so the images of an
    optimizer step are the same for any split of one global batch over processes and accumulation.
    The last incomplete global batch is left out, as in the family's scripts; each epoch others.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world = utils.rank(), utils.world_size()
        self.epoch, self.first_batch = 0, 0
        self.batches_in_epoch = count // (batch_size * self.world)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch to begin with where a part of it is done."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        return self.batches_in_epoch - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count).tolist()
        for batch in range(self.first_batch, self.batches_in_epoch):
            start = (batch * self.world + self.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[start : start + self.batch_size]]


def _eval_batches(count: int, batch_size: int, shared: bool) -> list[list[tuple[int, int]]]:
    """This rank's batches of an evaluation; over all ranks every image once, without padding."""
    first, step = (utils.rank(), utils.world_size()) if shared else (0, 1)
    mine = [(0, index) for index in range(first, count, step)]
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


class StreamLoader:
    """A loader over one of timm's streams (wds/…, tfds/…, hfids/…), which shuffle and share out
    themselves. Their order, and so the result, depends on the number of workers."""

    def __init__(self, stream: IterableDataset, settings: dict[str, Any], is_train: bool) -> None:
        stream.set_loader_cfg(num_workers=settings["num_workers"])
        self.stream, self.is_train = stream, is_train
        self.loader = DataLoader(stream, drop_last=is_train, **settings)
        self.batches_in_epoch = len(self.loader)
        self.first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch; a stream has to be read up to the batch to begin with."""
        self.stream.set_epoch(epoch)
        self.first_batch = first_batch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        # A shard may hold more than the stream's length says; the schedule has no steps for that.
        stop = self.batches_in_epoch if self.is_train else None
        return itertools.islice(self.loader, self.first_batch, stop)


@dataclass
class Data:
    """The loaders of a run and what its checkpoints remember of the data."""

    train_loader: Any
    val_loader: Any  # None where nothing is evaluated
    train_count: int
    classes: list[str]
    config: dict[str, Any]


def build_data(args: argparse.Namespace, device: torch.device) -> Data:
    """Open both splits, check that they belong together, and make the loaders.

    Raises: UserError for what is missing, empty, mismatched or too small.
    """
    train = open_split(args, is_train=True)
    val = None
    if isinstance(train, ImageSource):
        if args.holdout:
            _check_at_most("--holdout", args.holdout, len(train) - 1)
            # Of no seed: a teacher and its students must hold out the same images.
            held_out = stratified(train.targets, args.holdout, seed=0)
            val = subset(train, held_out)
            train = subset(train, np.setdiff1d(np.arange(len(train)), held_out))
        if args.train_samples:
            _check_at_most("--train_samples", args.train_samples, len(train))
            train = subset(train, stratified(train.targets, args.train_samples, args.seed))
    elif args.holdout or args.train_samples:
        raise UserError(f"--holdout and --train_samples can't divide the stream {args.data_set}")
    if val is None and (args.eval or not args.disable_eval):
        val = open_split(args, is_train=False)
        _check_same_classes(train.classes, val.classes)
    if args.nb_classes and args.nb_classes != len(train.classes):
        raise UserError(
            f"--nb_classes {args.nb_classes}: the data has {len(train.classes)} classes; "
            "leave the flag out, they are counted"
        )

    config = data_config(args) | {"classes": train.classes}
    settings = {
        "num_workers": args.num_workers,
        "pin_memory": args.pin_mem and device.type == "cuda",
        "persistent_workers": args.num_workers > 0,
        "worker_init_fn": utils.leave_signals_to_the_trainer,
    }
    _check_shared_memory(args, settings["num_workers"])
    train_loader = _train_loader(train, train_transform(args, config), args, settings)
    val_loader = None
    if val is not None:
        transform = eval_transform(config)
        batch_size = 2 * args.batch_size  # nothing is kept for a backward pass
        if isinstance(val, IterableDataset):
            val.transform = transform
            val_loader = StreamLoader(val, settings | {"batch_size": batch_size}, is_train=False)
        else:
            val_loader = DataLoader(
                TransformedImages(val, transform, args.seed),
                batch_sampler=_eval_batches(len(val), batch_size, args.dist_eval),
                **settings,
            )
    return Data(train_loader, val_loader, len(train), train.classes, config)


def _train_loader(
    train: Dataset, transform: Callable, args: argparse.Namespace, settings: dict[str, Any]
) -> Any:
    if isinstance(train, IterableDataset):
        train.transform = transform
        return StreamLoader(train, settings | {"batch_size": args.batch_size}, is_train=True)
    global_batch = args.batch_size * utils.world_size()
    if global_batch > len(train) and not args.eval:
        raise UserError(
            f"--batch_size {args.batch_size} on {utils.world_size()} process(es) is more than the "
            f"{len(train)} training images; give at most {len(train) // utils.world_size()}"
        )
    batches = EpochBatches(len(train), args.batch_size, args.seed)
    loader = DataLoader(
        TransformedImages(train, transform, args.seed), batch_sampler=batches, **settings
    )
    loader.set_epoch, loader.batches_in_epoch = batches.set_epoch, batches.batches_in_epoch
    return loader


def _check_at_most(flag: str, value: int, most: int) -> None:
    if value > most:
        raise UserError(f"{flag} {value}: only {most} training images can be given; lower it")


def _check_same_classes(train: list[str], val: list[str]) -> None:
    if train == val:
        return
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    raise UserError(
        "--data_path: training and validation data have different classes "
        f"(only in training: {', '.join(only_train[:3]) or 'none'}; "
        f"only in validation: {', '.join(only_val[:3]) or 'none'}); give both the same folders"
    )


def _check_shared_memory(args: argparse.Namespace, workers: int) -> None:
    """Workers hand batches over in /dev/shm; a small one (Docker: 64 MB) ends in 'Bus error'."""
    if not workers or not os.path.isdir("/dev/shm"):
        return
    status = os.statvfs("/dev/shm")
    free = status.f_bavail * status.f_frsize
    batch = 3 * args.input_size**2 * 4 * 2 * args.batch_size
    needed = 2 * workers * batch * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if needed > free:
        raise UserError(
            f"--num_workers {workers}: their batches may take {needed / 2**20:.0f} MiB of "
            f"/dev/shm, which has {free / 2**20:.0f}; give --num_workers 0, or docker --shm-size=8g"
        )
