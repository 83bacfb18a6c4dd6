"""The images of an evaluation: training set, test set, and how the latter is found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bagssl_fast.config import Config
from bagssl_fast.data import Source, open_source


@dataclass(frozen=True)
class Data:
    """The images of an evaluation; `indices` is None for all of a source."""

    train: Source
    train_indices: Tensor | None
    test: Source
    test_indices: Tensor | None
    note: str

    @property
    def labeled(self) -> bool:
        return self.train.labels is not None and self.test.labels is not None


def open_data(config: Config, trained_on: str | None) -> Data:
    """Finds the images: `test_data`, else the set that the name points to, else a held-out part.

    Args:
        config: Names the images.
        trained_on: The images that the encoder was trained on, None where that is not known.

    Raises:
        ValueError, OSError: If they cannot be opened, or their classes differ.
    """
    options: dict[str, Any] = {"on_error": config.loader.on_error, "labels": config.labels}
    train = open_source(config.data, **options)
    limit, test_limit = config.eval.max_train_images, config.eval.max_test_images
    found = config.test_data or find_test_data(config.data)
    generator = torch.Generator().manual_seed(config.seed)
    if found is not None:
        test = open_source(found, **options)
        if train.labels is not None and test.labels is not None and train.classes != test.classes:
            raise ValueError(
                f"{found} has other classes than {config.data}: {test.classes} and "
                f"{train.classes}; name the right one with --test_data"
            )
        how = "" if config.test_data else " (found by its name)"
        picked = subset(len(train), limit, generator), subset(len(test), test_limit, generator)
        note = f"trained on {config.data}, tested on {found}{how}"
        if trained_on != config.data:
            note = f"probes {note}; encoder trained on {trained_on or 'other images'}"
        return Data(train, picked[0], test, picked[1], note)
    order = torch.randperm(len(train), generator=generator)
    cut = max(1, round(len(train) * config.eval.test_fraction))
    held, kept = order[:cut], order[cut:]
    if len(kept) == 0:
        raise ValueError(
            f"{config.data}: {len(train)} image is too few to hold some out for testing; name a "
            "test set with --test_data"
        )
    seen = "the encoder has seen them, without labels"
    if trained_on != config.data:
        seen = f"the encoder was trained on {trained_on or 'other images'}"
    note = (
        f"no test set beside {config.data}: {len(held)} of its images are held out from the probes "
        f"({seen}); name a test set with --test_data"
    )
    held = held[: test_limit or None].sort().values
    return Data(train, kept[: limit or None].sort().values, train, held, note)


def find_test_data(data: str) -> str | None:
    """The test set that a training set's name points to, if it is there.

    `x-train.tar` -> `x-test.tar` (also val), a folder `train` -> `test` or `val` beside it, and the
    other split of the sets that have their own (demo, CIFAR, MNIST, MedMNIST's .npz).
    """
    if data.endswith(":train"):
        return data.removesuffix("train") + "test"
    if data == "demo":
        return "demo:test"
    path = Path(data)
    for word in ("test", "val"):
        name = path.name.replace("train", word)
        if name != path.name and path.with_name(name).exists():
            return str(path.with_name(name))
    if path.is_dir() or path.suffix == ".npz":
        try:
            open_source(f"{data}:test")
        except (ValueError, OSError):
            return None
        return f"{data}:test"
    return None


def subset(size: int, limit: int, generator: torch.Generator) -> Tensor | None:
    """At most `limit` indices drawn from `size`, in order; None for all of them."""
    if limit <= 0 or limit >= size:
        return None
    return torch.randperm(size, generator=generator)[:limit].sort().values


def count(source: Source, indices: Tensor | None) -> int:
    """Number of images."""
    return len(source) if indices is None else len(indices)
