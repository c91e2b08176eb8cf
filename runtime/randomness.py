"""Seeds: each use of random numbers has a stream of its own, a function of its key alone."""

import random
from enum import IntEnum

import numpy as np
import torch


class RandomUse(IntEnum):
    """What random numbers are drawn for, and the key that follows it."""

    WEIGHTS = 1  # seed
    AUGMENTATION = 2  # seed, view, image
    STEP = 3  # seed, epoch, batch, rank; dropout and drop path
    BLOCK_MIXUP = 4  # seed, view, block
    PAIR_MIXUP = 5  # seed, view, block of pairs
    ORDER = 6  # seed, view


def seed_sequence(use: RandomUse, *key: int) -> np.random.SeedSequence:
    """A seed that is a function of the use and its key alone.

    SeedSequence hashes both, so neighboring keys give unrelated streams, and no two uses share a
    stream. (The key by itself would be padded with zeros: 3 and 3, 0 are one seed.)
    """
    return np.random.SeedSequence(key, spawn_key=(use,))


def seed_of(use: RandomUse, *key: int) -> int:
    """64 bits of a seed, see `seed_sequence`. Takes 10 us, and more between other work."""
    return int(seed_sequence(use, *key).generate_state(1, np.uint64)[0])


def seed_rng(device: torch.device, use: RandomUse, *key: int) -> None:
    """Seed Python, NumPy and torch (CPU and `device`); see `seed_sequence`."""
    plant_seed(device, seed_of(use, *key))


def plant_seed(device: torch.device, seed: int) -> None:
    """Seed Python, NumPy and torch (CPU and `device`) with the number itself."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would also queue a seed for every GPU, which costs a stack trace per call
    # before CUDA is initialized, as in every loader worker.
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
