"""One table of several runs: the settings that differ, the scores, the speed, the memory.

python benchmarks/compare.py runs/unet runs/unet-ema
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser, run
from common.run import report
from common.run.report import Record

# Where a run wrote, how it was started again, and for how long a process may be silent.
NOT_COMPARED = {"output_dir", "resume", "config", "test_only", "dist_timeout"}


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
    numbers = [scores(record) | record.speed() for record in runs]
    for name in dict.fromkeys(name for values in numbers for name in values):
        if airports or ".airport." not in name:
            rows.append([name, *(_number(name, values.get(name)) for values in numbers)])
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = [_line(row, widths) for row in rows]
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:]), ""])
    return "\n".join([head, rule, *body])


def settings(record: Record) -> dict[str, Any]:
    """All that a run was trained with and on, by name."""
    facts = record.facts
    values = {"model": facts["model"], "commit": facts["commit"]}
    values |= {k: v for k, v in facts["settings"].items() if k not in NOT_COMPARED}
    values |= facts["machine"] | facts["versions"]
    for split, data in facts["data"].items():
        values[f"{split} tiles"] = data["fingerprint"][:8]
    return values


def differing(runs: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each name whose values are not all equal; a run without it has an empty cell."""
    rows = []
    for name in dict.fromkeys(name for values in runs for name in values):
        cells = [values.get(name, "") for values in runs]
        if any(cell != cells[0] for cell in cells):
            rows.append([name, *map(_text, cells)])
    return rows


def scores(record: Record) -> dict[str, float]:
    """The validation that chose `model_best.pth`, and the scores of the splits that were tested."""
    best = record.best
    kept = {"step of model_best.pth": best["step"]} if best else {}
    kept |= {f"validation {k}": v for k, v in best.items() if k not in ("step", "epoch")}
    for split, values in record.tests.items():
        kept |= {f"{split} {name}": value for name, value in values.items()}
    return kept


def _steps(record: Record) -> int:
    return max([0, *(line["step"] for line in record.steps)])


def _number(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return str(value)
    return f"{value:.1f}" if name in ("images_per_s", "memory_mib") else f"{value:.4f}"


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _line(row: list[str], widths: list[int]) -> str:
    cells = [row[0].ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    run(main)
