"""Cut RarePlanes scenes into tiles, in many processes, with one COCO file for each split.

    python preprocessing/preprocess.py data
    python preprocessing/preprocess.py data -s 768 -n 8 --attribute role --val-airports Basel
    python preprocessing/preprocess.py path/to/scenes -o path/to/tiles

The first argument is a dataset with `train/` and/or `test/`, or one folder with `images/`, `masks/`
and `xmls/`. `images_tiled/`, `masks_tiled/` and `instances_tiled.json` are added to each split.
There is no official validation set, so whole airports are held out of `train/` into `val/`.
"""

import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common.cli import Parser, UserError, run
from preprocessing.splits import OUTPUTS, add_tiling_options, remove_tiles, tile_splits
from preprocessing.tiles import CUT, KINDS, Labels, Thing, is_cut
from rareplanes import attributes
from rareplanes.scene import Scene, airport, read_scene, read_scene_image, scene_files, scene_stems

VAL_SHARE = 0.1
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class RarePlanesScene:
    """A scene on disk, as the tiling sees it."""

    folder: Path
    stem: str
    attribute: str | None
    kind: str = "mask"

    @property
    def airport(self) -> str:
        return airport(self.stem)

    def files(self) -> list[Path]:
        return list(scene_files(self.folder, self.stem))

    def labels(self) -> Labels:
        scene = read_scene(self.folder, self.stem)
        if self.kind != "mask":
            scene = of_diamonds(scene)
        size = scene.width, scene.height
        number = {name: i for i, name in enumerate(attributes.categories(self.attribute), start=1)}
        things = [
            Thing(
                number[attributes.category(a.make, self.attribute)],
                a.make,
                a.pixels,
                CUT if self.kind != "mask" and is_cut(a.diamond or (), size) else "",
                a.diamond or (),
            )
            for a in scene.aircraft
        ]
        return Labels(scene.ids, things)

    def image(self, size: tuple[int, int]) -> np.ndarray:
        return read_scene_image(self.folder, self.stem, size)


def of_diamonds(scene: Scene) -> Scene:
    """The scene as the real half would be labelled: the diamonds of the aircraft that are seen."""
    from preprocessing.shapes import Shape, painted  # rasterio takes half a second

    seen = [aircraft for aircraft in scene.aircraft if aircraft.pixels]
    points = {a: np.array(a.diamond) for a in seen if a.diamond}
    if len(points) < len(seen):
        raise UserError("it has an aircraft without four points; leave out --labels.")
    shapes = {a: Shape("", [[corners[[0, 1, 2, 3, 0]]]]) for a, corners in points.items()}
    seen.sort(key=lambda a: -shapes[a].area)  # of two the smaller is on top
    ids = painted([shapes[a] for a in seen], (0, 0, scene.width, scene.height))
    pixels = np.bincount(ids.ravel(), minlength=len(seen) + 1)[1:].tolist()
    aircraft = [replace(a, pixels=n) for a, n in zip(seen, pixels, strict=True)]
    return replace(scene, aircraft=aircraft, ids=ids)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse(argv)
    output = args.output_dir or args.path
    splits: dict[Path, list[RarePlanesScene]] = {}
    stale = []
    for name, folder in find_splits(args.path).items():
        of = args.attribute, args.labels
        scenes = [RarePlanesScene(folder, stem, *of) for stem in scene_stems(folder)]
        if not scenes:
            raise UserError(f"there is no scene (*.png) in {str(folder / 'images')!r}.")
        held_out: list[str] = []
        if name == "train" and not (args.path / "val" / "images").is_dir():
            held_out = choose_airports([scene.airport for scene in scenes], args.val_airports)
            validation = [scene for scene in scenes if scene.airport in held_out]
            if held_out:
                splits[output / "val"] = validation
                print(f"validation: {len(validation)} scenes of {', '.join(map(repr, held_out))}")
            else:
                stale.append(output / "val")
                print(f"validation: none, as {scenes[0].airport!r} is the only airport in train/")
        elif args.val_airports and name != "test":
            raise UserError("--val-airports needs a dataset with train/ and without val/images/.")
        splits[output / name] = [scene for scene in scenes if scene.airport not in held_out]
    code = tile_splits(
        splits,
        attributes.categories(args.attribute),
        args,
        args.attribute,
        labels=args.labels,
    )
    if code == 0:
        for folder in stale:
            remove_tiles(folder)
    return code


def find_splits(path: Path) -> dict[str, Path]:
    """Name of a split → folder with its scenes; the name is empty for a single folder.

    Raises:
        UserError: The folder holds no scenes.
    """
    folders = {name: path / name for name in SPLITS if (path / name / "images").is_dir()}
    if folders:
        return folders
    if (path / "images").is_dir():
        return {"": path}
    if not path.is_dir():
        raise UserError(
            f"there is no folder {str(path)!r}; python rareplanes/download.py fetches scenes, "
            "python rareplanes/sample.py renders some."
        )
    if path.name in ("images", "masks", "xmls"):
        raise UserError(f"{str(path)!r} is only a part of the scenes; give the folder above it.")
    if path.name in OUTPUTS or any((path / name).exists() for name in OUTPUTS):
        raise UserError(f"{str(path)!r} holds tiles already; give the folder of the scenes.")
    raise UserError(
        f"there are no scenes in {str(path)!r}: it has neither train/images/ nor test/images/ "
        "nor images/."
    )


def choose_airports(airports: list[str], wanted: list[str] | None) -> list[str]:
    """The airports to hold out of scenes that show `airports`, sorted.

    By default those with the fewest scenes, until they have `VAL_SHARE` of the scenes: at least
    one and never all, so none if there is only one airport. Small airports are chosen because
    training on many different ones is worth more than an exact share.

    Raises:
        UserError: `wanted` names an unknown airport, or all.
    """
    count = Counter(airports)
    if wanted:
        known = ", ".join(map(repr, sorted(count)))
        if unknown := sorted(set(wanted) - set(count)):
            raise UserError(f"--val-airports: {unknown[0]!r} is not in train/, which has {known}.")
        if set(wanted) == set(count):
            raise UserError(f"--val-airports leaves none of {known} to train on.")
        return sorted(set(wanted))
    chosen: list[str] = []
    for name in sorted(count, key=lambda name: (count[name], name))[:-1]:
        chosen.append(name)
        if sum(count[name] for name in chosen) >= VAL_SHARE * len(airports):
            break
    return sorted(chosen)


def _parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("path", type=Path, help="dataset with train/ and/or test/, or one folder of scenes")
    add("-o", "--output-dir", type=Path, help="write here instead of beside the scenes")
    add(
        "--attribute",
        choices=attributes.ATTRIBUTES,
        help="what the classes are; by default there is one class, aircraft",
    )
    help = "what the labels are; box and diamond as those of the real half (real.py)"
    add("--labels", choices=KINDS, default="mask", help=help)
    add("--val-airports", nargs="+", metavar="NAME", help="airports to hold out of train/")
    add_tiling_options(parser)
    return parser


if __name__ == "__main__":
    run(main)
