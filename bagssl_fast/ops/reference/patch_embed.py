"""A linear layer over patches cut from uint8 images at given positions: unfold + linear.

    y[p, b] = W . ((patch(b, top, left) / 255 - mean) / std) + bias,  then optionally ReLU

Every patch is materialized in float; that is what the other implementations avoid.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Embeddings [P, B, M] of the patches of `images` uint8 [B, H, W, C].

    Args:
        weight: [M, C, h, w].
        positions: integers (top, left), [P, 2] for all images or [P, B, 2] for each.
    """
    out_dim, _, height, width = weight.shape
    batch = images.shape[0]
    with torch.autocast(weight.device.type, enabled=False):
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        offset = torch.tensor(mean, dtype=dtype, device=images.device)
        scale = torch.tensor(std, dtype=dtype, device=images.device)
        pixels = (images.to(dtype) / 255 - offset) / scale
        windows = pixels.unfold(1, height, 1).unfold(2, width, 1)  # [B, H', W', C, h, w]
        if positions.dim() == 2:
            positions = positions[:, None].expand(-1, batch, -1)
        rows = torch.arange(batch, device=images.device)
        patches = windows[rows, positions[..., 0].long(), positions[..., 1].long()]
        y = F.linear(
            patches.flatten(2),
            weight.to(dtype).reshape(out_dim, -1),
            None if bias is None else bias.to(dtype),
        )
        y = torch.relu(y) if relu else y
    return y.to(weight.dtype)
