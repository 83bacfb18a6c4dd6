"""bagssl_fast as a system of `throughput.py`: patch by patch, dense, and their variants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bagssl_fast.data import BagLoader, Order, Output, Threads
from bagssl_fast.data.feed import prefetch
from bagssl_fast.losses import build_loss
from bagssl_fast.models.bag_model import BagModel
from bagssl_fast.models.encoders import build_encoder
from bagssl_fast.models.heads import EMPHead, Projector
from bagssl_fast.training.optim import build_optimizer
from baselines.step import Setup, System
from harness.cases import Case


def our_model(case: Case, dense: bool = False, seed: int = 0) -> BagModel:
    """The model of a case, its weights drawn from a seed."""
    torch.manual_seed(seed)
    backbone: Any = build_encoder(case.encoder, case.patch, case.width)
    hidden, out = case.head["hidden"], case.head["out"]
    head: Projector | EMPHead
    if case.head["name"] == "emp":
        head = EMPHead(backbone.feature_dim, hidden, hidden, out)
    else:
        head = Projector(
            backbone.feature_dim,
            hidden,
            out,
            case.head["num_layers"],
            normalize=case.loss == "emp_ssl",
        )
    return BagModel(backbone, head, dense, case.stride if dense else None)


def initial_weights(case: Case) -> list[Tensor]:
    return [p.detach() for p in our_model(case).parameters()]


class Ours(System):
    """Every patch has its own augmentation."""

    name = "bagssl_fast"
    dense: ClassVar[bool] = False
    views: ClassVar[str] = "host"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.forward: Any = self.model
        if self.compiled:
            self.forward = torch.compile(self.model, dynamic=False)
        self.bag_loss = build_loss(self.case.loss)
        on_gpu = setup.device == "cuda"
        output = Output("bfloat16" if on_gpu else "float32", self.views, pin_memory=on_gpu)
        self.loader = BagLoader(
            setup.images.source,
            batch_size=self.case.batch,
            patches=self.case.views if self.dense else self.case.patches,
            augment=self.case.view_augment if self.dense else self.case.augment,
            order=Order(seed=setup.seed, indices=setup.indices),
            output=output,
            threads=Threads(setup.threads),
        )

    def build(self) -> nn.Module:
        model = our_model(self.case, self.dense)
        with torch.no_grad():
            for mine, given in zip(model.parameters(), self.setup.weights, strict=True):
                mine.copy_(given)
        return model.to(memory_format=torch.channels_last)

    def build_optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model, self.case.optim)

    def batches(self) -> Iterator[Tensor]:
        if self.setup.device == "cuda":
            yield from prefetch(self.loader, torch.device("cuda"))
        else:
            for batch in self.loader:
                yield batch.patches

    def adapt(self, patches: Tensor) -> Tensor:
        flat = patches.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return flat.unflatten(0, patches.shape[:2])

    def encode(self, batch: Tensor) -> Tensor:
        with self.setup.autocast():
            return self.forward(batch)[1]

    def loss(self, z: Tensor) -> Tensor:
        return self.bag_loss(z)[0]

    def close(self) -> None:
        self.loader.close()


class OursDense(Ours):
    """Views of each image, whose patches are all encoded in one pass."""

    name = "bagssl_fast_dense"
    dense = True
    note = "P patches of one view share its augmentation; the others augment each patch"

    @classmethod
    def supports(cls, case: Case) -> bool:
        return case.view is not None

    def example(self, batch: int | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        side, c = self.case.view or 0, self.case
        return torch.randn((c.views, batch or c.batch, 3, side, side), generator=generator)


class OursCompiled(Ours):
    name = "bagssl_fast_compile"
    compiled = True


class OursDenseCompiled(OursDense):
    name = "bagssl_fast_dense_compile"
    compiled = True


class OursOnDevice(Ours):
    """Decoded images are sent to the device; patches are cut and augmented there."""

    name = "bagssl_fast_device"
    views = "device"
    note = "ops.patch_views on the device; the same patches"
