"""Tar shards: indexed once, then mapped into memory for random access."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bagssl_fast._extension import _C
from bagssl_fast.data.source import (
    PROBE_BYTES,
    PROBES,
    NameTable,
    Source,
    check_class_count,
    check_labels,
    fingerprint_of,
    is_image_name,
    label_by_text,
)

_FORMAT = 1  # of a cached index; a new number makes old files unused
_CLASS_SUFFIX = b".cls"
_ARRAYS = ("names", "name_ends", "offsets", "sizes", "labels", "meta")  # of a cached index


@dataclass
class ShardIndex:
    """The images of one tar.

    Attributes:
        names: The names of their members.
        offsets: Where their contents begin in the file, int64 [N].
        sizes: Their sizes in bytes, int64 [N].
        labels: Index into `classes`, -1 for none, int64 [N].
        classes: Class names; the text of `.cls` members, else the members' folders.
        numbered: Whether the classes come from `.cls` members and are all integers.
    """

    names: NameTable
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]
    classes: list[str]
    numbered: bool


class ShardNames:
    """Names over several shards, as `shard/member`."""

    def __init__(self, paths: Sequence[Path], tables: Sequence[NameTable]) -> None:
        self.paths, self.tables = paths, tables
        self.ends = np.cumsum([len(table) for table in tables])

    def __getitem__(self, index: int) -> str:
        shard = int(np.searchsorted(self.ends, index, side="right"))
        begin = int(self.ends[shard - 1]) if shard else 0
        return f"{self.paths[shard]}/{self.tables[shard][index - begin]}"


class _Subset:
    """Names of some of the images."""

    def __init__(self, names: ShardNames, kept: NDArray[np.int64]) -> None:
        self.names, self.kept = names, kept

    def __getitem__(self, index: int) -> str:
        return self.names[int(self.kept[index])]


def open_tars(paths: Sequence[Path], on_error: str, labeled: bool = True) -> Source:
    """Opens tar shards as one source, in the order given."""
    if not paths:
        raise ValueError("empty list of tar files: give at least one")
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
    indices = [_indexed(path, on_error) for path in paths]
    counts = [len(index.names) for index in indices]
    if sum(counts) == 0:
        raise ValueError(f"{paths[0]}: the tar has no image files")

    if labeled:
        labels, classes = _merge_classes(indices)
    else:
        labels, classes = np.full(sum(counts), -1, np.int64), []
    names = ShardNames(paths, [index.names for index in indices])
    kept = check_labels(labels, names, on_error)
    shard = np.repeat(np.arange(len(paths), dtype=np.int32), counts)
    offsets = np.concatenate([index.offsets for index in indices])
    sizes = np.concatenate([index.sizes for index in indices])
    native = _C.ShardSource(
        [os.fsencode(path) for path in paths], shard[kept], offsets[kept], sizes[kept]
    )
    parts = [part for index in indices for part in (index.names.blob, index.sizes)]
    probe = probe_members(paths, shard, offsets, sizes)
    mark = fingerprint_of(*parts, probe, kept if len(kept) < len(labels) else b"")
    all_kept = len(kept) == len(labels)
    return Source(
        native,
        names if all_kept else _Subset(names, kept),
        labels[kept] if classes else None,
        classes or None,
        mark,
    )


def probe_members(
    paths: Sequence[Path],
    shard: NDArray[np.int32],
    offsets: NDArray[np.int64],
    sizes: NDArray[np.int64],
) -> bytes:
    """As `source.probe_files`, of members of tars; their sizes are in the index."""
    parts = []
    for i in range(0, len(shard), -(-len(shard) // PROBES)):
        try:
            with open(paths[shard[i]], "rb") as file:
                file.seek(int(offsets[i]))
                parts.append(file.read(min(int(sizes[i]), PROBE_BYTES)))
        except OSError:
            parts.append(b"unreadable")  # a bad image, which the loader tells
    return fingerprint_of(*parts).encode()


def _merge_classes(indices: Sequence[ShardIndex]) -> tuple[NDArray[np.int64], list[str]]:
    """Labels over all shards. Numbers in `.cls` members are used as labels."""
    texts = sorted({name for index in indices for name in index.classes})
    if texts and all(index.numbered or not index.classes for index in indices):
        last = max(map(int, texts))
        check_class_count(last)
        texts = [str(i) for i in range(last + 1)]
        number = {text: int(text) for index in indices for text in index.classes}
    else:
        number = {text: i for i, text in enumerate(texts)}
    merged = []
    for index in indices:
        # The extra entry at the end is for label -1.
        table = np.array([*(number[name] for name in index.classes), -1], np.int64)
        merged.append(table[index.labels])
    return np.concatenate(merged), texts


def _indexed(path: Path, on_error: str) -> ShardIndex:
    """The index of a tar, from the user's cache or made and cached."""
    cached = _cache_file(path)
    index = load_index(cached, path.stat().st_size)
    if index is not None:
        return index
    try:
        raw = _C.index_tar(os.fsencode(path))
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None
    if raw["damage"]:
        if on_error == "raise" or len(raw["sizes"]) == 0:
            raise ValueError(
                f"{path}: {raw['damage']}. Make the tar again, or use the members before the "
                'damage by on_error="skip"'
            )
        warnings.warn(
            f"{path}: {raw['damage']}; using the {len(raw['sizes'])} members before it",
            stacklevel=2,
        )
    index = _select_images(path, NameTable(raw["names"], raw["name_ends"]), raw)
    if not raw["damage"]:
        save_index(cached, index)
    return index


def _select_images(path: Path, members: NameTable, raw: dict[str, NDArray[np.int64]]) -> ShardIndex:
    """The images among the members, with their classes in either layout."""
    names = [members.raw(i) for i in range(len(members))]
    images = [i for i, name in enumerate(names) if is_image_name(name)]
    class_members = {
        name[: -len(_CLASS_SUFFIX)]: i
        for i, name in enumerate(names)
        if name.endswith(_CLASS_SUFFIX)
    }
    texts: list[bytes | None]
    if class_members:
        contents = np.memmap(path, np.uint8, "r")
        texts = []
        for i in images:
            folder, base = os.path.split(names[i])
            member = class_members.get(os.path.join(folder, base.split(b".")[0]))
            texts.append(None if member is None else _contents(contents, raw, member).strip())
    else:
        folders = [os.path.dirname(names[i]) for i in images]
        texts = [os.path.basename(folder).strip(b".") or None for folder in folders]
    labels, classes = label_by_text(texts)
    return ShardIndex(
        names=NameTable.of([names[i] for i in images]),
        offsets=raw["offsets"][images],
        sizes=raw["sizes"][images],
        labels=labels,
        classes=classes,
        numbered=bool(class_members) and all(_is_number(text) for text in classes),
    )


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= 19  # more digits than any index has


def _contents(file: NDArray[np.uint8], raw: dict[str, NDArray[np.int64]], member: int) -> bytes:
    begin = int(raw["offsets"][member])
    return file[begin : begin + int(raw["sizes"][member])].tobytes()


def _cache_file(path: Path) -> Path:
    """The cache file of a tar's index; it depends on the tar's path, size and modification time."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    info = path.stat()
    key = f"{_FORMAT}:{path.resolve()}:{info.st_size}:{info.st_mtime_ns}"
    name = hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
    return Path(base) / "bagssl_fast" / "tar-index" / f"{name}.npz"


def load_index(file: Path, shard_size: int) -> ShardIndex | None:
    """A cached index; None if it is missing or anything about it is in doubt."""
    try:
        with np.load(file, allow_pickle=False) as saved:
            if sum(part.file_size for part in saved.zip.infolist()) > file.stat().st_size:
                return None  # compressed, which ours are not: it may grow to any size
            arrays = {name: saved[name] for name in _ARRAYS}
            meta = json.loads(arrays.pop("meta").tobytes())
        blob = arrays.pop("names").tobytes()
        index = ShardIndex(
            names=NameTable(blob, arrays.pop("name_ends")),
            **arrays,
            classes=meta["classes"],
            numbered=meta["numbered"],
        )
        return index if _is_sound(index, shard_size) else None
    except Exception:  # a damaged zip file has many ways to fail; the tar is indexed again
        return None


def _is_sound(index: ShardIndex, shard_size: int) -> bool:
    """Whether an index's parts fit each other and the shard."""
    count, ends = len(index.names), index.names.ends
    columns = (ends, index.offsets, index.sizes, index.labels)
    if not all(c.dtype == np.int64 and c.shape == (count,) for c in columns):
        return False
    classes = index.classes
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return False
    if type(index.numbered) is not bool or (index.numbered and not all(map(_is_number, classes))):
        return False
    if count == 0:
        return True
    return bool(
        ends[0] >= 0
        and (np.diff(ends) >= 0).all()
        and ends[-1] == len(index.names.blob)
        and (index.offsets >= 0).all()
        and (index.sizes >= 0).all()
        and (index.offsets <= shard_size - index.sizes).all()
        and (index.labels >= -1).all()
        and (index.labels < len(classes)).all()
    )


def save_index(file: Path, index: ShardIndex) -> None:
    """Caches an index. Where the cache cannot be written, tars are indexed at every opening."""
    meta = json.dumps({"classes": index.classes, "numbered": index.numbered}).encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        with os.fdopen(handle, "wb") as out:
            np.savez(
                out,
                names=np.frombuffer(index.names.blob, np.uint8),
                name_ends=index.names.ends,
                offsets=index.offsets,
                sizes=index.sizes,
                labels=index.labels,
                meta=np.frombuffer(meta, np.uint8),
            )
        os.replace(temporary, file)
    except OSError:
        pass
