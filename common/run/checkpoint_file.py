"""A checkpoint's file: plain values, written whole or not at all, and believed only when it is so.

A file is input like any other. It is a zip archive of stored members around a pickle, and may come
from a stranger: nothing in it is unpacked before its table of contents adds up, nothing is looked
at before all of it has been found to be plain, and nothing is used before its checksum holds.
"""

import hashlib
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.cli import UserError
from common.io.files import temporary_name, whole_file

FORMATS = (1, 2)
# A ResNet-101's checkpoint has some 2 000 values; what has more than these nests without end.
MAX_VALUES, MAX_DEPTH = 1_000_000, 20
MAX_CLASSES = 255  # of a uint8 mask
# What every checkpoint has, and of which type.
FORM = {"model_name": str, "classes": list, "args": dict, "model": dict}


def write(content: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Write beside `path`, flush to the disk, rename: whatever happens, `path` stays loadable.

    Args:
        content: Tensors, dicts, lists, strings, numbers, None; its checksum is added.
        previous: Takes over what `path` was.

    Raises:
        UserError: The disk is full.
    """
    content = content | {"sha256": digest(content)}
    held = temporary_name(previous) if previous else None
    try:
        with whole_file(path) as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
            if held and path.exists():
                _hold(path, held)
        if previous and held and held.exists():
            held.replace(previous)
        _flush(path.parent)
    except RuntimeError as error:
        # torch.save says "unexpected pos" when the disk is full, and nothing of the disk.
        raise UserError(
            f"'{path}' could not be written ({str(error).splitlines()[0]}): is the disk full? "
            "The previous checkpoint is untouched."
        ) from error
    finally:
        if held:
            held.unlink(missing_ok=True)


def _hold(path: Path, held: Path) -> None:
    """A second name for the file, so that there is a `path` at every moment."""
    try:
        held.hardlink_to(path)
    except OSError:  # a file system without hard links: for a moment there is only the previous
        path.replace(held)


def _flush(folder: Path) -> None:
    """Have the disk know of a renaming."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote, on the CPU.

    Raises:
        UserError: Missing, damaged or not written by `write`. Nothing in the file has been run.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {str(path)!r}; a training run writes one.")
    _inspect(path)
    try:
        # Explicit: TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD in the environment must not undo it.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an odd pickle: it is refused below, or it is sound
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # its errors range from EOFError to KeyError(1785425525)
        raise _damaged(path, type(error).__name__) from error
    _check_plain(content, path, path.stat().st_size)
    found = content.get("format") if isinstance(content, dict) else None
    if type(found) is not int or found not in FORMATS:  # a tensor is neither in nor not
        raise UserError(f"{str(path)!r} was not written by this repository's train.py.")
    stored = content.pop("sha256", None)
    if stored != digest(content):
        raise UserError(
            f"{str(path)!r} has changed since it was written (its checksum is wrong); take another "
            "copy."
        )
    wrong = [key for key, kind in FORM.items() if not isinstance(content.get(key), kind)]
    names = content.get("classes", [])
    if not wrong and not (len(names) <= MAX_CLASSES and all(isinstance(n, str) for n in names)):
        wrong = ["classes"]
    if wrong:
        raise _damaged(path, f"its {wrong[0]} is missing or of another kind")
    return content


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{str(path)!r} is damaged or no checkpoint of plain tensors ({reason}).")


def _inspect(path: Path) -> None:
    """Refuse an archive that would unpack to more than itself, unlike any that torch writes."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _damaged(path, type(error).__name__) from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise _damaged(path, "it is compressed")
    if sum(member.file_size for member in members) > size:
        raise _damaged(path, "it would unpack to more than its size")


def _check_plain(content: Any, path: Path, size: int) -> None:
    """Refuse what could not have been saved: other types, endless nesting, tensors out of nothing.

    A tensor of stride 0 has any shape and no memory; a list may hold itself, or the same list ten
    times, ten levels deep. Neither survives the checksum's walk over all values.
    """
    bytes_left, values_left = size, MAX_VALUES
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        following: list[Any] = []
        values_left -= len(level)
        for value in level:
            if isinstance(value, Tensor):
                if (
                    value.layout != torch.strided
                    or value.device.type != "cpu"
                    or value.is_quantized
                ):
                    raise _damaged(path, "a tensor that is not dense")
                bytes_left -= value.numel() * value.element_size()
            elif isinstance(value, dict | list | tuple):
                values_left -= len(value)
                if values_left >= 0:
                    following += value.values() if isinstance(value, dict) else value
                if isinstance(value, dict) and not all(isinstance(k, str | int) for k in value):
                    raise _damaged(path, "a key that is no name")
            elif not isinstance(value, str | int | float | None):
                raise _damaged(path, f"a value of type {type(value).__name__}")
        if bytes_left < 0 or values_left < 0:
            raise _damaged(path, "more values than bytes")
        if not following:
            return
        level = following
    raise _damaged(path, "nested too deeply")


def digest(content: Any) -> str:
    """SHA-256 over all keys, numbers and tensor bytes (0.5 s per 400 MB)."""
    sha = hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            sha.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            sha.update(plain.flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            for key, item in value.items():
                sha.update(f"{key!r}:".encode())
                walk(item)
        elif isinstance(value, list | tuple):
            sha.update(f"[{len(value)}".encode())
            for item in value:
                walk(item)
        else:
            sha.update(repr(value).encode())

    walk(content)
    return sha.hexdigest()
