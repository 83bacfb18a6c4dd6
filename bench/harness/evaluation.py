"""Encoding the bags of an evaluation: all patches in one dense pass, or one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bagssl_fast.evaluation.features import (
    Plan,
    dense_bags,
    dense_grid,
    dense_stride,
    fold_batch_norm,
)
from baselines.step import PlainModel
from harness.cases import Case
from harness.ours import our_model

PATCHES_AT_ONCE = 4096  # of patch-by-patch encoding


def bag_encoders(
    case: Case,
    pixels: NDArray[np.uint8],
    count: int,
    device: str,
    weights: Sequence[Tensor],
    compiled: bool = False,
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Functions that embed the bags of images [B, H, W, 3], and how far each is from float64.

    Where `compiled`, plain PyTorch's encoder is there a second time, under torch.compile.
    The images are in memory and normalized: timed are the encoding and, for the
    patch-by-patch encoder, the cutting.
    """
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    stride = dense_stride((count,), images.shape[2] - case.patch)
    side = (images.shape[2] - case.patch) // stride + 1
    grid = dense_grid(count, side)
    corners = [(row * stride, column * stride) for row in grid for column in grid]
    plan = Plan((count,), -1, len(images), torch.device(device))
    ours = fold_batch_norm(our_model(case)).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    plain = PlainModel(case, weights).encoder.to(device, memory_format=torch.channels_last).eval()

    def patch_by_patch(encode: Callable[[Tensor], Tensor], images: Tensor = images) -> Tensor:
        bags = []
        at_once = max(1, PATCHES_AT_ONCE // count)
        for part in images.split(at_once):
            patches = torch.cat(
                [part[:, :, t : t + case.patch, s : s + case.patch] for t, s in corners]
            )
            bags.append(encode(patches).unflatten(0, (count, -1)).mean(dim=0))
        return torch.cat(bags)

    @torch.inference_mode()
    def dense() -> Tensor:
        parts = images.split(max(32, PATCHES_AT_ONCE // (side * side)))
        return torch.cat([dense_bags(ours, p, [count], plan, [count])[count][0] for p in parts])

    calls: dict[str, Callable[[], Any]] = {
        "torch": torch.inference_mode()(lambda: patch_by_patch(plain)),
        "bagssl_fast": torch.inference_mode()(lambda: patch_by_patch(ours.embed)),
        "bagssl_fast_dense": dense,
    }
    if compiled:
        faster: Any = torch.compile(plain, dynamic=False)
        calls["torch_compile"] = torch.inference_mode()(lambda: patch_by_patch(faster))
    few = images[:4].double()
    exact = our_model(case).double().eval().to(device)
    with torch.inference_mode():
        needed = patch_by_patch(exact.embed, few)
        errors = {
            name: ((call()[:4].double() - needed).norm() / needed.norm()).item()
            for name, call in calls.items()
        }
    return calls, errors
