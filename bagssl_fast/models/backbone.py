"""What a backbone is: the few attributes and methods that the rest of the package uses.

A backbone of your own is any `nn.Module` with them; nothing has to be registered or inherited:

    class MeanColor(nn.Module):
        patch_size = 8   # side of a patch in pixels
        feature_dim = 3  # F, the size of an embedding
        head_dim = 3     # how many of the F a projector reads

        def forward(self, patches: Tensor) -> Tensor:  # [N, 3, 8, 8] -> [N, 3]
            return patches.mean((2, 3))

    model = BagModel(MeanColor(), Projector(3, hidden=64))

With one more method the same backbone is *dense*: it encodes all patches of a whole image in one
pass, and `BagModel(..., dense=True)`, the evaluation, `BagEncoder` and the export use that:

        def dense_maps(self, images: Tensor, stride: int | None = None) -> DenseMaps:
            x = F.avg_pool2d(images, self.patch_size, stride or self.patch_size)  # [N, 3, h, w]
            return WindowMaps([x.permute(0, 2, 3, 1)], [Window()])

It has to give each patch the embedding that `forward` gives it alone (in eval mode, up to
rounding), at any place of the image. So no layer may look beyond the patch: no
padding, no attention between patches, no position in the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor


class DenseMaps(Protocol):
    """The embeddings of a grid of patches of whole images; `WindowMaps` is one.

    The grid has R x C positions: `range(0, H - patch_size + 1, stride)` down an image of height H,
    and likewise across it.
    """

    def patches(self, picked: Sequence[int] | None = None) -> Tensor:
        """Embeddings `[P, N, F]`, positions in row-major order.

        Args:
            picked: The rows of the grid, and likewise columns, to give; P is then
                `len(picked) ** 2`. None for all R * C.
        """

    def means(self, bands: Sequence[Sequence[int]]) -> Tensor:
        """Means of the patches of regions, `[R * R, N, F]` in float32 or float64.

        Args:
            bands: R times the rows of the grid, and likewise columns, that make a region; a region
                has those of one band across and one band down, and regions are in row-major order.
                Of one band the result is a bag's mean, `[1, N, F]`.
        """


class Backbone(Protocol):
    """Encodes patches.

    Attributes:
        patch_size: Side of a patch in pixels.
        feature_dim: Size F of an embedding.
        head_dim: How many of its entries, the last ones, a `Projector` reads: F unless, as with
            PatchNet's hypercolumn, a part of the embedding is for evaluation alone.
    """

    patch_size: int
    feature_dim: int
    head_dim: int

    def __call__(self, patches: Tensor, /) -> Tensor:
        """Normalized float patches `[N, 3, h, w]` -> embeddings `[N, F]`; this is `forward`."""


class DenseBackbone(Backbone, Protocol):
    """Also encodes all patches of whole images in one pass."""

    def dense_maps(self, images: Tensor, stride: int | None = None) -> DenseMaps:
        """Encodes images.

        Args:
            images: Normalized float images `[N, 3, H, W]`, H and W at least `patch_size`.
            stride: Pixels between neighboring positions, any number from 1 on; None for the
                backbone's own choice.
        """


def check_backbone(backbone: Any) -> None:
    """Checks the attributes that every backbone has.

    Raises:
        ValueError: Naming those that are missing or not positive integers.
    """
    names = ("patch_size", "feature_dim", "head_dim")
    bad = {name: getattr(backbone, name, "missing") for name in names}
    bad = {k: v for k, v in bad.items() if not isinstance(v, int) or v < 1}
    if bad:
        came = ", ".join(f"{name} {value}" for name, value in bad.items())
        raise ValueError(
            f"{type(backbone).__name__} is not a backbone ({came}): set {', '.join(bad)} to "
            "positive integers, as described in bagssl_fast/models/backbone.py"
        )


def is_dense(backbone: Any) -> TypeGuard[DenseBackbone]:
    """Whether a backbone encodes all patches of a whole image in one pass."""
    return callable(getattr(backbone, "dense_maps", None))


def as_dense(backbone: Any) -> DenseBackbone:
    """The backbone as a dense one.

    Raises:
        ValueError: If it encodes single patches only.
    """
    if not is_dense(backbone):
        raise ValueError(
            f"{type(backbone).__name__} cannot encode whole images, it has no dense_maps: use the "
            "encoder patchnet or patchmlp, write a dense_maps as described in "
            "bagssl_fast/models/backbone.py, or cut patches (bag.dense false)"
        )
    return backbone


@dataclass(frozen=True)
class Window:
    """Where the patches of a grid are along each dimension of a map.

    Args:
        side: Entries of one patch.
        stride: Entries from one patch to the next.
        dilation: Entries from one entry of a patch to its next.
    """

    side: int = 1
    stride: int = 1
    dilation: int = 1

    def matrix(self, like: Tensor, size: int, picked: Sequence[int] | None) -> Tensor:
        """The `[patches, size]` matrix that averages over each patch, or over those picked."""
        last = size - (self.side - 1) * self.dilation
        first = torch.arange(0, last, self.stride, device=like.device)
        if picked is not None:
            first = first[torch.tensor(picked, device=like.device)]
        taps = first[:, None] + self.dilation * torch.arange(self.side, device=like.device)
        return like.new_zeros(len(first), size).scatter_(1, taps, 1 / self.side)


@dataclass(frozen=True)
class WindowMaps:
    """`DenseMaps` whose embeddings are means over windows of one or several maps.

    Means over rows, then over columns, each as a product with a banded matrix, which serves dilated
    windows too and costs what `avg_pool2d` costs on those that are not. The mean of a bag, or of a
    region of it, is such a product too: the embeddings of its patches need not exist for it.

    Args:
        maps: `[N, H, W, C]` of each layer that is part of the embedding; C add up to F.
        windows: Of the patches on each map; `Window()` where a patch is one entry.
    """

    maps: list[Tensor]
    windows: list[Window]

    def patches(self, picked: Sequence[int] | None = None) -> Tensor:
        """As `DenseMaps.patches`."""
        parts = []
        for x, window in zip(self.maps, self.windows, strict=True):
            if window != Window() or picked is not None:
                rows, columns = (window.matrix(x, n, picked) for n in x.shape[1:3])
                x = (rows @ x.flatten(2)).unflatten(2, x.shape[2:])
                x = columns @ x
            parts.append(x)
        return torch.cat(parts, 3).flatten(1, 2).transpose(0, 1)

    def means(self, bands: Sequence[Sequence[int]]) -> Tensor:
        """As `DenseMaps.means`."""
        parts = []
        with torch.autocast(self.maps[0].device.type, enabled=False):
            for x, window in zip(self.maps, self.windows, strict=True):
                x = x if x.dtype == torch.float64 else x.float()
                rows, columns = (
                    torch.stack([window.matrix(x, n, band).mean(0) for band in bands])
                    for n in x.shape[1:3]
                )
                x = (rows @ x.flatten(2)).unflatten(2, x.shape[2:])
                parts.append(columns @ x)
        return torch.cat(parts, 3).flatten(1, 2).transpose(0, 1)
