"""Break what can be broken, many times: `make torture`, or a part of it within `--budget MINUTES`.

python tests/torture/run.py --budget 30
python tests/torture/run.py --budget 5 --only saves

A case is a function `(number, folder) -> outcome`: it derives all that is random from its number,
says in a word how it ended, and raises AssertionError where a promise was broken. README.md beside
this file tells how to add one.
"""

import argparse
import csv
import datetime
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
from torture import checkpoints, coco_files, images, kills, xmls
from torture.contained import hundred

from benchmarks.machine import provenance

RESULTS = Path(__file__).with_name("results.csv")
Case = Callable[[int, Path], str]


class Part(NamedTuple):
    case: Case
    goal: int  # cases in all


PARTS: dict[str, Part] = {
    "kills": Part(kills.killed_run, 20),  # of ten kills each
    "saves": Part(checkpoints.killed_save, 1_000),
    "corruptions": Part(checkpoints.corrupted, 2_000),
    "checkpoints": Part(checkpoints.fuzzed, 20_000),
    "hundreds of XMLs": Part(partial(hundred, xmls.hostile_xml), 1_000),
    "hundreds of COCO files": Part(partial(hundred, coco_files.hostile_coco), 200),
    "hundreds of images": Part(partial(hundred, images.hostile_image), 500),
}
if not why_not():
    PARTS["two hosts"] = Part(scenario, 60)  # ten of each scenario


def done(name: str, path: Path) -> int:
    """Cases of a part that the results hold: it goes on with the next."""
    if not path.is_file():
        return 0
    with path.open(newline="") as file:
        return sum(int(row["cases"]) for row in csv.DictReader(file) if row["part"] == name)


def torment(name: str, part: Part, first: int, seconds: float) -> dict[str, object]:
    """Run cases from number `first` on until the goal or the time is reached: a row of results."""
    outcomes: Counter[str] = Counter()
    broken: list[str] = []
    start, number = time.monotonic(), first
    with tempfile.TemporaryDirectory(prefix=f"torture-{name}-") as folder:
        while number < part.goal and time.monotonic() - start < seconds:
            try:
                outcomes[part.case(number, Path(folder))] += 1
            except AssertionError as error:
                reason = " ".join(str(error).split())[:200]
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
    parser.add_argument("--budget", type=float, default=60, metavar="MINUTES")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="rows are appended")
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.budget
    left = [name for name in args.only if done(name, args.output) < PARTS[name].goal]
    failed = False
    while left:
        name = left.pop(0)
        # What a part leaves of its share goes to those after it.
        seconds = (end - time.monotonic()) / (len(left) + 1)
        if seconds <= 0:
            break
        row = torment(name, PARTS[name], done(name, args.output), seconds)
        if row["cases"]:
            append(row | provenance(__file__, argv), args.output)
        print(*(f"{key} {row[key]}" for key in ("part", "cases", "broken", "outcomes", "seconds")))
        failed |= bool(row["broken"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
