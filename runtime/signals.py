"""Signals that ask a run to stop, noted here and obeyed at the end of a step."""

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

from runtime.device import keep_freed_memory

T = TypeVar("T")

_received: list[int] = []  # a signal handler can do little more than note the number


class Interrupted(Exception):
    """A signal asked the run to stop, and the run stopped where it can be resumed.

    Args:
        number: number of the signal.
        when: what was finished last.
        saved: the file or folder that holds everything up to there; None if nothing is saved.
    """

    def __init__(self, number: int, when: str, saved: Path | None) -> None:
        how = (
            f"saved to {saved}; run the same command to resume"
            if saved
            else "nothing was saved (no --output_dir, or no checkpoint so far)"
        )
        super().__init__(f"{signal.Signals(number).name} after {when}: {how}")
        self.exit_code = 128 + number  # as a shell reports it


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Let SIGTERM (schedulers, torchrun) and SIGINT (Ctrl-C) only be noted inside.

    So the run can end after a training step, with a checkpoint. A second SIGINT ends the run at
    once, and so does each signal outside, where nothing is to be saved.
    """

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and _received:
            raise KeyboardInterrupt
        _received.append(number)

    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        _received.clear()


def until_signal(items: Iterable[T]) -> Iterator[T]:
    """The same items up to the one during which this process received a signal."""
    for item in items:
        yield item
        if _received:
            return


def start_worker(worker_id: int) -> None:
    """Prepare a loader worker.

    A worker ignores signals, since schedulers and terminals signal a whole group, and the trainer
    still needs batches to finish its step; a worker that is left over ends by itself. A worker also
    keeps freed memory: the process that it is forked from does so only if it trains on the CPU.
    """
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))  # SIGALRM ends the worker


def end_workers() -> None:
    """Kill the loader workers that are left at the end of a run.

    After an error its traceback still refers to the loaders, so their workers go on, and Python's
    exit would wait a minute for them: they ignore the signal that asks them to end (see above).
    """
    has_handler = hasattr(signal, "SIGCHLD")  # not on Windows
    # torch's handler would take the end of a worker for a crash.
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if has_handler else None
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    if has_handler:
        signal.signal(signal.SIGCHLD, previous)


def received_signal() -> int:
    """Number of the first signal that this process received; 0 for none."""
    return _received[0] if _received else 0
