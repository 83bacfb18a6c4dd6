"""VICReg with its authors' loss (2105.04906), slot by slot, on bags of P patches.

Transforms and workers as in `emp_ssl`, LARS tensor by tensor.
"""

from __future__ import annotations

from torch import Tensor

from baselines.emp_ssl import EMPSSL
from baselines.losses import vicreg


class VICReg(EMPSSL):
    name = "vicreg"
    losses = ("vicreg",)

    def loss(self, z: Tensor) -> Tensor:
        return vicreg(z)
