"""The images of one distillation: which are trained on, which choose, and which judge."""

import csv
import io
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from arguments.derived import has_validation
from arguments.parsing import parse
from data.checks import (
    check_images,
    report_class_counts,
    warn_of_similar_classes,
    warn_of_validation_copies,
)
from data.readers import images_without_label
from data.sources import FileSource, ImageSource, Joined, Subset, evenly, hash_of, stratified
from datasets import hold_out, open_split
from utils import UserError, flags_for, write_whole

SIZED = 200  # images whose size is read
CROSS_VALIDATED = 500  # labeled images from which on one held-out fifth chooses well enough


@dataclass
class Images:
    """The images of a distillation, as files of labels below a folder.

    Attributes:
        root: the folder that the paths in the files begin in.
        folder: of train.csv, test.csv, and fold_K_train.csv and fold_K_val.csv.
        labeled, test, unlabeled: numbers of images.
        chosen_by: labeled images that choose, over all folds.
        chance: share of the labeled images that are of the most common class, in %.
        side: the median of the shorter sides, in pixels.
        pile: folder of the images without labels; ''.
        identity: changes with the images and their labels.
    """

    root: str
    folder: Path
    classes: list[str]
    labeled: int
    test: int
    unlabeled: int
    folds: int
    chosen_by: int
    chance: float
    side: int
    pile: str
    identity: str

    def flags(self, fold: int | None = None) -> list[str]:
        """The flags of main.py for the whole training set, or for what one fold leaves of it."""
        train, val = (
            ("train", "test") if fold is None else (f"fold_{fold}_train", f"fold_{fold}_val")
        )
        flags = ["--data_set", "image_folder", "--data_path", self.root]
        for flag, name in (("--labels", train), ("--eval_labels", val)):
            flags += [flag, str(self.folder / f"{name}.csv")]
        return flags


def look(
    root: str, labels: str, eval_labels: str, unlabeled: str, folder: Path, is_known: bool = False
) -> Images:
    """Look at the images, decide which of them judge and which choose, and write that down.

    Validation images judge: those of a folder val or of --eval_labels, or else a fifth of the
    labeled images. With few labels, all other labeled images choose, each once (cross-validation).

    Args:
        root: class folders, a folder with train and val, or the images that `labels` names.
        unlabeled: a folder; 'rest' for the images below the root that no file of labels names; ''.
        folder: to write the files of labels in.
        is_known: whether the images were read before, so that they need not be read again.
    Raises: UserError for images that are missing, unreadable, in both parts, or too few.
    """
    flags = ["--data_path", root]
    for name, file in (("labels", labels), ("eval_labels", eval_labels)):
        flags += [f"--{name}", file] if file else []
    args = parse(flags)
    if args.data_set == "tars":
        raise UserError(f"{root}: names tar files; unpack them, and pass the folder")
    train = open_split(args, is_train=True)
    assert isinstance(train, FileSource)
    test: ImageSource
    if has_validation(args):
        test = open_split(args, is_train=False, classes=train.classes)  # type: ignore[assignment]
    else:
        _require_images(train, 5)
        train, test = hold_out(train, max(len(train.classes), len(train) // 5))
    _require_images(train, 2)
    pile, waiting = _open_pile(unlabeled, root, [train, test], folder)
    if not is_known:
        warn_of_similar_classes(train.classes)
        report_class_counts(train, can_weigh=False)
        warn_of_validation_copies(train if waiting is None else Joined(train, waiting), test)
        check_images([train, test, waiting], args.num_workers)
    folds = _folds(train)
    files = {"train": train, "test": test}
    for number, held_out in enumerate(folds):
        others = np.setdiff1d(np.arange(len(train)), held_out)
        files[f"fold_{number}_train"] = Subset(train, others)
        files[f"fold_{number}_val"] = Subset(train, held_out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in files.items():
        _write(folder / f"{name}.csv", source, root)
    known = [train, test, *([waiting] if waiting else [])]
    return Images(
        os.path.abspath(root),
        folder,
        train.classes,
        len(train),
        len(test),
        len(waiting) if waiting else 0,
        len(folds),
        sum(map(len, folds)),
        100 * np.bincount(train.targets).max() / len(train),
        _median_side(known),
        pile,
        hash_of(*(str(sorted(source.identity().items())).encode() for source in known)),
    )


def _require_images(train: ImageSource, least: int) -> None:
    counts = np.bincount(train.targets, minlength=len(train.classes))
    fewest = int(counts.argmin())
    if len(train.classes) < 2 or counts[fewest] < least:
        of_which = f"{counts[fewest]} labeled image(s) of {train.classes[fewest]}"
        need = "two classes" if len(train.classes) < 2 else f"{least} of each class"
        where = " (one of five judges)" if least == 5 else ""
        raise UserError(f"{of_which}: {need} are needed{where}; label more images")


def _open_pile(
    unlabeled: str, root: str, labeled: Sequence[ImageSource], folder: Path
) -> tuple[str, ImageSource | None]:
    """The folder of the images without labels, and the images in it."""
    if not unlabeled:
        return "", None
    with flags_for(folder="--unlabeled"):
        source = images_without_label(
            root if unlabeled == "rest" else unlabeled, labeled[0].classes
        )
    known = {os.path.realpath(s.path(i)) for s in labeled for i in range(len(s))}
    paths = [source.path(index) for index in range(len(source))]
    others = [path for path in paths if os.path.realpath(path) not in known]
    if not others:
        raise UserError(f"--unlabeled {unlabeled}: every image in it has a label; leave it out")
    if len(others) == len(paths):
        return os.path.abspath(unlabeled), source
    # Images that have a label are left out, and those that judge must not be trained on.
    pile = folder / "unlabeled"
    for path in others:
        link = pile / os.path.relpath(path, source.folder)  # type: ignore[attr-defined]
        link.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(link):
            link.symlink_to(os.path.abspath(path))
    return str(pile.absolute()), images_without_label(str(pile), labeled[0].classes)


def _folds(train: ImageSource) -> list[np.ndarray]:
    """The positions that choose: five parts of few images, or one fifth of many."""
    counts = np.bincount(train.targets, minlength=len(train.classes))
    if len(train) >= CROSS_VALIDATED:
        return [stratified(train.targets, len(train) // 5, seed=0)]
    parts = min(5, int(counts.min()))
    shuffled = np.random.default_rng(0).permutation(len(train))
    by_class = shuffled[np.argsort(train.targets[shuffled], kind="stable")]
    return [np.sort(by_class[part::parts]) for part in range(parts)]


def _median_side(sources: Sequence[ImageSource]) -> int:
    sides = []
    for source in sources:
        for index in evenly(len(source), SIZED):
            with Image.open(source.path(int(index))) as image:
                sides.append(min(image.size))
    return int(statistics.median(sides))


def _write(file: Path, source: ImageSource, root: str) -> None:
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(["path", "class"])
    for index, target in enumerate(source.targets):
        writer.writerow([os.path.relpath(source.path(index), root), source.classes[target]])
    write_whole(file, text.getvalue())
