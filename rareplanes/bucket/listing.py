"""What the public RarePlanes bucket holds, and which scenes of it to take."""

import hashlib
import os
import random
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

import boto3
import botocore.session
import urllib3.exceptions
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from tqdm import tqdm

from common.cli import UserError

BUCKET, REGION, PREFIX = "rareplanes-public", "us-west-2", "synthetic"
PARTS = {"images": ".png", "masks": "_mask.png", "xmls": ".xml"}  # folder: what follows the stem

# The stem becomes a path on this machine: letters, digits, _ and - cannot leave the folder.
STEM = re.compile(r"(?=.{1,150}\Z)[A-Za-z0-9][A-Za-z0-9_-]*_Airport_[A-Za-z0-9_-]+")

MAX_BYTES = 1 << 30  # of an object; an image has 3 MB on average
MAX_KEYS = 1_000_000  # in a folder; there are 45,000 scenes
TIMEOUT_S = 10.0  # to connect, and between two packets
BOTO_ATTEMPTS = 3  # boto's own quick retries; it gives up on a 503 within a second or two
BACKOFF_S, BACKOFF_CAP_S = 1.0, 30.0  # ours: 1, 2, 4, … seconds, never more than the cap
SAY_EVERY_S = 10.0  # between two printed lines about retries
HOPELESS = {403, 404, 412}  # 412: the object is no longer the one that was listed

T = TypeVar("T")


class DamagedError(Exception):
    """The received bytes are not the listed object."""


class StoppedError(Exception):
    """The run is ending: stop the current task."""


TRANSIENT = (DamagedError, BotoCoreError, ClientError, urllib3.exceptions.HTTPError)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    key: str
    path: str  # below the output folder
    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class Scene:
    split: str
    stem: str
    files: tuple[RemoteFile, ...]  # image, mask, xml

    @property
    def airport(self) -> str:
        return self.stem.partition("_Airport_")[0]


@dataclass(frozen=True, slots=True)
class Listing:
    scenes: list[Scene]
    incomplete: dict[str, list[str]]  # "<split>/<stem>": its missing parts
    refused: list[str]  # keys that are not <stem> with the ending of their folder


def make_client(endpoint_url: str | None, connections: int) -> Any:
    """An S3 client that neither reads nor sends credentials; safe to share between threads.

    AWS_PROFILE and ~/.aws are hidden from it: a profile meant for another account, or one that
    does not exist, must not decide whether public data can be fetched.
    """
    unset = (None, None, None, None)
    no_file = (None, None, os.devnull, None)
    session = botocore.session.Session(
        session_vars={"profile": unset, "config_file": no_file, "credentials_file": no_file}
    )
    config = Config(
        signature_version=UNSIGNED,
        retries={"mode": "standard", "total_max_attempts": BOTO_ATTEMPTS},
        connect_timeout=TIMEOUT_S,
        read_timeout=TIMEOUT_S,
        max_pool_connections=max(connections, 2 * len(PARTS)),  # the listing's threads
        ignore_configured_endpoint_urls=True,
        s3={"addressing_style": "path" if endpoint_url else "auto"},
    )
    try:
        return boto3.Session(botocore_session=session).client(
            "s3", region_name=REGION, endpoint_url=endpoint_url, config=config
        )
    except ValueError as error:
        raise UserError(
            f"--endpoint-url {endpoint_url!r} is not an address; give one such as 'https://host:port'."
        ) from error


@contextmanager
def stoppable_pool(workers: int) -> Iterator[tuple[ThreadPoolExecutor, threading.Event]]:
    """A thread pool and the event that tells its workers to stop, set when the block is left."""
    pool, stop = ThreadPoolExecutor(workers), threading.Event()
    try:
        yield pool, stop
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def throttled(seconds: float) -> Callable[[str], None]:
    """A thread-safe function that prints a line to stderr, at most one every `seconds`."""
    lock, next_at = threading.Lock(), 0.0

    def say(line: str) -> None:
        nonlocal next_at
        with lock:
            if (now := time.monotonic()) >= next_at:
                next_at = now + seconds
                tqdm.write(line, file=sys.stderr)

    return say


def persist(
    call: Callable[[], T], retries: int, stop: threading.Event, say: Callable[[str], None]
) -> T:
    """Return `call()`; after a transient error retry with a growing, random delay."""
    for attempt in range(retries + 1):
        if stop.is_set():
            raise StoppedError
        try:
            return call()
        except TRANSIENT as error:
            if attempt == retries or _status(error) in HOPELESS:
                raise
            delay = random.uniform(0.5, 1.0) * min(BACKOFF_CAP_S, BACKOFF_S * 2**attempt)
            say(f"{reason(error)}; trying again in {delay:.0f} s")
        stop.wait(delay)
    raise AssertionError("unreachable")


def _status(error: Exception) -> int | None:
    if not isinstance(error, ClientError):
        return None
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")


def reason(error: Exception) -> str:
    """One short line about an error, escaped, because the server chooses part of its text."""
    text = str(error) if isinstance(error, DamagedError) else f"{type(error).__name__}: {error}"
    return ascii(text)[1:-1][:200]


def list_scenes(client: Any, splits: Iterable[str], retries: int) -> Listing:
    """List every complete scene of `splits`, in key order.

    Raises:
        UserError: The bucket does not answer or refuses to be listed.
    """
    folders = [(split, part) for split in splits for part in PARTS]
    say = throttled(SAY_EVERY_S)
    with stoppable_pool(len(folders)) as (pool, stop):
        futures = [pool.submit(_list_folder, client, *f, retries, stop, say) for f in folders]
        try:
            listed = [future.result() for future in futures]
        except TRANSIENT as error:
            raise UserError(
                f"cannot list s3://{BUCKET}/{PREFIX}/ at {client.meta.endpoint_url!r} "
                f"({reason(error)}): check the network, or name a mirror with --endpoint-url."
            ) from error

    by_scene: dict[tuple[str, str], dict[str, RemoteFile]] = defaultdict(dict)
    refused = []
    for (split, part), (files, bad_keys) in zip(folders, listed, strict=True):
        refused += bad_keys
        for stem, file in files.items():
            by_scene[split, stem][part] = file
    scenes, incomplete = [], {}
    for (split, stem), parts in sorted(by_scene.items()):
        if missing := [part for part in PARTS if part not in parts]:
            incomplete[f"{split}/{stem}"] = missing
        else:
            scenes.append(Scene(split, stem, tuple(parts[part] for part in PARTS)))
    return Listing(scenes, incomplete, refused)


def _list_folder(
    client: Any,
    split: str,
    part: str,
    retries: int,
    stop: threading.Event,
    say: Callable[[str], None],
) -> tuple[dict[str, RemoteFile], list[str]]:
    folder, ending = f"{PREFIX}/{split}/{part}/", PARTS[part]
    files: dict[str, RemoteFile] = {}
    refused: list[str] = []
    page: dict[str, str] = {}
    while True:
        answer = persist(
            lambda page=page: _list_page(client, folder, page),  # type: ignore[misc]
            retries,
            stop,
            say,
        )
        for item in answer.get("Contents", ()):
            key, size = item["Key"], item.get("Size", 0)
            stem = key[len(folder) : -len(ending)]
            fits = key == folder + stem + ending and STEM.fullmatch(stem)
            if fits and 0 <= size <= MAX_BYTES:
                etag = re.sub(r"[^0-9a-z-]", "", item.get("ETag", ""))
                path = f"{split}/{part}/{stem}{ending}"
                files[stem] = RemoteFile(key, path, size, etag)
            elif key != folder:  # S3's console makes a folder by an empty object
                refused.append(key)
        if len(files) + len(refused) > MAX_KEYS:
            raise UserError(
                f"{client.meta.endpoint_url!r} lists more than {MAX_KEYS:,} keys in {folder!r}, "
                "far more than RarePlanes has: check --endpoint-url."
            )
        token = answer.get("NextContinuationToken")
        if not token or token == page.get("ContinuationToken"):
            return files, refused
        page = {"ContinuationToken": token}


def _list_page(client: Any, folder: str, page: dict[str, str]) -> Any:
    try:
        return client.list_objects_v2(Bucket=BUCKET, Prefix=folder, **page)
    except (ValueError, KeyError) as error:  # from boto: an invalid size, or a missing key
        raise DamagedError(f"a listing that cannot be read: {error}") from None


def choose(scenes: list[Scene], limit: int | None, seed: int) -> list[Scene]:
    """The first `limit` scenes of an order that takes one scene of each airport in turn.

    The order depends on the seed and the names alone, so a larger limit only adds scenes.
    """

    def shuffled(name: str) -> bytes:
        return hashlib.sha256(f"{seed}/{name}".encode()).digest()

    airports: dict[str, list[Scene]] = defaultdict(list)
    for scene in sorted(scenes, key=lambda scene: shuffled(scene.stem)):
        airports[scene.airport].append(scene)
    turns = zip_longest(*(airports[name] for name in sorted(airports, key=shuffled)))
    return [scene for turn in turns for scene in turn if scene is not None][:limit]
