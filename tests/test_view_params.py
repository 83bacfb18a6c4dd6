"""How views are drawn: functions of their keys, with torchvision's distributions."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from view_cases import COLUMN, PLAIN, augment, draw, noise

from bagssl_fast import _C
from bagssl_fast.augment import Augment


def test_philox_known_answers() -> None:
    """kat_vectors of Random123 for philox4x32-10."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    known = [
        ([0] * 4, [0] * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ([ones] * 4, [ones] * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (list(pi), [0xA4093822, 0x299F31D0], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for counter, key, answer in known:
        assert tuple(_C.philox4x32(counter, key)) == answer


def test_a_view_is_a_function_of_its_key() -> None:
    sizes = np.array([[100, 80]] * 6)

    def table(images: list[int], patches: int = 4, seed: int = 7, epoch: int = 1) -> np.ndarray:
        where = sizes[: len(images)]
        return _C.draw_views(
            [augment()], where, np.array(images), patches=patches, seed=seed, epoch=epoch
        )

    all_ = table([0, 1, 2, 3, 4, 5])
    assert np.array_equal(all_[:, [4, 2]], table([4, 2]))  # not of the batch
    assert np.array_equal(all_[:2], table([0, 1, 2, 3, 4, 5], patches=2))
    for other in (
        table([0], seed=8),
        table([0], seed=7 + 2**40),
        table([0], epoch=2),
        table([2**40]),
    ):
        assert not (other == all_[:, :1]).all(axis=-1).any()
    rows = all_.reshape(-1, 16)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_changing_a_probability_moves_no_other_draw() -> None:
    images = [noise(40, 50)] * 20
    a, b = draw(images, 10), draw(images, 10, hflip=0.0, blur_prob=1.0, brightness=0.1)
    same = [i for name, i in COLUMN.items() if name not in ("flip", "sigma", "brightness")]
    assert np.array_equal(a[..., same], b[..., same])


def test_slots_take_their_augments_in_turn() -> None:
    sizes, index = np.array([[64, 64]] * 50), np.arange(50)
    even = Augment.none()
    odd = replace(even, hflip=1, solarize_prob=1, solarize_threshold=77)
    table = _C.draw_views([even, odd], sizes, index, patches=5, seed=0, epoch=0)
    assert (table[0::2, :, 4] == 0).all() and (table[1::2, :, 4] == 1).all()
    assert (table[0::2, :, 12] == 256).all() and (table[1::2, :, 12] == 77).all()


def test_draws_have_the_right_distributions() -> None:
    n = 20_000
    table = draw([noise(300, 400)] * (n // 10), 10, seed=3).reshape(-1, 16).astype(np.float64)
    column = {name: table[:, i] for name, i in COLUMN.items()}
    jittered = column["order"] >= 0

    def uniform(x: np.ndarray, low: float, high: float) -> None:
        """Kolmogorov and Smirnov's distance, at a level of about 1e-4."""
        x = np.sort((x - low) / (high - low))
        assert x[0] >= -1e-3 and x[-1] <= 1 + 1e-3
        grid = np.arange(len(x) + 1) / len(x)
        distance = max((grid[1:] - x).max(), (x - grid[:-1]).max())
        assert distance < 2.2 / math.sqrt(len(x))

    for p, hits in (
        (0.5, column["flip"]), (0.8, jittered), (0.2, column["gray"]),
        (0.3, column["sigma"] > 0), (0.2, column["solarize"] == 100),
    ):  # fmt: skip
        assert abs(hits.mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
    for name in ("brightness", "contrast", "saturation"):
        uniform(column[name][jittered], 0.2, 1.8)
    uniform(column["hue"][jittered], -0.4, 0.4)
    uniform(column["sigma"][column["sigma"] > 0], 0.1, 2.0)
    counts = np.bincount(column["order"][jittered].astype(int), minlength=24)
    expected = jittered.sum() / 24
    assert ((counts - expected) ** 2 / expected).sum() < 60  # chi-square, 23 degrees of freedom

    # Boxes: inside, area and ratio as asked up to the rounding of the sides, corners anywhere.
    top, left, h, w = (column[name] for name in ("top", "left", "height", "width"))
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= 300).all() and (left + w <= 400).all()
    small = h * w < 0.4 * 300 * 400  # below, no box is ever rejected
    uniform((h * w)[small], 0.05 * 300 * 400, 0.4 * 300 * 400)
    uniform(np.log(w / h)[small], math.log(3 / 4) - 0.01, math.log(4 / 3) + 0.01)
    uniform(((top + 0.5) / (300 - h + 1))[small], 0, 1)
    uniform(((left + 0.5) / (400 - w + 1))[small], 0, 1)


def test_boxes_that_never_fit_become_central() -> None:
    wide, tall = noise(10, 100), noise(100, 10)
    options = {"scale": (1, 1), "ratio": (3 / 4, 4 / 3)}
    assert draw([wide, tall], 5, **options)[:, 0, :4].tolist() == [[0, 43, 10, 13]] * 5
    assert draw([wide, tall], 5, **options)[:, 1, :4].tolist() == [[43, 0, 13, 10]] * 5
    assert draw([noise(1, 1)], 5)[:, 0, :4].tolist() == [[0, 0, 1, 1]] * 5


def test_grid_and_center_boxes() -> None:
    sizes = np.array([[100, 200], [32, 32], [1, 1]])
    quarter = Augment(scale=(0.2, 0.3), hflip=1, jitter_prob=1)
    grid = _C.grid_views(quarter, sizes, patches=9)
    assert grid.shape == (9, 3, 16) and (grid[..., 4:] == np.array(PLAIN[4:])).all()
    assert grid[:, 0, 2:4].tolist() == [[71, 71]] * 9
    assert grid[:, 0, :2].tolist() == [[y, x] for y in (0, 15, 29) for x in (0, 65, 129)]
    assert grid[:, 1, :2].tolist() == [[y, x] for y in (0, 8, 16) for x in (0, 8, 16)]
    assert grid[:, 2, :4].tolist() == [[0, 0, 1, 1]] * 9
    assert _C.grid_views(quarter, sizes, patches=1)[0, :, :2].tolist() == [[14, 64], [8, 8], [0, 0]]
    center = _C.center_views(sizes)[0, :, :4].tolist()
    assert center == [[0, 50, 100, 100], [0, 0, 32, 32], [0, 0, 1, 1]]


# ------------------------------------------------------------------------------------- the errors

BAD_AUGMENTS = [
    {"scale": (0.5, 0.2)},
    {"scale": (0, 1)},
    {"scale": (0.1, 2)},
    {"ratio": (0, 1)},
    {"hflip": 1.5},
    {"hue": 0.6},
    {"brightness": -1},
    {"blur_sigma": (0, 1)},
    {"jitter_prob": math.nan},
    {"solarize_threshold": 300},
    {"hue": "strong"},
    {"scale": 0.25},
    {"blur_sigma": (0.1, 1, 2)},
]


@pytest.mark.parametrize("changes", BAD_AUGMENTS, ids=str)
def test_bad_augments_are_named(changes: dict[str, Any]) -> None:
    sizes = np.array([[20, 30]])
    for call in (
        lambda bad: _C.check_augment(bad),
        lambda bad: _C.draw_views([bad], sizes, np.array([0]), patches=1, seed=0, epoch=0),
        lambda bad: _C.grid_views(bad, sizes, patches=1),
    ):
        with pytest.raises(ValueError, match=next(iter(changes))):
            call(augment(**changes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"size": 0}, "patch size is 0 x 0"),
        ({"size": 8.5}, "size must be an integer, got 8.5"),
        ({"interpolation": "nearest"}, "one of bilinear, bicubic, got 'nearest'"),
        ({"interpolation": None}, "interpolation must be bilinear or bicubic, got None"),
        ({"blur_kernel": 4}, "blur_kernel is 4"),
        ({"mean": (0.5, 0.5)}, r"mean must be three numbers, one per channel, got \(0.5, 0.5\)"),
        ({"std": (1, 0, 1)}, "std > 0"),
    ],
)
def test_bad_patches_of_an_augment_are_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _C.check_augment(augment(**changes))


def test_what_is_not_an_augment_is_named() -> None:
    with pytest.raises(TypeError, match="must be an Augment, got an object of type float"):
        _C.check_augment(0.5)


def test_bad_draws_are_named() -> None:
    sizes, index = np.array([[4, 5]]), np.array([0])
    with pytest.raises(ValueError, match="0 x 5"):
        _C.draw_views([augment()], np.array([[0, 5]]), index, patches=1, seed=0, epoch=0)
    with pytest.raises(ValueError, match=r"epoch < 2\^32"):
        _C.draw_views([augment()], sizes, index, patches=1, seed=0, epoch=2**32)
    with pytest.raises(ValueError, match="at least one Augment, got none"):
        _C.draw_views([], sizes, index, patches=1, seed=0, epoch=0)
    with pytest.raises(ValueError, match="images has shape"):
        _C.draw_views([augment()], sizes, np.array([0, 1]), patches=1, seed=0, epoch=0)
    with pytest.raises(ValueError, match="square number"):
        _C.grid_views(augment(), sizes, patches=8)
