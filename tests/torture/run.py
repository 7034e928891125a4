"""Break things on purpose, many times: `make torture`, or some parts within `--budget MINUTES`.

    python tests/torture/run.py --budget 30
    python tests/torture/run.py --budget 5 --only saves

A case is a function `(number, folder) -> outcome`: it derives everything random from its number,
returns a word for how it ended, and raises AssertionError if a promise was broken. README.md beside
this file says how to add one.
"""

import argparse
import csv
import datetime
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

from multinode.hosts import why_not
from multinode.scenarios import scenario
from torture import checkpoints, coco_files, images, kills, rasters, xmls
from torture.contained import hundred

from benchmarks.lib.environment import provenance
from benchmarks.lib.readme import check_clean, read_rows, write_part
from common.cli import number

README = Path(__file__).resolve().parents[2] / "common/run/README.md"
RESULTS = Path(__file__).with_name("results.csv")
Case = Callable[[int, Path], str]


class Part(NamedTuple):
    case: Case
    goal: int  # cases in all
    what: str  # its name in the README
    size: int = 1  # how many of these are in a case


PARTS: dict[str, Part] = {
    "kills": Part(kills.killed_run, 20, "kills of a training, ten in each", kills.KILLS),
    "saves": Part(checkpoints.killed_save, 1_000, "kills inside a save"),
    "corruptions": Part(checkpoints.corrupted, 2_000, "corrupted checkpoints"),
    "checkpoints": Part(checkpoints.fuzzed, 20_000, "fuzzed checkpoints"),
    "hundreds of XMLs": Part(partial(hundred, xmls.hostile_xml), 1_000, "fuzzed XML files", 100),
    "hundreds of COCO files": Part(
        partial(hundred, coco_files.hostile_coco), 200, "fuzzed COCO files", 100
    ),
    "hundreds of images": Part(partial(hundred, images.hostile_image), 500, "fuzzed images", 100),
    "hundreds of rasters": Part(
        partial(hundred, rasters.hostile_raster), 20, "fuzzed rasters and GeoJSON files", 100
    ),
    "two hosts": Part(scenario, 60, "trainings on two hosts, six things happening to them"),
}


def done(name: str, path: Path) -> int:
    """Number of cases of a part in the results; it continues with the next case."""
    if not path.is_file():
        return 0
    return sum(int(row["cases"]) for row in read_rows(path) if row["part"] == name)


def totals(rows: list[dict[str, str]]) -> str:
    """The sum of the results, in Markdown."""
    lines = ["| | done | of | promises broken |", "|---|--:|--:|--:|"]
    for name, part in PARTS.items():
        of_part = [row for row in rows if row["part"] == name]
        cases, broken = (sum(int(row[key]) for row in of_part) for key in ("cases", "broken"))
        goal = part.goal * part.size
        lines.append(f"| {part.what} | {cases * part.size:,} | {goal:,} | {broken} |")
    return "\n".join(lines)


def torment(name: str, part: Part, first: int, seconds: float) -> dict[str, object]:
    """Run cases from number `first` until the goal or the time is reached; returns a row.

    Beyond its goal a part is limited by the time alone.
    """
    outcomes: Counter[str] = Counter()
    broken: list[str] = []
    start, number = time.monotonic(), first
    goal = part.goal if first < part.goal else math.inf
    with tempfile.TemporaryDirectory(prefix=f"torture-{name}-") as folder:
        while number < goal and time.monotonic() - start < seconds:
            try:
                outcomes[part.case(number, Path(folder))] += 1
            except Exception as error:  # an AssertionError or any other: a promise is broken
                kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                reason = kind + " ".join(str(error).split())[:200]
                broken.append(f"case {number}: {reason}")
                print(f"{name} {broken[-1]}", file=sys.stderr)
            number += 1
    return {
        "part": name,
        "first": first,
        "cases": number - first,
        "broken": len(broken),
        "outcomes": ", ".join(f"{count} {word}" for word, count in sorted(outcomes.items())),
        "first_broken": broken[0] if broken else "",
        "seconds": round(time.monotonic() - start, 1),
        "date": datetime.date.today().isoformat(),
    }


def append(row: dict[str, object], path: Path) -> None:
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=number(float, 1e-3), default=60, metavar="MINUTES")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="rows are appended")
    parser.add_argument("--write-readme", action="store_true", help="renew the README's totals")
    args = parser.parse_args(argv)
    if reason := why_not():
        args.only = [name for name in args.only if name != "two hosts"]
        print(f"skipped 'two hosts': {reason}")
    end = time.monotonic() + 60 * args.budget
    # First what has a goal to reach; then all parts go on beyond theirs.
    left = [name for name in args.only if done(name, args.output) < PARTS[name].goal]
    left, beyond = left or args.only, not left
    failed = False
    while left and (seconds := (end - time.monotonic()) / len(left)) > 0:
        name, *left = left  # time that a part does not use goes to the parts after it
        if not left and not beyond:
            left, beyond = args.only, True
        row = torment(name, PARTS[name], done(name, args.output), seconds)
        if row["cases"]:
            append(row | provenance(__file__, argv), args.output)
        print(*(f"{key} {row[key]}" for key in ("part", "cases", "broken", "outcomes", "seconds")))
        failed |= bool(row["broken"])
    if args.write_readme:
        check_clean(read_rows(args.output))
        write_part(README, "torture", totals(read_rows(args.output)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
