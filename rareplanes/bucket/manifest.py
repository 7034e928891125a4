"""The downloaded files on this machine: their manifest, folders and checks of their content."""

import hashlib
import json
import os
import re
import stat
import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import defusedxml
import defusedxml.ElementTree

from common.cli import UserError
from common.io.files import sweep, write_atomic
from rareplanes.bucket.listing import BUCKET, RemoteFile, StoppedError
from rareplanes.scene import MAX_TAGS, MAX_XML_BYTES

MANIFEST = "manifest.json"
CHUNK = 256 * 1024
MIB = 1024**2
# Into which the usual upload tools cut a large object.
PART_SIZES = [n * MIB for n in (5, 6, 8, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128, 256, 512)]


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, as it was when its content was last checked."""

    key: str
    size: int
    etag: str
    md5: str
    mtime_ns: int


def load_manifest(root: Path) -> dict[str, Entry]:
    """Path below `root` → entry, for the files that are still there.

    An unreadable manifest counts as empty: its files are then checked by hash.
    """
    try:
        files = json.loads((root / MANIFEST).read_bytes())["files"]
        entries = {path: Entry(**entry) for path, entry in files.items()}
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {path: entry for path, entry in entries.items() if (root / path).is_file()}


def save_manifest(root: Path, entries: dict[str, Entry]) -> None:
    content = {"bucket": BUCKET, "files": {path: asdict(e) for path, e in sorted(entries.items())}}
    write_atomic(root / MANIFEST, json.dumps(content, separators=(",", ":")).encode())


def prepare_folders(root: Path, files: Iterable[RemoteFile]) -> None:
    """Create the folders of `files`, and delete the temporary files of killed runs in them.

    Raises:
        UserError: A folder is a link to somewhere outside `root`, or is a file.
    """
    for folder in sorted({root, *((root / file.path).parent for file in files)}):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(
                f"{str(folder)!r} must be a folder and is a file: move it away, or choose another "
                "folder with -o."
            ) from error
        if not folder.resolve().is_relative_to(root.resolve()):
            raise UserError(
                f"{str(folder)!r} is a link that leads out of {str(root)!r}: remove it, or give "
                "the real folder with -o."
            )
        sweep(folder)


def is_recorded(root: Path, file: RemoteFile, entry: Entry | None) -> bool:
    """Whether `file` exists in the listed version, unchanged since its content was checked."""
    status = _regular(root / file.path)
    return (
        entry is not None
        and status is not None
        and (entry.key, entry.size, entry.etag) == (file.key, file.size, file.etag)
        and (entry.size, entry.mtime_ns) == (status.st_size, status.st_mtime_ns)
    )


def recheck(
    root: Path, file: RemoteFile, entry: Entry | None, stop: threading.Event
) -> Entry | None:
    """Read an existing file; returns its entry, or None if it is not the listed object."""
    path = root / file.path
    status = _regular(path)
    if status is None or status.st_size != file.size:
        return None
    md5 = hashlib.md5(usedforsecurity=False)
    for chunk in _chunks(path, CHUNK):
        if stop.is_set():
            raise StoppedError
        md5.update(chunk)
    if entry is not None and entry.etag == file.etag:
        sound = entry.md5 == md5.hexdigest()
    else:
        sound = damage(path, file, md5.hexdigest()) is None
    if not sound:
        return None
    return Entry(file.key, file.size, file.etag, md5.hexdigest(), status.st_mtime_ns)


def _regular(path: Path) -> os.stat_result | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def damage(path: Path, file: RemoteFile, md5: str) -> str | None:
    """What is wrong with the content at `path` (its MD5 given); None if it is the listed object.

    S3's ETag is the MD5 of the content, or for an upload in N parts the MD5 of the parts' MD5s and
    `-N`. If no usual part size gives the latter, the part size is unknown. The file's own checks
    remain: a PNG's checksums; for XML only that it parses.
    """
    if (size := path.stat().st_size) != file.size:
        return f"{size} bytes instead of {file.size}"
    if re.fullmatch(r"[0-9a-f]{32}", file.etag):
        return None if md5 == file.etag else f"MD5 {md5} instead of {file.etag}"
    if match := re.fullmatch(r"[0-9a-f]{32}-([1-9][0-9]{0,4})", file.etag):
        parts = int(match[1])
        sizes = [size] if parts == 1 else [s for s in PART_SIZES if -(-size // s) == parts]
        if any(_multipart_etag(path, s) == file.etag for s in sizes):
            return None
        if parts == 1:  # as in every multipart upload below 5 MiB: no other size is possible
            return f"ETag {file.etag} does not match"
    content = path.read_bytes()
    sound = _png_is_sound if file.path.endswith(".png") else _xml_parses
    return None if sound(content) else f"ETag {file.etag} does not match; damaged content"


def _chunks(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(size):
            yield chunk


def _multipart_etag(path: Path, part_size: int) -> str:
    digests = [
        hashlib.md5(part, usedforsecurity=False).digest()
        for part in _chunks(path, max(part_size, 1))
    ]
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


def _png_is_sound(content: bytes) -> bool:
    """Whether every chunk has the right CRC-32 and IEND is the last (PNG, section 5)."""
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        return False
    at, kind = 8, b""
    while at + 12 <= len(content) and kind != b"IEND":
        length = int.from_bytes(content[at : at + 4], "big")
        kind, end = content[at + 4 : at + 8], at + 8 + length
        if zlib.crc32(content[at + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            return False
        at = end + 4
    return kind == b"IEND" and at == len(content)


def _xml_parses(content: bytes) -> bool:
    if len(content) > MAX_XML_BYTES or content.count(b"<") > MAX_TAGS:
        return False
    try:
        defusedxml.ElementTree.fromstring(content, forbid_dtd=True)
    except (SyntaxError, ValueError):  # ParseError is the former, defusedxml's errors the latter
        return False
    return True
