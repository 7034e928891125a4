"""Results files, and the parts of the READMEs that show them.

A generated part is the text between `<!-- name -->` and `<!-- /name -->`.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.cli import UserError
from common.io.files import write_atomic

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "benchmarks/README.md"
RESULTS = ROOT / "benchmarks/results"


def part(readme: Path, name: str) -> str:
    """What a README shows between the marks of `name`."""
    return _split(readme.read_text(), name)[1].strip("\n")


def write_part(readme: Path, name: str, text: str) -> None:
    """Replace what a README shows between the marks of `name` by `text`."""
    before, _, after = _split(readme.read_text(), name)
    readme.write_text(f"{before}<!-- {name} -->\n{text}\n<!-- /{name} -->{after}")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a results file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write a results file with the columns of the first row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], align: str = "lr") -> str:
    """A table in Markdown.

    Args:
        align: `l` or `r` for each column; the last letter holds for all further columns.
    """
    sides = align.ljust(len(head), align[-1])
    rule = "|" + "".join("---|" if side == "l" else "--:|" for side in sides)
    first, *others = (f"| {' | '.join(row)} |" for row in (head, *rows))
    return "\n".join([first, rule, *others])


def check_clean(rows: list[dict]) -> None:
    """Refuse to show rows that no commit can reproduce.

    Raises:
        UserError: Something but results files was changed and not committed.
    """
    if any("+dirty" in row["commit"] for row in rows):
        raise UserError(
            "--write-readme: these numbers were measured with uncommitted changes; commit them "
            "and measure again."
        )


def _split(text: str, name: str) -> tuple[str, str, str]:
    before, start, rest = text.partition(f"<!-- {name} -->")
    inside, end, after = rest.partition(f"<!-- /{name} -->")
    if not (start and end):
        raise UserError(
            f"a README has no place for its part {name!r}; put the lines <!-- {name} --> and "
            f"<!-- /{name} --> into it."
        )
    return before, inside, after
