"""conv_bn_relu: activations and gradients against float64, running statistics, several readers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_matches
from torch import Tensor

from bagssl_fast import ops
from bagssl_fast._extension import _C
from bagssl_fast.ops import Deferred
from bagssl_fast.ops.cpu import conv_bn_relu as cell
from bagssl_fast.ops.reference.conv_bn_relu import conv_bn_relu as reference

# N, C, M, kernel, stride, padding, H, W: panels are 32, 16 and 8 channels, tiles 12, 6 and 4 rows,
# chunks 72 rows, blocks of columns 256.
SHAPES = [
    (9, 3, 96, 4, 2, 0, 16, 16),
    (5, 96, 64, 1, 1, 0, 7, 7),
    (17, 64, 128, 3, 2, 0, 7, 7),
    (37, 128, 128, 1, 1, 0, 3, 3),
    (3, 2, 1, 1, 1, 0, 1, 1),
    (7, 13, 17, 1, 1, 0, 5, 3),
    (3, 5, 31, 2, 3, 0, 8, 9),
    (11, 7, 19, 3, 2, 1, 9, 6),
    (5, 33, 47, 3, 1, 1, 7, 5),
    (2, 3, 20, 7, 2, 3, 23, 22),
    (3, 40, 29, 1, 2, 0, 9, 9),
    (5, 300, 270, 3, 1, 1, 2, 3),
    (2, 4, 6, 5, 1, 4, 3, 3),
    (1, 8, 16, 3, 1, 1, 20, 19),
]
PATCHNET = [(3, 96, 4, 2, 0), (96, 64, 1, 1, 0), (64, 128, 3, 2, 0), (128, 128, 1, 1, 0)]
ODD = [(3, 17, 4, 2, 0), (17, 13, 1, 1, 0), (13, 19, 3, 2, 1), (19, 7, 3, 1, 1)]
Activation = Tensor | Deferred


def normal(*shape: int, seed: int = 0, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    """Numbers that float32 holds, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return (mean + scale * torch.randn(shape, generator=generator)).double()


def images(*shape: int, **options: Any) -> Tensor:
    return normal(*shape, **options).contiguous(memory_format=torch.channels_last)


def deferred(y: Tensor) -> Deferred:
    c = y.shape[1]
    scale = normal(c, seed=8, mean=1.0, scale=0.3)
    return Deferred(y, normal(c, seed=7, scale=0.3), scale, normal(c, seed=9, scale=0.7))


class Block:
    """What a block owns, and the options of its convolution."""

    def __init__(self, c: int, m: int, kernel: int, stride: int, padding: int, seed: int = 0):
        self.stride, self.padding = stride, padding
        steps = c * kernel**2
        self.weight = normal(m, c, kernel, kernel, seed=seed + 1, scale=steps**-0.5)
        self.gamma = normal(m, seed=seed + 2, mean=1.0, scale=0.3)
        self.beta = normal(m, seed=seed + 3, scale=0.3)
        self.running_mean = normal(m, seed=seed + 4, scale=0.1)
        self.running_var = normal(m, seed=seed + 5).abs() + 0.5

    def to(self, dtype: torch.dtype) -> "Block":
        """A copy whose parameters are leaves."""
        own = copy.copy(self)
        for name in ("weight", "gamma", "beta"):
            setattr(own, name, getattr(self, name).detach().to(dtype).clone().requires_grad_())
        for name in ("running_mean", "running_var"):
            setattr(own, name, getattr(self, name).to(dtype).clone())
        return own

    def __call__(self, x: Activation, training: bool = True, **options: Any) -> Any:
        return ops.conv_bn_relu(
            x,
            self.weight,
            self.gamma,
            self.beta,
            self.running_mean,
            self.running_var,
            stride=self.stride,
            padding=self.padding,
            training=training,
            **options,
        )


def chain_of(shapes: list[tuple[int, ...]]) -> list[Block]:
    return [Block(*shape, seed=10 * i) for i, shape in enumerate(shapes)]


def leaf(x: Activation, dtype: torch.dtype) -> Activation:
    if isinstance(x, Deferred):
        return Deferred(*(leaf(v, dtype) for v in x))
    return x.detach().to(dtype, copy=True).requires_grad_()


class Masked(torch.autograd.Function):
    """ReLU by a mask from elsewhere: a rounding that flips one shows in gradients, 3e-3 of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


def mask_of(x: Deferred) -> Tensor:
    """Where the kernels find the activation positive."""
    scale, center, shift = (
        v.detach().double()[:, None, None] for v in (x.scale, x.center, x.shift)
    )
    return x.y.detach().double() * scale + (shift - center * scale).float().double() > 0


def exact(x: Activation, blocks: list[Block], masks: list[Tensor], training: bool) -> list[Tensor]:
    """The activations of a chain in plain float64, with the masks of x (if deferred) and blocks."""
    masks, outs = list(masks), []
    if isinstance(x, Deferred):
        center, scale, shift = (v[:, None, None] for v in x[1:])
        x = Masked.apply(scale * (x.y - center) + shift, masks.pop(0))
    for b, mask in zip(blocks, masks, strict=True):
        y = F.conv2d(x, b.weight, None, b.stride, b.padding)
        h = F.batch_norm(y, b.running_mean, b.running_var, b.gamma, b.beta, training)
        x = Masked.apply(h, mask)
        outs.append(x)
    return outs


def last(activations: list[Tensor]) -> list[Tensor]:
    return activations[-1:]


def results(
    x: Activation, blocks: list[Block], outs: list[Tensor], read: Callable[..., list[Tensor]]
) -> dict[str, Tensor]:
    """Everything that comes out and, of what `read` reads of it, every gradient."""
    loss = sum((v * normal(*v.shape, seed=k).to(v)).sum() for k, v in enumerate(read(outs)))
    loss.backward()
    named = {f"activation {i}": out.detach() for i, out in enumerate(outs)}
    given = zip(Deferred._fields, x, strict=True) if isinstance(x, Deferred) else [("x", x)]
    named |= {f"d{name}": v.grad for name, v in given}
    for i, b in enumerate(blocks):
        named |= {f"d{n} {i}": getattr(b, n).grad for n in ("weight", "gamma", "beta")}
        named |= {f"{n} {i}": getattr(b, n) for n in ("running_mean", "running_var")}
    return named


def both(
    x: Activation,
    blocks: list[Block],
    training: bool = True,
    read: Callable[..., list[Tensor]] = last,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The results of the op on a CPU in float32, and the same in plain float64."""
    own_x, own = leaf(x, torch.float32), [b.to(torch.float32) for b in blocks]
    at, outs = own_x, []
    for b in own:
        at = b(at, training, impl="cpu")
        assert isinstance(at, Deferred) and at.y.is_contiguous(memory_format=torch.channels_last)
        outs.append(at)
    masks = [mask_of(v) for v in ([own_x, *outs] if isinstance(x, Deferred) else outs)]
    actual = results(own_x, own, [ops.applied(v) for v in outs], read)
    double_x, double = leaf(x, torch.float64), [b.to(torch.float64) for b in blocks]
    return actual, results(double_x, double, exact(double_x, double, masks, training), read)


def check(*args: Any, slack: float = 1.0, **options: Any) -> None:
    actual, expected = both(*args, **options)
    for name, value in expected.items():
        assert_matches(actual[name], value, torch.float32, name, slack)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_block_matches_float64(shape, training, simd_level):
    n, c, m, kernel, stride, padding, height, width = shape
    block, x = Block(c, m, kernel, stride, padding), images(n, c, height, width, mean=0.3)
    check(x, [block], training)
    # Batch statistics make the sums that are the gradients of shift and center nearly cancel.
    check(deferred(x), [block], training, slack=3)


@pytest.mark.parametrize("shapes", [PATCHNET, ODD], ids=["patchnet", "odd"])
def test_a_chain_matches_float64(shapes, simd_level):
    check(images(23, 3, 16, 16, mean=0.3), chain_of(shapes), slack=2)


def test_several_readers_of_one_activation(simd_level):
    """Gradients of the next block and of others add up; a tap that is detached adds nothing."""

    def every(activations: list[Tensor]) -> list[Tensor]:
        first, second, third, fourth = activations
        return [first, third, first.square(), fourth, second.detach()]

    check(images(13, 3, 16, 16), chain_of(ODD), read=every, slack=2)


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1e-3), (0.0, 1e3), (30.0, 1.0)])
def test_scales_and_a_far_mean(mean, scale):
    x = images(40, 8, 6, 6, mean=mean, scale=scale)
    # A float32 of 30 has an absolute rounding of 2e-6: what the mean is subtracted from shows it.
    slack = 50 if mean else 2
    check(x, [Block(8, 16, 3, 1, 0)], slack=slack)


def test_memory_of_any_layout():
    block, x = Block(6, 10, 3, 1, 1), images(3, 6, 9, 8)
    transposed = copy.copy(block)
    transposed.weight = block.weight.transpose(2, 3).contiguous().transpose(2, 3)
    for given in (x.contiguous(), normal(3, 12, 9, 16)[:, ::2, :, ::2], x[:1].expand_as(x)):
        check(given, [block])
        check(deferred(given), [transposed])
    dense = Block(6, 10, 3, 1, 1)
    dense.weight = dense.weight.contiguous(memory_format=torch.channels_last)
    actual, again = both(x, [block])[0], both(x, [dense])[0]
    for name, value in actual.items():
        assert torch.equal(value, again[name]), name


def test_a_nan_stays_a_nan(simd_level):
    x, block = images(2, 20, 5, 5).float(), Block(20, 6, 3, 1, 0).to(torch.float32)
    x[0, 3, 1, 1] = float("nan")
    for given in (x, deferred(x.double())._replace(y=x)):
        given = Deferred(*(v.float() for v in given)) if isinstance(given, Deferred) else given
        out = ops.applied(block(given, training=False))
        assert out[0, :, :2, :2].isnan().all() and out[1].isfinite().all()
        assert ops.relu_mean(block(given, training=False))[0].isnan().all()


def check_same_bits(monkeypatch: Any, x: Activation, blocks: list[Block]) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    first = both(x, blocks)[0]
    for threads in (2, 3, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for name, value in both(x, blocks)[0].items():
            assert torch.equal(value, first[name]), (threads, name)


def test_the_same_bits_with_any_number_of_threads(monkeypatch, simd_level):
    check_same_bits(monkeypatch, images(300, 3, 16, 16), chain_of(PATCHNET))


def check_written(n: int, c: int, m: int, height: int, width: int) -> None:
    """A padded 3x3 block writes all of its results and nothing before or behind them."""
    weight = Block(c, m, 3, 1, 1).weight.float().detach().numpy()
    x, dy = normal(n, height, width, c).float(), normal(n, height, width, m, seed=1).float()

    def poisoned(*shape: int) -> Tensor:
        return torch.full((shape[0] + 2, *shape[1:]), float("nan"))

    y, dx = poisoned(n, height, width, m), poisoned(n, height, width, c)
    dweight = poisoned(m, c, 3, 3)
    vectors = [poisoned(k) for k in (m, m, c, c)]
    mean, var, dscale, dshift = (v[1:-1].numpy() for v in vectors)
    reader = [v.float().numpy() for v in deferred(images(1, c, 1, 1))[1:]]
    _C.conv_bn_relu(x.numpy(), *reader, weight, 1, 1, y[1:-1].numpy(), mean, var, 2)
    _C.conv_bn_relu_backward(
        dy.numpy(), y[1:-1].numpy(), mean, mean, var, x.numpy(), *reader, weight, 1, 1,
        dx[1:-1].numpy(), dscale, dshift, dweight[1:-1].numpy(), 2,
    )  # fmt: skip
    for written in (y, dx, dweight, *vectors):
        assert written[[0, -1]].isnan().all() and written[1:-1].isfinite().all()


def test_everything_is_written_and_nothing_beside_it(simd_level):
    check_written(5, 7, 19, 6, 6)


def test_only_what_needs_a_gradient_gets_one():
    block, x = Block(5, 9, 3, 2, 0), images(4, 5, 7, 7)
    expected = both(x, [block])[1]
    only_x, frozen = leaf(x, torch.float32), block.to(torch.float32)
    frozen.weight.requires_grad_(False)
    out = ops.applied(frozen(only_x))
    (out * normal(*out.shape).float()).sum().backward()
    assert_matches(only_x.grad, expected["dx"], torch.float32, "dx")
    assert frozen.weight.grad is None
    own = block.to(torch.float32)
    out = ops.applied(own(x.float()))
    (out * normal(*out.shape).float()).sum().backward()
    assert_matches(own.weight.grad, expected["dweight 0"], torch.float32, "dweight")
    with torch.no_grad():
        assert not block.to(torch.float32)(x.float()).y.requires_grad


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_running_statistics_are_torchs(impl):
    x, block = images(6, 4, 5, 5, mean=0.5).float(), Block(4, 7, 3, 1, 0).to(torch.float32)
    norm = torch.nn.BatchNorm2d(7, momentum=0.3)
    with torch.no_grad():
        for name in ("running_mean", "running_var"):
            getattr(norm, name).copy_(getattr(block, name))
        for _ in range(2):  # they move twice
            norm(F.conv2d(x, block.weight))
            block(x, momentum=0.3, impl=impl)
        for name in ("running_mean", "running_var"):
            moved = getattr(block, name)
            assert_matches(moved, getattr(norm, name), torch.float32, name)
        before = block.running_var.clone()
        block(x, training=False, impl=impl)
        assert torch.equal(block.running_var, before)
        block.running_mean = block.running_var = None
        block(x, impl=impl)  # they are optional in training


def test_the_reference_is_torchs_layers_and_passes_gradcheck():
    block, x = Block(2, 3, 2, 1, 1).to(torch.float64), leaf(images(2, 2, 3, 3), torch.float64)
    options = {"stride": 1, "padding": 1, "training": True}

    def call(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return reference(x, weight, gamma, beta, None, None, **options)

    expected = F.batch_norm(F.conv2d(x, block.weight, padding=1), None, None, block.gamma,
                            block.beta, True).relu()  # fmt: skip
    arguments = (x, block.weight, block.gamma, block.beta)
    assert torch.equal(call(*arguments), expected)
    assert torch.autograd.gradcheck(call, arguments)


def test_a_tensor_and_a_deferred_activation_mix():
    """The reference takes what a CPU's block returned, and the other way around."""
    x, blocks = images(9, 3, 16, 16).float(), [b.to(torch.float32) for b in chain_of(ODD)[:2]]
    expected = ops.applied(blocks[1](blocks[0](x)))
    for impls in (("cpu", "reference"), ("reference", "cpu"), ("reference", "reference")):
        at: Activation = x
        for b, impl in zip(blocks, impls, strict=True):
            at = b(at, impl=impl)
        torch.testing.assert_close(ops.applied(at), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_other_dtypes_and_float16_are_the_references(dtype):
    block, x = Block(4, 6, 3, 1, 1), images(3, 4, 6, 6)
    own = block.to(dtype)
    own.running_mean = own.running_var = None
    out = own(x.to(dtype), impl="cpu")
    assert isinstance(out, Tensor) and out.dtype == dtype
    with torch.autocast("cpu", torch.float16):
        out = block.to(torch.float32)(x.float(), impl="cpu")
    assert isinstance(out, Tensor) and out.dtype == torch.float16


def test_registration_and_compilation():
    x, blocks = images(6, 3, 16, 16).float(), [b.to(torch.float32) for b in chain_of(ODD)]
    first = blocks[0]
    arguments = (x, None, None, None, first.weight, 2, 0, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(cell.conv_moments, arguments, test_utils=tests)

    def whole(x: Tensor) -> Tensor:
        at: Activation = x
        for b in blocks:
            at = b(at)
        return ops.applied(at)

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    parameters = [p for b in blocks for p in (b.weight, b.gamma, b.beta)]
    dy = normal(*whole(x).shape).float()
    expected = torch.autograd.grad(whole(x), parameters, dy)
    for a, e in zip(torch.autograd.grad(compiled(x), parameters, dy), expected, strict=True):
        torch.testing.assert_close(a, e)


def test_refusals():
    block, x = Block(4, 6, 3, 1, 0).to(torch.float32), images(2, 4, 5, 5).float()
    with pytest.raises(ValueError, match=r"x is \[4, 5, 5\], expected \[N, C, H, W\]"):
        block(x[0])
    with pytest.raises(ValueError, match=r"weight is \[6, 4, 3, 3\], expected \[M, 3, h, w\]"):
        block(x[:, :3])
    with pytest.raises(ValueError, match="kernel of 3x3 does not fit into maps of 2x5 padded by 0"):
        block(x[:, :, :2])
    with pytest.raises(ValueError, match="1 values per channel in training"):
        block(x[:1, :, :3, :3])
    block.stride = 0
    with pytest.raises(ValueError, match="stride 0 must be at least 1"):
        block(x)
    block.stride, block.gamma = 1, torch.ones(5)
    with pytest.raises(ValueError, match=r"gamma is \[5\], expected \[6\]"):
        block(x)
    block = Block(4, 6, 3, 1, 0).to(torch.float32)
    block.running_var = None
    with pytest.raises(ValueError, match="evaluation needs running_mean and running_var"):
        block(x, training=False)
    maps, weight = torch.zeros(2, 5, 5, 4).numpy(), block.weight.detach().numpy()
    for y in (torch.zeros(2, 3, 3, 5), torch.zeros(2, 4, 4, 6), torch.zeros(2, 3, 3, 12)[..., ::2]):
        with pytest.raises(ValueError, match=r"conv_bn_relu: y is .*; expected packed"):
            _C.conv_bn_relu(maps, None, None, None, weight, 1, 0, y.numpy(), None, None, 1)
    with pytest.raises(TypeError):  # nothing is converted behind the caller's back
        y = torch.zeros(2, 3, 3, 6).numpy()
        _C.conv_bn_relu(maps.astype("float64"), None, None, None, weight, 1, 0, y, None, None, 1)
