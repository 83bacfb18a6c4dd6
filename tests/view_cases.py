"""Pictures and views that the tests of patch views share."""

from typing import Any

import numpy as np
import pytest

from bagssl_fast import _C
from bagssl_fast.augment import Augment

PLAIN = [0, 0, 0, 0, 0, 1, 1, 1, 0, -1, 0, 0, 256, 0, 0, 0]
NAMES = "top left height width flip brightness contrast saturation hue order gray sigma solarize"
COLUMN = {name: i for i, name in enumerate(NAMES.split())}


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    data = pytest.importorskip("skimage.data")
    image = (data.astronaut(), data.coffee(), data.chelsea())[seed % 3]
    return np.ascontiguousarray(image[:height, :width])


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def view_row(image: np.ndarray, **columns: float) -> np.ndarray:
    row = np.array(PLAIN, dtype=np.float32)
    row[2:4] = image.shape[:2]
    for name, value in columns.items():
        row[COLUMN[name]] = value
    return row


def augment(**changes: Any) -> Augment:
    everything = {
        "scale": (0.05, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5, "brightness": 0.8,
        "contrast": 0.8, "saturation": 0.8, "hue": 0.4, "jitter_prob": 0.8, "grayscale_prob": 0.2,
        "blur_prob": 0.3, "solarize_prob": 0.2, "solarize_threshold": 100,
    }  # fmt: skip
    return Augment(**{**everything, **changes})


def draw(images: list[np.ndarray], patches: int, seed: int = 0, **changes: Any) -> np.ndarray:
    sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)
    index = np.arange(len(images))
    return _C.draw_views([augment(**changes)], sizes, index, patches=patches, seed=seed, epoch=0)
