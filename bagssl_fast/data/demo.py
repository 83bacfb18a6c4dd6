"""The built-in demo set: tiles of the photographs inside scikit-image's wheel."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bagssl_fast.data.arrays import make_source
from bagssl_fast.data.source import Source

PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
)
TILE = 48
TRAIN_TILES, TEST_TILES = 240, 60  # per photograph

# Photographs are cut into blocks; every fourth is for testing, no tile is in two blocks.
_BLOCK = 96


def open_demo(split: str) -> Source:
    """One class per photograph; training and test tiles have no pixel in common."""
    folder = _photograph_folder()
    count = TRAIN_TILES if split == "train" else TEST_TILES
    tiles = []
    for number, name in enumerate(PHOTOGRAPHS):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: this version of scikit-image does not have the photograph: "
                "pip install -U scikit-image"
            )
        photograph = np.asarray(Image.open(path).convert("RGB"))
        tiles.append(_cut_tiles(photograph, count, number, is_test=split == "test"))
    labels = np.repeat(np.arange(len(PHOTOGRAPHS)), count)
    classes = [name.rsplit(".", 1)[0] for name in PHOTOGRAPHS]
    return make_source(np.concatenate(tiles), labels, classes, f"demo:{split}")


def _photograph_folder() -> Path:
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the demo set needs scikit-image's photographs: pip install scikit-image, or use a "
            "data set of your own with --data"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def _cut_tiles(
    photograph: NDArray[np.uint8], count: int, number: int, is_test: bool
) -> NDArray[np.uint8]:
    """`count` tiles [count, TILE, TILE, 3] at fixed, scattered positions in the split's blocks."""
    rows, columns = photograph.shape[0] // _BLOCK, photograph.shape[1] // _BLOCK
    blocks = [
        (y, x) for y in range(rows) for x in range(columns) if ((x + 2 * y) % 4 == 1) == is_test
    ]
    # Raw bits of a counter-based generator: the same positions with every version of numpy.
    bits = np.random.Philox(key=[number, int(is_test)]).random_raw(2 * count)
    shifts = (bits % np.uint64(_BLOCK - TILE + 1)).astype(np.int64).reshape(count, 2)
    tiles = np.empty((count, TILE, TILE, 3), photograph.dtype)
    for i, (dy, dx) in enumerate(shifts):
        y, x = blocks[i % len(blocks)]
        top, left = y * _BLOCK + dy, x * _BLOCK + dx
        tiles[i] = photograph[top : top + TILE, left : left + TILE]
    return tiles
