"""The pixels of patch views: torchvision's, the same in every implementation, and the errors."""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from view_cases import COLUMN, draw, noise, photo, view_row

from bagssl_fast import _C
from bagssl_fast.ops.reference.patch_views import patch_views as reference_views
from baselines.patch_views import STAGES, torchvision_view

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# The resize of torch's uint8 kernels, which torchvision takes only on these CPUs.
exact_resize = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@functools.cache
def all_colors() -> np.ndarray:
    """Each combination of 40 levels of red, green and blue, the extremes among them."""
    levels = np.linspace(0, 255, 40).round().astype(np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(250, 256, 3)


def ours(image: np.ndarray, row: np.ndarray, size: tuple[int, int], **options: Any) -> np.ndarray:
    options = {"dtype": "uint8", **options}
    return _C.patch_views([image], row[None, None], size=size, **options)[0, 0]


def theirs(
    image: np.ndarray,
    row: np.ndarray,
    size: tuple[int, int],
    interpolation: str = "bilinear",
    blur_kernel: int = 0,
) -> np.ndarray:
    """torchvision's functional ops in sequence on a uint8 tensor."""
    kernel = blur_kernel or _C.auto_blur_kernel(*size)
    x = torch.from_numpy(image).permute(2, 0, 1)
    return torchvision_view(x, row.tolist(), size, interpolation, kernel).permute(1, 2, 0).numpy()


def difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# ------------------------------------------------------------------------- pixels: torchvision's

RESIZES = [
    # image, box (top, left, height, width), out
    ((32, 32), (3, 9, 16, 16), (32, 32)),
    ((32, 32), (0, 0, 32, 32), (32, 32)),
    ((375, 500), (41, 100, 137, 137), (64, 64)),
    ((375, 500), (0, 0, 375, 500), (32, 48)),
    ((375, 500), (374, 499, 1, 1), (8, 8)),
    ((375, 500), (0, 0, 1, 500), (3, 7)),
    ((375, 500), (10, 20, 64, 100), (64, 33)),
    ((375, 500), (10, 20, 100, 33), (64, 33)),
    ((31, 29), (1, 2, 29, 26), (17, 23)),
    ((31, 29), (20, 22, 11, 7), (97, 101)),
    ((1, 1), (0, 0, 1, 1), (1, 1)),
    ((1, 1), (0, 0, 1, 1), (5, 4)),
    ((5, 4), (0, 0, 5, 4), (1, 1)),
]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("flip", [0, 1])
def test_resize_is_torchvisions(interpolation: str, flip: int) -> None:
    for (height, width), box, out in RESIZES:
        for make in (photo, noise):
            image = make(height, width)
            row = view_row(image, flip=flip)
            row[:4] = box
            apart = difference(
                ours(image, row, out, interpolation=interpolation),
                theirs(image, row, out, interpolation),
            )
            assert apart <= (0 if exact_resize else 1), (height, width, box, out)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_is_pillows_within_one(interpolation: str) -> None:
    Image = pytest.importorskip("PIL.Image")
    mode = InterpolationMode(interpolation)
    for (height, width), (top, left, h, w), out in RESIZES:
        image = photo(height, width)
        row = view_row(image)
        row[:4] = (top, left, h, w)
        pil = F.resized_crop(Image.fromarray(image), top, left, h, w, list(out), mode)
        apart = difference(ours(image, row, out, interpolation=interpolation), np.asarray(pil))
        assert apart <= 1, (height, width, out)


COLORS = [
    *({"brightness": x} for x in (0.0, 0.3, 0.999, 1.4, 2.0, 300.0)),
    *({"contrast": x} for x in (0.0, 0.3, 0.999, 1.4, 2.0, 300.0)),
    *({"saturation": x} for x in (0.0, 0.3, 0.999, 1.4, 2.0, 300.0)),
    *({"hue": x} for x in (-0.5, -0.2, -1e-4, 0.0, 1e-4, 1 / 6, 0.37, 0.5)),
]


@pytest.mark.parametrize("columns", COLORS, ids=str)
def test_jitter_is_torchvisions_bit_for_bit(columns: dict[str, float]) -> None:
    # One stage alone, over every kind of color and over pictures that leave a ragged tail.
    for image in (all_colors(), photo(31, 29), noise(1, 1)):
        row = view_row(image, order=0, **columns)
        assert (
            difference(ours(image, row, image.shape[:2]), theirs(image, row, image.shape[:2])) == 0
        )


def test_jitter_orders_are_torchvisions() -> None:
    image = photo(64, 64)
    for order in range(24):
        row = view_row(image, order=order, brightness=1.3, contrast=1.4, saturation=0.6, hue=0.15)
        assert difference(ours(image, row, (64, 64)), theirs(image, row, (64, 64))) == 0, order


def test_hue_of_zero_returns_the_pixels() -> None:
    image = all_colors()
    x = torch.from_numpy(image).permute(2, 0, 1)
    assert torch.equal(F.adjust_hue(x, 0.0), x)  # so that the C++ path may skip it


@pytest.mark.parametrize("image", [all_colors(), noise(31, 29)], ids=["colors", "noise"])
def test_grayscale_and_solarize_are_torchvisions(image: np.ndarray) -> None:
    size = image.shape[:2]
    for columns in ({"gray": 1}, *({"solarize": t} for t in (0, 1, 127.5, 128, 255))):
        row = view_row(image, **columns)
        assert difference(ours(image, row, size), theirs(image, row, size)) == 0, columns


@pytest.mark.parametrize("kernel", [0, 1, 3, 5, 23])
def test_blur_is_torchvisions(kernel: int) -> None:
    for size in ((64, 64), (33, 47), (12, 90)):
        if kernel // 2 >= min(size):
            continue
        for sigma in (0.1, 2.0, 50.0):
            image = photo(*size)
            row = view_row(image, sigma=sigma)
            apart = difference(
                ours(image, row, size, blur_kernel=kernel),
                theirs(image, row, size, "bilinear", kernel),
            )
            assert apart <= 1, (size, sigma)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (17, 23)], ids=str)
def test_pipeline_is_torchvisions(size: tuple[int, int], interpolation: str) -> None:
    images = [photo(32, 32), photo(375, 300, 1), photo(41, 77, 2), noise(50, 30)]
    table = draw(images, patches=20, seed=size[0])
    patches = _C.patch_views(images, table, size=size, interpolation=interpolation, dtype="uint8")
    for p, b in np.ndindex(table.shape[:2]):
        truth = theirs(images[b], table[p, b], size, interpolation)
        assert difference(patches[p, b], truth) <= 1, table[p, b]


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "gray", "hue"])
def test_how_far_pillows_colors_are(name: str) -> None:
    """One level, but for hue: Pillow's has 256 steps, which few saturated colors see as 15."""
    Image = pytest.importorskip("PIL.Image")
    for image in (all_colors(), photo(64, 64)):
        pil = Image.fromarray(image)
        for factor in (0.1, 0.4) if name == "hue" else (0.3, 0.7, 1.4, 1.8):
            if name == "gray":
                row, truth = view_row(image, gray=1), F.rgb_to_grayscale(pil, 3)
            else:
                row = view_row(image, order=0, **{name: factor})
                truth = STAGES[COLUMN[name] - COLUMN["brightness"]](pil, factor)
            apart = difference(ours(image, row, image.shape[:2]), np.asarray(truth))
            assert apart <= (15 if name == "hue" else 1)


# --------------------------------------------------------- pixels: all implementations, all types


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_reference_is_the_same(interpolation: str) -> None:
    images = [photo(60, 90), noise(19, 33), noise(1, 1)]
    table = draw(images, patches=30)
    options: dict[str, Any] = {"size": (20, 24), "interpolation": interpolation}
    options |= {"mean": MEAN, "std": STD}
    tensors = [torch.from_numpy(image) for image in images]
    bytes_apart = difference(
        _C.patch_views(images, table, dtype="uint8", **options),
        reference_views(tensors, torch.from_numpy(table), dtype=torch.uint8, **options)
        .permute(0, 1, 3, 4, 2)
        .numpy(),
    )
    assert bytes_apart <= 1
    expected = reference_views(tensors, torch.from_numpy(table), **options)
    assert expected[0].is_contiguous(memory_format=torch.channels_last)
    actual = torch.from_numpy(_C.patch_views(images, table, **options)).permute(0, 1, 4, 2, 3)
    assert (actual - expected).abs().max() <= 1.01 / 255 / min(STD)
    assert (actual == expected).double().mean() > 0.999


@pytest.mark.parametrize("size", [(32, 32), (13, 21), (1, 1), (2, 9)], ids=str)
def test_simd_levels_agree_bitwise(size: tuple[int, int], simd_level: str) -> None:
    images = [photo(60, 90), noise(19, 33), noise(1, 1)]
    table = draw(images, patches=40, blur_prob=0.3 if min(size) > 1 else 0)
    for interpolation, dtype in (("bilinear", "float32"), ("bicubic", "uint8")):
        options: dict[str, Any] = {"size": size, "interpolation": interpolation, "dtype": dtype}
        _C.force_simd_level(simd_level)
        actual = _C.patch_views(images, table, **options)
        _C.force_simd_level("baseline")
        assert np.array_equal(actual, _C.patch_views(images, table, **options))


def test_float32_is_torchvisions_normalize() -> None:
    image = noise(64, 64)
    row = view_row(image)
    patch = ours(image, row, (64, 64), dtype="float32", mean=MEAN, std=STD)
    x = F.to_dtype(torch.from_numpy(image).permute(2, 0, 1), torch.float32, scale=True)
    truth = F.normalize(x, list(MEAN), list(STD)).permute(1, 2, 0)
    assert torch.allclose(torch.from_numpy(patch), truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("std", [STD, (1e-3, 1e4, 3e7)], ids=str)
def test_half_types_are_float32_rounded(std: tuple[float, float, float]) -> None:
    image = noise(64, 64)  # large and tiny std reach float16's infinity and subnormals
    row = view_row(image)
    full = torch.from_numpy(ours(image, row, (64, 64), dtype="float32", mean=MEAN, std=std))
    half = torch.from_numpy(ours(image, row, (64, 64), dtype="float16", mean=MEAN, std=std))
    bits = ours(image, row, (64, 64), dtype="bfloat16", mean=MEAN, std=std)
    assert torch.equal(half, full.half())
    assert torch.equal(torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), full.bfloat16())


def test_threads_change_nothing() -> None:
    images = [photo(40 + i, 60) for i in range(9)]
    table = draw(images, patches=7)
    one = _C.patch_views(images, table, size=(16, 24))
    for num_threads in (2, 3, 0):
        assert np.array_equal(
            one, _C.patch_views(images, table, size=(16, 24), num_threads=num_threads)
        )


def test_out_is_filled_and_strided_images_are_read() -> None:
    image = photo(60, 90)
    table = draw([image[:, 10:50]], patches=3)
    packed = _C.patch_views([np.ascontiguousarray(image[:, 10:50])], table, size=(16, 16))
    out = np.full((3, 1, 16, 16, 3), np.nan, dtype=np.float32)
    result = _C.patch_views([image[:, 10:50]], table, size=(16, 16), out=out)
    assert result is out and np.array_equal(out, packed)
    assert _C.patch_views([], table[:, :0], size=(16, 16)).shape == (3, 0, 16, 16, 3)


# ------------------------------------------------------------------------------------- the errors

BAD_COLUMNS = [
    ({"top": 1}, "no box of whole pixels inside the image of 20 x 30"),
    ({"left": -1}, "no box"),
    ({"height": 0}, "no box"),
    ({"width": 2.5}, "no box"),
    ({"top": math.nan}, "no box"),
    ({"width": math.inf}, "no box"),
    ({"flip": 2}, "flip"),
    ({"gray": math.nan}, "grayscale"),
    ({"order": 24}, "order"),
    ({"order": 0.5}, "order"),
    ({"order": 0, "brightness": -0.1}, "brightness"),
    ({"order": 0, "contrast": math.nan}, "contrast"),
    ({"order": 0, "saturation": math.inf}, "saturation"),
    ({"order": 0, "hue": 0.6}, "hue"),
    ({"sigma": -1}, "blur_sigma"),
    ({"sigma": math.nan}, "blur_sigma"),
    ({"solarize": math.nan}, "solarize"),
    ({"solarize": -1}, "solarize"),
]


@pytest.mark.parametrize(("columns", "text"), BAD_COLUMNS, ids=str)
def test_bad_parameters_are_named(columns: dict[str, float], text: str) -> None:
    image = noise(20, 30)
    with pytest.raises(ValueError, match=text):
        ours(image, view_row(image, **columns), (8, 8))


def test_a_blur_wider_than_the_patch_is_an_error_as_in_torchvision() -> None:
    image = noise(20, 30)
    row = view_row(image, sigma=1)
    ours(image, row, (4, 4), blur_kernel=7)
    with pytest.raises(ValueError, match="smaller blur_kernel"):
        ours(image, row, (3, 9), blur_kernel=7)
    with pytest.raises(RuntimeError):
        theirs(image, row, (3, 9), blur_kernel=7)


BAD_OPTIONS = [
    ({"size": (0, 8)}, "patch size"),
    ({"interpolation": "nearest"}, "one of bilinear, bicubic, got 'nearest'"),
    ({"blur_kernel": 4}, "odd"),
    ({"blur_kernel": -3}, "odd"),
    ({"std": (1, 0, 1)}, "std > 0"),
    ({"mean": (0, math.nan, 0)}, "mean"),
    ({"dtype": "float64"}, "float32"),
    ({"out": np.zeros((1, 1, 8, 8, 3), np.float64)}, "out is float64"),
    ({"out": np.zeros((1, 2, 8, 8, 3), np.float32)}, "expected contiguous"),
    ({"images": [np.zeros((20, 30), np.uint8)]}, r"expected uint8 \[H, W, 3\]"),
    ({"images": [np.zeros((20, 30, 3), np.float32)]}, "float32"),
    ({"images": [np.zeros((3, 20, 30), np.uint8).transpose(1, 2, 0)]}, "contiguous"),
    ({"images": [np.zeros((0, 30, 3), np.uint8)]}, "uint8"),
    ({"params": np.zeros((1, 2, 16), np.float32)}, r"expected \[P, B, 16\]"),
]


@pytest.mark.parametrize(("changes", "text"), BAD_OPTIONS, ids=lambda x: str(x)[:40])
def test_bad_options_are_named(changes: dict[str, Any], text: str) -> None:
    image = noise(20, 30)
    call = {"images": [image], "params": view_row(image)[None, None], "size": (8, 8), **changes}
    with pytest.raises(ValueError, match=text):
        _C.patch_views(call.pop("images"), call.pop("params"), **call)
