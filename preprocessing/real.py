"""Cut the scenes of RarePlanes' real half into tiles, ready for every train.py.

    python preprocessing/real.py data/real -o data/real_tiles
    python preprocessing/real.py data/real -o data/real_roles --labels diamond --attribute role

The labels of an aircraft are four points: nose, wings and tail. The scenes are in degrees; they are
resampled to square metres. Whole locations are held out of `train/` into `val/`, and scenes of
ground that overlaps are one location.
"""

import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rasterio.warp import transform_bounds

from common.cli import Parser, UserError, run
from common.io.folders import rasters_in
from common.io.look import add_look_options, look_from
from common.io.raster import Scene, open_scene
from preprocessing.geojson import Block, count_left_out, cut_into_blocks
from preprocessing.own_data import class_name
from preprocessing.preprocess import choose_airports
from preprocessing.shapes import Drawn, Shape, read_labels
from preprocessing.splits import LeftOut, add_tiling_options, remove_tiles, tile_splits
from preprocessing.tiles import CUT, KINDS, is_cut
from rareplanes import attributes

SCENES, LABELS = "PS-RGB_cog", "geojson_aircraft"
NOT_FOUR = "whose outline is not four points (regions to ignore)"
OF_TEST = "of ground that test/ shows"
DECISIVE = 0.1  # a difference of `order_costs` that noise of a pixel or two does not explain
WHOLE = 0.999  # visible share of an aircraft; shares are quotients of rounded areas
TOUCHING = 1e-5  # degrees; scenes that overlap by less than a metre are neighbours


@dataclass(frozen=True)
class RealBlock(Block):
    """A part of a satellite scene."""

    attribute: str | None = None

    def placed(self, drawn: Drawn, scene: Scene) -> list[Shape]:
        """The labels in pixels of the scene, with their points; those to ignore have no name.

        Raises:
            UserError: None of them lies on the scene.
        """
        x, y = scene.width, scene.height
        shapes = [
            shape
            for shape in super().placed(drawn, scene)
            if shape.box[0] < x and shape.box[1] < y and min(shape.box[2:]) > 0
        ]
        if drawn.shapes and not shapes:
            raise UserError(
                f"no aircraft of {str(drawn.path)!r} lies on {self.path.name!r}; save its labels "
                "in WGS 84 (EPSG:4326), or download both again."
            )
        whole = [s for s in shapes if has_four_points(s) and not is_partial(s.properties)]
        first = first_corner([order_costs(s.polygons[0][0], s.properties) for s in whole])
        return [replace(self._checked(s, scene, first), properties={}) for s in shapes]

    def _checked(self, shape: Shape, scene: Scene, first: int) -> Shape:
        ring, facts = shape.polygons[0][0], shape.properties
        value = class_name(facts.get(self.attribute)) if self.attribute else "aircraft"
        name = (value or "").casefold()
        if not has_four_points(shape):
            return replace(shape, name="", ignored=NOT_FOUR)
        if is_partial(facts) or is_cut(ring, (scene.width, scene.height)) or ends(ring, scene):
            return replace(shape, name="", ignored=CUT)
        if name not in self.classes:
            return replace(shape, name="", ignored=f"without a known {self.attribute}")
        return replace(shape, name=name, points=four_points(ring, facts, first))


def has_four_points(shape: Shape) -> bool:
    """Whether an outline is one ring of four corners, the first one repeated at its end."""
    (ring, *holes), *others = shape.polygons
    return not holes and not others and len(ring) == 5 and bool((ring[0] == ring[4]).all())


def is_partial(facts: dict[str, Any]) -> bool:
    """Whether the properties say that the outline is a part of the aircraft.

    `truncated` is 0 or 1; `partialDec` is the share of the aircraft that is there.
    """
    share = facts.get("partialDec")
    is_share = isinstance(share, int | float) and 0 < share < WHOLE
    return is_share or class_name(facts.get("truncated")) == "1"


def ends(ring: np.ndarray, scene: Scene) -> bool:
    """Whether the scene has no data at a corner; all corners lie in the scene."""
    pixels = np.minimum(ring, [scene.width - 1, scene.height - 1]).astype(int).tolist()
    return not scene.all_valid and any(scene.read(x, y, 1, 1)[1] is not None for x, y in pixels)


def order_costs(ring: np.ndarray, facts: dict[str, Any]) -> np.ndarray:
    """How little an outline looks like an aircraft whose nose is corner 0, 1, 2 or 3.

    The axis halves the wings. Straight wings, if they are the only ones, mostly cross it before its
    middle; swept and delta wings have their tips behind it. What is measured are shares along the
    two diagonals, which are the same in degrees and in metres.

    Args:
        ring: The corners in turn [4,2]; what follows is not read.
        facts: The properties of the aircraft.

    Returns:
        float [4]; zeros if the diagonals are parallel.
    """
    a, b, c, d = ring[:4]
    matrix = np.stack([c - a, b - d], 1)
    if abs(np.linalg.det(matrix)) <= 1e-9 * np.abs(matrix).max() ** 2:
        return np.zeros(4)
    t, s = np.linalg.solve(matrix, b - a)  # where the diagonals cross: the share from a, and from b
    along, across = np.array([t, s, 1 - t, 1 - s]), np.array([s, t, s, t])
    straight = class_name(facts.get("wing_type")) in ("straight", None)
    alone = str(facts.get("canards")).casefold() != "yes"
    return np.abs(across - 0.5) + (straight and alone) * np.maximum(along - 0.5, 0)


def first_corner(costs: list[np.ndarray]) -> int:
    """Which corner is the nose in most outlines of a file that tell it alone; 0 if none does."""
    clear = [of_one for of_one in costs if (of_one <= of_one.min() + DECISIVE).sum() == 1]
    return int(np.bincount([of_one.argmin() for of_one in clear] or [0]).argmax())


def four_points(
    ring: np.ndarray, facts: dict[str, Any], first: int = 0
) -> tuple[tuple[float, float], ...]:
    """Nose, left wing, tail and right wing of an aircraft.

    Args:
        ring: As in `order_costs`, in pixels: y points down.
        facts: As in `order_costs`.
        first: The corner that is the nose, unless the outline clearly contradicts.
    """
    costs = order_costs(ring, facts)
    first = first if costs[first] <= costs.min() + DECISIVE else int(costs.argmin())
    nose, one, tail, other = np.roll(ring[:4], -first, 0)
    (ax, ay), (wx, wy) = nose - tail, one - tail
    wings = (other, one) if ax * wy > ay * wx else (one, other)
    return tuple((float(x), float(y)) for x, y in (nose, wings[0], tail, wings[1]))


def locations(stems: list[str], ground: dict[str, tuple[float, ...]]) -> dict[str, str]:
    """The location of each scene: scenes of one number or of ground that overlaps have the same.

    Args:
        stems: The names of the scenes, which begin with the number of the location.
        ground: West, south, east, north of each scene that can be read, in degrees.
    """
    group = {stem: {stem.partition("_")[0]} for stem in stems}
    for a, b in combinations(stems, 2):
        if group[a] & group[b] or (a in ground and b in ground and _overlap(ground[a], ground[b])):
            merged = group[a] | group[b]
            group |= {stem: merged for stem, numbers in group.items() if numbers & merged}
    return {stem: "+".join(sorted(numbers)) for stem, numbers in group.items()}


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(min(a[i + 2], b[i + 2]) - max(a[i], b[i]) > TOUCHING for i in (0, 1))


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse(argv)
    look, output = look_from(args), args.output_dir
    names = attributes.categories(args.attribute)
    classes = {name.casefold(): (i, name) for i, name in enumerate(names, start=1)}
    splits = find_scenes(args.path)
    ground: dict[str, tuple[float, ...]] = {}
    drawn: dict[str, Drawn] = {}
    blocks: dict[str, list[Block]] = {}
    for path in (path for paths in splits.values() for path in paths):
        labelled = path.parents[1] / LABELS / f"{path.stem}.geojson"
        whole = RealBlock(
            path, labelled, None, path.stem, "", (0, 0, 0, 0), look, classes,
            attribute=args.attribute,
        )  # fmt: skip
        try:
            ground[path.stem] = footprint(path)
            drawn[path.stem] = read_scene_labels(labelled)
            blocks[path.stem] = cut_into_blocks(whole, drawn[path.stem], args.tile_size)
        except UserError as error:
            blocks[path.stem] = [replace(whole, problem=str(error))]
    place = locations(list(blocks), ground)
    folders, leaks = divide({split: [p.stem for p in splits[split]] for split in splits}, place)
    used = {
        output / split: [replace(b, airport=place[s]) for s in stems for b in blocks[s]]
        for split, stems in folders.items()
    }
    parts = [block for of_split in used.values() for block in of_split if not block.problem]
    objects = count_left_out([drawn[stem] for stem in {p.path.stem: 0 for p in parts}], parts)
    source = [os.path.relpath(args.path, output)]
    left_out = LeftOut(Counter({OF_TEST: leaks}), objects)
    code = tile_splits(used, names, args, args.attribute, source, left_out, args.labels)
    if code == 0 and "train" in folders and "val" not in folders:
        remove_tiles(output / "val")
    return code


def find_scenes(root: Path) -> dict[str, list[Path]]:
    """The scenes of `train` and `test`, as far as they are there."""
    folders = {split: root / split / SCENES for split in ("train", "test")}
    found = {split: rasters_in(folder) for split, folder in folders.items() if folder.is_dir()}
    if not found:
        raise UserError(
            f"there is no train/{SCENES}/ and no test/{SCENES}/ in {str(root)!r}; give the folder "
            "real/ that python rareplanes/download.py --real fills (tiles such as PS-RGB_tiled are "
            "not read: they are in degrees and cut aircraft)."
        )
    return found


def read_scene_labels(path: Path) -> Drawn:
    """The outlines of a scene; those of a tile are refused."""
    if not path.is_file():
        raise UserError(
            f"there is no {path.name!r} in {str(path.parent)!r}; fetch the labels of whole scenes "
            "with python rareplanes/download.py --real."
        )
    drawn = read_labels(path, None)
    tiles = [n for s in drawn.shapes if "_tile_" in (n := str(s.properties.get("image_fname")))]
    if tiles:
        raise UserError(
            f"{str(path)!r} has labels of the tile {tiles[0]!r}, not of a scene; fetch those of "
            "whole scenes with python rareplanes/download.py --real."
        )
    return drawn


def footprint(path: Path) -> tuple[float, ...]:
    """West, south, east and north of a scene, in degrees."""
    with open_scene(path) as scene:
        if scene.metres is None:
            raise UserError(f"{str(path)!r} is not georeferenced; fetch the scene again.")
        return transform_bounds(scene.crs, "EPSG:4326", *scene.dataset.bounds)


def divide(splits: dict[str, list[str]], place: dict[str, str]) -> tuple[dict[str, list[str]], int]:
    """The scenes of each split that is written, by their stems.

    Whole locations are held out of `train` into `val`. A training scene of ground that `test` shows
    is left out, so that no ground is in two splits; the second result counts these.
    """
    tested = {place[stem] for stem in splits.get("test", ())}
    train = [stem for stem in splits.get("train", ()) if place[stem] not in tested]
    leaks = len(splits.get("train", ())) - len(train)
    if leaks and not train:
        raise UserError("all training scenes show ground of test scenes; download more of train.")
    held_out = choose_airports([place[stem] for stem in train], None)
    validation = [stem for stem in train if place[stem] in held_out]
    print(
        f"validation: {len(validation)} scenes of the locations {', '.join(held_out) or '(none)'}"
    )
    parts = {"train": [stem for stem in train if place[stem] not in held_out], "val": validation}
    return {split: stems for split, stems in (splits | parts).items() if stems}, leaks


def _parser() -> Parser:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("path", type=Path, help="the folder real/, with train/ and test/")
    add("-o", "--output-dir", type=Path, required=True, help="where the splits are written")
    help = "what counts: the boxes around the four points, or also the diamonds between them"
    add("--labels", choices=KINDS[:2], default="box", help=help)
    help = "what the classes are; by default there is one class, aircraft"
    add("--attribute", choices=attributes.ATTRIBUTES[:-1], help=help)  # no makes
    add_tiling_options(parser)
    add_look_options(parser)
    parser.set_defaults(gsd=0.3)
    return parser


if __name__ == "__main__":
    run(main)
