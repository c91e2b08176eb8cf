"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data.loaders import Batch, Loader
from runtime.device import has_streams, synchronize


class Stopwatch:
    """Images per second since the last reading."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since `rate` was last called."""
        return time.perf_counter() - self.started

    def rate(self, images: int) -> float:
        """Images per second since this was last called."""
        now = time.perf_counter()
        rate, self.started = images / (now - self.started), now
        return rate


class TimeSplit:
    """Seconds of a run by what they were spent on; the rest is the student's.

    On a GPU, the time of the teacher is that of the device, and all others are those of the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.events: list[tuple[str, torch.Event, torch.Event]] = []

    @contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        """Add what happens inside to a part of the time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._add(what, time.perf_counter() - started)

    @contextmanager
    def on_device(self, what: str) -> Iterator[None]:
        """The same for what the device computes, without waiting for it."""
        if not has_streams(self.device):
            with self.spent_on(what):
                yield
            return
        start, end = (torch.Event(self.device, enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self.events.append((what, start, end))
        self._collect()

    def parts(self) -> dict[str, float]:
        """Seconds by name; they add up to the time since this was made."""
        if self.events:
            synchronize(self.device)
            self._collect()
        rest = time.perf_counter() - self.started - sum(self.seconds.values())
        return {"student": max(0.0, rest)} | self.seconds

    def _add(self, what: str, seconds: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds

    def _collect(self) -> None:
        while self.events and self.events[0][2].query():
            what, start, end = self.events.pop(0)
            self._add(what, start.elapsed_time(end) / 1000)


class TimedLoader(Loader):
    """A loader for whose batches the waiting is timed."""

    def __init__(self, loader: Loader, times: TimeSplit) -> None:
        self.loader, self.times, self.order = loader, times, loader.order

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        while True:
            with self.times.spent_on("waiting for data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
