"""What only a GPU can show of the kernels: bfloat16, streams, autocast, CUDA graphs, compile."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bagssl_fast import ops
from bagssl_fast.augment import Augment
from bagssl_fast.data import BagLoader, Output
from bagssl_fast.data.feed import prefetch

pytestmark = pytest.mark.gpu
STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.2 + torch.randn(shape, generator=generator)).to("cuda", dtype)


def pixels(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).cuda()


def block(x: Tensor, weight: Tensor, impl: str, relu: bool = False) -> Tensor:
    ones = x.new_ones(weight.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    return ops.linear_bn_relu(
        x, weight, ones, 0 * ones, None, None, training=True, relu=relu, impl=impl
    )


def embed(
    images: Tensor, positions: Tensor, weight: Tensor, impl: str, relu: bool = False
) -> Tensor:
    return ops.patch_embed(images, weight, None, positions, **STATISTICS, relu=relu, impl=impl)


def every(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [x for x in out if x is not None]


Op = Callable[..., Any]
OPS: dict[str, tuple[Op, Callable[[torch.dtype], tuple[Tensor, ...]]]] = {
    "vicreg": (lambda z, impl: ops.vicreg(z, impl=impl), lambda d: (normal(3, 200, 515, dtype=d),)),
    "vicreg, D < B": (
        lambda z, impl: ops.vicreg(z, impl=impl),
        lambda d: (normal(2, 515, 200, dtype=d),),
    ),
    "tcr": (
        lambda z, impl: ops.tcr(z, impl=impl),
        lambda d: (torch.nn.functional.normalize(normal(20, 100, 1024), dim=2).to(d),),
    ),
    "bag_pool": (
        lambda x, impl: ops.bag_pool(x, normalize=True, deviation=True, cosine=True, impl=impl),
        lambda d: (normal(20, 33, 1000, dtype=d),),
    ),
    "linear_bn_relu": (
        block,
        lambda d: (normal(1000, 300, dtype=d), normal(257, 300, seed=1) / 17),
    ),
    "patch_embed": (
        embed,
        lambda d: (
            pixels(33, 32, 32, 3),
            torch.tensor([[0, 0], [3, 5], [16, 16], [7, 2]], device="cuda"),
            (normal(130, 3, 16, 16, seed=1) / 28).to(d),
        ),
    ),
}
LIMIT = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}  # relative L2 error


def leaves_of(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]


def douts_of(op: Op, inputs: tuple[Tensor, ...], impl: str) -> list[Tensor]:
    """A fixed gradient of every result."""
    with torch.no_grad():
        return [normal(*out.shape, seed=2).to(out) for out in every(op(*inputs, impl))]


def both_ways(op: Op, leaves: list[Tensor], impl: str, douts: list[Tensor]) -> list[Tensor]:
    """Results and gradients; everything that it needs is on the device already."""
    outs = every(op(*leaves, impl))
    return [*outs, *torch.autograd.grad(outs, [x for x in leaves if x.requires_grad], douts)]


def run(op: Op, inputs: tuple[Tensor, ...], impl: str) -> list[Tensor]:
    return both_ways(op, leaves_of(inputs), impl, douts_of(op, inputs, impl))


def doubled(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


@pytest.mark.parametrize("dtype", LIMIT, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", OPS)
def test_matches_the_float64_reference(name, dtype):
    op, make = OPS[name]
    inputs = make(dtype)
    actual, truth = run(op, inputs, "cuda"), run(op, doubled(inputs), "reference")
    for a, e in zip(actual, truth, strict=True):
        assert (a.double() - e).norm() <= LIMIT[dtype] * e.norm() + 1e-7, name
    again = run(op, inputs, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True)), "not repeatable"


@pytest.mark.parametrize("name", OPS)
def test_on_a_side_stream(name):
    op, make = OPS[name]
    inputs = make(torch.float32)
    expected = run(op, inputs, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = run(op, inputs, "cuda")
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", LIMIT, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["linear_bn_relu", "patch_embed"])
def test_relu(name, dtype):
    """Where the rounding of a low precision cannot decide on which side of the kink a value is."""
    op, make = OPS[name]
    inputs = make(dtype)
    before = op(*doubled(inputs), "reference")
    clear = before.abs() > 0.05 * before.std()
    results = []
    for x, impl in ((inputs, "cuda"), (doubled(inputs), "reference")):
        leaves = leaves_of(x)
        out = op(*leaves, impl, relu=True)
        dout = normal(*out.shape, seed=2).to(out) * clear
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        results.append([out * clear, *torch.autograd.grad(out, needed, dout)])
    for a, e in zip(*results, strict=True):
        assert (a.double() - e).norm() <= LIMIT[dtype] * e.norm() + 1e-7, name


@pytest.mark.parametrize("name", OPS)
def test_in_a_cuda_graph(name):
    """Forward and backward, captured once, on inputs that change between replays."""
    op, make = OPS[name]
    if name == "tcr":
        pytest.skip("the library's batched Cholesky may wait for the device")
    leaves = leaves_of(make(torch.bfloat16))
    douts = douts_of(op, tuple(leaves), "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            both_ways(op, leaves, "cuda", douts)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = both_ways(op, leaves, "cuda", douts)
    for _ in range(2):
        with torch.no_grad():
            leaves[0].copy_(leaves[0].flip(1))
        graph.replay()
        torch.cuda.synchronize()
        expected = both_ways(op, leaves, "cuda", douts)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_autocast_keeps_statistics_in_float32():
    z = normal(2, 256, 512)
    with torch.autocast("cuda", torch.bfloat16):
        inside = ops.vicreg(z, impl="cuda")
        y = block(normal(512, 64), normal(96, 64, seed=1), "cuda")
    assert all(torch.equal(a, b) for a, b in zip(inside, ops.vicreg(z, impl="cuda"), strict=True))
    assert y.dtype == torch.float32 and y.isfinite().all()


@pytest.mark.parametrize("name", OPS)
def test_compiled_whole(name):
    op, make = OPS[name]
    inputs = make(torch.float32)
    compiled = torch.compile(lambda *x: op(*x[:-1], impl=x[-1]), fullgraph=True)
    expected, actual = run(op, inputs, "cuda"), run(compiled, inputs, "cuda")
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= 2e-5 * e.norm() + 1e-7


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_on_a_device_that_is_not_the_current_one():
    z = normal(2, 40, 70)
    with torch.cuda.device(0):
        there = ops.vicreg(z.to("cuda:1"), impl="cuda")
    for a, b in zip(there, ops.vicreg(z, impl="cuda"), strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("size", [8, 32, 64, 96, 224])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_patch_views_have_the_pixels_of_the_reference(size, interpolation):
    generator = torch.Generator().manual_seed(0)
    sides = [(300, 400), (97, 130), (224, 224)]
    images = [torch.rand(1, 3, 20, 20, generator=generator) for _ in sides]
    images = [
        torch.nn.functional.interpolate(x, size=s, mode="bicubic").clamp(0, 1)[0]
        for x, s in zip(images, sides, strict=True)
    ]
    images = [(255 * x).byte().permute(1, 2, 0).contiguous() for x in images]
    params = torch.zeros(4, 3, 16)
    params[..., 2:4] = torch.tensor(sides) // 2
    params[..., 0] = torch.arange(3)
    params[..., 4] = torch.tensor([0, 1, 0, 1])[:, None]
    params[..., 5:9] = torch.tensor([1.2, 0.7, 1.3, 0.1])
    params[..., 9] = torch.tensor([-1, 3, 10, 23])[:, None]
    params[2, :, 11] = 1.1
    params[..., 12] = torch.tensor([256, 256, 200, 128])[:, None]
    options = {"size": size, "interpolation": interpolation, "dtype": torch.uint8, **STATISTICS}
    expected = ops.patch_views(images, params, **options, impl="reference")
    actual = ops.patch_views([x.cuda() for x in images], params, **options, impl="cuda").cpu()
    wrong = (actual.int() - expected.int()).abs()
    assert wrong.max() <= 1 and (wrong > 0).double().mean() < 0.002


@pytest.mark.parametrize("side", [32, 300])
def test_bags_cut_on_the_device_are_those_of_the_loader(side):
    """The whole way: pinned ring, a stream ahead, images cut there; two epochs, buffers growing."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (24, side, side + 8, 3), dtype=np.uint8)
    options = {
        "batch_size": 8,
        "patches": 5,
        "augment": Augment(size=16, scale=(0.1, 0.5), solarize_prob=0.5, blur_prob=0.5),
    }
    device = torch.device("cuda")
    with (
        BagLoader(images, output=Output("uint8", "host", True), **options) as host,
        BagLoader(images, output=Output("uint8", "device", True), **options) as sent,
    ):
        for _ in range(2):
            expected = [batch.patches.clone() for batch in host]
            actual = [patches.clone() for patches in prefetch(sent, device)]
            for a, e in zip(actual, expected, strict=True):
                wrong = (a.cpu().int() - e.int()).abs()
                assert wrong.max() <= 1 and (wrong > 0).double().mean() < 0.002
