"""Checkpoint files: plain values, written completely or not at all, and checked on reading.

A file is a zip archive of uncompressed members around a pickle, and it is untrusted input. Nothing
is unpacked before the sizes in its table of contents add up. torch loads tensors and plain values
only, and runs no code. Nothing is used before the checksum is right. A file that somebody made on
purpose, with a right checksum, can still cost memory and time.
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
from common.io.files import whole_file

ROOT = Path(__file__).resolve().parents[2]
FORMATS = (1, 2)
MAX_CLASSES = 255  # in a uint8 mask
# What every checkpoint has, and its type.
FORM = {"model_name": str, "classes": list, "args": dict, "model": dict}
OPTIONAL = ("settings", "ema")  # dicts that earlier checkpoints do not have


def write(
    content: dict[str, Any], path: Path, previous: Path | None = None, also: Path | None = None
) -> None:
    """Write `path`; at every moment it, or else `previous`, can be loaded.

    Args:
        content: Tensors, dicts, lists, strings, numbers, None; its checksum is added.
        previous: Gets the old content of `path`.
        also: A second file with the same content, written first.

    Raises:
        UserError: The disk is full.
    """
    content = sealed(content)
    for target in (also, path) if also else (path,):
        try:
            with whole_file(target) as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
                if previous and target == path and path.exists():
                    _keep(path, previous)
        except RuntimeError as error:
            # When the disk is full, torch.save says "unexpected pos" and does not mention the disk.
            raise UserError(
                f"{str(target)!r} could not be written ({str(error).splitlines()[0]}): is the disk "
                "full? The previous checkpoint is untouched."
            ) from error
        _flush(target.parent)


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """`content` with its checksum."""
    return content | {"sha256": digest(content)}


def _keep(path: Path, previous: Path) -> None:
    """Give the file `path` the name `previous`, too."""
    previous.unlink(missing_ok=True)
    try:
        previous.hardlink_to(path)
    except OSError:  # no hard links here: for a moment only `previous` exists
        path.replace(previous)


def _flush(folder: Path) -> None:
    """Flush a rename to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> dict[str, Any]:
    """Read what `write` wrote, onto the CPU.

    Raises:
        UserError: Missing, damaged or not written by `write`. No code in the file has been run.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {str(path)!r}; a training run writes one.")
    _inspect(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an odd pickle; a bad one is refused below
            # Explicit: TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD in the environment must not undo it.
            content = torch.load(path, map_location="cpu", weights_only=True)
        version = content.get("format") if isinstance(content, dict) else None
        if type(version) is not int or version not in FORMATS:  # `in` fails for a tensor
            raise UserError(f"{str(path)!r} was not written by this repository's train.py.")
        stored = content.pop("sha256", None)
        changed = stored != digest(content)
    except UserError:
        raise
    except Exception as error:  # torch's errors range from EOFError to KeyError(1785425525)
        raise _damaged(path, type(error).__name__) from error
    if changed:
        raise UserError(
            f"{str(path)!r} has changed since it was written (its checksum is wrong); use another "
            "copy."
        )
    wrong = [key for key, kind in FORM.items() if not isinstance(content.get(key), kind)]
    wrong += [key for key in OPTIONAL if not isinstance(content.get(key, {}), dict)]
    names = content.get("classes", [])
    if not wrong and not (len(names) <= MAX_CLASSES and all(isinstance(n, str) for n in names)):
        wrong = ["classes"]
    if wrong:
        raise _damaged(path, f"its {wrong[0]} is missing or invalid")
    return content


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{str(path)!r} is damaged or not a checkpoint of plain tensors ({reason}).")


def _inspect(path: Path) -> None:
    """Refuse an archive that would unpack to more than its size; torch writes none like it."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    # zipfile raises NotImplementedError if the archive names a version that it does not know.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _damaged(path, type(error).__name__) from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise _damaged(path, "it is compressed")
    if sum(member.file_size for member in members) > size:
        raise _damaged(path, "it would unpack to more than its size")


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


def check_model(content: dict[str, Any], path: Path, model_name: str) -> None:
    """Check that `content`, which was read from `path`, is of the right model.

    Raises:
        UserError: It is another model's.
    """
    name = content["model_name"]
    if name == model_name:
        return
    # The name in an untrusted file may be anything.
    known = name.isidentifier() and (ROOT / name / "inference.py").is_file()
    raise UserError(
        f"{str(path)!r} holds a {name} model, and this is {model_name}; use "
        f"`python {name}/inference.py` or `python {name}/train.py` with it."
        if known
        else f"{str(path)!r} holds a model of {name[:40]!r}, and this is {model_name}."
    )
