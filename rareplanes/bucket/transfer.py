"""Downloads files from the bucket, in parallel; each is checked before it gets its name."""

import hashlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.io.files import fresh_file, temporary_name
from rareplanes.bucket import manifest
from rareplanes.bucket.listing import (
    BUCKET,
    SAY_EVERY_S,
    TRANSIENT,
    DamagedError,
    RemoteFile,
    Scene,
    StoppedError,
    persist,
    reason,
    stoppable_pool,
    throttled,
)
from rareplanes.bucket.manifest import Entry

SAVE_EVERY_S = 30.0
PLAIN_LINE_EVERY_S = 30.0
GIVE_UP_AFTER = 24  # failed files in a row, each after all its retries: the bucket is gone

Advance = Callable[[int], None]


@dataclass
class Outcome:
    kept: int = 0
    fetched: int = 0
    fetched_bytes: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # path: why
    gave_up: bool = False


@dataclass(frozen=True)
class Shared:
    """What all workers of a run use."""

    client: Any
    root: Path
    retries: int
    stop: threading.Event
    say: Callable[[str], None]
    advance: Advance


@dataclass(frozen=True)
class Result:
    file: RemoteFile
    entry: Entry | None = None
    fetched: bool = False
    error: str = ""


def fetch_all(
    client: Any,
    root: Path,
    scenes: list[Scene],
    entries: dict[str, Entry],
    *,
    workers: int,
    retries: int,
    verify: bool,
) -> Outcome:
    """Download the missing files of `scenes`; keep `entries` and the manifest up to date.

    A file that is recorded in `entries` is not read again unless `verify` is set. Any other
    existing file is read, and kept if it is the listed object.
    """
    outcome, todo = Outcome(), []
    for scene in scenes:
        files = [
            file
            for file in scene.files
            if verify or not manifest.is_recorded(root, file, entries.get(file.path))
        ]
        outcome.kept += len(scene.files) - len(files)
        if files:
            todo.append(files)
    failures_in_a_row, saved = 0, time.monotonic()
    total = sum(file.size for files in todo for file in files)
    try:
        with _progress(total) as advance, stoppable_pool(workers) as (pool, stop):
            shared = Shared(client, root, retries, stop, throttled(SAY_EVERY_S), advance)
            futures = [pool.submit(_bring, shared, files, entries) for files in todo]
            for future in as_completed(futures):
                for result in future.result():
                    _note(result, outcome, entries)
                    failures_in_a_row = failures_in_a_row + 1 if result.error else 0
                if failures_in_a_row >= GIVE_UP_AFTER:
                    outcome.gave_up = True
                    break
                if time.monotonic() - saved > SAVE_EVERY_S:
                    manifest.save_manifest(root, entries)
                    saved = time.monotonic()
    finally:
        manifest.save_manifest(root, entries)
    return outcome


def _note(result: Result, outcome: Outcome, entries: dict[str, Entry]) -> None:
    path = result.file.path
    if result.entry is None:
        entries.pop(path, None)
        outcome.failed[path] = result.error
        return
    entries[path] = result.entry
    if result.fetched:
        outcome.fetched += 1
        outcome.fetched_bytes += result.file.size
    else:
        outcome.kept += 1


def _bring(shared: Shared, files: list[RemoteFile], entries: dict[str, Entry]) -> list[Result]:
    """Keep or download the files of one scene."""
    results = []
    for file in files:
        entry = manifest.recheck(shared.root, file, entries.get(file.path), shared.stop)
        if entry:
            shared.advance(file.size)
            results.append(Result(file, entry))
            continue
        try:
            results.append(Result(file, _fetch(shared, file), fetched=True))
        except TRANSIENT as error:
            results.append(Result(file, error=reason(error)))
    return results


def _fetch(shared: Shared, file: RemoteFile) -> Entry:
    path = shared.root / file.path
    temporary = temporary_name(path)
    try:
        md5 = persist(
            lambda: _receive(shared, file, temporary), shared.retries, shared.stop, shared.say
        )
        mtime_ns = temporary.stat().st_mtime_ns
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return Entry(file.key, file.size, file.etag, md5, mtime_ns)


def _receive(shared: Shared, file: RemoteFile, temporary: Path) -> str:
    """Stream one object to `temporary` and check it; returns its MD5.

    One request for the whole body, not boto's ranged download: for a range S3 sends no checksum,
    so a flipped bit in a file above 8 MiB would not be noticed.
    """
    md5, received = hashlib.md5(usedforsecurity=False), 0
    if_match = f'"{file.etag}"' if file.etag else "*"
    try:
        body = shared.client.get_object(Bucket=BUCKET, Key=file.key, IfMatch=if_match)["Body"]
        with closing(body), fresh_file(temporary) as out:
            while chunk := body.read(manifest.CHUNK):
                if shared.stop.is_set():
                    raise StoppedError
                received += len(chunk)
                shared.advance(len(chunk))
                if received > file.size:
                    raise DamagedError(f"more than the listed {file.size} bytes")
                md5.update(chunk)
                out.write(chunk)
        if wrong := manifest.damage(temporary, file, md5.hexdigest()):
            raise DamagedError(wrong)
    except BaseException:
        shared.advance(-received)
        raise
    return md5.hexdigest()


def as_size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


@contextmanager
def _progress(total: int) -> Iterator[Advance]:
    """Yield a thread-safe counter of bytes: a bar on a terminal, else a line now and then."""
    lock, done, begun = threading.Lock(), 0, time.monotonic()
    on_terminal = sys.stderr.isatty()
    bar = tqdm(total=total, unit="B", unit_scale=True, disable=not on_terminal or not total)
    say = throttled(PLAIN_LINE_EVERY_S)

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            bar.update(count)
            if not on_terminal:
                rate = int(done / (time.monotonic() - begun))
                say(f"{as_size(done)} of {as_size(total)}, {as_size(rate)} per second")

    with bar:
        yield advance
