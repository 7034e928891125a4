"""How the metadata of a picture says that viewers turn it."""

import warnings
from contextlib import suppress
from io import BytesIO
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

MAX_HEADER = 1 << 24  # bytes before the pixels; a phone may write a depth map of a few MB there
MAX_EXIF_BLOCKS = 1000  # there is one; Pillow copies all blocks that it has for each more

# Pillow unpacks texts and colour profiles, which are not used, and refuses more than 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 4 * MAX_HEADER  # bytes
warnings.filterwarnings("ignore", module=r"PIL\.")  # about EXIF tags, which are not used


def orientation(file: BinaryIO) -> int:
    """The orientation in an open JPEG, PNG (both in EXIF) or TIFF: 1 (not turned) to 8.

    Without an orientation, or with an invalid one, it is 1. The function moves the file position.
    """
    tags = Image.Exif()  # image.getexif() would also look into XMP, which other readers do not
    value = None
    with suppress(Exception):  # damaged files raise many kinds
        file.seek(0)
        start = file.read(1 << 16)  # most headers end in it
        file.seek(0)
        if start.startswith((b"II", b"MM")):
            tags.load_from_fp(file)
        else:
            tags.load(_exif(start) or _exif(file.read(MAX_HEADER)) or b"")
        value = tags.get(ExifTags.Base.Orientation)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _exif(data: bytes) -> bytes | None:
    """The EXIF block in the first bytes of a JPEG or PNG; None if they end before the pixels."""
    if data.count(b"Exif\0\0") > MAX_EXIF_BLOCKS:
        return None
    with suppress(Exception):
        # Not by Image.open: it limits the pixels. Nothing is decoded before a load().
        kind = JpegImageFile if data.startswith(b"\xff\xd8") else PngImageFile
        image = kind(BytesIO(data))
        return image.info.get("exif", b"") if image.tile else None
    return None


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored pixels [...,H,W] as an orientation from 1 to 8 says (EXIF 2.3, 4.6.4)."""
    if orientation >= 5:
        image = image.swapaxes(-2, -1)
    if orientation in (3, 4, 7, 8):
        image = image[..., ::-1, :]
    if orientation in (2, 3, 6, 7):
        image = image[..., ::-1]
    return image


def stored_window(
    window: tuple[int, int, int, int], size: tuple[int, int], orientation: int
) -> tuple[int, int, int, int]:
    """Where a part of a turned picture is stored.

    Args:
        window: x, y, width, height in the picture as it is shown.
        size: Width and height of the picture as it is shown.
        orientation: As in `turned`.

    Returns:
        x, y, width, height in the stored picture.
    """
    x, y, width, height = window
    if orientation in (2, 3, 6, 7):
        x = size[0] - x - width
    if orientation in (3, 4, 7, 8):
        y = size[1] - y - height
    return (y, x, height, width) if orientation >= 5 else (x, y, width, height)
