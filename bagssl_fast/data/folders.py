"""Folders and lists of image files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bagssl_fast._extension import _C
from bagssl_fast.data.source import (
    NameTable,
    Source,
    check_labels,
    fingerprint_of,
    is_image_name,
    label_by_text,
    probe_files,
)
from bagssl_fast.locate import KINDS


def open_folder(root: Path, on_error: str, labeled: bool = True) -> Source:
    """A folder tree of image files, sorted by name; class = the name of the file's folder."""
    # Bytes, because names need not be valid in any encoding.
    base = os.fsencode(root)
    names: list[bytes] = []
    parents: list[bytes | None] = []
    visited: set[bytes] = set()  # links may lead back to a folder above them
    for folder, subfolders, files in os.walk(base, onerror=_raise, followlinks=True):
        if os.path.realpath(folder) in visited:
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(b"."))
        parent = None if folder == base else os.path.basename(folder)
        for name in sorted(files):
            if is_image_name(name):
                names.append(os.path.relpath(os.path.join(folder, name), base))
                parents.append(parent)
    if not names:
        raise ValueError(f"{root}: the folder has no image files; give {KINDS}")

    labels, classes = label_by_text(parents if labeled else [None] * len(names))
    table = NameTable.of(names, prefix=f"{root}{os.sep}")
    kept = check_labels(labels, table, on_error)
    if len(kept) < len(names):
        names = [names[i] for i in kept]
        labels = labels[kept]
        table = NameTable.of(names, prefix=f"{root}{os.sep}")
    paths = [os.path.join(base, name) for name in names]
    native = _C.FileSource(paths)
    mark = fingerprint_of(table.blob, table.ends, probe_files(paths))
    return Source(native, table, labels if classes else None, classes or None, mark)


def open_files(paths: Sequence[str | os.PathLike[str]]) -> Source:
    """Image files in the order given, without labels.

    Raises:
        FileNotFoundError: For the first that does not exist.
    """
    names = [os.fsencode(path) for path in paths]
    for name in names:
        if not os.path.isfile(name):
            raise FileNotFoundError(f"{os.fsdecode(name)}: there is no such image file")
    table = NameTable.of(names)
    mark = fingerprint_of(table.blob, table.ends, probe_files(names))
    return Source(_C.FileSource(names), table, None, None, mark)


def _raise(error: OSError) -> None:
    raise error
