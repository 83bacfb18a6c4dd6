"""A linear layer over patches of uint8 images, without the patches.

Two ways, chosen by counting multiply-adds: `patch_embed_grid` where patches overlap on a grid that
all images share, `patch_embed_gather` anywhere else. The gradient takes the same way backwards.
Saved for backward: images, weight, and the result if `relu`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bagssl_fast.ops.cpu import patch_embed_gather, patch_embed_grid


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
        grid = patch_embed_grid.worthwhile(weight, positions, images.shape[0])
        if grid is not None:
            patch_embed_grid.forward(images, weight, bias, grid, mean, std, relu, y)
        else:
            patch_embed_gather.forward(images, weight, bias, positions, mean, std, relu, y)
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
        grid = patch_embed_grid.worthwhile(weight, positions, images.shape[0])
        if grid is not None:
            dweight, dbias = patch_embed_grid.backward(dy, y, images, weight, grid, mean, std)
        else:
            dweight, dbias = patch_embed_gather.backward(
                dy, y, images, weight, positions, mean, std
            )
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
