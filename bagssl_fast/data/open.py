"""The entry point for data: `open_source` finds out what a path or an array is, and opens it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bagssl_fast.data import arrays, demo, tars
from bagssl_fast.data.checks import check_choice, check_integer
from bagssl_fast.data.decoding import MAX_INFLATION
from bagssl_fast.data.folders import open_folder
from bagssl_fast.data.source import ON_ERROR, Source
from bagssl_fast.locate import KINDS, check_one_set, matches, split_suffix


def open_source(
    data: Any,
    *,
    labels: Any = "auto",
    on_error: str = "raise",
    max_inflation: int = MAX_INFLATION,
) -> Source:
    """Opens a data set as it is on disk or in memory, without conversion.

    Args:
        data: A path: "demo"; a folder (class = name of a file's folder; files directly in it have
            no class); a tar, or a list, glob or folder of tars (class = folder of a member, or its
            `.cls` member as in WebDataset); `.npy` or `.npz` with uint8 `images` [N, H, W, 3 or 1]
            and optional `labels`; the folder of torchvision's CIFAR-10, CIFAR-100 or MNIST. For
            "demo", CIFAR, MNIST and a `.npz` with `train_images` and `test_images` (MedMNIST's) a
            suffix `:train` (default) or `:test` chooses the split. Or a uint8 array or
            tensor [N, H, W, 3 or 1], which is not copied. Or a `Source`, which is returned.
        labels: "auto" for those that the data has, "none" to ignore them, or class indices [N] for
            an array in memory.
        on_error: "raise", or "skip": members beyond the damage of a broken tar and images without
            a label in a labeled set are left out, with a warning.
        max_inflation: A compressed file of arrays (`.npz`, `.gz`) that claims more than so many
            times its own size is refused; 256 MB are not.

    Raises:
        FileNotFoundError: If the path does not exist.
        ValueError: If it holds no images or is of an unknown kind.
    """
    check_choice("on_error", on_error, ON_ERROR)
    labeled = True
    if isinstance(labels, str):
        check_choice("labels", labels, ("auto", "none"))
        labeled, labels = labels == "auto", None
    check_integer("max_inflation", max_inflation, 1)
    source = _open(data, labels, labeled, on_error, max_inflation)
    return source if labeled else source.without_labels()


def _open(data: Any, labels: Any, labeled: bool, on_error: str, max_inflation: int) -> Source:
    if isinstance(data, Source):
        return data
    if hasattr(data, "__array__") and not isinstance(data, (str, os.PathLike)):
        return arrays.from_memory(data, labels)
    if labels is not None:
        raise ValueError("labels are for an array in memory; files have their own")
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)):
        return tars.open_tars([Path(path) for path in data], on_error, labeled)
    if not isinstance(data, (str, os.PathLike)):
        raise ValueError(f"cannot open a {type(data).__name__}: give {KINDS}")

    path, split = split_suffix(os.fspath(data))
    if path == "demo":
        return demo.open_demo(split or "train")
    return _open_path(path, split, labeled, on_error, max_inflation)


def _open_path(
    path: str, split: str | None, labeled: bool, on_error: str, max_inflation: int
) -> Source:
    found, where = matches(path), Path(path)
    if found != [path]:
        return tars.open_tars([Path(match) for match in found], on_error, labeled)
    if where.is_dir():
        torchvision = arrays.open_torchvision(where, split or "train", max_inflation)
        if torchvision is not None:
            return torchvision
    if where.suffix == ".npz":
        return arrays.open_numpy(where, split, max_inflation)
    if split is not None:
        raise ValueError(
            f"{path}:{split}: only demo, CIFAR, MNIST and .npz files with train_images have "
            f"splits; give {path}"
        )
    if where.is_dir():
        shards = sorted(where.glob("*.tar"))
        if shards:
            return tars.open_tars(shards, on_error, labeled)
        check_one_set(path)
        return open_folder(where, on_error, labeled)
    if where.suffix == ".npy":
        return arrays.open_numpy(where)
    if where.name.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".zip")):
        raise ValueError(f"{path}: a compressed archive has no random access; unpack it first")
    if where.suffix == ".tar":
        return tars.open_tars([where], on_error, labeled)
    raise ValueError(f"{path}: not a data set of a known kind; give {KINDS}")
