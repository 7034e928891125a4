"""Reads untrusted PNG and JPEG files as every viewer shows them: the whole image or nothing."""

import re
import struct
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np

from common.cli import UserError
from common.io.files import open_file, read_file

MAX_PIXELS = 100_000_000  # a scene has 2 million; a header beyond this is a mistake or a bomb

MAX_BYTES = 1 << 30
MAX_SCANS = 100  # a progressive JPEG has ten; 30 bytes of a scan cost a pass over all pixels
MAX_SEGMENTS = 10_000  # a camera writes some tens of segments; an untrusted file any number

_START = 1 << 16  # bytes; most headers end in them
_PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0…15 without DHT, JPG, DAC
_BARE = frozenset(range(0xD0, 0xD9)) | {0x01}  # RST0…7, SOI, TEM: segments without a length
# As libjpeg: what is not a marker is skipped between two segments, and so are fill bytes.
_MARKER = re.compile(rb"\xff([^\x00\xff])", re.DOTALL)
_ORIENTATION, _SHORT = 0x0112, 3  # a tag and a type of EXIF


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
    """Width and height from the header, without decoding, as `read_image` returns the image.

    Raises:
        UserError: There is no such file, it is neither PNG nor JPEG, or has over `MAX_PIXELS`.
    """
    return _of_limited_size(read_header(path), path).size(as_stored)


def read_header(path: Path) -> Header:
    """What a PNG or JPEG says of itself; its size may be any.

    Raises:
        UserError: There is no such file, or it is neither PNG nor JPEG.
    """
    with open_file(path, "image", MAX_BYTES) as file:
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
    data = read_file(path, "image", MAX_BYTES)
    header = _of_limited_size(_header(BytesIO(data), path), path)
    actual = header.size(as_stored)
    if size is not None and size != actual:
        raise UserError(
            f"image {str(path)!r} has {actual[0]}x{actual[1]} pixels, but its labels are for "
            f"{size[0]}x{size[1]}."
        )
    # The bytes of a scan never contain 0xFFDA (JPEG, B.1.1.5); a thumbnail adds a few.
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS:
        raise UserError(f"image {str(path)!r} has over {MAX_SCANS} scans, which no camera writes.")
    try:
        # Turned here and not by OpenCV, so that image_size and read_image always agree.
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        image = None
    if image is None or image.shape[1::-1] != header.size(as_stored=True):
        raise _damaged(path)
    return image if as_stored else turned(image, header.orientation)


def read_rgb(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode a PNG or JPEG into uint8 [H,W,3], RGB, as every viewer shows it.

    Raises:
        UserError: The file is not an image, is cut short, or is not of `size` (width, height).
    """
    return cv2.cvtColor(read_image(path, cv2.IMREAD_COLOR, size), cv2.COLOR_BGR2RGB)


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
    data = file.read(_START)
    if data.startswith(_PNG) and len(data) >= 24:
        parse = _png_header
    elif data.startswith(b"\xff\xd8\xff"):
        parse = _jpeg_header
    else:
        raise UserError(f"image {str(path)!r} is neither PNG nor JPEG.")
    header, complete = parse(data)
    if not complete:
        header, _ = parse(data + file.read())
    if not header.width * header.height:
        raise _damaged(path)
    return header


def _of_limited_size(header: Header, path: Path) -> Header:
    if header.width * header.height > MAX_PIXELS:
        raise UserError(
            f"image {str(path)!r} states {header.width}x{header.height} pixels; up to "
            f"{MAX_PIXELS:,} are read."
        )
    return header


def _png_header(data: bytes) -> tuple[Header, bool]:
    """The header from a PNG's first bytes, and whether these reach its pixels."""
    width, height = struct.unpack_from(">II", data, 16)
    at = 8
    for _ in range(MAX_SEGMENTS):
        if at + 8 > len(data):
            return Header(width, height), False
        length, name = struct.unpack_from(">I4s", data, at)
        if name == b"eXIf":
            end = at + 8 + length
            return Header(width, height, _orientation(data[at + 8 : end])), end <= len(data)
        if name in (b"IDAT", b"IEND"):
            break
        at += 12 + length
    return Header(width, height), True


def _jpeg_header(data: bytes) -> tuple[Header, bool]:
    """The header from a JPEG's first bytes, and whether these reach its pixels.

    Width and height are 0 without a frame header.
    """
    width = height = orientation = 0
    at, complete = 2, True
    for _ in range(MAX_SEGMENTS):
        match = _MARKER.search(data, at)
        if match is None or match.end() + 2 > len(data):
            complete = False
            break
        marker, at = match[1][0], match.end()
        if marker in _BARE:
            continue
        if marker in (0xD9, 0xDA):  # the end, or a scan
            break
        length = max(2, int.from_bytes(data[at : at + 2], "big"))
        body = data[at + 2 : at + length]
        at += length
        if marker in _JPEG_FRAMES and not width and len(body) >= 5:
            height, width = struct.unpack_from(">HH", body, 1)
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            orientation = orientation or _orientation(body[6:])
    return Header(width, height, orientation or 1), complete


def _orientation(tiff: bytes) -> int:
    """The orientation that an EXIF block gives its image; 1 if it gives none, or a wrong one."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    (at,) = struct.unpack_from(order + "I", tiff, 4)
    count = int.from_bytes(tiff[at : at + 2], "little" if order == "<" else "big")
    entries = tiff[at + 2 : at + 2 + 12 * count]
    entries = entries[: len(entries) // 12 * 12]
    for tag, kind, _, value in struct.iter_unpack(order + "HHIHxx", entries):
        if tag == _ORIENTATION:
            return value if kind == _SHORT and 1 <= value <= 8 else 1
    return 1


def _damaged(path: Path) -> UserError:
    return UserError(f"image {str(path)!r} is damaged or truncated; fetch it again.")
