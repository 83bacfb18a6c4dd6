"""VICReg (2105.04906)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from bagssl_fast import ops
from bagssl_fast.losses._common import LossOutput, detached


class VICReg(nn.Module):
    """Variance-invariance-covariance regularization (2105.04906) over P slots.

    loss = sim_coeff * invariance + std_coeff * variance + cov_coeff * covariance; at P = 2 the loss
    of the authors' code, or of the codebase that `convention` names (see `ops.vicreg`).
    """

    def __init__(
        self,
        sim_coeff: float = 25.0,
        std_coeff: float = 25.0,
        cov_coeff: float = 1.0,
        *,
        gamma: float = 1.0,
        eps: float = 1e-4,
        convention: str = "official",
        group: ProcessGroup | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        if convention not in ops.CONVENTIONS:
            names = ", ".join(ops.CONVENTIONS)
            raise ValueError(f"VICReg: convention {convention!r}; expected one of {names}")
        self.sim_coeff, self.std_coeff, self.cov_coeff = sim_coeff, std_coeff, cov_coeff
        self.gamma, self.eps, self.convention = gamma, eps, convention
        self.group, self.impl = group, impl

    def forward(self, z: Tensor) -> LossOutput:
        invariance, variance, covariance = ops.vicreg(
            z,
            gamma=self.gamma,
            eps=self.eps,
            convention=self.convention,
            group=self.group,
            impl=self.impl,
        )
        loss = self.sim_coeff * invariance + self.std_coeff * variance + self.cov_coeff * covariance
        return loss, detached(invariance=invariance, variance=variance, covariance=covariance)
