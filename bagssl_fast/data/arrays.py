"""Arrays of pixels: in memory, `.npy` and `.npz`, torchvision's CIFAR and MNIST on disk."""

from __future__ import annotations

import gzip
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bagssl_fast._extension import _C
from bagssl_fast.data import cifar
from bagssl_fast.data.decoding import MAX_INFLATION, check_inflation
from bagssl_fast.data.source import NumberedNames, Source, class_labels, fingerprint_of

_NPY_START = b"\x93NUMPY"


def from_memory(data: Any, labels: Any = None, stem: str = "array") -> Source:
    """A source over a uint8 array or CPU tensor [N, H, W, 3 or 1] (or [N, H, W]), not copied."""
    return make_source(np.asarray(data), None if labels is None else np.asarray(labels), None, stem)


def make_source(
    images: NDArray[Any], labels: NDArray[Any] | None, classes: list[str] | None, stem: str
) -> Source:
    """Checks shapes and types and wraps them."""
    images = _as_images(images, stem)
    native = _C.ArraySource(np.ascontiguousarray(images))
    return _as_source(native, images.shape, labels, classes, stem)


def _as_images(images: NDArray[Any], stem: str) -> NDArray[np.uint8]:
    """The array as [N, H, W, C], checked."""
    if images.dtype != np.uint8:
        raise ValueError(
            f"{stem}: images must be uint8 with values 0 to 255, got {images.dtype} (convert them, "
            "for example by (x * 255).astype('uint8'))"
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        hint = (
            " (this looks like [N, C, H, W]: use .transpose(0, 2, 3, 1))"
            if images.ndim == 4 and images.shape[1] in (1, 3)
            else ""
        )
        raise ValueError(
            f"{stem}: images must be [N, H, W, 3] or [N, H, W, 1], got {list(images.shape)}{hint}"
        )
    if len(images) == 0:
        raise ValueError(f"{stem}: the array holds no images")
    return images


def _as_source(
    native: _C.Source,
    shape: tuple[int, ...],
    labels: NDArray[Any] | None,
    classes: list[str] | None,
    stem: str,
) -> Source:
    count = len(native)
    if labels is not None:
        try:
            labels, classes = class_labels(labels, count, classes)
        except ValueError as error:
            raise ValueError(f"{stem}: {error}") from None
    # 256 images are enough to distinguish data sets.
    probe = [native.read(i) for i in range(0, count, max(1, count // 256))[:256]]
    parts = [np.array(shape, np.int64), *probe, labels if labels is not None else b""]
    return Source(native, NumberedNames(stem), labels, classes, fingerprint_of(*parts))


def open_numpy(path: Path, split: str | None = None, max_inflation: int = MAX_INFLATION) -> Source:
    """`.npy` (read in random access, not loaded) or `.npz` with `images` and optional `labels`.

    An `.npz` with splits, as MedMNIST's, has `train_images`, `train_labels`, `test_images`, ...;
    `split` chooses one, "train" by default.
    """
    prefix = f"{split}_" if split else ""
    labels = classes = None
    try:
        if path.suffix == ".npy":
            return _open_npy(path)
        with np.load(path, allow_pickle=False) as arrays:
            _check_members(path, arrays.zip, max_inflation)
            if not split and "images" not in arrays:
                prefix = "train_"
            if f"{prefix}images" not in arrays:
                name = f"{prefix}images" if split else "images"
                raise ValueError(f"no array '{name}', only {sorted(arrays)}")
            parts = [arrays.get(name) for name in (f"{prefix}images", f"{prefix}labels")]
            if not all(part is None or isinstance(part, np.ndarray) for part in parts):
                raise ValueError("a member is not an array")
            images, labels = parts
            classes = [str(name) for name in arrays.get("classes", ())] or None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file has many ways to fail
        text = str(error) or type(error).__name__
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    return make_source(images, labels, classes, f"{path}:{split}" if split else str(path))


def _check_members(path: Path, archive: zipfile.ZipFile, max_inflation: int) -> None:
    """Refuses members that inflate to too much, and headers that promise more than is there."""
    members = archive.infolist()
    check_inflation(path, sum(member.file_size for member in members), max_inflation)
    for member in members:
        with archive.open(member) as file:
            if file.read(len(_NPY_START)) != _NPY_START:
                continue
            major, _ = file.read(2)
            header = np.lib.format.read_array_header_1_0
            if major > 1:
                header = np.lib.format.read_array_header_2_0
            shape, _, dtype = header(file)
        # An array of objects is refused as it is read.
        if not dtype.hasobject and dtype.itemsize * math.prod(shape) > member.file_size:
            raise ValueError(
                f"{member.filename} is said to be {dtype} of shape {list(shape)}, which is more "
                f"than its {member.file_size} bytes"
            )


def _open_npy(path: Path) -> Source:
    """The images where they are. A mapped file that shrinks would end the process by SIGBUS."""
    mapped = np.load(path, mmap_mode="r")  # its header alone is read
    if not isinstance(mapped, np.memmap):
        raise ValueError("not an array in a file")
    images, offset = _as_images(mapped, str(path)), mapped.offset
    if not images.flags.c_contiguous:  # in Fortran's order: turned in memory
        return make_source(np.load(path), None, None, str(path))
    native = _C.ArrayFileSource(os.fsencode(path), offset, images.shape)
    return _as_source(native, images.shape, None, None, str(path))


def open_torchvision(root: Path, split: str, max_inflation: int = MAX_INFLATION) -> Source | None:
    """torchvision's CIFAR-10, CIFAR-100 or MNIST as stored on disk; None for anything else."""
    for folder in (root, root / "cifar-10-batches-py"):
        if (folder / "data_batch_1").is_file():
            batches = [f"data_batch_{i}" for i in range(1, 6)]
            files = batches if split == "train" else ["test_batch"]
            return _open_cifar(folder, files, "labels", "batches.meta", "label_names")
    for folder in (root, root / "cifar-100-python"):
        if (folder / "train").is_file() and (folder / "meta").is_file():
            return _open_cifar(folder, [split], "fine_labels", "meta", "fine_label_names")
    for folder in (root, root / "raw", root / "MNIST" / "raw"):
        prefix = "train" if split == "train" else "t10k"
        images = _find_idx(folder, f"{prefix}-images-idx3-ubyte")
        if images is not None:
            labels = _find_idx(folder, f"{prefix}-labels-idx1-ubyte")
            if labels is None:
                raise ValueError(f"{images}: the file with its labels is missing")
            pixels, classes = (_read_idx(path, max_inflation) for path in (images, labels))
            return make_source(pixels, classes, None, str(images))
    return None


def _open_cifar(
    folder: Path, files: list[str], label_key: str, meta: str, class_key: str
) -> Source:
    batches = [cifar.read_images(folder / name, label_key) for name in files]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    classes = None
    if (folder / meta).is_file():
        classes = cifar.read_classes(folder / meta, class_key)
    return make_source(images, labels, classes, str(folder))


def _find_idx(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _read_idx(path: Path, max_inflation: int) -> NDArray[np.uint8]:
    """MNIST's format: two zero bytes, type 8 (uint8), rank, the sizes as big-endian int32, data."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            start = file.read(4)
            if len(start) < 4 or start[:3] != b"\x00\x00\x08":
                raise ValueError("not an idx file of uint8 values")
            shape = np.frombuffer(file.read(4 * start[3]), ">i4").tolist()
            if len(shape) != start[3] or min(shape, default=0) < 0:
                raise ValueError("not an idx file: its sizes are damaged")
            # No more than that is unpacked, whatever the file holds.
            expected = math.prod(shape)
            most = expected + 1
            if path.suffix == ".gz":
                check_inflation(path, expected, max_inflation)
            else:
                most = min(most, path.stat().st_size)
            values = np.frombuffer(file.read(most), np.uint8)
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: {error}") from None
    if len(values) != expected:
        raise ValueError(
            f"{path}: expected {expected} values, got {len(values)}: is the file truncated?"
        )
    return values.reshape(shape)
