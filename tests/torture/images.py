"""Untrusted images: damaged in transit, or forged by somebody who knows the format."""

import random
import struct
import zlib
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from torture.contained import contained

from common.cli import UserError
from common.io.raster import open_scene
from common.io.tiles import read_tile, tile_paths

SIZE = (61, 47)
DAMAGE = ("flip", "cut", "zeros")
CHUNKS = [b"acTL", b"fcTL", b"fdAT", b"iCCP", b"eXIf", b"tRNS", b"PLTE", b"cHRM", b"IDAT", b"IEND"]
OTHERS = [
    b"RIFF\xff\xff\0\0WEBPVP8L", b"GIF89a\xff\xff\xff\xff", b"II*\0\x08\0\0\0", b"8BPS\0\1", b"BM",
    b"P6 60000 60000 255\n", b"v/1\1", b"\0\0\0\x0cjP  \r\n", b"\0\0\0 ftypavif", b"#?RADIANCE\n",
    b"SIMPLE  =", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"",
]  # fmt: skip


def hostile_image(number: int, folder: Path) -> str:
    """A changed image is refused in a sentence, or has its size; a damaged PNG keeps its pixels."""
    rng = random.Random(number)
    kind = rng.choice([*DAMAGE, "splice", "header", "chunk", "pixels", "other"])
    suffix = ".png" if kind in ("header", "chunk", "pixels") else rng.choice([".png", ".jpg"])
    channels = rng.choice([1, 3, 4]) if suffix == ".png" else 3
    pixels = np.random.default_rng(number).integers(0, 256, (*SIZE[::-1], channels), np.uint8)
    if rng.random() < 0.5:
        pixels = cv2.blur(pixels, (9, 9)).reshape(pixels.shape)
    sound = cv2.imencode(suffix, pixels)[1].tobytes()
    path = folder / f"image{suffix}"
    changed = change(sound, kind, rng)
    exact = pixels if suffix == ".png" and kind in DAMAGE else None
    for name in (path, *tile_paths(folder, "a.png")):
        name.parent.mkdir(exist_ok=True)
        name.write_bytes(changed)
    as_tile = contained(partial(_read_tile, folder, exact))
    if as_tile not in ("read", "refused"):
        return f"{kind} {as_tile}"
    return f"{kind} " + contained(partial(_read, path, exact))


def change(data: bytes, kind: str, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "zeros":
        return data[:at] + bytes(min(512, len(data) - at)) + data[at + 512 :]
    if kind == "splice":
        return data[:at] + data[rng.randrange(len(data)) :]
    if kind == "other":
        return rng.choice(OTHERS) + rng.randbytes(rng.randrange(300))
    chunks = list(split(data))
    name, body = chunks[0]
    if kind == "header":  # any value in any field, with the right checksum
        field = rng.randrange(13)
        value = rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 127, 255])
        chunks[0] = name, body[:field] + bytes([value]) + body[field + 1 :]
    elif kind == "chunk":
        extra = rng.choice(CHUNKS), rng.randbytes(rng.choice([0, 4, 8, 26, 60]))
        if extra[0] in (b"acTL", b"fcTL") and rng.random() < 0.7:  # claims many frames
            extra = (
                extra[0],
                struct.pack(">II", rng.randrange(3), rng.randrange(1 << 31)) + extra[1],
            )
        chunks.insert(rng.randrange(1, len(chunks) + 1), extra)
    else:  # other bytes to inflate: too few, too many, invalid filters
        rows = rng.choice([rng.randbytes(rng.randrange(40_000)), bytes(rng.randrange(3_000_000))])
        chunks = [chunks[0], (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def split(png: bytes):
    at = 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        yield png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        at += 12 + length


def _read(path: Path, exact: np.ndarray | None) -> str:
    try:
        with open_scene(path) as scene:
            width, height = min(scene.width, 512), min(scene.height, 512)
            pixels, valid = scene.read(0, 0, width, height)
    except UserError as error:
        return "refused" if str(error).isprintable() else "!a sentence with control characters"
    assert pixels.shape == (height, width, 3)
    if exact is not None:
        seen = slice(None) if valid is None else valid
        colours = np.broadcast_to(exact[..., 2::-1], pixels.shape)
        assert np.array_equal(pixels[seen], colours[seen]), "wrong pixels accepted"
    return "read"


def _read_tile(folder: Path, exact: np.ndarray | None) -> str:
    """The same file as image and as mask of a tile."""
    image = np.empty((*SIZE[::-1], 3), np.uint8)
    try:
        read_tile(folder, "a.png", 255, image, np.empty(SIZE[::-1], np.uint8))
    except UserError as error:
        return "refused" if str(error).isprintable() else "!a sentence with control characters"
    if exact is not None:
        assert np.array_equal(image, np.broadcast_to(exact, image.shape)), "wrong pixels accepted"
    return "read"
