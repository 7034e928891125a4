"""Writes files completely or not at all, and reads untrusted files."""

import errno
import fcntl
import json
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from common.cli import UserError

TEMPORARY = re.compile(r"\..+\.(\d{1,9})\.tmp")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that gets its name when the block succeeds, and is removed when it fails."""
    temporary = temporary_name(path)
    try:
        with fresh_file(temporary) as file:
            yield file
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # a full disk gives no name
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextmanager
def locked(folder: Path, path: Path) -> Iterator[None]:
    """Be the only run that writes into `folder`, by a lock on the file `path`, which is made.

    The lock ends with the process, even a killed one. On a file system without locks, such as NFS
    without lockd or Lustre without `-o flock`, a line says so and nothing is locked.

    Raises:
        UserError: Another process holds the lock, or it cannot be taken.
    """
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{str(folder)!r} is in use by another run ({file.read(200).strip()!r}); wait "
                "until it ends or choose another output folder."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(f"cannot lock {str(path)!r}: {error.strerror}.") from None
            print(f"no locks in {str(folder)!r} ({error.strerror}): start no second run there.")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a file that is either complete or absent, even if the process is killed."""
    with whole_file(path) as file:
        file.write(data)


def temporary_name(path: Path) -> Path:
    """Where this process writes the file that will become `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def fresh_file(path: Path) -> BinaryIO:
    """Open `path` for writing as a new file; a file or a link that is there is removed first."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def sweep(folder: Path) -> None:
    """Remove the temporary files of processes that were killed."""
    for path in folder.glob(".*.tmp"):
        match = TEMPORARY.fullmatch(path.name)
        if match and not _is_running(int(match[1])):
            path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():  # in a container every run may have this id; we have no file yet
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def open_file(path: Path, kind: str = "file", limit: int = 1 << 31) -> BinaryIO:
    """Open an untrusted file; `kind` is what an error message calls it.

    Raises:
        UserError: It is missing, cannot be opened, is larger than `limit` bytes, or is not a
            regular file: reading a pipe or a device might never end.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise UserError(f"there is no {kind} {str(path)!r}.") from None
    except OSError as error:
        raise UserError(f"cannot read the {kind} {str(path)!r}: {error.strerror}.") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        problem = "not a regular file"
    elif status.st_size > limit:
        problem = f"larger than {limit >> 20} MiB, the most that is read"
    else:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise UserError(f"the {kind} {str(path)!r} is {problem}.")


def read_file(path: Path, kind: str = "file", limit: int = 1 << 31) -> bytes:
    """The content of a file, under the conditions of `open_file`."""
    with open_file(path, kind, limit) as file:
        try:
            return file.read()
        except OSError as error:  # a dying disk, a lost network folder
            raise UserError(f"cannot read the {kind} {str(path)!r}: {error.strerror}.") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: It cannot be read, is larger than 2 GiB, or is not JSON.
    """
    data = read_file(path)  # in memory it takes several times its size
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise UserError(f"{str(path)!r} is not JSON, or is cut short; write it again.") from None
