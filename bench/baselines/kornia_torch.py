"""Plain PyTorch with kornia's batched transforms instead of workers: arrays only."""

from __future__ import annotations

from collections.abc import Iterator

import kornia.augmentation  # noqa: F401  (raises ImportError if it is not installed)
import torch
from torch import Tensor

from baselines.loader_kornia import pipeline
from baselines.plain_torch import CompiledTorch, PlainTorch
from baselines.step import Setup
from harness.cases import Case


class KorniaTorch(PlainTorch):
    name = "torch_kornia"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        assert setup.images.array is not None
        self.pixels = torch.from_numpy(setup.images.array).permute(0, 3, 1, 2)
        self.pipeline = pipeline(self.case.augment)

    @classmethod
    def supports(cls, case: Case) -> bool:
        return case.corpus == "cifar"  # it takes batches of one size

    @torch.no_grad()
    def batches(self) -> Iterator[Tensor]:
        order = torch.tensor(self.setup.indices)[torch.randperm(len(self.setup.indices))]
        for rows in order.split(self.case.batch):
            images = self.pixels[rows].to(self.setup.device).float().div_(255)
            patches = self.pipeline(images.repeat(self.case.patches, 1, 1, 1))
            yield patches.contiguous(memory_format=torch.channels_last)


class CompiledKorniaTorch(CompiledTorch, KorniaTorch):
    """kornia's transforms as they are, model and loss compiled."""

    name = "torch_kornia_compile"
