"""Cut georeferenced scenes and polygons drawn on them into tiles, ready for every train.py.

    python preprocessing/geojson.py scene.tif labels.geojson -o data/mine
    python preprocessing/geojson.py scenes/ labels/ -o data/mine --class-property type
    python preprocessing/geojson.py other.tif labels.geojson -o data/mine --as val

A folder of labels has a file for each scene, `<scene>.geojson`. The polygons may be in any
reference system that the file names; without a name they are longitude and latitude (RFC 7946).
Where objects overlap, the smaller one is on top.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path, PurePath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common.cli import Parser, UserError, run
from common.io.folders import names_in, rasters_in
from common.io.look import Look, add_look_options, look_from
from common.io.raster import Scene, open_scene
from preprocessing.own_data import Destination, add_own_data_options, scene_names
from preprocessing.shapes import Drawn, Shape, counted, in_pixels, painted, read_labels
from preprocessing.tiles import MAX_OBJECTS, Labels, Thing

BLOCK = 16  # tiles along a side of the part of a scene that is in memory
ELSEWHERE = "on no scene that was read"


@dataclass(frozen=True)
class Block:
    """A part of a scene, as the tiling sees it: at most `BLOCK` tiles wide and high."""

    path: Path
    labelled: Path
    class_property: str | None
    stem: str
    airport: str
    """The scene's name: all its parts count as one airport."""
    window: tuple[int, int, int, int]
    """x, y, width, height in the scene."""
    look: Look
    classes: dict[str, tuple[int, str]]
    """As `Classes.of`."""
    shapes: list[Shape] = field(default_factory=list, repr=False)
    """In pixels of the scene, large ones first. Records depend on the file, not on these."""
    problem: str = ""
    """Why the scene cannot be read; empty if it can."""

    def files(self) -> list[Path]:
        if self.problem:
            raise UserError(self.problem)
        return [self.path, self.labelled]

    def placed(self, drawn: Drawn, scene: Scene) -> list[Shape]:
        """The labels in pixels of the scene.

        If it is not georeferenced, they are in pixels, as in our own maps of it.

        Raises:
            UserError: All are smaller than a pixel, so they are in degrees.
        """
        if scene.metres is not None:
            return in_pixels(drawn.shapes, drawn.crs, scene)
        if drawn.shapes and all(shape.area < 1 for shape in drawn.shapes):
            raise UserError(
                f"{drawn.path.name!r} is in degrees, but image {str(self.path)!r} is not "
                "georeferenced; give a GeoTIFF of it (.aux.xml is not read; of RarePlanes take the "
                "scenes in PS-RGB_cog, with real.py)."
            )
        return as_rows(drawn.shapes)

    def labels(self) -> Labels:
        """Paint the polygons."""
        ids = painted(self.shapes, self.window)
        with open_scene(self.path, self.look) as scene:
            valid = None if scene.all_valid else scene.read(*self.window)[1]
            look = scene.record()
        if valid is not None:
            ids[~valid] = 0
        shown = np.bincount(ids.ravel(), minlength=len(self.shapes) + 1)[1:].tolist()
        x, y = self.window[:2]
        things = [
            Thing(
                *self.classes[shape.name],
                max(n, round(shape.area)),
                points=tuple((px - x, py - y) for px, py in shape.points),
            )
            if shape.name
            else Thing(1, "", n, shape.ignored)
            for shape, n in zip(self.shapes, shown, strict=True)
        ]
        return Labels(ids, things, valid, look)

    def image(self, size: tuple[int, int]) -> np.ndarray:
        """The block as uint8 [H,W,3]: blue, green, red."""
        with open_scene(self.path, self.look) as scene:
            pixels, _ = scene.read(*self.window)
        return np.ascontiguousarray(pixels[:, :, ::-1])


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse(argv)
    look = look_from(args)
    to = Destination(args, args.scenes, args.labels)
    paths = {path.name: path for path in rasters_in(args.scenes)}
    stems = scene_names({name: PurePath(name) for name in paths})
    splits = to.divide(paths, args.scenes)
    chosen = [name for names in splits.values() for name in names]
    files = _label_files(args.labels, {name: paths[name] for name in chosen})
    drawn = {file: read_labels(file, args.class_property) for file in dict.fromkeys(files.values())}
    shapes = [shape for labels in drawn.values() for shape in labels.shapes]
    found = {shape.name for shape in shapes if shape.name}
    names = sorted(found) if args.class_property else ["aircraft"]
    classes = to.number(names, names)
    blocks: dict[str, list[Block]] = {}
    for name in chosen:
        whole = Block(
            paths[name], files[name], args.class_property, stems[name], stems[name], (0, 0, 0, 0),
            look, classes.of,
        )  # fmt: skip
        try:
            alone = len(chosen) == 1 or args.labels.is_dir()
            blocks[name] = cut_into_blocks(whole, drawn[files[name]], args.tile_size, alone)
        except UserError as error:
            blocks[name] = [replace(whole, problem=str(error))]
    parts = [block for some in blocks.values() for block in some]
    placed = {(block.labelled, shape.number) for block in parts for shape in block.shapes}
    if shapes and not placed and not any(block.problem for block in parts):
        raise UserError(
            f"no polygon of {str(args.labels)!r} lies on {str(args.scenes)!r}; check the reference "
            "systems of both in QGIS."
        )
    return to.tile(
        {split: [b for name in names for b in blocks[name]] for split, names in splits.items()},
        classes,
        count_left_out(drawn.values(), parts),
    )


def _parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("scenes", type=Path, help="a georeferenced raster, or a folder of them")
    add("labels", type=Path, help="GeoJSON with polygons, or a folder with a file for each scene")
    add("--class-property", metavar="NAME", help="the property that holds the class")
    add_own_data_options(parser, "scenes")
    add_look_options(parser)
    return parser


def _label_files(labels: Path, scenes: dict[str, Path]) -> dict[str, Path]:
    """The label file of each scene, by the scene's name.

    Raises:
        UserError: A scene has none.
    """
    if not labels.is_dir():
        return dict.fromkeys(scenes, labels)
    present = names_in(labels)
    files = {}
    for name, path in scenes.items():
        candidates = (f"{path.stem}.geojson", f"{name}.geojson")
        found = [file for c in candidates if (file := present.find(c, labels))]
        if not found:
            raise UserError(
                f"there is no {candidates[0]!r} in {str(labels)!r}; draw the labels of that scene, "
                "or name the scenes to tile in a --split file."
            )
        files[name] = labels / found[0]
    return files


def count_left_out(drawn: Iterable[Drawn], parts: Iterable[Block]) -> Counter[str]:
    """The numbers of features that are in no part of a scene, by the reason."""
    placed = {(block.labelled, shape.number) for block in parts for shape in block.shapes}
    left_out: dict[str, list[str]] = defaultdict(list)
    for labels in drawn:
        for reason, features in labels.left_out.items():
            left_out[reason] += features
        left_out[ELSEWHERE] += [
            f"feature {shape.number} of {labels.path.name!r}"
            for shape in labels.shapes
            if (labels.path, shape.number) not in placed
        ]
    return counted(left_out)


def cut_into_blocks(whole: Block, drawn: Drawn, tile: int, alone: bool = True) -> list[Block]:
    """The parts of a scene, each with the polygons that lie on it, in pixels of the scene.

    Args:
        whole: The scene, without its size and polygons.
        drawn: Its labels.
        tile: The side of a tile, pixels.
        alone: No other scene has the same labels.

    Raises:
        UserError: The scene cannot be read, or a part has too many polygons.
    """
    with open_scene(whole.path, whole.look) as scene:
        width, height = scene.width, scene.height
        if scene.metres is None and not alone:
            raise UserError(
                f"{str(whole.path)!r} is not georeferenced, so its labels are in pixels and need a "
                "file of their own; give a folder of label files."
            )
        # The percentiles are those of the whole scene; a process with a part need not take them.
        limits = None if scene.limits is None else scene.limits.tolist()
        look = replace(whole.look, bands=scene.bands, stretch=None, limits=limits)
        shapes = whole.placed(drawn, scene)
    # As in COCO's files, what is ignored lies below all others.
    shapes = sorted(shapes, key=lambda shape: (shape.name != "", -shape.area))
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
                    f"{str(drawn.path)!r} has over {MAX_OBJECTS} objects on one part of the scene "
                    f"{whole.path.name!r}; use a smaller --tile-size."
                )
            single = len(rows) == len(columns) == 1
            stem = whole.stem if single else f"{whole.stem}_y{y}_x{x}"
            window = (x, y, x_end - x, y_end - y)
            blocks.append(replace(whole, stem=stem, window=window, look=look, shapes=inside))
    return blocks


def as_rows(shapes: list[Shape]) -> list[Shape]:
    """Labels in pixels with y downwards; those of QGIS and of our maps are upwards, below 0."""
    if sum(shape.box[1] + shape.box[3] for shape in shapes) >= 0:
        return shapes
    return [
        replace(shape, polygons=[[ring * (1, -1) for ring in p] for p in shape.polygons])
        for shape in shapes
    ]


def _parts(length: int, largest: int) -> list[tuple[int, int]]:
    """The fewest even parts of at most `largest` pixels: where they begin and end."""
    count = -(-length // largest)
    return list(pairwise(round(i * length / count) for i in range(count + 1)))


if __name__ == "__main__":
    run(main)
