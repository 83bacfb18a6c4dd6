"""What the losses share: their output, float32, and the checks of z."""

from __future__ import annotations

import torch
from torch import Tensor

LossOutput = tuple[Tensor, dict[str, Tensor]]


def detached(**terms: Tensor) -> dict[str, Tensor]:
    return {name: term.detach() for name, term in terms.items()}


def full(z: Tensor) -> Tensor:
    """z in the precision that losses sum in: float32, or float64 if z is."""
    return z if z.dtype == torch.float64 else z.float()


def gram(rows: Tensor) -> Tensor:
    """The Gram matrix of rows [..., N, D] on its shorter side; both have the same squared norm."""
    return rows @ rows.mT if rows.shape[-2] < rows.shape[-1] else rows.mT @ rows


def check_slots(name: str, z: Tensor) -> None:
    if z.dim() != 3 or not z.is_floating_point():
        raise ValueError(f"{name}: z is {z.dtype} {list(z.shape)}, expected floating [P, B, D]")
    if z.shape[0] < 2:
        raise ValueError(f"{name}: one slot in z {list(z.shape)}, pairs of patches need P >= 2")


def check_images(name: str, z: Tensor) -> None:
    if z.shape[1] < 2 or z.shape[2] == 0:
        raise ValueError(
            f"{name}: z is {list(z.shape)}, expected at least 2 images in the (global) batch and "
            "one feature; drop_last=True avoids a last batch of one"
        )
