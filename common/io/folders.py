"""What a folder holds: its rasters, and names that may be in another Unicode form."""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from common.cli import UserError
from common.io.raster import SUFFIXES

CONVERTIBLE = (".vrt", ".img", ".ecw", ".bmp", ".webp")  # rasters for gdal_translate


def rasters_in(path: Path, say: Callable[[str], object] = print) -> list[Path]:
    """The rasters of a folder sorted by name, or `path` itself if it is a file.

    `say` is told which other files are there; hidden ones count as others.

    Raises:
        UserError: Nothing is there.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"there is no image or folder {str(path)!r}.")
    files = sorted(p for p in path.iterdir() if not p.is_dir())
    images = [p for p in files if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    if not images:
        raise UserError(f"{str(path)!r} holds no {', '.join(SUFFIXES)} files.")
    if others := [p.name for p in files if p not in set(images)]:
        others.sort(key=lambda name: Path(name).suffix.lower() not in CONVERTIBLE)
        names = ", ".join(map(repr, others[:3])) + (" …" if len(others) > 3 else "")
        say(f"left out {len(others)} files that are hidden or no {', '.join(SUFFIXES)}: {names}")
    return images


class Names:
    """Names, which are found in any Unicode form: macOS decomposes the letters of file names."""

    def __init__(self, names: Iterable[str]) -> None:
        self._forms: dict[str, list[str]] = defaultdict(list)
        for name in names:
            self._forms[composed(name)].append(name)

    def find(self, name: str, where: Path) -> str | None:
        """The name as it is listed; None if it is in no form.

        Raises:
            UserError: Several names in `where` differ from it, and only in their form.
        """
        forms = self._forms.get(composed(name), [])
        if name in forms or not forms:
            return name if forms else None
        if len(forms) > 1:
            raise UserError(
                f"{len(forms)} names in {str(where)!r} differ from {name!r} only in their Unicode "
                f"form: {', '.join(map(ascii, forms))}; rename them."
            )
        return forms[0]


def composed(text: str) -> str:
    """The text with composed letters, Unicode's form NFC."""
    return unicodedata.normalize("NFC", text)


def names_in(folder: Path) -> Names:
    """The names of all that a folder holds; none if it cannot be read."""
    with suppress(OSError):
        return Names(path.name for path in folder.iterdir())
    return Names(())
