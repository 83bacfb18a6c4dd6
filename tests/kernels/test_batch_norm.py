"""The passes of batch norm in the interpreter: many strips, many parts, ragged ends."""

import pytest
import torch
from bagssl_fast.kernels import _batch_norm as passes
from bagssl_fast.kernels._tuning import sum_strip
from torch import Tensor


def matrix(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Columns of spread 1 whose means go up to hundreds of it."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    return 5.0 * torch.arange(cols) + y


def moments(y: Tensor) -> Tensor:
    y = y.double()
    count = torch.full((y.shape[1],), float(len(y)), dtype=torch.float64)
    return torch.stack([count, y.mean(0), (y - y.mean(0)).square().sum(0)])


@pytest.mark.parametrize(
    ("rows", "cols", "repeat"),
    [(2049, 33, 16), (4200, 70, 16), (1, 3, 1), (31, 129, 1)],
    ids=str,
)
def test_statistics_of_columns(rows, cols, repeat):
    """One more row than whole programs have, one more column than a tile."""
    assert sum_strip(rows, cols, 2).repeat == repeat
    y = matrix(rows, cols).float()
    found = passes.batch_stats_fwd(y)
    torch.testing.assert_close(found.double(), moments(y), rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 63, 130])
def test_parts_are_merged_side_by_side(parts):
    """A program merged all parts one after the other: thousands of a map of a ResNet."""
    pieces = [matrix(1 + i % 3, 18, seed=i) for i in range(parts)]
    given = torch.stack([moments(piece) for piece in pieces]).float()
    found = passes.merge_stats(given)
    torch.testing.assert_close(found.double(), moments(torch.cat(pieces)), rtol=1e-4, atol=1e-6)


def test_gradients_of_scale_and_shift_over_many_strips():
    rows, cols = 2049, 33
    y, dout = matrix(rows, cols).float(), matrix(rows, cols, seed=1).float()
    y, dout = y - 5 * torch.arange(cols), dout - 5 * torch.arange(cols)
    zero, one = torch.zeros(cols), torch.ones(cols)
    found = passes.reduce_bwd(y, dout, zero, one, one, zero, True)
    masked = dout.double() * (y > 0)
    expected = torch.stack([(masked * y).sum(0), masked.sum(0)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_more_blocks_of_rows_than_a_second_grid_axis_has():
    """65,535 is the most of it: a projector's block failed above 8.4 M rows. By arithmetic alone:
    no launch."""
    y = torch.empty((1 << 33, 64), dtype=torch.float16, device="meta")
    strips, blocks = passes._blocks(y, sum_strip(*y.shape, programs=132))
    assert strips > 65_535 and strips * blocks < 2**31
