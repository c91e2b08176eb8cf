"""From an image to what a network sees: crops, colors, erasing, normalization.

An image is what the sources of data/sources.py load: an array (H, W, 3) uint8, or a JPEG that is
still to be decoded. It may also be a PIL image.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import default_collate
from torchvision.transforms import Compose, InterpolationMode, RandomCrop, Resize

from arguments.derived import SMALL
from data.augment import as_pil, on_arrays
from data.pictures import Jpeg, Picture
from runtime.device import send

# ------------------------------------------------------------- from an image to 8-bit pixels


class Sized:
    """Steps that lead to (size, size); an array of that size skips them, and Pillow with them.

    For tiny images Pillow's copies take longer than everything else.
    """

    def __init__(self, size: int, steps: Sequence[Callable]) -> None:
        self.size, self.steps = size, Compose([as_pil, *steps])

    def __call__(self, image: Picture | Image.Image) -> np.ndarray:
        if not isinstance(image, Image.Image) and image.shape[:2] == (self.size, self.size):
            return np.asarray(image)
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

    def __call__(self, image: Picture | Image.Image) -> np.ndarray | Image.Image:
        if isinstance(image, Image.Image):
            image = np.asarray(image)
        plane = torch.empty(()).expand(image.shape[:2])  # only its shape is used
        top, left, height, width = box = self.get_params(plane, self.scale, self.ratio)
        mode = self.interpolation
        mode = random.choice(mode) if isinstance(mode, (tuple, list)) else mode
        if isinstance(image, Jpeg):
            ratios = height / self.size[0], width / self.size[1]
            scales = [scale for scale in (8, 4, 2) if scale <= min(ratios) / 2]
            if image.is_large and scales:
                reach = math.ceil(4 * max(ratios))  # of the widest filter, and a pixel more
                picture, place = image.reduced(scales[0], box, reach)
                return picture.resize(self.size, Image.Resampling[mode.name], place)
            image = image.first_rows(top + height)
        crop = np.array(image[top : top + height, left : left + width])
        # interpolate has a fast path for contiguous channels-last input; the output keeps that
        # layout.
        planes = torch.from_numpy(crop.transpose(2, 0, 1)[None])  # (1, 3, H, W)
        resized = F.interpolate(planes, self.size, mode=mode.value, antialias=True)
        return resized.numpy()[0].transpose(1, 2, 0)


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
    """An image -> ((size, size, 3) uint8 array, Patches to insert once the image is normalized).

    So a quarter of float32's bytes go through the loader, and the device normalizes.

    Args:
        steps: what leads from the image to an array or a PIL image of that size.
        erasing: timm's RandomErasing, or None.
    """

    def __init__(self, steps: Sequence[Callable], erasing: RandomErasing | None = None) -> None:
        self.steps, self.erasing = Compose(steps), erasing

    def __call__(self, image: Picture | Image.Image) -> tuple[np.ndarray, Patches]:
        pixels = np.require(self.steps(image), requirements="W")  # a copy of a PIL image only
        patches = Patches(*pixels.shape[:2])
        if self.erasing is not None:
            self.erasing(patches)
        return pixels, patches


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    # At full strength timm asks for 0 bits, which Pillow 13 refuses: about one image in 600 would
    # end an epoch of 'rand-m9-mstd0.5-inc1'. One bit is the strongest level that exists.
    return auto_augment.posterize(image, max(1, bits_to_keep), **kwargs)


@dataclass(frozen=True)
class Augmentation:
    """How training images are changed, except for the crop; the fields are flags of main.py."""

    hflip: float
    color_jitter: float
    aa: str
    train_interpolation: str
    reprob: float
    remode: str
    recount: int


def train_transform(augmentation: Augmentation, config: dict[str, Any]) -> ToPixels:
    """timm's training transform up to 8-bit pixels, and its random erasing."""
    size = config["input_size"]
    # Internal to timm: the table of operations, and below the order of the steps.
    posterize = {name: _posterize for name in auto_augment.NAME_TO_OP if "Posterize" in name}
    auto_augment.NAME_TO_OP.update(posterize)
    steps = create_transform(
        size,
        is_training=True,
        use_prefetcher=True,  # leaves normalization and erasing to us
        hflip=augmentation.hflip,
        # None, since with 0 the step would do nothing, slowly; timm's own annotation lacks None.
        color_jitter=augmentation.color_jitter or None,  # type: ignore[arg-type]
        auto_augment=augmentation.aa or None,
        interpolation=augmentation.train_interpolation,
        mean=config["mean"],  # the color of what a rotation uncovers
        std=config["std"],
    ).transforms[:-1]
    if size < SMALL:
        # A crop of 8 % of a tiny image shows nothing; so pad by an eighth and crop, as for CIFAR.
        resize = Sized(size, [Resize(size, InterpolationMode.BICUBIC)])
        begin = [resize, PadAndCrop(size)]
    else:
        begin = [FastResizedCrop(size, interpolation=augmentation.train_interpolation)]
    steps = [*begin, *map(on_arrays, steps[1:])]
    if not augmentation.reprob:
        return ToPixels(steps)
    erasing = RandomErasing(
        augmentation.reprob, mode=augmentation.remode, max_count=augmentation.recount, device="cpu"
    )
    return ToPixels(steps, erasing)


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
    """What the workers return: pixels, labels, and rectangles to erase after normalization."""

    pixels: torch.Tensor  # (B, H, W, 3) uint8
    targets: torch.Tensor  # (B,) int64
    boxes: torch.Tensor  # (E, 5) int64: image, top, left, height, width
    erased: torch.Tensor  # the pixels of all rectangles, one after another, float32


def collate(items: list[tuple[tuple[np.ndarray, Patches], int]]) -> HostBatch:
    """Images of ToPixels and their targets -> one batch."""
    images, targets = zip(*items, strict=True)
    pixels = default_collate([torch.from_numpy(array) for array, _ in images])  # in shared memory
    patches = [(row, *patch) for row, (_, erased) in enumerate(images) for patch in erased.items]
    boxes = torch.tensor([patch[:5] for patch in patches], dtype=torch.int64).view(-1, 5)
    erased = torch.cat([torch.empty(0)] + [patch[5].flatten() for patch in patches])
    return HostBatch(pixels, torch.tensor(targets), boxes, erased)


class ToNetwork:
    """Pixels -> what a network takes: on the device, normalized and erased.

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
        pixels = send(batch.pixels, self.device)  # (B, H, W, 3) uint8
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
        is_plain = batch.erased.numel() == 3 * len(areas)  # one color per rectangle
        lengths = [3] * len(areas) if is_plain else (3 * areas).tolist()
        erased = send(batch.erased, self.device).split(lengths)
        for box, values in zip(batch.boxes.tolist(), erased, strict=True):
            row, top, left, height, width = box
            shape = (3, 1, 1) if is_plain else (3, height, width)
            images[row, :, top : top + height, left : left + width] = values.view(shape)
