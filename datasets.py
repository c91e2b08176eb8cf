"""Sources of images: data sets of every kind, opened by index, and their subsets."""

import argparse
import filecmp
import hashlib
import importlib
import os
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, tee
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from timm.data import IterableImageDataset, create_dataset
from torch.utils.data import Dataset
from torchvision.datasets.folder import (
    IMG_EXTENSIONS,
    find_classes,
    has_file_allowed_extension,
    make_dataset,
)

import runtime
from arguments import TORCHVISION_SETS, must_hold_out, teachers_of, unlabelled_of
from labels import read_labels
from pictures import Picture, open_image, unreadable
from runtime import log
from utils import UserError, few, first_line, name_flags

DIGITS_FILE = Path(__file__).parent / "data" / "digits.npz"
IDENTIFYING = 10_000  # images that stand for all others where files are compared


# ------------------------------------------------------------------------------------ sources


class ImageSource(Dataset):
    """Images by index, as arrays (H, W, 3) uint8 without any transform.

    Args:
        load: index -> array or LargeJpeg; a module-level function or a partial of one, so that it
            pickles.
        targets: (N,) class indices; len(classes) for an image without a label.
        classes: class names, in the order of the indices.
        names: positions (P,) -> names (P,) that tell the images apart, such as their paths below a
            folder; by default the positions themselves.
        contents: positions of some images, array by array -> plain values that change with any of
            these images; None where that cannot be told.
        path: index -> path of the image's file; None for images that are not in files of their own.
    """

    def __init__(
        self,
        load: Callable[[int], Picture],
        targets: Sequence[int] | np.ndarray,
        classes: Sequence[str],
        names: Callable[[np.ndarray], np.ndarray] = np.asarray,
        contents: Callable[[Iterable[np.ndarray]], dict[str, str]] | None = None,
        path: Callable[[int], str] | None = None,
    ) -> None:
        self.load, self.names, self.contents, self.path = load, names, contents, path
        # An array, not a list: forked workers count references to the items of a list, which copies
        # it page by page, so that memory would grow with every worker.
        self.targets = np.asarray(targets, dtype=np.int64)
        self.classes = [str(name) for name in classes]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.asarray(self.load(index)), int(self.targets[index])

    def without_label(self) -> np.ndarray:
        """Positions of the images without a label, ascending."""
        return np.flatnonzero(self.targets == len(self.classes))

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the earlier run, wherever the files are.

        Of up to IDENTIFYING files the sizes, so that images replaced under their names are noticed
        without a look at every one of millions.
        Raises: UserError for an image file that cannot be found.
        """
        found = self.contents([evenly(len(self))]) if self.contents else {}
        changed_by_a_copy = {"image_times", "table"}
        return self.listing() | {n: v for n, v in found.items() if n not in changed_by_a_copy}

    def fingerprint(self) -> dict[str, Any]:
        """Plain values that tell two sources, and any changed image, apart.

        Image files are not read: their sizes and times of modification stand for their pixels.
        Raises: UserError for an image file that cannot be found.
        """
        names = "\0".join(self.classes).encode(errors="surrogateescape")
        classes = {"classes": len(self.classes), "class_names": _hash(names)}
        contents = self.contents(_parts(len(self))) if self.contents else {}
        return classes | self.listing() | contents

    def listing(self) -> dict[str, Any]:
        """The number of the images, and hashes of their labels and names."""
        names = _hash(*self.all_names())
        return {"images": len(self), "labels": _hash(self.targets), "image_names": names}

    def all_names(self) -> Iterator[np.ndarray]:
        """The names in small arrays, since those of 100 million images take several GiB."""
        return (self.names(part) for part in _parts(len(self)))


@dataclass
class StreamSource:
    """One of timm's streams (wds/…, tfds/…, hfids/…), which can only be read in its own order.

    Args:
        classes: names of the classes, in the order of the labels.
    """

    stream: IterableImageDataset
    classes: list[str]

    def __len__(self) -> int:
        return len(self.stream)


Source = ImageSource | StreamSource


def _hash(*parts: Any) -> str:
    """16 hexadecimal digits that stand for bytes, or for arrays one after another."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]


def evenly(count: int, most: int = IDENTIFYING) -> np.ndarray:
    """At most so many of 0…count-1, evenly spread and ascending; (P,) int64."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64)


def _parts(count: int) -> Iterator[np.ndarray]:
    """0…count-1 in arrays of at most 8,192, whose paths fit into the cache of a processor."""
    for first in range(0, count, 2**13):
        yield np.arange(first, min(first + 2**13, count))


def _array_source(
    images: np.ndarray, targets: Sequence[int], classes: Sequence[str]
) -> ImageSource:
    """(N, H, W) or (N, H, W, 3) uint8"""
    load, contents = partial(_image_of_array, images), partial(_hash_of_array, images)
    return ImageSource(load, targets, classes, contents=contents)


def _image_of_array(images: np.ndarray, index: int) -> np.ndarray:
    image = images[index]
    return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)


def _hash_of_array(images: np.ndarray, parts: Iterable[np.ndarray]) -> dict[str, str]:
    return {"pixels": f"{images.shape} {_hash(np.ascontiguousarray(images))}"}


class Paths:
    """Paths below a folder, in two arrays, which workers and processes share without copies.

    Forked workers copy a list page by page (see ImageSource), and an array of strings is as wide as
    its longest.

    Args:
        text: (T,) uint8, the bytes of all paths, one after another.
        starts: (N + 1,) int64, where each path begins in the text, and where the last one ends.
    """

    def __init__(self, text: np.ndarray, starts: np.ndarray) -> None:
        self.text, self.starts = text, starts

    def __getitem__(self, index: int) -> bytes:
        return self.text[self.starts[index] : self.starts[index + 1]].tobytes()

    @cached_property
    def width(self) -> int:
        """Bytes of the longest path."""
        parts = _parts(len(self.starts) - 1)
        return max(int((self.starts[part + 1] - self.starts[part]).max()) for part in parts)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """(P,) integers -> (P,) paths, as an array of bytes as wide as the longest path of all"""
        starts, ends = self.starts[positions, None], self.starts[positions + 1, None]  # (P, 1)
        places = starts + np.arange(self.width)  # (P, W)
        letters = self.text[np.minimum(places, len(self.text) - 1)]
        return np.where(places < ends, letters, 0).view(f"S{self.width}")[:, 0]


def _arrays_of_files(
    folder: str, files_by_class: Iterable[Iterable[tuple[str, int]]]
) -> list[np.ndarray]:
    """(path, class index) of files below the folder -> text and starts of Paths, and targets."""
    outside = len(os.path.join(folder, ""))
    # Compact from the start: as lists, the files of 100 million images would take 35 GB.
    text, starts, targets = bytearray(), array("q", [0]), array("q")
    for path, target in chain.from_iterable(files_by_class):
        text += os.fsencode(path[outside:])
        starts.append(len(text))
        targets.append(target)
    return [np.frombuffer(text, np.uint8), np.asarray(starts), np.asarray(targets)]


def _file_source(folder: str, arrays: list[np.ndarray], classes: Sequence[str]) -> ImageSource:
    """Images in files, given by `_arrays_of_files`."""
    text, starts, targets = arrays
    paths = Paths(text, starts)
    path, contents = partial(_path_of, folder, paths), partial(_stamps_of_files, folder, paths)
    return ImageSource(partial(_image_of_file, path), targets, classes, paths.at, contents, path)


def _path_of(folder: str, paths: Paths, index: int) -> str:
    return os.path.join(folder, os.fsdecode(paths[index]))


def _image_of_file(path_of: Callable[[int], str], index: int) -> Picture:
    path = path_of(index)
    return open_image(path, path)


def _stamps_of_files(folder: str, paths: Paths, chosen: Iterable[np.ndarray]) -> dict[str, str]:
    """Hashes of the sizes of files and of their times of modification, in nanoseconds."""

    def stamps(positions: np.ndarray) -> list[tuple[int, int]]:
        names = [os.path.join(os.fsencode(folder), paths[index]) for index in positions.tolist()]
        return [(file.st_size, file.st_mtime_ns) for file in map(os.stat, names)]

    threads = 16  # each file costs a round trip on a network file system
    hashes = {"image_sizes": hashlib.sha256(), "image_times": hashlib.sha256()}
    try:
        with ThreadPoolExecutor(threads) as pool:
            for some in chosen:
                parts = pool.map(stamps, np.array_split(some, threads))
                stamped = [stamp for part in parts for stamp in part]
                columns = np.array(stamped, np.int64).reshape(-1, 2).T
                for found, column in zip(hashes.values(), columns, strict=True):
                    found.update(column.tobytes())
    except OSError as error:
        raise UserError(
            f"cannot read the image {os.fsdecode(error.filename)} ({error.strerror}); repair it or "
            "remove it"
        ) from error
    return {name: found.hexdigest()[:16] for name, found in hashes.items()}


def _image_of_reader(reader: Any, index: int) -> Picture:
    # timm's ImageDataset replaces an unreadable image by the next one; here that is an error.
    name = reader.filename(index) if hasattr(reader, "filename") else index  # internal to timm
    try:
        file = reader[index][0]
    except Exception as error:  # each reader has its own
        raise unreadable(name, error) from error
    return open_image(file, name)


def _fingerprint_of_table(reader: Any, parts: Iterable[np.ndarray]) -> dict[str, str]:
    # Hugging Face's own, from the paths and times of local files or the commit of a download.
    return {"table": reader.dataset._fingerprint}


# ----------------------------------------------------------------------------- kinds of data sets


def digits(is_train: bool) -> ImageSource:
    """The included digits: 1,437 to train on, 360 to test on, 8 pixels, ten classes."""
    with np.load(DIGITS_FILE, allow_pickle=False) as file:
        chosen = file["is_test"] != is_train
        grey = np.round(file["images"][chosen] * (255 / 16)).astype(np.uint8)
        labels, classes = file["labels"][chosen], [str(digit) for digit in range(10)]
        return _array_source(grey, labels, classes)


def _torchvision(name: str, folder: str, is_train: bool) -> ImageSource:
    class_name = "CIFAR100" if name == "CIFAR" else name
    data_set = getattr(torchvision.datasets, class_name)
    try:
        # One process per machine downloads; the others wait and find the files.
        if runtime.local_rank() == 0:
            data_set(folder, train=is_train, download=True)
        runtime.barrier()
        data = data_set(folder, train=is_train)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--data_set {name}: not found in --data_path {folder}, and the download failed "
            f"({first_line(error)}); put torchvision's {class_name} files there"
        ) from error
    return _array_source(np.asarray(data.data), data.targets, data.classes)


def image_folder(folder: str) -> ImageSource:
    """A folder with one folder of images per class, in alphabetical order.

    One process per machine lists the files. Prints the endings of other files, among which
    photographs may have been left out. Collective.

    Raises: UserError where it does not exist or holds no images.
    """
    folder = os.path.expanduser(folder)
    if not os.path.isdir(folder):
        raise UserError(
            f"{folder}: is not a folder; it must hold one folder of images per class", "folder"
        )
    try:
        classes, _ = find_classes(folder)
    except FileNotFoundError as error:
        raise _no_images(folder, first_line(error)) from error
    arrays = runtime.once_per_machine(lambda: _list_images(folder, classes))
    return _file_source(folder, arrays, classes)


def _list_images(folder: str, classes: list[str]) -> list[np.ndarray]:
    """The images of class folders, in the order of torchvision's ImageFolder."""
    endings = _Endings()
    empty = []

    def files_by_class() -> Iterator[list[tuple[str, int]]]:
        for index, name in enumerate(classes):
            of_class = {name: index}
            found = make_dataset(folder, of_class, is_valid_file=endings.is_image, allow_empty=True)
            if not found:
                empty.append(name)
            yield found

    arrays = _arrays_of_files(folder, files_by_class())
    if empty:
        others = f"left out: {endings}; " if endings.skipped else ""
        raise _no_images(folder, f"no image of {few(empty)}; {others}{ENDINGS}")
    endings.report(folder)
    return arrays


def images_without_label(folder: str, classes: Sequence[str]) -> ImageSource:
    """All images below a folder, at any depth, without a label; ordered by their paths. Collective.

    Args:
        classes: the names of the classes of the images that have a label.
    Raises: UserError where there is no image.
    """
    folder = os.path.expanduser(folder)
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: is not a folder", "folder")

    def list_all() -> list[np.ndarray]:
        endings = _Endings()
        one = {os.curdir: len(classes)}  # the folder itself, as the folder of a class
        found = make_dataset(folder, one, is_valid_file=endings.is_image, allow_empty=True)
        if not found:
            raise UserError(f"{folder}: holds no image at any depth; {ENDINGS}", "folder")
        endings.report(folder)
        return _arrays_of_files(os.path.join(folder, os.curdir), [found])

    return _file_source(folder, runtime.once_per_machine(list_all), classes)


class _Endings:
    """Tells images from other files by the ending of their names, and counts the others."""

    def __init__(self) -> None:
        self.skipped: Counter[str] = Counter()

    def is_image(self, path: str) -> bool:
        is_known = has_file_allowed_extension(path, IMG_EXTENSIONS)
        if not is_known:
            self.skipped[os.path.splitext(path)[1].lower() or "without ending"] += 1
        return is_known

    def __str__(self) -> str:
        return few((f"{ending} {count}" for ending, count in self.skipped.most_common()), most=5)

    def report(self, folder: str) -> None:
        if self.skipped:
            log(f"{folder}: {self.skipped.total()} file(s) left out ({self}); {ENDINGS}")


ENDINGS = f"images end in {' '.join(IMG_EXTENSIONS)}"


def _no_images(folder: str, found: str) -> UserError:
    return UserError(
        f"{folder}: holds no images, or a class folder in it is empty ({found}); it must hold one "
        "folder of images per class",
        "folder",
    )


def labelled_images(file: str, folder: str, classes: Sequence[str] | None = None) -> ImageSource:
    """Images below a folder whose classes are in a text file (labels.read_labels).

    In the order of their paths, whatever the order of the lines. One process per machine reads the
    file. Collective.

    Args:
        classes: the classes in their order; by default those in the file.
    Raises: UserError for a file with a wrong line, and for a folder that does not exist.
    """
    folder = os.path.expanduser(folder)
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: is not a folder; it must hold the images of {file}", "folder")

    def make() -> list[np.ndarray]:
        labels = read_labels(file, folder, classes)
        if labels.repeated:
            log(f"{file}: {labels.repeated} line(s) repeat another line and are left out")
        paths = (os.path.join(folder, path) for path in labels.paths)
        arrays = _arrays_of_files(folder, [zip(paths, labels.targets, strict=True)])
        names = "\0".join(labels.classes).encode(errors="surrogateescape")
        return [*arrays, np.frombuffer(names, np.uint8)]

    *arrays, names = runtime.once_per_machine(make)
    known = names.tobytes().decode(errors="surrogateescape").split("\0")
    return _file_source(folder, arrays, known)


def _timm(name: str, args: argparse.Namespace, is_train: bool) -> Source:
    """Any data set of timm's `create_dataset`: a folder or tar, hfds/…, hfids/…, tfds/…, wds/…"""
    if name.lower().startswith(("hfds/", "hfids/")):
        _let_timm_import_hugging_face_datasets()
    try:
        data = create_dataset(
            name,
            root=args.data_path,
            split="train" if is_train else "validation",
            is_training=is_train,
            batch_size=args.batch_size,
            seed=args.data_seed,
        )
    except Exception as error:  # each reader has its own optional package and its own errors
        raise UserError(
            f"--data_set {name}: timm could not open it ({type(error).__name__}: {error}); "
            f"known are DIGITS, IMNET, image_folder, {', '.join(TORCHVISION_SETS)} and timm's "
            "readers hfds/…, hfids/…, tfds/…, wds/… (each with its own package installed)"
        ) from error
    if isinstance(data, IterableImageDataset):
        if not args.nb_classes:
            raise UserError(
                f"--data_set {name}: the classes of a stream cannot be counted; pass --nb_classes"
            )
        return StreamSource(data, [str(label) for label in range(args.nb_classes)])
    reader = data.reader  # the attributes below are internal to timm's readers
    files = getattr(reader, "samples", None)  # else a table of Hugging Face datasets
    targets = reader.dataset[reader.label_key] if files is None else []
    if class_to_idx := getattr(reader, "class_to_idx", None):
        classes = sorted(class_to_idx, key=class_to_idx.get)
    else:
        classes = [str(label) for label in range(max(targets) + 1)]
    if files:
        return _file_source(reader.root, _arrays_of_files(reader.root, [files]), classes)
    load, contents = partial(_image_of_reader, reader), partial(_fingerprint_of_table, reader)
    return ImageSource(load, targets, classes, contents=contents)


def _let_timm_import_hugging_face_datasets() -> None:
    """Give the module name `datasets` to Hugging Face's package, which timm's hfds reader imports.

    Code that imported this file before keeps it.
    """
    ours = sys.modules["datasets"]
    if not hasattr(ours, "open_split"):
        return  # Hugging Face's package has the name already
    here, path = Path(__file__).resolve().parent, sys.path[:]
    sys.path[:] = [folder for folder in path if Path(folder).resolve() != here]
    del sys.modules["datasets"]
    try:
        importlib.import_module("datasets")
    except ImportError as error:
        sys.modules["datasets"] = ours
        raise UserError(
            "--data_set hfds/… needs Hugging Face's package; run pip install datasets"
        ) from error
    finally:
        sys.path[:] = path


def open_split(
    args: argparse.Namespace, is_train: bool, classes: Sequence[str] | None = None
) -> Source:
    """Open the training or the test images that --data_set and --data_path name.

    Args:
        classes: the classes in their order, for a file of labels that may name only some of them.
    """
    if args.data_set == "DIGITS":
        return digits(is_train)
    if args.data_set in TORCHVISION_SETS:
        return _torchvision(args.data_set, args.data_path or "data_cache", is_train)
    if args.data_set == "IMNET":
        folder = os.path.join(args.data_path, "train" if is_train else "val")
        with name_flags(folder="--data_path"):
            return image_folder(folder)
    if args.data_set == "image_folder":
        flag = "data_path" if is_train or not args.eval_data_path else "eval_data_path"
        file = "labels" if is_train else "eval_labels"
        with name_flags(folder=f"--{flag}", labels=f"--{file}"):
            if getattr(args, file):
                return labelled_images(getattr(args, file), getattr(args, flag), classes)
            return image_folder(getattr(args, flag))
    return _timm(args.data_set, args, is_train)


def has_validation(args: argparse.Namespace) -> bool:
    """Whether there are validation images, as far as can be told without opening a data set."""
    if args.data_set == "IMNET":
        return os.path.isdir(os.path.join(args.data_path, "val"))
    if args.data_set == "image_folder":
        return bool(args.eval_data_path or args.eval_labels)
    return args.data_set in ("DIGITS", *TORCHVISION_SETS)


# ----------------------------------------------------------------------------------- subsets


def _hold_out(targets: np.ndarray, count: int) -> list[np.ndarray]:
    """Positions to hold out, and all others; both ascending."""
    # Fixed seed, so that a teacher and its students hold out the same images.
    held_out = stratified(targets, count, seed=0)
    is_other = np.ones(len(targets), bool)
    is_other[held_out] = False
    return [held_out, np.flatnonzero(is_other)]


def stratified(targets: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose `count` positions at random, with every class in its proportion.

    Returns: (count,) positions, ascending.
    """
    rng = np.random.default_rng([seed, count])
    shuffled = rng.permutation(len(targets))
    by_class = shuffled[np.argsort(targets[shuffled], kind="stable")]
    # Each class is one run of positions, so evenly spaced picks take each class in proportion.
    picks = (np.arange(count) + rng.random()) * len(targets) / count
    return np.sort(by_class[picks.astype(np.int64)])


def subset(source: ImageSource, positions: np.ndarray) -> ImageSource:
    """Some images of a source, which may itself be a subset. Collective."""
    load = partial(_image_of_subset, source, positions)
    names = partial(_names_of_subset, source, positions)
    contents = source.contents and partial(_contents_of_subset, source, positions)
    (targets,) = runtime.once_per_machine(lambda: [source.targets[positions]])
    path = source.path and partial(_path_of_subset, source, positions)
    return ImageSource(load, targets, source.classes, names, contents, path)


def _path_of_subset(source: ImageSource, positions: np.ndarray, index: int) -> str:
    assert source.path is not None
    return source.path(positions[index])


def _contents_of_subset(
    source: ImageSource, positions: np.ndarray, parts: Iterable[np.ndarray]
) -> dict[str, str]:
    assert source.contents is not None
    return source.contents(positions[part] for part in parts)


def forget_other_labels(source: ImageSource, chosen: np.ndarray) -> ImageSource:
    """The same images, of which only the chosen positions keep their labels. Collective."""

    def targets() -> list[np.ndarray]:
        kept = np.full(len(source), len(source.classes))
        kept[chosen] = source.targets[chosen]
        return [kept]

    (kept,) = runtime.once_per_machine(targets)
    return ImageSource(
        source.load, kept, source.classes, source.names, source.contents, source.path
    )


def join(first: ImageSource, second: ImageSource) -> ImageSource:
    """The images of two sources with the same classes, one after the other. Collective."""
    load, names = partial(_image_of_join, first, second), partial(_names_of_join, first, second)
    contents, path = partial(_contents_of_join, first, second), None
    if first.path is not None and second.path is not None:
        path = partial(_path_of_join, first, second)
    (targets,) = runtime.once_per_machine(lambda: [np.append(first.targets, second.targets)])
    return ImageSource(load, targets, first.classes, names, contents, path)


def _place_in_join(first: ImageSource, second: ImageSource, index: int) -> tuple[ImageSource, int]:
    return (first, index) if index < len(first) else (second, index - len(first))


def _path_of_join(first: ImageSource, second: ImageSource, index: int) -> str:
    source, index = _place_in_join(first, second, index)
    assert source.path is not None
    return source.path(index)


def _image_of_join(first: ImageSource, second: ImageSource, index: int) -> Picture:
    source, index = _place_in_join(first, second, index)
    return source.load(index)


def _names_of_join(first: ImageSource, second: ImageSource, positions: np.ndarray) -> np.ndarray:
    """Bytes; a name of the second source gets a mark, since both may have it."""
    is_first = positions < len(first)
    of_first = first.names(positions[is_first]).astype(bytes)
    of_second = second.names(positions[~is_first] - len(first)).astype(bytes)
    marked = np.char.add(b"/", of_second)
    found = np.empty(len(positions), max(of_first.dtype, marked.dtype))
    found[is_first], found[~is_first] = of_first, marked
    return found


def _contents_of_join(
    first: ImageSource, second: ImageSource, parts: Iterable[np.ndarray]
) -> dict[str, str]:
    of_first, of_second = tee(parts)
    chosen = [
        (part[part < len(first)] for part in of_first),
        (part[part >= len(first)] - len(first) for part in of_second),
    ]
    found: dict[str, str] = {}
    for source, some, mark in zip((first, second), chosen, ("", "_without_label"), strict=True):
        if source.contents is not None:
            values = source.contents(part for part in some if len(part))
            found |= {f"{name}{mark}": value for name, value in values.items()}
    return found


def _names_of_subset(source: ImageSource, positions: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    return source.names(positions[chosen])


def _image_of_subset(source: ImageSource, positions: np.ndarray, index: int) -> Picture:
    return source.load(positions[index])


# ------------------------------------------------------------------------- train and validation


def held_out_identity(val: Source) -> str:
    """What tells held-out images from others, on every process. Collective."""
    assert isinstance(val, ImageSource)  # only its images can be held out
    return runtime.from_main(lambda: " ".join(map(str, val.listing().values())))


def open_validation(args: argparse.Namespace, classes: Sequence[str] | None = None) -> Source:
    """The validation images alone: the held-out training images with --holdout.

    Args:
        classes: those of the model in their order, where it knows them.
    Raises: UserError for images that are missing.
    """
    if not args.holdout:
        return open_split(args, is_train=False, classes=classes)
    args = argparse.Namespace(**{**vars(args), "train_samples": None, "unlabeled": ""})
    _, val = open_splits(args)
    assert val is not None  # with --holdout
    return val


def match_classes(wanted: list[str], known: list[str]) -> list[int] | None:
    """Positions of the wanted class names among the known names; None for all in order.

    Raises: UserError that lists names that are not known.
    """
    if missing := [name for name in wanted if name not in known]:
        raise UserError(
            f"the data has classes that the checkpoint does not know ({few(missing)}); its classes "
            f"are {few(known)}. Use data of the same classes",
            "classes",
        )
    return None if wanted == known else [known.index(name) for name in wanted]


def is_flat(args: argparse.Namespace) -> bool:
    """Whether --data_path is a folder of images without labels, which --kd_alpha 1 does not need.

    Such a folder holds images that are not in class folders.
    """
    if not teachers_of(args) or args.kd_alpha < 1 or args.data_set not in ("IMNET", "image_folder"):
        return False
    if not os.path.isdir(args.data_path):
        return False
    is_split = args.data_set == "IMNET" and os.path.isdir(os.path.join(args.data_path, "train"))
    names = (entry.name for entry in os.scandir(args.data_path) if entry.is_file())
    return not is_split and any(has_file_allowed_extension(name, IMG_EXTENSIONS) for name in names)


def _open_flat(
    args: argparse.Namespace, teacher_classes: Callable[[], list[str]]
) -> tuple[ImageSource, Source | None]:
    """Images without labels, and validation images where there are any."""
    if args.holdout:
        raise UserError(f"--holdout {args.holdout}: the images have no labels; remove the flag")
    if has_validation(args):
        val = open_split(args, is_train=False)
        return images_without_label(args.data_path, val.classes), val
    log("No validation images: neither teacher nor student is scored")
    args.disable_eval, args.teacher_eval = True, False
    return images_without_label(args.data_path, teacher_classes()), None


def open_splits(
    args: argparse.Namespace, teacher_classes: Callable[[], list[str]] | None = None
) -> tuple[Source, Source | None]:
    """The training images and, where student or teacher is evaluated, the validation images.

    Args:
        args: holdout is set to a fifth of the images where nothing says what to validate on.
        teacher_classes: returns the classes of a folder of images without labels that has no
            validation images, see `is_flat`.
    Raises: UserError for data that is missing, empty, mismatched or too small.
    """
    unlabelled = unlabelled_of(args)
    train: Source
    val: Source | None = None
    if is_flat(args) and teacher_classes is not None:
        train, val = _open_flat(args, teacher_classes)
    else:
        train = open_split(args, is_train=True)
    all_images = train
    if isinstance(train, ImageSource):
        if must_hold_out(args) and not len(train.without_label()):
            _choose_holdout(args, train)
        if args.holdout:
            _check_at_most("--holdout", args.holdout, len(train) - 1)
            choose = partial(_hold_out, train.targets, args.holdout)
            held_out, others = runtime.once_per_machine(choose)
            train, val = subset(train, others), subset(train, held_out)
        if args.train_samples:
            _check_at_most("--train_samples", args.train_samples, len(train))
            sample = partial(stratified, train.targets, args.train_samples, args.data_seed)
            (chosen,) = runtime.once_per_machine(lambda: [sample()])
            if unlabelled == "rest":
                train = forget_other_labels(train, chosen)
            else:
                train = subset(train, chosen)
        if unlabelled not in ("", "rest"):
            with name_flags(folder="--unlabeled"):
                train = join(train, images_without_label(unlabelled, train.classes))
        if not args.eval and runtime.is_main_process() and not len(train.without_label()):
            learns_labels = not args.teacher_cache_only and not (args.kd and args.kd_alpha == 1)
            _tell_of_counts(train, learns_labels and args.class_weights == "none")
    elif args.holdout or args.train_samples or unlabelled:
        raise UserError(
            "--holdout, --train_samples and --unlabeled need an indexable data set; "
            f"{args.data_set} is a stream"
        )
    for_teacher = bool(teachers_of(args)) and args.teacher_eval and has_validation(args)
    if val is None and (for_teacher or not args.disable_eval):
        val = open_split(args, is_train=False, classes=train.classes)
        _check_same_classes(train.classes, val.classes)
        if args.labels or args.eval_labels:
            folder = args.eval_data_path or args.data_path
            _check_disjoint(all_images, val, os.path.relpath(folder, args.data_path))
    are_to_compare = not args.eval and runtime.is_main_process()
    if are_to_compare and isinstance(train, ImageSource) and isinstance(val, ImageSource):
        _tell_of_validation_copies(train, val)
    if args.nb_classes and args.nb_classes != len(train.classes):
        raise UserError(
            f"--nb_classes {args.nb_classes}: the data has {len(train.classes)} classes; "
            "leave the flag out, since classes are counted"
        )
    return train, val


def _tell_of_validation_copies(train: ImageSource, val: ImageSource) -> None:
    """Warn of images without a label that are validation images: files with the same bytes.

    Where there are more than IDENTIFYING of either, only so many are looked at.
    """
    positions = train.without_label()
    if not len(positions) or train.path is None or val.path is None:
        return
    files = [train.path(index) for index in positions[evenly(len(positions))]]
    by_size: dict[int, list[str]] = {}
    for index in evenly(len(val)):
        by_size.setdefault(os.path.getsize(val.path(index)), []).append(val.path(index))
    copies = []
    for file in files:
        same_size = by_size.get(os.path.getsize(file), [])
        if any(filecmp.cmp(file, other, shallow=False) for other in same_size):
            copies.append(file)
    if copies:
        log(
            f"Warning: {len(copies)} of {len(files)} images without a label are validation images "
            f"too ({few(copies)}), so the score is not that of unseen images; remove them"
        )


def _choose_holdout(args: argparse.Namespace, train: ImageSource) -> None:
    """Set holdout to a fifth of the images. Raises: UserError for a single class."""
    if len(train.classes) < 2:
        raise UserError(
            f"--data_path {args.data_path}: has a single class ({train.classes[0]}), so nothing "
            "can be learnt; pass the folder that holds one folder of images per class"
        )
    args.holdout = max(1, len(train) // 5)
    log(
        f"{args.data_path} holds no validation images; {args.holdout} of its {len(train)} images, "
        "a fifth of each class, are held out for validation, the same ones in every run "
        "(--holdout N for another number)"
    )


def _check_disjoint(train: Source, val: Source, folder: str) -> None:
    """End the run where the same file is in both. Collective.

    Args:
        folder: where the names of the validation images begin, seen from those of training.
    """
    assert isinstance(train, ImageSource) and isinstance(val, ImageSource)

    def shared() -> list[str]:
        names = (os.fsdecode(name) for part in val.all_names() for name in part.tolist())
        held = {os.path.normpath(os.path.join(folder, name)) for name in names}
        names = (os.fsdecode(name) for part in train.all_names() for name in part.tolist())
        return [name for name in names if name in held]

    if both := runtime.from_main(shared):
        runtime.stop_all(
            f"--labels, --eval_labels: {len(both)} of {len(val)} validation images are training "
            f"images too ({few(both)}), so the scores would be too good; remove them from either"
        )


UNEVEN = 3  # times as many images of the largest class as of the smallest, from which that is told


def _tell_of_counts(train: ImageSource, can_weigh: bool) -> None:
    """Print which classes have no training image, and the counts where they are uneven.

    Args:
        can_weigh: whether --class_weights could help.
    """
    counts = np.bincount(train.targets, minlength=len(train.classes))
    largest = int(counts.argmax())
    order = [int(index) for index in np.argsort(counts, kind="stable") if counts[index]]
    if counts[largest] > UNEVEN * counts[order[0]]:
        most = 10
        told = [f"{train.classes[index]} {counts[index]}" for index in order]
        if len(told) > most:
            told = [*told[: most // 2], f"… {train.classes[largest]} {counts[largest]}"]
        remedy = "; --class_weights balanced gives each class the same weight in the label loss"
        hint = remedy if can_weigh else ""
        log(f"Uneven classes, images of the rarest first: {', '.join(told)}{hint}")
    if untaught := [name for name, count in zip(train.classes, counts, strict=True) if not count]:
        log(
            f"Warning: classes without a training image: {len(untaught)} of {len(train.classes)} "
            f"({few(untaught, most=10)}); raise --train_samples where it is given, or lower "
            "--holdout"
        )


def _check_at_most(flag: str, value: int, most: int) -> None:
    if value > most:
        raise UserError(f"{flag} {value}: at most {most} training images are available; lower it")


def _check_same_classes(train: list[str], val: list[str]) -> None:
    if train == val:
        return
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    raise UserError(
        "--data_path: training and validation data have different classes "
        f"(only in training: {few(only_train) or 'none'}; only in validation: "
        f"{few(only_val) or 'none'}); both must have the same class folders"
    )
