"""Blocks on bfloat16 maps: against float64 that rounds where they do, and against torch's own."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_add_relu import KINDS, named, sides
from test_conv_bn_relu import SHAPES, Block, Masked, deferred, images, leaf, mask_of, normal
from tolerances import assert_compiles_whole, assert_matches
from torch import Tensor, nn

from bagssl_fast import ops
from bagssl_fast._extension import _C
from bagssl_fast.models.encoders import build_encoder
from bagssl_fast.models.patchnet import PatchNet
from bagssl_fast.ops import Deferred
from bagssl_fast.ops.cpu.conv_bn_relu import pixels

# Panels are 32 rows and columns, blocks 512 columns, chunks 256 rows or 384 Ki numbers.
MORE = [(300, 530, 40, 1, 1, 0, 1, 2), (40, 64, 64, 3, 1, 1, 8, 8), (1, 1100, 33, 3, 1, 1, 9, 9)]
# An operand that is near the middle of two neighbors may be rounded to the other one.
OTHER_WAY = 100


def rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).double()


class Rounded(torch.autograd.Function):
    """bfloat16 values, and gradients of the unrounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return rounded(x.float())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def conv_in_float64(x: Any, block: Block, dy: Tensor, dmean: Tensor, dvar: Tensor) -> dict:
    """What the kernels compute of a block, in float64, each operand rounded as they round it."""
    center, scale, shift = x[1:] if isinstance(x, Deferred) else (None, None, None)
    y = x.y if isinstance(x, Deferred) else x
    a = y
    if center is not None:
        mask = mask_of(x)
        a = Masked.apply(
            (y - center[:, None, None]) * scale[:, None, None] + shift[:, None, None], mask
        )
    weight = block.weight
    out = F.conv2d(Rounded.apply(a), Rounded.apply(weight), None, block.stride, block.padding)
    mean, var = out.mean((0, 2, 3)), out.var((0, 2, 3), unbiased=False)
    stored, count = rounded(out.float()), out.numel() / out.shape[1]
    slope = 2 * dvar / count
    offset = dmean / count - slope * mean.detach()
    gradient = dy + slope[:, None, None] * stored + offset[:, None, None]
    leaves = [v for v in (y, center, scale, shift, weight) if v is not None]
    grads = torch.autograd.grad(out, leaves, rounded(gradient.float()))
    names = [
        n
        for n, v in zip(
            ("dy", "dcenter", "dscale", "dshift", "dweight"),
            (y, center, scale, shift, weight),
            strict=True,
        )
        if v is not None
    ]
    return {"y": out, "mean": mean, "var": var} | dict(zip(names, grads, strict=True))


def conv_by_kernels(x: Any, block: Block, dy: Tensor, dmean: Tensor, dvar: Tensor) -> dict:
    """The same by the op: var through the scale that it returns for gamma 1 and eps 0."""
    one, zero = torch.ones(len(dmean)), torch.zeros(len(dmean))
    out = ops.conv_bn_relu(
        x, block.weight, one, zero, None, None, stride=block.stride, padding=block.padding,
        training=True, eps=0.0, impl="cpu",
    )  # fmt: skip
    assert out.y.dtype == torch.bfloat16 and out.center.dtype == torch.float32
    inputs = [*x, block.weight] if isinstance(x, Deferred) else [x, block.weight]
    of_scale = -2 * dvar / out.scale.detach() ** 3  # d var / d scale of scale = var ** -0.5
    grads = torch.autograd.grad(out[:3], inputs, [dy.bfloat16(), dmean, of_scale])
    names = ["dy", "dcenter", "dscale", "dshift"] if isinstance(x, Deferred) else ["dy"]
    results = {"y": out.y.detach(), "mean": out.center, "var": out.scale**-2}
    return results | dict(zip([*names, "dweight"], grads, strict=True))


def given(shape: tuple[int, ...], kind: str) -> tuple[Any, ...]:
    """What both take: x, the block, and gradients of y and of its moments."""
    n, c, m, kernel, stride, padding, height, width = shape
    block, x = Block(c, m, kernel, stride, padding), rounded(images(n, c, height, width, mean=0.3))
    x = x.contiguous(memory_format=torch.channels_last)
    out = F.conv2d(x, block.weight, None, stride, padding)
    dy = rounded(normal(*out.shape, seed=4))
    return deferred(x) if kind == "deferred" else x, block, dy, normal(m, seed=5), normal(m, seed=6)


def to_kernels(x: Any) -> Any:
    if isinstance(x, Deferred):
        return Deferred(leaf(x.y, torch.bfloat16), *(leaf(v, torch.float32) for v in x[1:]))
    return leaf(x, torch.bfloat16)


@pytest.mark.parametrize("kind", ["plain", "deferred"])
@pytest.mark.parametrize("shape", SHAPES + MORE, ids=str)
def test_a_block_is_that_of_float64_with_the_same_roundings(shape, kind, bf16_level):
    """Odd shapes: what is behind the last row, channel or pixel must not get into a product."""
    x, block, dy, dmean, dvar = given(shape, kind)
    if dy.numel() == dy.shape[1]:
        dmean, dvar = torch.zeros_like(dmean), torch.zeros_like(dvar)  # one pixel has no variance
    expected = conv_in_float64(leaf(x, torch.float64), block.to(torch.float64), dy, dmean, dvar)
    own = block.to(torch.float32)
    actual = conv_by_kernels(to_kernels(x), own, dy, dmean.float(), dvar.float())
    for name, value in expected.items():
        if name in ("y", "dy"):
            # One rounding of the result, and in dy that of the operands the other way.
            assert_matches(actual[name], value, torch.bfloat16, name, slack=2)
        elif name != "var" or dy.numel() > dy.shape[1]:
            assert_matches(actual[name], value, torch.float32, name, slack=OTHER_WAY)


def test_the_same_bits_with_any_number_of_threads(monkeypatch, bf16_level):
    x, block, dy, dmean, dvar = given((90, 40, 72, 3, 2, 1, 15, 15), "deferred")
    first: dict[str, Tensor] = {}
    for threads in (1, 2, 3, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        own = block.to(torch.float32)
        results = conv_by_kernels(to_kernels(x), own, dy, dmean.float(), dvar.float())
        for name, value in results.items():
            assert torch.equal(first.setdefault(name, value), value), (threads, name)


def test_a_nan_stays_where_it_is(bf16_level):
    """Rows of a tile beside it, and columns that are padded, must not see it."""
    x, block = images(2, 20, 5, 5).bfloat16(), Block(20, 6, 3, 1, 0).to(torch.float32)
    x[0, 3, 1, 1] = float("nan")
    for maps in (x, deferred(x.double())._replace(y=x)):
        maps = Deferred(x, *(v.float() for v in maps[1:])) if isinstance(maps, Deferred) else maps
        out = block(maps, training=False, impl="cpu")
        activation = ops.applied(out)
        assert activation[0, :, :2, :2].isnan().all() and activation[1].isfinite().all()
        assert activation[0, :, 2].isfinite().all()
        assert ops.relu_mean(out)[0].isnan().all()


def test_everything_is_written_and_nothing_beside_it(bf16_level):
    n, c, m, side = 5, 7, 19, 6
    weight = Block(c, m, 3, 1, 1).weight.float().detach().numpy()
    x, dy = (normal(n, k, side, side, seed=k).bfloat16() for k in (c, m))

    def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((shape[0] + 2, *shape[1:]), float("nan"), dtype=dtype)

    y, dx = (poisoned(n, side, side, k, dtype=torch.bfloat16) for k in (m, c))
    y16, dx16 = (v[1:-1].view(torch.uint16).numpy() for v in (y, dx))
    dweight = poisoned(m, c, 3, 3)
    vectors = [poisoned(k) for k in (m, m, c, c)]
    mean, var, dscale, dshift = (v[1:-1].numpy() for v in vectors)
    reader = [v.float().numpy() for v in deferred(images(1, c, 1, 1))[1:]]
    _C.conv_bn_relu(pixels(x), *reader, weight, 1, 1, y16, mean, var, 2)
    _C.conv_bn_relu_backward(
        pixels(dy), y16, mean, mean, var, pixels(x), *reader, weight, 1, 1, dx16, dscale, dshift,
        dweight[1:-1].numpy(), 2,
    )  # fmt: skip
    for written in (y, dx, dweight, *vectors):
        assert written[[0, -1]].isnan().all() and written[1:-1].isfinite().all()


def test_maps_of_two_types_are_refused():
    x, weight = torch.zeros(1, 2, 2, 3).numpy(), torch.zeros(4, 3, 1, 1).numpy()
    y = torch.zeros(1, 2, 2, 4, dtype=torch.uint16).numpy()
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.conv_bn_relu(x, None, None, None, weight, 1, 0, y, None, None, 1)


def test_the_mean_is_that_of_float64(bf16_level):
    for shape in ((33, 512, 3, 3), (1, 1, 1, 1), (5, 13, 4, 7), (65, 17, 2, 3)):
        y = rounded(images(*shape, mean=0.2)).contiguous(memory_format=torch.channels_last)
        x, double = to_kernels(deferred(y)), leaf(deferred(y), torch.float64)
        dy = normal(*shape[:2], seed=1)
        mean = ops.relu_mean(x, impl="cpu")
        assert mean.dtype == torch.float32
        center, scale, shift = (v[:, None, None] for v in double[1:])
        exact = Masked.apply(scale * (double.y - center) + shift, mask_of(x)).mean((2, 3))
        assert_matches(mean, exact, torch.float32, "mean")
        grads = torch.autograd.grad(mean, x, dy.float())
        for name, own, grad in zip(x._fields, grads, torch.autograd.grad(exact, double, dy),
                                   strict=True):  # fmt: skip
            dtype = torch.bfloat16 if name == "y" else torch.float32
            assert_matches(own, grad, dtype, name, slack=2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_residual_sum_is_that_of_float64(kind, bf16_level):
    for shape in ((9, 64, 8, 8), (1, 1, 1, 1), (5, 13, 4, 7), (2, 515, 3, 3)):
        dy = rounded(normal(*shape, seed=1))
        double = [v._replace(y=rounded(v.y.detach())) if not isinstance(v, Tensor) else rounded(v)
                  for v in sides(shape, kind, torch.float64)]  # fmt: skip
        x, identity = (
            type(v)(leaf(v.y, torch.bfloat16), *(leaf(w, torch.float32) for w in v[1:]))
            if not isinstance(v, Tensor) else leaf(v, torch.bfloat16)
            for v in double
        )  # fmt: skip
        out = ops.add_relu(x, identity, impl="cpu")
        assert out.dtype == torch.bfloat16
        actual = named(x, identity, out, dy.bfloat16())
        x64, other = (
            type(v)(*(leaf(w, torch.float64) for w in v)) if not isinstance(v, Tensor)
            else leaf(v, torch.float64) for v in double
        )  # fmt: skip
        added = other
        if kind != "tensor":
            center, scale, shift = (v[:, None, None] for v in other[1:])
            added = scale * (other.y - center) + shift
            if kind == "deferred":
                added = Masked.apply(added, mask_of(identity))
        normalized = x64.scale[:, None, None] * (x64.y - x64.center[:, None, None])
        total = normalized + x64.shift[:, None, None] + added
        expected = named(x64, other, Masked.apply(total, actual["out"] > 0), dy)
        for name, value in expected.items():
            dtype = torch.float32 if value.dim() == 1 else torch.bfloat16
            assert_matches(actual[name], value, dtype, name, slack=3)


def embedding_and_gradient(net: nn.Module, x: Tensor, autocast: bool) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        h = net(x)
    (h.double() * normal(*h.shape, seed=3)).sum().backward()
    return h.detach().double(), torch.cat([p.grad.double().flatten() for p in net.parameters()])


@pytest.mark.parametrize("name", ["patchnet", "resnet18"])
def test_a_network_is_as_exact_as_torchs_autocast(name):
    """Relative L2 errors of the embedding and of the whole gradient, from plain float64."""
    torch.manual_seed(0)
    if name == "patchnet":
        net: nn.Module = PatchNet(16, width=16, feature_dim=64)
        x = normal(48, 3, 16, 16).float()
    else:
        pytest.importorskip("torchvision")
        net, x = build_encoder(name, 32, None, False, {}), normal(24, 3, 32, 32).float()
    ours, plain, double = (copy.deepcopy(net) for _ in range(3))
    own = embedding_and_gradient(ours, x, True)
    with ops.use_impl("reference"):
        theirs = embedding_and_gradient(plain, x, True)
    truths = embedding_and_gradient(double.double(), x.double(), False)  # the reference's
    for mine, peer, truth in zip(own, theirs, truths, strict=True):
        assert (mine - truth).norm() <= 1.1 * (peer - truth).norm()


def test_autocast_compiles_whole():
    net = PatchNet(16, width=8, feature_dim=16)

    class UnderAutocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(x)

    assert_compiles_whole(UnderAutocast(), normal(6, 3, 16, 16).float())
