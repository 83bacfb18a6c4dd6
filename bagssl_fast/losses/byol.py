"""BYOL (2006.07733)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from bagssl_fast.distributed.collectives import all_reduce_mean
from bagssl_fast.losses._common import LossOutput, check_slots, detached, full


class BYOL(nn.Module):
    """BYOL (2006.07733): a predictor guesses the moving-average targets of a patch's siblings.

    loss = 2 - 2 * agreement, the mean over ordered pairs of different slots of the cosine between
    the prediction of one and the target of the other, in O(P). z holds prediction and target side
    by side, [P, B, 2 D], as a model with `head.momentum` gives them; the target carries no
    gradient. Nothing compares images: the moving average alone keeps it from collapse.
    """

    def __init__(self, *, group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group

    def forward(self, z: Tensor) -> LossOutput:
        check_slots("BYOL", z)
        if z.shape[2] % 2:
            raise ValueError(
                f"BYOL: z is {list(z.shape)}, expected prediction and target side by side, "
                "[P, B, 2 D]; a head with momentum above 0 gives them"
            )
        with torch.autocast(z.device.type, enabled=False):
            num_slots, batch, _ = z.shape
            prediction, target = full(z).chunk(2, dim=2)
            prediction, target = F.normalize(prediction, dim=2), F.normalize(target.detach(), dim=2)
            pairs = (prediction.sum(dim=0) * target.sum(dim=0)).sum() - (prediction * target).sum()
            agreement = pairs / (num_slots * (num_slots - 1) * max(batch, 1))
            agreement = all_reduce_mean(agreement, self.group, alike=True)
            loss = 2 - 2 * agreement
        return loss, detached(agreement=agreement)
