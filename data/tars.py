"""Images in tar files (WebDataset's shards), read at random through an index that is made once."""

import glob
import io
import itertools
import json
import os
import posixpath
import re
import tarfile
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch

from arguments.derived import name_both_splits, names_tars
from data.checks import with_progress
from data.content import THREADS
from data.labels import Folder, read_labels, sort_classes
from data.pictures import Picture, open_image, unreadable
from data.readers import ENDINGS, LeftOut
from data.sources import FileSource, ImageSource, Subset, hash_of
from runtime import distributed
from runtime.distributed import log
from utils import UserError, few, first_line, is_hidden, replacing

FORMAT = 2  # of the index; rises when an earlier one may be wrong
LABEL = ".cls"  # ends the name of WebDataset's file of a class, beside the image
UNUSED = f"{LABEL} without an image"
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}
PADDING = 2**20  # bytes of zeros at the end of a tar file that are usual: 10 KiB, or a few blocks
LIMIT = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1  # -1: none, or not known
MOST_OPEN = LIMIT // 2 if LIMIT > 0 else 256  # tar files that a process keeps open


class Shard(NamedTuple):
    """A tar file as it was when its index was made."""

    path: str
    size: int
    time: int  # of modification, in nanoseconds


@lru_cache(MOST_OPEN)
def _opened(shard: Shard) -> io.FileIO:
    """A shard, open to be read at any place by any process: pread moves no common position."""
    return io.FileIO(shard.path)


class TarSource(FileSource):
    """Images within tar files, named by their paths in them.

    Args:
        shards: the tar files.
        arrays: those of FileSource; (N,) int64, which shard holds an image, where its bytes begin
            there, and how many they are.
    """

    def __init__(
        self, shards: Sequence[Shard], arrays: list[np.ndarray], classes: Sequence[str]
    ) -> None:
        super().__init__("", arrays[:3], classes)
        self.shards, (self.shard_of, self.begins, self.sizes) = shards, arrays[3:]

    def load(self, index: int) -> Picture:
        try:
            file = self.open(index)
        except OSError as error:
            raise unreadable(self.path(index), error) from error
        return open_image(file, self.path(index))

    def path(self, index: int) -> str:
        return os.path.join(self.shards[self.shard_of[index]].path, super().path(index))

    def open(self, index: int) -> IO[bytes]:
        shard, size = self.shards[self.shard_of[index]], int(self.sizes[index])
        file = _opened(shard)
        status = os.fstat(file.fileno())  # also of one that was open before it was written anew
        if (status.st_size, status.st_mtime_ns) != shard[1:]:
            raise OSError(f"{shard.path} was changed while the run read it; run the command again")
        content = os.pread(file.fileno(), size, int(self.begins[index]))
        if len(content) < size:
            raise OSError("the tar file ends within it")
        return io.BytesIO(content)

    def stamp(self, index: int) -> tuple[int, int]:
        return int(self.sizes[index]), self.shards[self.shard_of[index]].time


# -------------------------------------------------------------------------------- the index


class Index(NamedTuple):
    """What is in some tar files: the images, in the order in which a folder lists them."""

    arrays: list[np.ndarray]  # of TarSource, with -1 as the target of an image without a class
    classes: list[str]  # names, in no order
    has_labels: bool  # whether files .cls name the classes, or else the folders in the tar files
    left_out: LeftOut

    def first_of(self, target: int) -> str:
        """The name of the first image with a target."""
        text, starts, targets = self.arrays[:3]
        index = int(np.flatnonzero(targets == target)[0])
        return os.fsdecode(text[starts[index] : starts[index + 1]].tobytes())


def find_shards(tars: str) -> list[Shard]:
    """The tar files of a folder, or of paths and globs that are separated by commas.

    Raises: UserError if there is none.
    """
    shards = set[str]()
    for part in [tars] if os.path.exists(tars) else tars.split(","):
        part = os.path.expanduser(part.strip())
        if os.path.isdir(part):
            files = glob.glob(os.path.join(glob.escape(part), "*"))
            found = [path for path in files if names_tars(path)]
            if name_both_splits(re.split("[^a-zA-Z]+", " ".join(map(os.path.basename, found)))):
                raise UserError(
                    f"{part}: names of tar files in it say both training and validation; pass each "
                    "with a glob in quotes (--data_path 'shards/*train*.tar', --eval_data_path)",
                    "folder",
                )
        elif os.path.isfile(part):
            found = [part]
        else:  # a glob, which may also find the index
            found = [path for path in glob.glob(part) if not path.endswith(".npz")]
        if not found:
            raise UserError(
                f"{part or tars}: no tar file; pass a folder of tar files, a glob in quotes "
                "('shards/*.tar'), or several of both with commas",
                "folder",
            )
        shards.update(found)
    try:
        stats = [(path, os.stat(path)) for path in sorted(shards)]
    except OSError as error:  # a link to nothing
        what = f"{error.filename}: cannot be read ({error.strerror}); copy it again, or remove it"
        raise UserError(what, "folder") from error
    return [Shard(path, status.st_size, status.st_mtime_ns) for path, status in stats]


def open_index(tars: str, shards: Sequence[Shard]) -> Index:
    """The index of tar files: the one that is kept, or a new one if the files are not as it says.

    It is kept beside the first of the tar files, or if that folder is read-only among torch's files
    in the user's cache.
    """
    folder = os.path.dirname(os.path.abspath(shards[0].path))
    names = "\0".join(os.path.relpath(shard.path, folder) for shard in shards)
    beside = f"index-{hash_of(os.fsencode(names))}.npz"
    own = f"index-{hash_of(os.fsencode(folder), os.fsencode(names))}.npz"
    paths = [Path(folder, beside), Path(torch.hub.get_dir(), "tars", own)]
    stamps = [list(shard[1:]) for shard in shards]
    for path in paths:
        try:
            with np.load(path) as file:
                *arrays, about = (file[name] for name in file.files)
            kept = json.loads(about.tobytes())
            if (kept["format"], kept["stamps"]) == (FORMAT, stamps):
                return Index(arrays, kept["classes"], kept["labels"], LeftOut(kept["left_out"]))
        except Exception:  # absent, cut short or of another kind: a new one is made
            continue
    index = _make_index(tars, shards)
    kept = {"format": FORMAT, "stamps": stamps, "classes": index.classes}
    kept |= {"labels": index.has_labels, "left_out": index.left_out}
    arrays = [*index.arrays, np.frombuffer(json.dumps(kept).encode(), np.uint8)]
    where = "cannot be kept, so each run makes it"
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, *arrays)
        except (OSError, UserError):
            continue
        where = f"kept in {path}"
        break
    log(f"{tars}: the index of {len(arrays[2])} images in {len(shards)} tar file(s) is {where}")
    return index


def _make_index(tars: str, shards: Sequence[Shard]) -> Index:
    names: list[str] = []
    columns = [array("q") for _ in range(4)]
    targets, shard_of, begins, sizes = columns
    classes: dict[str, int] = {}
    left_out = LeftOut()
    with ThreadPoolExecutor(THREADS) as pool:
        scans = with_progress(pool.map(_scan, shards), len(shards), "the headers of tar files")
        for number, (images, others) in enumerate(scans):
            left_out.update(others)
            for name, label, begin, size in images:
                names.append(name)
                targets.append(classes.setdefault(label, len(classes)) if label else -1)
                shard_of.append(number)
                begins.append(begin)
                sizes.append(size)
    if not names:
        raise UserError(f"{tars}: no image in them (left out: {left_out}); {ENDINGS}", "folder")
    has_labels = bool(classes) or UNUSED in left_out
    if not has_labels:
        for index, name in enumerate(names):
            folder, slash, _ = name.partition("/")
            targets[index] = classes.setdefault(folder, len(classes)) if slash else -1
    order = sorted(range(len(names)), key=lambda index: posixpath.split(names[index]))
    for before, index in itertools.pairwise(order):
        if names[before] == names[index]:
            first, second = (shards[shard_of[i]].path for i in (before, index))
            raise UserError(
                f"{tars}: {names[index]} is in {first} and again in {second}; names identify "
                "images, so write the tar files again with names that differ",
                "folder",
            )
    encoded = [os.fsencode(names[index]) for index in order]
    starts = np.cumsum([0, *map(len, encoded)])
    arrays = [np.frombuffer(b"".join(encoded), np.uint8), starts]
    arrays += [np.asarray(column)[order] for column in columns]
    return Index(arrays, list(classes), has_labels, left_out)


def _scan(shard: Shard) -> tuple[list[tuple[str, str, int, int]], LeftOut]:
    """Read the headers of a tar file.

    Returns: (name, class or '', where its bytes begin, their number) of each image; what is left
        out.
    Raises: UserError if the file cannot be read at random.
    """
    images: list[tuple[str, str, int, int]] = []  # stems in place of classes
    left_out = LeftOut()
    labels: dict[str, str] = {}
    try:
        with open(shard.path, "rb") as file:
            magic = file.read(8)
            if kind := next((k for m, k in COMPRESSED.items() if magic.startswith(m)), ""):
                what = f"is compressed ({kind}), so no image can be read without those before it"
                raise _unusable(shard, f"{what}; uncompress it, which JPEGs hardly need")
            file.seek(0)
            tar = tarfile.TarFile(fileobj=file)
            while member := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # else all headers are kept
                name = posixpath.normpath(member.name).lstrip("/")
                stem, ending = posixpath.splitext(name)
                is_label = ending.lower() == LABEL
                if member.isdir():
                    continue
                if any(map(is_hidden, name.split("/"))):
                    left_out["hidden file"] += 1
                elif not is_label and not left_out.is_image(name):
                    continue
                elif not member.isreg() or member.issparse():
                    remedy = "GNU tar: --dereference --hard-dereference, without --sparse"
                    what = f"{name} is a link, or stored in parts; write the file again ({remedy})"
                    raise _unusable(shard, what)
                elif is_label:
                    content = os.pread(file.fileno(), min(member.size, 2**12), member.offset_data)
                    labels[stem] = _class_in(shard, name, content)
                else:
                    images.append((name, stem, member.offset_data, member.size))
            # tarfile takes a damaged header for the end.
            rest = os.pread(file.fileno(), PADDING + 1, tar.offset)
            if not rest or len(rest) > PADDING or any(rest):
                raise ValueError(f"it ends before or goes on after byte {tar.offset}")
    except UserError:
        raise
    except Exception as error:  # tarfile passes on what its parts raise
        what = f"is not one whole tar file ({first_line(error)}); copy or write it again"
        raise _unusable(shard, what) from error
    last = {stem: name for name, stem, *_ in images}
    for name, stem, *_ in images:
        if stem in labels and name != last[stem]:
            what = f"{name} and {last[stem]} share {stem}{LABEL}"
            raise _unusable(shard, f"{what}; write it again with one image for each {LABEL}")
    if unused := labels.keys() - last.keys():
        left_out[UNUSED] += len(unused)
    found = [(name, labels.get(stem, ""), begin, size) for name, stem, begin, size in images]
    return found, left_out


def _class_in(shard: Shard, name: str, content: bytes) -> str:
    """The class that a file .cls names: an index or a name. Raises: UserError."""
    text = content.decode(errors="replace").strip()
    if not text.isprintable() or not text or "\ufffd" in text:
        raise _unusable(shard, f"{name} is not a class: a number or a name, as text on one line")
    return text


def _unusable(shard: Shard, what: str) -> UserError:
    return UserError(f"{shard.path}: {what}", "folder")


# ------------------------------------------------------------------------------ the images

Labels = tuple[np.ndarray, np.ndarray, Sequence[str]]


def _open(tars: str, choose: Callable[[Index], Labels]) -> ImageSource:
    """The images of tar files; one process per machine reads the index. Collective.

    Args:
        choose: index -> the targets of its images (N,), the positions of the images that are used
            in their order (P,), and the classes.
    """

    def make() -> list[np.ndarray]:
        shards = find_shards(tars)
        index = open_index(tars, shards)
        targets, order, classes = choose(index)
        index.left_out.report(tars)
        text, starts, _, *places = index.arrays
        about = json.dumps([shards, classes]).encode()
        return [text, starts, targets, *places, order, np.frombuffer(about, np.uint8)]

    *arrays, order, about = distributed.once_per_machine(make)
    shards, classes = json.loads(about.tobytes())
    source = TarSource([Shard(*shard) for shard in shards], arrays, classes)
    return source if np.array_equal(order, np.arange(len(source))) else Subset(source, order)


def images_in_tars(
    tars: str, known: Sequence[str] | None = None, labels: str | None = None
) -> ImageSource:
    """Images with the classes of the files .cls beside them, or of folders within the tar files.

    In the order of a folder with the same class folders. Collective.

    Args:
        tars: see find_shards.
        known: the classes in their order; by default those of the tar files.
        labels: a text file with the classes, as readers.labeled_images takes it.
    Raises: UserError for images without a class, and for a class that is not known.
    """

    def choose(index: Index) -> Labels:
        if labels:
            return _labels_of_file(labels, tars, index, known)
        kept = index.arrays[2]
        if without := int((kept < 0).sum()):
            raise UserError(
                f"{tars}: {without} of {len(kept)} images have no class ({index.first_of(-1)}); "
                f"each needs a file {LABEL} of its name beside it, or if there is none at all, all "
                "must lie in class folders within the tar files",
                "folder",
            )
        if not index.has_labels and name_both_splits(index.classes):
            raise UserError(
                f"{tars}: the first folders within the tar files, {few(sorted(index.classes))}, "
                "look like splits, not classes; write tar files of each that begin with class "
                "folders (tar -C train -cf train.tar .)",
                "folder",
            )
        names = sort_classes({*index.classes}) if index.has_labels else sorted(index.classes)
        classes = {name: target for target, name in enumerate(names if known is None else known)}
        for number, name in enumerate(index.classes):
            if name not in classes:
                raise UserError(
                    f"{tars}: {name}, the class of {index.first_of(number)}, is not one of the "
                    f"classes, which are {few(classes)}; give it one of them, or leave it out",
                    "folder",
                )
        targets = np.array([classes[name] for name in index.classes])[kept]
        return targets, np.argsort(targets, kind="stable"), list(classes)

    return _open(tars, choose)


def _labels_of_file(file: str, tars: str, index: Index, known: Sequence[str] | None) -> Labels:
    text, starts, kept = index.arrays[:3]
    bounds = itertools.pairwise(starts.tolist())
    places = {os.fsdecode(text[a:b].tobytes()): number for number, (a, b) in enumerate(bounds)}
    paths, of_paths, classes = read_labels(file, Folder(tars, places), known)
    order = np.array([places[path] for path in paths])
    targets = np.full(len(kept), len(classes))
    targets[order] = of_paths
    return targets, order, classes


def tars_without_label(tars: str, classes: Sequence[str]) -> ImageSource:
    """All images of tar files without a label, in the order of a folder. Collective."""

    def choose(index: Index) -> Labels:
        count = len(index.arrays[2])
        return np.full(count, len(classes)), np.arange(count), list(classes)

    return _open(tars, choose)


def have_classes(tars: str) -> bool:
    """Whether any image in tar files has a class. Collective."""
    (answer,) = distributed.once_per_machine(
        lambda: [np.array([bool(open_index(tars, find_shards(tars)).classes)])]
    )
    return bool(answer[0])
