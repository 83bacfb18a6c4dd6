"""Sources: a data set's images in random access, with names and labels, without conversion."""

from __future__ import annotations

import glob
import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bagssl_fast._extension import _C
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
IMAGE_SUFFIXES = _JPEG_SUFFIXES | _OTHER_SUFFIXES
KINDS = (
    '"demo", a folder of images, a .tar (a list, a glob or a folder of them), a .npy or .npz '
    "array, or the folder of torchvision's CIFAR-10, CIFAR-100 or MNIST"
)


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
        # Names may be in any encoding; what is not UTF-8 is shown as \xNN.
        return self.prefix + self.raw(index).decode("utf-8", "backslashreplace")


class NumberedNames:
    """The images of an array, as `path[i]`."""

    def __init__(self, stem: str) -> None:
        self.stem = stem

    def __getitem__(self, index: int) -> str:
        return f"{self.stem}[{index}]"


class Source:
    """A data set's images.

    Attributes:
        labels: Class index per image, int64 [N], or None where the set has no labels.
        classes: Name of each class, or None.
        fingerprint: Short text that two openings of the same images share, wherever they lie.
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

    def __len__(self) -> int:
        return len(self.native)

    def __repr__(self) -> str:
        kinds = f"{len(self.classes)} classes" if self.classes else "no labels"
        return f"<Source of {len(self):,} images, {kinds}>"

    def name(self, index: int) -> str:
        """Name of an image, as errors tell it: a path, or shard and member."""
        return self._names[self._check(index)]

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        """The stored file's bytes, or the pixels of an array, undecoded."""
        return self.native.read(self._check(index))

    def decode(self, index: int, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
        """The upright RGB image, uint8 [H, W, 3].

        Raises:
            ImageError: If it cannot be decoded, with its name and the reason.
        """
        try:
            return self.native.decode(self._check(index), decode_image, max_pixels)
        except RuntimeError as error:
            raise ImageError(self.name(index), str(error)) from None

    def _check(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a source of {len(self)} images")
        return index


def open_source(data: Any, *, labels: Any = None, on_error: str = "raise") -> Source:
    """Opens a data set as it lies on disk or in memory.

    Args:
        data: A path: "demo"; a folder (class = name of a file's folder; files directly in it have
            none); a tar, or a list, glob or folder of tars (class = folder of a member, or its
            `.cls` member as in WebDataset); `.npy` or `.npz` with uint8 `images` [N, H, W, 3 or 1]
            and optional `labels`; the folder of torchvision's CIFAR-10, CIFAR-100 or MNIST. For
            "demo", CIFAR and MNIST a suffix `:train` (default) or `:test` chooses the split. Or a
            uint8 array or tensor [N, H, W, 3 or 1], which is not copied.
        labels: Class indices for an array in memory, [N].
        on_error: "raise", or "skip": members beyond the damage of a broken tar and images without
            a label in a labelled set are left out, with a warning.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If it holds no images or is of no known kind.
    """
    # Imported here: these modules build on this one.
    from bagssl_fast.data import arrays, demo, tars

    check_on_error(on_error)
    if isinstance(data, Source):
        return data
    if hasattr(data, "__array__") and not isinstance(data, (str, os.PathLike)):
        return arrays.from_memory(data, labels)
    if labels is not None:
        raise ValueError("labels go with an array in memory; files bring their own")
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)):
        return tars.open_tars([Path(path) for path in data], on_error)
    if not isinstance(data, (str, os.PathLike)):
        raise ValueError(f"cannot open a {type(data).__name__}: give {KINDS}")

    path, split = _split_suffix(os.fspath(data))
    if path == "demo":
        return demo.open_demo(split or "train")
    return _open_path(path, split, on_error)


def _open_path(path: str, split: str | None, on_error: str) -> Source:
    from bagssl_fast.data import arrays, tars

    where = Path(path)
    if not where.exists():
        matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            raise FileNotFoundError(f"{path}: there is no such file or folder; give {KINDS}")
        return tars.open_tars([Path(match) for match in matches], on_error)
    if where.is_dir():
        torchvision = arrays.open_torchvision(where, split or "train")
        if torchvision is not None:
            return torchvision
    if split is not None:
        raise ValueError(f"{path}:{split}: only demo, CIFAR and MNIST have splits; give {path}")
    if where.is_dir():
        shards = sorted(where.glob("*.tar"))
        return tars.open_tars(shards, on_error) if shards else open_folder(where, on_error)
    if where.suffix in (".npy", ".npz"):
        return arrays.open_numpy(where)
    if where.name.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".zip")):
        raise ValueError(f"{path}: compressed archives have no random access; unpack it first")
    if where.suffix == ".tar":
        return tars.open_tars([where], on_error)
    raise ValueError(f"{path}: not a data set of a known kind; give {KINDS}")


def open_folder(root: Path, on_error: str) -> Source:
    """A folder tree of image files in the order of their names; class = the file's folder."""
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
        raise ValueError(f"{root}: no image files in it; give {KINDS}")

    labels, classes = label_by_text(parents)
    table = NameTable.of(names, prefix=f"{root}{os.sep}")
    kept = check_labels(labels, table, on_error)
    if len(kept) < len(names):
        names = [names[i] for i in kept]
        labels = labels[kept]
        table = NameTable.of(names, prefix=f"{root}{os.sep}")
    native = _C.FileSource([os.path.join(base, name) for name in names])
    mark = fingerprint(table.blob, table.ends)
    return Source(native, table, labels if classes else None, classes or None, mark)


def open_files(paths: Sequence[str | os.PathLike[str]]) -> Source:
    """Image files in the order given, without labels.

    Raises:
        FileNotFoundError: Naming the first that is not there.
    """
    names = [os.fsencode(path) for path in paths]
    for name in names:
        if not os.path.isfile(name):
            raise FileNotFoundError(f"{os.fsdecode(name)}: there is no such image file")
    table = NameTable.of(names)
    return Source(_C.FileSource(names), table, None, None, fingerprint(table.blob, table.ends))


def is_image_name(name: bytes) -> bool:
    """Whether a file's name says that it is an image; hidden files are not."""
    stem, suffix = os.path.splitext(os.path.basename(name))
    return suffix.decode("latin-1").lower() in IMAGE_SUFFIXES and not stem.startswith(b".")


def label_by_text(texts: Sequence[bytes | None]) -> tuple[NDArray[np.int64], list[str]]:
    """Class index per image, in the order of the classes' names; -1 where the text is None."""
    found = sorted({text for text in texts if text is not None})
    number = {text: i for i, text in enumerate(found)}
    labels = np.array([-1 if text is None else number[text] for text in texts], np.int64)
    return labels, [text.decode("utf-8", "backslashreplace") for text in found]


def check_labels(labels: NDArray[np.int64], names: Names, on_error: str) -> NDArray[np.int64]:
    """Which images to keep: all of them, unless some have a label and others have not.

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
        raise ValueError(f'{text}: label all or none, or leave them out by on_error="skip"')
    warnings.warn(f"{text}: they are left out", stacklevel=3)
    return np.flatnonzero(labels >= 0)


def check_on_error(on_error: str) -> None:
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error={on_error!r} is unknown: "raise" or "skip"')


def fingerprint(*parts: bytes | NDArray[Any]) -> str:
    """A short hash of names, sizes or pixels."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return digest.hexdigest()[:16]


def _split_suffix(path: str) -> tuple[str, str | None]:
    for split in ("train", "test"):
        if path.endswith(f":{split}") and not os.path.exists(path):
            return path[: -len(split) - 1], split
    return path, None


def _raise(error: OSError) -> None:
    raise error
