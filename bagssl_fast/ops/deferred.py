"""Activations that are never written: what one `conv_bn_relu` hands to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Deferred(NamedTuple):
    """The activation `relu(scale * (y - center) + shift)`, which its readers compute as they load.

    Every reader returns the plain gradients of that formula with respect to all four, so that
    autograd adds up those of several readers. `center` stands apart from `shift` because the
    gradient of `scale` is then a sum of products with `y - center`: with `y` alone it would cancel
    where the mean is far from 0.
    """

    y: Tensor  # [N, C, H, W], what a convolution gave
    center: Tensor  # [C], the mean
    scale: Tensor  # [C], gamma / sqrt(var + eps)
    shift: Tensor  # [C], beta

    def detach(self) -> Deferred:
        """The same activation without a gradient."""
        return Deferred(*(x.detach() for x in self))


class Normalized(NamedTuple):
    """The same without its ReLU, `scale * (y - center) + shift`: one side of a residual sum."""

    y: Tensor
    center: Tensor
    scale: Tensor
    shift: Tensor


def applied(x: Tensor | Deferred | Normalized) -> Tensor:
    """The activation itself, [N, C, H, W]; a tensor is one already."""
    if isinstance(x, Tensor):
        return x
    center, scale, shift = (v[:, None, None] for v in x[1:])
    h = torch.addcmul(shift, x.y - center, scale)
    h = h.to(x.y.dtype)
    return torch.relu_(h) if isinstance(x, Deferred) else h
