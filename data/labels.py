"""Reads text files that name images and their classes, one image per line."""

import csv
import itertools
import os
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from data.content import in_threads
from runtime.distributed import log
from utils import UserError, few, first_line

# What a line of headings calls the columns, in lower case and without blanks and marks.
PATH_HEADINGS = {"path", "file", "filename", "filepath", "image", "imagepath", "imagename", "img"}
PATH_HEADINGS |= {"imageid", "id", "name"}
PATH_HEADINGS |= {f"{name}s" for name in PATH_HEADINGS}
CLASS_HEADINGS = {"label", "class", "classname", "category", "target", "labels", "classes"}
INDEX_HEADINGS = {"", "index", "id", "unnamed0", "nr", "no", "number"}


class Folder(NamedTuple):
    """Where the paths in a file of labels begin."""

    path: str
    names: Container[str] | None = None  # of what is in tar files; None for a folder

    def holds(self, path: str) -> bool:
        if self.names is not None:
            return path in self.names
        return os.path.isfile(os.path.join(self.path, path))


def read_labels(
    file: str, folder: Folder, known: Sequence[str] | None = None
) -> tuple[list[str], list[int], list[str]]:
    """Read a path and a class per line, separated by a tab, a semicolon, a comma or blanks.

    The first two lines decide how the file is read: the separator is the first of these that the
    first line has; a first line that names no file is a line of headings; the path is in the column
    that names a file; a third column that counts the lines is left out. Names that hold the
    separator are in double quotes, as in Python's csv. Empty lines and blanks around a name are
    left out. Paths may lack the ending of the images, and have backslashes.

    Args:
        file: the text file, in UTF-8.
        folder: where the paths begin.
        known: the classes in their order; by default those in the file, sorted as numbers if all
            are whole numbers, else as text.
    Returns: the paths of the images below the folder, in text order and none twice; the position of
        each image's class among the classes; and the classes.
    Raises: UserError, with the number of the line, for a line without one path and one class, an
        image that does not exist or has two classes, and a class that is not known; and for a file
        that is not text or names no image.
    """
    lines_of: dict[str, tuple[str, int]] = {}  # path -> its class and line
    repeated, allowed = 0, None if known is None else set(known)
    lines = _lines(file)
    begin = list(itertools.islice(lines, 2))
    layout = _Layout.of(file, folder, begin)
    for line, path, name in _rows(file, layout, itertools.chain(begin, lines)):
        if allowed is not None and name not in allowed:
            what = f"{name} is not one of the classes, which are {few(known or ())}"
            raise _problem(file, line, f"{what}; repair the name or remove the line")
        before = lines_of.setdefault(path, (name, line))
        if before[0] != name:
            what = f"{path} is of class {name}, but of class {before[0]} in line {before[1]}"
            raise _problem(file, line, f"{what}; remove one of these lines")
        repeated += before[1] != line
    if not lines_of:
        raise UserError(f"{file}: names no image; it needs a path and a class per line", "labels")
    paths = sorted(lines_of)
    _check_existence(file, folder, paths, lines_of)
    names = {name for name, _ in lines_of.values()}
    classes = list(known) if known is not None else sort_classes(names)
    position = {name: index for index, name in enumerate(classes)}
    targets = [position[lines_of[path][0]] for path in paths]
    if repeated:
        log(f"{file}: {repeated} line(s) repeat another line and are left out")
    if layout.odd_headings:
        log(f"{file}: its first line is left out as headings ({layout.odd_headings})")
    return paths, targets, classes


class _Layout(NamedTuple):
    """How the lines of a file are read."""

    folder: Folder
    separator: str
    has_headings: bool
    columns: int  # cells of each line
    path: int  # column of the path
    name: int  # column of the class
    ending: str  # what the paths lack, such as .png
    odd_headings: str  # the first line if its words are not usual headings

    @classmethod
    def of(cls, file: str, folder: Folder, begin: Sequence[tuple[int, str]]) -> "_Layout":
        """The layout that the first two lines, with their numbers, show. Raises: UserError."""
        if not begin:
            return cls(folder, ",", False, 2, 0, 1, "", "")
        number, line = begin[0]
        separator = next((s for s in "\t;," if s in line), " ")
        cells = _cells(file, number, line, separator)
        headings: list[str] = []
        odd = ""
        has_headings = not any(_likeness(cell, folder) for cell in cells)
        if has_headings:
            headings = [re.sub(r"[\W_]", "", cell.lower()) for cell in cells]
            is_usual = (PATH_HEADINGS | CLASS_HEADINGS) & {*headings}
            odd = "" if is_usual else ", ".join(cells)
            if len(begin) > 1:
                number, line = begin[1]
                cells = _cells(file, number, line, separator)
        if len(cells) < 2:
            raise _wrong_columns(file, number, len(cells))
        if len(headings) != len(cells):  # none, or headings of several words between blanks
            headings = [""] * len(cells)
        columns = range(len(cells))
        is_name = [heading in PATH_HEADINGS for heading in headings]
        likeness = [_likeness(cell, folder) for cell in cells]
        path = max(columns, key=lambda c: (likeness[c] == 3, is_name[c], likeness[c]))
        classes = [column for column in columns if column != path]
        if len(classes) > 1:
            # A class may be a number, so without headings only the first column counts the lines.
            rows = [_cells(file, *row, separator) for row in begin[has_headings:]]
            first = "".join(cell for row in rows for cell in row[:1])
            counts = any(headings) or first in ("0", "1", "01", "12")
            has_class = not CLASS_HEADINGS.isdisjoint(headings)

            def is_left_out(c: int) -> bool:
                """Whether a column is empty, counts the lines, or names the image once more."""
                is_index = cells[c].isdecimal() and counts and (c == 0 or headings[c] != "")
                is_index = headings[c] in INDEX_HEADINGS and (is_index or not cells[c])
                return is_index or is_name[c] and has_class

            classes = [column for column in classes if not is_left_out(column)]
        if len(classes) != 1:
            raise _wrong_columns(file, number, len(cells))
        ending = _find(cells[path], folder) or ""
        return cls(folder, separator, has_headings, len(cells), path, classes[0], ending, odd)

    def file(self, path: str) -> str:
        """A path of the file as it is on this machine, below the folder."""
        path = path if has_file_allowed_extension(path, IMG_EXTENSIONS) else path + self.ending
        if "\\" in path and not self.folder.holds(path):
            path = path.replace("\\", "/")
        if os.path.isabs(path):
            path = os.path.relpath(path, self.folder.path)
        return os.path.normpath(path)


def _likeness(cell: str, folder: Folder) -> int:
    """3 for the path of a file, 2 for one that lacks its ending, 1 for any other path, else 0."""
    if (ending := _find(cell, folder)) is not None:
        return 2 if ending else 3
    return "/" in cell or "\\" in cell or has_file_allowed_extension(cell, IMG_EXTENSIONS)


def _find(cell: str, folder: Folder) -> str | None:
    """What is to be added to a cell to make it the path of a file below the folder, or None."""
    endings = [""] + [e for ending in IMG_EXTENSIONS for e in (ending, ending.upper())]
    paths = (cell, cell.replace("\\", "/")) if cell else ()
    return next((end for p in paths for end in endings if folder.holds(p + end)), None)


def _cells(file: str, number: int, line: str, separator: str) -> list[str]:
    try:
        (cells,) = csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as error:
        raise _problem(file, number, f"cannot be read ({first_line(error)})") from error
    cells = [cell.strip() for cell in cells]
    return [cell for cell in cells if cell] if separator == " " else cells


def _wrong_columns(file: str, number: int, count: int) -> UserError:
    what = f"has {count} column(s), not a path and a class"
    if count > 2:
        what += "; leave other columns out, and put a name that holds a comma, a tab or a blank in "
        what += "double quotes"
    return _problem(file, number, what)


def _rows(
    file: str, layout: _Layout, lines: Iterable[tuple[int, str]]
) -> Iterator[tuple[int, str, str]]:
    """(number of the line, path below the folder, class)"""
    for number, line in itertools.islice(lines, int(layout.has_headings), None):
        cells = _cells(file, number, line, layout.separator)
        if len(cells) != layout.columns:
            raise _wrong_columns(file, number, len(cells))
        path, name = cells[layout.path], cells[layout.name]
        if not path or not name:
            raise _problem(
                file, number, f"has no {'class' if path else 'path'}; add it or remove the line"
            )
        yield number, layout.file(path), name


def _lines(file: str) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers. Raises: UserError."""
    try:
        with open(file, encoding="utf-8-sig") as text:  # a spreadsheet may write a mark in front
            for number, line in enumerate(text, start=1):
                if "\0" in line:
                    raise _problem(file, number, "is not text: it holds a zero; save it as UTF-8")
                if line.strip():
                    yield number, line.strip("\r\n")
    except OSError as error:
        what = f"{file}: cannot be read ({first_line(error)}); pass a text file"
        raise UserError(what, "labels") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: is not text in UTF-8 ({first_line(error)}); save it as UTF-8", "labels"
        ) from error


def _check_existence(
    file: str, folder: Folder, paths: Sequence[str], lines_of: dict[str, tuple[str, int]]
) -> None:
    lost = in_threads(lambda some: [path for path in some if not folder.holds(path)], paths)
    if lost:
        first = min(lost, key=lambda path: lines_of[path][1])
        others = f" (nor are those of {len(lost) - 1} other lines)" if len(lost) > 1 else ""
        path = os.path.join(folder.path, first)
        raise _problem(file, lines_of[first][1], f"{path} is not a file{others}; repair the path")


def sort_classes(names: set[str]) -> list[str]:
    """As numbers if all are whole numbers, so that class 10 does not come before class 2."""
    if all(name.isdecimal() and name.isascii() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _problem(file: str, line: int, what: str) -> UserError:
    return UserError(f"{file} line {line}: {what}", "labels")
