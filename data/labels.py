"""Reads text files that name images and their classes, one image per line."""

import csv
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from utils import UserError, few, first_line

# What the first column of a line of headings is called.
HEADINGS = {"path", "paths", "file", "filename", "file_name", "filepath", "file_path", "image"}
HEADINGS |= {"images", "image_path", "image_name", "image_id", "img", "name", "id"}
THREADS = 16  # each file costs a round trip on a network file system
FILES_AT_ONCE = 1024  # that a thread looks for


class Labels(NamedTuple):
    """What a file of labels says, in the order of the paths.

    Args:
        paths: of the images, below the folder; none twice.
        targets: the position of each image's class among the classes.
        classes: names of the classes.
        repeated: how many lines said again what another line says.
    """

    paths: list[str]
    targets: list[int]
    classes: list[str]
    repeated: int


def read_labels(file: str, folder: str, known: Sequence[str] | None = None) -> Labels:
    """Read a path and a class per line, separated by a comma, a tab or blanks.

    The first line decides: a tab separates where it has one, else a comma, else blanks. Names that
    hold the separator are in double quotes, as in Python's csv. A first line of headings, such as
    path,label, is left out; so are empty lines, and blanks around a name.

    Args:
        file: the text file, in UTF-8.
        folder: where the paths begin.
        known: the classes in their order; by default those in the file, sorted as numbers where all
            are whole numbers, else as text.
    Raises: UserError, with the number of the line, for a line without one path and one class, an
        image that does not exist or has two classes, and a class that is not known; and for a file
        that is not text or names no image.
    """
    found: dict[str, tuple[str, int]] = {}  # path -> its class and line
    repeated, allowed = 0, None if known is None else set(known)
    for line, path, name in _rows(file, folder):
        if allowed is not None and name not in allowed:
            what = f"{name} is not one of the classes, which are {few(known or ())}"
            raise _problem(file, line, what)
        before = found.setdefault(path, (name, line))
        if before[0] != name:
            what = f"{path} is of class {name}, but of class {before[0]} in line {before[1]}"
            raise _problem(file, line, what)
        repeated += before[1] != line
    if not found:
        raise UserError(f"{file}: names no image; it needs a path and a class per line", "labels")
    paths = sorted(found)
    _check_existence(file, folder, paths, found)
    classes = list(known) if known is not None else _sorted({name for name, _ in found.values()})
    position = {name: index for index, name in enumerate(classes)}
    return Labels(paths, [position[found[path][0]] for path in paths], classes, repeated)


def _rows(file: str, folder: str) -> Iterator[tuple[int, str, str]]:
    """(number of the line, path below the folder, class)"""
    separator = ""
    for number, line in _lines(file):
        is_first = not separator
        separator = separator or next((s for s in "\t," if s in line), " ")
        try:
            (cells,) = csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True)
        except (csv.Error, ValueError) as error:
            raise _problem(file, number, f"cannot be read ({first_line(error)})") from error
        cells = [cell.strip() for cell in cells]
        if separator == " ":
            cells = [cell for cell in cells if cell]
        if len(cells) != 2:
            what = f"has {len(cells)} column(s), not a path and a class"
            if len(cells) > 2:
                what += "; put a name that holds a comma, a tab or a blank in double quotes"
            raise _problem(file, number, what)
        path, name = cells
        is_heading = is_first and path.lower() in HEADINGS
        if is_heading and not os.path.isfile(os.path.join(folder, path)):
            continue
        if not path or not name:
            raise _problem(file, number, f"has no {'class' if path else 'path'}")
        if os.path.isabs(path):
            path = os.path.relpath(path, folder)
        yield number, os.path.normpath(path), name


def _lines(file: str) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers. Raises: UserError."""
    try:
        with open(file, encoding="utf-8-sig") as text:  # a spreadsheet may write a mark in front
            for number, line in enumerate(text, start=1):
                if "\0" in line:
                    raise UserError(f"{file}: is not text (line {number} holds a zero)", "labels")
                if line.strip():
                    yield number, line.strip("\r\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)})", "labels") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: is not text in UTF-8 ({first_line(error)}); save it as UTF-8", "labels"
        ) from error


def _check_existence(
    file: str, folder: str, paths: Sequence[str], found: dict[str, tuple[str, int]]
) -> None:
    def missing(some: Sequence[str]) -> list[str]:
        return [path for path in some if not os.path.isfile(os.path.join(folder, path))]

    parts = [paths[at : at + FILES_AT_ONCE] for at in range(0, len(paths), FILES_AT_ONCE)]
    with ThreadPoolExecutor(THREADS) as pool:
        lost = [path for part in pool.map(missing, parts) for path in part]
    if lost:
        first = min(lost, key=lambda path: found[path][1])
        others = f" (nor are those of {len(lost) - 1} other lines)" if len(lost) > 1 else ""
        where = os.path.join(folder, first)
        raise _problem(file, found[first][1], f"{where} is not a file{others}; repair the path")


def _sorted(names: set[str]) -> list[str]:
    """As numbers where all are whole numbers, so that class 10 does not come before class 2."""
    if all(name.isdecimal() and name.isascii() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _problem(file: str, line: int, what: str) -> UserError:
    return UserError(f"{file} line {line}: {what}", "labels")
