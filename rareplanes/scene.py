"""Reads one RarePlanes scene: its XML gives the aircraft, its colour mask their pixels."""

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NoReturn
from xml.etree.ElementTree import Element, ParseError

import cv2
import numpy as np
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from common.cli import UserError
from common.io.files import read_file
from common.io.tiles import MAX_SIDE, read_png

MAX_XML_BYTES = 5 << 20  # RarePlanes' files have 30 kB
MAX_TAGS = 100_000  # RarePlanes' files have 2,000; each costs 200 bytes of memory
MAX_AIRCRAFT = (1 << 16) - 2
FETCH = "fetch the scene again"

# Stricter than float() and int(), which accept nan, inf, 1e309, 1_000 and digits of other scripts.
_INTEGER = re.compile(r"-?[0-9]{1,6}")
_NUMBER = r"(-?[0-9]{1,7}(?:\.[0-9]{1,9})?)"
_POINT = re.compile(rf"X={_NUMBER} Y={_NUMBER}")
_SOCKETS = ("Nose", "LeftWing", "Tail", "RightWing")

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Aircraft:
    """One aircraft of a scene, in pixels of its image."""

    make: str
    """`<maker>_<model>`, the key of the table of facts; only the maker if no model is given."""
    colour: tuple[int, int, int]
    """Red, green, blue of its pixels in the mask."""
    box: tuple[int, int, int, int]
    """xmin, ymin, xmax, ymax as annotated; all are inclusive, so the width is xmax - xmin + 1."""
    diamond: tuple[Point, Point, Point, Point] | None
    """Nose, left wing, tail, right wing; may lie outside the image. None where not annotated."""
    pixels: int = 0
    """Number of its pixels in the mask; 0 if it is hidden."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A scene without its image."""

    stem: str
    width: int
    height: int
    aircraft: list[Aircraft]
    ids: np.ndarray
    """`[H,W]` uint8 (uint16 beyond 255 aircraft): 0 ground, k the k-th of `aircraft`."""


def scene_stems(folder: Path) -> list[str]:
    """Names of the scenes in `folder/images`, sorted."""
    return sorted(p.stem for p in (folder / "images").glob("*.png") if not p.name.startswith("."))


def airport(stem: str) -> str:
    """The airport a scene shows, from its name `<Airport>_Airport_<a>_<b>_<n>`."""
    return stem.split("_Airport_")[0]


def scene_files(folder: Path, stem: str) -> tuple[Path, Path, Path]:
    """Image, mask and XML of a scene."""
    return (
        folder / "images" / f"{stem}.png",
        folder / "masks" / f"{stem}_mask.png",
        folder / "xmls" / f"{stem}.xml",
    )


def read_scene(folder: Path, stem: str) -> Scene:
    """Read the XML and the mask of a scene.

    Raises:
        UserError: a file is missing, damaged or contradicts another one.
    """
    _, mask, xml = scene_files(folder, stem)
    width, height, aircraft = read_xml(xml)
    ids = instance_ids(mask, (width, height), [plane.colour for plane in aircraft])
    pixels = np.bincount(ids[ids > 0], minlength=len(aircraft) + 1)[1:].tolist()
    seen = [replace(plane, pixels=n) for plane, n in zip(aircraft, pixels, strict=True)]
    return Scene(stem, width, height, seen, ids)


def read_scene_image(folder: Path, stem: str, size: tuple[int, int]) -> np.ndarray:
    """The image of a scene as `[H,W,3]` uint8 in OpenCV's order: blue, green, red.

    Args:
        folder: Of the split.
        stem: The scene's name.
        size: Width and height that the XML states.

    Raises:
        UserError: The file is missing, damaged, of another size, or not of 8 bits.
    """
    path = scene_files(folder, stem)[0]
    image = read_png(path, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH, size[::-1], "image", FETCH)
    if image.dtype != np.uint8:
        raise UserError(f"image {str(path)!r} does not have 8 bits, as RarePlanes' have.")
    return image


def instance_ids(
    path: Path, size: tuple[int, int], colours: list[tuple[int, int, int]]
) -> np.ndarray:
    """Read a mask: pixels of exactly the k-th colour become k, all others 0.

    Things on the ground have colours, too, so a pixel that is not black need not be an aircraft.
    One table over all 2^24 colours takes 2.5 ms for 1920x1080, for any number of aircraft;
    comparing the whole image with each colour takes 5 ms for 15 aircraft.

    Returns:
        `[H,W]` uint8, or uint16 for more than 255 colours.
    """
    mask = read_png(path, cv2.IMREAD_UNCHANGED, size[::-1], "mask", FETCH)
    if mask.dtype != np.uint8 or mask.ndim != 3:
        raise UserError(f"mask {str(path)!r} is not an 8-bit RGB or RGBA image.")
    if mask.shape[2] == 3:
        mask = cv2.cvtColor(mask, cv2.COLOR_BGR2BGRA)
    pixels = mask.view("<u4")[..., 0]
    keys = [red << 16 | green << 8 | blue for red, green, blue in colours]
    table = _table(np.uint8 if len(colours) < 256 else np.uint16)
    table[keys] = range(1, len(colours) + 1)
    ids = np.empty(pixels.shape, table.dtype)
    for y in range(0, len(ids), 32):  # a few rows at a time stay in the cache
        ids[y : y + 32] = table[pixels[y : y + 32] & 0xFFFFFF]
    table[keys] = 0
    opaque = 0xFF000000
    if pixels.min() < opaque:
        ids[pixels < opaque] = 0
    return ids


@cache
def _table(dtype: type) -> np.ndarray:
    """All zeros between two calls. Cached, so that the system zeroes a touched page only once."""
    return np.zeros(1 << 24, dtype)


def read_xml(path: Path) -> tuple[int, int, list[Aircraft]]:
    """Width and height of the image, and its aircraft in the order of the file.

    Raises:
        UserError: the file is missing, too large or not XML, declares a DTD or entities, has a
            missing or invalid entry, or gives two aircraft the same colour.
    """
    root = _parse(path)
    width = _integer(root, "image_resolution/width", 1, MAX_SIDE, path)
    height = _integer(root, "image_resolution/height", 1, MAX_SIDE, path)
    planes = [o for o in root.findall("object") if _text(o, "category0") == "Airplane"]
    if len(planes) > MAX_AIRCRAFT:
        _fail(path, f"lists {len(planes)} aircraft; at most {MAX_AIRCRAFT} are supported")
    aircraft = [_aircraft(plane, width, height, path) for plane in planes]
    owner: dict[tuple[int, int, int], int] = {}
    for number, plane in enumerate(aircraft, start=1):
        first = owner.setdefault(plane.colour, number)
        if first != number:
            _fail(
                path,
                f"gives aircraft {first} ({aircraft[first - 1].make}) and aircraft {number} "
                f"({plane.make}) the same mask colour {plane.colour}",
            )
    return width, height, aircraft


def _parse(path: Path) -> Element:
    data = read_file(path, "scene description", MAX_XML_BYTES)
    if data.count(b"<") > MAX_TAGS:
        _fail(path, f"has more than {MAX_TAGS} tags, which no scene has")
    try:
        root = fromstring(data, forbid_dtd=True)
    except DefusedXmlException:
        _fail(path, "declares a DTD or entities, which no scene does")
    except (ParseError, ValueError, LookupError) as error:
        _fail(path, f"is not well-formed XML ({str(error)[:80]!r})")
    if root.tag != "image":
        _fail(path, f"has the root element {root.tag[:40]!r} instead of 'image'")
    return root


def _aircraft(node: Element, width: int, height: int, path: Path) -> Aircraft:
    names = [_text(node, "category3"), _text(node, "category4")]
    make = "_".join(name for name in names if name)
    if not names[0] or len(make) > 100 or not make.isprintable():
        _fail(path, f"has an aircraft with a missing or invalid maker: {make[:100]!r}")
    parts = _text(node, "object_mask_color_rgba").split(",")
    if len(parts) != 4 or not all(_INTEGER.fullmatch(p) and 0 <= int(p) <= 255 for p in parts):
        _fail(path, f"gives {make} a mask colour that is not 'r,g,b,255'")
    red, green, blue, alpha = map(int, parts)
    if alpha != 255 or (red, green, blue) == (0, 0, 0):
        _fail(path, f"gives {make} the mask colour {','.join(parts)!r}, which means ground")
    xmin = _integer(node, "bndbox2D/xmin", 0, width - 1, path)
    ymin = _integer(node, "bndbox2D/ymin", 0, height - 1, path)
    xmax = _integer(node, "bndbox2D/xmax", xmin, width - 1, path)
    ymax = _integer(node, "bndbox2D/ymax", ymin, height - 1, path)
    return Aircraft(make, (red, green, blue), (xmin, ymin, xmax, ymax), _diamond(node, path))


def _diamond(node: Element, path: Path) -> tuple[Point, Point, Point, Point] | None:
    if node.find("Sockets") is None:
        return None
    points: list[Point] = []
    for socket in _SOCKETS:
        text = _text(node, f"Sockets/Bone_PlaneAnnotation_{socket}/screen")
        match = _POINT.fullmatch(text)
        if match is None:
            _fail(path, f"has {text[:40]!r} instead of 'X=.. Y=..' for {socket} of an aircraft")
        points.append((float(match[1]), float(match[2])))
    nose, left, tail, right = points
    return nose, left, tail, right


def _text(node: Element, tag: str) -> str:
    return (node.findtext(tag) or "").strip(" \t\r\n")


def _integer(node: Element, tag: str, low: int, high: int, path: Path) -> int:
    text = _text(node, tag)
    if not _INTEGER.fullmatch(text) or not low <= int(text) <= high:
        _fail(path, f"has {tag} {text[:40]!r}; it must be a whole number from {low} to {high}")
    return int(text)


def _fail(path: Path, what: str) -> NoReturn:
    raise UserError(f"scene description {str(path)!r} {what}.")
