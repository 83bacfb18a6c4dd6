"""The spectral contrastive loss, BagSSL's co-occurrence objective (2206.08954)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from bagssl_fast.distributed.collectives import gather
from bagssl_fast.losses._common import LossOutput, check_images, check_slots, detached, full, gram


class Spectral(nn.Module):
    """The spectral contrastive loss, BagSSL's co-occurrence objective (2206.08954), lambda = w / 2.

        loss = -E_joint[z . z'] + lambda E_product[(z . z')^2]

    E_joint runs over ordered pairs of different slots of one image (`joint`, should grow),
    E_product over all patches of different images (`product`, should shrink); both are unbiased.
    Up to 2w and a constant this is the squared error of w z . z' against the co-occurrence
    p(x, x') / (p(x) p(x')). Cost: one Gram of all rows on its shorter side, linear in P, plus a
    P x P Gram per image. z is not normalized here.
    """

    def __init__(self, w: float = 1.0, *, group: ProcessGroup | None = None) -> None:
        super().__init__()
        if w <= 0:
            raise ValueError(f"Spectral: w is {w}, expected > 0")
        self.w, self.group = w, group

    def forward(self, z: Tensor) -> LossOutput:
        check_slots("Spectral", z)
        with torch.autocast(z.device.type, enabled=False):
            z = full(gather(z, 1, self.group, alike=True))
            num_slots, batch, _ = z.shape
            check_images("Spectral", z)
            same_image = z.square().sum()  # of a patch with itself
            joint = z.sum(dim=0).square().sum() - same_image
            joint = joint / (num_slots * (num_slots - 1) * batch)

            everything = gram(z.flatten(0, 1)).square().sum()
            same_image = gram(z.transpose(0, 1)).square().sum()
            product = (everything - same_image) / (num_slots**2 * batch * (batch - 1))
            loss = -joint + self.w / 2 * product
        return loss, detached(joint=joint, product=product)
