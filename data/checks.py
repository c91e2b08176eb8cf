"""Checks of the images before training, so that a fault is found before an epoch is paid for."""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from data import pictures
from data.content import THREADS
from data.loaders import READ_ONLY, DeviceLoader
from data.pictures import CANNOT_READ, REMEDY
from data.sources import ImageSource, Source, StreamSource, evenly
from runtime import distributed, signals
from runtime.distributed import log
from utils import UserError, few

T = TypeVar("T")
File = tuple[ImageSource, int]  # an image that is in a file
BATCH = 32  # images that a worker reads before it answers
MOST = 20  # images that are named; the others are counted
SECONDS = 10  # between two printed lines
PART = 2**16  # bytes of a file that are compared at its beginning, middle and end
FEW, DARK = 16, 2**13  # images that are looked at, and the value of which 16 bits have eight times


class UnreadableImages(Dataset):
    """(index, what is wrong with that image): its name and the reason, or '' for a sound image."""

    def __init__(self, images: Dataset) -> None:
        self.images = images

    def __getitem__(self, index: int) -> tuple[int, str]:
        try:
            self.images[index]
        except UserError as error:
            return index, str(error).removeprefix(CANNOT_READ).removesuffix(REMEDY)
        return index, ""


def check_images(sources: Sequence[Source | None], num_workers: int) -> None:
    """Read every image once, divided among the processes, and list those that cannot be read.

    Collective.

    Args:
        num_workers: loader workers of each process.
    Raises: UserError with the list, on rank 0 (the other ranks exit); and for a stream.
    """
    if any(isinstance(source, StreamSource) for source in sources):
        raise UserError(
            "--check_data true: a stream can only be read in its own order; leave the flag out"
        )
    indexable = [source for source in sources if isinstance(source, ImageSource)]
    images: ConcatDataset = ConcatDataset(indexable)
    loader = DataLoader(
        UnreadableImages(images),
        BATCH,
        sampler=range(distributed.rank(), len(images), distributed.world_size()),
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=signals.start_worker,
    )
    count = 0
    first: list[tuple[int, str]] = []
    for batch in with_progress(loader, len(loader), "all images"):
        faults = [(index, fault) for index, fault in batch if fault]
        count += len(faults)
        first += faults[: MOST - len(first)]
    of_ranks = distributed.gather((count, first))
    count = sum(part for part, _ in of_ranks)
    if count:
        lines = [fault for _, fault in sorted(pair for _, part in of_ranks for pair in part)[:MOST]]
        lines += [f"and {count - MOST:,} more"] if count > MOST else []
        distributed.stop_all(
            f"--check_data true: {count:,} of {len(images):,} images cannot be read; repair or "
            "remove them, then run the same command\n  " + "\n  ".join(lines)
        )
    log(f"All {len(images):,} images can be read")


def read_validation(loader: DeviceLoader | None, source: Source | None) -> None:
    """Decode the validation images once, unless an evaluation has done that already.

    So an image that cannot be read ends the run now, and not after an epoch. The evaluation's own
    workers decode, since it is late to fork others: see DeviceLoader.start_workers. Collective.

    Raises: UserError for the first such image, on rank 0; the other ranks exit.
    """
    if loader is None or loader.is_read or not isinstance(source, ImageSource):
        return
    fault = ""
    loader.order.view = READ_ONLY
    try:
        for _ in with_progress(loader.host(), len(loader), "the validation images"):
            pass
    except UserError as error:
        fault = str(error)
    loader.order.view = 0
    if faults := [fault for fault in distributed.gather(fault) if fault]:
        distributed.stop_all(faults[0])


def with_progress(batches: Iterable[T], count: int, what: str) -> Iterator[T]:
    """The same batches; prints how far they are every ten seconds."""
    printed = time.monotonic()
    for number, batch in enumerate(batches, start=1):
        yield batch
        share = f"{100 * number // count} % of {what}"
        if time.monotonic() > printed + SECONDS:
            log(f"Read {share}")
            printed = time.monotonic()


def warn_of_validation_copies(train: ImageSource, val: ImageSource) -> None:
    """Warn of images to train on that are validation images too: files with the same bytes.

    Of more than IDENTIFYING images of one kind, only so many are compared, evenly spread.
    """
    of_val = _files(val, np.arange(len(val)))
    has_label = train.targets < len(train.classes)
    for kind, positions in (
        ("training images", np.flatnonzero(has_label)),
        ("images without a label", train.without_label()),
    ):
        files = _files(train, positions)
        if copies := _copies(files, of_val):
            names = few(source.path(index) for source, index in copies)
            log(
                f"Warning: {len(copies):,} of {len(files):,} {kind} are validation images too "
                f"({names}), so the score is not that of unseen images; remove them"
            )


def _files(source: ImageSource, positions: np.ndarray) -> list[File]:
    """At most IDENTIFYING of these images; none for images that are not in files."""
    chosen = positions[evenly(len(positions))].tolist()
    return [(source, index) for index in chosen if source.path(index)]


def _copies(files: list[File], others: list[File]) -> list[File]:
    """Those of the files whose bytes one of the others has."""
    for key in (_size, _parts):  # few files have a size in common, so few are read

        def look(file: File, key: Callable[[ImageSource, int], object] = key) -> object:
            try:
                return key(*file)
            except OSError:  # found and named when the images are read
                return None

        both = [*files, *others]
        with ThreadPoolExecutor(THREADS) as pool:
            keys = dict(zip(both, pool.map(look, both), strict=True))
        common = {keys[file] for file in files} & {keys[file] for file in others} - {None}
        files, others = ([f for f in some if keys[f] in common] for some in (files, others))
    return files


def _size(source: ImageSource, index: int) -> int:
    return source.stamp(index)[0]


def _parts(source: ImageSource, index: int) -> bytes:
    """A hash of a file, or of the beginning, the middle and the end of a large one."""
    with source.open(index) as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256()
        for place in (0, size // 2, size - PART) if size > 3 * PART else (0, PART, 2 * PART):
            file.seek(place)
            digest.update(file.read(PART))
    return digest.digest()


def warn_of_similar_classes(classes: Sequence[str]) -> None:
    """Warn of classes whose names differ only in upper and lower case."""
    names = Counter(name.lower() for name in classes)
    if similar := [name for name in classes if names[name.lower()] > 1]:
        log(
            f"Warning: classes that differ only in upper and lower case: {few(similar, most=10)}; "
            "if they are one class, give them one name"
        )


def warn_of_dark_images(source: ImageSource) -> None:
    """Warn of images with 16 bits per pixel that use a small part of the range, as of 12 bits."""
    files = [i for i in evenly(len(source), FEW).tolist() if source.path(i)]
    values = [pictures.brightest(partial(source.open, index)) for index in files]
    wide = [value for value in values if value is not None]
    if wide and max(wide) < DARK:
        bits = max(wide).bit_length()
        log(
            f"Warning: {len(wide)} images with 16 bits per pixel were looked at, and none has a "
            f"value above {max(wide):,} of 65,535, so they are shown nearly black; if they hold "
            f"{bits} bits, multiply their values by {65536 >> bits}"
        )


def check_disjoint(train: Source, val: Source, folder: str) -> None:
    """End the run if a file is in both. Collective.

    Args:
        folder: that the names of the validation images begin in, relative to those of training.
    """
    assert isinstance(train, ImageSource) and isinstance(val, ImageSource)

    def shared() -> list[str]:
        names = (os.fsdecode(name) for part in val.all_names() for name in part.tolist())
        held = {os.path.normpath(os.path.join(folder, name)) for name in names}
        names = (os.fsdecode(name) for part in train.all_names() for name in part.tolist())
        return [name for name in names if name in held]

    if both := distributed.from_main(shared):
        distributed.stop_all(
            f"--labels, --eval_labels: {len(both)} of {len(val)} validation images are training "
            f"images too ({few(both)}), so the scores would be too good; remove them from either"
        )


UNEVEN = 3  # how many times as many images of one class as of another are reported


def report_class_counts(train: ImageSource, can_weigh: bool) -> None:
    """Print which classes have no training image, and the counts if they are uneven.

    Args:
        can_weigh: whether --class_weights could help.
    """
    counts = np.bincount(train.targets, minlength=len(train.classes))
    largest = int(counts.argmax())
    order = [int(index) for index in np.argsort(counts, kind="stable") if counts[index]]
    if counts[largest] > UNEVEN * counts[order[0]]:
        most = 10
        lines = [f"{train.classes[index]} {counts[index]}" for index in order]
        if len(lines) > most:
            lines = [*lines[: most // 2], f"… {train.classes[largest]} {counts[largest]}"]
        remedy = "; --class_weights balanced gives each class the same weight in the label loss"
        hint = remedy if can_weigh else ""
        log(f"Class imbalance (images per class, rarest first): {', '.join(lines)}{hint}")
    remedy = "raise --train_samples if it is given, or lower --holdout"
    warn_of_missing_classes(train, "training", remedy)


def warn_of_missing_classes(source: ImageSource, kind: str, remedy: str) -> None:
    """Warn of classes that have no image in a source."""
    counts = np.bincount(source.targets, minlength=len(source.classes))
    if missing := [source.classes[index] for index in np.flatnonzero(counts == 0)]:
        log(
            f"Warning: classes without a {kind} image: {len(missing)} of {len(source.classes)} "
            f"({few(missing, most=10)}); {remedy}"
        )


def check_at_most(flag: str, value: int, most: int) -> None:
    if value > most:
        raise UserError(f"{flag} {value}: at most {most} training images are available; lower it")


def check_same_classes(train: list[str], val: list[str]) -> None:
    if train == val:
        return
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    raise UserError(
        "--data_path: training and validation data have different classes "
        f"(only in training: {few(only_train) or 'none'}; only in validation: "
        f"{few(only_val) or 'none'}); both must have the same class folders"
    )
