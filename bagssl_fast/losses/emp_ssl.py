"""EMP-SSL (2304.03977)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from bagssl_fast import ops
from bagssl_fast.distributed.collectives import all_reduce_mean
from bagssl_fast.losses._common import LossOutput, check_slots, detached, full


class EMPSSL(nn.Module):
    """EMP-SSL (2304.03977): patches agree with their bag's mean, slots have a large coding rate.

    loss = -patch_sim * bag_cosine - tcr * coding_rate. Both terms should grow, so the loss is
    negative. EMP-SSL's rows z have norm 1 (its head's last step); they are not normalized here.
    """

    def __init__(
        self,
        patch_sim: float = 200.0,
        tcr: float = 1.0,
        *,
        eps: float = 0.2,
        group: ProcessGroup | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        self.patch_sim, self.tcr, self.eps = patch_sim, tcr, eps
        self.group, self.impl = group, impl

    def forward(self, z: Tensor) -> LossOutput:
        check_slots("EMPSSL", z)
        # Two ops read z and pull opposite ways: in bfloat16 each gradient would be rounded before
        # they are added. A head that normalizes gives float32 in any case.
        z = full(z)
        pooled = ops.bag_pool(z, cosine=True, impl=self.impl)
        assert pooled.cosine is not None
        bag_cosine = all_reduce_mean(pooled.cosine.mean(), self.group, alike=True)
        coding_rate = ops.tcr(z, eps=self.eps, group=self.group, impl=self.impl).mean()
        loss = -self.patch_sim * bag_cosine - self.tcr * coding_rate
        return loss, detached(bag_cosine=bag_cosine, coding_rate=coding_rate)
