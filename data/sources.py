"""Sources of images: images by index, without any transform, and their subsets."""

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, tee
from typing import Any

import numpy as np
from timm.data import IterableImageDataset
from torch.utils.data import Dataset

from data.pictures import Picture, open_image
from runtime import distributed
from utils import UserError

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
        classes = {"classes": len(self.classes), "class_names": hash_of(names)}
        contents = self.contents(_parts(len(self))) if self.contents else {}
        return classes | self.listing() | contents

    def listing(self) -> dict[str, Any]:
        """The number of the images, and hashes of their labels and names."""
        names = hash_of(*self.all_names())
        return {"images": len(self), "labels": hash_of(self.targets), "image_names": names}

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


def hash_of(*parts: Any) -> str:
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


def array_source(images: np.ndarray, targets: Sequence[int], classes: Sequence[str]) -> ImageSource:
    """(N, H, W) or (N, H, W, 3) uint8"""
    load, contents = partial(_image_of_array, images), partial(_hash_of_array, images)
    return ImageSource(load, targets, classes, contents=contents)


def _image_of_array(images: np.ndarray, index: int) -> np.ndarray:
    image = images[index]
    return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)


def _hash_of_array(images: np.ndarray, parts: Iterable[np.ndarray]) -> dict[str, str]:
    return {"pixels": f"{images.shape} {hash_of(np.ascontiguousarray(images))}"}


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


def arrays_of_files(
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


def file_source(folder: str, arrays: list[np.ndarray], classes: Sequence[str]) -> ImageSource:
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
    (targets,) = distributed.once_per_machine(lambda: [source.targets[positions]])
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

    (kept,) = distributed.once_per_machine(targets)
    return ImageSource(
        source.load, kept, source.classes, source.names, source.contents, source.path
    )


def join(first: ImageSource, second: ImageSource) -> ImageSource:
    """The images of two sources with the same classes, one after the other. Collective."""
    load, names = partial(_image_of_join, first, second), partial(_names_of_join, first, second)
    contents, path = partial(_contents_of_join, first, second), None
    if first.path is not None and second.path is not None:
        path = partial(_path_of_join, first, second)
    (targets,) = distributed.once_per_machine(lambda: [np.append(first.targets, second.targets)])
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
    return distributed.from_main(lambda: " ".join(map(str, val.listing().values())))
