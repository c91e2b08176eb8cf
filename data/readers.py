"""Data sets of every kind, opened as sources of images."""

import importlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from timm.data import IterableImageDataset, create_dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from arguments.derived import TORCHVISION_SETS
from data.content import ContentIndex
from data.labels import Folder, read_labels
from data.pictures import Picture, open_image, unreadable
from data.sources import ArraySource, FileSource, ImageSource, Source, StreamSource, arrays_of_files
from runtime import distributed
from runtime.device import local_rank
from runtime.distributed import log
from utils import UserError, few, first_line, is_hidden

DIGITS_FILE = Path(__file__).parent / "digits.npz"


def digits(is_train: bool) -> ArraySource:
    """The included digits: 1,437 to train on, 360 to test on, 8 pixels, ten classes."""
    with np.load(DIGITS_FILE, allow_pickle=False) as file:
        chosen = file["is_test"] != is_train
        gray = np.round(file["images"][chosen] * (255 / 16)).astype(np.uint8)
        labels, classes = file["labels"][chosen], [str(digit) for digit in range(10)]
        return ArraySource(gray, labels, classes)


def open_torchvision(name: str, folder: str, is_train: bool) -> ImageSource:
    class_name = "CIFAR100" if name == "CIFAR" else name
    data_set = getattr(torchvision.datasets, class_name)
    try:
        # One process per machine downloads; the others wait and find the files.
        if local_rank() == 0:
            data_set(folder, train=is_train, download=True)
        distributed.barrier()
        data = data_set(folder, train=is_train)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--data_set {name}: not found in --data_path {folder}, and the download failed "
            f"({first_line(error)}); put torchvision's {class_name} files there"
        ) from error
    return ArraySource(np.asarray(data.data), data.targets, data.classes)


def image_folder(folder: str) -> ImageSource:
    """A folder with one folder of images per class, in alphabetical order.

    One process per machine lists the files. Prints the endings of other files, among which
    photographs may have been left out. Collective.

    Raises: UserError if it does not exist or holds no images.
    """
    folder = _existing(folder, "one folder of images per class")
    listing = Listing(folder)
    if not (classes := listing.classes()):
        raise _no_images(folder, "it holds no folder")
    empty: list[str] = []

    def files_by_class() -> Iterator[list[tuple[str, int]]]:  # in torchvision's order
        for index, name in enumerate(classes):
            paths = listing.images(os.path.join(folder, name))
            if not paths:
                empty.append(name)
            yield [(path, index) for path in paths]

    def list_all() -> list[np.ndarray]:
        arrays = arrays_of_files(folder, files_by_class())
        if empty:
            others = f"left out: {listing.left_out}; " if listing.left_out else ""
            raise _no_images(folder, f"no image of {few(empty)}; {others}{ENDINGS}")
        listing.left_out.report(folder)
        return arrays

    return FileSource(folder, distributed.once_per_machine(list_all), classes)


def images_without_label(folder: str, classes: Sequence[str]) -> ImageSource:
    """All images below a folder, at any depth, without a label; ordered by their paths. Collective.

    Args:
        classes: the names of the classes of the images that have a label.
    Raises: UserError if there is no image.
    """
    folder = _existing(folder, "images")

    def list_all() -> list[np.ndarray]:
        listing = Listing(folder)
        paths = listing.images(folder)
        if not paths:
            raise UserError(f"{folder}: holds no image at any depth; {ENDINGS}", "folder")
        listing.left_out.report(folder)
        return arrays_of_files(folder, [[(path, len(classes)) for path in paths]])

    return FileSource(folder, distributed.once_per_machine(list_all), classes)


def _existing(folder: str, content: str) -> str:
    """The path of a folder of images, with ~ expanded. Raises: UserError if there is none."""
    folder = os.path.expanduser(folder)
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: is not a folder; it must hold {content}", "folder")
    return folder


class LeftOut(Counter[str]):
    """Counts files that are not images by their ending, and what else is left out."""

    def is_image(self, name: str) -> bool:
        """Whether this is the name of an image; any other name is counted."""
        is_known = has_file_allowed_extension(name, IMG_EXTENSIONS)
        if not is_known:
            self[os.path.splitext(name)[1].lower() or "without ending"] += 1
        return is_known

    def __str__(self) -> str:
        return few((f"{what} {count}" for what, count in self.most_common()), most=5)

    def report(self, place: str) -> None:
        if self:
            log(f"{place}: {self.total()} file(s) or folder(s) left out ({self}); {ENDINGS}")


class Listing:
    """Lists the images below a folder, and counts what is left out.

    Left out are files with other endings, what programs write for themselves (utils.is_hidden), and
    links to a folder that holds the link, below which the same images would come again and again.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.left_out = folder, LeftOut()
        here = Path(os.path.abspath(folder))
        self.above = frozenset(_identity(path) for path in (here, *here.parents))

    def classes(self) -> list[str]:
        """The names of the class folders, sorted."""
        folders, files = self._look(self.folder, self.above)
        if loose := sum(has_file_allowed_extension(name, IMG_EXTENSIONS) for name in files):
            self.left_out["image in no class folder"] += loose
        return sorted(folders)

    def images(self, folder: str) -> list[str]:
        """Paths of the images below a folder, in the order of torchvision's ImageFolder."""
        folders = sorted(self._walk(folder, self.above | {_identity(folder)}))
        return [os.path.join(parent, name) for parent, names in folders for name in sorted(names)]

    def _walk(self, folder: str, above: frozenset) -> Iterator[tuple[str, list[str]]]:
        """(folder, names of the images in it), for a folder and all folders below it."""
        folders, files = self._look(folder, above)
        yield folder, [name for name in files if self.left_out.is_image(name)]
        for name in folders:
            inner = os.path.join(folder, name)
            yield from self._walk(inner, above | {_identity(inner)})

    def _look(self, folder: str, above: frozenset) -> tuple[list[str], list[str]]:
        """Names of the folders and of the files in a folder. Raises: UserError."""
        folders, files = [], []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    is_folder = entry.is_dir()
                    if is_hidden(entry.name):
                        self.left_out["hidden folder" if is_folder else "hidden file"] += 1
                    elif not is_folder:
                        files.append(entry.name)
                    elif entry.is_symlink() and _identity(entry.path) in above:
                        self.left_out["link to a folder that holds it"] += 1
                    else:
                        folders.append(entry.name)
        except OSError as error:  # of the folder, or of a link in it
            where = error.filename or folder
            what = f"{where}: cannot be listed ({error.strerror}); repair it or remove it"
            raise UserError(what, "folder") from error
        return folders, files


def _identity(path: str | Path) -> tuple[int, int]:
    """What a folder has in common with every link to it."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


ENDINGS = f"images end in {' '.join(IMG_EXTENSIONS)}"


def _no_images(folder: str, reason: str) -> UserError:
    return UserError(
        f"{folder}: holds no images, or a class folder in it is empty ({reason}); it must hold one "
        "folder of images per class",
        "folder",
    )


def labeled_images(file: str, folder: str, classes: Sequence[str] | None = None) -> ImageSource:
    """Images below a folder whose classes are in a text file (labels.read_labels).

    In the order of their paths, whatever the order of the lines. One process per machine reads the
    file. Collective.

    Args:
        classes: the classes in their order; by default those in the file.
    Raises: UserError for a file with a wrong line, and for a folder that does not exist.
    """
    folder = _existing(folder, f"the images of {file}")

    def make() -> list[np.ndarray]:
        paths, targets, known = read_labels(file, Folder(folder), classes)
        files = (os.path.join(folder, path) for path in paths)
        arrays = arrays_of_files(folder, [zip(files, targets, strict=True)])
        names = "\0".join(known).encode(errors="surrogateescape")
        return [*arrays, np.frombuffer(names, np.uint8)]

    *arrays, names = distributed.once_per_machine(make)
    known = names.tobytes().decode(errors="surrogateescape").split("\0")
    return FileSource(folder, arrays, known)


class TableSource(ImageSource):
    """Images in a table of Hugging Face's datasets, through timm's reader."""

    def __init__(self, reader: Any, targets: Sequence[int], classes: Sequence[str]) -> None:
        super().__init__(targets, classes)
        self.reader = reader

    def load(self, index: int) -> Picture:
        # timm's ImageDataset replaces an unreadable image by the next one; here that is an error.
        reader = self.reader
        name = reader.filename(index) if hasattr(reader, "filename") else index  # internal to timm
        try:
            file = reader[index][0]
        except Exception as error:  # each reader has its own
            raise unreadable(name, error) from error
        return open_image(file, name)

    def contents(
        self, parts: Iterable[np.ndarray], index: ContentIndex | None = None
    ) -> dict[str, str]:
        """Hugging Face's hash, from the paths and times of local files or a download's commit."""
        return {"table": self.reader.dataset._fingerprint}


def open_timm(
    name: str,
    folder: str | None,
    is_train: bool,
    batch_size: int,
    seed: int,
    num_classes: int | None,
) -> Source:
    """Any data set of timm's `create_dataset`: a folder or tar, hfds/…, hfids/…, tfds/…, wds/…

    Args:
        batch_size: of a stream, some of which read whole batches.
        seed: with which a stream shuffles.
        num_classes: of a stream, whose classes cannot be counted.
    Raises: UserError if timm cannot open it.
    """
    if name.lower().startswith(("hfds/", "hfids/")):
        _let_timm_import_hugging_face_datasets()
    try:
        data = create_dataset(
            name,
            root=folder,
            split="train" if is_train else "validation",
            is_training=is_train,
            batch_size=batch_size,
            seed=seed,
        )
    except Exception as error:  # each reader has its own optional package and its own errors
        raise UserError(
            f"--data_set {name}: timm could not open it ({type(error).__name__}: {error}); "
            f"known are DIGITS, IMNET, image_folder, {', '.join(TORCHVISION_SETS)} and timm's "
            "readers hfds/…, hfids/…, tfds/…, wds/… (each with its own package installed)"
        ) from error
    if isinstance(data, IterableImageDataset):
        if not num_classes:
            raise UserError(
                f"--data_set {name}: the classes of a stream cannot be counted; pass --nb_classes"
            )
        return StreamSource(data, [str(label) for label in range(num_classes)])
    reader = data.reader  # the attributes below are internal to timm's readers
    files = getattr(reader, "samples", None)  # else a table of Hugging Face datasets
    targets = reader.dataset[reader.label_key] if files is None else []
    if class_to_idx := getattr(reader, "class_to_idx", None):
        classes = sorted(class_to_idx, key=class_to_idx.get)
    else:
        classes = [str(label) for label in range(max(targets) + 1)]
    if files:
        return FileSource(reader.root, arrays_of_files(reader.root, [files]), classes)
    return TableSource(reader, targets, classes)


def _let_timm_import_hugging_face_datasets() -> None:
    """Give the module name `datasets` to Hugging Face's package, which timm's hfds reader imports.

    Code that imported this file before keeps it.
    """
    ours = sys.modules["datasets"]
    if not hasattr(ours, "open_split"):
        return  # Hugging Face's package has the name already
    here, path = Path(__file__).resolve().parent.parent, sys.path[:]
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
