"""conv3x3: value and gradients against float64, the ways it chooses, the modules that use it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_matches
from torch import Tensor, nn

from bagssl_fast import ops
from bagssl_fast._extension import _C
from bagssl_fast.models.encoders import Conv3x3, build_encoder, fast_convolutions
from bagssl_fast.ops.cpu import conv3x3 as cell

# N, C, K, H, W: tiles are 4x4, panels 16 channels, pieces of sums 128 steps, chunks of 10 MiB.
SHAPES = [
    (2, 16, 16, 4, 4),
    (1, 1, 1, 1, 1),
    (1, 3, 20, 1, 6),
    (2, 8, 7, 3, 5),
    (3, 17, 33, 7, 9),
    (1, 15, 16, 5, 13),
    (2, 31, 9, 8, 11),
    (40, 130, 30, 8, 8),
    (1, 300, 257, 6, 5),
    (17, 16, 500, 8, 8),
    (9, 512, 520, 4, 4),
]


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def inputs(n: int, c: int, k: int, h: int, w: int, scale: float = 1.0) -> tuple[Tensor, ...]:
    x, dy = normal(n, c, h, w, scale=scale), normal(n, k, h, w, seed=1)
    return channels_last(x), channels_last(normal(k, c, 3, 3, seed=2)), channels_last(dy)


def results(function, x: Tensor, weight: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    return {"y": y.detach(), "dx": dx, "dweight": dweight}


def truth(x: Tensor, weight: Tensor, dy: Tensor) -> dict[str, Tensor]:
    return results(ops._load("conv3x3", "reference"), x.double(), weight.double(), dy.double())


def check(function, x: Tensor, weight: Tensor, dy: Tensor, label: str = "") -> None:
    actual, expected = results(function, x, weight, dy), truth(x, weight, dy)
    for name, value in expected.items():
        assert_matches(actual[name], value, torch.float32, f"{label} {name}", slack=2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_winograd_matches_float64(shape, simd_level):
    check(cell.conv3x3_forward, *inputs(*shape), label=simd_level)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scales(scale):
    check(cell.conv3x3_forward, *inputs(2, 24, 24, 9, 6, scale=scale))


def test_memory_of_any_layout():
    x, weight, dy = inputs(2, 24, 20, 9, 6)
    check(cell.conv3x3_forward, x.contiguous(), weight.contiguous(), dy.contiguous(), "NCHW")
    strided = normal(4, 24, 9, 12)[::2, :, :, ::2]
    check(cell.conv3x3_forward, strided, weight, dy.flip(0), "strided")
    check(cell.conv3x3_forward, x, weight.transpose(2, 3), dy, "transposed taps")
    check(cell.conv3x3_forward, x[:1].expand_as(x), weight, dy[:1].expand_as(dy), "expanded")
    y = cell.conv3x3_forward(x.contiguous(), weight)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for given in (weight, weight.contiguous()):
        assert results(cell.conv3x3_forward, x, given, dy)["dweight"].stride() == given.stride()


def test_everything_is_written_and_nothing_beside_it(simd_level):
    x, weight, dy = inputs(3, 21, 19, 7, 5)
    expected = truth(x, weight, dy)

    def poisoned(channels: int, side: tuple[int, int] = (7, 5)) -> Tensor:
        return torch.full((5, *side, channels), float("nan"))

    pixels, gradient = cell._pixels(x), cell._pixels(dy)
    y, dx = poisoned(19), poisoned(21)
    dweight = torch.full((21, 21, 3, 3), float("nan"))
    _C.conv3x3(pixels, weight.numpy(), y[1:4].numpy(), num_threads=1)
    _C.conv3x3_dx(gradient, weight.numpy(), dx[1:4].numpy(), num_threads=1)
    _C.conv3x3_dweight(pixels, gradient, dweight[1:20].numpy(), num_threads=1)
    assert y[[0, 4]].isnan().all() and dx[[0, 4]].isnan().all()
    assert dweight[[0, 20]].isnan().all()
    for name, value in {"y": y[1:4].permute(0, 3, 1, 2), "dx": dx[1:4].permute(0, 3, 1, 2)}.items():
        assert_matches(value, expected[name], torch.float32, name, slack=2)
    assert_matches(dweight[1:20], expected["dweight"], torch.float32, "dweight", slack=2)


def test_a_nan_stays_a_nan(simd_level):
    x, weight, _ = inputs(1, 16, 16, 8, 8)
    x[0, 3, 1, 1] = float("nan")
    y = cell.conv3x3_forward(x, weight)
    assert y[..., :3, :3].isnan().all() and y[..., 4:, 4:].isfinite().all()


def test_empty_batch_and_batch_of_one():
    weight = normal(32, 32, 3, 3)
    for function in (cell.conv3x3_forward, ops.conv3x3):
        empty = results(function, torch.zeros(0, 32, 8, 8), weight, torch.zeros(0, 32, 8, 8))
        assert empty["y"].shape == empty["dx"].shape == (0, 32, 8, 8)
        assert torch.equal(empty["dweight"], torch.zeros_like(weight))
    check(ops.conv3x3, *inputs(1, 32, 32, 24, 24))


def test_the_same_bits_again_and_with_any_number_of_threads(monkeypatch, simd_level):
    arguments = inputs(40, 48, 40, 9, 9)
    first = results(cell.conv3x3_forward, *arguments)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for name, value in results(cell.conv3x3_forward, *arguments).items():
            assert torch.equal(value, first[name]), (threads, name)


def test_only_what_is_asked_for_has_a_gradient():
    x, weight, dy = inputs(2, 16, 16, 5, 5)
    expected = truth(x, weight, dy)
    (dx,) = torch.autograd.grad(cell.conv3x3_forward(x.requires_grad_(), weight), x, dy)
    assert_matches(dx, expected["dx"], torch.float32, "dx", slack=2)
    weight.requires_grad_()
    (dweight,) = torch.autograd.grad(cell.conv3x3_forward(x.detach(), weight), weight, dy)
    assert_matches(dweight, expected["dweight"], torch.float32, "dweight", slack=2)


def test_what_is_worth_it():
    maps, weight = channels_last(torch.zeros(32, 32, 8, 8)), torch.zeros(32, 32, 3, 3)
    assert cell._worthwhile(maps, weight)
    assert not cell._worthwhile(maps.contiguous(), weight)
    assert not cell._worthwhile(maps.double(), weight.double())
    assert not cell._worthwhile(maps[:, :3], weight[:, :3])
    assert not cell._worthwhile(maps[:2], weight)
    assert not cell._worthwhile(maps[..., :1, :1], weight)
    with torch.autocast("cpu"):
        assert not cell._worthwhile(maps, weight)
        assert ops.conv3x3(maps, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_take_torchs_way(dtype):
    x, weight, _ = (t.to(dtype) for t in inputs(4, 32, 32, 16, 16))
    assert torch.equal(ops.conv3x3(x, weight), F.conv2d(x, weight, padding=1))


def test_registration_and_compilation():
    x, weight, dy = inputs(2, 33, 32, 20, 18)
    x.requires_grad_()
    weight.requires_grad_()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(cell.conv3x3_forward, (x, weight), test_utils=tests)
    compiled = torch.compile(ops.conv3x3, fullgraph=True, backend="aot_eager")
    expected = results(ops.conv3x3, x, weight, dy)
    for name, value in results(compiled, x, weight, dy).items():
        assert torch.equal(value, expected[name]), name


def test_refusals():
    x, weight = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3)
    with pytest.raises(ValueError, match=r"conv3x3: x is \[4, 5, 5\], expected \[N, C, H, W\]"):
        ops.conv3x3(x[0], weight)
    with pytest.raises(ValueError, match=r"weight is \[6, 3, 3, 3\], expected \[K, 4, 3, 3\]"):
        ops.conv3x3(x, weight[:, :3])
    with pytest.raises(ValueError, match="5, 5"):
        ops.conv3x3(x, torch.zeros(6, 4, 5, 5))
    pixels, taps = torch.zeros(2, 5, 5, 4).numpy(), weight.numpy()
    for y in (torch.zeros(2, 5, 5, 5), torch.zeros(2, 5, 6, 6), torch.zeros(2, 5, 5, 12)[..., ::2]):
        with pytest.raises(ValueError, match="conv3x3: "):
            _C.conv3x3(pixels, taps, y.numpy(), num_threads=1)
    with pytest.raises(TypeError):  # nothing is converted behind the caller's back
        _C.conv3x3(pixels.astype("float64"), taps, pixels, num_threads=1)


def test_fast_convolutions_change_only_what_they_serve():
    net = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, stride=2, bias=False),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.Conv2d(4, 4, 1, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False),
    )
    before, x = copy.deepcopy(net), normal(2, 4, 9, 9)
    assert fast_convolutions(net) is net
    assert [type(layer) is Conv3x3 for layer in net] == [True] + [False] * 6
    assert list(net.state_dict()) == list(before.state_dict())
    before.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(x), before(x))


def test_resnet18_is_torchvisions():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    net = build_encoder("resnet18", 32).to(memory_format=torch.channels_last).eval()
    assert sum(type(m) is Conv3x3 for m in net.modules()) == 14
    theirs = models.resnet18(num_classes=1)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool, theirs.fc = nn.Identity(), nn.Identity()
    theirs.load_state_dict(net.net.state_dict())
    theirs.double().eval()
    for model in (net.net, theirs):  # smooth, or a rounding that flips a ReLU shows in gradients
        for block in (model, *(m for m in model.modules() if hasattr(m, "conv2"))):
            block.relu = nn.SiLU()
    x = channels_last(normal(32, 3, 16, 16))
    dh = normal(32, 512, seed=1)
    h, expected = net(x), theirs(x.double())
    assert_matches(h, expected, torch.float32, "h", slack=5)
    h.backward(dh)
    expected.backward(dh.double())
    for (name, p), q in zip(net.net.named_parameters(), theirs.parameters(), strict=True):
        assert_matches(p.grad, q.grad, torch.float32, name, slack=5)
