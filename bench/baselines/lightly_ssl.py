"""lightly's transforms and losses in its usual loop: PIL in DataLoader workers.

Its `EMPSSLLoss` adds the coding rate where EMP-SSL subtracts it, which drives toward collapse
(lightly 1.6): here its two component functions are called with the correct sign. Its `VICRegLoss`
takes two views; for P of them its component functions are called, variance and covariance on all
slots at once, the invariance on every pair.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from lightly.loss import emp_ssl_loss, vicreg_loss
from lightly.transforms import GaussianBlur, RandomSolarization
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.utils.lars import LARS
from torch import Tensor
from torchvision import transforms as T

from baselines.emp_ssl import EMPSSL
from baselines.step import Bags, Setup, System, TensorwiseLARS, worker_loader


class Lightly(EMPSSL):
    name = "lightly"
    losses = ("emp_ssl", "vicreg")
    note = "its EMPSSLLoss with the sign of the coding rate corrected, on a CPU slot by slot"

    def __init__(self, setup: Setup) -> None:
        System.__init__(self, setup)
        views = MultiViewTransform([patch_transform(self.case.augment)] * self.case.patches)
        self.loader = worker_loader(setup, Views(setup.images, 1, views, False))

    def build_optimizer(self) -> Any:
        o = self.case.optim
        if o.name == "sgd_lars":  # lightly has VICReg's form alone
            return TensorwiseLARS(self.model, o)
        weights = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": weights}, {"params": vectors, "weight_decay": 0.0}]
        return LARS(groups, lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay)

    def loss(self, z: Tensor) -> Tensor:
        if self.case.loss == "emp_ssl":
            # The backward of a batched logdet fails in MKL on several threads (torch 2.14).
            parts = z.split(1) if z.is_cpu else [z]
            rate = torch.stack([emp_ssl_loss.tcr_loss(part, eps=0.2) for part in parts]).mean()
            return 200.0 * emp_ssl_loss.invariance_loss(z) - rate
        invariance = [
            vicreg_loss.invariance_loss(x, y) for x, y in itertools.combinations(z.unbind(), 2)
        ]
        slots = z.transpose(0, 1)  # its losses expect [B, ..., D]
        variance = vicreg_loss.variance_loss(slots)
        covariance = vicreg_loss.covariance_loss(slots)
        return 25.0 * torch.stack(invariance).mean() + 25.0 * variance + 2.0 * covariance


class Views(Bags):
    """The list of views of an image."""

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.image(index))


def patch_transform(augment: Any) -> T.Compose:
    """lightly's view transform with patches of a fixed scale."""
    a = augment
    jitter = T.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)
    return T.Compose(
        [
            T.RandomResizedCrop(a.size, scale=a.scale, ratio=a.ratio),
            T.RandomHorizontalFlip(a.hflip),
            T.RandomApply([jitter], p=a.jitter_prob),
            T.RandomGrayscale(a.grayscale_prob),
            GaussianBlur(sigmas=a.blur_sigma, prob=a.blur_prob),
            RandomSolarization(prob=a.solarize_prob, threshold=int(a.solarize_threshold)),
            T.ToTensor(),
            T.Normalize(a.mean, a.std),
        ]
    )
