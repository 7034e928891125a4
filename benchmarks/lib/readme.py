"""Generated parts of the READMEs: the text between `<!-- name -->` and `<!-- /name -->`."""

import csv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "benchmarks/README.md"
METHOD = ROOT / "benchmarks/METHOD.md"


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
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _split(text: str, name: str) -> tuple[str, str, str]:
    before, start, rest = text.partition(f"<!-- {name} -->")
    inside, end, after = rest.partition(f"<!-- /{name} -->")
    if not (start and end):
        raise ValueError(f"there are no marks <!-- {name} --> … <!-- /{name} -->")
    return before, inside, after
