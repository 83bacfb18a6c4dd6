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
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        _, shape, kind, columns_first, data = state
        if not isinstance(kind, _Type) or kind.name not in _TYPES or columns_first:
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
class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Refuses every name without a stand-in."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")
        self.stand_ins = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.stand_ins:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return self.stand_ins[module, name]


def read_batch(path: Path, kinds: dict[str, Callable[[Any], Any]]) -> list[Any]:
    """Values of a batch file by their keys, each as its function makes it.

    Raises:
        ValueError: The file is not one of CIFAR's; with its path.
        OSError: It cannot be read.
    """
    content = path.read_bytes()
    try:
        loaded = _Unpickler(content).load()
        if not isinstance(loaded, dict):
            raise ValueError(f"a {type(loaded).__name__}")
        missing = [key for key in kinds if key not in loaded]
        if missing:
            raise ValueError(f"it has no {missing[0]!r}")
        return [kind(loaded[key]) for key, kind in kinds.items()]
    except Exception as error:  # whatever a wrong opcode leads to
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: not a CIFAR batch ({reason})") from None


def pixels(value: Any) -> NDArray[np.uint8]:
    """Images [N, 32, 32, 3] of a batch's rows [N, 3072]."""
    rows = value.values if isinstance(value, _Array) else None
    if rows is None or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3 * 32 * 32:
        raise ValueError("its data are not rows of 3072 uint8 values")
    return np.asarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def class_indices(value: Any) -> NDArray[np.int64]:
    """Labels [N]."""
    if not isinstance(value, list) or not all(type(v) is int and 0 <= v < 1000 for v in value):
        raise ValueError("its labels are not a list of class indices")
    return np.array(value, np.int64)


def class_names(value: Any) -> list[str]:
    """The classes' names."""
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ValueError("its class names are not a list of texts")
    return value
