"""A teacher's logits on disk: the first run that asks keeps them, every later one reads them.

A store is a folder: `manifest.json` says what the logits were made with, `view-<n>.logits` holds a
row for each image of view n in the order in which that view shows them (datasets.view_order), and
`view-<n>.valid` a byte for each row that is there. `val-<hash>` is the same for validation images.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import utils
from utils import UserError, log

PENDING_BYTES = 2**25  # logits that wait for being written; each write waits for the device
SAME_IMAGE = 0.05  # of normalised pixels' means; processors differ by rounding, far below


class RowFormat:
    """How a row of logits is kept.

    Args:
        num_classes: C.
        dtype: 'float16' or 'float32', of the logits.
        topk: keep only so many of the largest, and of the others' probability its sum, spread
            evenly over them; None or C keeps all.
        temperature: at which that sum is taken (and so exact).
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

    def encode(self, logits: torch.Tensor) -> np.ndarray:
        """(N, C) float, on any device -> (N,) rows. Raises: UserError for what does not fit."""
        logits = logits.float()
        if self.topk:
            largest = logits.topk(self.topk, dim=1)
            others = logits.scatter(1, largest.indices, -math.inf) / self.temperature
            rest = others.logsumexp(dim=1) - math.log(self.num_classes - self.topk)
            rows = np.empty(len(logits), self.dtype)
            with np.errstate(over="ignore"):
                rows["values"] = largest.values.cpu().numpy()
            rows["classes"] = largest.indices.cpu().numpy()
            rows["rest"] = (self.temperature * rest).cpu().numpy()
            values = rows["values"]
        else:
            with np.errstate(over="ignore"):
                rows = values = logits.cpu().numpy().astype(self.value)
        if not np.isfinite(values).all():
            raise UserError(
                "--teacher_cache: the teacher's logits are not finite, or too large for "
                f"--teacher_cache_dtype {self.value}; nothing of this was kept. Try float32, and "
                "look at the teacher's score"
            )
        return rows

    def decode(self, rows: np.ndarray) -> torch.Tensor:
        """(N,) rows -> (N, C) float32"""
        if not self.topk:
            return torch.from_numpy(rows.astype(np.float32))
        logits = torch.from_numpy(rows["rest"][:, None].repeat(self.num_classes, axis=1))
        classes = torch.from_numpy(rows["classes"].astype(np.int64))
        return logits.scatter_(1, classes, torch.from_numpy(rows["values"].astype(np.float32)))


class LogitFile:
    """Rows of logits, and in a file beside it which of them are there.

    Rows are written and flushed before they are marked, so whatever kills the process leaves no
    mark without its row; and those marked already are left alone, so several processes may fill one
    file. Plain writes, not through the memory map: a full disk is then an error, not a signal.

    Args:
        count: rows.
        needed: how many of them, from the first, are ever asked for; None for all.
    """

    def __init__(
        self, stem: Path, count: int, row_format: RowFormat, needed: int | None = None
    ) -> None:
        self.stem, self.format = stem, row_format
        self.rows = self._map(".logits", count, row_format.dtype)
        self.valid = self._map(".valid", count, np.dtype(np.uint8))
        self.is_whole = self.first_missing(needed or count) == (needed or count)

    def _map(self, suffix: str, count: int, dtype: np.dtype) -> np.ndarray:
        path, size = self.stem.with_suffix(suffix), count * dtype.itemsize
        if not path.exists() or path.stat().st_size < size:
            with open(path, "ab") as file:  # never shortens what another process has begun
                file.truncate(size)
        # As a plain array: np.memmap's own slices take several times as long.
        return np.asarray(np.memmap(path, dtype, "r", shape=count))

    def read(self, places: range) -> torch.Tensor | None:
        """Logits of these rows, (N, C); None where not all of them are there."""
        rows = slice(places.start, places.stop, places.step)
        is_there = self.is_whole or self.valid[rows].all()
        return self.format.decode(self.rows[rows]) if is_there else None

    def first_missing(self, end: int) -> int:
        """The first row before `end` that is not there; `end` where all are."""
        missing = self.valid[:end] == 0
        return int(missing.argmax()) if missing.any() else end

    def missing(self) -> int:
        return len(self.valid) - int(np.count_nonzero(self.valid))

    def write(self, answers: list[tuple[range, torch.Tensor]]) -> None:
        """Keep logits (N, C) of rows, where they are not there already.

        Raises: UserError where the file system refuses.
        """
        if not answers:
            return
        try:
            self._write(answers)
        except OSError as error:
            raise UserError(
                f"--teacher_cache: {self.stem}: {error}; free some space or give another folder, "
                "then type the same command: what is kept already is whole"
            ) from error

    def _write(self, answers: list[tuple[range, torch.Tensor]]) -> None:
        places = np.concatenate([np.asarray(places) for places, _ in answers])
        rows = self.format.encode(torch.cat([logits for _, logits in answers]))
        is_new = self.valid[places] == 0
        order = np.argsort(places[is_new], kind="stable")
        places, rows = places[is_new][order], rows[is_new][order]
        if not len(places):
            return  # another process was here first
        starts = np.flatnonzero(np.diff(places, prepend=-2) != 1)  # of runs without a gap
        runs = list(zip(starts, [*starts[1:], len(places)], strict=True))
        row_bytes = self.format.dtype.itemsize
        with open(self.stem.with_suffix(".logits"), "r+b", buffering=0) as file:
            for first, last in runs:
                self._put(file, places[first] * row_bytes, rows[first:last].tobytes())
            os.fsync(file.fileno())
        with open(self.stem.with_suffix(".valid"), "r+b", buffering=0) as file:
            for first, last in runs:
                self._put(file, places[first], b"\1" * int(last - first))

    def _put(self, file: Any, position: int, content: bytes) -> None:
        file.seek(int(position))
        while content:
            content = content[file.write(content) :]


class LogitStore:
    """The folder: one LogitFile a view, each opened when it is asked for.

    Args:
        images: rows of a view.
        needed: how many of them, from the first, a run shows.
    """

    def __init__(self, folder: Path, images: int, needed: int, row_format: RowFormat) -> None:
        self.folder, self.images, self.needed, self.format = folder, images, needed, row_format
        self.number, self.file = -1, None
        self.pending: list[tuple[range, torch.Tensor]] = []
        self.pending_bytes = 0

    def view(self, number: int) -> LogitFile:
        if number != self.number:
            self.flush()
            self.file = LogitFile(self._stem(number), self.images, self.format, self.needed)
            self.number = number
        return self.file

    def _stem(self, number: int) -> Path:
        return self.folder / f"view-{number:05d}"

    def lacking(self, views: range) -> int:
        """How many rows these views still want."""
        return sum(self._lacking(number) for number in views)

    def _lacking(self, number: int) -> int:
        path = self._stem(number).with_suffix(".valid")
        if not path.exists():
            return self.needed
        return self.needed - int(np.count_nonzero(np.fromfile(path, np.uint8, self.needed)))

    def check_space(self, views: range) -> int:
        """Print what these views take and what is there of it.

        Returns: how many of their rows are not there on some process.
        Raises: UserError where the disk is too small for them.
        """
        lacking = self.lacking(views)
        size, total = self.format.dtype.itemsize, len(views) * self.needed
        free = shutil.disk_usage(self.folder).free
        log(
            f"Teacher cache {self.folder}: {len(views)} view(s) of {self.needed:,} images, "
            f"{size:,} bytes each, take {_in_words(total * size)}; {total - lacking:,} of "
            f"{total:,} rows are there"
        )
        if lacking * size > free:
            raise UserError(
                f"--teacher_cache {self.folder}: needs {_in_words(lacking * size)} more, and "
                f"{_in_words(free)} are free; give fewer --teacher_views, a small "
                "--teacher_cache_topk, or another folder"
            )
        return lacking

    def keep(self, view: int, places: range, logits: torch.Tensor) -> None:
        """Take logits (N, C) to be written; a later flush() does it."""
        self.view(view)
        self.pending.append((places, logits.detach()))
        self.pending_bytes += logits.numel() * logits.element_size()
        if self.pending_bytes >= PENDING_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is pending."""
        if self.pending:
            self.file.write(self.pending)
            self.pending, self.pending_bytes = [], 0

    def validation(self, data: Any) -> LogitFile:
        """The file of the teacher's logits on the validation images, whole and in float32."""
        name = _hash([data.val.fingerprint(), data.config])
        row_format = RowFormat(self.format.num_classes, "float32")
        return LogitFile(self.folder / f"val-{name}", len(data.val), row_format)


class KeptBatches:
    """A file's logits, batch by batch as an evaluation asks for them."""

    def __init__(self, file: LogitFile, batches: Any) -> None:
        self.file, self.batches = file, batches

    def __getitem__(self, batch: int) -> torch.Tensor:
        return self.file.read(self.batches.places(batch))

    def with_targets(
        self, targets: np.ndarray, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of logits (B, C) and targets (B,), in place of a loader's images and targets."""
        for batch in range(self.batches.batches_in_epoch):
            places = np.asarray(self.batches.places(batch))
            yield self[batch].to(device), torch.from_numpy(targets[places]).to(device)


class StoredTeacher:
    """A teacher whose answers are kept: asked itself only for batches that the store lacks.

    Args:
        loader: tells `view` and `places` of the batch it gave last.
        teacher: images (B, 3, H, W) -> logits (B, C); None where the store lacks nothing.
    """

    def __init__(self, store: LogitStore, loader: Any, teacher: nn.Module | None) -> None:
        self.store, self.loader, self.teacher = store, loader, teacher

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, C)"""
        view, places = self.loader.view, self.loader.places
        logits = self.store.view(view).read(places)
        if logits is not None:
            # Only a copy from page-locked memory does not wait for the GPU.
            logits = logits.pin_memory() if images.is_cuda else logits
            return logits.to(images.device, non_blocking=True)
        if self.teacher is None:
            raise UserError(
                f"--teacher_cache {self.store.folder}: rows {places.start} to {places.stop - 1} of "
                f"view {view} went while the run was on; type the same command to make them again"
            )
        logits = self.teacher(images)
        self.store.keep(view, places, logits)
        return logits


# What an image and the teacher's answer to it follow from; the rest of the flags may change.
FLAGS = (
    *("seed", "input_size", "imagenet_default_mean_and_std", "color_jitter", "aa", "hflip"),
    *("train_interpolation", "reprob", "remode", "recount"),
    *("teacher_arch", "teacher_norm", "teacher_input_size", "teacher_dtype"),
    *("teacher_cache_dtype", "teacher_cache_topk"),
)
MIXUP_FLAGS = (
    *("mixup_mode", "mixup", "cutmix", "cutmix_minmax", "mixup_prob", "mixup_switch_prob"),
)


def open_store(args: Any, data: Any, amp_dtype: torch.dtype | None) -> LogitStore:
    """The store that --teacher_cache names, made or proven to belong to this run.

    Args:
        args: the run's arguments.
        data: a datasets.Data of images in a fixed order.
    Raises: UserError where it was made with something else.
    """
    num_classes = len(data.classes)
    if args.teacher_cache_topk and args.teacher_cache_topk > num_classes:
        raise UserError(
            f"--teacher_cache_topk {args.teacher_cache_topk}: there are {num_classes} classes; "
            "give fewer, or leave it out"
        )
    folder = Path(args.teacher_cache)
    manifest = None
    if utils.is_main_process():
        manifest = claim(folder, describe(args, data, amp_dtype))
    utils.barrier()
    manifest = manifest or _read_manifest(folder / "manifest.json")
    row_format = RowFormat(
        *(num_classes, args.teacher_cache_dtype, args.teacher_cache_topk),
        temperature=manifest["note"]["kd_temperature"],
    )
    return LogitStore(folder, len(data.train), data.train_loader.batches.end, row_format)


def describe(args: Any, data: Any, amp_dtype: torch.dtype | None) -> dict[str, Any]:
    """Everything that a training image's logits depend on, in plain values."""
    fields = {"format": 1} | {name: getattr(args, name) for name in FLAGS}
    fields["amp_dtype"] = str(amp_dtype).removeprefix("torch.")
    files = [utils.local_file(path, "--teacher_path") for path in args.teacher_path.split(",")]
    fields["teacher_path"] = [f"sha256 {_hash_of_file(path)}" for path in files]
    names = utils.read_lines(args.teacher_classes, "--teacher_classes")
    fields["teacher_classes"] = names and _hash(names)
    if len(files) > 1:  # their average depends on the temperature
        fields |= {"teacher_weights": args.teacher_weights, "kd_temperature": args.kd_temperature}
    mixup = data.train_loader.mixup
    if mixup is not None:
        fields |= {name: getattr(args, name) for name in MIXUP_FLAGS}
        if args.mixup_mode != "pair":  # an image is mixed with one of its batch
            fields["batch_size"] = args.batch_size
    fields |= data.train.fingerprint()
    fields["augmented"] = data.train_loader.sample()
    versions = {p: importlib.metadata.version(p) for p in ("torch", "timm", "numpy", "pillow")}
    return fields | {"note": versions | {"kd_temperature": args.kd_temperature}}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _hash_of_file(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def claim(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write a store's manifest, or compare with the one that is there.

    Args:
        manifest: plain values by the names of the flags they follow from; 'augmented', a list of
            floats, is compared with some tolerance, 'note' not at all.
    Returns: the manifest of the store.
    Raises: UserError that names the first field that differs, both values and the remedy.
    """
    path = folder / "manifest.json"
    if not path.exists():  # a whole store may be on a disk that is only read
        utils.make_folder(str(folder), "--teacher_cache")
    try:
        with open(path, "x", encoding="utf-8") as file:  # of several runs at once, one creates it
            file.write(json.dumps(manifest, indent=1))
            file.flush()
            os.fsync(file.fileno())
        return manifest
    except FileExistsError:
        found = _read_manifest(path)
    for field, ours in manifest.items():
        theirs = found.get(field)
        if field == "note" or ours == theirs:
            continue
        if field == "augmented":
            if _is_close(ours, theirs):
                continue
            raise UserError(
                f"--teacher_cache {folder}: every flag is the same, but the augmented images are "
                f"not: other pixels, or other versions ({found.get('note')}; here "
                f"{manifest['note']}); use the same, or give another folder"
            )
        raise UserError(
            f"--teacher_cache {folder}: made with {field} {_short(theirs)}, this run has "
            f"{_short(ours)}; give the same, or another folder"
        )
    return found


def _read_manifest(path: Path) -> dict[str, Any]:
    for _ in range(20):  # whoever creates it writes it right after
        text = path.read_text(encoding="utf-8")
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            time.sleep(0.25)
    raise UserError(
        f"--teacher_cache: {path} is not whole, perhaps cut short; remove it and start again"
    )


def _is_close(ours: list[float], theirs: Any) -> bool:
    same_shape = isinstance(theirs, list) and len(theirs) == len(ours)
    return same_shape and max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < SAME_IMAGE


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _in_words(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"
