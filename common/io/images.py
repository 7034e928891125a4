"""Reads untrusted PNG and JPEG files: the header first, then the whole image or nothing."""

import struct
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np

from common.cli import UserError
from common.io.files import open_file, read_file

MAX_PIXELS = 100_000_000  # a scene has 2 million; a header beyond this is a mistake or a bomb

MAX_BYTES = 1 << 30
MAX_SCANS = 100  # a progressive JPEG has ten; 30 bytes of a scan cost a pass over all pixels

_PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0…15 without DHT, JPG, DAC


def image_size(path: Path) -> tuple[int, int]:
    """Width and height that the header states, without decoding.

    Raises:
        UserError: There is no such file, it is neither PNG nor JPEG, or has over `MAX_PIXELS`.
    """
    with open_file(path, "image", MAX_BYTES) as file:
        return _size(file, path)


def read_image(path: Path, flags: int, size: tuple[int, int]) -> np.ndarray:
    """Decode a PNG or JPEG file as OpenCV does for `flags`: blue, green, red, and alpha if kept.

    Given bytes, `cv2.imdecode` refuses a truncated file; `cv2.imread` and Pillow may return an
    image with rows missing or wrong.

    Raises:
        UserError: The file is missing, damaged, or not of the (width, height) given.
    """
    data = read_file(path, "image", MAX_BYTES)
    actual = _size(BytesIO(data), path)
    if actual != size:
        raise UserError(
            f"image {str(path)!r} has {actual[0]}x{actual[1]} pixels, but its labels are for "
            f"{size[0]}x{size[1]}."
        )
    # The bytes of a scan never contain 0xFFDA (JPEG, B.1.1.5); a thumbnail adds a few.
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS:
        raise UserError(f"image {str(path)!r} has over {MAX_SCANS} scans, which no camera writes.")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None or image.shape[1::-1] != size:
        raise UserError(f"image {str(path)!r} is damaged or truncated; fetch it again.")
    return image


def read_rgb(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode a PNG or JPEG into uint8 [H,W,3], RGB.

    Raises:
        UserError: The file is not an image, is cut short, or is not of `size` (width, height).
    """
    # Turned by its EXIF tag, a photograph would not have the size in its header and labels.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    bgr = read_image(path, flags, size or image_size(path))
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def _size(file: BinaryIO, path: Path) -> tuple[int, int]:
    start = file.read(24)
    if start.startswith(_PNG) and len(start) == 24:
        width, height = struct.unpack(">II", start[16:])
    elif start.startswith(b"\xff\xd8\xff"):
        width, height = _jpeg_size(file)
    else:
        raise UserError(f"image {str(path)!r} is neither PNG nor JPEG.")
    if not 0 < width * height <= MAX_PIXELS:
        raise UserError(
            f"image {str(path)!r} states {width}x{height} pixels; up to {MAX_PIXELS:,} are read."
        )
    return width, height


def _jpeg_size(file: BinaryIO) -> tuple[int, int]:
    """Width and height from the first frame header, or 0, 0 without a frame header."""
    file.seek(2)
    # A camera writes some tens of segments; an untrusted file may hold megabytes of fill bytes.
    for _ in range(10_000):
        head = file.read(9)
        if len(head) < 9 or head[0] != 0xFF:
            break
        if head[1] in _JPEG_FRAMES:
            height, width = struct.unpack(">HH", head[5:9])
            return width, height
        # Skip a fill byte before the marker, or a segment by its length.
        file.seek(-8 if head[1] == 0xFF else struct.unpack(">H", head[2:4])[0] - 7, 1)
    return 0, 0
