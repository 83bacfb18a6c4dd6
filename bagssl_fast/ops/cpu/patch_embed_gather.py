"""patch_embed of patches anywhere: a few hundred at a time are cut and multiplied in the cache.

Memory beyond the result: one chunk of patches.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bagssl_fast._extension import _C

CHUNK = 1 << 19  # elements of patches or of a half precision result in flight
CENTER = 128  # bytes are centered before they meet the weight: fewer digits are lost


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of sums: float64 for float64 weights, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class _Patches:
    """Patches as rows of centered pixels [n, h w C], a chunk of the P B positions at a time."""

    def __init__(self, images: Tensor, weight: Tensor, positions: Tensor):
        self.dtype = compute_dtype(weight)
        batch, height, width, channels = images.shape
        _, _, patch_h, patch_w = weight.shape
        if positions.dim() == 2:
            positions = positions[:, None].expand(-1, batch, -1)
        top, left = positions.long().unbind(dim=2)  # [P, B]
        offsets = ((torch.arange(batch) * height + top) * width + left) * channels
        self.offsets = offsets.flatten().numpy()
        self.pixels = images.contiguous().flatten().numpy()
        self.lines, self.length, self.stride = patch_h, patch_w * channels, width * channels
        self.step = max(1, CHUNK // (self.lines * self.length))

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        rows = torch.empty(self.step, self.lines * self.length, dtype=self.dtype)
        for start in range(0, len(self.offsets), self.step):
            offsets = self.offsets[start : start + self.step]
            pixels = rows[: len(offsets)]
            _C.patch_rows(
                self.pixels,
                offsets=offsets,
                lines=self.lines,
                stride=self.stride,
                center=CENTER,
                out=pixels.numpy(),
                num_threads=torch.get_num_threads(),
            )
            yield slice(start, start + len(offsets)), pixels


def forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    relu: bool,
    y: Tensor,
) -> None:
    """Writes the embeddings of patches of `images` [B, H, W, C] to y [P, B, M]."""
    out_dim = weight.shape[0]
    scale, shift = _folded(weight, mean, std)
    flat = weight.to(scale.dtype).permute(0, 2, 3, 1)  # [M, h, w, C]
    matrix = (flat * scale).flatten(1).T
    offset = (flat * shift).flatten(1).sum(dim=1)
    offset = offset if bias is None else offset + bias
    rows = y.view(-1, out_dim)
    for part, pixels in _Patches(images, weight, positions):
        target = rows[part]
        out = target if y.dtype == scale.dtype else torch.empty_like(target, dtype=scale.dtype)
        torch.addmm(offset, pixels, matrix, out=out)
        if relu:
            out.relu_()
        if out is not target:
            target.copy_(out)


def backward(
    dy: Tensor,
    y: Tensor | None,
    images: Tensor,
    weight: Tensor,
    positions: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """dW [M, C, h, w] and dbias [M] from dy [P, B, M], masked by a result y."""
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
    return scale.to(compute_dtype(weight)), shift.to(compute_dtype(weight))


def _masked(dy: Tensor, y: Tensor | None, dtype: torch.dtype) -> Tensor:
    dy = dy.to(dtype)
    return dy if y is None else dy * (y > 0)
