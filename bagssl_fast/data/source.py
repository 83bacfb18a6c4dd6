"""Sources: random access to a data set's images, with names and labels, without conversion."""

from __future__ import annotations

import copy
import hashlib
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bagssl_fast._extension import _C
from bagssl_fast.data.checks import check_integer
from bagssl_fast.data.decoding import MAX_PIXELS, ImageError, decode_image

_JPEG_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif"}
_OTHER_SUFFIXES = {
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".ppm",
    ".pgm",
    ".pnm",
    ".tif",
    ".tiff",
    ".avif",
}
ON_ERROR = ("raise", "skip")
MOST_CLASSES = 1_000_000  # numbered without names: each gets its number as text
IMAGE_SUFFIXES = _JPEG_SUFFIXES | _OTHER_SUFFIXES


class Names(Protocol):
    """Names by image index."""

    def __getitem__(self, index: int, /) -> str: ...


class NameTable:
    """Many names in one block of bytes: name i is `blob[ends[i - 1]:ends[i]]`."""

    def __init__(self, blob: bytes, ends: NDArray[np.int64], prefix: str = "") -> None:
        self.blob, self.ends, self.prefix = blob, ends, prefix

    @classmethod
    def of(cls, names: Sequence[bytes], prefix: str = "") -> NameTable:
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        return cls(b"".join(names), ends, prefix)

    def __len__(self) -> int:
        return len(self.ends)

    def raw(self, index: int) -> bytes:
        begin = int(self.ends[index - 1]) if index else 0
        return self.blob[begin : int(self.ends[index])]

    def __getitem__(self, index: int) -> str:
        # Names may be in any encoding; bytes that are not UTF-8 are shown as \xNN.
        return self.prefix + self.raw(index).decode("utf-8", "backslashreplace")


class NumberedNames:
    """The images of an array, as `path[i]`."""

    def __init__(self, stem: str) -> None:
        self.stem = stem

    def __getitem__(self, index: int) -> str:
        return f"{self.stem}[{index}]"


class FunctionNames:
    """Names given by a function."""

    def __init__(self, name: Callable[[int], str]) -> None:
        self._name = name

    def __getitem__(self, index: int) -> str:
        return str(self._name(index))


class Source:
    """A data set's images.

    Attributes:
        labels: Class index per image, int64 [N], or None where the set has no labels.
        classes: Name of each class, or None.
        fingerprint: Short text that identifies the images, independent of where they are stored.
        native: The C++ side.
    """

    def __init__(
        self,
        native: _C.Source,
        names: Names,
        labels: NDArray[np.int64] | None,
        classes: list[str] | None,
        fingerprint: str,
    ) -> None:
        self.native = native
        self._names = names
        self.labels = labels
        self.classes = classes
        self.fingerprint = fingerprint

    @classmethod
    def from_function(
        cls,
        read: Callable[[int], bytes | NDArray[np.uint8]],
        length: int,
        *,
        labels: ArrayLike | None = None,
        classes: Sequence[str] | None = None,
        name: Callable[[int], str] | None = None,
        fingerprint: str | None = None,
    ) -> Source:
        """A source written in Python: LMDB, HDF5, an object store, a data set of another library.

        `read` is called from the loader's threads, several at a time, each holding the GIL for its
        call: decoding and cutting run in parallel, `read` itself as far as it releases the GIL
        (most I/O does). It must return: the loader's threads wait for it when they are stopped.

        Args:
            read: `read(index)` gives image `index`, 0 to length - 1: the bytes of an image file, or
                pixels, uint8 [H, W, 3], [H, W, 1] or [H, W]. Images may differ in size. An
                exception makes it a bad image: `ImageError` with its text, or the next good image
                under `on_error="skip"`.
            length: Number of images, at least 1.
            labels: Class indices, integers [length], counted from 0.
            classes: Name of each class; by default the class indices as text.
            name: `name(index)` gives an image's name for errors; by default "image <index>".
            fingerprint: Text that identifies the images. Checkpoints and saved features compare it,
                to refuse those of other images. By default a hash of length and labels, which does
                NOT look at the images: give one where two sources may agree in both.

        Raises:
            ValueError: For a length below 1, or labels or classes that do not fit.
        """
        check_integer("length", length, least=1)
        if not callable(read):
            raise ValueError(f"read must be a function of an index, got a {type(read).__name__}")
        found, class_names = None, None
        if labels is not None:
            found, class_names = class_labels(labels, int(length), classes)
        elif classes is not None:
            raise ValueError("classes name the labels: give labels as well")
        names = FunctionNames(name or "image {}".format)
        if fingerprint is None:
            size = np.array(length, np.int64)
            fingerprint = fingerprint_of(b"function", size, b"" if found is None else found)
        native = _C.FunctionSource(read, int(length))
        return cls(native, names, found, class_names, fingerprint)

    def __len__(self) -> int:
        return len(self.native)

    def __repr__(self) -> str:
        kinds = f"{len(self.classes)} classes" if self.classes else "no labels"
        return f"<Source of {len(self):,} images, {kinds}>"

    def without_labels(self) -> Source:
        """The same images, without labels."""
        other = copy.copy(self)
        other.labels = other.classes = None
        return other

    def name(self, index: int) -> str:
        """Name of an image, for errors: a path, or shard and member."""
        return self._names[self._check(index)]

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        """The stored file's bytes, or the pixels of an array, undecoded."""
        return self.native.read(self._check(index))

    def decode(self, index: int, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
        """The upright RGB image, uint8 [H, W, 3].

        Raises:
            ImageError: If it cannot be decoded; with its name and the reason.
        """
        try:
            return self.native.decode(self._check(index), decode_image, max_pixels)
        except RuntimeError as error:
            raise ImageError(self.name(index), str(error)) from None

    def _check(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a source of {len(self)} images")
        return index


def is_image_name(name: bytes) -> bool:
    """Whether a file is an image by its name; hidden files are not."""
    stem, suffix = os.path.splitext(os.path.basename(name))
    return suffix.decode("latin-1").lower() in IMAGE_SUFFIXES and not stem.startswith(b".")


def label_by_text(texts: Sequence[bytes | None]) -> tuple[NDArray[np.int64], list[str]]:
    """Class index per image, of the sorted classes; -1 where the text is None."""
    found = sorted({text for text in texts if text is not None})
    number = {text: i for i, text in enumerate(found)}
    labels = np.array([-1 if text is None else number[text] for text in texts], np.int64)
    return labels, [text.decode("utf-8", "backslashreplace") for text in found]


def class_labels(
    labels: ArrayLike, count: int, classes: Sequence[str] | None = None
) -> tuple[NDArray[np.int64], list[str]]:
    """Class indices as int64 [count], and the classes' names, by default the indices as text.

    Raises:
        ValueError: If they do not fit each other or the number of images.
    """
    found = np.asarray(labels).reshape(-1)
    if len(found) != count:
        raise ValueError(f"{len(found)} labels for {count} images")
    if found.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers, got {found.dtype}")
    if found.min() < 0:
        raise ValueError(f"label {found.min()}: classes are counted from 0")
    if classes is None:
        check_class_count(int(found.max()))
    names = [str(name) for name in (range(found.max() + 1) if classes is None else classes)]
    if found.max() >= len(names):
        raise ValueError(f"label {found.max()} has no name: classes has {len(names)} names")
    return found.astype(np.int64), names


def check_class_count(last: int) -> None:
    """Refuses a class index that would make a list of millions of names.

    Raises:
        ValueError: `last` is MOST_CLASSES or more.
    """
    if last >= MOST_CLASSES:
        raise ValueError(
            f"label {last}: labels are class indices, counted from 0 without gaps, at most "
            f'{MOST_CLASSES:,} of them; renumber them, or ignore them (labels="none")'
        )


def check_labels(labels: NDArray[np.int64], names: Names, on_error: str) -> NDArray[np.int64]:
    """Which images to keep: all of them, unless some have a label and others do not.

    Raises:
        ValueError: In that case, under on_error="raise".
    """
    missing = np.flatnonzero(labels < 0)
    if len(missing) in (0, len(labels)):
        return np.arange(len(labels))
    text = (
        f"{len(missing)} of {len(labels)} images have no label, the first is "
        f"{names[int(missing[0])]}"
    )
    if on_error == "raise":
        raise ValueError(
            f'{text}: label all or none, ignore labels (labels="none"), or leave these images out '
            '(on_error="skip")'
        )
    warnings.warn(f"{text}: they are left out", stacklevel=3)
    return np.flatnonzero(labels >= 0)


PROBES, PROBE_BYTES = 256, 1 << 16


def probe_files(paths: Sequence[bytes]) -> bytes:
    """Size and first 64 KiB of 256 files spread over the list: what a fingerprint reads of them.

    It finds a set that was made again (resized, encoded again, other pictures of the same names)
    and every change of a set of up to 256 files, in the time of 256 small reads. Modification times
    are not in it: a copy on another disk is the same set.
    """
    digest = hashlib.sha256()
    for path in paths[:: -(-len(paths) // PROBES)]:
        try:
            found = os.stat(path)
            digest.update(found.st_size.to_bytes(8, "little"))
            if stat.S_ISREG(found.st_mode):  # reading anything else may wait for ever
                with open(path, "rb") as file:
                    digest.update(file.read(PROBE_BYTES))
        except OSError:
            digest.update(b"unreadable")  # a bad image, which the loader tells
    return digest.digest()


def fingerprint_of(*parts: bytes | NDArray[Any]) -> str:
    """A short hash of names, sizes or pixels."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return digest.hexdigest()[:16]
