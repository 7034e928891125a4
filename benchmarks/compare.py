"""One table of several runs: the settings that differ, the scores, the speed, the memory.

python benchmarks/compare.py runs/unet runs/unet-ema
"""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser, run
from common.run import report
from common.run.report import Record

# Where a run wrote, how it was started again, for how long a process may be silent; and the hashes
# of the data, about which there is a line.
NOT_COMPARED = {"output_dir", "resume", "config", "test_only", "dist_timeout"}
NOT_COMPARED |= {"train index", "val index"}
SPEED = {"images_per_s": "images/s", "data_share": "waiting for data", "memory_mib": "MiB"}
LESS_IS_BETTER = re.compile("waiting for data|MiB|false alarms")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--airports", action="store_true", help="also the scores of each airport")
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of trainings")
    args = parser.parse(argv)
    print(table([report.read(folder) for folder in args.runs], args.airports))


def table(runs: list[Record], airports: bool = False) -> str:
    """A Markdown table with a column for each run, whose columns also line up as plain text."""
    rows = [["", *(str(record.folder) for record in runs)]]
    rows += differing([settings(record) for record in runs])
    rows += [["steps", *(f"{_steps(record)} of {record.facts['total_steps']}" for record in runs)]]
    best = [str(record.best.get("step", "")) for record in runs]
    rows += [["step of model_best.pth", *best]]
    numbers = [scores(record, airports) for record in runs]
    for name in dict.fromkeys(name for values in numbers for name in values):
        rows.append([name, *_cells(name, [values.get(name) for values in numbers])])
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = [_line(row, widths) for row in rows]
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:]), ""])
    hashes = [{k: v["fingerprint"] for k, v in record.facts["data"].items()} for record in runs]
    other = [row[0] for row in differing(hashes)]
    said = [f"\nDifferent tiles in {', '.join(other)}: compare with care."] if other else []
    return "\n".join([head, rule, *body, *said])


def settings(record: Record) -> dict[str, Any]:
    """All that a run was trained with and on, by name."""
    facts = record.facts
    values = {"model": facts["model"], "commit": facts["commit"]}
    values |= {k: v for k, v in facts["settings"].items() if k not in NOT_COMPARED}
    return values | facts["machine"] | facts["versions"]


def differing(runs: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each name whose values are not all equal; a run without it has an empty cell."""
    rows = []
    for name in dict.fromkeys(name for values in runs for name in values):
        cells = [values.get(name, "") for values in runs]
        if any(cell != cells[0] for cell in cells):
            rows.append([name, *map(_text, cells)])
    return rows


def scores(record: Record, airports: bool) -> dict[str, tuple[float, str]]:
    """Scores in words, and the speed: each value, and a remark if its mean leaves classes out."""
    kept = {
        f"{record.title(name)}, {column}": (value, record.averaged(values, name))
        for column, values in record.columns().items()
        for name, value in values.items()
        if airports or record.split_name(name)[0] != "airport"
    }
    return kept | {SPEED[name]: (value, "") for name, value in record.speed().items()}


def _steps(record: Record) -> int:
    return max([0, *(line["step"] for line in record.steps)])


def _cells(name: str, values: list[tuple[float, str] | None]) -> list[str]:
    """The values as text, the best one between asterisks; a mean over fewer classes is not."""
    means = [value[0] for value in values if value and not value[1]]
    best = (min if LESS_IS_BETTER.match(name) else max)(means, default=None)
    digits = 1 if name in ("images/s", "MiB") else 3
    cells = []
    for number, remark in (value or (None, "") for value in values):
        text = "" if number is None else f"{number:.{digits}f}"
        marked = f"**{text}**" if number == best and len(set(means)) > 1 else text
        cells.append(f"{text} ({remark})" if remark else marked)
    return cells


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _line(row: list[str], widths: list[int]) -> str:
    cells = [row[0].ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    run(main)
