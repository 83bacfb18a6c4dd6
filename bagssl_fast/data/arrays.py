"""Arrays of pixels: in memory, `.npy` and `.npz`, torchvision's CIFAR and MNIST on disk."""

from __future__ import annotations

import gzip
import math
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bagssl_fast._extension import _C
from bagssl_fast.data.source import NumberedNames, Source, class_labels, fingerprint_of


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


def open_numpy(path: Path, split: str | None = None) -> Source:
    """`.npy` (read in random access, not loaded) or `.npz` with `images` and optional `labels`.

    An `.npz` with splits, as MedMNIST's, has `train_images`, `train_labels`, `test_images`, ...;
    `split` chooses one, "train" by default.
    """
    try:
        if path.suffix == ".npy":
            return _open_npy(path)
        with np.load(path, allow_pickle=False) as arrays:
            prefix = f"{split}_" if split else "" if "images" in arrays else "train_"
            if f"{prefix}images" not in arrays:
                name = f"{prefix}images" if split else "images"
                raise ValueError(f"no array '{name}', only {sorted(arrays)}")
            labels = arrays.get(f"{prefix}labels")
            classes = [str(name) for name in arrays.get("classes", ())] or None
            stem = f"{path}:{split}" if split else str(path)
            return make_source(arrays[f"{prefix}images"], labels, classes, stem)
    except (ValueError, OSError, EOFError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from None


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


def open_torchvision(root: Path, split: str) -> Source | None:
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
            return make_source(_read_idx(images), _read_idx(labels), None, str(images))
    return None


class _PickledDtype:
    """What a pickle says about a numpy.dtype: its name, of which only uint8's is used."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and fields, of which uint8 has none


class _PickledArray:
    """What a pickle says about a numpy.ndarray, of uint8 values only.

    numpy's own constructors are not called: by a pickle's choice they take bytes for addresses.
    """

    def __init__(self, *_: Any) -> None:
        self.pixels = np.zeros(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, data = state
        if not isinstance(dtype, _PickledDtype) or dtype.name not in ("u1", "uint8"):
            raise pickle.UnpicklingError("it has an array of other values than uint8")
        flat = np.frombuffer(_encode(data) if isinstance(data, str) else bytes(data), np.uint8)
        self.pixels = flat.reshape(shape, order="F" if by_columns else "C")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Bytes as old protocols write them: each byte as a character."""
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Plain containers and uint8 arrays, and nothing else, as a pickle can run code."""

    _STAND_INS: ClassVar[dict[tuple[str, str], Callable[..., Any]]] = {
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: _PickledArray(),
        ("numpy._core.multiarray", "_reconstruct"): lambda *_: _PickledArray(),
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledDtype,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._STAND_INS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return self._STAND_INS[module, name]


def _read_pickle(path: Path, *keys: str) -> list[Any]:
    """The values of a pickled dictionary."""
    try:
        with open(path, "rb") as file:
            loaded = _ArrayUnpickler(file, encoding="latin1").load()
        return [loaded[key] for key in keys]
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path}: not a CIFAR batch ({type(error).__name__}: {error})") from None


def _open_cifar(
    folder: Path, files: list[str], label_key: str, meta: str, class_key: str
) -> Source:
    pixels, labels = [], []
    for name in files:
        data, numbers = _read_pickle(folder / name, "data", label_key)
        if not isinstance(data, _PickledArray) or data.pixels.shape != (len(numbers), 3072):
            raise ValueError(
                f"{folder / name}: not a CIFAR batch (no images of 32 x 32, or labels)"
            )
        pixels.append(data.pixels)
        labels += numbers
    images = np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    classes = None
    if (folder / meta).is_file():
        (names,) = _read_pickle(folder / meta, class_key)
        classes = [str(name) for name in names]
    return make_source(images, np.asarray(labels), classes, str(folder))


def _find_idx(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _read_idx(path: Path) -> NDArray[np.uint8]:
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
            values = np.frombuffer(file.read(expected + 1), np.uint8)
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: {error}") from None
    if len(values) != expected:
        raise ValueError(
            f"{path}: expected {expected} values, got {len(values)}: is the file truncated?"
        )
    return values.reshape(shape)
