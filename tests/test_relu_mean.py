"""relu_mean: means and gradients against float64, with the kernels' ReLU masks."""

import pytest
import torch
from test_conv_bn_relu import deferred, images, leaf, mask_of, normal
from tolerances import assert_matches

from bagssl_fast import ops
from bagssl_fast._extension import _C
from bagssl_fast.ops import Deferred
from bagssl_fast.ops.cpu import relu_mean as cell

# N, C, H, W: vectors are 16, 8 and 4 channels, parts 32 maps.
SHAPES = [(33, 512, 3, 3), (1, 1, 1, 1), (5, 13, 4, 7), (65, 17, 2, 3), (3, 31, 9, 1)]


def mean_and_gradients(x: Deferred, dy: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    y = ops.relu_mean(x, **options)
    return {"y": y.detach()} | {
        f"d{name}": grad
        for name, grad in zip(x._fields, torch.autograd.grad(y, x, dy), strict=True)
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, simd_level):
    x = leaf(deferred(images(*shape, mean=0.2)), torch.float32)
    dy = normal(*shape[:2], seed=1)
    actual = mean_and_gradients(x, dy.float(), impl="cpu")
    double = leaf(x, torch.float64)
    mask = mask_of(x)
    center, scale, shift = (v[:, None, None] for v in double[1:])
    y = ((scale * (double.y - center) + shift) * mask).mean((2, 3))
    assert_matches(actual["y"], y, torch.float32, "y")
    gradients = torch.autograd.grad(y, double, dy)
    for name, expected in zip(x._fields, gradients, strict=True):
        assert_matches(actual[f"d{name}"], expected, torch.float32, f"d{name}", slack=2)


def test_the_reference_takes_both_kinds():
    x = deferred(images(4, 5, 3, 2))
    expected = ops.applied(x).mean((2, 3))
    assert torch.equal(ops.relu_mean(x, impl="reference"), expected)
    assert torch.equal(ops.relu_mean(ops.applied(x)), expected)
    assert torch.equal(ops.relu_mean(x, impl="cpu"), expected)  # float64 is the reference's
    leaves = leaf(x, torch.float64)
    assert torch.autograd.gradcheck(lambda *v: ops.relu_mean(Deferred(*v)), tuple(leaves))


def test_memory_of_any_layout():
    x, dy = deferred(images(6, 7, 4, 4)), normal(6, 7).float()
    expected = mean_and_gradients(leaf(x, torch.float32), dy)
    other = leaf(x._replace(y=x.y.contiguous()), torch.float32)
    for name, value in mean_and_gradients(other, dy.t().contiguous().t()).items():
        assert torch.equal(value, expected[name]), name


def test_the_same_bits_with_any_number_of_threads(monkeypatch):
    x, dy = leaf(deferred(images(300, 20, 3, 3)), torch.float32), normal(300, 20).float()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    first = mean_and_gradients(x, dy)
    for threads in (2, 3, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for name, value in mean_and_gradients(x, dy).items():
            assert torch.equal(value, first[name]), (threads, name)


def test_no_maps_have_no_means():
    x = leaf(deferred(images(0, 5, 3, 3)), torch.float32)
    for name, value in mean_and_gradients(x, torch.zeros(0, 5), impl="cpu").items():
        assert value.numel() == 0 or torch.equal(value, torch.zeros(5)), name


def test_registration_and_refusals():
    x = leaf(deferred(images(2, 5, 3, 3)), torch.float32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(cell.relu_mean_forward, tuple(x), test_utils=tests)
    with pytest.raises(ValueError, match=r"relu_mean: x is \[2, 5, 3\], expected \[N, C, H, W\]"):
        ops.relu_mean(torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match=r"\[2, 5, 0, 3\], expected at least one pixel"):
        ops.relu_mean(torch.zeros(2, 5, 0, 3))
    pixels, vector = torch.zeros(2, 3, 3, 5).numpy(), torch.zeros(5).numpy()
    with pytest.raises(ValueError, match=r"means is \(2, 4\)"):
        means = torch.zeros(2, 4).numpy()
        _C.relu_mean(pixels, vector, vector, vector, means, num_threads=1)
