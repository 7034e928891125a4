"""Untrusted scene descriptions: changed bytes, invalid numbers, bombs, other encodings."""

import random
from functools import partial
from pathlib import Path

from helpers.scenes import xml
from torture.contained import contained

from common.cli import UserError
from rareplanes.scene import read_xml

NUMBERS = ["nan", "inf", "-1", "1e9", "1_0", "４", "٤", "", " ", "9" * 4000, "0x4", "4.0", "-0"]
PREFIXES = [
    "<!DOCTYPE image>",
    "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>",
    "<!DOCTYPE a [<!ENTITY a0 'ha'>"
    + "".join(f"<!ENTITY a{i} '{f'&a{i - 1};' * 10}'>" for i in range(1, 9))
    + "]>",
    "<?xml-stylesheet href='x'?>",
    "<!-- - -->",
    "\ufeff",
]
ENCODINGS = ["utf-8", "utf-16", "utf-16-be", "utf-32", "latin-1", "utf-7", "cp037", "shift_jis"]


def hostile_xml(number: int, folder: Path) -> str:
    """A changed description is read with values within its bounds, or refused in a sentence."""
    rng = random.Random(number)
    planes = [
        (make, (10 * k, 20, k), (k, 2, k + 9, 30))
        for k, make in enumerate(rng.sample(["Cessna", "Boeing_737", "A_B_c", "ATR_ATR-72"], 3), 1)
    ]
    path = folder / "scene.xml"
    path.write_bytes(change(xml(100, 70, planes), rng))
    return contained(partial(_read, path))


def change(text: str, rng: random.Random) -> bytes:
    kind = rng.randrange(6)
    if kind == 0:  # a number, anywhere
        at = rng.choice([i for i, c in enumerate(text) if c.isdigit()])
        return (text[:at] + rng.choice(NUMBERS) + text[at + 1 :]).encode()
    if kind == 1:
        at = text.index("<image>")
        return (text[:at] + rng.choice(PREFIXES) + text[at:]).encode()
    if kind == 2:
        return text.encode(rng.choice(ENCODINGS), errors="replace")
    if kind == 3:  # a piece repeated until it is long, deep or both
        start = rng.randrange(len(text))
        piece = text[start : start + rng.randrange(1, 200)]
        return (text[:start] + piece * rng.randrange(1, 20_000) + text[start:]).encode()[: 6 << 20]
    data = bytearray(text.encode())
    if kind == 4:
        del data[rng.randrange(len(data)) :]
        return bytes(data)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data))
        data[at : at + rng.randrange(4)] = rng.randbytes(rng.randrange(4))
    return bytes(data)


def _read(path: Path) -> str:
    try:
        width, height, aircraft = read_xml(path)
    except UserError as error:
        return "refused" if str(error).isprintable() else "!a sentence with control characters"
    for plane in aircraft:
        xmin, ymin, xmax, ymax = plane.box
        assert 0 <= xmin <= xmax < width
        assert 0 <= ymin <= ymax < height
        assert plane.make.isprintable()
    return "read"
