"""patch_embed and linear_bn_relu in the interpreter against the float64 reference."""

import pytest
import torch
from bagssl_fast.kernels import linear_bn_relu as block
from bagssl_fast.kernels import patch_embed as embed
from tolerances import assert_matches
from torch import Tensor

from bagssl_fast.ops.reference.linear_bn_relu import linear_bn_relu as block_ref
from bagssl_fast.ops.reference.patch_embed import patch_embed as embed_ref

DTYPES = [torch.float32, torch.float16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def scattered(limit: tuple[int, int], *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    axes = [torch.randint(0, n + 1, shape, generator=generator) for n in limit]
    return torch.stack(axes, dim=-1)


def embed_case(batch, height, width, channels, out_dim, patch, relu, bias=True, double=False):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, height, width, channels), generator=generator).byte()
    depth = channels * patch[0] * patch[1]
    weight = normal(out_dim, channels, *patch) / depth**0.5
    statistics = {"mean": [0.5, 0.45, 0.4][:channels], "std": [0.2, 0.25, 0.3][:channels]}
    return images, weight, normal(out_dim, seed=1) if bias else None, {**statistics, "relu": relu}


def run(op, parameters: dict[str, Tensor], call) -> dict[str, Tensor]:
    """The result and every parameter's gradient by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in parameters.items()}
    out = call(op, leaves)
    loss = (normal(*out.shape, seed=2).to(out) * out).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


def compare(actual: dict[str, Tensor], truth: dict[str, Tensor], rough: dict[str, Tensor]) -> None:
    """Within the tolerances, or within twice what torch loses by the same roundings (`rough`)."""
    for name, expected in truth.items():
        if actual[name].dtype == torch.float32:
            assert_matches(actual[name], expected, torch.float32, name, slack=2)
            continue
        error = (actual[name].double() - expected).abs()
        allowed = (rough[name].double() - expected).abs()
        scale = expected.abs().max().clamp_min(1e-8)
        assert error.norm() <= 2 * allowed.norm() + 1e-3 * expected.norm(), name
        assert error.max() <= 2 * allowed.max() + 2e-3 * scale, name


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("patches", "per_image", "case"),
    [
        (1, False, (1, 1, 1, 1, 1, (1, 1), False)),
        (3, True, (2, 9, 11, 3, 5, (4, 5), False)),  # primes, each image its own positions
        (33, False, (2, 12, 13, 3, 65, (5, 3), True)),  # a row tile and two, a column tile and one
        (4, True, (16, 12, 12, 1, 63, (12, 12), True, False)),  # a whole image, no bias
    ],
    ids=str,
)
def test_patch_embed(patches, per_image, case, dtype):
    images, weight, bias, options = embed_case(*case)
    limit = (images.shape[1] - weight.shape[2], images.shape[2] - weight.shape[3])
    positions = scattered(limit, patches, *([images.shape[0]] if per_image else []))
    parameters = {"weight": weight.to(dtype)} | ({} if bias is None else {"bias": bias.to(dtype)})

    def call(op, leaves):
        return op(images, leaves["weight"], leaves.get("bias"), positions, **options)

    actual = run(embed.patch_embed, parameters, call)
    truth = run(embed_ref, {n: x.double() for n, x in parameters.items()}, call)
    assert actual["out"].dtype == dtype
    # The ReLU of a half-precision result may cut where the truth does not: the rough run as well.
    rough = run(embed_ref, parameters, call)
    compare(actual, truth, rough)
    again = run(embed.patch_embed, parameters, call)
    assert all(torch.equal(again[name], actual[name]) for name in actual)


def test_patch_embed_takes_any_layout_and_no_patches():
    images, weight, bias, options = embed_case(2, 9, 11, 3, 5, (4, 5), False)
    positions = scattered((5, 6), 4)
    expected = embed.patch_embed(images, weight.float(), bias.float(), positions, **options)
    strided = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    columns = positions.t().contiguous().t()
    for other in (
        (strided, weight.float(), bias.float(), columns),
        (images.repeat(1, 1, 2, 1)[:, :, :11], weight.float(), bias.float(), positions.int()),
        (images, weight.float().mT.contiguous().mT, bias.float(), positions),
    ):
        assert torch.equal(embed.patch_embed(*other, **options), expected)
    weight = weight.float().requires_grad_()
    empty = embed.patch_embed(images, weight, None, positions[:0], **options)
    assert empty.shape == (0, 2, 5)
    (dweight,) = torch.autograd.grad(empty.sum(), weight)
    assert torch.equal(dweight, torch.zeros_like(weight))


def block_case(rows: tuple[int, ...], depth: int, width: int) -> dict[str, Tensor]:
    return {
        "x": normal(*rows, depth) + 0.2,
        "weight": normal(width, depth, seed=1) / depth**0.5,
        "gamma": 1 + 0.2 * normal(width, seed=2),
        "beta": normal(width, seed=3),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("rows", "depth", "width", "options"),
    [
        ((3,), 3, 1, {"training": True}),
        ((3, 7), 5, 31, {"training": True, "momentum": 0.3}),
        ((129,), 6, 65, {"training": True}),  # two strips and a row, two column tiles and one
        ((17,), 6, 33, {"training": True, "relu": False}),
        ((3, 7), 5, 31, {"training": False, "eps": 1e-3}),
    ],
    ids=str,
)
def test_linear_bn_relu(rows, depth, width, options, dtype):
    case = block_case(rows, depth, width)
    parameters = {n: x.to(dtype) if n == "x" else x.float() for n, x in case.items()}
    running: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def call(op, leaves):
        kind = leaves["gamma"].dtype
        running[kind] = 0.1 * normal(width).to(kind), 1 + normal(width).abs().to(kind)
        return op(*leaves.values(), *running[kind], **options)

    actual = run(block.linear_bn_relu, parameters, call)
    moved = running[torch.float32]
    truth = run(block_ref, {n: x.double() for n, x in parameters.items()}, call)
    rough = run(block_ref, parameters, call)
    slack = 2 if dtype == torch.float32 else 500  # the product y is rounded to x's dtype
    for name, a, e in zip(("mean", "var"), moved, running[torch.float64], strict=True):
        assert_matches(a, e, torch.float32, f"running_{name}", slack)
    if dtype == torch.float16:  # gradients of float32 parameters saw float16 products
        actual = {name: x.half() for name, x in actual.items()}
    compare(actual, truth, rough)


def test_linear_bn_relu_without_rows_or_running_statistics():
    case = {n: x.float() for n, x in block_case((0,), 4, 3).items()}
    out = block.linear_bn_relu(*case.values(), torch.zeros(3), torch.ones(3), training=False)
    assert out.shape == (0, 3)
    case = {n: x.float() for n, x in block_case((6,), 4, 3).items()}
    out = block.linear_bn_relu(*case.values(), None, None, training=True, relu=False)
    assert_matches(out.mean(0), case["beta"].double(), torch.float32, "mean", slack=3)
    case["x"][2, 1] = torch.nan
    out = block.linear_bn_relu(*case.values(), None, None, training=True)
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(3, 5)}, r"shapes .*\[\.\.\., F\]"),
        ({"x": torch.zeros(1, 4)}, "1 rows in training"),
        ({"x": torch.zeros(6, 4).double()}, "dtype torch.float64"),
        ({"gamma": torch.zeros(3, 1)}, r"gamma of shape \[3, 1\]"),
    ],
)
def test_linear_bn_relu_bad_input(change, message):
    case = {n: x.float() for n, x in block_case((6,), 4, 3).items()} | change
    with pytest.raises(ValueError, match=message) as error:
        block.linear_bn_relu(*case.values(), None, None, training=True)
    assert 'impl="reference"' in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 9, 11, 3)}, "images of dtype torch.float32.*uint8"),
        ({"positions": torch.zeros(4, 3, dtype=torch.int64)}, r"positions of shape \[4, 3\]"),
        ({"positions": torch.zeros(4, 2)}, "positions of dtype torch.float32"),
        ({"weight": torch.zeros(5, 1, 4, 5)}, "3 channels in images, 1 in weight"),
        ({"weight": torch.zeros(5, 3, 10, 5)}, "patches 10x5 of images 9x11"),
        ({"bias": torch.zeros(4)}, r"bias of shape \[4\]"),
    ],
)
def test_patch_embed_bad_input(change, message):
    images, weight, bias, options = embed_case(2, 9, 11, 3, 5, (4, 5), False)
    arguments = {
        "images": images,
        "weight": weight.float(),
        "bias": bias.float(),
        "positions": scattered((5, 6), 4),
    }
    with pytest.raises(ValueError, match=message) as error:
        embed.patch_embed(**(arguments | change), **options)
    assert 'impl="reference"' in str(error.value)


def test_registered_ops():
    tests = ("test_schema", "test_faketensor")
    y, columns = normal(5, 7).float(), torch.ones(7)
    torch.library.opcheck(block._stats_op, (y,), test_utils=tests)
    torch.library.opcheck(
        block._normalize_op, (y, *[columns] * 4, True, torch.float16), test_utils=tests
    )
    images, weight, _, _ = embed_case(2, 5, 5, 3, 5, (2, 3), False)
    positions = scattered((3, 2), 2, 2)
    folded = weight.float().permute(2, 3, 1, 0).reshape(-1, 5).contiguous()
    arguments = (images, positions, folded, torch.zeros(5), (2, 3), True)
    torch.library.opcheck(embed._fwd_op, arguments, test_utils=tests)
