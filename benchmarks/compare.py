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
    rows = [["", *(str(one.folder) for one in runs)]]
    rows += differing([settings(one) for one in runs])
    rows += [["steps", *(f"{_steps(one)} of {one.facts['total_steps']}" for one in runs)]]
    numbers = [scores(one) | one.speed() for one in runs]
    for name in dict.fromkeys(name for found in numbers for name in found):
        if airports or ".airport." not in name:
            rows.append([name, *(_number(name, found.get(name)) for found in numbers)])
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = [_line(row, widths) for row in rows]
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:]), ""])
    return "\n".join([head, rule, *body])


def settings(one: Record) -> dict[str, Any]:
    """All that a run was trained with and on, by name."""
    facts = one.facts
    found = {"model": facts["model"], "commit": facts["commit"]}
    found |= {k: v for k, v in facts["settings"].items() if k not in NOT_COMPARED}
    found |= facts["machine"] | facts["versions"]
    return found | {f"{split} tiles": of["fingerprint"][:8] for split, of in facts["data"].items()}


def differing(found: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each name whose values are not all equal; a run without it has an empty cell."""
    rows = []
    for name in dict.fromkeys(name for values in found for name in values):
        cells = [values.get(name, "") for values in found]
        if any(cell != cells[0] for cell in cells):
            rows.append([name, *map(_text, cells)])
    return rows


def scores(one: Record) -> dict[str, float]:
    """The validation that chose `model_best.pth`, and the scores of the splits that were tested."""
    kept = {"step of model_best.pth": one.best["step"]} if one.best else {}
    kept |= {f"validation {k}": v for k, v in one.best.items() if k not in ("step", "epoch")}
    for split, found in one.tests.items():
        kept |= {f"{split} {name}": value for name, value in found.items()}
    return kept


def _steps(one: Record) -> int:
    return max([0, *(line["step"] for line in one.steps)])


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
