"""Name the classes of images with a checkpoint or with what export.py made of one.

    python predict.py student.onnx photo.jpg folder 'more/**/*.png' --format csv > classes.csv

Images are decoded, cropped and normalized as in an evaluation. Images that cannot be read are named
at the end, and the exit code is then 1; it is 2 if the command itself cannot work.
"""

import utils

utils.let_threads_sleep()  # before torch is imported

import argparse
import csv
import filecmp
import glob
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import category

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension
from tqdm import tqdm

from arguments.defaults import cores_per_process
from arguments.kinds import number, script_parser, whole
from data import pictures
from data.readers import Listing
from data.transforms import eval_transform
from deploy.model import Model, open_model
from runtime import signals
from runtime.device import default_device, find_device
from utils import UserError, exit_code, few, flags_for, make_folder

LONG = 256  # images for which starting loader workers pays
UNKNOWN = "unknown"  # the answer for an image whose best class is below --threshold
PATIENCE = 5  # seconds before progress is shown


def get_parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    usage = "MODEL IMAGES... [--flag value ...]"
    parser, _ = script_parser("predict.py", usage, __doc__)
    add = parser.add_argument
    # fmt: off
    add("model", help="a checkpoint, a folder of --format timm, an .onnx or a .pt2 file")
    add("images", nargs="+", help="files, folders (searched recursively) and globs")
    add("--format", default="table", choices=tuple(FORMATS), help=
        "output format: an aligned table, CSV, or one JSON object per line")
    add("--top_k", type=whole, metavar="N", default=5, help=
        "classes to print per image, most probable first")
    add("--threshold", type=number, default=0, metavar="P", help=
        f"answer '{UNKNOWN}' if the most probable class has a probability below P, in 0…1")
    add("--sort_into", metavar="FOLDER", help=
        "copy each image into FOLDER/CLASS; never over a file, whose name is then numbered")
    add("--batch_size", type=whole, metavar="N", default=32, help="images per batch")
    add("--device", help=
        "device: cpu, cuda, cuda:1 or mps (default: a GPU if there is one; cpu for .onnx)")
    add("--use_ema", default="auto", choices=("auto", "true", "false"), help=
        "weights of a checkpoint: those with the better recorded accuracy, else the EMA (auto), "
        "the EMA (true) or the raw weights (false)")
    add("--num_workers", type=whole, metavar="N", help=
        f"image-loading processes (default: 0 for up to {LONG} images, else one per core)")
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Predict the images of a command line; returns the exit code."""
    args = get_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name of a file need not be text; see distributed.log
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    return exit_code("predict.py", lambda: predict(args))


def predict(args: argparse.Namespace) -> int:
    """Print the classes of every image.

    Returns: the exit code, 1 if some images could not be read.
    Raises: UserError for whatever the user can correct.
    """
    for flag, least in (("top_k", 1), ("batch_size", 1), ("num_workers", 0)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}")
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold:g}: must lie in 0…1; pass 0.4 for 40 %")
    if not os.path.isdir(args.model) and has_file_allowed_extension(args.model, IMG_EXTENSIONS):
        raise UserError(f"{args.model}: is an image; pass the model first, then the images")
    files = find_images(args.images)
    name = args.device or ("cpu" if args.model.endswith(".onnx") else default_device())
    with flags_for(device="--device", use_ema="--use_ema"):
        device = find_device(name)
        model = open_model(args.model, device, args.use_ema)
    if model.card.temperature != 1:
        print(f"Calibrated: temperature {model.card.temperature:.4f}", file=sys.stderr)
    if args.num_workers is None:
        args.num_workers = max(1, int(cores_per_process())) if len(files) > LONG else 0
    top_k = min(args.top_k, len(model.card.classes))
    if args.threshold and UNKNOWN in model.card.classes:
        raise UserError(
            f"--threshold {args.threshold:g}: answers '{UNKNOWN}', which is a class of this model; "
            "compare the probabilities of --format csv instead"
        )
    answers = [*model.card.classes, *([UNKNOWN] if args.threshold else ())]
    if args.sort_into:
        check_sorting(args.sort_into, answers, args.images, files)
    widths = [max(len(one_line(word)) for word in words) for words in (files, answers)]
    if args.format == "csv":
        heads = [(f"class_{rank}", f"probability_{rank}") for rank in range(1, top_k + 1)]
        print(",".join(["image", *chain(*heads)]))
    broken, copied = [], Counter[str]()
    with tqdm(
        total=len(files), unit=" images", delay=PATIENCE, mininterval=1, disable=None
    ) as progress:
        for path, result in predictions(model, files, args.batch_size, args.num_workers):
            if isinstance(result, str):
                broken.append(result)
            else:
                best, *others = top_classes(result, model.card.classes, top_k)
                if best.probability < args.threshold:
                    best = best._replace(name=UNKNOWN)
                FORMATS[args.format](path, [best, *others], widths)
                if args.sort_into:
                    copied[best.name] += copy_into(Path(args.sort_into, best.name), path)
            progress.update()
    sys.stdout.flush()
    if args.sort_into:
        parts = [f"{one_line(name)} {n:,}" for name, n in copied.most_common() if n]
        if old := len(files) - len(broken) - copied.total():
            parts.append(f"{old:,} there already")
        print(f"Copied into {args.sort_into}: {', '.join(parts)}", file=sys.stderr)
    if broken:
        print(f"{len(broken)} of {len(files)} images could not be read:", file=sys.stderr)
        print("\n".join(map(one_line, broken)), file=sys.stderr)
    return int(bool(broken))


# ------------------------------------------------------------------------------------- images


def find_images(words: Sequence[str]) -> list[str]:
    """The files that files, folders and globs name: in their order, folders sorted, none twice.

    Raises: UserError for a word that names no image.
    """
    images: dict[str, None] = {}
    for word in words:
        matches = [word] if os.path.lexists(word) else sorted(glob.glob(word, recursive=True))
        if not matches:
            what = "no file matches" if glob.has_magic(word) else "no such file or folder"
            raise UserError(f"{word}: {what}; pass files, folders or globs of images")
        for match in matches:
            below = images_below(match) if os.path.isdir(match) else [match]
            if not below and match == word:
                raise UserError(
                    f"{word}: holds no image ({', '.join(IMG_EXTENSIONS)}), nor do the folders "
                    "below it; pass another folder, or the files themselves"
                )
            images.update(dict.fromkeys(below))
    if not images:
        raise UserError(f"{few(words)}: only folders without images match; pass images")
    return list(images)


def images_below(folder: str) -> list[str]:
    """The images of a folder and of those below it, as training finds them.

    Raises: UserError for a folder that cannot be listed.
    """
    listing = Listing(folder)
    images = listing.images(folder)
    if images and listing.left_out:
        print(f"{folder}: left out: {listing.left_out}", file=sys.stderr)
    return images


class ImageFiles(Dataset):
    """Image files, cropped as in an evaluation, or why they cannot be read."""

    def __init__(self, files: Sequence[str], config: dict[str, Any]) -> None:
        self.files, self.transform = np.array(files, dtype=object), eval_transform(config)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray | str:
        """(H, W, 3) uint8, or a message"""
        path = self.files[index]
        try:
            return self.transform(pictures.open_image(path, path))[0]
        except UserError as error:
            return str(error)
        except Exception as error:  # such as a picture of one pixel's width that no crop fits
            return str(pictures.unreadable(path, error))


def predictions(
    model: Model, files: Sequence[str], batch_size: int, num_workers: int
) -> Iterator[tuple[str, torch.Tensor | str]]:
    """Each file with its probabilities (C,), or with a message if it cannot be read.

    Raises: UserError if the network returns NaN or Inf.
    """
    loader = DataLoader(
        ImageFiles(files, model.card.config),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=signals.start_worker,
    )
    start = 0
    for items in loader:
        pixels = [torch.from_numpy(item) for item in items if not isinstance(item, str)]
        rows = iter(model.probabilities(torch.stack(pixels)) if pixels else ())
        for path, item in zip(files[start : start + len(items)], items, strict=True):
            row = item if isinstance(item, str) else next(rows)
            if not isinstance(row, str) and not row.isfinite().all():
                raise UserError(
                    f"{path}: the network's output is not finite; export or train it without "
                    "--half, or check its weights"
                )
            yield path, row
        start += len(items)


# ------------------------------------------------------------------------------------ sorting


def check_sorting(
    folder: str, classes: Sequence[str], words: Sequence[str], files: Sequence[str]
) -> None:
    """Make the folder of --sort_into, if each class can have a folder in it.

    Args:
        words, files: the images of the command line, and what they name.
    Raises: UserError for a folder that cannot be written, or in which these words would find the
        copies, and for a class that would lead elsewhere.
    """
    sources = {os.path.realpath(os.path.dirname(path)) for path in files}
    searched = [os.path.realpath(root) for word in words if (root := searched_from(word))]
    for name in classes:
        if name in ("", ".", "..") or {"/", "\\", "\0"} & set(name):
            raise UserError(f"--sort_into {folder}: class {name!r} cannot name a folder")
        place = os.path.realpath(os.path.join(folder, name))
        if place in sources or any(Path(place).is_relative_to(root) for root in searched):
            raise UserError(
                f"--sort_into {folder}: lies among the images, and the copies would be sorted "
                "again; choose a folder elsewhere"
            )
    with flags_for(folder="--sort_into"):
        make_folder(folder)


def copy_into(folder: Path, path: str) -> bool:
    """Copy an image, never over a file: a copy whose name is taken gets a number, as photo-2.jpg.

    Returns: False if the same bytes are there, so that the same command can be run again.
    Raises: UserError if the file system refuses.
    """
    source, number = Path(path), 1
    target = folder / source.name
    try:
        folder.mkdir(exist_ok=True)
        while os.path.lexists(target):
            if target.is_file() and filecmp.cmp(source, target, shallow=False):
                return False
            number += 1
            target = folder / f"{source.stem}-{number}{source.suffix}"
        with open(target, "xb") as copy, open(source, "rb") as image:
            try:
                shutil.copyfileobj(image, copy)
            except BaseException:  # a full disk, or Ctrl-C
                target.unlink()
                raise
    except OSError as error:
        raise UserError(
            f"--sort_into: {path} could not be copied to {target} ({error.strerror}); free some "
            "space or choose another folder"
        ) from error
    return True


def searched_from(word: str) -> str:
    """The folder below which a folder or a glob finds images at any depth; '' for others."""
    if os.path.lexists(word):
        return word if os.path.isdir(word) else ""
    if not glob.has_magic(os.path.dirname(word)):
        return ""
    return str(Path(*takewhile(lambda part: not glob.has_magic(part), Path(word).parts)))


# ------------------------------------------------------------------------------------- output


class Guess(NamedTuple):
    """A class and its probability."""

    name: str
    probability: float


def top_classes(probabilities: torch.Tensor, classes: Sequence[str], top_k: int) -> list[Guess]:
    """(C,) -> the most probable classes, best first."""
    # Of equal probabilities the first class comes first, as in every evaluation.
    values, indices = (t[:top_k].tolist() for t in probabilities.sort(descending=True, stable=True))
    return [Guess(classes[i], value) for value, i in zip(values, indices, strict=True)]


def one_line(text: str) -> str:
    """A name as one line that no terminal takes for a command: control characters escaped."""
    return "".join(repr(c)[1:-1] if category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def as_cell(text: str) -> str:
    """A name that no spreadsheet runs as a formula (OWASP, 'CSV injection')."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def print_row(path: str, guesses: Sequence[Guess], widths: Sequence[int]) -> None:
    """Aligned columns: the image, then class and probability in percent.

    Args:
        widths: of the longest path and of the longest class.
    """
    cells = [f"{one_line(g.name):{widths[1]}} {100 * g.probability:6.2f} %" for g in guesses]
    print("  ".join([f"{one_line(path):{widths[0]}}", *cells]))


def print_csv(path: str, guesses: Sequence[Guess], widths: Sequence[int]) -> None:
    """Columns image, class_1, probability_1, class_2 and so on."""
    cells = [cell for g in guesses for cell in (as_cell(g.name), f"{g.probability:.8g}")]
    csv.writer(sys.stdout, lineterminator="\n").writerow([as_cell(path), *cells])


def print_json(path: str, guesses: Sequence[Guess], widths: Sequence[int]) -> None:
    """{"image": …, "classes": [{"name": …, "probability": …}, …]}"""
    classes = [{"name": g.name, "probability": float(f"{g.probability:.8g}")} for g in guesses]
    print(json.dumps({"image": path, "classes": classes}, ensure_ascii=False))


FORMATS = {"table": print_row, "csv": print_csv, "jsonl": print_json}


if __name__ == "__main__":
    sys.exit(main())
