"""The best plain PyTorch we could write, eager or compiled.

torchvision's transforms patch by patch in the workers (each patch needs its own draw, and a
transform draws once per call), then uint8, normalized all at once; channels-last; losses over all
slots at once, by batched products on the shorter side and a batched Cholesky; LARS over all
tensors at once (ours: torch has none).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from bagssl_fast.training.optim import build_optimizer
from baselines.loader_torchvision import transform
from baselines.step import Bags, Setup, System, worker_loader


class PlainTorch(System):
    name = "torch"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        a = self.case.augment
        raw = dataclasses.replace(a, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        # For images of this size, PIL is faster than tensors in both v1 and v2.
        steps = transform(raw, False).transforms[:-2]
        to_uint8 = v2.Compose([*steps, v2.PILToTensor()])
        dataset = Bags(setup.images, self.case.patches, to_uint8, False)
        self.loader = worker_loader(setup, dataset, collate)
        shape = (1, 3, 1, 1)
        self.scale = (1 / (255 * torch.tensor(a.std))).view(shape).to(setup.device)
        self.shift = (-torch.tensor(a.mean) / torch.tensor(a.std)).view(shape).to(setup.device)

    def build(self) -> nn.Module:
        return super().build().to(memory_format=torch.channels_last)

    def build_optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model, self.case.optim)

    def batches(self) -> Iterator[Tensor]:
        for patches in self.loader:
            patches = patches.to(self.setup.device, non_blocking=True)
            patches = patches.contiguous(memory_format=torch.channels_last)
            yield torch.addcmul(self.shift, patches.float(), self.scale)

    def adapt(self, patches: Tensor) -> Tensor:
        return super().adapt(patches).contiguous(memory_format=torch.channels_last)

    def loss(self, z: Tensor) -> Tensor:
        return emp_ssl(z) if self.case.loss == "emp_ssl" else vicreg(z)


class CompiledTorch(PlainTorch):
    """Model and loss compiled, for the one shape that a training has: the faster code."""

    name = "torch_compile"
    compiled = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.forward: Any = torch.compile(self.model, dynamic=False)
        self.compiled_loss: Any = torch.compile(super().loss, dynamic=False)

    def encode(self, batch: Tensor) -> Tensor:
        with self.setup.autocast():
            return self.forward(batch).unflatten(0, (self.case.patches, -1))

    def loss(self, z: Tensor) -> Tensor:
        return self.compiled_loss(z)


def collate(bags: list[list[Tensor]]) -> Tensor:
    """B lists of P patches -> [P * B, 3, h, w], slot-major."""
    return torch.stack([patch for slot in zip(*bags, strict=True) for patch in slot])


def gram(z: Tensor) -> Tensor:
    return z @ z.mT if z.shape[1] < z.shape[2] else z.mT @ z


def emp_ssl(z: Tensor, eps: float = 0.2) -> Tensor:
    similarity = F.cosine_similarity(z, z.mean(dim=0, keepdim=True), dim=2).mean()
    small = gram(z) * (z.shape[2] / (z.shape[1] * eps))
    factor = torch.linalg.cholesky(small + torch.eye(small.shape[1], device=z.device))
    coding_rate = factor.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    return -200.0 * similarity - coding_rate.mean()


def vicreg(z: Tensor) -> Tensor:
    _, batch, dim = z.shape
    invariance = 2 * z.var(dim=0).mean()
    z = z - z.mean(dim=1, keepdim=True)
    squares = z.square().sum(dim=1)
    variance = F.relu(1 - torch.sqrt(squares / (batch - 1) + 1e-4)).mean()
    off_diagonal = gram(z).square().sum(dim=(1, 2)) - squares.square().sum(dim=1)
    covariance = 2 * off_diagonal.mean() / (dim * (batch - 1) ** 2)
    return 25.0 * invariance + 25.0 * variance + covariance
