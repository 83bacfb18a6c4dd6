"""EMP-SSL as its authors' code trains (2304.03977), written from the paper's formulas.

torchvision's PIL transforms in DataLoader workers, every patch encoded separately in one batch of
P x B, a loss that loops over the patches with a D x D determinant each, LARS around SGD tensor by
tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.loader_torchvision import transform
from baselines.losses import coding_rate
from baselines.step import Bags, Setup, System, TensorwiseLARS, worker_loader


class EMPSSL(System):
    name = "emp_ssl"
    losses = ("emp_ssl",)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        dataset = Bags(setup.images, self.case.patches, transform(self.case.augment, False), False)
        self.loader = worker_loader(setup, dataset)

    def build_optimizer(self) -> TensorwiseLARS:
        return TensorwiseLARS(self.model, self.case.optim)

    def batches(self) -> Iterator[Tensor]:
        for patches in self.loader:  # a list of P tensors [B, 3, h, w]
            yield torch.cat(patches, dim=0).to(self.setup.device)

    def loss(self, z: Tensor) -> Tensor:
        center = z.mean(dim=0)
        similarity = torch.zeros((), device=z.device)
        for patch in z:
            similarity = similarity + F.cosine_similarity(patch, center, dim=1).mean()
        return -200.0 * similarity / len(z) - coding_rate(z)
