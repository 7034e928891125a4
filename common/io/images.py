"""Reads untrusted PNG and JPEG files as every viewer shows them: the whole image or nothing."""

import re
import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image, PngImagePlugin
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from common.cli import UserError
from common.io.files import open_file, read_file

MAX_PIXELS = 100_000_000  # a scene has 2 million; more would take GBs of memory
MAX_PASSES = 100 * MAX_PIXELS  # pixels times scans of a progressive JPEG: seconds of decoding
MAX_HEADER = 1 << 24  # bytes before the pixels; a phone may write a depth map of a few MB there
MAX_EXIF_BLOCKS = 1000  # there is one; Pillow copies all blocks that it has for each more

_PNG = b"\x89PNG\r\n\x1a\n"
_SCAN = re.compile(rb"\xff\xda\0[\x08\x0a\x0c\x0e]")  # the start of a scan, and its header's size

# Pillow unpacks texts and colour profiles, which are not used, and refuses more than 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 4 * MAX_HEADER
warnings.filterwarnings("ignore", module=r"PIL\.")  # about EXIF tags, which are not used


class Header(NamedTuple):
    """What a file says of itself: the stored size, and how EXIF turns it, 1 (not at all) to 8."""

    width: int
    height: int
    orientation: int = 1

    def size(self, as_stored: bool = False) -> tuple[int, int]:
        """Width and height as viewers show the image: orientations from 5 on exchange them."""
        stored = self.width, self.height
        return stored if as_stored or self.orientation < 5 else stored[::-1]


def image_size(path: Path, as_stored: bool = False) -> tuple[int, int]:
    """Width and height, as `read_image` returns the image; raises as `read_header`."""
    return read_header(path).size(as_stored)


def read_header(path: Path) -> Header:
    """What a PNG or JPEG says of itself, without decoding it.

    Raises:
        UserError: There is no such file, it is neither PNG nor JPEG, or has over `MAX_PIXELS`.
    """
    with open_file(path, "image") as file:
        return _header(file, path)


def read_image(
    path: Path, flags: int, size: tuple[int, int] | None = None, as_stored: bool = False
) -> np.ndarray:
    """Decode a PNG or JPEG file as OpenCV does for `flags`: blue, green, red, and alpha if kept.

    The image is turned as its EXIF orientation says, which every viewer does; a file without one
    keeps its pixels as stored. Given bytes, `cv2.imdecode` refuses a truncated file; `cv2.imread`
    and Pillow may return an image with rows missing or wrong.

    Args:
        path: The file.
        flags: Of `cv2.imdecode`.
        size: Width and height that the result must have; None for any.
        as_stored: Ignore the EXIF orientation.

    Raises:
        UserError: The file is missing, damaged, or not of the size given.
    """
    data = read_file(path, "image")
    header = _header(BytesIO(data), path)
    actual = header.size(as_stored)
    if size is not None and size != actual:
        raise UserError(
            f"image {str(path)!r} has {actual[0]}x{actual[1]} pixels, but its labels are for "
            f"{size[0]}x{size[1]}."
        )
    scans = len(_SCAN.findall(data))
    if scans * header.width * header.height > MAX_PASSES:
        raise UserError(
            f"image {str(path)!r} has {scans} scans over {header.width}x{header.height} pixels, "
            "which take minutes to decode; save it again."
        )
    try:
        # Turned here and not by OpenCV, so that image_size and read_image always agree.
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        image = None
    if image is None or image.shape[1::-1] != header.size(as_stored=True):
        raise _damaged(path)
    return image if as_stored else turned(image, header.orientation)


def read_rgb(path: Path) -> np.ndarray:
    """Decode a PNG or JPEG into uint8 [H,W,3], RGB; raises as `read_image`."""
    return read_image(path, cv2.IMREAD_COLOR_RGB)


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn the stored pixels [H,W,…] as an EXIF orientation from 1 to 8 says (EXIF 2.3, 4.6.4)."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _header(file: BinaryIO, path: Path) -> Header:
    data = file.read(1 << 16)  # most headers end in it
    if not data.startswith((_PNG, b"\xff\xd8\xff")):
        raise UserError(f"image {str(path)!r} is neither PNG nor JPEG.")
    header = _parsed(data) or _parsed(data + file.read(MAX_HEADER))
    if header is None:
        raise _damaged(path)
    if header.width * header.height > MAX_PIXELS:
        raise UserError(
            f"image {str(path)!r} states {header.width}x{header.height} pixels; up to "
            f"{MAX_PIXELS:,} are read."
        )
    return header


def _parsed(data: bytes) -> Header | None:
    """The header from a file's first bytes; None if they are invalid or end before the pixels."""
    if data.count(b"Exif\0\0") > MAX_EXIF_BLOCKS:
        return None
    try:
        # Not by Image.open: its limit of pixels is not ours. Nothing is decoded before a load().
        image = (PngImageFile if data.startswith(_PNG) else JpegImageFile)(BytesIO(data))
    except Exception:  # damaged files raise many kinds
        return None
    if not image.tile:
        return None
    tags = Image.Exif()  # image.getexif() would also look into XMP, which OpenCV and GDAL do not
    value = None
    with suppress(Exception):  # as above
        tags.load(image.info.get("exif", b""))
        value = tags.get(ExifTags.Base.Orientation)
    return Header(*image.size, value if isinstance(value, int) and 1 <= value <= 8 else 1)


def _damaged(path: Path) -> UserError:
    return UserError(f"image {str(path)!r} is damaged or truncated; fetch it again.")
