"""A run directory: made, claimed by one process, made again where it was deleted."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import socket
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import IO

from bagssl_fast.files import remove_leftovers, write_atomic
from bagssl_fast.locate import LOCK, check_run_dir
from bagssl_fast.terminal import say

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunDirectory:
    """A run directory that no other process trains in until `close`.

    The lock is the kernel's: it ends with the process, however that ends.

    Args:
        path: The directory, which exists.

    Raises:
        ValueError: If another process trains there, naming it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, bytes] = {}
        self.lock = _claim(path)

    def write(self, files: Mapping[str, bytes]) -> None:
        """Writes small files that belong to the directory as long as it is in use."""
        self.files |= files
        for name, content in files.items():
            write_atomic(self.path / name, content)

    def ensure(self) -> None:
        """Makes the directory again if it was deleted or moved.

        Raises:
            ValueError: If another process has taken its place.
            OSError: If it cannot be made.
        """
        try:
            found = os.stat(self.path / LOCK)
            if os.path.samestat(found, os.fstat(self.lock.fileno())):
                return
        except FileNotFoundError:
            pass
        self.path.mkdir(parents=True, exist_ok=True)
        lock = _claim(self.path)
        self.lock.close()
        self.lock = lock
        if any(not (self.path / name).is_file() for name in self.files):
            say(
                f"warning  {self.path} was deleted or moved: it is made again, without the earlier "
                "checkpoints and lines of metrics.jsonl"
            )
            self.write(self.files)

    def close(self) -> None:
        """Lets other processes train here."""
        if not self.lock.closed:
            path = self.path / LOCK
            if path.exists() and os.path.samestat(path.stat(), os.fstat(self.lock.fileno())):
                path.unlink()  # while it is held: whoever opened it meanwhile looks again
            self.lock.close()


def open_run_dir(path: Path, resume: str, overwrite: bool) -> None:
    """Makes the run directory, emptied under `overwrite`.

    Raises:
        ValueError: If it holds what nobody asked to touch.
    """
    check_run_dir(path, resume, overwrite)
    path.mkdir(parents=True, exist_ok=True)
    if overwrite and resume == "never":
        for child in path.iterdir():
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            elif child.name != LOCK:
                child.unlink()
    for folder in (path, *(child for child in path.iterdir() if child.is_dir())):
        remove_leftovers(folder)


def claim_run_dir(path: Path, resume: str, overwrite: bool) -> RunDirectory:
    """As `open_run_dir`, for this process alone.

    Raises:
        ValueError: If it holds what nobody asked to touch, or another process trains there.
    """
    check_run_dir(path, resume, overwrite)
    path.mkdir(parents=True, exist_ok=True)
    directory = RunDirectory(path)
    try:
        open_run_dir(path, resume, overwrite)
    except BaseException:
        directory.close()
        raise
    return directory


def make_fresh(path: Path) -> Path:
    """Makes a directory of this name, or of the name and the first free number from 2."""
    for number in itertools.count(1):
        fresh = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            fresh.mkdir(parents=True)
        except FileExistsError:
            continue
        return fresh
    raise AssertionError


def _claim(path: Path) -> IO[str]:
    """The locked file of a directory."""
    while True:
        file = open(path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            if error.errno in (errno.EAGAIN, errno.EACCES):
                file.close()
                raise ValueError(
                    f"--run_dir {path} is in use by {holder}: wait until it ends, stop it, or name "
                    "another directory"
                ) from None
            if error.errno not in NO_LOCKS:
                file.close()
                raise
            say(f"warning  {path} is on a file system without locks: start no second run in it")
        # Whoever held the lock may have deleted the file since it was opened here.
        try:
            if os.path.samestat(os.stat(path / LOCK), os.fstat(file.fileno())):
                break
        except FileNotFoundError:
            pass
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%F %T}\n")
    file.flush()
    return file
