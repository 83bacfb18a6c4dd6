"""Dense bags: all patches of an image in one pass of PatchNet, compared with patch by patch.

Patches of 16x16 in images of 32x32. Training: 25 patches on a 5x5 grid, encoder forward and
backward. Inference: all 17x17 = 289 positions, in eval mode, where both give the same embeddings.
Parity is checked in eval mode in both cases: in training, batch statistics weight overlapping
positions differently (see `PatchNet`), so the values differ by design.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bagssl_fast.models.encoders import build_encoder
from harness.common import OURS
from harness.ops import Call, OpCase, main

PATCHWISE = "patch by patch"
TRAINING, INFERENCE = "25 patches, training step", "289 positions, inference"
STRIDES = {TRAINING: 4, INFERENCE: 1}
BATCHES = {TRAINING: 32, INFERENCE: 16}


def cut(images: Tensor, stride: int) -> Tensor:
    """[P B, 3, 16, 16], position by position, contiguous as a loader returns them."""
    windows = images.unfold(2, 16, stride).unfold(3, 16, stride)  # [B, 3, n, n, 16, 16]
    patches = windows.permute(2, 3, 0, 1, 4, 5).flatten(0, 2)
    return patches.contiguous(memory_format=torch.channels_last)


def build(provider: str, case_id: str, training: bool | None = None) -> Call:
    torch.manual_seed(0)
    training = case_id == TRAINING if training is None else training
    stride = STRIDES[case_id]
    encoder = build_encoder("patchnet", patch_size=16).train(training)
    encoder = encoder.to(memory_format=torch.channels_last)
    images = torch.randn(BATCHES[case_id], 3, 32, 32)
    images = images.contiguous(memory_format=torch.channels_last)
    patches = cut(images, stride)
    parameters = list(encoder.parameters())

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(training):
            h = (
                encoder.dense(images, stride).flatten(0, 1)
                if provider == OURS
                else encoder(patches)
            )
            if not training:
                return [h]
            return [h.detach(), *torch.autograd.grad(h.square().mean(), parameters)]

    return call


def in_eval_mode(provider: str, case_id: str) -> Call:
    return build(provider, case_id, training=False)


CASES = [
    OpCase(TRAINING, (PATCHWISE,), {PATCHWISE: 4}, rounds=5, tolerance=1e-4, parity=in_eval_mode),
    OpCase(INFERENCE, (PATCHWISE,), {PATCHWISE: 6}, rounds=5, tolerance=1e-4),
]

if __name__ == "__main__":
    main("bench_dense", __doc__, CASES, build)
