"""InfoNCE over bags (SimCLR's NT-Xent, 2002.05709, at two slots)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from bagssl_fast.distributed.collectives import gather
from bagssl_fast.losses._common import LossOutput, check_images, check_slots, detached, full


class InfoNCE(nn.Module):
    """InfoNCE over bags: each patch must find the other patches of its image among all others.

    For anchor i with the P - 1 positives j of its image, the loss is the mean of
    -log(exp(s_ij) / sum_{k != i} exp(s_ik)), s = cosine / temperature: SimCLR's NT-Xent at P = 2,
    the supervised contrastive loss with images as labels beyond it.
    loss = log_partition - alignment / temperature. Memory: (P B)^2 words.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"InfoNCE: temperature is {temperature}, expected > 0")
        self.temperature, self.group = temperature, group

    def forward(self, z: Tensor) -> LossOutput:
        check_slots("InfoNCE", z)
        with torch.autocast(z.device.type, enabled=False):
            z = full(gather(z, 1, self.group, alike=True))
            num_slots, batch, _ = z.shape
            check_images("InfoNCE", z)
            z = F.normalize(z, dim=2)
            # sum over ordered pairs of one image = |sum_p z_p|^2 - P
            alignment = (z.sum(dim=0).square().sum() - z.square().sum()) / (
                num_slots * (num_slots - 1) * batch
            )
            rows = z.flatten(0, 1)
            similarity = rows @ rows.T / self.temperature
            itself = torch.eye(len(rows), dtype=torch.bool, device=z.device)
            log_partition = similarity.masked_fill(itself, -torch.inf).logsumexp(dim=1).mean()
            loss = log_partition - alignment / self.temperature
        return loss, detached(alignment=alignment, log_partition=log_partition)
