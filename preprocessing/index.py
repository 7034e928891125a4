"""The COCO file of a split's tiles, written from the records of its scenes."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from common.cli import UserError
from preprocessing.scene_tiles import read_record
from preprocessing.tiles import KEYPOINTS, MIN_PIXELS, OTHER_DATASET, Settings


class Tile(NamedTuple):
    """A tile that is kept; sorted by the name of its image."""

    name: str
    stem: str
    n: int
    positive: bool


def write_index(
    stage: Path,
    tiles: list[Tile],
    airports: dict[str, str],
    categories: list[str],
    settings: Settings,
    look: dict[str, Any],
    source: list[str] | None,
) -> None:
    """Write `instances_tiled.json` into `stage`, one scene at a time.

    Args:
        stage: Folder with the records of the scenes.
        tiles: The kept tiles, sorted by name.
        airports: Stem of a scene → its airport.
        categories: Names of the categories 1…N.
        settings: With which the tiles were cut.
        look: The options with which rasters became RGB; inference then does the same. The tiles'
            ground resolution is added, if it is known.
        source: The files that the scenes come from, if not from RarePlanes.
    """
    info = {"description": "Tiles of aerial scenes", "min_pixels": MIN_PIXELS} | asdict(settings)
    looks = [content["look"] for _, content in contents(stage, tiles)]
    if ground := [of_tile["gsd"] for of_tile in looks if "gsd" in of_tile]:
        look = look | {"trained_gsd": median(ground)}
    info |= {"look": look} if look else {}
    info |= {"source": source} if source else {}
    points = {"keypoints": KEYPOINTS} if settings.attribute != OTHER_DATASET else {}
    classes = [{"id": i, "name": name} | points for i, name in enumerate(categories, start=1)]
    with (stage / "instances_tiled.json").open("w", encoding="utf-8") as file:
        file.write('{"info":' + _dump(info) + ',"images":[')
        file.writelines(_separated(_images(stage, tiles, airports, settings.tile_size)))
        file.write('],"annotations":[')
        file.writelines(_separated(_annotations(stage, tiles)))
        file.write('],"categories":' + _dump(classes) + "}\n")


def refuse_replacing(folder: Path, source: list[str] | None) -> None:
    """Refuse to replace tiles of other files than `source`, which is None for RarePlanes.

    Raises:
        UserError: The split holds such tiles.
    """
    info = read_info(folder)
    if info is None:
        return
    # An older version of coco.py did not write the source.
    unknown = source if info.get("attribute") == OTHER_DATASET else None
    before = info.get("source") or unknown
    if before != source:
        raise UserError(
            f"{str(folder)!r} holds tiles of {before or 'RarePlanes scenes'}, which this run would "
            "replace; choose another --output-dir, another split (coco.py and geojson.py have "
            "--as), or remove that folder."
        )


def read_info(folder: Path) -> dict[str, Any] | None:
    """`info` of a split's COCO file, where `write_index` puts it; None if there is no such file."""
    try:
        with (folder / "instances_tiled.json").open(encoding="utf-8") as file:
            start = file.read(1 << 16)
        info = json.JSONDecoder().raw_decode(start, len('{"info":'))[0]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
    return info if isinstance(info, dict) else {}


def _images(
    stage: Path, tiles: list[Tile], airports: dict[str, str], size: int
) -> Iterator[dict[str, Any]]:
    for number, (tile, content) in enumerate(contents(stage, tiles), start=1):
        more = {name: content[name] for name in ("padded", "look") if any(content[name])}
        yield {
            "id": number,
            "file_name": tile.name,
            "width": size,
            "height": size,
            "scene": tile.stem,
            "airport": airports[tile.stem],
            "x": content["x"],
            "y": content["y"],
        } | more


def _annotations(stage: Path, tiles: list[Tile]) -> Iterator[dict[str, Any]]:
    number = 0
    for image, (_, content) in enumerate(contents(stage, tiles), start=1):
        for annotation in content["annotations"]:
            number += 1
            yield {"id": number, "image_id": image} | annotation


def contents(stage: Path, tiles: list[Tile]) -> Iterator[tuple[Tile, dict[str, Any]]]:
    """Each tile with its record, one scene at a time: a set may have millions of aircraft.

    `look` in the record is that of its scene.
    """
    stem = ""
    record: dict[str, Any] = {}
    for tile in tiles:
        if tile.stem != stem:
            stem, record = tile.stem, read_record(stage, tile.stem)
        yield tile, record["tiles"][tile.n] | {"look": record["look"]}


def aircraft_of(stage: Path, tiles: list[Tile]) -> list[tuple[str, int]]:
    """The name of each tile and the number of aircraft in its mask."""
    return [
        (tile.name, sum(not annotation["iscrowd"] for annotation in content["annotations"]))
        for tile, content in contents(stage, tiles)
    ]


def _separated(items: Iterator[dict[str, Any]]) -> Iterator[str]:
    for number, item in enumerate(items):
        yield ("," if number else "") + _dump(item)


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
