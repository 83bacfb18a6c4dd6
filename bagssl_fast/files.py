"""Files that are written whole or not at all, and that show damage."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

MARK = b"bagssl sha256 "  # a sealed file ends in this and the SHA-256 of what is before it
SEAL_BYTES = len(MARK) + hashlib.sha256().digest_size
_TEMPORARY = re.compile(r"\.(.+)\.\d+\.tmp")
_CHUNK = 1 << 20


class Damaged(ValueError):
    """A sealed file is not as it was written."""


class _Sink:
    """A file that hashes what is written, and keeps the error that a library on top replaces."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            written = self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return written

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            self.error = error
            raise


def write_atomic(
    path: Path, content: bytes | Callable[[Any], object], sealed: bool = False
) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part of it.

    The new content is on the disk before it takes the name, and the name before this returns.

    Args:
        path: The file; its folder is made if need be.
        content: The bytes, or a function that writes them, in order, to an object with `write`.
        sealed: Append a checksum, which `check_seal` reads.

    Raises:
        OSError: Naming the file, if it cannot be written; the old content is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            sink = _Sink(file)
            try:
                sink.write(content) if isinstance(content, bytes) else content(sink)
            except Exception:
                if sink.error is not None:
                    raise sink.error from None
                raise
            if sealed:
                file.write(MARK + sink.digest.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = os.fspath(path), None
        raise


def sync_folder(folder: Path) -> None:
    """Puts a folder's names on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that cannot do this for a folder
            raise
    finally:
        os.close(handle)


def check_seal(path: Path) -> str:
    """Compares a sealed file with its checksum, and returns that.

    Raises:
        FileNotFoundError: If there is no such file.
        Damaged: If it is torn, changed, or was never sealed.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - SEAL_BYTES
        while left > 0 and (chunk := file.read(min(_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
        seal = file.read()
    if not seal.startswith(MARK) or len(seal) != SEAL_BYTES:
        raise Damaged(f"{path} is cut off: its checksum is missing")
    if seal[len(MARK) :] != digest.digest():
        raise Damaged(f"{path} is damaged: its content does not match its checksum")
    return digest.hexdigest()


def is_leftover(name: str) -> bool:
    """Whether a name is that of a file that `write_atomic` had not finished."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes had not finished writing; none may be writing there now."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_leftover(path.name):
            path.unlink(missing_ok=True)
