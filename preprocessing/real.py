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
from collections.abc import Iterable
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
from preprocessing.geojson import Block, blocks_of, count_left_out
from preprocessing.own_data import class_name
from preprocessing.preprocess import choose_airports
from preprocessing.shapes import Drawn, Shape, read_labels
from preprocessing.splits import LeftOut, add_tiling_options, remove_tiles, tile_splits
from preprocessing.tiles import CUT, KINDS, Labels, is_cut
from rareplanes import attributes

SCENES, LABELS, TILES = "PS-RGB_cog", "geojson_aircraft", "PS-RGB_tiled"
NOT_FOUR = "whose outline is not four points (regions to ignore)"
OF_TEST = "of ground that test/ shows"
DECISIVE = 0.1  # a difference of `order_costs` that noise of a pixel or two does not explain
WHOLE = 0.999  # visible share of an aircraft; shares are quotients of rounded areas
TOUCHING = 1e-5  # degrees; scenes that overlap by less than a metre are neighbours


@dataclass(frozen=True)
class RealBlock(Block):
    """A part of a satellite scene."""

    attribute: str | None = None
    usual: int = 0
    """Which corner is the nose in most outlines of the data set."""

    def placed(self, drawn: Drawn, scene: Scene) -> list[Shape]:
        """The labels in pixels of the scene, with their points; those to ignore have no name.

        Raises:
            UserError: None of them lies on the scene.
        """
        shapes = super().placed(drawn, scene)
        size = x, y = scene.width, scene.height
        near = [s for s in shapes if s.box[0] < x and s.box[1] < y and min(s.box[2:]) > 0]
        if drawn.shapes and not near:
            raise UserError(
                f"no aircraft of {str(drawn.path)!r} lies on {self.path.name!r}; save its labels "
                "in WGS 84 (EPSG:4326), or download both again."
            )
        usual = most_common(clear_noses(near), self.usual)
        return [self._checked(shape, size, usual) for shape in near]

    def _checked(self, shape: Shape, size: tuple[int, int], usual: int) -> Shape:
        facts, corners = shape.properties, corners_of(shape)
        value = class_name(facts.get(self.attribute)) if self.attribute else "aircraft"
        name = (value or "").casefold()
        if corners is None:
            shape = replace(shape, name="", ignored=NOT_FOUR)
        elif is_partial(facts) or is_cut(corners, size):
            shape = replace(shape, name="", ignored=CUT)
        elif name not in self.classes:
            ignored = f"without a known {self.attribute} (regions to ignore)"
            shape = replace(shape, name="", ignored=ignored)
        else:
            shape = replace(shape, name=name, points=four_points(corners, facts, usual))
        return replace(shape, properties={})

    def labels(self) -> Labels:
        """As those of `Block`; an aircraft that ends where the data ends is ignored."""
        labels = super().labels()
        if labels.valid is None:
            return labels
        inside = [range(side) for side in self.window[2:]]
        things = []
        for thing in labels.things:
            pixels = [(int(x), int(y)) for x, y in thing.points]
            ends = any(
                x in inside[0] and y in inside[1] and not labels.valid[y, x] for x, y in pixels
            )
            things.append(replace(thing, ignored=CUT, points=()) if ends else thing)
        return replace(labels, things=things)


def corners_of(shape: Shape) -> np.ndarray | None:
    """The corners of an outline of four points [4,2]; None if it is another one."""
    ring = shape.polygons[0][0]
    return (
        ring[:-1] if len(shape.polygons) == len(shape.polygons[0]) == 1 < len(ring) == 5 else None
    )


def is_partial(facts: dict[str, Any]) -> bool:
    """Whether the properties say that the outline is a part of the aircraft.

    `truncated` is 0 or 1; `partialDec` is the share of the aircraft that is there.
    """
    return bool(_number(facts.get("truncated"))) or 0 < _number(facts.get("partialDec")) < WHOLE


def order_costs(corners: np.ndarray, facts: dict[str, Any]) -> np.ndarray:
    """How little an outline looks like an aircraft whose nose is corner 0, 1, 2 or 3.

    The axis halves the wings. Straight wings, if they are the only ones, cross it before its
    middle; swept and delta wings have their tips behind it. What is measured are shares along the
    two diagonals, which are the same in degrees and in metres.

    Returns:
        float [4]; zeros if the diagonals are parallel.
    """
    a, b, c, d = corners
    matrix = np.stack([c - a, b - d], 1)
    if abs(np.linalg.det(matrix)) < 1e-9 * np.abs(matrix).max() ** 2:
        return np.zeros(4)
    t, s = np.linalg.solve(matrix, b - a)  # where the diagonals cross: the share from a, and from b
    along, across = np.array([t, s, 1 - t, 1 - s]), np.array([s, t, s, t])
    straight = (class_name(facts.get("wing_type")) or "straight").casefold() == "straight"
    alone = str(facts.get("canards")).casefold() != "yes"
    return np.abs(across - 0.5) + (straight and alone) * np.maximum(along - 0.5, 0)


def clear_noses(shapes: Iterable[Shape]) -> Counter[int]:
    """How many outlines tell by themselves that corner 0, 1, 2 or 3 is the nose."""
    whole = [shape for shape in shapes if not is_partial(shape.properties)]
    known = [(c, shape.properties) for shape in whole if (c := corners_of(shape)) is not None]
    costs = [order_costs(*outline) for outline in known]
    clear = [c for c in costs if (c <= c.min() + DECISIVE).sum() == 1]
    return Counter(int(c.argmin()) for c in clear)


def most_common(noses: Counter[int], otherwise: int) -> int:
    return noses.most_common(1)[0][0] if noses else otherwise


def likely_nose(costs: np.ndarray, usual: int) -> int:
    """The corner that is the nose: the usual one, unless the costs [4] clearly contradict."""
    return usual if costs[usual] <= costs.min() + DECISIVE else int(costs.argmin())


def four_points(
    corners: np.ndarray, facts: dict[str, Any], usual: int = 0
) -> tuple[tuple[float, float], ...]:
    """Nose, left wing, tail and right wing of an aircraft.

    Args:
        corners: Of its outline, in turn, pixels of its scene (y points down) [4,2].
        facts: Its properties.
        usual: The corner that is the nose, unless the outline clearly contradicts.
    """
    first = likely_nose(order_costs(corners, facts), usual)
    nose, one, tail, other = np.roll(corners, -first, 0)
    (ax, ay), (wx, wy) = nose - tail, one - tail
    if ax * wy > ay * wx:
        one, other = other, one
    return tuple((float(x), float(y)) for x, y in (nose, one, tail, other))


def _number(value: Any) -> float:
    """A number of a GeoJSON file; 0 for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


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
    look = look_from(args)
    names = attributes.categories(args.attribute)
    classes = {name.casefold(): (i, name) for i, name in enumerate(names, start=1)}
    splits = find_scenes(args.path)
    paths = {path.stem: path for of_split in splits.values() for path in of_split}
    ground: dict[str, tuple[float, ...]] = {}
    drawn: dict[str, Drawn] = {}
    problems: dict[str, str] = {}
    for stem, path in paths.items():
        try:
            ground[stem] = footprint(path)
            drawn[stem] = read_scene_labels(label_file(path))
        except UserError as error:
            problems[stem] = str(error)
    place = locations(list(paths), ground)
    folders, leaks = divide({split: [p.stem for p in splits[split]] for split in splits}, place)
    clear = clear_noses(shape for labels in drawn.values() for shape in labels.shapes)
    usual = most_common(clear, 0)
    print(
        f"the nose is corner {usual + 1} in {clear[usual]} of {clear.total()} outlines that show it"
    )
    blocks: dict[str, list[Block]] = {}
    for stem, path in paths.items():
        whole = RealBlock(
            path, label_file(path), None, stem, place[stem], (0, 0, 0, 0), look, classes,
            attribute=args.attribute, usual=usual, problem=problems.get(stem, ""),
        )  # fmt: skip
        known = not whole.problem
        blocks[stem] = blocks_of(whole, drawn[stem], args.tile_size) if known else [whole]
    used = [stem for stems in folders.values() for stem in stems]
    code = tile_splits(
        {
            args.output_dir / s: [b for n in stems for b in blocks[n]]
            for s, stems in folders.items()
        },
        names,
        args,
        args.attribute,
        source=[os.path.relpath(args.path, args.output_dir)],
        left_out=LeftOut(
            Counter({OF_TEST: leaks}),
            count_left_out(
                [drawn[stem] for stem in used if stem in drawn],
                [block for stem in used for block in blocks[stem]],
            ),
        ),
        labels=args.labels,
    )
    if code == 0 and "train" in folders and "val" not in folders:
        remove_tiles(args.output_dir / "val")
    return code


def find_scenes(root: Path) -> dict[str, list[Path]]:
    """The scenes of `train` and `test`, as far as they are there.

    Raises:
        UserError: There is none.
    """
    folders = {split: root / split / SCENES for split in ("train", "test")}
    found = {split: rasters_in(folder) for split, folder in folders.items() if folder.is_dir()}
    if not found and (root.name == TILES or any(root.glob(f"*/{TILES}"))):
        raise UserError(
            f"{str(root)!r} has tiles, which are in degrees and cut aircraft, and no scenes; fetch "
            "these with python rareplanes/download.py --real."
        )
    if not found:
        raise UserError(
            f"there is no train/{SCENES}/ and no test/{SCENES}/ in {str(root)!r}; give the folder "
            "real/ that python rareplanes/download.py --real fills."
        )
    return found


def label_file(scene: Path) -> Path:
    return scene.parents[1] / LABELS / f"{scene.stem}.geojson"


def read_scene_labels(path: Path) -> Drawn:
    """The outlines of a scene.

    Raises:
        UserError: There are none, or they are those of a tile.
    """
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
    """West, south, east and north of a scene, in degrees.

    Raises:
        UserError: It cannot be read, or is not georeferenced.
    """
    with open_scene(path) as scene:
        if scene.metres is None:
            raise UserError(
                f"{str(path)!r} is not georeferenced, as all scenes of the real half are; fetch it "
                "again."
            )
        return transform_bounds(scene.crs, "EPSG:4326", *scene.dataset.bounds)


def divide(splits: dict[str, list[str]], place: dict[str, str]) -> tuple[dict[str, list[str]], int]:
    """The scenes of each split that is written, by their stems.

    Whole locations are held out of `train` into `val`. A training scene of ground that `test` shows
    is left out, so that no ground is in two splits; the second result counts these.
    """
    divided = dict(splits)
    tested = {place[stem] for stem in splits.get("test", ())}
    train = [stem for stem in splits.get("train", ()) if place[stem] not in tested]
    leaks = len(splits.get("train", ())) - len(train)
    if leaks and not train:
        raise UserError("all training scenes show ground of test scenes; download more of train.")
    if train:
        held_out = choose_airports([place[stem] for stem in train], None)
        divided["train"] = [stem for stem in train if place[stem] not in held_out]
        validation = [stem for stem in train if place[stem] in held_out]
        divided |= {"val": validation} if validation else {}
        print(f"validation: {len(validation)} scenes of the locations {', '.join(held_out)}")
    return divided, leaks


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
