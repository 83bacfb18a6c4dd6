"""Where a data set lies: what `--data` names, found without opening it."""

from __future__ import annotations

import glob
import os

KINDS = (
    '"demo", a folder of images, a .tar (a list, a glob or a folder of them), a .npy or .npz '
    "array, or the folder of torchvision's CIFAR-10, CIFAR-100 or MNIST"
)
SPLITS = ("train", "test")


def split_suffix(data: str) -> tuple[str, str | None]:
    """`x:test` -> ("x", "test"); ("x", None) without a split, or if a file has that very name."""
    for split in SPLITS:
        if data.endswith(f":{split}") and not os.path.exists(data):
            return data[: -len(split) - 1], split
    return data, None


def matches(path: str) -> list[str]:
    """The path itself if it exists, else what it matches as a glob pattern, sorted.

    Raises:
        FileNotFoundError: If there is nothing.
    """
    if os.path.exists(path):
        return [path]
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise FileNotFoundError(f"{path}: there is no such file or folder; give {KINDS}")
    return found


def check(data: str) -> None:
    """Refuses a data path that names nothing, as `data.open_source` would.

    Raises:
        FileNotFoundError: If there is nothing.
    """
    path, _ = split_suffix(data)
    if path != "demo":
        matches(path)
