"""From an image to what a network sees: crops, colours, erasing, normalisation, mixup, cutmix.

An image is what the sources of datasets.py load: an array (H, W, 3) uint8, or a large JPEG that is
still to be decoded. It may also be a PIL image.
"""

import argparse
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import default_collate
from torchvision.transforms import Compose, InterpolationMode, RandomCrop, Resize

import models
import runtime
import utils
from arguments import SMALL, follows_network, is_mixed
from pictures import LargeJpeg, Picture
from utils import RandomUse, seed_sequence

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


# ------------------------------------------------------------- from an image to 8-bit pixels


def as_pil(image: Picture | Image.Image) -> Image.Image:
    """An image of any kind as a PIL image, which timm's and torchvision's steps take."""
    return image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))


class Sized:
    """Steps that lead to (size, size); an array of that size skips them, and Pillow with them.

    For tiny images Pillow's copies take longer than everything else.
    """

    def __init__(self, size: int, steps: Sequence[Callable]) -> None:
        self.size, self.steps = size, Compose([as_pil, *steps])

    def __call__(self, image: Picture | Image.Image) -> np.ndarray:
        if isinstance(image, np.ndarray) and image.shape[:2] == (self.size, self.size):
            return image
        return np.asarray(self.steps(image))


class PadAndCrop:
    """An eighth of black on every side, then a random crop: CIFAR's augmentation.

    torchvision's RandomCrop with the same draws, on arrays. He et al. 2016, section 4.2.
    """

    def __init__(self, size: int) -> None:
        self.size, self.border = size, size // 8

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8, H and W at least size -> (size, size, 3)"""
        border, (height, width, channels) = self.border, image.shape
        padded = np.zeros((height + 2 * border, width + 2 * border, channels), np.uint8)
        padded[border : border + height, border : border + width] = image
        plane = torch.from_numpy(padded[..., 0])  # only its shape is used
        top, left, _, _ = RandomCrop.get_params(plane, (self.size, self.size))
        return padded[top : top + self.size, left : left + self.size]


class FastResizedCrop(RandomResizedCropAndInterpolation):
    """timm's random crop with the same draws, resized by torch: a third of Pillow's time.

    The pixels differ from Pillow's by rounding, at most 2 of 255. A large JPEG is decoded at the
    smallest scale that leaves the crop twice the sides of the result: most pixels then differ by
    less than 1 of 255 (docs/images.md).
    """

    def __call__(self, image: Picture | Image.Image) -> Image.Image:
        if isinstance(image, Image.Image):
            image = np.array(image)
        plane = torch.empty(()).expand(image.shape[:2])  # only its shape is used
        top, left, height, width = box = self.get_params(plane, self.scale, self.ratio)
        mode = self.interpolation
        mode = random.choice(mode) if isinstance(mode, (tuple, list)) else mode
        if isinstance(image, LargeJpeg):
            spare = min(height / self.size[0], width / self.size[1]) / 2
            if scale := next((scale for scale in (8, 4, 2) if scale <= spare), None):
                picture, place = image.reduced(scale, *box)
                return picture.resize(self.size, Image.Resampling[mode.name], place)
        # interpolate has a fast path for contiguous channels-last input; the output keeps that
        # layout.
        pixels = torch.from_numpy(np.require(image, requirements="W"))[None]  # (1, H, W, 3)
        crop = pixels[:, top : top + height, left : left + width].contiguous().permute(0, 3, 1, 2)
        resized = F.interpolate(crop, self.size, mode=mode.value, antialias=True)
        return Image.fromarray(resized[0].permute(1, 2, 0).numpy())


class Patches:
    """Stands in for an image in timm's RandomErasing and records what would be written into it.

    Items are (top, left, height, width, pixels); pixels (3, height, width) or (3, 1, 1) float32.
    """

    dtype = torch.float32

    def __init__(self, height: int, width: int) -> None:
        self.shape = torch.Size((3, height, width))
        self.items: list[tuple[int, int, int, int, torch.Tensor]] = []

    def size(self) -> torch.Size:
        """(3, H, W)"""
        return self.shape

    def __setitem__(self, where: tuple[slice, slice, slice], pixels: torch.Tensor) -> None:
        _, rows, columns = where
        height, width = rows.stop - rows.start, columns.stop - columns.start
        self.items.append((rows.start, columns.start, height, width, pixels))


class ToPixels:
    """An image -> ((size, size, 3) uint8 array, Patches to insert once the image is normalised).

    So a quarter of float32's bytes go through the loader, and the device normalises.

    Args:
        steps: what leads from the image to a PIL image of that size.
        erasing: timm's RandomErasing, or None.
    """

    def __init__(self, steps: Sequence[Callable], erasing: RandomErasing | None = None) -> None:
        self.steps, self.erasing = Compose(steps), erasing

    def __call__(self, image: Picture | Image.Image) -> tuple[np.ndarray, Patches]:
        pixels = np.array(self.steps(image))
        patches = Patches(*pixels.shape[:2])
        if self.erasing is not None:
            self.erasing(patches)
        return pixels, patches


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    # At full strength timm asks for 0 bits, which Pillow 13 refuses: about one image in 600 would
    # end an epoch of 'rand-m9-mstd0.5-inc1'. One bit is the strongest level that exists.
    return auto_augment.posterize(image, max(1, bits_to_keep), **kwargs)


def train_transform(args: argparse.Namespace, config: dict[str, Any]) -> ToPixels:
    """timm's training transform up to 8-bit pixels, and its random erasing."""
    size = config["input_size"]
    # Internal to timm: the table of operations, and below the order of the steps.
    posterize = {name: _posterize for name in auto_augment.NAME_TO_OP if "Posterize" in name}
    auto_augment.NAME_TO_OP.update(posterize)
    steps = create_transform(
        size,
        is_training=True,
        use_prefetcher=True,  # leaves normalisation and erasing to us
        hflip=args.hflip,
        # None, since with 0 the step would do nothing, slowly; timm's own annotation lacks None.
        color_jitter=args.color_jitter or None,  # type: ignore[arg-type]
        auto_augment=args.aa or None,
        interpolation=args.train_interpolation,
        mean=config["mean"],  # the colour of what a rotation uncovers
        std=config["std"],
    ).transforms[:-1]
    if size < SMALL:
        # A crop of 8 % of a tiny image shows nothing; so pad by an eighth and crop, as for CIFAR.
        resize = Sized(size, [Resize(size, InterpolationMode.BICUBIC)])
        steps[:1] = [resize, PadAndCrop(size), *([as_pil] if steps[1:] else [])]
    else:
        steps[0] = FastResizedCrop(size, interpolation=args.train_interpolation)
    if not args.reprob:
        return ToPixels(steps)
    erasing = {"mode": args.remode, "max_count": args.recount, "device": "cpu"}
    return ToPixels(steps, RandomErasing(args.reprob, **erasing))


def eval_transform(config: dict[str, Any]) -> ToPixels:
    """timm's evaluation transform up to 8-bit pixels."""
    size, crop_pct = config["input_size"], config["crop_pct"]
    steps = create_transform(
        size,
        is_training=False,
        use_prefetcher=True,
        interpolation=config["interpolation"],
        crop_pct=crop_pct,
        crop_mode=config["crop_mode"],
    ).transforms[:-1]
    # With crop_pct 1, an image of the target size is returned unchanged.
    return ToPixels([Sized(size, steps)] if crop_pct == 1 else [as_pil, *steps])


# ------------------------------------------------- from pixels to network input on the device


class HostBatch(NamedTuple):
    """What the workers return: pixels, labels, and rectangles to erase after normalisation."""

    pixels: torch.Tensor  # (B, H, W, 3) uint8
    targets: torch.Tensor  # (B,) int64
    boxes: torch.Tensor  # (E, 5) int64: image, top, left, height, width
    erased: torch.Tensor  # the pixels of all rectangles, one after another, float32


def collate(items: list[tuple[tuple[np.ndarray, Patches], int]]) -> HostBatch:
    """Images of ToPixels and their targets -> one batch."""
    images, targets = zip(*items, strict=True)
    pixels = default_collate([torch.from_numpy(array) for array, _ in images])  # in shared memory
    patches = [(row, *patch) for row, (_, found) in enumerate(images) for patch in found.items]
    boxes = torch.tensor([patch[:5] for patch in patches], dtype=torch.int64).view(-1, 5)
    erased = torch.cat([torch.empty(0)] + [patch[5].flatten() for patch in patches])
    return HostBatch(pixels, torch.tensor(targets), boxes, erased)


class ToNetwork:
    """Pixels -> what a network takes: on the device, normalised and erased.

    Args:
        config: the data configuration with mean and std of RGB in 0…1.
    """

    def __init__(self, config: dict[str, Any], device: torch.device) -> None:
        self.device = device
        mean = torch.tensor(config["mean"], device=device)
        std = torch.tensor(config["std"], device=device)
        self.scale = (1 / (255 * std)).repeat(config["input_size"])  # (W * 3,)
        self.shift = (-mean / std).repeat(config["input_size"])  # (W * 3,)

    def __call__(self, batch: HostBatch) -> torch.Tensor:
        """A batch of size B -> images (B, 3, H, W) float32, channels last"""
        pixels = runtime.send(batch.pixels, self.device)  # (B, H, W, 3) uint8
        # Whole rows at once, since loops along three channels would be too short. And in place,
        # since fetching fresh memory for a second copy costs ten times the arithmetic.
        rows = pixels.flatten(2).float()  # (B, H, W * 3)
        torch.addcmul(self.shift, rows, self.scale, out=rows)
        images = rows.view(pixels.shape).permute(0, 3, 1, 2)  # (B, 3, H, W), channels last
        self._erase(images, batch)
        return images

    def _erase(self, images: torch.Tensor, batch: HostBatch) -> None:
        if not len(batch.boxes):
            return
        areas = batch.boxes[:, 3:].prod(dim=1)
        is_plain = batch.erased.numel() == 3 * len(areas)  # one colour per rectangle
        lengths = [3] * len(areas) if is_plain else (3 * areas).tolist()
        erased = runtime.send(batch.erased, self.device).split(lengths)
        for box, values in zip(batch.boxes.tolist(), erased, strict=True):
            row, top, left, height, width = box
            shape = (3, 1, 1) if is_plain else (3, height, width)
            images[row, :, top : top + height, left : left + width] = values.view(shape)


# -------------------------------------------------------------------------- mixup and cutmix

PAIRS_AT_ONCE = 256  # whose numbers PairMixup draws together; another value gives other numbers


class BlockMixup:
    """timm's mixup, drawn for each block of `batch_size` images from (seed, view, block) alone.

    An image is mixed with another image of its block, so the result depends on the batch size.
    """

    def __init__(self, mixup: Mixup, batch_size: int, seed: int) -> None:
        self.mixup, self.unit, self.seed = mixup, batch_size, seed

    def __call__(
        self, images: torch.Tensor, targets: torch.Tensor, view: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W), (B,) -> (B, 3, H, W), (B, C); `start`: place of the first image"""
        mixed = []
        for first in range(0, len(images), self.unit):
            number = (start + first) // self.unit
            utils.seed_rng(torch.device("cpu"), RandomUse.BLOCK_MIXUP, self.seed, view, number)
            block = slice(first, first + self.unit)
            mixed.append(self.mixup(images[block], targets[block])[1])  # images in place
        return images, torch.cat(mixed)


class PairMixup:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of neighbours in the order of a view.

    Places 2p and 2p + 1 are partners, with a lambda and a box of their own that depend on (seed,
    view, p) alone: neither on the batch size nor on the number of processes. (timm's pair mode
    mixes mirrored positions of a batch instead.)

    Args:
        seed: of all draws.
        mixup_alpha … num_classes: as for timm's Mixup.
    """

    unit = 2

    def __init__(
        self,
        seed: int,
        *,
        mixup_alpha: float,
        cutmix_alpha: float,
        cutmix_minmax: Sequence[float] | None,
        prob: float,
        switch_prob: float,
        label_smoothing: float,
        num_classes: int,
    ) -> None:
        self.seed = seed
        self.mixup_alpha, self.cutmix_minmax = mixup_alpha, cutmix_minmax
        self.cutmix_alpha = 1.0 if cutmix_minmax else cutmix_alpha
        self.prob, self.switch_prob = prob, switch_prob
        self.label_smoothing, self.num_classes = label_smoothing, num_classes
        self.drawn_key, self.drawn = (-1, -1), np.empty((7, 0))  # view and block, numbers

    def draw(self, view: int, pairs: range) -> np.ndarray:
        """Numbers of pairs of a view: (7, P) float64.

        Their rows are: whether the pair is cut (CutMix, not mixup), lambda, whether it is mixed at
        all, and two numbers in 0…1 per axis for the position of the box.
        """
        first, last = pairs.start // PAIRS_AT_ONCE, (pairs.stop - 1) // PAIRS_AT_ONCE
        blocks = [self._block(view, number) for number in range(first, last + 1)]
        begin = pairs.start - first * PAIRS_AT_ONCE
        return np.concatenate(blocks, axis=1)[:, begin : begin + len(pairs)]

    def _block(self, view: int, number: int) -> np.ndarray:
        """The numbers of the pairs of one block; those of the last block asked for are kept."""
        if self.drawn_key == (view, number):
            return self.drawn
        size = PAIRS_AT_ONCE
        rng = np.random.default_rng(seed_sequence(RandomUse.PAIR_MIXUP, self.seed, view, number))
        is_cut = rng.random(size) < (self.switch_prob if self.mixup_alpha else 1.0)
        is_cut &= self.cutmix_alpha > 0

        def lambdas(alpha: float) -> np.ndarray:
            return rng.beta(alpha, alpha, size) if alpha else np.ones(size)

        lam_mix, lam_cut = lambdas(self.mixup_alpha), lambdas(self.cutmix_alpha)
        lam = np.where(is_cut, lam_cut, lam_mix)
        is_mixed = rng.random(size) < self.prob
        self.drawn_key = (view, number)
        self.drawn = np.stack([is_cut, lam, is_mixed, *rng.random((4, size))])
        return self.drawn

    def boxes(
        self, numbers: np.ndarray, sides: tuple[int, int]
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """First and last + 1 row, then column, of the box of each pair; (P,) int64 each.

        timm's `rand_bbox` and `rand_bbox_minmax`, which draw one box at a time, for many pairs.

        Args:
            numbers: (7, P), from `draw`.
            sides: height and width of the images.
        """
        is_cut, lam, is_mixed = numbers[0].astype(bool), numbers[1], numbers[2].astype(bool)
        for axis, side in enumerate(sides):
            u, v = numbers[3 + 2 * axis : 5 + 2 * axis]
            if self.cutmix_minmax:
                least, most = (int(side * part) for part in self.cutmix_minmax)
                length = least + (u * max(1, most - least)).astype(np.int64)
                first = (v * (side - length + 1)).astype(np.int64)
                last = first + length
            else:
                length = (side * np.sqrt(1 - lam)).astype(np.int64)
                middle = (u * side).astype(np.int64)
                first = (middle - length // 2).clip(0, side)
                last = (middle + (length + 1) // 2).clip(0, side)
            yield np.where(is_cut, first, 0) * is_mixed, np.where(is_cut, last, side) * is_mixed

    def __call__(
        self, images: torch.Tensor, targets: torch.Tensor, view: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W), (B,) -> (B, 3, H, W), (B, C); `start`: place of the first image"""
        height, width = images.shape[2:]
        drawn = self.draw(view, range(start // 2, (start + len(images)) // 2))  # (7, P)
        (top, bottom), (left, right) = self.boxes(drawn, (height, width))
        # Inside the box an image keeps this share of itself: lambda, or nothing where it is cut.
        kept = np.where(drawn[0], 0.0, drawn[1])
        lam = 1 - (1 - kept) * (bottom - top) * (right - left) / (height * width)
        numbers = torch.from_numpy(np.stack([top, bottom, left, right, kept, lam]))  # (6, P)
        numbers = runtime.send(numbers.float(), images.device)[:, :, None]
        y = torch.arange(height, device=images.device)
        x = torch.arange(width, device=images.device)
        rows = (y >= numbers[0]) & (y < numbers[1])  # (P, H)
        columns = (x >= numbers[2]) & (x < numbers[3])  # (P, W)
        box = (rows[:, :, None] & columns[:, None]).float()  # (P, H, W)
        weight = 1 - box * (1 - numbers[4][:, :, None])  # (P, H, W)

        couples = images.unflatten(0, (-1, 2))  # (P, 2, 3, H, W)
        mixed = torch.lerp(couples.flip(1), couples, weight[:, None, None]).flatten(0, 1)
        off = self.label_smoothing / self.num_classes
        labels = torch.full((len(targets), self.num_classes), off, device=images.device)  # (B, C)
        labels = labels.scatter_(1, targets[:, None], 1 - self.label_smoothing + off)
        labels = labels.unflatten(0, (-1, 2))  # (P, 2, C)
        soft = torch.lerp(labels.flip(1), labels, numbers[5][:, None]).flatten(0, 1)
        return mixed.contiguous(memory_format=torch.channels_last), soft


class PartialLabels:
    """Soft labels of images of which some have none, after mixup and cutmix where there are any.

    A row sums to the part of its image that has a label: 1, 0, or what mixing left of it. Label
    smoothing leaves the sum as it is.

    Args:
        mixup: made for one more class, that of the images without a label, and without smoothing.
    """

    def __init__(
        self, mixup: BlockMixup | PairMixup | None, num_classes: int, smoothing: float
    ) -> None:
        self.mixup, self.unit = mixup, mixup.unit if mixup else 1
        self.num_classes, self.smoothing = num_classes, smoothing

    def __call__(
        self, images: torch.Tensor, targets: torch.Tensor, view: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W), (B,) -> (B, 3, H, W), (B, C); `start`: place of the first image"""
        if self.mixup is None:
            shares = F.one_hot(targets, self.num_classes + 1).float()  # (B, C + 1)
        else:
            images, shares = self.mixup(images, targets, view, start)
        labels = shares[:, :-1]
        even = labels.mean(dim=1, keepdim=True)  # the labelled part of an image over all classes
        return images, torch.lerp(labels, even.expand_as(labels), self.smoothing)


Mixing = BlockMixup | PairMixup | PartialLabels


def make_mixup(
    args: argparse.Namespace, num_classes: int, partial_labels: bool = False
) -> Mixing | None:
    """Mixes images and labels, including label smoothing; None without mixup and cutmix.

    Args:
        partial_labels: whether some images have no label, see PartialLabels.
    """
    if partial_labels:
        plain = argparse.Namespace(**{**vars(args), "smoothing": 0.0})
        inner = _make_mixup(plain, num_classes + 1)
        return PartialLabels(inner, num_classes, args.smoothing)
    return _make_mixup(args, num_classes)


def _make_mixup(args: argparse.Namespace, num_classes: int) -> BlockMixup | PairMixup | None:
    if not is_mixed(args):
        return None
    keywords = {
        "mixup_alpha": args.mixup,
        "cutmix_alpha": args.cutmix,
        "cutmix_minmax": args.cutmix_minmax,
        "prob": args.mixup_prob,
        "switch_prob": args.mixup_switch_prob,
        "label_smoothing": args.smoothing,
        "num_classes": num_classes,
    }
    if args.mixup_mode == "pair":
        return PairMixup(args.data_seed, **keywords)
    return BlockMixup(Mixup(mode=args.mixup_mode, **keywords), args.batch_size, args.data_seed)
