"""What is fuzzed: each target reads bytes as one of our readers does.

A reader may refuse them by the errors that it documents. Anything else that it raises, a result
that contradicts itself, a crash and a hang are findings.
"""

from __future__ import annotations

import io
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import NamedTuple

import corpus
import numpy as np

from bagssl_fast import _C
from bagssl_fast.data import cifar, open_source
from bagssl_fast.data.decoding import decode_image
from bagssl_fast.data.tars import load_index

MAX_PIXELS = 1 << 20
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
_folder = Path(tempfile.mkdtemp(prefix="bagssl_fuzz_", dir=_MEMORY))


class Target(NamedTuple):
    """`run` reads the bytes; `repair` makes mutated ones valid again on the outside."""

    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes], None]
    repair: Callable[[bytes, Random], bytes] | None = None


def _file(name: str, data: bytes) -> Path:
    path = _folder / name
    path.write_bytes(data)
    return path


def tar_index(data: bytes) -> None:
    path = _file("set.tar", data)
    try:
        found = _C.index_tar(os.fsencode(path))
    except RuntimeError:
        return
    ends, offsets, sizes = (found[key] for key in ("name_ends", "offsets", "sizes"))
    assert len(ends) == len(offsets) == len(sizes)
    assert (np.diff(ends, prepend=0) >= 0).all() and (ends[-1:] == len(found["names"])).all()
    assert (offsets >= 0).all() and (sizes >= 0).all() and (offsets <= len(data) - sizes).all()


def repair_tar(data: bytes, random: Random) -> bytes:
    """New checksums for the headers, in half of the cases."""
    if random.random() < 0.5:
        return data
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            out[at + 148 : at + 156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


def index_cache(data: bytes) -> None:
    path = _file("index.npz", data)
    size = 3000
    index = load_index(path, size)
    if index is None:
        return
    for i in range(len(index.names)):
        assert isinstance(index.names[i], str)
        assert 0 <= index.offsets[i] <= size - index.sizes[i]
        assert index.labels[i] < len(index.classes)


def repair_zip(data: bytes, random: Random) -> bytes:
    """The same members, one of them mutated inside a valid archive, in half of the cases."""
    if random.random() < 0.5:
        return data
    try:
        with zipfile.ZipFile(io.BytesIO(random.choice(_archives()))) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
    except Exception:
        return data
    name = random.choice(list(members))
    member = bytearray(members[name])
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(member))
        part = random.choice((bytes([random.randrange(256)]), struct.pack("<q", -1), data[:8]))
        member[at : at + len(part)] = part
    members[name] = bytes(member)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for key, value in members.items():
            archive.writestr(key, value)
    return out.getvalue()


_zips: list[bytes] = []


def _archives() -> list[bytes]:
    if not _zips:
        _zips.extend(data for data in corpus.indices() + corpus.arrays() if data[:2] == b"PK")
    return _zips


def jpeg(data: bytes) -> None:
    """Header, whole image, a box and a reduced size."""
    box = (sum(data[-4:]) % 20, sum(data[-8:]) % 20, 1 + len(data) % 16, 1 + sum(data[:9]) % 16)
    for options in ({}, {"box": box}, {"denominator": 1 << (1 + len(data) % 3)}):
        try:
            pixels = _C.decode(data, decode_image, MAX_PIXELS, **options)
        except (RuntimeError, ValueError):
            continue
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        if "box" in options:
            assert pixels.shape[:2] == box[2:]


def arrays(data: bytes) -> None:
    path = _file("set.npz" if data[:2] == b"PK" else "set.npy", data)
    try:
        source = open_source(path)
    except ValueError:
        return
    assert source.decode(len(source) - 1).shape[2] == 3
    assert source.labels is None or source.labels.max() < len(source.classes)


def pickled(data: bytes) -> None:
    path = _file("data_batch_1", data)
    with suppress(ValueError):
        images, labels = cifar.read_images(path, "labels")
        assert len(images) == len(labels) and images.shape[1:] == (32, 32, 3)
    with suppress(ValueError):
        assert isinstance(cifar.read_classes(path, "label_names"), list)


def views(data: bytes) -> None:
    header, rows = data[:8].ljust(8, b"\0"), data[8:]
    pairs = [(1 + header[i] % 40, 1 + header[i + 1] % 40) for i in (0, 2)]
    images = [np.full((h, w, 3), 100 + h, np.uint8) for h, w in pairs]
    count = len(rows) // (2 * 64)
    table = np.frombuffer(rows[: count * 128], "<f4").reshape(count, 2, 16)
    size = (1 + header[4] % 24, 1 + header[5] % 24)
    try:
        patches = _C.patch_views(
            images,
            table,
            size=size,
            interpolation=("bilinear", "bicubic")[header[6] % 2],
            dtype=("float32", "float16", "bfloat16", "uint8")[header[6] // 2 % 4],
            blur_kernel=(0, 3, 13)[header[7] % 3],
        )
    except ValueError:
        return
    assert patches.shape == (count, 2, *size, 3)


def run_files(data: bytes) -> None:
    from bagssl_fast import cli
    from bagssl_fast.models import saved

    kind, content = data[:1], data[1:]
    try:
        if kind == b"y":
            cli.load(_file("config.yaml", content))
            return
        whole = {seed[:1]: seed[1:] for seed in _run_seeds()}
        folder = _folder / "run"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_bytes(content if kind == b"j" else whole[b"j"])
        (folder / saved.WEIGHTS).write_bytes(content if kind == b"w" else whole[b"w"])
        saved.load(folder)
    except (ValueError, OSError):
        pass


_runs: list[bytes] = []


def _run_seeds() -> list[bytes]:
    if not _runs:
        _runs.extend(corpus.run_files())
    return _runs


TARGETS = {
    "tar_index": Target(corpus.tars, tar_index, repair_tar),
    "index_cache": Target(corpus.indices, index_cache, repair_zip),
    "jpeg": Target(corpus.jpegs, jpeg),
    "arrays": Target(corpus.arrays, arrays, repair_zip),
    "pickled": Target(corpus.pickles, pickled),
    "views": Target(corpus.tables, views),
    "run_files": Target(_run_seeds, run_files),
}
