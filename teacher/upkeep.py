"""What is done to a teacher cache between runs: described, verified, merged with others, packed."""

import json
import os
import secrets
import shlex
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

import utils
from arguments.flags import COMPARED, FLAGS, IF_MIXED, with_cache
from arguments.kinds import as_typed
from teacher import packing
from teacher.logit_store import LogitFile, RowFormat, read_sums
from teacher.manifest import CONTENTS, MANIFEST, differing, read_manifest, row_format_of
from utils import UserError, few

CHUNK = 2**24  # bytes of rows that are looked at together


@dataclass
class Cache:
    """A cache in a folder, and what its manifest says."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """Of its files, without their endings: the views in order, then the validation images."""
        sums = (p for p in self.folder.glob("*.sums") if packing.MEMBER.fullmatch(p.name))
        stems = [path.stem for path in sums if path.stat().st_size]
        return sorted(stems, key=lambda name: (name.startswith("val-"), len(name), name))

    @property
    def indexes(self) -> list[Path]:
        """The files that keep hashes of images, see data.content.ContentIndex."""
        return sorted(self.folder.glob("images-*.npy"))

    def format(self, name: str) -> RowFormat:
        is_validation = name.startswith("val-")
        classes = self.manifest["classes"]
        return RowFormat(classes, "float32") if is_validation else row_format_of(self.manifest)

    def length(self, name: str) -> int:
        """Number of rows of a file, complete or not."""
        if name.startswith("val-"):
            return (self.folder / f"{name}.sums").stat().st_size // 4
        return self.manifest["images"]

    def sums(self, name: str) -> np.ndarray:
        """Checksums, (rows,) uint32; 0 for each row that is not complete."""
        return read_sums(self.folder / name, self.length(name), self.format(name))

    def open(self, name: str) -> LogitFile | None:
        """A file that has complete rows; else None."""
        if not (self.folder / f"{name}.sums").exists() or not self.sums(name).any():
            return None
        rest = self.length(name), self.format(name), self.manifest["id"]
        return LogitFile.open(self.folder / name, *rest)

    def parts(self, name: str) -> Iterator[range]:
        """The places of a file in ranges of a few megabytes."""
        count, step = self.length(name), max(1, CHUNK // self.format(name).dtype.itemsize)
        return (range(first, min(first + step, count)) for first in range(0, count, step))


def open_cache(path: str | Path) -> Cache:
    """The cache in a folder, a pack, or at the address of a pack. Raises: UserError."""
    folder = packing.local_cache(str(path))
    if not (manifest := read_manifest(folder)):
        raise UserError(f"{path}: is not a teacher cache, which has a {MANIFEST}; pass its folder")
    return Cache(folder, manifest)


def describe(cache: Cache, path: str) -> list[str]:
    """What a cache holds, for which images and teacher, and the flags that use it; lines of text.

    Args:
        path: how the user names the cache.
    """
    manifest, counts = cache.manifest, {n: np.count_nonzero(cache.sums(n)) for n in cache.names}
    images, size = manifest["images"], row_format_of(manifest).dtype.itemsize
    known = [field for field in manifest if field.startswith((CONTENTS, "pixels", "table"))]
    identity = ", ".join(f"{name} {manifest[name]}" for name in known or ["image_times"])
    kept = (
        f"the {manifest['teacher_cache_topk']} largest" if manifest["teacher_cache_topk"] else "all"
    )
    views = [(int(name[5:]), n) for name, n in counts.items() if name.startswith("view-")]
    lines = [
        f"images      {images:,} in {manifest['classes']:,} classes; {identity}",
        f"teacher     {manifest['teacher_arch']}, {', '.join(manifest['teacher_path'])}",
        f"logits      {kept}, {manifest['teacher_cache_dtype']}; {size:,} bytes per image and view",
    ]
    # Views in succession that hold equally many rows are on one line.
    for (count, _), group in groupby(enumerate(views), lambda v: (v[1][1], v[1][0] - v[0])):
        numbers = [number for _, (number, _) in group]
        which = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
        state = "whole" if count >= _shown(manifest) else "incomplete"
        lines.append(f"views       {which}: {count:,} of {images:,} rows, {state}")
    for name, count in counts.items():
        if name.startswith("val-"):
            lines.append(f"validation  {name}: {count:,} of {cache.length(name):,} rows")
    total = sum(path.stat().st_size for path in cache.folder.iterdir() if path.is_file())
    lines.append(f"bytes       {total:,}")
    flags = _flags_for(manifest, views[-1][0] + 1 if views else 1, path)
    return [*lines, f"flags       {shlex.join(flags)}"]


def _shown(manifest: dict[str, Any]) -> int:
    """How many rows of a view the runs that share a cache need."""
    images = manifest["images"]
    unit = manifest.get("batch_size") or (2 if manifest.get("mixup_mode") == "pair" else 1)
    return images - images % unit


def _flags_for(manifest: dict[str, Any], views: int, path: str) -> list[str]:
    """The flags with which a run uses a cache, as far as they are not defaults."""
    ratios = {name: manifest.get(name, 0) for name in ("mixup", "cutmix")}  # absent: not mixed
    values = {name: manifest.get(name) for name in with_cache(COMPARED, IF_MIXED)} | ratios
    values |= {"batch_size": manifest.get("batch_size"), "data_seed": manifest["seed"] or None}
    if manifest["amp_dtype"] != "None":
        values |= {"use_amp": True, "amp_dtype": manifest["amp_dtype"]}
    words = ["--teacher_cache", path, "--teacher_views", str(views), "--kd", "true"]
    for name, value in values.items():
        if value is not None and value != FLAGS[name].default:
            words += [f"--{name}", *map(as_typed, value if isinstance(value, list) else [value])]
    return [*words, "--teacher_path", "FILE"]


def damages(cache: Cache) -> list[str]:
    """What does not match its checksum, a line per file; all rows are read, by all cores."""

    def look(file: LogitFile, places: range) -> list[int]:
        _, is_complete, is_right = file.examine(places)
        return np.arange(places.start, places.stop)[is_complete & ~is_right].tolist()

    lines = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name in cache.names:
            try:
                if (file := cache.open(name)) is None:
                    continue
            except UserError as error:  # of a different length
                lines.append(str(error))
                continue
            found = pool.map(lambda places, file=file: look(file, places), cache.parts(name))
            if damaged := [place for part in found for place in part]:
                lines.append(
                    f"{cache.folder / name}.logits: {len(damaged):,} of {len(file.sums):,} rows do "
                    f"not match their checksums ({few(damaged)})"
                )
    return lines


def require_sound(cache: Cache) -> None:
    """Raise UserError if a row does not match its checksum."""
    if lines := damages(cache):
        raise UserError(f"{lines[0]}; cache.py verify {cache.folder} lists all, delete these files")


def merge(sources: Sequence[Cache], destination: Path) -> Cache:
    """Put the rows of caches of the same logits into one, which is created or added to.

    Nothing is written before all rows have been compared. If this is interrupted, the destination
    holds a part of the rows, and the same call goes on.

    Raises: UserError for caches of something else, for a row that is damaged, and for a row of a
        view that differs between two caches.
    """
    first, *others = sources
    if (destination / MANIFEST).exists():
        others.append(open_cache(destination))
    elif destination.is_file() or any(not utils.is_hidden(p.name) for p in destination.glob("*")):
        raise UserError(f"{destination}: is neither empty nor a teacher cache; pass another folder")
    for other in others:
        _check_alike(first, other)
    every = [first, *others]
    names = sorted({name for cache in every for name in cache.names})
    for name in names:
        for _ in _merged(every, name):
            pass
    if not (destination / MANIFEST).exists():
        utils.make_folder(destination)
        manifest = first.manifest | {"id": secrets.token_hex(16)}
        utils.write_whole(destination / MANIFEST, json.dumps(manifest, indent=1))
    merged = open_cache(destination)
    for name in names:
        length = next(cache.length(name) for cache in every if name in cache.names)
        rest = length, merged.format(name), merged.manifest["id"]
        file = LogitFile.open(destination / name, *rest)
        for places, rows in _merged(every, name):
            file.write_rows(places, rows)
    for path in (index for cache in every for index in cache.indexes):
        if not (destination / path.name).exists():
            with utils.replacing(destination / path.name) as temporary:
                shutil.copyfile(path, temporary)
    return merged


def _check_alike(first: Cache, other: Cache) -> None:
    fields = differing(first.manifest, other.manifest)
    values = [cache.manifest for cache in (first, other)]
    if not fields and first.manifest["teacher_cache_topk"]:  # the rest is exact at one temperature
        values, fields = [value["note"] for value in values], ["kd_temperature"]
        fields = fields if values[0]["kd_temperature"] != values[1]["kd_temperature"] else []
    if fields:
        here, there = (json.dumps(value.get(fields[0]))[:60] for value in values)
        raise UserError(
            f"{other.folder}: holds other logits than {first.folder}: {fields[0]} is {there} there "
            f"and {here} here; merge caches that were filled by the same command"
        )


def _merged(caches: Sequence[Cache], name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The complete rows of a file in any cache, and their places; of equals, the first.

    Teachers on different machines may answer in other last bits. Two such answers for one row of
    a view would train different students, and are refused; those on validation images are
    scores, of which the first is kept.
    """
    files = [file for cache in caches if (file := cache.open(name)) is not None]
    owner = next(cache for cache in caches if name in cache.names)
    for places in owner.parts(name) if files else ():
        merged = np.empty(len(places), files[0].format.dtype)
        origin = np.full(len(places), -1)  # the number of the file that a row is from
        for number, file in enumerate(files):
            rows, is_complete, is_right = file.examine(places)
            damaged = is_complete & ~is_right
            differs = (_bytes(rows) != _bytes(merged)).any(axis=1) & (origin >= 0) & is_complete
            if damaged.any():
                raise UserError(
                    f"{file.stem}.logits: row {places.start + damaged.argmax()} does not match its "
                    f"checksum; run cache.py verify {file.stem.parent}"
                )
            if differs.any() and not name.startswith("val-"):
                row = int(differs.argmax())
                raise UserError(
                    f"{file.stem.parent} and {files[origin[row]].stem.parent} hold different rows "
                    f"{places.start + row} of {name}; nothing was written. Delete {name}.logits "
                    f"and {name}.sums in one of them"
                )
            is_new = is_complete & (origin < 0)
            merged[is_new], origin[is_new] = rows[is_new], number
        kept = origin >= 0
        yield np.flatnonzero(kept) + places.start, merged[kept]


def _bytes(rows: np.ndarray) -> np.ndarray:
    return rows.view(np.uint8).reshape(len(rows), -1)


def pack(cache: Cache, destination: Path) -> int:
    """Write a cache into one file; returns its bytes. Raises: UserError for a damaged row."""
    if destination.exists():
        raise UserError(f"{destination}: exists already; pass another name, or remove it")
    if destination.suffix != ".tar":
        raise UserError(f"{destination}: a pack is a tar file; pass a name that ends in .tar")
    utils.make_folder(destination.parent)
    require_sound(cache)
    names = [name for name in cache.names if cache.open(name) is not None]
    # Checksums before their rows, since a run may be adding some: no sum is without its row.
    files = [cache.folder / f"{name}{end}" for name in names for end in (".sums", ".logits")]
    packing.pack([cache.folder / MANIFEST, *files, *cache.indexes], destination)
    return destination.stat().st_size
