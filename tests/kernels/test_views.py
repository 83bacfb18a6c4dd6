"""patch_views in the interpreter: the pixels of the reference."""

import pytest
import torch
from bagssl_fast.kernels.patch_views import patch_views, ragged
from torch import Tensor

from bagssl_fast.ops.reference.patch_views import patch_views as reference

STATISTICS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
PLAIN = {"mean": [0.0] * 3, "std": [1.0] * 3, "dtype": torch.uint8}


def photos(sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Smooth images with some noise, uint8 [h, w, 3]."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for size in sizes:
        coarse = torch.rand(1, 3, 5, 5, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
        noisy = 255 * smooth + 12 * torch.randn(smooth.shape, generator=generator)
        images.append(noisy.clamp(0, 255).byte()[0].permute(1, 2, 0).contiguous())
    return images


def table(num_slots: int, sizes: list[tuple[int, int]], **columns: float) -> Tensor:
    """Whole images without augmentation, but for the named columns."""
    names = "top left height width flip brightness contrast saturation hue order grayscale"
    names += " blur solarize"
    params = torch.zeros(num_slots, len(sizes), 16)
    params[..., 2:4] = torch.tensor(sizes, dtype=torch.float32)
    params[..., 5:8] = 1.0
    params[..., 9] = -1
    params[..., 12] = 256
    for name, value in columns.items():
        params[..., names.split().index(name)] = value
    return params


def draw(num_slots: int, sizes: list[tuple[int, int]], blurs: bool = True) -> Tensor:
    """Everything at random."""
    generator = torch.Generator().manual_seed(1)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num_slots, len(sizes), generator=generator)

    params = table(num_slots, sizes)
    sides = params[..., 2:4].clone()
    params[..., 2] = (sides[..., 0] * uniform(0.3, 1.0)).floor().clamp(min=1)
    params[..., 3] = (sides[..., 1] * uniform(0.3, 1.0)).floor().clamp(min=1)
    params[..., 0] = ((sides[..., 0] - params[..., 2]) * uniform(0, 1)).floor()
    params[..., 1] = ((sides[..., 1] - params[..., 3]) * uniform(0, 1)).floor()
    params[..., 4] = uniform(0, 2).floor()
    for column in (5, 6, 7):
        params[..., column] = uniform(0.6, 1.4)
    params[..., 8] = uniform(-0.2, 0.2)
    params[..., 9] = uniform(-1, 24).floor()
    params[..., 10] = (uniform(0, 1) < 0.2).float()
    params[..., 11] = uniform(0.1, 2.0) * (uniform(0, 1) < 0.5) * blurs
    params[..., 12] = torch.where(uniform(0, 1) < 0.3, uniform(0, 255), torch.tensor(256.0))
    return params


def difference(images: list[Tensor], params: Tensor, **options) -> Tensor:
    options = {**PLAIN, **options}
    actual = patch_views(images, params, **options)
    expected = reference(images, params, **options)
    assert actual.shape == expected.shape and actual.stride() == expected.stride()
    return (actual.int() - expected.int()).abs()


@pytest.mark.parametrize(
    ("size", "interpolation", "columns"),
    [
        (16, "bilinear", {}),  # shrunk in one direction, grown in the other
        ((9, 21), "bicubic", {}),
        ((30, 12), "bilinear", {"flip": 1}),  # no change of size
        (7, "bicubic", {"top": 3, "left": 2, "height": 1, "width": 1}),  # one pixel
        (16, "bilinear", {"order": 0, "brightness": 1.3}),
        (16, "bilinear", {"order": 5, "contrast": 0.5}),
        (16, "bilinear", {"order": 5, "saturation": 1.7}),
        (16, "bilinear", {"order": 5, "hue": 0.3}),
        (16, "bilinear", {"grayscale": 1}),
        (16, "bilinear", {"solarize": 100.5}),
    ],
    ids=str,
)
def test_each_stage_bit_for_bit(size, interpolation, columns):
    sizes = [(30, 12)]
    params = table(1, sizes, **columns)
    assert difference(photos(sizes), params, size=size, interpolation=interpolation).max() == 0


def test_every_order_of_the_jitter():
    sizes = [(10, 10)]
    params = table(24, sizes, brightness=1.2, contrast=1.4, saturation=0.5, hue=-0.1)
    params[:, 0, 9] = torch.arange(24)
    assert difference(photos(sizes), params, size=6).max() == 0


@pytest.mark.parametrize("kernel", [0, 9])
def test_blur(kernel):
    sizes = [(20, 20)]
    params = table(1, sizes, blur=1.3)
    wrong = difference(photos(sizes), params, size=(17, 20), blur_kernel=kernel)
    assert wrong.max() <= 1 and (wrong > 0).double().mean() < 0.002  # ties


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_everything_at_once(interpolation):
    sizes = [(40, 33), (19, 57)]
    wrong = difference(photos(sizes), draw(4, sizes), size=20, interpolation=interpolation)
    assert wrong.max() <= 1 and (wrong > 0).double().mean() < 0.002
    sharp = draw(3, sizes, blurs=False)
    assert difference(photos(sizes), sharp, size=13, interpolation=interpolation).max() == 0


def test_patches_of_several_tiles():
    sizes = [(80, 90), (33, 120)]
    params = draw(3, sizes)
    params[0, 0, 11] = 1.0  # a blur over the seams
    params[1, 0, 9] = -1  # straight to the result
    params[1, 0, 11] = 0
    wrong = difference(photos(sizes), params, size=(66, 70))
    assert wrong.max() <= 1 and (wrong > 0).double().mean() < 0.002


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
def test_normalized(dtype):
    sizes = [(21, 18), (18, 21)]
    images, params = photos(sizes), draw(2, sizes, blurs=False)
    options = {"size": 8, **STATISTICS, "dtype": dtype}
    assert torch.equal(patch_views(images, params, **options), reference(images, params, **options))


def test_one_buffer_whatever_the_container():
    images = torch.stack(photos([(12, 14)] * 3))
    params = draw(2, [(12, 14)] * 3, blurs=False)
    options = {"size": 6, **PLAIN}
    expected = patch_views(images, params, **options)
    assert torch.equal(patch_views(list(images), params, **options), expected)
    assert torch.equal(patch_views(ragged(list(images)), params, **options), expected)
    four = tuple(torch.cat([images, images[:1]]))  # as many as a ragged batch has tensors
    again = torch.cat([params, params[:, :1]], 1)
    assert torch.equal(patch_views(four, again, **options)[:, :3], expected)
    flipped = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(patch_views(flipped, params, **options), expected)
    assert torch.equal(patch_views(images, params, **options), expected)
    assert patch_views(images, params[:0], **options).shape == (0, 3, 3, 6, 6)
    halves = [patch_views(images[b : b + 1], params[:, b : b + 1], **options) for b in range(3)]
    assert torch.equal(torch.cat(halves, dim=1), expected)


@pytest.mark.parametrize(
    ("options", "columns", "message"),
    [
        ({"size": 0}, {}, "size = 0"),
        ({"interpolation": "nearest"}, {}, "interpolation = 'nearest'"),
        ({"blur_kernel": 4}, {}, "blur_kernel = 4"),
        ({"std": [1.0, 0.0, 1.0]}, {}, "positive stds"),
        ({"dtype": torch.int32}, {}, "dtype = torch.int32"),
        ({}, {"top": 5}, r"params\[0, 0\].*whole boxes inside the image"),
        ({}, {"height": 0.5}, "whole boxes"),
        ({}, {"order": 24}, "jitter, blur, solarize in range"),
        ({}, {"order": 3, "hue": 0.6}, "in range"),
        ({"blur_kernel": 17}, {"blur": 1.0}, "a blur kernel of 17"),
    ],
)
def test_bad_input_names_the_how_to_fix(options, columns, message):
    sizes = [(12, 14)]
    with pytest.raises(ValueError, match=message) as error:
        patch_views(photos(sizes), table(1, sizes, **columns), **{**PLAIN, "size": 8, **options})
    assert 'impl="reference"' in str(error.value)


def test_bad_images():
    params = table(1, [(12, 14)])
    for images, message in [
        (torch.zeros(1, 12, 14, 3), "dtype torch.float32"),
        (torch.zeros(1, 12, 14, 1, dtype=torch.uint8), "RGB"),
        (torch.zeros(12, 14, 3, dtype=torch.uint8), "shape"),
        ([], "no images"),
        (torch.zeros(2, 12, 14, 3, dtype=torch.uint8), r"params of shape \[1, 1, 16\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            patch_views(images, params, size=8, **PLAIN)


def test_images_that_a_loader_hands_over():
    import numpy as np

    from bagssl_fast import ops
    from bagssl_fast.augment import Augment
    from bagssl_fast.data import BagLoader, Output, Threads

    images = torch.stack(photos([(20, 26)] * 3)).numpy()
    options = {"batch_size": 3, "patches": 2, "augment": Augment(size=8), "threads": Threads(1)}
    kinds = [BagLoader(np.ascontiguousarray(images), output=Output("uint8", views), **options)
             for views in ("host", "device")]  # fmt: skip
    with kinds[0] as host, kinds[1] as device:
        expected, batch = next(iter(host)).patches, next(iter(device))
        actual = ops.patch_views(batch.images, batch.params, **batch.options, impl="cuda")
    wrong = (actual.int() - expected.int()).abs()
    assert wrong.max() <= 1 and (wrong > 0).double().mean() < 0.01
    with pytest.raises(ValueError, match="offsets int64"):
        patch_views(batch.images._replace(offsets=batch.images.heights), batch.params, size=8,
                    **PLAIN)  # fmt: skip
