"""From an image to what a network is shown: crops, colours, erasing, mixup and cutmix.

An image is an array (H, W, 3) uint8, as the sources of datasets.py give it, or a PIL image, as
timm's streams do.
"""

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
from timm.data.mixup import one_hot
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import Compose, InterpolationMode, RandomCrop, Resize

import utils

SMALL = 64  # below this many pixels: pad and crop as for CIFAR, not the random resized crop


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


def as_pil(image: np.ndarray | Image.Image) -> Image.Image:
    """An image of either kind, as timm's and torchvision's steps take it."""
    return image if isinstance(image, Image.Image) else Image.fromarray(image)


class Sized:
    """Steps that lead to (size, size); an array that is so already goes past them, and past Pillow.

    For tiny images Pillow's copies take longer than everything else.
    """

    def __init__(self, size: int, steps: Sequence[Callable]) -> None:
        self.size, self.steps = size, Compose([as_pil, *steps])

    def __call__(self, image: np.ndarray | Image.Image) -> np.ndarray:
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
        plane = torch.from_numpy(padded[..., 0])  # tells its size
        top, left, _, _ = RandomCrop.get_params(plane, (self.size, self.size))
        return padded[top : top + self.size, left : left + self.size]


class FastResizedCrop(RandomResizedCropAndInterpolation):
    """timm's random crop with the same draws, resized by torch: a third of Pillow's time.

    The pixels differ from Pillow's by rounding, at most 2 of 255.
    """

    def __call__(self, image: np.ndarray | Image.Image) -> Image.Image:
        pixels = torch.from_numpy(np.require(image, requirements="W"))[None]  # (1, H, W, 3)
        top, left, height, width = self.get_params(pixels[..., 0], self.scale, self.ratio)
        mode = self.interpolation
        mode = random.choice(mode) if isinstance(mode, (tuple, list)) else mode
        # A whole tensor, channels last: torch's fast path, and its answer is laid out so too.
        crop = pixels[:, top : top + height, left : left + width].contiguous().permute(0, 3, 1, 2)
        resized = F.interpolate(crop, self.size, mode=mode.value, antialias=True)
        return Image.fromarray(resized[0].permute(1, 2, 0).numpy())


class Patches(list):
    """Stands in for an image: keeps what timm's RandomErasing would write into it.

    Items are (top, left, height, width, pixels); pixels (3, height, width) or (3, 1, 1) float32.
    """

    def __setitem__(self, where: tuple[slice, slice, slice], pixels: torch.Tensor) -> None:
        _, rows, columns = where
        height, width = rows.stop - rows.start, columns.stop - columns.start
        self.append((rows.start, columns.start, height, width, pixels))


class ToPixels:
    """An image -> ((size, size, 3) uint8 array, Patches to put in once it is normalised).

    A quarter of float32's bytes go through the loader, and the device normalises.

    Args:
        steps: what leads from the image to a PIL image of that size.
        erasing: timm's RandomErasing, or None.
    """

    def __init__(self, steps: Sequence[Callable], erasing: RandomErasing | None = None) -> None:
        self.steps, self.erasing = Compose(steps), erasing

    def __call__(self, image: np.ndarray | Image.Image) -> tuple[np.ndarray, Patches]:
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
        color_jitter=args.color_jitter or None,  # at 0 a step would do nothing, slowly
        auto_augment=args.aa or None,
        interpolation=args.train_interpolation,
        mean=config["mean"],  # fills what a rotation uncovers
        std=config["std"],
    ).transforms[:-1]
    if size < SMALL:
        # A crop of 8 % of a tiny image says nothing; CIFAR's pad-by-an-eighth and crop does.
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
        interpolation="bicubic",
        crop_pct=crop_pct,
        crop_mode=config["crop_mode"],
    ).transforms[:-1]
    # Cropped by nothing, an image of that size is what it was.
    return ToPixels([Sized(size, steps)] if crop_pct == 1 else [as_pil, *steps])


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
