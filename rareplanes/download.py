"""Download RarePlanes: the rendered half (image, mask, XML), or the real one (GeoTIFF, GeoJSON).

    python rareplanes/download.py -n 100            # 100 scenes per split, from all airports
    python rareplanes/download.py -n 100 --dry-run  # what would be downloaded, and how much
    python rareplanes/download.py --all -s test -o /scratch/rareplanes
    python rareplanes/download.py --real --dry-run  # the satellite scenes, into data/real

The bucket is public: no account is needed and no credentials are used. To continue after a stop,
run the same command again; nothing is downloaded twice. The data set is CC BY-SA 4.0: Shermeyer,
Hossler, Van Etten, Hogan, Lewis, Kim, "RarePlanes Dataset", In-Q-Tel CosmiQ Works and AI.Reverie,
June 2020.
"""

import argparse
import hashlib
import os
import shutil
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import as_completed
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser, UserError, number, positive, processes, progress, run, seeds
from common.io.files import sweep
from rareplanes import bucket
from rareplanes.bucket import Bucket, RemoteFile, RemoteScene

SPLITS = ("train", "test")
SPARE_BYTES = 50_000_000  # for folders and the files' last blocks
GIVE_UP_AFTER = 24  # failed files in a row, each after all its retries: the bucket is gone


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    amount = parser.add_mutually_exclusive_group().add_argument
    add("-o", "--output-path", type=Path, default=Path("data"), help="dataset root to fill")
    amount("-n", "--limit", type=positive, metavar="N", help="scenes per split, from all locations")
    amount("-a", "--all", action="store_true", help="every scene: about 150 GB of images and masks")
    add("--real", action="store_true", help="the real half, into real/; all of it without -n")
    splits = (*SPLITS, "all")
    add("-s", "--split", "--data-split", choices=splits, default="all", help="which split")
    add("--airports", nargs="+", metavar="NAME", help="only these airports or real locations")
    add("--seed", type=seeds, default=0, help="which scenes -n picks")
    add("-j", "--workers", type=processes, default=16, help="files downloaded in parallel")
    retries = number(int, 0, 1000)
    add("--retries", type=retries, default=8, help="tries after the first, up to 30 s apart")
    add("--verify", action="store_true", help="also read every existing file and check its content")
    add("--dry-run", action="store_true", help="list what would be downloaded; write nothing")
    add("--endpoint-url", metavar="URL", help="of an S3-compatible mirror")
    args = parser.parse(argv)
    if not (args.real or args.all or args.limit):
        parser.error("one of the arguments -n/--limit -a/--all is required, or --real.")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return download(args)
    except KeyboardInterrupt:
        print("stopped; complete files are kept: the same command continues.", file=sys.stderr)
        return 130


def download(args: argparse.Namespace) -> int:
    root: Path = args.output_path
    on_disk = existing_parent(root)
    splits = SPLITS if args.split == "all" else (args.split,)
    half = bucket.REAL if args.real else bucket.RENDERED
    with Bucket(args.endpoint_url, args.workers, args.retries) as remote:
        print(f"listing s3://{bucket.BUCKET}/{half.prefix}/ …", flush=True)
        listed, others = remote.list_scenes(splits, half)
        if others:
            names = "; ".join(others[:10]) + ("; …" if len(others) > 10 else "")
            print(f"skipped {len(others)} incomplete scenes and other keys: {names}")
        scenes = pick(listed, splits, args.airports, args.limit, args.seed)

        files = [file for scene in scenes for file in scene.files]
        print_table(scenes, splits)
        size = as_size(sum(file.size for file in files))
        missing = sum(file.size for file in files if not bucket.look_up(root, file))
        print(
            f"{len(scenes)} scenes, {len(files)} files, {size}, of which {as_size(missing)} are "
            f"not in {str(root)!r} yet",
            flush=True,
        )
        if args.limit is not None and len(scenes) < args.limit * len(splits):
            print(f"the bucket has fewer than {args.limit} scenes per split of these locations")
        if missing and missing + SPARE_BYTES > (free := shutil.disk_usage(on_disk).free):
            raise UserError(
                f"{as_size(missing)} are needed in {str(root)!r} and {as_size(free)} are free: "
                "take fewer scenes with -n, or choose another disk with -o."
            )
        if args.dry_run:
            return 0
        prepare_folders(root, files)
        return fetch_all(remote, root, files, args.verify)


def existing_parent(root: Path) -> Path:
    """The nearest existing folder at or above `root`, checked to be writable."""
    folder = next(p for p in (root.absolute(), *root.absolute().parents) if os.path.lexists(p))
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is not a folder: choose another one with -o.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{str(folder)!r} is not writable: choose another folder with -o.")
    return folder


def pick(
    scenes: list[RemoteScene],
    splits: tuple[str, ...],
    locations: list[str] | None,
    limit: int | None,
    seed: int,
) -> list[RemoteScene]:
    """The scenes to download: of each split and these locations, the first `limit`."""
    if not scenes:
        raise UserError(
            f"s3://{bucket.BUCKET}/ lists no complete scene of this half: check --endpoint-url."
        )
    known = locations_of(scenes)
    for name in locations or ():
        if name not in known:
            raise UserError(
                f"--airports {name!r}: this half has no such location; it has {', '.join(known)}."
            )
    picked: list[RemoteScene] = []
    for split in splits:
        candidates = [s for s in scenes if s.split == split and s.location in (locations or known)]
        picked += choose(candidates, limit, seed)
    return picked


def locations_of(scenes: Iterable[RemoteScene]) -> list[str]:
    """Each location once, airports by name and numbers by value."""
    names = {scene.location for scene in scenes}
    return sorted(names, key=lambda name: (int(name) if name.isdecimal() else 0, name))


def choose(scenes: list[RemoteScene], limit: int | None, seed: int) -> list[RemoteScene]:
    """The first `limit` scenes of an order that takes one scene of each location in turn.

    The order depends on the seed and the names alone, so a larger limit only adds scenes.
    """

    def shuffled(name: str) -> bytes:
        return hashlib.sha256(f"{seed}/{name}".encode()).digest()

    locations: dict[str, list[RemoteScene]] = defaultdict(list)
    for scene in sorted(scenes, key=lambda scene: shuffled(scene.stem)):
        locations[scene.location].append(scene)
    turns = zip_longest(*(locations[name] for name in sorted(locations, key=shuffled)))
    return [scene for turn in turns for scene in turn if scene is not None][:limit]


def prepare_folders(root: Path, files: Iterable[RemoteFile]) -> None:
    """Create the folders of `files`, and delete the temporary files of killed runs in them.

    Raises:
        UserError: A folder is a link to somewhere outside `root`, or is a file.
    """
    for folder in sorted({root, *((root / file.path).parent for file in files)}):
        with suppress(FileExistsError, NotADirectoryError):
            folder.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir() or not folder.resolve().is_relative_to(root.resolve()):
            raise UserError(
                f"{str(folder)!r} is not a folder, or is a link that leads out of {str(root)!r}: "
                "remove it, or choose another folder with -o."
            )
        sweep(folder)


def fetch_all(remote: Bucket, root: Path, files: list[RemoteFile], verify: bool) -> int:
    """Download the missing files; returns the exit code."""
    jobs = {remote.pool.submit(remote.fetch, root, file, verify): file for file in files}
    kept: list[RemoteFile] = []
    fetched: list[RemoteFile] = []
    failed: dict[str, str] = {}  # path: why
    failures_in_a_row = 0
    total = sum(file.size for file in files)
    with progress(total=total, desc="download", unit="B", unit_scale=True) as bar:
        for job in as_completed(jobs):
            file = jobs[job]
            bar.update(file.size)
            try:
                (fetched if job.result() else kept).append(file)
                failures_in_a_row = 0
            except bucket.TRANSIENT as error:
                failed[file.path] = bucket.reason(error)
                failures_in_a_row += 1
                if failures_in_a_row == GIVE_UP_AFTER:
                    break

    size = as_size(sum(file.size for file in fetched))
    print(f"{len(fetched)} files ({size}) fetched, {len(kept)} were in {str(root)!r} already")
    for path, why in sorted(failed.items()):
        print(f"failed: {path} ({why})", file=sys.stderr)
    if failed:
        early = "stopped early, " if failures_in_a_row == GIVE_UP_AFTER else ""
        print(f"{early}{len(failed)} files could not be fetched: run it again.", file=sys.stderr)
    return int(bool(failed))


def as_size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def print_table(scenes: list[RemoteScene], splits: tuple[str, ...]) -> None:
    counts = Counter((scene.location, scene.split) for scene in scenes)
    locations = locations_of(scenes)
    width = max(len("location"), *map(len, locations))
    print(f"{'location':{width}}", *(f"{split:>6}" for split in splits))
    for location in locations:
        print(f"{location:{width}}", *(f"{counts[location, split]:6}" for split in splits))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` works like Ctrl-C
    run(main)
