"""The bag encoder as a graph of torch's own operations, for `torch.export` and ONNX.

Two forms, neither of which needs this package where it runs: from whole images, cutting included
(`ImageGraph`), and from patches that are already cut (`PatchGraph`).
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from bagssl_fast import ops
from bagssl_fast.config import patch_size
from bagssl_fast.evaluation.features import CENTER, dense_grid, dense_stride, view_size
from bagssl_fast.inference.bag_encoder import BagEncoder
from bagssl_fast.models.backbone import as_dense, is_dense

TAKES = ("images", "patches")


class PatchGraph(nn.Module):
    """Bags of patches to pooled embeddings.

    Args:
        encoder: Model, layer, normalization of its pixels and of its results.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, encoder: BagEncoder) -> None:
        super().__init__()
        crop = encoder.config.augment
        self.model = copy.deepcopy(encoder.model).cpu().eval().requires_grad_(False)
        self.layer, self.normalize = encoder.layer, encoder.normalize
        self.register_buffer("mean", 255 * torch.tensor(crop.mean).view(3, 1, 1))
        self.register_buffer("scale", 1 / (255 * torch.tensor(crop.std).view(3, 1, 1)))

    def forward(self, patches: Tensor) -> Tensor:
        """uint8 `[P, B, 3, h, w]`, as a loader with `Output("uint8")` gives them -> `[B, dim]`."""
        x = (patches.float() - self.mean) * self.scale
        return self.pool(self.model.embed(x.flatten(0, 1)).unflatten(0, patches.shape[:2]))

    def pool(self, h: Tensor) -> Tensor:
        """Embeddings h `[P, B, F]` -> the mean over the bag, of h or of its projection."""
        pooled = (h if self.layer == "embedding" else self.model.project(h)).mean(0)
        return F.normalize(pooled, dim=1) if self.normalize else pooled


class ImageGraph(PatchGraph):
    """Images of one size to pooled embeddings, cutting the bag included.

    Crop and antialiased resize are one product with a banded matrix per axis, of which the sizes
    may vary from call to call; pixels are rounded after each, as torchvision and the loader do.

    Args:
        encoder: Its `patches`, and what `PatchGraph` reads.
    """

    def __init__(self, encoder: BagEncoder) -> None:
        super().__init__(encoder)
        config, count = encoder.config, encoder.plan.counts[0]
        self.dense = count != CENTER and is_dense(self.model.backbone)
        self.side = round(count**0.5)  # of the grid of boxes; 0 for the central square
        self.area = sum(config.augment.scale) / 2
        self.size = patch_size(config)
        self.grid: list[int] = []
        if self.dense:
            span = view_size(config) - self.size
            self.stride = dense_stride((count,), span)
            self.grid = dense_grid(count, span // self.stride + 1)
            self.side, self.size = 0, view_size(config)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 `[B, H, W, 3]` -> `[B, dim]`."""
        rows = torch.arange(images.shape[1], dtype=torch.float64, device=images.device)
        columns = torch.arange(images.shape[2], dtype=torch.float64, device=images.device)
        height, width = rows[-1] + 1, columns[-1] + 1
        side = torch.minimum(height, width)
        if self.side:
            needed = torch.round(torch.sqrt(self.area * height * width)).clamp(min=1)
            side = torch.minimum(needed, side)
        top = self._places(height - side)
        left = self._places(width - side)
        n = len(top)
        down = self._weights(rows, top, side).repeat_interleave(n, 0)  # [P, size, H], row-major
        across = self._weights(columns, left, side).repeat(n, 1, 1)  # [P, size, W]

        x = images.permute(0, 3, 1, 2).float()[None]  # [1, B, 3, H, W]
        x = _to_bytes(x @ across.mT[:, None, None])
        x = _to_bytes(down[:, None, None] @ x)  # [P, B, 3, size, size]
        x = (x - self.mean) * self.scale
        if not self.dense:
            return self.pool(self.model.embed(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        maps = as_dense(self.model.backbone).dense_maps(x[0], self.stride)
        return self.pool(self.model.head.embed(maps.patches(self.grid)))

    def _places(self, room: Tensor) -> Tensor:
        """Where boxes begin on an axis that leaves them `room` pixels: as the loader's grid."""
        if self.side <= 1:
            return torch.floor(room / 2).reshape(1)
        i = torch.arange(self.side, dtype=torch.float64, device=room.device)
        return torch.floor((2 * i * room + (self.side - 1)) / (2 * (self.side - 1)))

    def _weights(self, pixels: Tensor, first: Tensor, side: Tensor) -> Tensor:
        """Triangle filters `[boxes, size, pixels]` that bring `side` pixels to `size`."""
        step = side / self.size
        width = step.clamp(min=1)
        center = (torch.arange(self.size, dtype=torch.float64, device=side.device) + 0.5) * step
        at = pixels - first[:, None]  # [boxes, pixels], within the box
        inside = (at >= 0) & (at < side)
        distance = (at[:, None] + 0.5 - center[:, None]).abs() / width
        weights = (1 - distance).clamp(min=0) * inside[:, None]
        return (weights / weights.sum(2, keepdim=True)).float()


def _to_bytes(x: Tensor) -> Tensor:
    """Rounded as torchvision rounds, which is up at one half; a mean of bytes stays in 0..255."""
    return torch.floor(x + 0.5)


def to_program(encoder: BagEncoder, takes: str = "images") -> ExportedProgram:
    """Exports an encoder by `torch.export`.

    Args:
        encoder: What is exported, with its options.
        takes: "images": uint8 [B, H, W, 3], all of B, H and W free; "patches": uint8
            [P, B, 3, h, w], P and B free.

    Returns:
        A program of one input, `takes`, and one result, float32 [B, encoder.dim].

    Raises:
        ValueError: For another `takes`.
    """
    if takes not in TAKES:
        raise ValueError(f"takes={takes!r}, expected one of {', '.join(TAKES)}")
    size = patch_size(encoder.config)
    if takes == "images":
        graph: PatchGraph = ImageGraph(encoder)
        example = torch.zeros(2, 2 * size + 3, 2 * size + 5, 3, dtype=torch.uint8)
        free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    else:
        graph = PatchGraph(encoder)
        example = torch.zeros(3, 2, 3, size, size, dtype=torch.uint8)
        free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    with torch.no_grad(), ops.use_impl("reference"):  # torch's own operators
        return torch.export.export(graph, (example,), dynamic_shapes=(free,))


def to_onnx(encoder: BagEncoder, path: str | os.PathLike[str], takes: str = "images") -> None:
    """Writes an encoder as an ONNX file; see `to_program` for its input.

    The result is called "embedding" or "projection", as the layer is.

    Raises:
        ValueError: If the packages that torch writes ONNX with are missing.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "torch writes ONNX with the package onnxscript, which is not installed: "
            "pip install onnx onnxscript"
        ) from error
    program = to_program(encoder, takes)
    free = ("batch", "height", "width") if takes == "images" else ("patches", "batch")
    torch.onnx.export(
        program,
        f=Path(path),
        input_names=[takes],
        output_names=[encoder.layer],
        dynamic_shapes=(dict(enumerate(free)),),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
