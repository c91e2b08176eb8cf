"""Which images each batch holds: a function of seed and view, computed and not stored."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from torch.utils.data import Sampler

from runtime import distributed
from runtime.randomness import RandomUse, seed_sequence


class BatchOrder(Protocol):
    """Which images each batch of this process holds; a sampler or a stream."""

    view: int
    first_batch: int
    batches_in_epoch: int

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None: ...

    def places(self, batch: int) -> range: ...


PLACES_AT_ONCE = 4096  # of an order that are computed ahead


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """The shuffled batches of one rank in an epoch, as lists of (view, index).

    A view is one augmentation and one order of all training images; epoch e uses view e mod
    `views`. Batch b of rank r is block b * world + r of the order of the view, so an optimizer step
    sees the same images however a global batch is divided among processes and accumulation. The
    last incomplete global batch is left out, as in the ConvNeXt script; other images are last in
    the next view (see `view_order`).

    Args:
        views: number of views; None for a new view every epoch.
        unit: show all images except an incomplete unit of this many, instead of whole global
            batches; the number of batches may then differ by one between processes.
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
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.view, self.first_batch = 0, 0
        self.end = count - count % (unit or batch_size * self.world)  # the first place not shown
        blocks = math.ceil(self.end / batch_size)
        self.batches_in_epoch = len(range(self.rank, blocks, self.world))

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch to begin with if part of the epoch is done."""
        self.view = epoch % self.views if self.views else epoch
        self.first_batch = first_batch

    def places(self, batch: int) -> range:
        """Positions of the images of one batch of this rank in the order of the view."""
        start = (batch * self.world + self.rank) * self.batch_size
        return range(start, min(start + self.batch_size, self.end))

    def __len__(self) -> int:
        return self.batches_in_epoch - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Some batches at once, since a call of view_order costs as much as hundreds of places.
        step = max(1, PLACES_AT_ONCE // self.batch_size)
        for first in range(self.first_batch, self.batches_in_epoch, step):
            numbers = range(first, min(first + step, self.batches_in_epoch))
            batches = [np.asarray(self.places(number)) for number in numbers]
            order = view_order(self.seed, self.view, self.count, np.concatenate(batches))
            indices = iter(order.tolist())
            for batch in batches:
                yield [(self.view, index) for index in itertools.islice(indices, len(batch))]


def view_order(
    seed: int, view: int, count: int, places: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """The images that a view shows at some places of its order; computed, not stored.

    Views 2k and 2k + 1 are both random, but what one shows in its last half, the other shows in its
    first. The images that do not fill a global batch, always fewer than half, are the last ones: so
    two views show every image, whatever the batch size.

    Args:
        count: number of images.
        places: (P,) integers below `count`; None for all.
    Returns: (P,) int64 indices of images.
    """
    places = np.arange(count) if places is None else np.asarray(places)
    if view % 2:
        # Shuffle both halves and exchange them; the result are places in the order of the view
        # before.
        keys = seed_sequence(RandomUse.ORDER, seed, view).generate_state(2 * ROUNDS, np.uint64)
        half = count // 2
        is_first = places < count - half
        before = np.empty(len(places), np.int64)
        before[is_first] = half + permute(places[is_first], count - half, keys[:ROUNDS])
        before[~is_first] = permute(places[~is_first] - (count - half), half, keys[ROUNDS:])
        places, view = before, view - 1
    keys = seed_sequence(RandomUse.ORDER, seed, view).generate_state(ROUNDS, np.uint64)
    return permute(places, count, keys)


class EvalBatches(Sampler[list[tuple[int, int]]]):
    """The evaluation batches of one rank; over all ranks every image once, without padding."""

    def __init__(self, count: int, batch_size: int, shared: bool) -> None:
        self.batch_size, self.view, self.first_batch = batch_size, 0, 0
        self.images = (
            range(distributed.rank(), count, distributed.world_size()) if shared else range(count)
        )
        self.batches_in_epoch = math.ceil(len(self.images) / batch_size)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Every evaluation shows the same images in the same order."""

    def places(self, batch: int) -> range:
        """The images of one batch of this rank."""
        return self.images[batch * self.batch_size : (batch + 1) * self.batch_size]

    def __len__(self) -> int:
        return self.batches_in_epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(self.first_batch, self.batches_in_epoch):
            yield [(self.view, index) for index in self.places(batch)]


ROUNDS = 10  # of `permute`: with 6, pairs of places among 12 are measurably uneven
LEAST_SIDE = 4  # of `permute`: with 3, many permutations of 4 to 7 numbers would never occur


def permute(positions: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """What a pseudo-random permutation of 0…count-1 puts at some positions; nothing is stored.

    A Feistel network on the numbers below side * side >= count. A number that it sends beyond the
    count goes through the network again until it is below ('cycle-walking'). Both are of Black and
    Rogaway, 'Ciphers with arbitrary finite domains', 2002. The function of a round is SplitMix64
    (Steele, Lea and Flood, 'Fast splittable pseudorandom number generators', 2014): its output
    number `right`, from the state `key`.

    Args:
        positions: (P,) integers below `count`.
        keys: (ROUNDS,) random uint64; each gives another permutation.
    Returns: (P,) int64, all different if the positions are.
    """
    side = np.uint64(max(LEAST_SIDE, math.isqrt(count) + 1))
    numbers = np.array(positions, np.uint64)
    outside: slice | np.ndarray = slice(None)
    while len(numbers[outside]):
        left, right = np.divmod(numbers[outside], side)
        for key in keys:
            left, right = right, (left + _split_mix(key, right)) % side
        numbers[outside] = left * side + right
        outside = np.flatnonzero(numbers >= count)
    return numbers.astype(np.int64)


def _split_mix(state: np.uint64, steps: np.ndarray) -> np.ndarray:
    """Outputs of SplitMix64 so many steps after a state, uint64 modulo 2**64."""
    z = state + steps * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
