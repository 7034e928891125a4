"""The public RarePlanes bucket: which scenes it has, and how its files get to this disk."""

import hashlib
import os
import random
import re
import stat
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import botocore.session
import urllib3.exceptions
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from tqdm import tqdm

from common.cli import UserError
from common.io.files import whole_file

BUCKET, REGION = "rareplanes-public", "us-west-2"
PARTS = {"images": ".png", "masks": "_mask.png", "xmls": ".xml"}  # folder: what follows the stem
MAX_BYTES = 1 << 34  # of an object; a rendered image has 3 MB, a real scene some hundred
MAX_KEYS = 1_000_000  # in a folder; there are 45,000 scenes

TIMEOUT_S = 10.0  # to connect, and between two packets
BOTO_ATTEMPTS = 3
BACKOFF_S, BACKOFF_CAP_S = 1.0, 30.0  # between retries: 1, 2, 4, … seconds, up to the cap
FINAL = {403, 404, 412}  # not retried; 412: the object has changed since it was listed

_md5 = partial(hashlib.md5, usedforsecurity=False)


class DamagedError(Exception):
    """The received bytes are not the listed object."""


TRANSIENT = (DamagedError, BotoCoreError, ClientError, urllib3.exceptions.HTTPError)


class Half(NamedTuple):
    """One half of the data set: its folder, its parts as in `PARTS`, and the stems of its scenes.

    A stem becomes a path on this machine: letters, digits, _ and - cannot leave the folder.
    """

    prefix: str
    parts: dict[str, str]
    stem: re.Pattern[str]


AIRPORT = "_Airport_"
RENDERED_STEM = re.compile(rf"(?=.{{1,150}}\Z)[A-Za-z0-9][A-Za-z0-9_-]*{AIRPORT}[A-Za-z0-9_-]+")
RENDERED = Half("synthetic", PARTS, RENDERED_STEM)
REAL_PARTS = {"PS-RGB_cog": ".tif", "geojson_aircraft": ".geojson"}
REAL = Half("real", REAL_PARTS, re.compile(r"[0-9]{1,6}_[0-9A-Za-z-]{1,60}"))  # location, catalogue


@dataclass(frozen=True, slots=True)
class RemoteFile:
    key: str
    path: str  # below the output folder
    size: int
    etag: str  # the MD5 of the content, 32 digits; for an upload in parts something longer
    modified: int  # seconds since 1970; a complete file on this disk has the same time


@dataclass(frozen=True, slots=True)
class RemoteScene:
    split: str
    stem: str
    files: tuple[RemoteFile, ...]  # in the order of the half's parts

    @property
    def location(self) -> str:
        """The name of a rendered scene's airport, the number of a real scene's location."""
        return self.stem.partition(AIRPORT if AIRPORT in self.stem else "_")[0]


def make_client(endpoint_url: str | None, connections: int) -> Any:
    """An S3 client that neither reads nor sends credentials; safe to share between threads.

    AWS_PROFILE and ~/.aws are hidden from it: a profile meant for another account, or one that
    does not exist, must not decide whether public data can be fetched.
    """
    unset, no_file = (None, None, None, None), (None, None, os.devnull, None)
    session = botocore.session.Session(
        session_vars={"profile": unset, "config_file": no_file, "credentials_file": no_file}
    )
    config = Config(
        signature_version=UNSIGNED,
        retries={"mode": "standard", "total_max_attempts": BOTO_ATTEMPTS},
        connect_timeout=TIMEOUT_S,
        read_timeout=TIMEOUT_S,
        max_pool_connections=connections,
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


class Bucket:
    """The bucket and the threads that read it; they stop when the `with` block is left."""

    def __init__(self, endpoint_url: str | None, workers: int, retries: int) -> None:
        self.client = make_client(endpoint_url, workers)
        self.retries = retries
        self.pool = ThreadPoolExecutor(workers)
        self.stop = threading.Event()
        self.printed: set[type] = set()  # types of errors

    def __enter__(self) -> "Bucket":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.pool.shutdown(cancel_futures=True)

    def persist(self, call: Callable[..., Any], *args: object) -> Any:
        """Return `call(*args)`; after an error that may pass, retry with a growing, random delay.

        boto3's own retries are for short faults: they end within seconds if the network is down,
        and do not include a body that breaks off. The first error of each type is printed.
        """
        for attempt in range(self.retries + 1):
            try:
                return call(*args)
            except TRANSIENT as error:
                if attempt == self.retries or _status(error) in FINAL:
                    raise
                if type(error) not in self.printed:
                    self.printed.add(type(error))
                    tqdm.write(f"{reason(error)}; trying again", file=sys.stderr)
            delay = random.uniform(0.5, 1.0) * min(BACKOFF_CAP_S, BACKOFF_S * 2**attempt)
            if self.stop.wait(delay):
                break
        raise CancelledError

    def list_scenes(
        self, splits: Iterable[str], half: Half = RENDERED
    ) -> tuple[list[RemoteScene], list[str]]:
        """The complete scenes of `splits`, and what else is there: incomplete scenes, other keys.

        Raises:
            UserError: The bucket does not answer, refuses to be listed, or is not RarePlanes'.
        """
        folders = [(split, part) for split in splits for part in half.parts]
        jobs = [self.pool.submit(self.persist, self._list_folder, half, *f) for f in folders]
        try:
            listed = [job.result() for job in jobs]
        except (*TRANSIENT, ValueError, KeyError) as error:  # boto3: an invalid size, a missing key
            raise UserError(
                f"cannot list s3://{BUCKET}/{half.prefix}/ at {self.client.meta.endpoint_url!r} "
                f"({reason(error)}): check the network, or name a mirror with --endpoint-url."
            ) from error
        by_scene: dict[tuple[str, str], dict[str, RemoteFile]] = defaultdict(dict)
        for (split, part), (files, _) in zip(folders, listed, strict=True):
            for stem, file in files.items():
                by_scene[split, stem][part] = file
        scenes, others = [], []
        for (split, stem), parts in sorted(by_scene.items()):
            if missing := [part for part in half.parts if part not in parts]:
                others.append(f"{split}/{stem} (without {', '.join(missing)})")
            else:
                scenes.append(RemoteScene(split, stem, tuple(parts[p] for p in half.parts)))
        return scenes, others + [ascii(key) for _, keys in listed for key in keys]

    def _list_folder(
        self, half: Half, split: str, part: str
    ) -> tuple[dict[str, RemoteFile], list[str]]:
        folder, ending = f"{half.prefix}/{split}/{part}/", half.parts[part]
        files: dict[str, RemoteFile] = {}
        other_keys: list[str] = []
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=folder)
        for item in (item for page in pages for item in page.get("Contents", ())):
            key, size = item["Key"], item.get("Size", 0)
            stem = key[len(folder) : -len(ending)]
            fits = key == folder + stem + ending and half.stem.fullmatch(stem)
            if fits and 0 <= size <= MAX_BYTES:
                etag = re.sub(r"[^0-9a-z-]", "", item.get("ETag", ""))
                modified = int(item["LastModified"].timestamp())
                path = key.removeprefix("synthetic/")
                files[stem] = RemoteFile(key, path, size, etag, modified)
            elif key != folder:  # S3's console makes a folder by an empty object
                other_keys.append(key)
            if len(files) + len(other_keys) > MAX_KEYS:
                raise ValueError(f"more than {MAX_KEYS:,} keys in {folder!r}")
        return files, other_keys

    def fetch(self, root: Path, file: RemoteFile, verify: bool) -> bool:
        """Download a file, unless it is there; returns whether it was downloaded.

        A file with the size and the time of the listed object is not read unless `verify` is set.
        Any other file of that size is read, and kept if its MD5 is the object's. The MD5 of an
        object that was uploaded in parts is not known, so such a file is downloaded again.
        """
        if status := look_up(root, file):
            if not verify and status.st_mtime == file.modified:
                return False
            with (root / file.path).open("rb") as content:
                md5 = hashlib.file_digest(content, _md5).hexdigest()
            unchanged = md5 == file.etag
            # Else the present time: if the download fails, the next run must not trust the file.
            times = (file.modified, file.modified) if unchanged else None
            with suppress(PermissionError):  # another user's file; the next run reads it again
                os.utime(root / file.path, times)
            if unchanged:
                return False
        self.persist(self._receive, root, file)
        return True

    def _receive(self, root: Path, file: RemoteFile) -> None:
        """Download one object, check it, and give the file the object's time.

        boto3 compares a body with its length, and with the checksum that comes with it, if any.
        For boto3's transfers in ranges S3 sends no checksum, so this is one request.
        """
        md5, if_match = _md5(), f'"{file.etag}"' if file.etag else "*"
        answer = self.client.get_object(Bucket=BUCKET, Key=file.key, IfMatch=if_match)
        with closing(answer["Body"]) as body, whole_file(root / file.path) as out:
            if (length := answer.get("ContentLength")) != file.size:
                raise DamagedError(f"{length} bytes instead of {file.size}")
            for chunk in body.iter_chunks(1 << 18):
                if self.stop.is_set():
                    raise CancelledError
                md5.update(chunk)
                out.write(chunk)
            if len(file.etag) == 32 and md5.hexdigest() != file.etag:
                raise DamagedError(f"MD5 {md5.hexdigest()} instead of {file.etag}")
            out.flush()
            os.utime(out.fileno(), (file.modified, file.modified))


def _status(error: Exception) -> int | None:
    metadata = error.response["ResponseMetadata"] if isinstance(error, ClientError) else {}
    return metadata.get("HTTPStatusCode")


def reason(error: Exception) -> str:
    """One short line about an error, escaped, because the server chooses part of its text."""
    return ascii(f"{type(error).__name__}: {error}")[1:-1][:200]


def look_up(root: Path, file: RemoteFile) -> os.stat_result | None:
    """The status of an existing file of the listed size."""
    try:
        status = (root / file.path).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status if stat.S_ISREG(status.st_mode) and status.st_size == file.size else None
