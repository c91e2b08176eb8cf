"""What the header of a JPEG says; JPEGs with anything unusual are left to Pillow."""

import re
import struct
from collections.abc import Iterator

from PIL import ExifTags, Image

BEGIN, END = b"\xff\xd8", b"\xff\xd9"
SEQUENTIAL = {0xC0, 0xC1}  # baseline, extended
FRAMES = SEQUENTIAL | {0xC2}  # progressive
SCAN = 0xDA
SAMPLING = {b"\x11\x11\x11", b"\x21\x11\x11", b"\x22\x11\x11"}  # 4:4:4, 4:2:2, 4:2:0
OTHERS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # tables, comments, what programs add
EXIF = b"Exif\0\0"
# Two bytes that code no pixels: neither a stuffed 0xFF nor a mark from which decoding can restart.
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def size_of_plain_jpeg(content: bytes) -> tuple[int, int] | None:
    """(width, height) of an upright JPEG with three components of 8 bits each.

    Pillow needs 0.1 to 0.2 ms to read a header, which is a tenth of decoding a small photograph.

    Args:
        content: a file that begins with BEGIN.
    Returns: None if anything in the header is unusual.
    """
    size = None
    for marker, _, segment in _segments(content):
        if marker == SCAN:
            return size
        if marker in FRAMES:
            if size is not None or len(segment) != 15:
                return None
            bits, height, width, components = struct.unpack_from(">BHHB", segment)
            sampling = segment[7::3]  # how many pixels of each component make one of the coarsest
            if (bits, components) != (8, 3) or sampling not in SAMPLING:
                return None
            if not 0 < width * height <= (Image.MAX_IMAGE_PIXELS or width * height):
                return None  # Pillow's limit against bombs
            size = width, height
        elif marker not in OTHERS or not _is_harmless(segment):
            return None
    return None


def first_rows(content: bytes, rows: int) -> bytes:
    """The JPEG with a smaller height in its header, so that decoders stop below these rows.

    Their pixels are the same as in the whole picture. Decoders skip the bytes of the other rows, of
    which libjpeg warns.

    Returns: the content itself if its rows do not follow each other (progressive JPEGs), if its
        end is missing, which not every decoder would report, or if nothing is to be left out.
    """
    for marker, place, segment in _segments(content):
        if marker in SEQUENTIAL:
            (height,) = struct.unpack_from(">H", segment, 1)
            block = 8 * max(sampling & 15 for sampling in segment[7::3])  # rows stored together
            kept = block * (rows // block + 1)  # the row below is weighed into the last one
            if kept < height and content.rfind(END, place) != -1:
                return content[: place + 1] + struct.pack(">H", kept) + content[place + 3 :]
    return content


def is_one_whole_scan(content: bytes) -> bool:
    """Whether the end follows the coded pixels of the first scan, with no damaged marker before.

    A decoder that stops after the first rows may not report a damaged marker.
    """
    for marker, place, _ in _segments(content):
        if marker == SCAN:
            found = MARKER.search(content, place)
            return found is not None and found.group() == END
    return False


def _segments(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(marker, where the segment begins, segment), up to the first scan or anything unusual."""
    place = len(BEGIN)
    while place + 4 <= len(content):
        mark, marker, length = struct.unpack_from(">BBH", content, place)
        if mark != 0xFF or length < 2:
            return
        yield marker, place + 4, content[place + 4 : place + 2 + length]
        if marker == SCAN:
            return
        place += 2 + length


def _is_harmless(segment: bytes) -> bool:
    """Whether a segment turns no picture and adds none (EXIF, XMP, the index of an MPO)."""
    if segment.startswith(EXIF):
        return _is_upright(segment[len(EXIF) :])
    return b"rientation" not in segment and not segment.startswith(b"MPF\0")


def _is_upright(exif: bytes) -> bool:
    """Whether the first directory of this EXIF is whole and leaves a picture as it is."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return False
    try:
        (begin,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, begin)
        rows = [struct.unpack_from(f"{order}HHIH", exif, begin + 2 + 12 * i) for i in range(count)]
    except struct.error:
        return False
    found = [row[1:] for row in rows if row[0] == ExifTags.Base.Orientation]
    return all(row == (3, 1, 1) for row in found)  # one integer of 16 bits, which is 1
