"""From an image file to pixels: every format, upright, on white, and large JPEGs part by part."""

import io
import os
import re
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps
from torchvision.io import decode_jpeg

from data.jpegs import BEGIN, first_rows, is_one_whole_scan, size_of_plain_jpeg
from utils import UserError, first_line

try:
    import simplejpeg
except ImportError:  # optional: the same pixels in three quarters of the time
    simplejpeg = None

DECODER = 3  # raised when the same file begins to give different pixels: see teacher/manifest.py
CANNOT_READ, REMEDY = "cannot read the image ", "; repair it or remove it"
LARGE = 2_000_000  # pixels of a JPEG from which a part of it is decoded at a smaller scale
METADATA = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # where Pillow keeps it


def unreadable(name: object, error: Exception) -> UserError:
    """The error for an image that a library cannot read."""
    # torchvision's begin with the function and the line of its own source; Pillow's end with the
    # address of bytes that are no file.
    reason = re.sub(r"^\w+, \S+\.cpp:\d+, | <_io.BytesIO .*>$", "", first_line(error))
    return UserError(f"{CANNOT_READ}{name} ({reason}){REMEDY}")


class Jpeg:
    """A JPEG of which only the header was read.

    np.asarray decodes the whole picture, as `decode` does. Every way of decoding reads the whole
    file, so that all of them find one that is truncated.

    Args:
        content: the whole file.
        size: (width, height) as the file's header has them.
        orientation: how the picture is to be turned, 1 to 8, as in EXIF.
        is_plain: whether size_of_plain_jpeg found nothing unusual.

    Attributes:
        shape: (H, W, 3) of the upright picture.
        is_large: whether a part of it may be decoded at a smaller scale.
    """

    def __init__(
        self,
        content: bytes,
        size: tuple[int, int],
        name: object,
        *,
        orientation: int = 1,
        is_plain: bool = False,
    ) -> None:
        self.content, self.name = content, name
        self.orientation, self.is_plain = orientation, is_plain
        width, height = size[::-1] if orientation in (5, 6, 7, 8) else size
        self.shape = height, width, 3
        self.is_large = width * height >= LARGE

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        try:
            if self.is_plain:
                return _decode_plain_jpeg(self.content)
            with Image.open(io.BytesIO(self.content)) as image:
                return np.array(_rgb(image))
        except Exception as error:
            raise unreadable(self.name, error) from error

    def first_rows(self, rows: int) -> np.ndarray:
        """(at least rows, W, 3) uint8: the upper part of the upright picture. Raises: UserError."""
        # torchvision would print libjpeg's warning.
        if simplejpeg is not None and self.is_plain and is_one_whole_scan(self.content):
            with suppress(ValueError):
                return simplejpeg.decode_jpeg(first_rows(self.content, rows), strict=False)
        return np.asarray(self)

    def reduced(
        self, scale: int, box: tuple[int, int, int, int], reach: int
    ) -> tuple[Image.Image, tuple[float, float, float, float]]:
        """The upright photograph at 1/scale, and the place in it of a box of the full size.

        libjpeg computes only the low frequencies of each block of 8 x 8 pixels, for a third to a
        half of the time of all frequencies. It stops below the box if that leaves the pixels as
        they are.

        Args:
            scale: 2, 4 or 8.
            box: (top, left, height, width) in pixels of the full size.
            reach: how many pixels around the box are needed too, where there are any.
        Returns: an RGB image, and (left, top, right, bottom) in fractions of its pixels, as
            Image.resize takes a box.
        Raises: UserError that names the file.
        """
        top, left, height, width = box
        # Of a tall picture, Pillow resizes the columns first, which would round other values.
        is_cut = self.orientation == 1 and 2 * self.shape[0] <= 3 * self.shape[1]
        try:
            content = first_rows(self.content, top + height + reach) if is_cut else self.content
            with Image.open(io.BytesIO(content)) as image:
                stored = image.size
                image.decodermaxblock = len(content)  # at once, not by 64 KiB
                image.draft(None, (stored[0] // scale, stored[1] // scale))
                if image.size != (-(-stored[0] // scale), -(-stored[1] // scale)):
                    raise ValueError(f"not decoded at 1/{scale} of its size")
                picture = _rgb(image)
        except Exception as error:
            np.asarray(self)  # raises with the message that the file has everywhere else
            raise unreadable(self.name, error) from error
        # A last pixel that the file fills in part is the first one if the photograph is turned.
        x = picture.width - self.shape[1] / scale if self.orientation in (2, 3, 6, 7) else 0
        y = picture.height - self.shape[0] / scale if self.orientation in (3, 4, 7, 8) else 0
        right, bottom = x + (left + width) / scale, y + (top + height) / scale
        return picture, (x + left / scale, y + top / scale, right, bottom)


Picture = np.ndarray | Jpeg


def open_image(file: Any, name: object) -> Picture:
    """A file, its path or a PIL image -> the pixels as of `decode`, or a JPEG still to be decoded.

    Raises: UserError that names the image.
    """
    try:
        if isinstance(file, Image.Image):
            return np.array(_rgb(file))
        content = _jpeg(file)
        if content and (size := size_of_plain_jpeg(content)):
            return Jpeg(content, size, name, is_plain=True)
        with Image.open(file) as image:  # reads only the header, and refuses absurd sizes
            if image.format in ("JPEG", "MPO") and image.width * image.height >= LARGE:
                orientation = _orientation(image)
                return Jpeg(_content(image), image.size, name, orientation=orientation)
            return np.array(_rgb(image))
    except Exception as error:  # the decoders raise a dozen types on damaged files
        raise unreadable(name, error) from error


def decode(file: Any, name: object) -> np.ndarray:
    """A file, its path or a PIL image -> (H, W, 3) uint8; odd images as docs/images.md says.

    Raises: UserError that names the image.
    """
    return np.asarray(open_image(file, name))


def _jpeg(file: Any) -> bytes | None:
    """All of a file that begins as a JPEG; None for any other file."""
    if isinstance(file, (str, bytes, os.PathLike)):
        with open(file, "rb", buffering=0) as opened:
            return _jpeg(opened)
    file.seek(0)
    if file.read(2) != BEGIN:
        return None
    file.seek(0)
    return file.read()


def _decode_plain_jpeg(content: bytes) -> np.ndarray:
    """(H, W, 3) uint8: the same library as Pillow's and the same pixels, without its copies."""
    if simplejpeg is not None:
        with suppress(ValueError):  # torchvision names what is wrong with the file
            return simplejpeg.decode_jpeg(content)
    buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return decode_jpeg(buffer).permute(1, 2, 0).numpy()


def _content(image: ImageFile.ImageFile) -> bytes:
    """The whole file of a PIL image that is open and not loaded."""
    assert image.fp is not None  # open until the image is loaded or closed
    image.fp.seek(0)
    return image.fp.read()


def decode_of_stream(image: Image.Image) -> np.ndarray:
    """A PIL image of one of timm's streams -> (H, W, 3) uint8."""
    return decode(image, "of the stream")


def _rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode -> its RGB: upright, and on white if it is transparent."""
    image.load()  # only now every format knows its orientation; Pillow has turned TIFFs by now
    orientation = _orientation(image)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_eight_bits(image))
    elif image.has_transparency_data:
        picture, image = image.convert("RGBA"), Image.new("RGB", image.size, "white")
        image.paste(picture, mask=picture)
    if image.mode != "RGB" or orientation != 1:
        image = image.convert("RGB")  # also if it is RGB: the image is changed below
    if orientation != 1:
        # An EXIF of one entry, since Pillow would also write the others anew, and fail if one of
        # them is damaged.
        image.info.clear()
        image.getexif()[ExifTags.Base.Orientation] = orientation
        image = ImageOps.exif_transpose(image)
    return image


def _orientation(image: Image.Image) -> int:
    """How EXIF (or XMP) says that the image is to be turned, 1 to 8; 1 is upright."""
    if METADATA.isdisjoint(image.info):
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF, for which Pillow raises many types, does not spoil an image
        return 1


def brightest(open_file: Callable[[], IO[bytes]]) -> int | None:
    """The largest value of an image with 16 or more bits per pixel; None for any other file."""
    try:
        with open_file() as file, Image.open(file) as image:
            return int(np.asarray(image).max()) if image.mode.startswith("I") else None
    except Exception:  # what cannot be read is reported when it is decoded
        return None


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Integers of 16 bits, or floating-point values in 0…1 or 0…255 -> (H, W) uint8.

    Raises: ValueError for other values, whose black and white are not known.
    """
    values = np.asarray(image, dtype=np.float32)
    low, high = values.min(), values.max()  # NaN if one of the values is
    white = 65535 if image.mode != "F" else 1 if high <= 1 else 255
    if not 0 <= low <= high <= white:
        expected = "0…1 or 0…255" if image.mode == "F" else "0…65535"
        raise ValueError(
            f"its values lie in {low:g}…{high:g} and not in {expected}; save it with 8 bits"
        )
    return np.round(values * (255 / white)).astype(np.uint8)
