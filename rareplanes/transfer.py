"""Brings files from the bucket here: in parallel, each checked before it gets its name."""

import hashlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rareplanes import local
from rareplanes.bucket import (
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
from rareplanes.local import Entry

SAVE_EVERY_S = 30.0
PLAIN_LINE_EVERY_S = 30.0
GIVE_UP_AFTER = 24  # files in a row, each after all its retries: the bucket is gone for good

Advance = Callable[[int], None]
Say = Callable[[str], None]


@dataclass
class Outcome:
    fetched: int = 0
    fetched_bytes: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # path: why
    gave_up: bool = False


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
    """Bring what `scenes` lack; `entries`, and the manifest with them, follow what is there.

    A file that `entries` vouch for is left alone unless `verify`; any other that is here is read
    and kept if it is the listed one.
    """
    todo = []
    for scene in scenes:
        files = [f for f in scene.files if verify or not _is_here(root, f, entries)]
        if files:
            todo.append(files)
    outcome, failed_in_a_row, saved = Outcome(), 0, time.monotonic()
    total = sum(file.size for files in todo for file in files)
    try:
        with _progress(total) as advance, stoppable_pool(workers) as (pool, stop):
            say = throttled(SAY_EVERY_S)
            bring = partial(_bring, client, root, entries, retries, stop, say, advance)
            futures = [pool.submit(bring, files) for files in todo]
            for future in as_completed(futures):
                for file, result, was_fetched in future.result():
                    if isinstance(result, Entry):
                        entries[file.path] = result
                        outcome.fetched += was_fetched
                        outcome.fetched_bytes += was_fetched * file.size
                        failed_in_a_row = 0
                    else:
                        entries.pop(file.path, None)
                        outcome.failed[file.path] = result
                        failed_in_a_row += 1
                if failed_in_a_row >= GIVE_UP_AFTER:
                    outcome.gave_up = True
                    break
                if time.monotonic() - saved > SAVE_EVERY_S:
                    local.save_manifest(root, entries)
                    saved = time.monotonic()
    finally:
        local.save_manifest(root, entries)
    return outcome


def _is_here(root: Path, file: RemoteFile, entries: dict[str, Entry]) -> bool:
    return local.is_recorded(root, file, entries.get(file.path))


def _bring(
    client: Any,
    root: Path,
    entries: dict[str, Entry],
    retries: int,
    stop: threading.Event,
    say: Say,
    advance: Advance,
    files: list[RemoteFile],
) -> list[tuple[RemoteFile, Entry | str, bool]]:
    """For each file of a scene: the file, its entry or why there is none, whether it came now."""
    results: list[tuple[RemoteFile, Entry | str, bool]] = []
    for file in files:
        if entry := local.recheck(root, file, entries.get(file.path), stop):
            advance(file.size)
            results.append((file, entry, False))
            continue
        try:
            entry = _fetch(client, root, file, retries, stop, say, advance)
            results.append((file, entry, True))
        except TRANSIENT as error:
            results.append((file, reason(error), True))
    return results


def _fetch(
    client: Any,
    root: Path,
    file: RemoteFile,
    retries: int,
    stop: threading.Event,
    say: Say,
    advance: Advance,
) -> Entry:
    path = root / file.path
    temporary = local.temporary_name(path)
    try:
        md5 = persist(lambda: _receive(client, file, temporary, stop, advance), retries, stop, say)
        mtime_ns = temporary.stat().st_mtime_ns
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return Entry(file.key, file.size, file.etag, md5, mtime_ns)


def _receive(
    client: Any, file: RemoteFile, temporary: Path, stop: threading.Event, advance: Advance
) -> str:
    """Stream one object to `temporary` and check it; its MD5.

    One request for the whole body, not boto's ranged download: of a range S3 sends no checksum,
    so a flipped bit in a file above 8 MiB would pass.
    """
    md5, received = hashlib.md5(usedforsecurity=False), 0
    if_match = f'"{file.etag}"' if file.etag else "*"
    try:
        body = client.get_object(Bucket=BUCKET, Key=file.key, IfMatch=if_match)["Body"]
        with closing(body), local.fresh_file(temporary) as out:
            while chunk := body.read(local.CHUNK):
                if stop.is_set():
                    raise StoppedError
                received += len(chunk)
                advance(len(chunk))
                if received > file.size:
                    raise DamagedError(f"more than the listed {file.size} bytes")
                md5.update(chunk)
                out.write(chunk)
        if wrong := local.damage(temporary, file, md5.hexdigest()):
            raise DamagedError(wrong)
    except BaseException:
        advance(-received)
        raise
    return md5.hexdigest()


@contextmanager
def _progress(total: int) -> Iterator[Advance]:
    """Yield what takes bytes done, from any thread: a bar on a terminal, else a line at times."""
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
                rate = done / (time.monotonic() - begun) / 1e6
                say(f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate:.1f} MB/s")

    with bar:
        yield advance
