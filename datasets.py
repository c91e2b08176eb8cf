"""Images in, batches out: data sets, transforms, samplers and loaders."""

import argparse
import hashlib
import importlib
import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from timm.data import Mixup, auto_augment, create_dataset, create_transform
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.data.mixup import one_hot
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate
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
        names: (N,) what tells the images apart, such as their paths; None where nothing does.
    """

    def __init__(
        self,
        load: Callable[[int], Image.Image],
        targets: Sequence[int],
        classes: Sequence[str],
        names: np.ndarray | None = None,
    ) -> None:
        self.load, self.names = load, names
        # An array, not a list: forked workers would copy a list page by page as they count
        # references to its items, and memory would grow with every worker.
        self.targets = np.asarray(targets, dtype=np.int64)
        self.classes = [str(name) for name in classes]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.load(index), int(self.targets[index])

    def fingerprint(self) -> dict[str, Any]:
        """What tells two sources apart without reading their images."""
        names = np.arange(len(self)) if self.names is None else self.names
        if names.dtype.kind == "S":  # paths: the same ones may lie in another folder
            outside = len(os.path.commonprefix([names[0], names[-1]]))
            names = names.view("S1").reshape(len(names), -1)[:, outside:]
        return {"images": len(self), "classes": len(self.classes)} | {
            key: hashlib.sha256(content).hexdigest()[:16]
            for key, content in (
                ("class_names", "\0".join(self.classes).encode()),
                ("labels", self.targets.tobytes()),
                ("image_names", names.tobytes()),
            )
        }


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
        utils.barrier()
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
    return ImageSource(partial(_image_of_path, paths), found.targets, found.classes, paths)


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
    names = positions if source.names is None else source.names[positions]
    return ImageSource(load, source.targets[positions], source.classes, names)


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


class FastResizedCrop(RandomResizedCropAndInterpolation):
    """timm's random crop with the same draws, resized by torch: a third of Pillow's time.

    The pixels differ from Pillow's by rounding, at most 2 of 255.
    """

    def __call__(self, image: Image.Image) -> Image.Image:
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        mode = self.interpolation
        mode = random.choice(mode) if isinstance(mode, (tuple, list)) else mode
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, H, W) uint8
        pixels = pixels[:, :, top : top + height, left : left + width]
        resized = F.interpolate(pixels, self.size, mode=mode.value, antialias=True)[0]
        return Image.fromarray(resized.permute(1, 2, 0).contiguous().numpy())


class Patches(list):
    """Stands in for an image: keeps what timm's RandomErasing would write into it.

    Items are (top, left, height, width, pixels); pixels (3, height, width) or (3, 1, 1) float32.
    """

    def __setitem__(self, where: tuple[slice, slice, slice], pixels: torch.Tensor) -> None:
        _, rows, columns = where
        height, width = rows.stop - rows.start, columns.stop - columns.start
        self.append((rows.start, columns.start, height, width, pixels))


class ToPixels:
    """PIL image -> ((size, size, 3) uint8 array, Patches to put in once it is normalised).

    A quarter of float32's bytes go through the loader, and the device normalises.

    Args:
        steps: transforms of timm's that end in a PIL image.
        erasing: timm's RandomErasing, or None.
    """

    def __init__(self, steps: Sequence[Callable], erasing: RandomErasing | None = None) -> None:
        self.steps, self.erasing = transforms.Compose(steps), erasing

    def __call__(self, image: Image.Image) -> tuple[np.ndarray, Patches]:
        pixels = np.array(self.steps(image))
        patches = Patches()
        if self.erasing is not None:
            self.erasing._erase(patches, 3, *pixels.shape[:2], torch.float32)
        return pixels, patches


def train_transform(args: argparse.Namespace, config: dict[str, Any]) -> ToPixels:
    """timm's training transform up to 8-bit pixels, and its random erasing."""
    size = config["input_size"]
    steps = create_transform(
        size,
        is_training=True,
        use_prefetcher=True,  # leaves normalisation and erasing to us
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa or None,
        interpolation=args.train_interpolation,
        mean=config["mean"],  # fills what a rotation uncovers
        std=config["std"],
    ).transforms[:-1]
    if size < SMALL:
        # A crop of 8 % of a tiny image says nothing; CIFAR's pad-by-an-eighth and crop does.
        resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
        pad_and_crop = transforms.RandomCrop(size, padding=size // 8, pad_if_needed=True)
        steps[:1] = [resize, pad_and_crop]
    else:
        steps[0] = FastResizedCrop(size, interpolation=args.train_interpolation)
    if not args.reprob:
        return ToPixels(steps)
    erasing = {"mode": args.remode, "max_count": args.recount, "device": "cpu"}
    return ToPixels(steps, RandomErasing(args.reprob, **erasing))


def eval_transform(config: dict[str, Any]) -> ToPixels:
    """timm's evaluation transform up to 8-bit pixels."""
    return ToPixels(
        create_transform(
            config["input_size"],
            is_training=False,
            use_prefetcher=True,
            interpolation="bicubic",
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
        ).transforms[:-1]
    )


class TransformedImages(Dataset):
    """Images after their transform, whose randomness is a function of (seed, view, index) alone.

    So neither the number of workers nor what was loaded before changes an image. The key of an item
    is the pair (view, index).
    """

    def __init__(self, source: ImageSource, transform: ToPixels, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple[np.ndarray, Patches], int]:
        view, index = key
        utils.seed_rng(torch.device("cpu"), self.seed, view, index)
        image, target = self.source[index]
        return self.transform(image), target


# ----------------------------------------------------------------------------- mixup, cutmix


class BlockMixup:
    """timm's mixup, drawn for each block of `batch_size` images from (seed, view, block) alone.

    An image is mixed with another of its block, so this depends on the batch size.
    """

    def __init__(self, mixup: Mixup, batch_size: int, seed: int) -> None:
        self.mixup, self.unit, self.seed = mixup, batch_size, seed

    def __call__(
        self, images: torch.Tensor, targets: torch.Tensor, view: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W), (B,) -> (B, 3, H, W), (B, C); `start`: the first one's place in the view"""
        mixed = []
        for first in range(0, len(images), self.unit):
            utils.seed_rng(torch.device("cpu"), self.seed, view, (start + first) // self.unit)
            block = slice(first, first + self.unit)
            mixed.append(self.mixup(images[block], targets[block])[1])  # images in place
        return images, torch.cat(mixed)


class PairMixup:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of neighbours in the view's order.

    Places 2p and 2p + 1 are partners, with a lambda and a box of their own that depend on (seed,
    view, p) alone: not on the batch size, nor on the number of processes. The distributions are
    timm's.
    """

    unit = 2

    def __init__(self, args: argparse.Namespace, num_classes: int, images: int) -> None:
        self.args, self.num_classes, self.pairs = args, num_classes, images // 2
        self.view = None

    def _draw(self, view: int) -> None:
        args, size = self.args, self.pairs
        rng = np.random.default_rng([args.seed, view, 1])  # 1: not the shuffle's stream
        cutmix = 1.0 if args.cutmix_minmax else args.cutmix
        self.is_cut = rng.random(size) < (args.mixup_switch_prob if args.mixup else 1.0)
        self.is_cut &= cutmix > 0
        lam_mix, lam_cut = (
            rng.beta(a, a, size) if a else np.ones(size) for a in (args.mixup, cutmix)
        )
        self.lam = np.where(self.is_cut, lam_cut, lam_mix)
        self.is_mixed = rng.random(size) < args.mixup_prob
        self.place = rng.random((4, size))  # of the box
        self.view = view

    def _boxes(self, pairs: slice, sides: tuple[int, int]) -> Iterator[tuple[np.ndarray, ...]]:
        """First and last + 1 row, then column, of each pair's box; (P,) int64 each."""
        for axis, side in enumerate(sides):
            u, v = self.place[2 * axis : 2 * axis + 2, pairs]
            if self.args.cutmix_minmax:
                least, most = (int(side * part) for part in self.args.cutmix_minmax)
                length = least + (u * max(1, most - least)).astype(np.int64)
                first = (v * (side - length)).astype(np.int64)
                last = first + length
            else:
                half = (side * np.sqrt(1 - self.lam[pairs])).astype(np.int64) // 2
                middle = (u * side).astype(np.int64)
                first, last = (middle - half).clip(0, side), (middle + half).clip(0, side)
            is_cut, is_mixed = self.is_cut[pairs], self.is_mixed[pairs]
            yield np.where(is_cut, first, 0) * is_mixed, np.where(is_cut, last, side) * is_mixed

    def __call__(
        self, images: torch.Tensor, targets: torch.Tensor, view: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W), (B,) -> (B, 3, H, W), (B, C); `start`: the first one's place in the view"""
        if view != self.view:
            self._draw(view)
        pairs = slice(start // 2, (start + len(images)) // 2)
        height, width = images.shape[2:]
        (top, bottom), (left, right) = self._boxes(pairs, (height, width))
        # Inside its box an image keeps this much of itself: lambda, or nothing where it is cut.
        kept = np.where(self.is_cut[pairs], 0.0, self.lam[pairs])
        lam = 1 - (1 - kept) * (bottom - top) * (right - left) / (height * width)
        numbers = torch.from_numpy(np.stack([top, bottom, left, right, kept, lam]))  # (6, P)
        numbers = numbers.to(images.device, torch.float32, non_blocking=True)
        top, bottom, left, right, kept, lam = numbers[:, :, None].unbind()  # (P, 1) each
        y, x = (torch.arange(side, device=images.device) for side in (height, width))
        rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)  # (P, H), (P, W)
        box = (rows[:, :, None] & columns[:, None]).float()  # (P, H, W)
        weight = (1 - box * (1 - kept[:, :, None]))[:, None, None]  # (P, 1, 1, H, W)

        couples = images.unflatten(0, (-1, 2))  # (P, 2, 3, H, W)
        mixed = torch.lerp(couples.flip(1), couples, weight).flatten(0, 1)
        smoothing = self.args.smoothing
        off = smoothing / self.num_classes
        labels = one_hot(targets, self.num_classes, 1 - smoothing + off, off)  # (B, C)
        labels = labels.unflatten(0, (-1, 2))
        soft = torch.lerp(labels.flip(1), labels, lam[:, None]).flatten(0, 1)
        return mixed.contiguous(memory_format=torch.channels_last), soft


def make_mixup(
    args: argparse.Namespace, num_classes: int, images: int
) -> BlockMixup | PairMixup | None:
    """What mixes images and labels, smoothing of labels included; None without mixup and cutmix."""
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax):
        return None
    if args.mixup_mode == "pair":
        return PairMixup(args, num_classes, images)
    mixup = Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )
    return BlockMixup(mixup, args.batch_size, args.seed)


# -------------------------------------------------------------------------- samplers, loaders


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """One rank's share of an epoch's shuffled batches, as lists of (view, index).

    Epoch e shows view e mod `views` of the images: so augmented, in this order. Batch b of rank r
    is block b * world + r of the view's permutation, so the images of an optimizer step are the
    same for any split of one global batch over processes and accumulation. The last incomplete
    global batch is left out, as in the family's scripts; each view others.

    Args:
        views: None for a new view every epoch.
        unit: instead of whole global batches, all images but an incomplete unit of so many; the
            processes' numbers of batches then may differ by one.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        views: int | None = None,
        unit: int | None = None,
    ) -> None:
        self.count, self.batch_size, self.seed, self.views = count, batch_size, seed, views
        self.rank, self.world = utils.rank(), utils.world_size()
        self.view, self.first_batch = 0, 0
        self.end = count - count % (unit or batch_size * self.world)  # places that are shown
        blocks = -(-self.end // batch_size)
        self.batches_in_epoch = len(range(self.rank, blocks, self.world))

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch to begin with where a part of it is done."""
        self.view = epoch % self.views if self.views else epoch
        self.first_batch = first_batch

    def places(self, batch: int) -> range:
        """Where this rank's batch stands in the view's order."""
        start = (batch * self.world + self.rank) * self.batch_size
        return range(start, min(start + self.batch_size, self.end))

    def __len__(self) -> int:
        return self.batches_in_epoch - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = view_order(self.seed, self.view, self.count).tolist()
        for batch in range(self.first_batch, self.batches_in_epoch):
            yield [(self.view, order[place]) for place in self.places(batch)]


def view_order(seed: int, view: int, count: int) -> np.ndarray:
    """The order in which a view shows the images; (count,) indices."""
    return np.random.default_rng([seed, view]).permutation(count)


class EvalBatches(Sampler[list[tuple[int, int]]]):
    """This rank's batches of an evaluation; over all ranks every image once, without padding."""

    def __init__(self, count: int, batch_size: int, shared: bool) -> None:
        self.count, self.batch_size, self.view = count, batch_size, 0
        self.first, self.step = (utils.rank(), utils.world_size()) if shared else (0, 1)
        self.first_batch, self.batches_in_epoch = (
            0,
            -(-len(range(self.first, count, self.step)) // batch_size),
        )

    def places(self, batch: int) -> range:
        """The images of this rank's batch."""
        mine = range(self.first, self.count, self.step)
        return mine[batch * self.batch_size : (batch + 1) * self.batch_size]

    def __len__(self) -> int:
        return self.batches_in_epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(len(self)):
            yield [(0, index) for index in self.places(batch)]


class Stream:
    """One of timm's streams (wds/…, tfds/…, hfids/…), which shuffle and share out themselves. Their
    order, and so the result, depends on the number of workers."""

    def __init__(self, stream: IterableDataset, settings: dict[str, Any], is_train: bool) -> None:
        stream.set_loader_cfg(num_workers=settings["num_workers"])
        self.stream, self.is_train, self.batch_size = stream, is_train, settings["batch_size"]
        self.loader = DataLoader(stream, drop_last=is_train, **settings)
        self.batches_in_epoch = len(self.loader)
        self.view, self.first_batch = 0, 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch; a stream has to be read up to the batch to begin with."""
        self.stream.set_epoch(epoch)
        self.view, self.first_batch = epoch, first_batch

    def places(self, batch: int) -> range:
        """A number for each image of this rank's batch, none twice in an epoch."""
        start = (batch * utils.world_size() + utils.rank()) * self.batch_size
        return range(start, start + self.batch_size)

    def __iter__(self) -> Iterator["HostBatch"]:
        # A shard may hold more than the stream's length says; the schedule has no steps for that.
        stop = self.batches_in_epoch if self.is_train else None
        return itertools.islice(self.loader, self.first_batch, stop)


class HostBatch(NamedTuple):
    """What the workers hand over: pixels, labels, and rectangles to erase once it is normalised."""

    pixels: torch.Tensor  # (B, H, W, 3) uint8
    targets: torch.Tensor  # (B,) int64
    boxes: torch.Tensor  # (E, 5) int64: image, top, left, height, width
    erased: torch.Tensor  # their pixels one after another, float32


def collate(items: list[tuple[tuple[np.ndarray, Patches], int]]) -> HostBatch:
    images, targets = zip(*items, strict=True)
    pixels = default_collate([torch.from_numpy(array) for array, _ in images])  # in shared memory
    patches = [(row, *patch) for row, (_, found) in enumerate(images) for patch in found]
    boxes = torch.tensor([patch[:5] for patch in patches], dtype=torch.int64).view(-1, 5)
    erased = torch.cat([torch.empty(0)] + [patch[5].flatten() for patch in patches])
    return HostBatch(pixels, torch.tensor(targets), boxes, erased)


class DeviceLoader:
    """Batches as networks take them: on the device, normalised, erased and mixed.

    Iterating gives images (B, 3, H, W) float32, channels last, and targets (B,) int64, or (B, C)
    where they are mixed. Meanwhile `view` and `places` tell which images the last batch holds.

    Args:
        batches: tells the places of each batch (EpochBatches, EvalBatches, Stream).
        loader: gives their HostBatches.
        config: the data configuration with mean and std of RGB in 0…1.
    """

    def __init__(
        self,
        batches: Any,
        loader: Any,
        config: dict[str, Any],
        device: torch.device,
        mixup: BlockMixup | PairMixup | None = None,
    ) -> None:
        self.batches, self.loader, self.device, self.mixup = batches, loader, device, mixup
        mean, std = (torch.tensor(config[name], device=device) for name in ("mean", "std"))
        self.scale, self.shift = (v.view(1, 3, 1, 1) for v in (1 / (255 * std), -mean / std))
        self.places = range(0)

    @property
    def batches_in_epoch(self) -> int:
        return self.batches.batches_in_epoch

    @property
    def view(self) -> int:
        return self.batches.view

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch to begin with where a part of it is done."""
        self.batches.set_epoch(epoch, first_batch)

    def __len__(self) -> int:
        return len(self.loader)

    def sample(self, most: int = 16) -> list[float]:
        """A few numbers that tell how view 0's first images come out: means of their quarters."""
        batches, images = self.batches, self.loader.dataset
        count = min(max(most, self.mixup.unit if self.mixup else 1), batches.end)
        order = view_order(batches.seed, 0, batches.count)[:count].tolist()
        batch = collate([images[0, index] for index in order])
        shown = self._images(batch)
        if self.mixup is not None:
            shown, _ = self.mixup(shown, batch.targets.to(self.device), 0, 0)
        means = F.adaptive_avg_pool2d(shown[:most].float(), 2).flatten()
        return [round(value, 3) for value in means.tolist()]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number, batch in enumerate(self.loader, start=self.batches.first_batch):
            images = self._images(batch)
            targets = batch.targets.to(self.device, non_blocking=True)
            self.places = self.batches.places(number)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets, self.view, self.places.start)
            yield images, targets

    def _images(self, batch: HostBatch) -> torch.Tensor:
        pixels = batch.pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        images = torch.addcmul(self.shift, pixels.float(), self.scale)  # stays channels last
        if len(batch.boxes):
            areas = batch.boxes[:, 3:].prod(dim=1)
            is_plain = batch.erased.numel() == 3 * len(areas)  # a colour for each rectangle
            lengths = [3] * len(areas) if is_plain else (3 * areas).tolist()
            erased = batch.erased.to(self.device, non_blocking=True).split(lengths)
            for (row, top, left, height, width), values in zip(
                batch.boxes.tolist(), erased, strict=True
            ):
                shape = (3, 1, 1) if is_plain else (3, height, width)
                images[row, :, top : top + height, left : left + width] = values.view(shape)
        return images


@dataclass
class Data:
    """The loaders of a run and what its checkpoints remember of the data."""

    train_loader: DeviceLoader
    val_loader: DeviceLoader | None  # None where nothing is evaluated
    train: Dataset
    val: Dataset | None
    classes: list[str]
    config: dict[str, Any]


def build_data(args: argparse.Namespace, device: torch.device) -> Data:
    """Open both splits, check that they belong together, and make the loaders.

    Raises: UserError for what is missing, empty, mismatched or too small.
    """
    train, val = _open_splits(args)
    config = data_config(args) | {"classes": train.classes}
    settings = {
        "num_workers": args.num_workers,
        "pin_memory": args.pin_mem and device.type == "cuda",
        "persistent_workers": args.num_workers > 0,
        "worker_init_fn": utils.leave_signals_to_the_trainer,
        "collate_fn": collate,
    }
    _check_shared_memory(args, settings["num_workers"])
    train_loader = _train_loader(train, args, config, device, settings)
    val_loader = None
    if val is not None:
        transform = eval_transform(config)
        batch_size = 2 * args.batch_size  # nothing is kept for a backward pass
        if isinstance(val, IterableDataset):
            val.transform = transform
            batches = loader = Stream(val, settings | {"batch_size": batch_size}, is_train=False)
        else:
            batches = EvalBatches(len(val), batch_size, args.dist_eval)
            images = TransformedImages(val, transform, args.seed)
            loader = DataLoader(images, batch_sampler=batches, **settings)
        val_loader = DeviceLoader(batches, loader, config, device)
    return Data(train_loader, val_loader, train, val, train.classes, config)


def _open_splits(args: argparse.Namespace) -> tuple[Dataset, Dataset | None]:
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
    return train, val


def _train_loader(
    train: Dataset,
    args: argparse.Namespace,
    config: dict[str, Any],
    device: torch.device,
    settings: dict[str, Any],
) -> DeviceLoader:
    transform = train_transform(args, config)
    mixup = make_mixup(args, len(train.classes), len(train))
    if isinstance(train, IterableDataset):
        if args.teacher_cache or args.teacher_views:
            raise UserError(
                f"--teacher_cache and --teacher_views need images with a fixed order, which the "
                f"stream {args.data_set} has not; give a folder, or leave them out"
            )
        train.transform = transform
        stream = Stream(train, settings | {"batch_size": args.batch_size}, is_train=True)
        return DeviceLoader(stream, stream, config, device, mixup)
    count, batch_size, unit = len(train), args.batch_size, None
    if args.teacher_cache_only:  # whatever a later run of other batches and processes may show
        batch_size, unit = 2 * batch_size, mixup.unit if mixup else 1
    elif batch_size * utils.world_size() > count and not args.eval:
        raise UserError(
            f"--batch_size {batch_size} on {utils.world_size()} process(es) is more than the "
            f"{count} training images; give at most {count // utils.world_size()}"
        )
    batches = EpochBatches(count, batch_size, args.seed, args.teacher_views, unit)
    images = TransformedImages(train, transform, args.seed)
    loader = DataLoader(images, batch_sampler=batches, **settings)
    return DeviceLoader(batches, loader, config, device, mixup)


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
    batch = 3 * args.input_size**2 * 2 * args.batch_size  # 8-bit pixels; an evaluation's
    needed = 2 * workers * batch * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if needed > free:
        raise UserError(
            f"--num_workers {workers}: their batches may take {needed / 2**20:.0f} MiB of "
            f"/dev/shm, which has {free / 2**20:.0f}; give --num_workers 0, or docker --shm-size=8g"
        )
