"""CIFAR-10 and CIFAR-100 as torchvision stores them: pickles, read without running what they say.

A pickle names functions and classes that it calls. Here each of the names that these files use
stands for a function of ours that accepts plain values alone, and every other name is refused;
arrays are built from bytes whose type and number were checked.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

_T = TypeVar("_T")
_TYPES = {"u1": np.uint8, "i8": np.int64, "i4": np.int32}


class _Type:
    """Stands for numpy.dtype: only its name is looked at."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = str(name)

    def __setstate__(self, _: Any) -> None:
        """Byte order and flags; those of the types here are given."""


class _Array:
    """Stands for numpy.ndarray until its contents have come."""

    values: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, by_columns, data = state
        if not isinstance(kind, _Type) or kind.name not in _TYPES or by_columns:
            raise pickle.UnpicklingError("an array of a type or order that CIFAR's do not have")
        raw = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(raw, bytes) or not all(type(n) is int and n >= 0 for n in shape):
            raise pickle.UnpicklingError("an array whose contents are not bytes")
        self.values = np.frombuffer(raw, np.dtype(_TYPES[kind.name])).reshape(shape)


def _stand_ins() -> dict[tuple[str, str], Any]:
    """Made for each file, as a pickle may write into what it is given."""
    array = type("Array", (_Array,), {})

    def reconstruct(*_: Any) -> _Array:
        return array()

    def encode(text: str, coding: str) -> bytes:
        if coding != "latin1":
            raise pickle.UnpicklingError(f"text in {coding!r}")
        return text.encode("latin1")

    return {
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): reconstruct,
        ("numpy", "ndarray"): object(),  # an argument of _reconstruct
        ("numpy", "dtype"): type("Type", (_Type,), {}),
        ("_codecs", "encode"): encode,
    }


# In Python: the one in C reserves memory for any number that the file gives as an index.
class _Unpickler(pickle._Unpickler):
    """Refuses every name without a stand-in."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")
        self.stand_ins = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.stand_ins:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return self.stand_ins[module, name]


def read_images(path: Path, label_key: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images [N, 32, 32, 3] and labels [N] of a batch file.

    Raises:
        ValueError: The file is not one of CIFAR's; with its path.
        OSError: It cannot be read.
    """

    def take(batch: dict[Any, Any]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        data, labels = batch["data"], batch[label_key]
        rows = data.values if isinstance(data, _Array) else None
        if rows is None or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3072:
            raise ValueError("its data are not rows of 3072 uint8 values")
        if not isinstance(labels, list) or not all(
            type(v) is int and 0 <= v < 1000 for v in labels
        ):
            raise ValueError("its labels are not a list of class indices")
        if len(labels) != len(rows):
            raise ValueError(f"{len(labels)} labels for {len(rows)} images")
        images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.asarray(images), np.array(labels, np.int64)

    return _read(path, take)


def read_classes(path: Path, key: str) -> list[str]:
    """The classes' names of a meta file.

    Raises:
        ValueError, OSError: As `read_images`.
    """

    def take(meta: dict[Any, Any]) -> list[str]:
        names = meta[key]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("its class names are not a list of texts")
        return names

    return _read(path, take)


def _read(path: Path, take: Callable[[dict[Any, Any]], _T]) -> _T:
    content = path.read_bytes()
    try:
        loaded = _Unpickler(content).load()
        if not isinstance(loaded, dict):
            raise ValueError(f"a {type(loaded).__name__}")
        return take(loaded)
    except Exception as error:  # whatever a wrong opcode leads to
        reason = f"it has no {error}" if type(error) is KeyError else str(error)
        raise ValueError(f"{path}: not a CIFAR batch ({reason or type(error).__name__})") from None
