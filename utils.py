"""What every other file may use: errors, randomness and small files."""

import math
import os
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch

# ------------------------------------------------------------------------------------- errors


class UserError(Exception):
    """A mistake that the user can correct; shown as one or two lines, without a traceback.

    Args:
        message: the value at fault, what is wrong with it, and what to do, in that order.
        subject: what the value is, such as 'checkpoint' or 'folder'; see `name_flags`.
    """

    def __init__(self, message: str, subject: str = "") -> None:
        super().__init__(message)
        self.subject = subject


@contextmanager
def name_flags(**flags: str) -> Iterator[None]:
    """Put a flag in front of a UserError that is raised inside and has that flag's subject.

    Most functions may be called from Python, where nobody typed a flag; so flags are named only by
    the code that read them: `with name_flags(checkpoint="--resume"): read_checkpoint(args.resume)`.
    """
    try:
        yield
    except UserError as error:
        if error.subject not in flags:
            raise
        raise UserError(f"{flags[error.subject]} {error}") from error


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two sets of plain values: name -> (old, new).

    Names that only `was` holds are left out, since an older or newer version wrote them.
    """
    return {name: (was[name], now[name]) for name in now if name in was and was[name] != now[name]}


def first_line(error: BaseException) -> str:
    """The first line of an error's text; libraries often append pages of advice."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def few(names: Iterable[object], most: int = 3) -> str:
    """The first few names, for an error message."""
    names = list(names)
    return ", ".join(map(str, names[:most])) + (" …" if len(names) > most else "")


# --------------------------------------------------------------------------------- randomness


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

    SeedSequence hashes both, so neighbouring keys give unrelated streams, and no two uses share a
    stream. (The key by itself would be padded with zeros: 3 and 3, 0 are one seed.)
    """
    return np.random.SeedSequence(key, spawn_key=(use,))


def seed_rng(device: torch.device, use: RandomUse, *key: int) -> None:
    """Seed Python, NumPy and torch (CPU and `device`); see `seed_sequence`."""
    seed = int(seed_sequence(use, *key).generate_state(1, np.uint64)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would also queue a seed for every GPU, which costs a stack trace per call
    # where CUDA is not initialised, as in every loader worker.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


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
    Returns: (P,) int64, all different where the positions are.
    """
    side = np.uint64(max(LEAST_SIDE, math.isqrt(count) + 1))
    found = np.array(positions, np.uint64)
    outside: slice | np.ndarray = slice(None)
    while len(found[outside]):
        left, right = np.divmod(found[outside], side)
        for key in keys:
            left, right = right, (left + _split_mix(key, right)) % side
        found[outside] = left * side + right
        outside = np.flatnonzero(found >= count)
    return found.astype(np.int64)


def _split_mix(state: np.uint64, steps: np.ndarray) -> np.ndarray:
    """Outputs of SplitMix64 so many steps after a state, uint64 modulo 2**64."""
    z = state + steps * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


# -------------------------------------------------------------------------------- small files


def read_lines(path: str) -> list[str]:
    """The lines of a text file that are not empty, without surrounding blanks.

    Raises: UserError for a file that cannot be read as text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot read this file ({error}); pass a text file", "text"
        ) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def make_folder(folder: str | Path) -> None:
    """Create a folder and prove that files can be written to it.

    Raises: UserError where they cannot.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(b"a full disk takes no byte")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write there ({error}); free some space or choose another folder",
            "folder",
        ) from error


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable (POSIX; elsewhere a folder cannot be opened)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def could_not_write(path: Path, error: Exception, subject: str = "output") -> UserError:
    """The error for a file of the run that the file system refuses."""
    free = shutil.disk_usage(path.parent).free / 2**20
    return UserError(
        f"{path}: could not be written ({first_line(error)}; {free:.1f} MiB free); free some space "
        "or choose another folder, then run the same command: older checkpoints are complete",
        subject,
    )
