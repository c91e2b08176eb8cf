"""What a training step pays for the teacher cache: rows read warm and cold, and rows written.

    PYTHONPATH=. python benchmarks/store.py --folder DISK

Medians over batches, and the longest. CPU times are those of the training thread alone. Cold: the
system has dropped the whole file from its memory, as for a process whose batches are far apart.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from teacher import logit_store
from teacher.logit_store import LogitFile, LogitStore, RowFormat

BATCH, BATCHES, STEP = 128, 64, 0.05  # seconds of a training step


def forget(path: Path) -> None:
    """Have the system drop a file from its memory (Linux)."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def milliseconds(actions: list[Callable[[], object]], clock: Callable[[], float]) -> list[float]:
    times = []
    for action in actions:
        began = clock()
        action()
        times.append(1000 * (clock() - began))
    return times


def places_of(batch: int) -> range:
    return range(batch * BATCH, (batch + 1) * BATCH)


def fill(folder: Path, row_format: RowFormat, in_step: bool) -> list[float]:
    """Milliseconds of each step that stores a batch; with in_step, the step waits for the disk."""
    store = LogitStore(folder, BATCH * BATCHES, BATCH * BATCHES, row_format, "store")
    logits = torch.randn(BATCH, row_format.num_classes)
    times = []
    for batch in range(BATCHES):
        began = time.perf_counter()
        store.put(0, places_of(batch), logits)
        if in_step and not store._pending:
            store.flush()
        times.append(1000 * (time.perf_counter() - began))
        time.sleep(STEP)
    store.flush()
    return times


def read(stem: Path, row_format: RowFormat) -> tuple[float, ...]:
    """Median milliseconds to check rows, to restore them, and to check them cold, twice.

    Cold without having asked for the rows, and having asked one step earlier.
    """
    file = LogitFile.open(stem, BATCH * BATCHES, row_format, "store")
    assert np.count_nonzero(file.sums) == BATCH * BATCHES
    check = [partial(file.examine, places_of(batch)) for batch in range(BATCHES)]
    restore = [partial(row_format.decode, examine()[0]) for examine in check[:8]]
    warm = [statistics.median(milliseconds(part, time.thread_time)) for part in (check, restore)]
    del file, check  # since what is mapped is not forgotten
    cold = []
    for is_asked in (False, True):
        times = []
        for batch in range(0, BATCHES, 4):
            forget(stem.with_suffix(".logits"))
            file = LogitFile.open(stem, BATCH * BATCHES, row_format, "store")
            if is_asked:
                file.will_need(places_of(batch))
            time.sleep(STEP)
            times += milliseconds([partial(file.examine, places_of(batch))], time.perf_counter)
            del file
        cold.append(statistics.median(times))
    return (*warm, *cold)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--folder", default=tempfile.gettempdir(), help="folder on the disk to measure"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    logit_store.PENDING_BYTES = 2**22  # so that few batches are enough for several writes
    print("| row | check | restore | cold | asked for | store, median, longest | waiting |")
    print(f"|{' --- |' * 7}")
    for num_classes, topk in ((1000, None), (1000, 100), (21841, None), (21841, 100)):
        row_format = RowFormat(num_classes, "float16", topk)
        puts = []
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            for in_step in (True, False):
                folder = Path(name) / str(in_step)
                folder.mkdir()
                times = fill(folder, row_format, in_step)
                puts.append(f"{statistics.median(times):.2f}, {max(times):.0f}")
            stem = Path(name) / "False" / "view-00000"
            figures = " | ".join(f"{value:.2f}" for value in read(stem, row_format))
        print(
            f"| {num_classes:,}, {topk or 'all'} | {figures} | {puts[1]} | {puts[0]} |", flush=True
        )


if __name__ == "__main__":
    main()
