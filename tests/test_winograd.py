"""conv_bn_relu where it runs by Winograd: value and gradients against float64, every element."""

import pytest
import torch
from test_conv_bn_relu import (
    Block,
    both,
    check,
    check_same_bits,
    check_written,
    deferred,
    images,
    leaf,
    normal,
)
from tolerances import assert_matches

from bagssl_fast import ops
from bagssl_fast.ops import Deferred

# N, C, M, padding, H, W: tiles are 4x4, panels 32, 16 and 8 channels, pieces of sums 128 steps,
# chunks 48 tiles (all of them up to 72), ranges 128 channels.
SHAPES = [
    (40, 130, 40, 1, 8, 8),
    (9, 64, 64, 1, 16, 16),
    (33, 256, 300, 1, 4, 4),
    (33, 512, 520, 1, 4, 4),
    (19, 33, 47, 0, 9, 10),
    (7, 40, 32, 2, 13, 15),
    (3, 37, 35, 1, 18, 27),
]


def block_of(c: int, m: int, padding: int) -> Block:
    return Block(c, m, 3, 1, padding)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_block_matches_float64(shape, training, simd_level):
    n, c, m, padding, height, width = shape
    x = images(n, c, height, width, mean=0.3)
    check(x, [block_of(c, m, padding)], training, slack=2)
    # As for direct convolutions, the sums that are the gradients of shift and center nearly cancel.
    check(deferred(x), [block_of(c, m, padding)], training, slack=4)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scales(scale):
    check(images(9, 40, 9, 10, scale=scale), [block_of(40, 48, 1)], slack=2)


def test_a_chain_of_winograd_and_direct_blocks(simd_level):
    blocks = [Block(3, 40, 3, 1, 1), Block(40, 48, 3, 1, 1), Block(48, 33, 3, 2, 1)]
    check(images(6, 3, 16, 16, mean=0.3), blocks, slack=3)


def test_memory_of_any_layout():
    block, x = block_of(40, 48, 1), images(5, 40, 12, 12)
    dense = block_of(40, 48, 1)
    dense.weight = dense.weight.contiguous(memory_format=torch.channels_last)
    expected = both(x, [block])[0]
    for given, own in ((x.contiguous(), block), (x, dense)):
        for name, value in both(given, [own])[0].items():
            assert torch.equal(value, expected[name]), name
    strided = normal(5, 80, 12, 24)[:, ::2, :, ::2]
    check(strided, [block], slack=2)
    transposed = block_of(40, 48, 1)
    transposed.weight = block.weight.transpose(2, 3).contiguous().transpose(2, 3)
    for name, value in both(x, [transposed])[0].items():
        assert torch.equal(value, expected[name]), name
    check(x[:1].expand_as(x), [block], slack=2)


def test_a_nan_stays_a_nan(simd_level):
    x, block = images(33, 40, 8, 8).float(), block_of(40, 32, 1).to(torch.float32)
    x[0, 3, 1, 1] = float("nan")
    for given in (x, Deferred(*(v.float() for v in deferred(x.double())))._replace(y=x)):
        out = ops.applied(block(given, training=False))
        assert out[0, :, :3, :3].isnan().all() and out[0, :, 4:, 4:].isfinite().all()
        assert out[1:].isfinite().all()


def test_the_same_bits_with_any_number_of_threads(monkeypatch, simd_level):
    for n, c, m, padding, height, width in SHAPES[:4]:
        x = deferred(images(n, c, height, width))
        check_same_bits(monkeypatch, x, [block_of(c, m, padding)])


def test_everything_is_written_and_nothing_beside_it(simd_level):
    check_written(9, 37, 45, 7, 9)


def test_only_what_needs_a_gradient_gets_one():
    block, x = block_of(40, 33, 1), images(6, 40, 12, 12)
    expected = both(x, [block])[1]
    only_x, frozen = leaf(x, torch.float32), block.to(torch.float32)
    frozen.weight.requires_grad_(False)
    out = ops.applied(frozen(only_x))
    (out * normal(*out.shape).float()).sum().backward()
    assert_matches(only_x.grad, expected["dx"], torch.float32, "dx", slack=2)
    assert frozen.weight.grad is None
    own = block.to(torch.float32)
    out = ops.applied(own(x.float()))
    (out * normal(*out.shape).float()).sum().backward()
    assert_matches(own.weight.grad, expected["dweight 0"], torch.float32, "dweight", slack=2)
