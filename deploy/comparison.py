"""Compares an export with the network of its checkpoint, on the same images."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from deploy.model import Model, ModelCard
from utils import UserError

# Largest difference from the checkpoint's outputs, as a part of the largest output.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2}
LEAST_AGREEMENT = 95.0  # percent of images whose class INT8 must not change
BATCH = 32
LATENCIES, ROUNDS = 30, 5  # timed runs per network, spread over rounds; the median is reported


class Images(NamedTuple):
    """What both networks are given."""

    pixels: torch.Tensor  # (N, H, W, 3) uint8, as the evaluation crops them
    targets: torch.Tensor | None  # (N,) classes; None for noise
    positions: list[int] | None  # see evaluation.Scored
    words: str  # what the images are, for messages


@dataclass
class Row:
    """A network and its line of the table."""

    name: str
    model: Model
    megabytes: float
    accuracy: float | None = None  # percent
    agreement: float | None = None  # percent of images with the class that the checkpoint gives
    difference: float | None = None  # from the checkpoint, as a part of its largest output
    latency: float = 0.0  # milliseconds at batch size 1

    @property
    def cells(self) -> list[str]:
        """The cells of the table, under HEADS."""
        of_100 = ["" if v is None else f"{v:.2f}" for v in (self.accuracy, self.agreement)]
        part = "" if self.difference is None else f"{self.difference:.1e}"
        return [self.name, *of_100, part, f"{self.latency:.2f}", f"{self.megabytes:.2f}"]


HEADS = ["", "accuracy %", "same class %", "difference", "ms, batch 1", "MB"]


def size_of(path: Path) -> float:
    """The megabytes (10^6 bytes) of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


def check_card(exported: ModelCard, card: ModelCard) -> None:
    """Raise UserError if a file does not hold the card that was written into it."""
    for name in ("classes", "temperature", *card.config):
        if getattr(exported, name) != getattr(card, name):
            raise UserError(
                f"the file says {name} {getattr(exported, name)}, but the checkpoint "
                f"{getattr(card, name)}; nothing was written. Please report this"
            )


def compare(rows: Sequence[Row], images: Images) -> None:
    """Fill in the accuracy and latency of each row, and its difference from the first row.

    Raises: UserError if the logits of the first row hold NaN or Inf.
    """
    reference: torch.Tensor | None = None
    for row in rows:
        # The first image by itself: the batch size is free.
        parts = [images.pixels[:1], *images.pixels[1:].split(BATCH)]
        outputs = torch.cat([row.model.outputs(part) for part in parts if len(part)])  # (N, C)
        if reference is None:
            reference = outputs
            if not reference.isfinite().all():
                raise UserError(
                    f"{row.name}: the network's logits are not finite; its weights hold NaN or "
                    "Inf. Pass another checkpoint of the run"
                )
        else:
            wanted = reference.softmax(-1) if row.model.card.with_preprocessing else reference
            row.difference = float((outputs - wanted).abs().max() / wanted.abs().max())
            same = outputs.argmax(dim=1) == reference.argmax(dim=1)
            row.agreement = 100 * same.double().mean().item()
        if images.targets is not None:
            known = outputs if images.positions is None else outputs[:, images.positions]
            row.accuracy = 100 * (known.argmax(dim=1) == images.targets).double().mean().item()
    one = [row.model.prepare(images.pixels[:1]) for row in rows]
    times: list[list[float]] = [[] for _ in rows]
    with torch.inference_mode():
        for _ in range(ROUNDS):  # in turn, so that a busy machine slows all of them
            for row, image, measured in zip(rows, one, times, strict=True):
                row.model.run(image)  # the first run waits for memory
                for _ in range(LATENCIES // ROUNDS):
                    start = time.perf_counter()
                    row.model.run(image)
                    measured.append(1000 * (time.perf_counter() - start))
    for row, measured in zip(rows, times, strict=True):
        row.latency = statistics.median(measured)


def check_difference(row: Row, dtype: str, out: Path, images: Images) -> None:
    """Raise UserError if an export differs from the checkpoint by more than its dtype explains."""
    assert row.difference is not None and row.agreement is not None
    if dtype == "int8":
        if row.agreement >= LEAST_AGREEMENT:
            return
        raise UserError(
            f"--int8 true: {row.agreement:.2f} % of {images.words} keep the class that the "
            f"checkpoint gives, but {LEAST_AGREEMENT:g} % are required; nothing was written. "
            "Remove the flag, or pass --half true"
        )
    if row.difference <= TOLERANCE[dtype]:  # false for NaN as well
        return
    remedy = "--half false" if dtype == "float16" else "another --format"
    raise UserError(
        f"--out {out}: the export differs from the checkpoint by {row.difference:.1e} of the "
        f"largest output on {images.words}, but {TOLERANCE[dtype]:.0e} is allowed; nothing was "
        f"written. Pass {remedy}"
    )
