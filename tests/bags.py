"""Small loaders, and how their epochs are compared."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from pictures import noise
from PIL import Image

from bagssl_fast.augment import Augment
from bagssl_fast.data import BagLoader, Decoding, Order, Output, Share, Threads

AUGMENT = Augment(size=8, blur_kernel=3)
PLAIN = Augment.none(size=8, scale=(0.3, 0.9), ratio=(0.7, 1.4))


def write_folder(root: Path) -> Path:
    """24 JPEGs and PNGs of 20 x 26 in three classes."""
    for i, pixels in enumerate(noise()):
        path = root / "abc"[i % 3] / f"{i:02d}.{'png' if i % 4 == 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


def grouped(**options) -> dict[str, Any]:
    """Arguments of a BagLoader, those of its records given by the names of their fields."""
    records = {
        "order": Order, "share": Share, "output": Output, "decoding": Decoding, "threads": Threads,
    }  # fmt: skip
    for argument, record in records.items():
        names = {field.name for field in fields(record)} & options.keys()
        if names:
            options[argument] = record(**{name: options.pop(name) for name in names})
    return options


def make(source, **options) -> BagLoader:
    defaults = {"batch_size": 4, "patches": 3, "augment": AUGMENT, "num_threads": 2}
    return BagLoader(source, **grouped(**{**defaults, **options}))


def bags(loader: BagLoader) -> dict[int, torch.Tensor]:
    """One epoch's bags by index."""
    result = {}
    for batch in loader:
        for row, index in enumerate(batch.index.tolist()):
            assert index not in result
            result[index] = batch.patches[:, row].clone()
    return result


def same(one: dict[int, torch.Tensor], other: dict[int, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for index, bag in one.items():
        torch.testing.assert_close(bag, other[index], rtol=0, atol=0)
