"""The steps of timm's augmentation on arrays, with faster shears and translations."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import Compose, RandomHorizontalFlip

from data.pictures import Picture

SMALL = 2500  # pixels of an image for which Pillow is faster
BLOCK = 14_000  # pixels that are moved at once; their intermediate values lie in the CPU's cache

# Internal to timm: these functions. Of each, the axis that it moves along, and whether it shears.
MOVES: dict[Callable, tuple[int, bool]] = {
    auto_augment.shear_x: (0, True),
    auto_augment.shear_y: (1, True),
    auto_augment.translate_x_rel: (0, False),
    auto_augment.translate_y_rel: (1, False),
}


def as_pil(image: Picture | Image.Image) -> Image.Image:
    """An image of any kind as a PIL image, which timm's and torchvision's steps take."""
    return image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))


class Flip:
    """torchvision's RandomHorizontalFlip with the same draws, also for arrays."""

    def __init__(self, p: float) -> None:
        self.p = float(np.float32(p))  # the draw is a float32

    def __call__(self, image: np.ndarray | Image.Image) -> np.ndarray | Image.Image:
        if torch.rand(1).item() >= self.p:
            return image
        if isinstance(image, Image.Image):
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(image).flip(1).numpy()


def on_arrays(step: Callable) -> Callable:
    """A step of timm's transform, so that it takes (H, W, 3) uint8 arrays and PIL images.

    It gives either. Draws and pixels stay the same to the bit, and an image that no operation is
    drawn for is not converted.
    """
    if isinstance(step, RandomHorizontalFlip):
        return Flip(step.p)
    if isinstance(step, auto_augment.RandAugment):
        ops = step.ops
    elif isinstance(step, auto_augment.AutoAugment):
        ops = list(itertools.chain(*step.policy))
    else:
        return Compose([as_pil, step])
    for op in ops:
        op.aug_fn = partial(_move if op.aug_fn in MOVES else _by_pillow, op.aug_fn)
    return step


def _by_pillow(function: Callable, image: Any, *levels: Any, **keywords: Any) -> Image.Image:
    return function(as_pil(image), *levels, **keywords)


def _move(function: Callable, image: Any, level: float, **keywords: Any) -> Any:
    """What one of MOVES does, for the bicubic filter in a third of Pillow's time."""
    auto_augment._check_args_tf(keywords)  # draws the filter, if timm is to
    axis, is_shear = MOVES[function]
    height, width = image.size[::-1] if isinstance(image, Image.Image) else image.shape[:2]
    offset = 0.0 if is_shear else level * (height if axis else width)
    slope = level if is_shear else 0.0
    if keywords["resample"] == Image.Resampling.BICUBIC and height * width >= SMALL:
        if axis:
            image = as_pil(image).transpose(Image.Transpose.TRANSPOSE)
        moved = move_rows(np.asarray(image), slope, offset, keywords["fillcolor"])
        if moved is not None:
            return Image.fromarray(moved).transpose(Image.Transpose.TRANSPOSE) if axis else moved
        if axis:
            image = image.transpose(Image.Transpose.TRANSPOSE)
    return function(as_pil(image), level, **keywords)


def move_rows(
    pixels: np.ndarray, slope: float, offset: float, fill: tuple[int, ...]
) -> np.ndarray | None:
    """Pillow's Image.transform, AFFINE (1, slope, offset, 0, 1, 0) and BICUBIC, to the bit.

    Pillow weighs 4 x 4 pixels in float64, but here only 4 of them have a weight. A pixel (x, y) is
    taken from the place x + slope * (y + 1/2) + offset of row y.

    Args:
        pixels: (H, W, 3) uint8.
        fill: the color of pixels whose place lies outside of the image.
    Returns: a new array; None if places lie so near to the middle or the edge of a pixel that the
        rounding of a sum decides which pixels are taken.
    """
    height, width, channels = pixels.shape
    drift = slope * (np.arange(height) + 0.5)  # as below, the sums are in Pillow's order
    total = drift + offset
    if (np.abs(2 * total % 1 - 0.5) > 0.5 - 1e-9).any():
        return None
    moved = np.empty_like(pixels)
    moved[:] = np.array([fill] * width, np.uint8)
    # The columns that some row of the image is moved into.
    left = max(0, math.ceil(-total.max() - 0.5))
    right = min(width, math.ceil(width - total.min() - 0.5))
    if left >= right:
        return moved
    # In every row, the outermost pixels go on. A place far outside may lie in another row; the
    # pixel there is not used.
    wide = np.zeros((height + 2, width + 5, channels), np.uint8)
    wide[1:-1, 2:-3], wide[1:-1, :2], wide[1:-1, -3:] = pixels, pixels[:, :1], pixels[:, -1:]
    count = channels * (right - left + 3)
    shifts = np.clip(np.floor(total), -width, width).astype(int) + left + 1
    starts = channels * (np.arange(1, height + 1) * (width + 5) + shifts)
    windows = np.lib.stride_tricks.as_strided(wide, (wide.size - count + 1, count), (1, 1))
    taken = windows[starts]  # (H, count)

    x = np.repeat(np.arange(left, right + 3) + 0.5, channels)
    fills = np.array(fill * (right - left + 3), np.int16)
    for top in range(0, height, rows := max(1, BLOCK // width)):
        block = slice(top, top + rows)
        places = x + drift[block, None]
        if offset:
            places += offset
        places -= 0.5
        is_outside = (places < -0.5) | (places >= width - 0.5) if slope else None
        values = _cubic(taken[block], places, channels)
        if slope:
            np.copyto(values, fills, where=is_outside)
        moved[block, left:right] = values.reshape(len(values), -1, channels)[:, :-3]
    return moved


def _cubic(taken: np.ndarray, places: np.ndarray, channels: int) -> np.ndarray:
    """Values between the second and the third of each four neighbors in a row.

    In one dimension throughout, since loops along short rows would be slow. So the last three
    pixels of each row, which have no four neighbors, come out wrong.

    Args:
        taken: (R, N) uint8, the channels of a pixel next to each other.
        places: (R, N) float64, whose fractions say how far from the second to the third; changed.
    Returns: (R, N) int16 in 0…255.
    """
    values = taken.reshape(-1).astype(np.int16)
    count = len(values) - 3 * channels
    steps = values[channels:] - values[:-channels]  # from each pixel to the next; exact integers
    first, second, third = (steps[start : start + count] for start in (0, channels, 2 * channels))
    cubic = first + third
    fraction = places.reshape(-1)[:count]
    result = np.floor(fraction)
    fraction -= result
    # Horner's scheme as Pillow has it, in its order, whose roundings decide between two values.
    np.multiply(fraction, cubic, out=result)
    result -= cubic + first
    result *= fraction
    result += first + second
    result *= fraction
    result += values[channels : channels + count]
    values[:count] = result  # toward zero, as in Pillow
    return np.clip(values, 0, 255, out=values).reshape(taken.shape)
