"""TensorBoard: curves over the images seen, pictures, and the settings beside the final scores.

Training, validation and teacher write to folders of their own, with the same names for the same
quantities. So TensorBoard draws their curves into one chart.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard import SummaryWriter

import utils
from arguments.kinds import as_typed

PICTURES = 16  # of training images, and of validation mistakes
CELL = 200  # pixels of a picture's side
LINE = 22  # pixels of a line of text
OWNER = "run.txt"  # names the run that a folder belongs to


class Board:
    """The TensorBoard folder of a run.

    Args:
        folder: created if it is missing.
        seen: images seen so far; what an interrupted run wrote of later images is hidden.
    Raises: UserError if the file system refuses the folder.
    """

    def __init__(self, folder: Path, seen: int) -> None:
        utils.make_folder(folder)
        _leave_errors_to_main_thread()
        self.folder, self.first, self.seen = folder, seen + 1, seen
        self.writers: dict[str, SummaryWriter] = {}  # by curve

    def writer(self, curve: str = "train") -> SummaryWriter:
        """The writer of one curve; that of 'train' takes texts and pictures too.

        TensorBoard has seven colors, one per writer.
        """
        if curve not in self.writers:
            folder = self.folder / curve
            self.writers[curve] = SummaryWriter(str(folder), purge_step=self.first)
        return self.writers[curve]

    def scalars(self, curve: str, values: Mapping[str, float], seen: int) -> None:
        """Add a point to charts, at a number of images seen."""
        with events_in(self.folder):
            for chart, value in values.items():
                self.writer(curve).add_scalar(chart, value, seen)

    def text(self, name: str, text: str) -> None:
        """Show a text in fixed width."""
        with events_in(self.folder):
            self.writer().add_text(name, "    " + text.replace("\n", "\n    "))

    def pictures(self, name: str, pictures: Sequence[Image.Image], captions: Sequence[str]) -> None:
        """Show a grid of pictures with captions of some lines."""
        if pictures:
            with events_in(self.folder):
                self.writer().add_image(name, grid(pictures, captions), dataformats="HWC")

    def settings(self, values: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        """The settings and some final scores, for TensorBoard's page HPARAMS.

        The page shows them beside the last scores of 'test', whose folder they share. It shows five
        settings: those that differ between runs, then by name, upper case first.
        """
        from torch.utils.tensorboard.summary import hparams

        plain = {k: as_typed(v) if isinstance(v, bool) else v for k, v in values.items()}
        plain = {k: v for k, v in plain.items() if isinstance(v, int | float | str)}
        writer = self.writer("test")
        with events_in(self.folder):
            # Without its first summary, which would show the settings of the first run alone.
            for summary in hparams(plain, {})[1:]:
                writer._get_file_writer().add_summary(summary)
            for name, value in scores.items():
                writer.add_scalar(f"final/{name}", value, self.seen)

    def flush(self) -> None:
        """Write what is waiting in memory."""
        with events_in(self.folder):
            for writer in self.writers.values():
                writer.flush()

    def close(self) -> None:
        """Close the files."""
        with events_in(self.folder):
            for writer in self.writers.values():
                writer.close()
        self.writers = {}


def board_folder(log_dir: str | None, output_dir: str, is_resumed: bool) -> Path | None:
    """Where a run writes its TensorBoard files; None for nowhere.

    By default in OUTPUT_DIR/tb. In a folder that several runs share, the first writes to the folder
    itself, and later ones to run-2, run-3 and so on; a resumed run finds its own again.

    Args:
        log_dir: of the command line; 'none' for nowhere.
        is_resumed: whether this run goes on with an earlier one.
    """
    if log_dir == "none" or not (log_dir or output_dir):
        return None
    if not log_dir:
        return Path(output_dir) / "tb"
    owner = str(Path(output_dir).resolve()) if output_dir else ""
    number = 1
    folder = Path(log_dir)
    while any(folder.glob("train/*events.out*")) or (folder / OWNER).exists():
        note = folder / OWNER
        if is_resumed and owner and note.exists() and note.read_text("utf-8") == owner:
            break
        number += 1
        folder = Path(log_dir) / f"run-{number}"
    utils.make_folder(folder)
    utils.write_whole(folder / OWNER, owner, "log")
    return folder


# ------------------------------------------------------------------------------- pictures


def to_pictures(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> list:
    """Normalized images (N, 3, H, W) as pictures that people can look at."""
    shape = (1, 3, 1, 1)
    pixels = images.float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(picture) for picture in array]


def grid(pictures: Sequence[Image.Image], captions: Sequence[str]) -> np.ndarray:
    """Pictures in rows of up to four, each above its caption: (H, W, 3) uint8."""
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    height = CELL + LINE * (2 + max(caption.count("\n") for caption in captions))
    sheet = Image.new("RGB", (columns * (CELL + 8), rows * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE - 4)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = number % columns * (CELL + 8), number // columns * height
        scale = CELL / max(picture.size)
        size = [max(1, round(side * scale)) for side in picture.size]
        how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
        sheet.paste(picture.resize(size, how), (left, top))
        for line, text in enumerate(caption.splitlines()):
            text = shortened(text, lambda text: draw.textlength(text, font) <= CELL)
            draw.text((left, top + CELL + line * LINE), text, "black", font)
    return np.asarray(sheet)


def shortened(text: str, fits: Callable[[str], bool]) -> str:
    """A line of a caption, cut so that it fits: a name and a share lose the end of the name."""
    name, _, share = text.rpartition(" ")
    end = f"… {share}" if name else "…"
    name = name or share
    while name and not fits(text):
        name = name[:-1]
        text = name + end
    return text


def label_text(target: torch.Tensor, classes: Sequence[str]) -> str:
    """The label of one image: a class (), or the shares (C,) of a mixed one, one per line."""
    if target.ndim == 0:
        index = int(target)
        return classes[index] if index < len(classes) else "no label"
    shares = target[: len(classes)]
    top = shares.topk(min(2, len(shares)))
    named = [
        f"{classes[i]} {share:.2f}"
        for share, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        if share > 0.05
    ]
    return "\n".join(named) or "no label"


def answer_text(logits: torch.Tensor, classes: Sequence[str]) -> str:
    """The one or two most probable classes (C,) of one image, one per line."""
    return label_text(logits.float().softmax(dim=0), classes)


# --------------------------------------------------------------------------------- errors


@contextmanager
def events_in(folder: Path) -> Iterator[None]:
    """Raise UserError if the file system refuses TensorBoard's file in a folder."""
    try:
        yield
    except OSError as error:
        raise utils.could_not_write(folder / "events.out.tfevents", error, "log") from error


def _leave_errors_to_main_thread() -> None:
    """Keep TensorBoard's writing thread from printing a traceback if it fails.

    The main thread raises the same error with its next call.
    """
    report = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        is_writer = type(failed.thread).__name__ == "_AsyncWriterThread"  # internal to tensorboard
        if not (is_writer and isinstance(failed.exc_value, OSError)):
            report(failed)

    threading.excepthook = hook
