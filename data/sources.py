"""Sources of images: images by index, without any transform, and their subsets."""

import copy
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, tee
from typing import IO, Any

import numpy as np
from timm.data import IterableImageDataset
from torch.utils.data import Dataset

from data.content import ContentIndex, stamps
from data.pictures import Picture, open_image
from runtime import distributed
from utils import UserError

IDENTIFYING = 10_000  # images that stand for all others when files are compared


class ImageSource(Dataset):
    """Images by index, as arrays (H, W, 3) uint8 without any transform. Sources pickle.

    Args:
        targets: (N,) class indices; len(classes) for an image without a label.
        classes: class names, in the order of the indices.
    """

    def __init__(self, targets: Sequence[int] | np.ndarray, classes: Sequence[str]) -> None:
        # An array, not a list: forked workers count references to the items of a list, which copies
        # it page by page, so that memory would grow with every worker.
        self.targets = np.asarray(targets, dtype=np.int64)
        self.classes = [str(name) for name in classes]

    def load(self, index: int) -> Picture:
        """One image. Raises: UserError that names an image that cannot be read."""
        raise NotImplementedError

    def names(self, positions: np.ndarray) -> np.ndarray:
        """(P,) integers -> (P,) names that identify the images, such as paths below a folder."""
        return np.asarray(positions)

    def contents(
        self, parts: Iterable[np.ndarray], index: ContentIndex | None = None
    ) -> dict[str, str]:
        """Plain values that change with any of some images, whose positions come in arrays.

        Args:
            index: identifies image files by their bytes; None for their stamps, see `fingerprint`.
        """
        return {}

    def path(self, index: int) -> str:
        """Path that names an image's file, also one within an archive; '' without a file."""
        return ""

    def open(self, index: int) -> IO[bytes]:
        """The file of an image that has a path, as it is stored. Raises: OSError."""
        raise NotImplementedError

    def stamp(self, index: int) -> tuple[int, int]:
        """Bytes of that file, and its time of modification in nanoseconds. Raises: OSError."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.asarray(self.load(index)), int(self.targets[index])

    def without_label(self) -> np.ndarray:
        """Positions of the images without a label, ascending."""
        return np.flatnonzero(self.targets == len(self.classes))

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the earlier run, wherever the files are.

        Looks at the sizes of up to IDENTIFYING files alone, since there may be millions.
        Raises: UserError for an image file that cannot be found.
        """
        contents = self.contents([evenly(len(self))])
        changed_by_a_copy = ("image_times", "table")  # and image_times_without_label
        kept = {n: v for n, v in contents.items() if not n.startswith(changed_by_a_copy)}
        return self.listing() | kept

    def fingerprint(self, index: ContentIndex | None = None) -> dict[str, Any]:
        """Plain values that differ between two sources, and change with any image.

        Args:
            index: reads and hashes each image file that the index does not know. With None no file
                is read: their stamps (size and time of modification) stand for their pixels.
        Raises: UserError for an image file that cannot be found.
        """
        names = "\0".join(self.classes).encode(errors="surrogateescape")
        classes = {"classes": len(self.classes), "class_names": hash_of(names)}
        listing = self.listing()
        if index is not None:
            index.begin(listing["image_names"])
        return classes | listing | self.contents(_parts(len(self)), index)

    def listing(self) -> dict[str, Any]:
        """The number of the images, and hashes of their labels and names."""
        names = hash_of(*self.all_names())
        return {"images": len(self), "labels": hash_of(self.targets), "image_names": names}

    def all_names(self) -> Iterator[np.ndarray]:
        """The names in small arrays, since those of 100 million images take several GiB."""
        return (self.names(part) for part in _parts(len(self)))


@dataclass
class StreamSource:
    """One of timm's streams (wds/…, tfds/…, hfids/…), which can only be read in its own order."""

    stream: IterableImageDataset
    classes: list[str]  # names, in the order of the labels

    def __len__(self) -> int:
        return len(self.stream)


Source = ImageSource | StreamSource


def hash_of(*parts: Any) -> str:
    """16 hexadecimal digits that stand for bytes or arrays, one after another."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def hash_of_plain(value: object) -> str:
    """16 hexadecimal digits that stand for a plain value, such as a dict of numbers."""
    return hash_of(json.dumps(value).encode())


def evenly(count: int, most: int = IDENTIFYING) -> np.ndarray:
    """At most so many of 0…count-1, evenly spread and ascending; (P,) int64."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64)


def _parts(count: int) -> Iterator[np.ndarray]:
    """0…count-1 in arrays of at most 8,192, whose paths fit into the cache of a processor."""
    for first in range(0, count, 2**13):
        yield np.arange(first, min(first + 2**13, count))


class ArraySource(ImageSource):
    """Images in one array, (N, H, W) or (N, H, W, 3) uint8."""

    def __init__(
        self, images: np.ndarray, targets: Sequence[int] | np.ndarray, classes: Sequence[str]
    ) -> None:
        super().__init__(targets, classes)
        self.images = images

    def load(self, index: int) -> np.ndarray:
        image = self.images[index]
        return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)

    def contents(
        self, parts: Iterable[np.ndarray], index: ContentIndex | None = None
    ) -> dict[str, str]:
        """The shape and a hash of all pixels, since reading them takes no time."""
        return {"pixels": f"{self.images.shape} {hash_of(np.ascontiguousarray(self.images))}"}


# ------------------------------------------------------------------------------ images in files


def arrays_of_files(
    folder: str, files_by_class: Iterable[Iterable[tuple[str, int]]]
) -> list[np.ndarray]:
    """(path, class index) of files below the folder -> the arrays of FileSource."""
    outside = len(os.path.join(folder, ""))
    # Compact from the start: as lists, the files of 100 million images would take 35 GB.
    text, starts, targets = bytearray(), array("q", [0]), array("q")
    for path, target in chain.from_iterable(files_by_class):
        text += os.fsencode(path[outside:])
        starts.append(len(text))
        targets.append(target)
    return [np.frombuffer(text, np.uint8), np.asarray(starts), np.asarray(targets)]


class FileSource(ImageSource):
    """Images in files of their own.

    The paths are kept in two arrays, which workers and processes share without copies: forked
    workers copy a list page by page, and an array of strings is as wide as its longest.

    Args:
        folder: that the paths begin in.
        arrays: (T,) uint8, the bytes of all paths, one after another; (N + 1,) int64, where each
            path begins in them, and where the last one ends; and the targets.
    """

    def __init__(self, folder: str, arrays: list[np.ndarray], classes: Sequence[str]) -> None:
        self.folder, (self.text, self.starts, targets) = folder, arrays
        super().__init__(targets, classes)

    def load(self, index: int) -> Picture:
        path = self.path(index)
        return open_image(path, path)

    @cached_property
    def width(self) -> int:
        """Bytes of the longest path."""
        parts = _parts(len(self))
        return max(int((self.starts[part + 1] - self.starts[part]).max()) for part in parts)

    def names(self, positions: np.ndarray) -> np.ndarray:
        """(P,) integers -> (P,) paths, as an array of bytes as wide as the longest path of all"""
        starts, ends = self.starts[positions, None], self.starts[positions + 1, None]  # (P, 1)
        places = starts + np.arange(self.width)  # (P, W)
        letters = self.text[np.minimum(places, len(self.text) - 1)]
        return np.where(places < ends, letters, 0).view(f"S{self.width}")[:, 0]

    def path(self, index: int) -> str:
        name = self.text[self.starts[index] : self.starts[index + 1]].tobytes()
        return os.path.join(self.folder, os.fsdecode(name))

    def open(self, index: int) -> IO[bytes]:
        return open(self.path(index), "rb")

    def stamp(self, index: int) -> tuple[int, int]:
        status = os.stat(self.path(index))
        return status.st_size, status.st_mtime_ns

    def contents(
        self, parts: Iterable[np.ndarray], index: ContentIndex | None = None
    ) -> dict[str, str]:
        """A hash of the files' bytes, or hashes of their sizes and of their times."""
        try:
            if index is not None:
                return {"image_contents": hash_of(*(index.hashes(self, part) for part in parts))}
            hashes = {"image_sizes": hashlib.sha256(), "image_times": hashlib.sha256()}
            for part in parts:
                for digest, column in zip(hashes.values(), stamps(self, part).T, strict=True):
                    digest.update(column.tobytes())
        except OSError as error:
            raise UserError(
                f"cannot read the image {os.fsdecode(error.filename)} ({error.strerror}); repair "
                "it or remove it"
            ) from error
        return {name: digest.hexdigest()[:16] for name, digest in hashes.items()}


# -------------------------------------------------------------------- chosen and joined images


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


class Composed(ImageSource):
    """Images of other sources."""

    def at(self, index: int) -> tuple[ImageSource, int]:
        """The source that holds an image, and the image's index there."""
        raise NotImplementedError

    def load(self, index: int) -> Picture:
        source, index = self.at(index)
        return source.load(index)

    def path(self, index: int) -> str:
        source, index = self.at(index)
        return source.path(index)

    def open(self, index: int) -> IO[bytes]:
        source, index = self.at(index)
        return source.open(index)

    def stamp(self, index: int) -> tuple[int, int]:
        source, index = self.at(index)
        return source.stamp(index)


class Subset(Composed):
    """Some images of a source, which may itself be a subset. Making one is collective."""

    def __init__(self, source: ImageSource, positions: np.ndarray) -> None:
        (targets,) = distributed.once_per_machine(lambda: [source.targets[positions]])
        super().__init__(targets, source.classes)
        self.source, self.positions = source, positions

    def at(self, index: int) -> tuple[ImageSource, int]:
        return self.source, int(self.positions[index])

    def names(self, positions: np.ndarray) -> np.ndarray:
        return self.source.names(self.positions[positions])

    def contents(
        self, parts: Iterable[np.ndarray], index: ContentIndex | None = None
    ) -> dict[str, str]:
        return self.source.contents((self.positions[part] for part in parts), index)


class Joined(Composed):
    """The images of two sources with the same classes, one after the other; made collectively."""

    def __init__(self, first: ImageSource, second: ImageSource) -> None:
        (targets,) = distributed.once_per_machine(
            lambda: [np.append(first.targets, second.targets)]
        )
        super().__init__(targets, first.classes)
        self.first, self.second = first, second

    def at(self, index: int) -> tuple[ImageSource, int]:
        count = len(self.first)
        return (self.first, index) if index < count else (self.second, index - count)

    def names(self, positions: np.ndarray) -> np.ndarray:
        """Bytes; a name of the second source gets a mark, since both may have it."""
        is_first = positions < len(self.first)
        of_first = self.first.names(positions[is_first]).astype(bytes)
        of_second = self.second.names(positions[~is_first] - len(self.first)).astype(bytes)
        marked = np.char.add(b"/", of_second)
        names = np.empty(len(positions), max(of_first.dtype, marked.dtype))
        names[is_first], names[~is_first] = of_first, marked
        return names

    def contents(
        self, parts: Iterable[np.ndarray], index: ContentIndex | None = None
    ) -> dict[str, str]:
        count, (some, others) = len(self.first), tee(parts)
        of_first = self.first.contents((p for part in some if len(p := part[part < count])), index)
        of_second = self.second.contents(
            (p - count for part in others if len(p := part[part >= count])), index
        )
        return of_first | {f"{name}_without_label": value for name, value in of_second.items()}


def forget_other_labels(source: ImageSource, chosen: np.ndarray) -> ImageSource:
    """The same images, of which only the chosen positions keep their labels. Collective."""

    def targets() -> list[np.ndarray]:
        kept = np.full(len(source), len(source.classes))
        kept[chosen] = source.targets[chosen]
        return [kept]

    relabeled = copy.copy(source)
    (relabeled.targets,) = distributed.once_per_machine(targets)
    return relabeled


def held_out_identity(val: Source) -> str:
    """What identifies held-out images, on every process. Collective."""
    assert isinstance(val, ImageSource)  # only its images can be held out
    return distributed.from_main(lambda: " ".join(map(str, val.listing().values())))
