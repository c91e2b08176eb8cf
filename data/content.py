"""Image files known by their bytes: a hash per file, and an index of the files that were read."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from runtime.distributed import log
from utils import UserError, replacing

THREADS = max(16, os.cpu_count() or 1)  # each look costs a round trip on a network file system
ROW = np.dtype([("size", "<i8"), ("time", "<i8"), ("hash", "<u8", 2)])  # 32 bytes per image


class Encoded(Protocol):
    """Images in files; see data.sources.ImageSource."""

    def stamp(self, index: int) -> tuple[int, int]: ...

    def open(self, index: int) -> IO[bytes]: ...

    def path(self, index: int) -> str: ...


def stamps(source: Encoded, positions: np.ndarray) -> np.ndarray:
    """(P,) integers -> (P, 2) int64: sizes of files, and times of modification in nanoseconds"""

    def look(positions: np.ndarray) -> list[tuple[int, int]]:
        return [source.stamp(index) for index in positions.tolist()]

    return np.array(in_threads(look, positions), np.int64).reshape(-1, 2)


def in_threads(look: Callable[[Any], list[Any]], items: Sequence[Any] | np.ndarray) -> list[Any]:
    """What `look` returns of successive parts of the items, joined in order."""
    size = -(-len(items) // THREADS) or 1
    with ThreadPoolExecutor(THREADS) as pool:
        parts = pool.map(look, (items[at : at + size] for at in range(0, len(items), size)))
        return [item for part in parts for item in part]


class ContentIndex:
    """Hashes of the bytes of image files, kept so that only files with new stamps are read again.

    The index is a file without names: its own name stands for the list of the images' names, and
    its rows are in their order. If it is deleted or damaged, all files are read again.

    Args:
        folder: that holds the index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.changed: list[str] = []  # paths of files whose bytes are not those of the index

    def begin(self, listing: str) -> None:
        """Read the index of images with this hash of their names."""
        self.path = self.folder / f"images-{listing}.npy"
        self.rows: list[np.ndarray] = []
        self.begun = self.files_read = 0
        self.before = np.empty(0, ROW)
        with suppress(OSError, ValueError, EOFError):  # absent, or not what `save` wrote
            before = np.load(self.path)
            if before.dtype == ROW and before.ndim == 1:
                self.before = before

    def hashes(self, source: Encoded, positions: np.ndarray) -> np.ndarray:
        """(P,) positions of the next images -> (P, 2) uint64, the first half of their SHA-256.

        Raises: OSError for a file that cannot be read.
        """
        rows = np.zeros(len(positions), ROW)
        rows["size"], rows["time"] = stamps(source, positions).T
        before = self.before[self.begun : self.begun + len(rows)]
        self.begun += len(rows)
        is_known = np.zeros(len(rows), bool)
        is_known[: len(before)] = (before["size"] == rows["size"][: len(before)]) & (
            before["time"] == rows["time"][: len(before)]
        )
        rows["hash"][: len(before)] = before["hash"]
        unknown = np.flatnonzero(~is_known)
        if len(unknown) and not self.files_read:
            log(f"{self.folder}: reading the image files, to know them by their bytes from now on")
        self.files_read += len(unknown)

        def digests(positions: np.ndarray) -> list[bytes]:
            found = []
            for index in positions.tolist():
                try:
                    with source.open(index) as file:
                        found.append(hashlib.sha256(file.read()).digest()[:16])
                except OSError as error:  # of a tar file, without the name of the image
                    raise OSError(
                        error.errno, error.strerror or str(error), source.path(index)
                    ) from error
            return found

        found = b"".join(in_threads(digests, positions[unknown]))
        rows["hash"][unknown] = np.frombuffer(found, "<u8").reshape(-1, 2)
        differs = (before["hash"] != rows["hash"][: len(before)]).any(axis=1)
        self.changed += [source.path(index) for index in positions[: len(before)][differs].tolist()]
        self.rows.append(rows)
        return np.ascontiguousarray(rows["hash"])

    def save(self) -> None:
        """Write what was read; a folder that takes no file costs the next run another reading."""
        if self.files_read:
            try:
                with replacing(self.path, "cache") as temporary, open(temporary, "wb") as file:
                    np.save(file, np.concatenate(self.rows))
            except UserError as error:
                what = f"Warning: {self.path}: could not be written ({error.__cause__})"
                log(f"{what}; the next run reads the images again")
