"""patch_embed: unfold + linear, any positions, bad input."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_matches
from torch import Tensor

from bagssl_fast import ops
from bagssl_fast.ops.cpu import patch_embed_grid
from bagssl_fast.ops.reference.patch_embed import patch_embed as reference

IMPLS = ("reference", "cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def operands(
    batch: int = 3, height: int = 9, width: int = 11, out_dim: int = 5, patch=(4, 3)
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, height, width, 3), generator=generator)
    weight = torch.randn(out_dim, 3, *patch, generator=generator, dtype=torch.float64)
    bias = torch.randn(out_dim, generator=generator, dtype=torch.float64)
    return images.to(torch.uint8), weight, bias


def grid(tops: Tensor, lefts: Tensor) -> Tensor:
    return torch.cartesian_prod(tops, lefts)


def unfold_linear(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """All positions, row-major, [P, B, M], as people write it today."""
    pixels = images.permute(0, 3, 1, 2).double() / 255
    pixels = (pixels - pixels.new_tensor(MEAN)[:, None, None]) / pixels.new_tensor(STD)[
        :, None, None
    ]
    columns = F.unfold(pixels, weight.shape[2:])  # [B, C h w, L]
    return F.linear(columns.permute(2, 0, 1), weight.flatten(1), bias)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_position_is_unfold_and_linear(impl):
    images, weight, bias = operands()
    positions = grid(torch.arange(6), torch.arange(9))
    actual = ops.patch_embed(images, weight, bias, positions, mean=MEAN, std=STD, impl=impl)
    assert_matches(actual, unfold_linear(images, weight, bias), torch.float64, "y")


@pytest.mark.parametrize("impl", IMPLS)
def test_positions_of_each_image_are_its_own(impl):
    images, weight, bias = operands()
    generator = torch.Generator().manual_seed(1)
    positions = torch.stack(
        [
            torch.randint(0, 6, (7, 3), generator=generator),
            torch.randint(0, 9, (7, 3), generator=generator),
        ],
        dim=2,
    )
    actual = ops.patch_embed(images, weight, bias, positions, mean=MEAN, std=STD, impl=impl)
    everywhere = unfold_linear(images, weight, bias)  # [54, B, M]
    index = positions[..., 0] * 9 + positions[..., 1]
    assert_matches(actual, everywhere[index, torch.arange(3)], torch.float64, "y")


def most(positions: Tensor) -> Tensor:
    """Four fifths of the positions, in no order."""
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(0))
    return positions[order[: len(order) * 4 // 5]]


GRIDS = {
    "anywhere": ((18, 20), 17, (8, 8), most(grid(torch.arange(11), torch.arange(13)))),
    "uneven": ((16, 18), 3, (9, 12), grid(torch.tensor([0, 2, 3]), torch.tensor([1, 2, 4, 5, 6]))),
    "several blocks": ((10, 60), 16, (8, 8), most(grid(torch.arange(3), torch.arange(53)))),
    "one row": ((12, 40), 9, (8, 8), grid(torch.tensor([3]), torch.arange(33))),
}
WAYS = {  # dtype, ReLU
    "float64": (torch.float64, False),
    "float32": (torch.float32, True),
    "float16": (torch.float16, False),
}


@pytest.mark.parametrize(("dtype", "relu"), WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize(("size", "out_dim", "patch", "positions"), GRIDS.values(), ids=GRIDS)
def test_spectra_give_what_patches_give(size, out_dim, patch, positions, dtype, relu, simd_level):
    images, weight, bias = operands(21, *size, out_dim=out_dim, patch=patch)
    weight, bias = (weight / weight[0].numel() ** 0.5).to(dtype), bias.to(dtype)
    assert patch_embed_grid.worthwhile(weight, positions, len(images)) is not None
    # What rounding makes of a result near zero decides on its whole gradient: such have none.
    exact = reference(images, weight.double(), bias.double(), positions, mean=MEAN, std=STD)
    dy = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    dy *= exact.abs() > 1e-3

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (weight, bias)]
        y = ops.patch_embed(images, *inputs, positions, mean=MEAN, std=STD, relu=relu, impl=impl)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(dtype))]

    actual = run("cpu", dtype)
    expected = run("reference", torch.float64)
    for name, x, truth in zip(("y", "dweight", "dbias"), actual, expected, strict=True):
        assert_matches(x, truth, dtype, name)


def test_gradcheck_of_the_reference():
    images, weight, bias = operands(batch=2, out_dim=2)
    positions = torch.tensor([[0, 0], [5, 8], [2, 3]])

    def run(weight: Tensor, bias: Tensor) -> Tensor:
        return reference(images, weight, bias, positions, mean=MEAN, std=STD)

    assert torch.autograd.gradcheck(run, (weight.requires_grad_(), bias.requires_grad_()))


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_embed_is_empty(impl):
    images, weight, bias = operands()
    weight.requires_grad_()
    none = torch.zeros(0, 2, dtype=torch.int64)
    y = ops.patch_embed(images, weight, bias, none, mean=MEAN, std=STD, impl=impl)
    assert y.shape == (0, 3, 5)
    (dw,) = torch.autograd.grad(y.sum(), weight)
    assert torch.equal(dw, torch.zeros_like(weight))
    somewhere = torch.zeros(2, 2, dtype=torch.int64)
    y = ops.patch_embed(images[:0], weight, bias, somewhere, mean=MEAN, std=STD, impl=impl)
    assert y.shape == (2, 0, 5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 9, 11, 3)}, "images is torch.float32, supported are uint8"),
        ({"images": torch.zeros(3, 9, 11, dtype=torch.uint8)}, r"\[B, H, W, C\]"),
        ({"images": torch.zeros(3, 9, 11, 1, dtype=torch.uint8)}, "1 channels, weight 3"),
        ({"images": torch.zeros(3, 3, 11, 3, dtype=torch.uint8)}, "does not fit"),
        ({"bias": torch.zeros(4)}, r"bias is \[4\], expected \[5\]"),
        ({"positions": torch.tensor([[0.0, 1.0]])}, "torch.float32, supported are int64"),
        ({"positions": torch.tensor([[6, 0]])}, r"expected from 0 to \(5, 8\)"),
        ({"positions": torch.tensor([[-1, 0]])}, "reach from -1"),
        ({"positions": torch.zeros(4, 2, 2, dtype=torch.int64)}, r"\[P, 3, 2\]"),
        ({"mean": (0.5,)}, "mean 1"),
    ],
)
def test_bad_input_is_named(change, message, impl):
    images, weight, bias = operands()
    call = {
        "images": images,
        "weight": weight,
        "bias": bias,
        "positions": torch.tensor([[0, 0]]),
        "mean": MEAN,
        "std": STD,
        **change,
    }
    with pytest.raises(ValueError, match=f"patch_embed: .*{message}"):
        ops.patch_embed(**call, impl=impl)
