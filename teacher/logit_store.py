"""Teacher logits on disk: the first run that needs them caches them, and later runs read them.

A store is a folder: `manifest.json` says what the logits were made with, `view-<n>.logits` holds a
row for each image of view n in the order of that view (data.order.view_order), and `view-<n>.sums`
a checksum for each row that is complete. `val-<hash>` is the same for validation images.
"""

import hashlib
import math
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

import utils
from data.loaders import Batch
from data.order import BatchOrder
from data.sources import hash_of_plain
from runtime import distributed
from runtime.device import has_streams, send
from utils import UserError, few

PENDING_BYTES = 2**25  # logits that are written together; each write waits for the disk
MOST_WRITES = 2  # that wait for the writer, so that a slow disk does not fill the memory
CPU = torch.device("cpu")


class RowFormat:
    """How a row of logits is stored.

    Args:
        num_classes: C.
        dtype: 'float16' or 'float32', of the logits.
        topk: store only the k largest logits, and the sum of the remaining probabilities, which
            `restore` spreads evenly over the remaining classes; None or C stores all logits.
        temperature: at which that sum is taken, and therefore exact.
    """

    def __init__(
        self, num_classes: int, dtype: str, topk: int | None = None, temperature: float = 1.0
    ) -> None:
        self.num_classes, self.temperature = num_classes, temperature
        self.topk = topk if topk and topk < num_classes else None
        self.value = np.dtype(dtype)
        if self.topk:
            index = np.uint16 if num_classes <= 2**16 else np.uint32
            self.dtype = np.dtype(
                [("values", self.value, topk), ("classes", index, topk), ("rest", np.float32)]
            )
        else:
            self.dtype = np.dtype((self.value, num_classes))

    def shorten(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(N, C) float -> what is stored of them, on the same device, without waiting for it.

        Returns: all logits (N, C), or the k largest (N, k), their classes (N, k), and the mean of
            the remaining logits (N,), in which their probabilities have the same sum.
        """
        logits = logits.detach().float()
        value = getattr(torch, self.value.name)
        if not self.topk:
            return (logits.to(value),)
        largest = logits.topk(self.topk, dim=1)
        others = logits.scatter(1, largest.indices, -math.inf) / self.temperature
        rest = others.logsumexp(dim=1) - math.log(self.num_classes - self.topk)
        return largest.values.to(value), largest.indices, self.temperature * rest

    def restore(self, *parts: torch.Tensor) -> torch.Tensor:
        """The parts that `shorten` returned -> (N, C) float32, on the same device."""
        if len(parts) == 1:
            return parts[0].float()
        values, classes, rest = parts
        return rest[:, None].repeat(1, self.num_classes).scatter_(1, classes, values.float())

    def encode(self, *parts: torch.Tensor) -> np.ndarray:
        """The parts that `shorten` returned -> (N,) rows. Raises: UserError beyond the range."""
        arrays = [part.cpu().numpy() for part in parts]
        if not all(np.isfinite(array).all() for array in arrays):
            raise UserError(
                f"the teacher's logits are not finite, or too large for {self.value}, the data "
                "type of the teacher cache; these logits were not stored. Try float32, and look at "
                "the teacher's score"
            )
        if not self.topk:
            return arrays[0]
        rows = np.empty(len(arrays[0]), self.dtype)
        rows["values"], rows["classes"], rows["rest"] = arrays
        return rows

    def decode(self, rows: np.ndarray, device: torch.device = CPU) -> torch.Tensor:
        """(N,) rows -> (N, C) float32. The rows are sent as they are stored, and restored there."""
        arrays = [rows]
        if self.topk:
            values, classes, rest = (rows[name] for name in ("values", "classes", "rest"))
            arrays = [values.copy(), classes.astype(np.int64), rest.copy()]
        return self.restore(*(send(torch.from_numpy(array), device) for array in arrays))


class LogitFile:
    """Rows of logits, and a file beside them with a checksum per row, which is 0 until it is there.

    Rows are written and flushed before their checksums, so a kill at any moment leaves no checksum
    without its row. Complete rows are never written again, and a lock lets one process write at a
    time, so several may fill one file. Every row is compared with its checksum when it is read.
    Rows are written with plain writes, not through the memory map: a full disk is then an error and
    not a signal.

    Args:
        rows: memory map of the logits.
        sums: memory map of the checksums, (rows,) uint32.
        store_id: makes the checksums those of one store.
    """

    def __init__(
        self, stem: Path, row_format: RowFormat, rows: np.ndarray, sums: np.ndarray, store_id: str
    ) -> None:
        self.stem, self.format, self.rows, self.sums = stem, row_format, rows, sums
        size = row_format.dtype.itemsize  # even, whatever the format
        self._word = np.dtype(np.uint32 if size % 4 == 0 else np.uint16)
        key = f"{store_id} {stem.name}".encode()
        weights = hashlib.shake_256(key).digest(8 * (1 + size // self._word.itemsize))
        self._weights = np.frombuffer(weights, np.uint64)

    @classmethod
    def open(cls, stem: Path, count: int, row_format: RowFormat, store_id: str) -> "LogitFile":
        """Open a file of `count` rows, or create it without any complete row.

        Raises: UserError for a file of a different length.
        """
        read_sums(stem, count, row_format)  # for its checks
        rows = _map(stem.with_suffix(".logits"), count, row_format.dtype)
        sums = _map(stem.with_suffix(".sums"), count, np.dtype(np.uint32))
        return cls(stem, row_format, rows, sums, store_id)

    def read(self, places: range, device: torch.device = CPU) -> torch.Tensor | None:
        """Logits of these rows, (N, C) on a device; None if not all of them are complete.

        Raises: UserError if all are complete and one is not what was written.
        """
        rows, is_complete, is_right = self.examine(places)
        if is_right.all():
            return self.format.decode(rows, device)
        if not is_complete.all():
            return None
        damaged = np.asarray(places)[~is_right]
        raise UserError(
            f"{self.stem}.logits: {len(damaged)} of the rows {places[0]} to {places[-1]} do not "
            f"match their checksums ({few(damaged)}): they were changed, cut off, or come from "
            f"another view or cache; {_remedy(self.stem)}",
            "cache",
        )

    def will_need(self, places: range) -> None:
        """Have these rows read from the disk soon; does not wait, and does nothing on Windows."""
        mapped: Any = self.rows.base
        size = self.format.dtype.itemsize
        start = places.start * size // mmap.PAGESIZE * mmap.PAGESIZE
        if places and hasattr(mapped, "madvise"):
            mapped.madvise(mmap.MADV_WILLNEED, start, places.stop * size - start)

    def require(self, places: range, what: str, device: torch.device = CPU) -> torch.Tensor:
        """The same, or UserError if not all rows are complete any more: `what` disappeared."""
        if (logits := self.read(places, device)) is None:
            raise UserError(
                f"{self.stem.parent}: cached logits {places[0]}-{places[-1]} of {what} disappeared "
                "during training; run the same command again to recompute them",
                "cache",
            )
        return logits

    def examine(self, places: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows at some places, which are complete, and which match their checksums; (N,) each

        The rows are copies, so that what is checked is what is used.
        """
        chosen = slice(places.start, places.stop, places.step)
        sums = np.array(self.sums[chosen])  # copied before the rows, which may be in the making
        rows = np.array(self.rows[chosen])
        positions = np.arange(places.start, places.stop, places.step)
        return rows, sums != 0, sums == self._checksums(rows, positions)

    def _checksums(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """(N,) rows and their places -> (N,) uint32, none of them 0.

        The upper half of a sum of the place and the words of a row, each times a random number of
        64 bits, modulo 2**64. The numbers follow from the store and the name of the file, so a
        different row, place, file or store has a different checksum but for 1 in 2**32 (Lemire
        and Kaser, 'Strongly universal string hashing is fast', 2014). This takes a third of the
        time of a CRC.
        """
        words = rows.view(self._word).reshape(len(rows), -1)  # (N, W)
        # Not words @ weights: numpy's product of integers takes twice as long.
        sums = np.einsum("ij,j->i", words, self._weights[1:], dtype=np.uint64)
        sums += places.astype(np.uint64) * self._weights[0]
        return np.maximum(sums >> np.uint64(32), 1).astype(np.uint32)

    def first_missing(self, end: int) -> int:
        """The first row before `end` that is not complete; `end` if all are."""
        missing = self.sums[:end] == 0
        return int(missing.argmax()) if missing.any() else end

    def missing(self) -> int:
        """Number of rows that are not complete."""
        return len(self.sums) - int(np.count_nonzero(self.sums))

    def write(self, pending: list[tuple[range, tuple[torch.Tensor, ...]]]) -> None:
        """Store what RowFormat.shorten made of the logits of rows, unless a row is complete.

        Raises: UserError if the file system refuses.
        """
        if not pending:
            return
        places = np.concatenate([np.asarray(places) for places, _ in pending])
        # Joined by numpy, since each thread that uses torch may start threads of its own.
        self.write_rows(places, np.concatenate([self.format.encode(*p) for _, p in pending]))

    def write_rows(self, places: np.ndarray, rows: np.ndarray) -> None:
        """Store (N,) rows at (N,) places, unless a row is complete.

        Raises: UserError if the file system refuses.
        """
        order = np.argsort(places, kind="stable")
        try:
            with (
                open(self.stem.with_suffix(".sums"), "r+b", buffering=0) as marks,
                open(self.stem.with_suffix(".logits"), "r+b", buffering=0) as file,
            ):
                utils.lock(marks)
                utils.lock(file)  # too: NFS writes whole pages of a file that is not locked
                order = order[self.sums[places[order]] == 0]
                if not len(order):
                    return  # another process stored them first
                places, rows = places[order], rows[order]
                sums = self._checksums(rows, places)
                starts = np.flatnonzero(np.diff(places, prepend=-2) != 1)  # of runs without a gap
                runs = list(zip(starts, [*starts[1:], len(places)], strict=True))
                for first, last in runs:
                    # Not copied: that would stop all threads of this process for milliseconds.
                    content = rows[first:last].view(np.uint8).reshape(-1).data
                    self._write_at(file, places[first] * rows[0].nbytes, content)
                os.fsync(file.fileno())
                for first, last in runs:
                    self._write_at(marks, places[first] * sums.itemsize, sums[first:last].tobytes())
        except OSError as error:
            raise utils.could_not_write(self.stem, error, "cache") from error

    def _write_at(self, file: FileIO, position: int, content: bytes | memoryview) -> None:
        file.seek(int(position))
        while content:
            content = content[file.write(content) :]


def read_sums(stem: Path, count: int, row_format: RowFormat) -> np.ndarray:
    """Checksums of a file of `count` rows, (count,) uint32; 0 for each row that is not complete.

    They are mapped and not read: those of 100 million rows take 400 MB.

    Raises: UserError for a file of a different length. A file without complete rows may be empty or
        absent, since creating it may have been interrupted.
    """
    path, sums = stem.with_suffix(".sums"), np.zeros(count, np.uint32)
    if _size(path):
        _check_size(path, sums.nbytes)
        sums = _map(path, count, sums.dtype)
    path = stem.with_suffix(".logits")
    if _size(path) or sums.any():
        _check_size(path, count * row_format.dtype.itemsize)
    return sums


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_size(path: Path, expected: int) -> None:
    size = _size(path)
    if size != expected:
        state = f"has {size:,} bytes" if path.exists() else "does not exist"
        cause = "was cut off" if 0 < size < expected else "is of another cache"
        cause = cause if path.exists() else "was deleted"
        raise UserError(
            f"{path}: {state}, but must have {expected:,} bytes: it {cause}; "
            f"{_remedy(path.with_suffix(''))}",
            "cache",
        )


def _remedy(stem: Path) -> str:
    return (
        f"delete {stem.name}.logits and {stem.name}.sums in that folder, then run the same "
        "command: it computes their rows again"
    )


def _map(path: Path, count: int, dtype: np.dtype) -> np.ndarray:
    """Map `count` items of a file into memory, read-only; an empty or absent file grows first."""
    size = count * dtype.itemsize
    if _size(path) < size:
        try:
            with open(path, "ab") as file:  # never shortens what another process has begun
                file.truncate(size)
        except OSError as error:
            raise utils.could_not_write(path, error, "cache") from error
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        # A plain array, since slicing an np.memmap takes several times as long.
        return np.ndarray(count, dtype, mapped)
    except OSError as error:
        raise UserError(
            f"{path}: this file system does not map files into memory ({error}); use a folder on "
            "another file system, such as a local disk",
            "cache",
        ) from error


class LogitStore:
    """The folder: one LogitFile per view, opened when a row of that view is asked for.

    A thread writes, so that no training step waits for the disk. What it raises is raised by the
    next `put` or `flush`.

    Args:
        images: rows per view.
        needed: how many of them, from the first, a run shows.
        store_id: random, from the manifest.
    """

    def __init__(
        self, folder: Path, images: int, needed: int, row_format: RowFormat, store_id: str
    ) -> None:
        self.folder, self.images, self.needed = folder, images, needed
        self.format, self.id = row_format, store_id
        self._view = -1
        self._file: LogitFile | None = None
        self._pending: list[tuple[range, tuple[torch.Tensor, ...]]] = []
        self._pending_bytes = 0
        self._writer = ThreadPoolExecutor(1)  # its thread starts with the first write
        self._writes: deque[Future[None]] = deque()

    def file_of(self, view: int) -> LogitFile:
        """The file of a view; hands what is pending for the view before it to the writer."""
        if view != self._view or self._file is None:
            self._hand_over()
            self._file = LogitFile.open(self._stem(view), self.images, self.format, self.id)
            self._view = view
        return self._file

    def _stem(self, view: int) -> Path:
        return self.folder / f"view-{view:05d}"

    def missing(self, views: range) -> int:
        """How many of the needed rows of these views are not complete.

        Raises: UserError for a file of a different length.
        """
        files = (read_sums(self._stem(view), self.images, self.format) for view in views)
        return sum(self.needed - int(np.count_nonzero(sums[: self.needed])) for sums in files)

    def put(self, view: int, places: range, logits: torch.Tensor) -> torch.Tensor:
        """Take logits (N, C) to be written by a later flush().

        Returns: what later runs will read of them, (N, C) float32 on the same device.
        """
        self.file_of(view)
        parts = self.format.shorten(logits)
        # The writer fetches them from a GPU; MPS is not for two threads.
        waiting = parts if has_streams(logits.device) else tuple(part.cpu() for part in parts)
        self._pending.append((places, waiting))
        self._pending_bytes += sum(part.nbytes for part in parts)
        if self._pending_bytes >= PENDING_BYTES:
            self._hand_over()
        self._finish(MOST_WRITES)
        return self.format.restore(*parts)

    def flush(self) -> None:
        """Write what is pending, and wait until it is on the disk."""
        self._hand_over()
        self._finish(0)

    def _hand_over(self) -> None:
        if self._pending and self._file is not None:
            self._writes.append(self._writer.submit(self._file.write, self._pending))
            self._pending, self._pending_bytes = [], 0

    def _finish(self, most: int) -> None:
        """Wait until at most so many writes are left. Raises: what a write that ended raised."""
        while self._writes and (len(self._writes) > most or self._writes[0].done()):
            self._writes.popleft().result()

    def validation_file(self, fingerprint: list[dict[str, Any]], images: int) -> LogitFile:
        """The file of logits on so many validation images, complete and in float32.

        The fingerprint tells these images and their preprocessing from others, in plain values.
        """
        row_format = RowFormat(self.format.num_classes, "float32")
        stem = self.folder / f"val-{hash_of_plain(fingerprint)}"
        return LogitFile.open(stem, images, row_format, self.id)


class ValidationLogits:
    """Cached logits on the validation images, by the places of a batch."""

    def __init__(self, file: LogitFile) -> None:
        self.file = file

    def __getitem__(self, places: range) -> torch.Tensor:
        """(B, C) float32 on the CPU"""
        return self.file.require(places, "the validation images")

    def batches(
        self, order: BatchOrder, targets: np.ndarray, device: torch.device
    ) -> Iterator[Batch]:
        """Batches with logits (B, C) in place of images, and targets (B,), to score the logits."""
        for number in range(order.batches_in_epoch):
            places = order.places(number)
            labels = torch.from_numpy(targets[np.asarray(places)])
            yield Batch(self[places].to(device), labels.to(device), order.view, places)


class StoredTeacher:
    """Cached logits in place of a teacher; the teacher computes only batches that are missing.

    Args:
        teacher: images (B, 3, H, W) -> logits (B, C); None if nothing is missing.
    """

    needs_key = True  # see distillation.StudentWithDistillation

    def __init__(
        self, store: LogitStore, teacher: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> None:
        self.store, self.teacher = store, teacher

    def __call__(self, images: torch.Tensor, key: tuple[int, range] | None) -> torch.Tensor:
        """(B, 3, H, W) -> (B, C)

        Args:
            key: (view, places) of the images, as the loader gave them with the batch.
        Raises: ValueError without a key, since any row might then be the wrong one.
        """
        if key is None:
            raise ValueError("cached logits are looked up by the key of a batch; pass its key")
        view, places = key
        file, device = self.store.file_of(view), images.device
        # The next batch of this process in the view: see data.order.EpochBatches.
        ahead = len(places) * distributed.world_size()
        end = min(places.stop + ahead, self.store.needed)
        file.will_need(range(places.start + ahead, end))
        if self.teacher is None:
            return file.require(places, f"view {view}", device)
        if (cached := file.read(places, device)) is not None:
            return cached
        return self.store.put(view, places, self.teacher(images))
