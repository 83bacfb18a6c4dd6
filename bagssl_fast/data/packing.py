"""Re-encoding a data set into ordinary tar shards: smaller images decode several times faster."""

from __future__ import annotations

import io
import os
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image
from tqdm import tqdm

from bagssl_fast._extension import _C
from bagssl_fast.data.checks import check_choice, check_integer
from bagssl_fast.data.decoding import ImageError
from bagssl_fast.data.source import ON_ERROR, Source
from bagssl_fast.locate import check_tar

# Below this short side, halving the resolution of the colors would be visible.
_FULL_CHROMA_BELOW = 128


@dataclass
class Report:
    """The result of packing.

    Attributes:
        images: Images written.
        bytes_in: Total size of their files before (of their pixels, for arrays).
        bytes_out: Total size of their files after.
        kept: Images stored unchanged, because they were small JPEGs already.
        skipped: Name and reason of each image left out.
        paths: The shards written.
    """

    images: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    kept: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)


def pack(
    source: Source,
    destination: Path,
    *,
    short_side: int = 256,
    quality: int = 90,
    shard_size: int = 0,
    layout: str = "auto",
    num_threads: int = 0,
    on_error: str = "raise",
) -> Report:
    """Writes a source's images as JPEGs into tar shards, which get their names when all are
    complete.

    Args:
        source: What to pack.
        destination: A path ending in .tar; with several shards, `name-000000.tar` and so on.
        short_side: Images are scaled down to it (Lanczos), never up; 0 keeps their size. A JPEG
            that is small enough already is stored unchanged.
        quality: Of the JPEGs, 1 to 100.
        shard_size: Bytes after which a new shard begins; 0 makes one.
        layout: "folder" (class/name.jpg), "webdataset" (key.jpg and, of labeled images, key.cls),
            or "auto": "folder", unless the class numbers would change that way.
        num_threads: 0 = all CPUs of this process.
        on_error: "raise", or "skip" to leave out images that cannot be decoded, and list them.

    Raises:
        ValueError: For arguments out of range.
        ImageError: For an image that cannot be decoded, under on_error="raise".
    """
    check(destination, short_side, quality, shard_size, layout, on_error)
    layout = _resolve_layout(source, layout)
    report = Report()
    writer = _ShardWriter(destination, shard_size)
    names = _Namer(source, layout)
    threads = num_threads or _C.available_cpus()
    try:
        jobs = _in_order(source, short_side, quality, threads)
        progress = tqdm(jobs, total=len(source), unit="img", mininterval=1, disable=None)
        for index, future in enumerate(progress):
            try:
                data, size_before, kept = future.result()
            except ImageError as error:
                if on_error == "raise":
                    raise
                report.skipped.append((error.name, error.reason))
                continue
            writer.add(names.members(index, data))
            report.images += 1
            report.bytes_in += size_before
            report.bytes_out += len(data)
            report.kept += kept
        report.paths = writer.commit()
    finally:
        writer.abandon()
    return report


def _in_order(
    source: Source, short_side: int, quality: int, threads: int
) -> Iterator[Future[tuple[bytes, int, bool]]]:
    """The encoding jobs in the source's order, a few of them in memory at a time."""
    with ThreadPoolExecutor(threads) as pool:
        window: deque[Future[tuple[bytes, int, bool]]] = deque()
        try:
            for index in range(len(source)):
                window.append(pool.submit(encode, source, index, short_side, quality))
                if len(window) >= 4 * threads:
                    yield window.popleft()
            while window:
                yield window.popleft()
        finally:
            for job in window:
                job.cancel()


def encode(source: Source, index: int, short_side: int, quality: int) -> tuple[bytes, int, bool]:
    """One image as JPEG: its bytes, its size before, and whether it is unchanged."""
    try:
        stored = source.read(index)
    except RuntimeError as error:
        raise ImageError(source.name(index), str(error)) from None
    size = stored.nbytes if isinstance(stored, np.ndarray) else len(stored)
    pixels = source.decode(index)  # always, to find damaged files
    height, width = pixels.shape[:2]
    shrinks = 0 < short_side < min(height, width)
    if not shrinks and isinstance(stored, bytes) and stored[:3] == b"\xff\xd8\xff":
        return stored, size, True
    if shrinks:
        scale = short_side / min(height, width)
        target = (max(1, round(width * scale)), max(1, round(height * scale)))
        pixels = np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.LANCZOS))
    chroma = "444" if min(pixels.shape[:2]) < _FULL_CHROMA_BELOW else "420"
    return simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling=chroma), size, False


class _Namer:
    """Unique names for the members of the tars."""

    def __init__(self, source: Source, layout: str) -> None:
        self.source, self.layout = source, layout
        self.used: set[str] = set()

    def members(self, index: int, data: bytes) -> list[tuple[str, bytes]]:
        """The members that store one image."""
        label = -1 if self.source.labels is None else int(self.source.labels[index])
        if self.layout == "webdataset":
            key = f"{index:08d}"
            cls = [] if label < 0 else [(f"{key}.cls", str(label).encode())]
            return [(f"{key}.jpg", data), *cls]
        stem = os.path.splitext(os.path.basename(self.source.name(index)))[0]
        if not isinstance(self.source.native, (_C.ShardSource, _C.FileSource)):
            stem = f"{index:08d}"
        folder = ""
        if label >= 0 and self.source.classes is not None:
            folder = self.source.classes[label].replace("/", "_") + "/"
        if f"{folder}{stem}" in self.used:
            stem = f"{stem}-{index}"
        self.used.add(f"{folder}{stem}")
        return [(f"{folder}{stem}.jpg", data)]


class _ShardWriter:
    """Tar files under temporary names, renamed all at once."""

    def __init__(self, destination: Path, shard_size: int) -> None:
        self.destination, self.shard_size = destination, shard_size
        self.temporary: list[Path] = []
        self.tar: tarfile.TarFile | None = None

    def add(self, members: list[tuple[str, bytes]]) -> None:
        size = sum(len(data) for _, data in members)
        if self.tar is not None and self.shard_size and self.tar.offset + size > self.shard_size:
            self.tar.close()
            self.tar = None
        if self.tar is None:
            name = f".{self.destination.name}.{len(self.temporary):06d}.{os.getpid()}.tmp"
            path = self.destination.with_name(name)
            self.temporary.append(path)
            self.tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        for name, data in members:
            # No times or owners: the same images make the same file.
            info = tarfile.TarInfo(name)
            info.size = len(data)
            self.tar.addfile(info, io.BytesIO(data))

    def commit(self) -> list[Path]:
        if self.tar is None and not self.temporary:
            raise ValueError(f"there are no images left to write to {self.destination}")
        if self.tar is not None:
            self.tar.close()
        stem = self.destination.name[: -len(".tar")]
        finals = [self.destination]
        if self.shard_size:
            finals = [
                self.destination.with_name(f"{stem}-{i:06d}.tar")
                for i in range(len(self.temporary))
            ]
        for temporary, final in zip(self.temporary, finals, strict=True):
            os.replace(temporary, final)
        return finals

    def abandon(self) -> None:
        """Removes what has not been renamed."""
        if self.tar is not None:
            self.tar.close()
        for path in self.temporary:
            path.unlink(missing_ok=True)


def _resolve_layout(source: Source, layout: str) -> str:
    if layout != "auto":
        return layout
    if source.labels is None or source.classes is None:
        return "folder"
    # Folders number the classes by the order of their names, those with images only.
    named_in_order = source.classes == sorted(set(source.classes))
    all_used = len(np.unique(source.labels)) == len(source.classes)
    return "folder" if named_in_order and all_used else "webdataset"


def check(
    destination: Path, short_side: int, quality: int, shard_size: int, layout: str, on_error: str
) -> None:
    """Refuses what `pack` cannot do.

    Raises:
        ValueError, FileNotFoundError: Naming the argument and what is expected.
    """
    check_tar(destination)
    check_integer("short_side", short_side, 0)
    check_integer("quality", quality, 1, 100)
    check_integer("shard_size", shard_size, 0)
    check_choice("layout", layout, ("auto", "folder", "webdataset"))
    check_choice("on_error", on_error, ON_ERROR)
