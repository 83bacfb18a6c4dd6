"""The cross-correlation of two sets of features, without the D x D matrix where B < D.

    C = x^T y / B [D, D];   sum_ij C_ij^2 = sum_ab (x x^T)_ab (y y^T)_ab / B^2

Barlow Twins needs C's diagonal and the sum of all squares; the right-hand side gives that sum from
two B x B Gram matrices: 4 B D B multiply-adds with the gradient where C itself needs 3 B D D, and
2 B D + 2 B B words kept for backward instead of several D D.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _GramProduct(torch.autograd.Function):
    """sum_ab (x x^T)_ab (y y^T)_ab for x, y [P, B, D]: [P]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        gram_x, gram_y = x @ x.mT, y @ y.mT
        ctx.save_for_backward(x, y, gram_x, gram_y)
        return (gram_x * gram_y).sum(dim=(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y, gram_x, gram_y = ctx.saved_tensors
        grad = 2 * grad[:, None, None]
        return grad * (gram_y @ x), grad * (gram_x @ y)


def cross_correlation(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal [P, D] of C = x^T y / B and its squares' sum [P], for x and y [P, B, D]."""
    _, batch, dim = x.shape
    if batch < dim:
        return (x * y).sum(dim=1) / batch, _GramProduct.apply(x, y) / batch**2
    correlation = x.mT @ y / batch
    return correlation.diagonal(dim1=1, dim2=2), correlation.square().sum(dim=(1, 2))
