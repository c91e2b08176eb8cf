"""Reads images before training, so that a damaged one is found before an epoch is paid for."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from torch.utils.data import ConcatDataset, DataLoader, Dataset

import runtime
from datasets import ImageSource, Source, StreamSource
from loaders import READ_ONLY, Data
from pictures import CANNOT_READ, REMEDY
from runtime import log
from utils import UserError

T = TypeVar("T")
BATCH = 32  # images that a worker reads before it answers
MOST = 20  # images that are named; the others are counted
SECONDS = 10  # between two printed lines


class Faults(Dataset):
    """(index, what is wrong with that image): its name and the reason, or '' where it is sound."""

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
        Faults(images),
        BATCH,
        sampler=range(runtime.rank(), len(images), runtime.world_size()),
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=runtime.leave_signals_to_the_trainer,
    )
    count = 0
    first: list[tuple[int, str]] = []
    for batch in follow(loader, len(loader), "all images"):
        faults = [(index, fault) for index, fault in batch if fault]
        count += len(faults)
        first += faults[: MOST - len(first)]
    found = runtime.gather((count, first))
    count = sum(part for part, _ in found)
    if count:
        lines = [fault for _, fault in sorted(pair for _, part in found for pair in part)[:MOST]]
        lines += [f"and {count - MOST:,} more"] if count > MOST else []
        runtime.stop_all(
            f"--check_data true: {count:,} of {len(images):,} images cannot be read; repair or "
            "remove them, then run the same command\n  " + "\n  ".join(lines)
        )
    log(f"All {len(images):,} images can be read")


def read_validation(data: Data) -> None:
    """Decode the validation images once, unless an evaluation has done that already.

    So an image that cannot be read ends the run now, and not after an epoch. The evaluation's own
    workers decode, since it is late to fork others: see DeviceLoader.start_workers. Collective.

    Raises: UserError for the first such image, on rank 0; the other ranks exit.
    """
    loader = data.val_loader
    if loader is None or loader.is_read or not isinstance(data.val, ImageSource):
        return
    fault = ""
    loader.order.view = READ_ONLY
    try:
        for _ in follow(loader.host(), len(loader), "the validation images"):
            pass
    except UserError as error:
        fault = str(error)
    loader.order.view = 0
    if faults := [fault for fault in runtime.gather(fault) if fault]:
        runtime.stop_all(faults[0])


def follow(batches: Iterable[T], count: int, what: str) -> Iterator[T]:
    """The same batches; prints how far they are every ten seconds, and stops on a signal.

    Raises: runtime.Interrupted.
    """
    printed = time.monotonic()
    for number, batch in enumerate(batches, start=1):
        yield batch
        share = f"{100 * number // count} % of {what}"
        if signal_number := runtime.received_signal():
            raise runtime.Interrupted(signal_number, f"reading {share}", None)
        if time.monotonic() > printed + SECONDS:
            log(f"Read {share}")
            printed = time.monotonic()
