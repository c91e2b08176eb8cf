"""Mixup and CutMix of a batch on the device, a function of seed, view and place."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, one_hot

from runtime.device import send
from runtime.randomness import RandomUse, seed_rng, seed_sequence

PAIRS_AT_ONCE = 256  # whose numbers PairMixup draws together; another value gives other numbers


@dataclass(frozen=True)
class MixingSettings:
    """How images and labels are mixed; the fields are flags of main.py."""

    mixup: float
    cutmix: float
    cutmix_minmax: Sequence[float] | None
    mixup_prob: float
    mixup_switch_prob: float
    mixup_mode: str
    smoothing: float


class ElementMixup(Mixup):
    """timm's mixup; its mode elem mixes all images at once, and without waiting for the device.

    The results are the same bits. In that mode, an image is mixed with the one that mirrors its
    place in the batch.
    """

    def _mix_elem(self, x: torch.Tensor) -> torch.Tensor:
        lam, is_cut = self._params_per_elem(len(x))
        height, width = x.shape[2:]
        boxes = np.zeros((4, len(x)), dtype=np.float32)
        boxes[1], boxes[3] = height, width
        for index in np.flatnonzero(is_cut & (lam != 1)):
            boxes[:, index], lam[index] = cutmix_bbox_and_lam(
                x[index].shape, lam[index], self.cutmix_minmax, self.correct_lam
            )
        kept = np.where(is_cut & (lam != 1), 0, lam)  # the image's share inside the box
        numbers = send(torch.from_numpy(np.stack([*boxes, kept, lam])), x.device)[:, :, None]
        weight = torch.where(inside(numbers, (height, width)), numbers[4][:, :, None], 1.0)[:, None]
        others = x.flip(0).mul_(1 - weight)
        x.mul_(weight).add_(others)
        return numbers[5]


def inside(edges: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
    """Whether a pixel lies in the box of its image: (B, H, W) bool.

    Args:
        edges: first and last + 1 row, then column; (4 or more, B, 1).
    """
    y, x = (torch.arange(side, device=edges.device) for side in sides)
    rows = (y >= edges[0]) & (y < edges[1])  # (B, H)
    columns = (x >= edges[2]) & (x < edges[3])  # (B, W)
    return rows[:, :, None] & columns[:, None]


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
            seed_rng(torch.device("cpu"), RandomUse.BLOCK_MIXUP, self.seed, view, number)
            block = slice(first, first + self.unit)
            mixed.append(self.mixup(images[block], targets[block])[1])  # images in place
        return images, torch.cat(mixed)


class PairMixup:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of neighbors in the order of a view.

    Places 2p and 2p + 1 are partners, with a lambda and a box of their own that depend on (seed,
    view, p) alone: neither on the batch size nor on the number of processes. (timm's pair mode
    mixes mirrored positions of a batch instead.)

    Args:
        seed: of all draws.
    """

    unit = 2

    def __init__(self, settings: MixingSettings, num_classes: int, seed: int) -> None:
        self.settings, self.num_classes, self.seed = settings, num_classes, seed
        self.cutmix_alpha = 1.0 if settings.cutmix_minmax else settings.cutmix
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
        settings, size = self.settings, PAIRS_AT_ONCE
        rng = np.random.default_rng(seed_sequence(RandomUse.PAIR_MIXUP, self.seed, view, number))
        is_cut = rng.random(size) < (settings.mixup_switch_prob if settings.mixup else 1.0)
        is_cut &= self.cutmix_alpha > 0

        def lambdas(alpha: float) -> np.ndarray:
            return rng.beta(alpha, alpha, size) if alpha else np.ones(size)

        lam_mix, lam_cut = lambdas(settings.mixup), lambdas(self.cutmix_alpha)
        lam = np.where(is_cut, lam_cut, lam_mix)
        is_mixed = rng.random(size) < settings.mixup_prob
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
            if self.settings.cutmix_minmax:
                least, most = (int(side * part) for part in self.settings.cutmix_minmax)
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
        # Inside the box an image keeps this share of itself: lambda, or nothing if it is cut.
        kept = np.where(drawn[0], 0.0, drawn[1])
        lam = 1 - (1 - kept) * (bottom - top) * (right - left) / (height * width)
        numbers = torch.from_numpy(np.stack([top, bottom, left, right, kept, lam]))  # (6, P)
        numbers = send(numbers.float(), images.device)[:, :, None]
        box = inside(numbers, (height, width)).float()  # (P, H, W)
        weight = 1 - box * (1 - numbers[4][:, :, None])  # (P, H, W)

        couples = images.unflatten(0, (-1, 2))  # (P, 2, 3, H, W)
        mixed = torch.lerp(couples.flip(1), couples, weight[:, None, None]).flatten(0, 1)
        smoothing, off = self.settings.smoothing, self.settings.smoothing / self.num_classes
        labels = one_hot(targets, self.num_classes, 1 - smoothing + off, off)  # (B, C)
        labels = labels.unflatten(0, (-1, 2))  # (P, 2, C)
        soft = torch.lerp(labels.flip(1), labels, numbers[5][:, None]).flatten(0, 1)
        return mixed.contiguous(memory_format=torch.channels_last), soft


class PartialLabels:
    """Soft labels of images of which some have none, after mixup and cutmix if there are any.

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
        even = labels.mean(dim=1, keepdim=True)  # the labeled part of an image over all classes
        return images, torch.lerp(labels, even.expand_as(labels), self.smoothing)


Mixing = BlockMixup | PairMixup | PartialLabels


def make_mixup(
    settings: MixingSettings,
    num_classes: int,
    *,
    batch_size: int,
    seed: int,
    partial_labels: bool = False,
) -> Mixing | None:
    """Mixes images and labels, including label smoothing; None without mixup and cutmix.

    Args:
        batch_size: images that are mixed with each other, except in the mode 'pair'.
        partial_labels: whether some images have no label, see PartialLabels.
    """
    if partial_labels:
        plain = replace(settings, smoothing=0.0)
        inner = make_mixup(plain, num_classes + 1, batch_size=batch_size, seed=seed)
        assert not isinstance(inner, PartialLabels)
        return PartialLabels(inner, num_classes, settings.smoothing)
    if not (settings.mixup > 0 or settings.cutmix > 0 or settings.cutmix_minmax):
        return None
    if settings.mixup_mode == "pair":
        return PairMixup(settings, num_classes, seed)
    mixup = ElementMixup(
        settings.mixup,
        settings.cutmix,
        settings.cutmix_minmax,
        settings.mixup_prob,
        settings.mixup_switch_prob,
        settings.mixup_mode,
        label_smoothing=settings.smoothing,
        num_classes=num_classes,
    )
    return BlockMixup(mixup, batch_size, seed)
