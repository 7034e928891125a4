"""What coco.py and geojson.py share: their options, and the checks of splits and of classes.

Tiles that these commands write are tiles that a training accepts.
"""

import argparse
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from common.cli import UserError
from common.io.files import read_json
from common.io.folders import Names, composed
from common.io.look import options_of
from common.io.raster import SUFFIXES
from common.io.tiles import IGNORE, read_index
from preprocessing.splits import LeftOut, add_tiling_options, tile_splits
from preprocessing.tiles import OTHER_DATASET, Source, scene_name

SPLIT_NAME = re.compile(r"\w[\w-]*")


class Classes(NamedTuple):
    """The classes 1…N, and for each name in a file the number and the name of its class."""

    names: list[str]
    of: dict[str, tuple[int, str]]


def add_own_data_options(parser: argparse.ArgumentParser, scenes: str) -> None:
    """Add the options that `Destination` reads; `scenes` is what the help calls the scenes."""
    add = parser.add_argument
    add("-o", "--output-dir", type=Path, required=True, help="where the splits are written")
    add("--split", type=Path, help=f"JSON file that names the {scenes} of each split")
    add(
        "--as",
        dest="split_name",
        metavar="SPLIT",
        help=f"make one split of all {scenes}: train (the default), val or test",
    )
    add(
        "--rename",
        action="extend",
        nargs="+",
        type=_renamed,
        metavar="OLD=NEW",
        help="rename classes; those of the same name become one class",
    )
    add_tiling_options(parser)


class Destination:
    """The output folder: the splits that this run writes, and those of earlier runs.

    Args:
        args: Those of `add_own_data_options`.
        scenes: Where the scenes are.
        labels: Where their labels are.

    Raises:
        UserError: The split file, the name of a split or an earlier split is invalid.
    """

    def __init__(self, args: argparse.Namespace, scenes: Path, labels: Path) -> None:
        if args.split and args.split_name:
            raise UserError("--split names the splits already; leave out --as.")
        self.args, self.scenes, self.labels = args, scenes, labels
        self.source = [os.path.relpath(path, args.output_dir) for path in (scenes, labels)]
        self.wanted: Mapping[str, list[str] | None] = (
            read_split(args.split) if args.split else {args.split_name or "train": None}
        )
        for name in self.wanted:
            if not SPLIT_NAME.fullmatch(name):
                raise UserError(
                    f"{str(args.split or '--as')!r}: a split cannot be called {name!r}; use "
                    "letters, digits, _ and -."
                )
        self.skipped = 0
        folders = sorted(p.parent for p in args.output_dir.glob("*/instances_tiled.json"))
        self.others = {f: read_index(f) for f in folders if f.name not in self.wanted}
        others: list[str] = []
        for folder, coco in self.others.items():
            before = dict(coco.get("info", {}).get("look") or {})
            before.pop("trained_gsd", None)
            looks = [look or "no option" for look in (before, options_of(args))]
            if looks[0] != looks[1]:
                print(
                    f"the tiles in {str(folder)!r} were read with {looks[0]}, these with {looks[1]}"
                )
            ordered = sorted(coco["categories"], key=lambda category: category["id"])
            others = others or [category["name"] for category in ordered]
        self.number = partial(number_classes, path=labels, rename=args.rename or (), others=others)
        """`number_classes` with what this run knows."""

    def divide(self, names: Collection[str], where: Path) -> dict[str, list[str]]:
        """The names of the scenes in each split, of all that `where` has.

        Raises:
            UserError: The split file names an unknown scene, or one twice.
        """
        if not self.args.split:
            return {split: list(names) for split in self.wanted}
        known, path = Names(names), str(self.args.split)
        splits: dict[str, list[str]] = {split: [] for split in self.wanted}
        owner: dict[str, str] = {}
        for split, listed in self.wanted.items():
            for name in listed or ():
                scene = known.find(name, where)
                if scene is None:
                    raise UserError(f"{path!r}: {name!r} is not in {str(where)!r}.")
                if scene in owner:
                    raise UserError(
                        f"{path!r} names {name!r} twice, in {owner[scene]!r} and in {split!r}."
                    )
                owner[scene] = split
                splits[split].append(scene)
        self.skipped = len(names) - len(owner)
        if self.skipped:
            print(f"{self.skipped} images are in no split and are skipped")
        return splits

    def tile(
        self, splits: Mapping[str, Sequence[Source]], classes: Classes, left_out: Counter[str]
    ) -> int:
        """Tile the scenes of each split; `left_out` counts objects, by the reason.

        Returns:
            As `tile_splits`.

        Raises:
            UserError: As `tile_splits`; two scenes have one name, or an earlier run has put one
                into another split, so that scores would be wrong.
        """
        stems = Counter(s.stem.casefold() for sources in splits.values() for s in sources)
        if stems and max(stems.values()) > 1:
            raise UserError(
                f"{str(self.labels)!r} and {str(self.scenes)!r} have two scenes whose tiles would "
                f"be called {stems.most_common(1)[0][0]!r}: their names differ only in case, "
                "folder or Unicode form; rename one of them."
            )
        scenes = {s.airport for sources in splits.values() for s in sources}
        for folder, coco in self.others.items():
            before = coco.get("info", {}).get("source", self.source)
            shared = scenes & {str(image.get("airport")) for image in coco["images"]}
            if shared and _folder(before[0]) == _folder(self.source[0]):
                raise UserError(
                    f"{str(folder)!r} holds tiles of an earlier run from the same images, such as "
                    f"{min(shared)!r}; remove that folder, or choose another --output-dir."
                )
        return tile_splits(
            {self.args.output_dir / name: sources for name, sources in splits.items()},
            classes.names,
            self.args,
            OTHER_DATASET,
            source=self.source,
            left_out=LeftOut(Counter({"in no split": self.skipped}), left_out),
        )


def scene_names(paths: Mapping[str, PurePath]) -> dict[str, str]:
    """The starts of the tiles' names, by the names of the scenes; see `scene_name`.

    Args:
        paths: The path of each scene, relative to the data set.

    Raises:
        UserError: One is not UTF-8.
    """
    for name in paths:
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise UserError(f"the name {name!r} is not UTF-8; rename the file.")
    plain = {name: PurePath(composed(str(path))) for name, path in paths.items()}
    count = Counter(path.with_suffix("") for path in plain.values())
    return {
        name: scene_name(path, whole=count[path.with_suffix("")] > 1)
        for name, path in plain.items()
    }


def class_name(value: Any) -> str | None:
    """The name of a class as plain text: composed letters, and single spaces as white space.

    Returns:
        None for what is no text and no whole number, is empty, has over 100 letters, or has
        letters that cannot be printed.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        return None
    name = " ".join(composed(str(value)).split())
    return name if 0 < len(name) <= 100 and name.isprintable() else None


def number_classes(
    names: Collection[str],
    known: Collection[str],
    path: Path,
    rename: Iterable[tuple[str, str]] = (),
    others: Sequence[str] = (),
) -> Classes:
    """The classes of a file.

    Args:
        names: Of its classes, as `class_name` gives them.
        known: All names in it; not all are those of classes.
        path: The file.
        rename: Old and new names.
        others: The classes of the other splits, whose numbers are taken over.

    Raises:
        UserError: `rename` has an unknown name; there is no class, too many, one called ground, or
            one that is not among `others`.
    """
    new = {name: name for name in known} | dict(rename)
    if unknown := [name for name in new if name not in known]:
        raise UserError(
            f"--rename: {unknown[0]!r} is not in {str(path)!r}, which has {list(known)}."
        )
    classes = list(dict.fromkeys(new[name] for name in names))
    if "ground" in classes:
        raise UserError(
            f"{str(path)!r} has a class 'ground', which is our name of pixels outside of all "
            "outlines; add --rename ground=NEW."
        )
    if others and (extra := [name for name in classes if name not in others]):
        raise UserError(
            f"{str(path)!r} has the class {extra[0]!r} and the other splits have {others}; add "
            "--rename OLD=NEW, or tile the file with the most classes first, into another folder."
        )
    if others and classes != list(others):
        print(f"the classes are those of the other splits: {', '.join(map(repr, others))}")
    classes = list(others) or classes
    if not classes:
        raise UserError(f"{str(path)!r} has no class.")
    if len(classes) >= IGNORE:
        raise UserError(
            f"{str(path)!r} has {len(classes)} classes and a mask holds at most {IGNORE - 1}; "
            "make one of several with --rename A=NEW B=NEW."
        )
    number = {name: n for n, name in enumerate(classes, start=1)}
    return Classes(classes, {old: (number[n], n) for old, n in new.items() if n in number})


def read_split(path: Path) -> dict[str, list[str]]:
    """The names of the scenes of each split; keys without a list of names count as notes.

    Raises:
        UserError: There is no split.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} is not a JSON object.")
    split: dict[str, list[str]] = {
        key: names
        for key, names in content.items()
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    }
    if not split:
        raise UserError(f"{str(path)!r} has no split such as {{'train': ['a.jpg']}}.")
    return split


def _folder(scenes: str) -> PurePath:
    path = PurePath(scenes)
    return path.parent if path.suffix.lower() in SUFFIXES else path


def _renamed(text: str) -> tuple[str, str]:
    old, _, new = text.rpartition("=")
    old_name, new_name = class_name(old), class_name(new)
    if old_name is None or new_name is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form airplane=aircraft")
    return old_name, new_name
