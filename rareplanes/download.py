"""Download RarePlanes' synthetic half: scenes of 1920×1080 with a mask and an XML each.

    python rareplanes/download.py -n 100            # 100 scenes per split, from all airports
    python rareplanes/download.py -n 100 --dry-run  # what would be downloaded, and how much
    python rareplanes/download.py --all -s test -o /scratch/rareplanes

The bucket is public: no account is needed and no credentials are used. To continue after a stop,
run the same command again; nothing is downloaded twice. The data set is CC BY-SA 4.0: Shermeyer,
Hossler, Van Etten, Hogan, Lewis, Kim, "RarePlanes Dataset", In-Q-Tel CosmiQ Works and AI.Reverie,
June 2020.
"""

import argparse
import difflib
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser, UserError, run
from rareplanes.bucket import listing, manifest
from rareplanes.bucket.listing import Listing, RemoteFile, Scene
from rareplanes.bucket.transfer import GIVE_UP_AFTER, Outcome, as_size, fetch_all

SPLITS = ("train", "test")
SPARE_BYTES = 50_000_000  # for the manifest, folders and the files' last blocks


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description=(__doc__ or "").partition("\n")[0],
    )
    add = parser.add_argument
    add("-o", "--output-path", type=Path, default=Path("data"), help="dataset root to fill")
    add("-n", "--limit", type=int, metavar="N", help="scenes per split, spread over the airports")
    add("-a", "--all", action="store_true", help="every scene: about 150 GB of images plus masks")
    add(
        "-s", "--split", "--data-split", choices=(*SPLITS, "all"), default="all", help="which split"
    )
    add("--airports", nargs="+", metavar="NAME", help="only these airports")
    add("--seed", type=int, default=0, help="which scenes -n picks")
    add("-j", "--workers", type=int, default=16, help="files downloaded in parallel")
    add("--retries", type=int, default=8, help="tries after the first, up to 30 s apart")
    add("--verify", action="store_true", help="also read every existing file and check its content")
    add("--dry-run", action="store_true", help="list what would be downloaded; write nothing")
    add("--endpoint-url", metavar="URL", help="of an S3-compatible mirror")
    args = parser.parse(argv)
    if args.all == (args.limit is not None):
        raise UserError(
            "say how much to download: -n 100 for 100 scenes per split, or --all for everything"
            f"{', not both' if args.all else ''}."
        )
    for flag, value, least in (
        ("-n", args.limit, 1),
        ("--workers", args.workers, 1),
        ("--retries", args.retries, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{flag} {value} is too small: it must be at least {least}.")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return download(args)
    except KeyboardInterrupt:
        print(
            "stopped; complete files are kept, and the same command continues from here.",
            file=sys.stderr,
        )
        return 130


def download(args: argparse.Namespace) -> int:
    root: Path = args.output_path
    on_disk = existing_parent(root)
    client = listing.make_client(args.endpoint_url, args.workers)
    splits = SPLITS if args.split == "all" else (args.split,)
    print(f"listing s3://{listing.BUCKET}/{listing.PREFIX}/ …", flush=True)
    listed = listing.list_scenes(client, splits, args.retries)
    report_listing(listed)
    scenes = pick(listed.scenes, splits, args.airports, args.limit, args.seed)

    files = [file for scene in scenes for file in scene.files]
    missing = sum(file.size for file in files if not has_its_size(root, file))
    print_table(scenes, splits)
    print(
        f"{describe(files)}, of which {as_size(missing)} are not in {str(root)!r} yet", flush=True
    )
    if args.limit is not None and len(scenes) < args.limit * len(splits):
        print(
            f"fewer than -n {args.limit} per split: the bucket has no more scenes of these airports"
        )
    if missing and missing + SPARE_BYTES > (free := shutil.disk_usage(on_disk).free):
        raise UserError(
            f"{as_size(missing)} are needed in {str(root)!r} and {as_size(free)} are free: take "
            "fewer scenes with -n, or choose another disk with -o."
        )
    if args.dry_run:
        return 0

    manifest.prepare_folders(root, files)
    outcome = fetch_all(
        client,
        root,
        scenes,
        manifest.load_manifest(root),
        workers=args.workers,
        retries=args.retries,
        verify=args.verify,
    )
    return report(outcome, scenes, root)


def existing_parent(root: Path) -> Path:
    """The nearest existing folder at or above `root`, checked to be writable."""
    folder = next(p for p in (root.absolute(), *root.absolute().parents) if os.path.lexists(p))
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is not a folder: choose another one with -o.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{str(folder)!r} is not writable: choose another folder with -o.")
    return folder


def pick(
    scenes: list[Scene],
    splits: tuple[str, ...],
    airports: list[str] | None,
    limit: int | None,
    seed: int,
) -> list[Scene]:
    """The scenes to download: of each split and these airports, the first `limit`."""
    if not scenes:
        raise UserError(
            f"s3://{listing.BUCKET}/{listing.PREFIX}/ lists no complete scene: "
            "check --endpoint-url."
        )
    known = sorted({scene.airport for scene in scenes})
    for name in airports or ():
        if name not in known:
            by_fold = {airport.casefold(): airport for airport in known}
            near = difflib.get_close_matches(name.casefold(), by_fold, n=1)
            hint = f"the nearest is {by_fold[near[0]]!r}" if near else f"there are {known}"
            raise UserError(f"--airports {name!r}: the bucket has no such airport; {hint}.")
    wanted = set(airports or known)
    return [
        scene
        for split in splits
        for scene in listing.choose(
            [s for s in scenes if s.split == split and s.airport in wanted], limit, seed
        )
    ]


def has_its_size(root: Path, file: RemoteFile) -> bool:
    try:
        return (root / file.path).lstat().st_size == file.size
    except (FileNotFoundError, NotADirectoryError):
        return False


def describe(files: list[RemoteFile]) -> str:
    size = as_size(sum(file.size for file in files))
    return f"{len(files) // len(listing.PARTS)} scenes, {len(files)} files, {size}"


def print_table(scenes: list[Scene], splits: tuple[str, ...]) -> None:
    counts = Counter((scene.airport, scene.split) for scene in scenes)
    airports = sorted({airport for airport, _ in counts})
    width = max(len("airport"), *map(len, airports))
    print(f"{'airport':{width}}", *(f"{split:>6}" for split in splits))
    for airport in airports:
        print(f"{airport:{width}}", *(f"{counts[airport, split]:6}" for split in splits))


def report_listing(listing: Listing) -> None:
    """Print what the bucket has that is not downloaded, and why."""
    if listing.refused:
        shown = ", ".join(ascii(key) for key in listing.refused[:10])
        more = " …" if len(listing.refused) > 10 else ""
        print(
            f"{len(listing.refused)} keys do not belong to a scene and are skipped: {shown}{more}"
        )
    if listing.incomplete:
        gaps = [f"{stem} ({', '.join(parts)})" for stem, parts in listing.incomplete.items()]
        more = " …" if len(gaps) > 10 else ""
        print(
            f"{len(gaps)} scenes have missing parts and are skipped: {'; '.join(gaps[:10])}{more}"
        )


def report(outcome: Outcome, scenes: list[Scene], root: Path) -> int:
    """Print what was downloaded and, for each scene, what failed; returns the exit code."""
    fetched = f"{outcome.fetched} files ({as_size(outcome.fetched_bytes)}) fetched"
    print(f"{fetched}, {outcome.kept} were in {str(root)!r} already")
    if not outcome.failed:
        return 0
    for scene in scenes:
        reasons = [
            f"{Path(file.path).parent.name}: {outcome.failed[file.path]}"
            for file in scene.files
            if file.path in outcome.failed
        ]
        if reasons:
            print(f"incomplete: {scene.split}/{scene.stem} ({'; '.join(reasons)})", file=sys.stderr)
    if outcome.gave_up:
        print(
            f"stopped early: {GIVE_UP_AFTER} files in a row failed, the bucket no longer answers.",
            file=sys.stderr,
        )
    print(
        f"{len(outcome.failed)} files could not be fetched: the same command tries them again.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` works like Ctrl-C
    run(main)
