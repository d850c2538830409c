"""Encoded pictures: their size, whether they are whole, and their pixels by PIL.

One rule says what a damaged picture is, whatever decodes the batch: it is damaged if PIL will not decode it in full. PIL's
limit against decompression bombs is part of that rule. The orientation in EXIF data is not applied: the crop and all
annotations refer to the picture as it is stored.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterable
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
from PIL import Image

T = TypeVar("T")

_FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
)  # told by content; PIL's other formats are not meant for strangers' files

_JPEG_END = b"\xff\xd9"
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # in the pixels' data only stuffing, restarts and padding follow 0xff


class DamagedSample(Exception):
    """This sample cannot be used; the message says why."""


class DamagedBatch(Exception):
    """`reasons`: position in the batch -> what is wrong with that picture."""

    def __init__(self, reasons: dict[int, str]):
        super().__init__(reasons)
        self.reasons = reasons


def results(futures: Iterable[Future[T]]) -> list[T]:
    """What the samples of a batch have become. Raises DamagedBatch for those that came to a DamagedSample."""
    made: list[T] = []
    reasons: dict[int, str] = {}
    for position, future in enumerate(futures):
        try:
            made.append(future.result())
        except DamagedSample as error:
            reasons[position] = str(error)
    if reasons:
        raise DamagedBatch(reasons)
    return made


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels from the header. Raises DamagedSample if there is none to read or a JPEG file is cut short."""
    if not data:
        raise DamagedSample("the picture is empty")
    size = _jpeg_size(data) if data.startswith(b"\xff\xd8\xff") else _png_size(data)
    width, height = size or _open(data).size
    if width < 1 or height < 1:
        raise DamagedSample(f"the picture's size is {width} x {height}")
    if Image.MAX_IMAGE_PIXELS is not None and width * height > 2 * Image.MAX_IMAGE_PIXELS:
        raise DamagedSample(f"the picture has {width} x {height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS allows")
    return width, height


def _png_size(data: bytes) -> tuple[int, int] | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR" and len(data) >= 24:
        return struct.unpack(">II", data[16:24])
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """None when the segments are not the plain sequence that nearly all files have: then PIL reads the size.

    A decoder that cuts a rectangle out stops at its last line, and would never see that the rest of the file is missing or
    broken. PIL refuses such a file, so what follows the pixels is looked at here. Progressive files are always read to their end.
    """
    size, progressive, at = None, False, 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:  # start of the pixels
            following = _JPEG_MARKER.search(data, at + 2 + int.from_bytes(data[at + 2 : at + 4], "big"))
            if following is None or data.rfind(_JPEG_END, following.start()) < 0:
                raise DamagedSample("the JPEG file is cut short")
            if following.group() != _JPEG_END and not progressive:
                decode_rgb(data)
            return size
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            size, progressive = (width, height), marker == 0xC2
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except MemoryError:
        raise
    except Exception as error:  # PIL's readers raise whatever their parsing runs into
        raise DamagedSample(_reason(error)) from error


def decode_rgb(data: bytes, rectangle: tuple[int, int, int, int] | None = None) -> Image.Image:
    """The whole picture is decoded, then `rectangle` (x0, y0, width, height) is cut out, as 8-bit RGB. Raises DamagedSample."""
    image = _open(data)
    try:
        image.load()
        if rectangle is not None:
            x0, y0, width, height = rectangle
            image = image.crop((x0, y0, x0 + width, y0 + height))
        if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
            image = Image.fromarray(np.rint(np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:
        raise DamagedSample(_reason(error)) from error


def _reason(error: Exception) -> str:
    """What PIL says, without the address of the buffer that it says it about."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture in a known format"
    return str(error) or type(error).__name__
