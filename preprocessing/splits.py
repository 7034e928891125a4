"""What all tiling commands share: their options, and many scenes tiled in many processes.

Everything is first written to `<split>/.tiling/`. The tiles of an earlier run stay until the new
ones are complete. After an interruption of any kind the next run continues there, and the result is
the same to the byte for any number of processes and interruptions.
"""

import argparse
import hashlib
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from common.cli import UserError, number, processes, progress, seeds
from common.io.files import locked
from common.io.look import options_of
from common.io.tiles import FOUND, PACKED, tile_paths
from preprocessing.index import Tile, aircraft_of, contents, refuse_replacing, write_index
from preprocessing.pack import pack_splits
from preprocessing.scene_tiles import Shown, tile_name, write_images, write_labels
from preprocessing.tiles import ALL, Settings, Source
from preprocessing.workers import Workers

# With what was found in the tiles that are replaced.
OUTPUTS = ("images_tiled", "masks_tiled", "instances_tiled.json", *PACKED, FOUND)
STAGE = ".tiling"

T = TypeVar("T")


class LeftOut(NamedTuple):
    """Numbers of scenes and of objects that are not in the tiles, by the reason."""

    scenes: Counter[str]
    objects: Counter[str]


class Tiled(NamedTuple):
    """A split: the kept tiles, what its scenes show, and its bad scenes, by their stems."""

    kept: list[Tile]
    shown: dict[str, Shown]
    bad: dict[str, UserError]


def add_tiling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `tile_splits` reads."""
    add = parser.add_argument
    add("-s", "--tile-size", type=number(int, 16, 4096), default=512, help="side of a tile, pixels")
    add("-n", "--num-workers", type=processes, default=_cores(), help="processes")
    add(
        "--min-visible",
        type=number(float, 0, 1),
        default=0.1,
        help="a tile that shows a smaller share of an aircraft ignores it",
    )
    add(
        "--negatives",
        type=number(float, 0, 1000),
        default=0.1,
        metavar="FRACTION",
        help="tiles without aircraft to keep, as a share of the tiles with aircraft",
    )
    add("--seed", type=seeds, default=0, help="decides which tiles without aircraft are kept")
    add(
        "--png-level",
        type=number(int, 0, 9),
        default=1,
        help="compression: 0 none, 1 fast, 9 small",
    )
    add(
        "--pack",
        action="store_true",
        help="also write each split as two arrays that load many times as fast; they take about "
        "(3+1)·S² bytes per tile, 1 MB at 512 pixels",
    )
    add("--skip-bad", action="store_true", help="leave out scenes that cannot be read")


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def tile_splits(
    splits: Mapping[Path, Sequence[Source]],
    categories: list[str],
    args: argparse.Namespace,
    attribute: str | None = None,
    source: list[str] | None = None,
    left_out: LeftOut | None = None,
    labels: str = "mask",
) -> int:
    """Tile the scenes of each split (a folder) into `OUTPUTS` in that folder.

    Without `--pack`, the packed arrays of an earlier run are removed.
    The last line that is printed counts the scenes and objects in the tiles, and those left out.

    Args:
        splits: Folder of a split → its scenes.
        categories: Names of the categories 1…N.
        args: Those of `add_tiling_options`.
        attribute: As in `Settings`.
        source: Where the scenes come from, if not from RarePlanes; tiles of another source are not
            replaced.
        left_out: What the caller has left out of `splits`.
        labels: As in `Settings`.

    Returns:
        0; 1 if a scene could not be read and so nothing was changed; 130 after Ctrl-C.

    Raises:
        UserError: no scene could be read, a split would be empty or replace tiles of another
            source, another run is writing there, or the disk is too full for packing.
    """
    settings = Settings(
        tile_size=args.tile_size,
        min_visible=args.min_visible,
        negatives=args.negatives,
        attribute=attribute,
        seed=args.seed,
        png_level=args.png_level,
        labels=labels,
    )
    total = sum(map(len, splits.values()))
    for folder in splits:
        refuse_replacing(folder, source)
    try:
        with ExitStack() as stack:
            for folder in splits:
                stack.enter_context(_locked(folder / STAGE))
            pool = stack.enter_context(Workers(min(args.num_workers, total)))
            tiled = {f: _tile(pool, f / STAGE, sources, settings) for f, sources in splits.items()}
            if _report_bad(tiled, total, args.skip_bad):
                return 1
            summary = _summary(tiled, left_out or LeftOut(Counter(), Counter()))
            _refuse_empty(tiled, settings, summary)
            for folder, part in tiled.items():
                airports = {scene.stem: scene.airport for scene in splits[folder]}
                _remove_others(folder / STAGE, part.kept)
                write_index(
                    folder / STAGE,
                    part.kept,
                    airports,
                    categories,
                    settings,
                    options_of(args),
                    source,
                )
                _report(folder, part.kept, len(part.shown))
            if args.pack:
                named = {f / STAGE: aircraft_of(f / STAGE, p.kept) for f, p in tiled.items()}
                pack_splits(pool, named, settings.tile_size)
            for folder in splits:
                put_in_place(folder)
            print(summary)
    except KeyboardInterrupt:
        print("stopped; the same command continues from here.", file=sys.stderr)
        return 130
    return 0


def _tile(pool: Workers, stage: Path, sources: Sequence[Source], settings: Settings) -> Tiled:
    """Write the tiles of a split to its stage."""
    split = stage.parent.name
    tasks = {source.stem: (source, stage, settings) for source in sources}
    shown, bad = _each(pool, write_labels, tasks, f"{split} labels")
    done: dict[str, list[int]] = {}
    while True:
        shown = {stem: scene for stem, scene in shown.items() if stem not in bad}
        kept = select({stem: scene.positive for stem, scene in shown.items()}, settings)
        wanted: dict[str, list[int]] = defaultdict(list)
        for tile in kept:
            wanted[tile.stem].append(tile.n)
        images = {s: (*tasks[s], tiles) for s, tiles in wanted.items() if tiles != done.get(s)}
        if not images:
            return Tiled(kept, shown, bad)
        # If an image turns out to be bad, its tiles no longer count: select again.
        bad |= _each(pool, write_images, images, f"{split} images")[1]
        done |= {stem: wanted[stem] for stem in images}


def _report_bad(tiled: Mapping[Path, Tiled], total: int, skip_bad: bool) -> bool:
    """Print the scenes that could not be read; returns whether they end the run."""
    failed = [(f / stem, why) for f, part in tiled.items() for stem, why in part.bad.items()]
    for name, why in sorted(failed, key=lambda item: item[0]):
        print(f"bad scene {str(name)!r}: {why}", file=sys.stderr)
    if len(failed) == total:
        raise UserError(f"none of the {total} scenes could be read.")
    if failed and not skip_bad:
        print(
            f"error: {len(failed)} of {total} scenes could not be read, so nothing was "
            "changed; repair or remove them, or skip them with --skip-bad. The work on the others "
            "is kept.",
            file=sys.stderr,
        )
    return bool(failed) and not skip_bad


def _refuse_empty(tiled: Mapping[Path, Tiled], settings: Settings, summary: str) -> None:
    for folder, part in tiled.items():
        if not part.kept:
            raise UserError(
                f"{str(folder)!r} would have no tile, so nothing was changed: no scene that can be "
                f"read shows an aircraft, and --negatives {settings.negatives:g} keeps no tile "
                f"without (100 keeps all). In all splits {summary}."
            )


def select(positive: dict[str, list[bool | None]], settings: Settings) -> list[Tile]:
    """All positive tiles of a split and `negatives` times as many others, sorted by name.

    Tiles without a valid pixel are left out.

    From `ALL` on all others are kept, so that a split without aircraft can be scored, too.

    A hash of the name decides which others, so the choice depends neither on the order of the work
    nor on the other scenes.
    """
    tiles = [
        Tile(tile_name(stem, n), stem, n, shows)
        for stem, flags in positive.items()
        for n, shows in enumerate(flags)
        if shows is not None
    ]
    positives = [tile for tile in tiles if tile.positive]
    others = [tile for tile in tiles if not tile.positive]
    others.sort(key=lambda tile: hashlib.sha256(f"{settings.seed} {tile.name}".encode()).digest())
    share = int(settings.negatives * len(positives) + 1e-9)
    return sorted(positives + (others if settings.negatives >= ALL else others[:share]))


def put_in_place(folder: Path) -> None:
    """Replace the outputs of a split by the staged ones, if any, and remove the stage."""
    stage = folder / STAGE
    old = stage / "old"
    for remains in (stage / "records", old):  # the masks move now: no record may refer to them
        shutil.rmtree(remains, ignore_errors=True)
    old.mkdir()
    for name in OUTPUTS:
        if (folder / name).exists():
            (folder / name).rename(old / name)
        if (stage / name).exists():
            (stage / name).rename(folder / name)
    shutil.rmtree(stage)


def remove_tiles(folder: Path) -> None:
    """Remove the outputs that an earlier run left in a split, and the split if that was all."""
    for name in OUTPUTS:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name, ignore_errors=True)
        else:
            (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _each(
    pool: Workers, function: Callable[..., T], tasks: Mapping[str, tuple[Any, ...]], label: str
) -> tuple[dict[str, T], dict[str, UserError]]:
    """Results and failures, by the name of the task."""
    names = list(tasks)
    results: dict[str, T] = {}
    bad: dict[str, UserError] = {}
    for i, result in progress(
        pool.outcomes(function, list(tasks.values())), total=len(names), desc=label, unit="scene"
    ):
        if isinstance(result, UserError):
            bad[names[i]] = result
        else:
            results[names[i]] = result
    return results, bad


def _remove_others(stage: Path, tiles: list[Tile]) -> None:
    """Keep only the files of `tiles` in the stage."""
    expected = {path for tile in tiles for path in tile_paths(stage, tile.name)}
    for path in (*(stage / "images_tiled").iterdir(), *(stage / "masks_tiled").iterdir()):
        if path not in expected:
            path.unlink()
    for name in PACKED:  # of an interrupted run
        (stage / name).unlink(missing_ok=True)


def _summary(tiled: Mapping[Path, Tiled], before: LeftOut) -> str:
    """Counts of the scenes and objects in the tiles, and of those left out, by the reason."""
    scenes, objects = before.scenes.copy(), before.objects.copy()
    scenes_used = objects_used = 0
    for part in tiled.values():
        used = {tile.stem for tile in part.kept}
        scenes_used += len(used)
        scenes["that cannot be read"] += len(part.bad)
        scenes["without aircraft (--negatives 100 keeps them)"] += len(part.shown) - len(used)
        for scene in part.shown.values():
            objects_used += scene.things - sum(scene.left_out.values())
            objects.update(scene.left_out)
    text = (
        f"{scenes_used} of {scenes_used + scenes.total()} scenes and {objects_used} of "
        f"{objects_used + objects.total()} objects are in the tiles"
    )
    for kind, counts in (("scenes", scenes), ("objects", objects)):
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common() if count)
        text += f"; {kind} left out: {reasons}" if reasons else ""
    return text


def _report(folder: Path, tiles: list[Tile], scenes: int) -> None:
    positive = sum(tile.positive for tile in tiles)
    padded = {t.stem for t, content in contents(folder / STAGE, tiles) if any(content["padded"])}
    print(
        f"{str(folder)!r}: {scenes} scenes, {positive} tiles with aircraft, "
        f"{len(tiles) - positive} without"
        + (f"; {len(padded)} scenes are smaller than a tile and were padded" if padded else "")
    )


@contextmanager
def _locked(stage: Path) -> Iterator[None]:
    """Create the stage and lock it: two runs would write the same files."""
    try:
        for name in ("records", "images_tiled", "masks_tiled"):
            (stage / name).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            f"{str(stage.parent)!r} cannot be a folder, as a file is there; choose another -o."
        ) from None
    with locked(stage.parent, stage / "lock"):
        yield
