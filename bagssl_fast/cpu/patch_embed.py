"""A linear layer over patches of uint8 images, without the patches.

Two ways, chosen by counting multiply-adds:

*Grid.* Where positions are every combination of some rows and columns, close together, neighbouring
patches share their pixels and the layer is a correlation. Along the width it is done in R = 1.5 N
products of sums of N pixels with sums of a weight's row: a real DFT, whose complex products take
three real ones each (Gauss), and of which only the wanted columns are transformed back. Along the
height it stays a sum, so all of it is GEMMs, R (C h + L) multiply-adds for a row of L patches
where the patches themselves need L C h w: 5 times fewer for 256 patches of 16x16 in 32x32 pixels.

*Gather.* Anything else: a few hundred patches at a time are cut as bytes and multiplied while they
are in the cache.

Memory beyond the result: the weight's and one chunk's sums, or one chunk of patches. The gradient
goes the same ways backwards. Saved for backward: images, weight, and the result if `relu`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 19  # elements of products or patches in flight
GRID_GAIN = 1.3  # how many times fewer multiply-adds make the grid way faster
CENTER = 128  # bytes are centred before they meet the weight: fewer digits are lost


class _Grid(NamedTuple):
    """Positions that are all combinations of `tops` and `lefts`, row-major."""

    tops: list[int]
    lefts: list[int]


@torch.library.custom_op("bagssl::patch_embed_cpu", mutates_args=(), device_types="cpu")
def patch_embed_forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    relu: bool,
) -> Tensor:
    """y [P, B, M] in weight's dtype."""
    y = weight.new_empty((positions.shape[0], images.shape[0], weight.shape[0]))
    if y.numel() == 0:
        return y
    with torch.autocast("cpu", enabled=False):
        grid = _worthwhile_grid(weight, positions)
        if grid is not None:
            _grid_forward(images, weight, bias, grid, mean, std, relu, y)
        else:
            _gather_forward(images, weight, bias, positions, mean, std, relu, y)
    return y


@patch_embed_forward.register_fake
def _(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    relu: bool,
) -> Tensor:
    return weight.new_empty((positions.shape[0], images.shape[0], weight.shape[0]))


@torch.library.custom_op("bagssl::patch_embed_cpu_backward", mutates_args=(), device_types="cpu")
def patch_embed_backward(
    dy: Tensor,
    y: Tensor | None,
    images: Tensor,
    weight: Tensor,
    positions: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """dW [M, C, h, w] and dbias [M] in weight's dtype; `y` masks dy where a ReLU followed."""
    if dy.numel() == 0:
        return torch.zeros_like(weight, memory_format=torch.contiguous_format), weight.new_zeros(
            weight.shape[0]
        )
    with torch.autocast("cpu", enabled=False):
        grid = _worthwhile_grid(weight, positions)
        if grid is not None:
            dweight, dbias = _grid_backward(dy, y, images, weight, grid, mean, std)
        else:
            dweight, dbias = _gather_backward(dy, y, images, weight, positions, mean, std)
    return dweight.to(weight.dtype).contiguous(), dbias.to(weight.dtype)


@patch_embed_backward.register_fake
def _(
    dy: Tensor,
    y: Tensor | None,
    images: Tensor,
    weight: Tensor,
    positions: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


# ----------------------------------------------------------------------------------- the grid way


def _worthwhile_grid(weight: Tensor, positions: Tensor) -> _Grid | None:
    """The grid that `positions` [P, 2] form, if the grid way is the cheaper one there."""
    if positions.dim() != 2:
        return None
    rows = positions.tolist()
    num_lefts = next((i for i, (top, _) in enumerate(rows) if top != rows[0][0]), len(rows))
    lefts = [left for _, left in rows[:num_lefts]]
    tops = [top for top, _ in rows[::num_lefts]]
    if rows != [[top, left] for top in tops for left in lefts]:
        return None
    _, channels, height, width = weight.shape
    num_products = 1.5 * (max(lefts) - min(lefts) + width)
    products = num_products * (channels * height + num_lefts)
    direct = num_lefts * channels * height * width
    return _Grid(tops, lefts) if GRID_GAIN * products < direct else None


class _Correlation:
    """The correlation of rows of N pixels with rows of w weights, at L columns, in R products.

    `out[l] = sum_v pixels[l + v] weight[v] = sum_r of_out[l, r] * (pixels @ of_pixels)[r] *
    (weight @ of_weight)[r]`. With X, K the DFTs of length N, X conj(K) has the parts P1 - P3 and
    P1 - P2, where P1 = (Xr + Xi) Kr, P2 = Xr (Kr + Ki), P3 = Xi (Kr - Ki).
    """

    def __init__(self, weight: Tensor, grid: _Grid):
        self.dtype = _compute_dtype(weight)
        _, _, self.height, width = weight.shape
        self.left = min(grid.lefts)
        self.length = max(grid.lefts) - self.left + width
        real, imaginary = self._waves(range(self.length))
        out_real, out_imaginary = self._waves([left - self.left for left in grid.lefts])
        # A frequency and its mirror image add up to twice a real part; 0 and N / 2 have no mirror.
        share = torch.full((real.shape[1],), 2 / self.length, dtype=torch.float64)
        share[0] = 1 / self.length
        if self.length % 2 == 0:
            share[-1] = 1 / self.length
        of_pixels = torch.cat([real + imaginary, real, imaginary], dim=1)  # [N, R]
        of_weight = torch.cat([real, real + imaginary, real - imaginary], dim=1)[:width]  # [w, R]
        of_out = torch.cat(
            [(out_real + out_imaginary) * share, -out_imaginary * share, -out_real * share], dim=1
        )  # [L, R]
        # Sines of frequencies 0 and N / 2 vanish, and with them a product or two.
        needed = (of_pixels.abs().amax(dim=0) > 1e-9) & (of_out.abs().amax(dim=0) > 1e-9)
        self.of_pixels, self.of_weight, self.of_out = (
            matrix[:, needed].to(self.dtype).contiguous()
            for matrix in (of_pixels, of_weight, of_out)
        )
        self.num_products = self.of_out.shape[1]

    def _waves(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """cos(2 pi f n / N) and -sin(2 pi f n / N), [n, N // 2 + 1] each."""
        frequencies = torch.arange(self.length // 2 + 1)
        turns = torch.tensor(positions)[:, None] * frequencies % self.length
        angles = turns * (2 * math.pi / self.length)
        return angles.double().cos(), -angles.double().sin()

    def pixel_sums(self, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """[R, B, H, C] of uint8 [B, H, W, C], normalised."""
        offset, divisor = torch.tensor([mean, std], dtype=self.dtype)
        pixels = images[:, :, self.left : self.left + self.length].to(self.dtype)
        pixels = ((pixels / 255 - offset) / divisor).movedim(2, 0)  # [N, B, H, C]
        return (self.of_pixels.T @ pixels.flatten(1)).unflatten(1, pixels.shape[1:])

    def rows(self, sums: Tensor, top: int) -> Tensor:
        """[R, B, h C], a view: what one row of patches sees of `pixel_sums`."""
        return sums[:, :, top : top + self.height].flatten(2)

    def weight_sums(self, weight: Tensor) -> Tensor:
        """[R, h C, M] of [M, C, h, w]."""
        by_column = weight.to(self.dtype).permute(3, 2, 1, 0)  # [w, h, C, M]
        return (self.of_weight.T @ by_column.flatten(1)).unflatten(1, (-1, weight.shape[0]))

    def weight_gradient(self, dsums: Tensor, channels: int) -> Tensor:
        """dW [M, C, h, w] from the gradient of `weight_sums`, transposed: [R, M, h C]."""
        by_column = (self.of_weight @ dsums.flatten(1)).unflatten(1, (-1, self.height, channels))
        return by_column.permute(1, 3, 2, 0)

    def chunks(self, batch: int, out_dim: int) -> Iterator[slice]:
        most = max(1, CHUNK // (self.num_products * out_dim))
        step = -(-batch // -(-batch // most))  # equal chunks
        return (slice(i, min(batch, i + step)) for i in range(0, batch, step))


def _grid_forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: _Grid,
    mean: Sequence[float],
    std: Sequence[float],
    relu: bool,
    y: Tensor,
) -> None:
    out_dim = weight.shape[0]
    correlation = _Correlation(weight, grid)
    weight_sums = correlation.weight_sums(weight)
    y = y.unflatten(0, (len(grid.tops), len(grid.lefts)))  # [T, L, B, M]
    for part in correlation.chunks(images.shape[0], out_dim):
        pixel_sums = correlation.pixel_sums(images[part], mean, std)
        products = pixel_sums.new_empty(correlation.num_products, pixel_sums.shape[1], out_dim)
        columns = slice(part.start * out_dim, part.stop * out_dim)
        for row, top in enumerate(grid.tops):
            torch.bmm(correlation.rows(pixel_sums, top), weight_sums, out=products)
            target = y[row].flatten(1)[:, columns]  # [L, b M]
            exact = target.dtype == products.dtype
            out = target if exact else torch.empty_like(target, dtype=products.dtype)
            torch.mm(correlation.of_out, products.flatten(1), out=out)
            if bias is not None:
                out.unflatten(1, (-1, out_dim)).add_(bias)
            if relu:
                out.relu_()
            if not exact:
                target.copy_(out)


def _grid_backward(
    dy: Tensor,
    y: Tensor | None,
    images: Tensor,
    weight: Tensor,
    grid: _Grid,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor]:
    out_dim, channels, height, _ = weight.shape
    correlation = _Correlation(weight, grid)
    shape = (len(grid.tops), len(grid.lefts))
    dy = dy.unflatten(0, shape)
    y = None if y is None else y.unflatten(0, shape)
    size = (correlation.num_products, out_dim, height * channels)
    dsums = torch.zeros(size, dtype=correlation.dtype)
    dbias = torch.zeros(out_dim, dtype=correlation.dtype)
    for part in correlation.chunks(images.shape[0], out_dim):
        pixel_sums = correlation.pixel_sums(images[part], mean, std)
        dproducts = pixel_sums.new_empty(size[0], pixel_sums.shape[1], out_dim)
        for row, top in enumerate(grid.tops):
            dout = _masked(dy[row, :, part], None if y is None else y[row, :, part], dsums.dtype)
            dbias += dout.flatten(0, 1).sum(dim=0)
            torch.mm(correlation.of_out.T, dout.flatten(1), out=dproducts.flatten(1))
            dsums.baddbmm_(dproducts.mT, correlation.rows(pixel_sums, top))
    return correlation.weight_gradient(dsums, channels), dbias


# --------------------------------------------------------------------------------- the gather way


class _Patches:
    """Patches as rows of centred pixels [n, h w C], a chunk of the P B positions at a time."""

    def __init__(self, images: Tensor, weight: Tensor, positions: Tensor):
        self.dtype = _compute_dtype(weight)
        batch, height, width, channels = images.shape
        _, _, patch_h, patch_w = weight.shape
        if positions.dim() == 2:
            positions = positions[:, None].expand(-1, batch, -1)
        top, left = positions.long().unbind(dim=2)  # [P, B]
        self.offsets = ((torch.arange(batch) * height + top) * width + left).flatten()
        span = ((patch_h - 1) * width + patch_w - 1) * channels + channels
        num_pixels = batch * height * width
        # Row k is the patch whose first pixel is pixel k of the whole batch; nothing is copied.
        self.windows = (
            images.contiguous()
            .flatten()
            .as_strided(
                (num_pixels - span // channels + 1, patch_h, patch_w * channels),
                (channels, width * channels, 1),
            )
        )
        self.step = max(1, CHUNK // (patch_h * patch_w * channels))

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.offsets), self.step):
            part = slice(start, start + self.step)
            yield part, self.windows[self.offsets[part]].flatten(1).to(self.dtype).sub_(CENTER)


def _gather_forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    relu: bool,
    y: Tensor,
) -> None:
    out_dim = weight.shape[0]
    scale, shift = _folded(weight, mean, std)
    flat = weight.to(scale.dtype).permute(0, 2, 3, 1)  # [M, h, w, C]
    matrix = (flat * scale).flatten(1).T
    offset = (flat * shift).flatten(1).sum(dim=1)
    offset = offset if bias is None else offset + bias
    rows = y.view(-1, out_dim)
    for part, pixels in _Patches(images, weight, positions):
        out = torch.addmm(offset, pixels, matrix)
        rows[part] = out.relu_() if relu else out


def _gather_backward(
    dy: Tensor,
    y: Tensor | None,
    images: Tensor,
    weight: Tensor,
    positions: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor]:
    out_dim, channels, height, width = weight.shape
    scale, shift = _folded(weight, mean, std)
    dmatrix = torch.zeros(out_dim, height * width * channels, dtype=scale.dtype)
    dbias = torch.zeros(out_dim, dtype=scale.dtype)
    rows = dy.reshape(-1, out_dim)
    results = None if y is None else y.view(-1, out_dim)
    for part, pixels in _Patches(images, weight, positions):
        dout = _masked(rows[part], None if results is None else results[part], scale.dtype)
        dmatrix.addmm_(dout.T, pixels)
        dbias += dout.sum(dim=0)
    dweight = dmatrix.view(out_dim, height, width, channels) * scale
    dweight += dbias[:, None, None, None] * shift
    return dweight.permute(0, 3, 1, 2), dbias


def _folded(weight: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(byte / 255 - mean) / std as (byte - CENTER) * scale + shift, per channel."""
    offset, divisor = torch.tensor([mean, std], dtype=torch.float64)
    scale, shift = 1 / (255 * divisor), (CENTER / 255 - offset) / divisor
    return scale.to(_compute_dtype(weight)), shift.to(_compute_dtype(weight))


# ------------------------------------------------------------------------------------------- both


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _masked(dy: Tensor, y: Tensor | None, dtype: torch.dtype) -> Tensor:
    dy = dy.to(dtype)
    return dy if y is None else dy * (y > 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, bias, positions, ctx.mean, ctx.std, relu = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(output if relu else None, images, weight, positions)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    y, images, weight, positions = ctx.saved_tensors
    dweight, dbias = patch_embed_backward(dy, y, images, weight, positions, ctx.mean, ctx.std)
    return None, dweight, dbias if ctx.has_bias else None, None, None, None, None


patch_embed_forward.register_autograd(_backward, setup_context=_setup_context)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    relu: bool = False,
) -> Tensor:
    """Embeddings [P, B, M] of patches of uint8 `images` [B, H, W, C]; see `ops.patch_embed`."""
    return patch_embed_forward(images, weight, bias, positions, list(mean), list(std), relu)
