"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from data.loaders import Batch, Loader
from runtime.device import has_streams, record_event, synchronize


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


Mark = float | torch.Event  # a moment of the host's clock, or of a device


class TimeSplit:
    """Seconds of a run by what they were spent on; the rest is the student's.

    A GPU computes long after the host has asked it to, so what happens within a step is measured
    on the device: 'waiting for data' is what the GPU waited between two steps, however long the
    host did. Evaluation and saving end when the device is done, and are timed by the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.events: list[tuple[str, Any, Any]] = []  # a part, its start and its end

    @contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        """Add what happens inside to a part of the time, by the host's clock."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(what, started, time.perf_counter())

    @contextmanager
    def on_device(self, what: str) -> Iterator[None]:
        """The same for what the device computes or waits for, without waiting for it."""
        start = self.mark()
        yield
        self.add(what, start, self.mark())

    def mark(self) -> Mark:
        """This moment; on a GPU, that at which it has done what it was given so far."""
        if has_streams(self.device):
            return record_event(self.device, is_timed=True)
        return time.perf_counter()

    def add(self, what: str, start: Mark, end: Mark) -> None:
        """Add the time between two marks to a part."""
        if isinstance(start, float) and isinstance(end, float):
            self.seconds[what] = self.seconds.get(what, 0.0) + end - start
        else:
            self.events.append((what, start, end))
            self._collect()

    def parts(self) -> dict[str, float]:
        """Seconds by name; they add up to the time since this was made."""
        if self.events:
            synchronize(self.device)
            self._collect()
        rest = time.perf_counter() - self.started - sum(self.seconds.values())
        return {"student": max(0.0, rest)} | self.seconds

    def _collect(self) -> None:
        while self.events and self.events[0][2].query():
            what, start, end = self.events.pop(0)
            self.add(what, 0.0, start.elapsed_time(end) / 1000)


class TimedLoader(Loader):
    """A loader for whose batches the waiting is timed."""

    def __init__(self, loader: Loader, times: TimeSplit) -> None:
        self.loader, self.times, self.order = loader, times, loader.order

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        while True:
            with self.times.on_device("waiting for data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
