"""Cut georeferenced scenes and polygons drawn on them into tiles, ready for every train.py.

    python preprocessing/geojson.py scene.tif labels.geojson -o data/mine
    python preprocessing/geojson.py scenes/ labels.geojson -o data/mine --class-property type
    python preprocessing/geojson.py other.tif labels.geojson -o data/mine --as val

The polygons may be in any reference system that the file names; without a name they are longitude
and latitude (RFC 7946). Where objects overlap, the smaller one is on top.
"""

import os
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rasterio import Affine
from rasterio.crs import CRS
from rasterio.features import rasterize

from common.cli import Parser, UserError, run
from common.io.raster import SUFFIXES, Look, add_look_options, look_from, open_scene
from preprocessing.shapes import Shape, in_pixels, read_labels
from preprocessing.splits import add_tiling_options, tile_splits
from preprocessing.tiles import MAX_OBJECTS, OTHER_DATASET, Labels, Thing

BLOCK = 16  # tiles along a side of the part of a scene that is in memory


@dataclass(frozen=True)
class Block:
    """A part of a scene, as the tiling sees it: at most `BLOCK` tiles wide and high."""

    path: Path
    labelled: Path
    stem: str
    airport: str
    """The scene's name: all its parts count as one airport."""
    window: tuple[int, int, int, int]
    """x, y, width, height in the scene."""
    look: Look
    categories: tuple[str, ...]
    shapes: list[Shape] = field(repr=False)
    """In pixels of the scene, large ones first. Records depend on the file, not on these."""

    def files(self) -> list[Path]:
        return [self.path, self.labelled]

    def labels(self) -> Labels:
        """Paint the polygons: a pixel belongs to an object if its centre does."""
        x, y, width, height = self.window
        outlines = [
            ({"type": "MultiPolygon", "coordinates": shape.polygons}, i)
            for i, shape in enumerate(self.shapes, start=1)
        ]
        ids = np.zeros((height, width), np.uint8 if len(outlines) < 256 else np.uint16)
        if outlines:
            rasterize(outlines, out=ids, transform=Affine.translation(x, y))
        shown = np.bincount(ids.ravel(), minlength=len(outlines) + 1)[1:].tolist()
        things = [
            Thing(self.categories.index(shape.name) + 1, shape.name, max(n, round(shape.area)))
            for shape, n in zip(self.shapes, shown, strict=True)
        ]
        return Labels(ids, things)

    def image(self, size: tuple[int, int]) -> np.ndarray:
        """The block as uint8 [H,W,3]: blue, green, red."""
        with open_scene(self.path, self.look) as scene:
            pixels, _ = scene.read(*self.window)
        return np.ascontiguousarray(pixels[:, :, ::-1])


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("scenes", type=Path, help="a georeferenced raster, or a folder of them")
    add("labels", type=Path, help="GeoJSON with polygons")
    add("-o", "--output-dir", type=Path, required=True, help="where the split is written")
    add(
        "--as",
        dest="split",
        default="train",
        choices=("train", "val", "test"),
        help="the split that these tiles become",
    )
    add("--class-property", metavar="NAME", help="the property that holds the class")
    add_tiling_options(parser)
    add_look_options(parser)
    args = parser.parse(argv)
    look = look_from(args)
    shapes, crs = read_labels(args.labels, args.class_property)
    categories = sorted({shape.name for shape in shapes})
    blocks = []
    for path in _scenes(args.scenes):
        blocks += cut_into_blocks(path, args.labels, look, shapes, crs, categories, args.tile_size)
    if len({block.stem for block in blocks}) < len(blocks):
        raise UserError(
            f"{str(args.scenes)!r} has two scenes of the same name; rename one of them."
        )
    if not any(block.shapes for block in blocks):
        raise UserError(
            f"no polygon of {str(args.labels)!r} lies on {str(args.scenes)!r}; check the reference "
            "systems of both in QGIS."
        )
    return tile_splits(
        {args.output_dir / args.split: blocks},
        categories,
        args,
        OTHER_DATASET,
        source=[os.path.relpath(path, args.output_dir) for path in (args.scenes, args.labels)],
    )


def cut_into_blocks(
    path: Path,
    labelled: Path,
    look: Look,
    shapes: list[Shape],
    crs: CRS,
    categories: list[str],
    tile: int,
) -> list[Block]:
    """The parts of a scene, each with the polygons that lie on it, in pixels of the scene."""
    with open_scene(path, look) as scene:
        width, height = scene.width, scene.height
        # If a scene is not georeferenced, its labels are in pixels, as in our own maps of it.
        shapes = in_pixels(shapes, crs, scene) if scene.metres else shapes
    shapes = sorted(shapes, key=lambda shape: -shape.area)
    columns, rows = (_parts(length, BLOCK * tile) for length in (width, height))
    blocks = []
    for y, y_end in rows:
        for x, x_end in columns:
            inside = [
                shape
                for shape in shapes
                if shape.box[0] < x_end
                and shape.box[2] > x
                and shape.box[1] < y_end
                and shape.box[3] > y
            ]
            if len(inside) > MAX_OBJECTS:
                raise UserError(
                    f"{str(labelled)!r} has over {MAX_OBJECTS} objects on one part of the scene "
                    f"{path.name!r}; use a smaller --tile-size."
                )
            single = len(rows) == len(columns) == 1
            stem = path.stem if single else f"{path.stem}_y{y}_x{x}"
            window = (x, y, x_end - x, y_end - y)
            blocks.append(
                Block(path, labelled, stem, path.stem, window, look, tuple(categories), inside)
            )
    return blocks


def _scenes(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if scenes := sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES):
        return scenes
    raise UserError(f"{str(path)!r} holds no {', '.join(SUFFIXES)} files.")


def _parts(length: int, largest: int) -> list[tuple[int, int]]:
    """The fewest even parts of at most `largest` pixels: where they begin and end."""
    count = -(-length // largest)
    return list(pairwise(round(i * length / count) for i in range(count + 1)))


if __name__ == "__main__":
    run(main)
