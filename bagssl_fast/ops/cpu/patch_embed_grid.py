"""patch_embed where patches share their pixels: by two-dimensional Fourier spectra.

The positions are many of the combinations of some rows and columns, the same for all images, so the
layer is a correlation: the spectra of pixels and weight are multiplied, summed over channels and
transformed back, only to the positions asked for. Transforms are short (tens of values) and made by
matrices; the products and the transform back, nearly all the work, are one loop of C++
(`csrc/patch_grid.h`) that keeps a tile in the cache. 256 patches of 16x16 in 32x32 pixels need 10
times fewer multiply-adds than the patches themselves.

Memory beyond the result: the spectra of weight and images.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bagssl_fast._extension import _C
from bagssl_fast.ops.cpu.patch_embed_gather import CHUNK, compute_dtype

SPAN = 32  # pixels of a transform that fit the cache well; twice the patch where that is more
GRID_GAIN = 1.3  # how many times fewer multiply-adds make this faster


class _Block(NamedTuple):
    """Positions number `first` to `last` of an axis; their patches span `start` to `stop`."""

    first: int
    last: int
    start: int
    stop: int
    positions: list[int]

    @property
    def center(self) -> int:
        """Twice the middle of the positions, which may be between two pixels."""
        return self.positions[0] + self.positions[-1]


class _Axis:
    """Ascending positions of patches along one axis, in blocks that are transformed together.

    The length N of all transforms is odd, so that every frequency but zero has a mirror image.
    """

    def __init__(self, positions: list[int], extent: int):
        self.count, self.extent = len(positions), extent
        reach = positions[-1] - positions[0]
        parts = reach // max(extent, SPAN - extent + 1) + 1
        size = -(-len(positions) // parts)
        pieces = {i: positions[i : i + size] for i in range(0, len(positions), size)}
        self.blocks = [
            _Block(i, i + len(piece), piece[0], piece[-1] + extent, piece)
            for i, piece in pieces.items()
        ]
        self.length = max(block.stop - block.start for block in self.blocks) | 1
        self.half = self.length // 2
        self.distances = max(len(self._distances(block)) for block in self.blocks)

    def angles(self, frequencies: Sequence[int], doubled: Sequence[int]) -> Tensor:
        """2 pi f p / N of frequencies and positions (given doubled), float64 [f, p]."""
        turns = torch.outer(torch.tensor(frequencies), torch.tensor(doubled)) % (2 * self.length)
        return turns.double() * (math.pi / self.length)

    def waves_back(self, block: _Block, scale: float, dtype: torch.dtype) -> tuple[Any, ...]:
        """The axis as csrc/patch_grid.h expects it: cosines, sines, distances, signs."""
        distances = self._distances(block)
        angles = self.angles(range(self.half + 1), distances).T
        offsets = [2 * position - block.center for position in block.positions]
        index = [distances.index(abs(offset)) for offset in offsets]
        sign = [-1.0 if offset < 0 else 1.0 for offset in offsets]
        tables = (angles.cos() * scale, angles[:, 1:].sin() * scale, torch.tensor(sign))
        cosines, sines, signs = (table.to(dtype).contiguous().numpy() for table in tables)
        return cosines, sines, torch.tensor(index).numpy(), signs

    @staticmethod
    def _distances(block: _Block) -> list[int]:
        return sorted({abs(2 * position - block.center) for position in block.positions})


class Grid:
    """Positions [P, 2] as combinations of rows `down` and columns `across`.

    `slots` [T, L] is the number of each combination's position; -1 where it is not one of them.
    """

    def __init__(self, positions: Tensor, weight: Tensor):
        tops, rows = positions[:, 0].unique(return_inverse=True)
        lefts, columns = positions[:, 1].unique(return_inverse=True)
        self.slots = torch.full((len(tops), len(lefts)), -1)
        self.slots[rows, columns] = torch.arange(len(positions))
        self.out_dim, self.channels, height, width = weight.shape
        self.dtype = compute_dtype(weight)
        self.down, self.across = _Axis(tops.tolist(), height), _Axis(lefts.tolist(), width)
        self.frequencies_across = range(self.across.half + 1)
        self.frequencies_down = [0, *(s * v for v in range(1, self.down.half + 1) for s in (1, -1))]

    def multiply_adds(self, batch: int) -> float:
        """For one image and output, the weight's transform shared by the batch."""
        down, across = self.down, self.across
        num_across, num_down = across.half + 1, down.length
        blocks = len(down.blocks) * len(across.blocks)
        products = num_across * num_down * 4 * self.channels
        along_height = num_across * 2 * down.distances * num_down
        along_width = -(-down.count // len(down.blocks)) * across.distances * across.length
        by_width = 2 * num_across * across.extent * down.extent
        by_height = num_across * 4 * num_down * down.extent
        return blocks * (products + along_height + along_width) + self.channels * (
            by_width + by_height
        ) / max(batch, 1)

    def spectrum(self, x: Tensor, down: Sequence[int], across: Sequence[int]) -> Tensor:
        """[F, V, 2, C, n] of x [w, h, C, n], pixels at the given places (doubled)."""
        by_width, by_height = self._waves(down, across)
        partly = (by_width @ x.flatten(1)).view(len(by_height), by_height.shape[2], -1)
        return torch.bmm(by_height, partly).view(len(by_height), -1, 2, *x.shape[2:])

    def weight_spectrum(self, weight: Tensor) -> Tensor:
        """[F, V, 2, C, M], conjugate."""
        x = weight.to(self.dtype).permute(3, 2, 1, 0).contiguous()
        return self.spectrum(x, *self._weight_places())

    def weight_gradient(self, dspectrum: Tensor) -> Tensor:
        """dW [M, C, h, w] from the gradient of `weight_spectrum`."""
        by_width, by_height = self._waves(*self._weight_places())
        partly = torch.bmm(by_height.mT, dspectrum.view(len(by_height), by_height.shape[1], -1))
        dweight = by_width.T @ partly.view(len(by_width), -1)
        size = (self.across.extent, self.down.extent, self.channels, self.out_dim)
        return dweight.view(size).permute(3, 2, 1, 0)

    def operands(
        self, images: Tensor, mean: Sequence[float], std: Sequence[float]
    ) -> Iterator[dict[str, Any]]:
        """The arguments of csrc/patch_grid.h, for every combination of blocks."""
        offset, divisor = torch.tensor([mean, std], dtype=self.dtype)
        scale = 2 / (self.down.length * self.across.length)
        for rows in self.down.blocks:
            for columns in self.across.blocks:
                cosines, sines, distance, sign = self.across.waves_back(columns, scale, self.dtype)
                cosines[:, 0] /= 2  # frequency zero has no mirror image
                pixels = images[:, rows.start : rows.stop, columns.start : columns.stop]
                pixels = (pixels.to(self.dtype) / 255 - offset) / divisor
                places = (
                    [2 * i - block.center for i in range(block.start, block.stop)]
                    for block in (rows, columns)
                )
                spectrum = self.spectrum(pixels.permute(2, 1, 3, 0).contiguous(), *places)
                slots = self.slots[rows.first : rows.last, columns.first : columns.last]
                yield {
                    "pixels": spectrum.permute(4, 0, 1, 2, 3).contiguous().numpy(),
                    "down": self.down.waves_back(rows, 1.0, self.dtype),
                    "across": (cosines, -sines, distance, sign),
                    "slots": slots.contiguous().numpy(),
                    "num_threads": torch.get_num_threads(),
                }

    def chunks(self, y: Tensor) -> Iterator[slice]:
        """Images whose results [P, B, M] are converted together: all, if none have to be."""
        batch = y.shape[1]
        exact = y.dtype == self.dtype and y.is_contiguous()
        step = batch if exact else max(1, CHUNK // (len(y) * self.out_dim))
        return (slice(i, min(i + step, batch)) for i in range(0, batch, step))

    def _weight_places(self) -> tuple[range, range]:
        return range(0, -2 * self.down.extent, -2), range(0, -2 * self.across.extent, -2)

    def _waves(self, down: Sequence[int], across: Sequence[int]) -> tuple[Tensor, Tensor]:
        """exp(-i angle) as real matrices: [2 F, w], and [F, 2 V, 2 h] (the same for all F)."""
        angles = self.across.angles(self.frequencies_across, across)
        by_width = torch.stack([angles.cos(), -angles.sin()], dim=1).flatten(0, 1)
        angles = self.down.angles(self.frequencies_down, down)
        cosines, sines = angles.cos(), angles.sin()
        by_height = torch.stack(
            [torch.cat([cosines, sines], dim=1), torch.cat([-sines, cosines], dim=1)], dim=1
        ).flatten(0, 1)
        count = len(self.frequencies_across)
        return by_width.to(self.dtype), by_height.to(self.dtype).expand(count, -1, -1)


def worthwhile(weight: Tensor, positions: Tensor, batch: int) -> Grid | None:
    """`positions` [P, 2] as a grid, if the grid way is the cheaper one there."""
    if positions.dim() != 2:
        return None
    grid = Grid(positions, weight)
    if int((grid.slots >= 0).sum()) < len(positions):  # some position comes twice
        return None
    direct = len(positions) * weight[0].numel()
    return grid if GRID_GAIN * grid.multiply_adds(batch) < direct else None


def forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: Grid,
    mean: Sequence[float],
    std: Sequence[float],
    relu: bool,
    y: Tensor,
) -> None:
    """Writes the embeddings of patches of `images` [B, H, W, C] to y [P, B, M]."""
    spectrum = grid.weight_spectrum(weight).numpy()
    shift = None if bias is None else bias.detach().to(grid.dtype).contiguous().numpy()
    for part in grid.chunks(y):
        target = y[:, part]
        out = target if y.dtype == grid.dtype else torch.empty_like(target, dtype=grid.dtype)
        for operands in grid.operands(images[part], mean, std):
            _C.patch_grid(**operands, weight=spectrum, bias=shift, relu=relu, y=out.numpy())
        if out is not target:
            target.copy_(out)


def backward(
    dy: Tensor,
    y: Tensor | None,
    images: Tensor,
    weight: Tensor,
    grid: Grid,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """dW [M, C, h, w] and dbias [M] from dy [P, B, M], masked by a result y."""
    size = (grid.across.half + 1, grid.down.length, 2, grid.channels, grid.out_dim)
    dspectrum = torch.zeros(size, dtype=grid.dtype)
    dbias = torch.zeros(grid.out_dim, dtype=grid.dtype)
    for part in grid.chunks(dy):
        dout = dy[:, part].to(grid.dtype)
        result = None if y is None else y[:, part].to(grid.dtype)
        if not dy.is_contiguous():
            dout, result = dout.contiguous(), None if result is None else result.contiguous()
        for operands in grid.operands(images[part], mean, std):
            _C.patch_grid_backward(
                **operands,
                dy=dout.numpy(),
                y=None if result is None else result.numpy(),
                dweight=dspectrum.numpy(),
                dbias=dbias.numpy(),
            )
    return grid.weight_gradient(dspectrum), dbias
