"""Patch-local backbones: what encodes a patch, and all patches of a whole image in one pass."""

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagssl_fast import ops
from bagssl_fast.models.backbone import Window, WindowMaps
from bagssl_fast.models.blocks import conv_bn_relu, is_block
from bagssl_fast.models.fused import FusedSequential
from bagssl_fast.models.heads import LinearBNReLU


class PatchNet(nn.Module):
    """A convolutional network whose receptive field is exactly the patch.

    Valid convolutions shrink the patch (4x4, then 3x3, each with stride 2), pointwise blocks
    `relu(bn(conv1x1))` do the arithmetic between them, and the embedding is the mean over what is
    left of the patch, 3x3 for a patch of 16. Nothing is padded, so a patch has the same embedding
    at any place of an image, and `dense` encodes all patches of an image in one pass that computes
    what overlapping patches share once.

    The stem starts at the cosine basis of its 4x4 pixels, each function in luminance and two
    color differences and with both signs. These are nearly the principal components of natural
    images, so that batch normalization whitens them: training starts with all frequencies at equal
    strength instead of learning to look past the low ones (bench/NOTES.md has the numbers).

    In eval mode `dense` equals patch by patch up to rounding. In training mode they differ in one
    thing: the batch statistics count each map location once in `dense`, but once for every patch
    that covers it patch by patch, which gives the middle of an image more weight than its border.

    Args:
        patch_size: side of a patch in pixels, a multiple of 4, at least 8.
        width: channels of the first stage; each further stage has twice as many.
        depth: pointwise blocks in each stage, one number or one for each.
        stem: channels of the 4x4 convolution; 96 is the whole cosine basis of a color patch, with
            fewer the highest frequencies are left out.
        feature_dim: channels of the top layer, the embedding size F; `8 * width` if not given.
        in_channels: channels of the images.
        hypercolumn: put the means of all lower layers over the patch before the top's: F grows by
            their channels. They carry no gradient: the loss shapes them through the top alone, and
            a `Projector` sees the top alone. Worth 3 to 4 points of a linear probe on CIFAR-10.
    """

    def __init__(
        self,
        patch_size: int = 16,
        width: int = 64,
        depth: int | Sequence[int] = 1,
        feature_dim: int | None = None,
        stem: int = 96,
        in_channels: int = 3,
        hypercolumn: bool = False,
    ) -> None:
        super().__init__()
        if patch_size < 8 or patch_size % 4:
            raise ValueError(
                f"PatchNet: patch_size {patch_size} is not supported, expected a multiple of 4 "
                "from 8 on; resize the patches to such a size, or use the encoder 'patchmlp'"
            )
        if width < 1 or stem < 1:
            raise ValueError(f"PatchNet: width {width} and stem {stem} must be at least 1")
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.head_dim = feature_dim or 8 * width

        kernels = _halving_kernels(patch_size)
        depths = [depth] * len(kernels) if isinstance(depth, int) else list(depth)
        if len(depths) != len(kernels) or min(depths) < 0:
            raise ValueError(
                f"PatchNet: depth {depth} must be one number >= 0, or {len(kernels)} of them, one "
                f"for each stage of a patch of {patch_size}"
            )
        layers = _conv_bn_relu(in_channels, stem, kernels[0], stride=2)
        _start_at_cosines(cast(nn.Conv2d, layers[0]))
        channels, side = stem, (patch_size - kernels[0]) // 2 + 1
        below = {len(layers) - 1: (stem, side)}  # layer -> channels and side of a patch's map
        for stage, blocks in enumerate(depths):
            if stage > 0:
                layers += _conv_bn_relu(channels, width << stage, kernels[stage], stride=2)
                channels, side = width << stage, (side - kernels[stage]) // 2 + 1
                below[len(layers) - 1] = channels, side
            for _ in range(blocks):
                layers += _conv_bn_relu(channels, width << stage, 1)
                channels = width << stage
                below[len(layers) - 1] = channels, side
        layers += _conv_bn_relu(channels, self.head_dim, 1)
        self.layers = FusedSequential(*layers)
        self.stride = 2 ** len(kernels)  # pixels between neighbors on the last map
        self.pool = side  # side of the patch's last map
        # The layers whose means join the top's, with the side of a patch's map there.
        self.taps = {i: side for i, (_, side) in below.items()} if hypercolumn else {}
        self.feature_dim = self.head_dim + sum(below[i][0] for i in self.taps)

    def forward(self, patches: Tensor) -> Tensor:
        """patches `[N, C, h, w]` -> embeddings `[N, F]`; h and w must equal `patch_size`."""
        _check_patches(self, patches)
        means = []
        for i, x in self.layers.outputs(patches):
            if i in self.taps:
                means.append(ops.relu_mean(x.detach()))
        return torch.cat([*means, ops.relu_mean(x)], 1)

    def dense(self, images: Tensor, stride: int | None = None) -> Tensor:
        """Embeddings of all patches of whole images on a grid of the given stride.

        The grid starts at the top left; with H positions as `range(0, H - patch_size + 1,
        stride)`. Where the stride is not a multiple of the network's own, convolutions are dilated
        instead of strided, so that any grid, up to every position, is computed exactly.

        Args:
            images: `[N, C, H, W]`, normalized like patches.
            stride: pixels between neighboring patches; the network's own stride if not given.

        Returns:
            `[P, N, F]`, positions in row-major order.
        """
        return self.dense_maps(images, stride).patches()

    def dense_maps(self, images: Tensor, stride: int | None = None) -> WindowMaps:
        """As `dense`, for some of the patches only, or for their mean without them."""
        stride = self.stride if stride is None else stride
        _check_dense(self, images, stride)
        step = 1  # the map's spacing in pixels were it strided as in `forward`
        x: Tensor | ops.Deferred = images
        maps, windows = [], []
        for i in range(0, len(self.layers), 3):
            conv, norm, relu = self.layers[i], self.layers[i + 1], self.layers[i + 2]
            assert isinstance(conv, nn.Conv2d)
            have, want = math.gcd(step, stride), math.gcd(step * conv.stride[0], stride)
            if step == have and is_block(conv, norm, relu):
                x = conv_bn_relu(x, conv, norm, want // have)
            else:
                x = ops.applied(x)
                x = F.conv2d(x, conv.weight, conv.bias, want // have, 0, step // have)
                x = relu(norm(x))
            step *= conv.stride[0]
            have = math.gcd(step, stride)
            if i + 2 in self.taps:
                maps.append(ops.applied(x.detach()).permute(0, 2, 3, 1))
                windows.append(Window(self.taps[i + 2], stride // have, step // have))
        windows.append(Window(self.pool, stride // have, step // have))
        return WindowMaps([*maps, ops.applied(x).permute(0, 2, 3, 1)], windows)


class PatchMLP(nn.Module):
    """A linear layer over the whole patch, ReLU, then `linear_bn_relu` blocks.

    The first layer reads uint8 images in place when given positions (`ops.patch_embed`): patches
    are never cut out. Small patches, 6 to 8 pixels, suit it.

    Args:
        patch_size: side of a patch in pixels.
        width: hidden units of every layer but the last.
        depth: hidden layers after the first.
        feature_dim: embedding size F; `width` if not given.
        in_channels: channels of the images.
        mean, std: normalization of uint8 input (per channel, of pixels in 0..1); float input comes
            normalized already.
    """

    def __init__(
        self,
        patch_size: int = 8,
        width: int = 512,
        depth: int = 1,
        feature_dim: int | None = None,
        in_channels: int = 3,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        if patch_size < 1 or width < 1 or depth < 0:
            raise ValueError(
                f"PatchMLP: patch_size {patch_size} and width {width} must be at least 1, "
                f"depth {depth} at least 0"
            )
        self.patch_size, self.in_channels = patch_size, in_channels
        self.feature_dim = self.head_dim = feature_dim or width
        self.mean, self.std = tuple(mean), tuple(std)
        self.weight = nn.Parameter(torch.empty(width, in_channels, patch_size, patch_size))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        dims = [width] * (depth + 1) + [self.feature_dim]
        self.blocks = nn.Sequential(*(LinearBNReLU(i, o) for i, o in itertools.pairwise(dims)))

    def forward(self, patches: Tensor, positions: Tensor | None = None) -> Tensor:
        """Embeds patches, or the patches of uint8 images at given positions.

        Args:
            patches: normalized `[N, C, h, w]`; with `positions`, uint8 images `[B, H, W, C]`.
            positions: (top, left) in pixels, int `[P, 2]`, or `[P, B, 2]` for positions of each
                image.

        Returns:
            `[N, F]`; with positions `[P, B, F]`.
        """
        if positions is not None:
            x = ops.patch_embed(
                patches,
                self.weight,
                self.bias,
                positions,
                mean=self.mean,
                std=self.std,
                relu=True,
            )
            return cast(Tensor, self.blocks(x))
        _check_patches(self, patches)
        x = F.relu(F.linear(patches.flatten(1), self.weight.flatten(1), self.bias))
        return cast(Tensor, self.blocks(x))

    def dense(self, images: Tensor, stride: int | None = None) -> Tensor:
        """As `PatchNet.dense`; the stride is half the patch's side if not given."""
        return self.dense_maps(images, stride).patches()

    def dense_maps(self, images: Tensor, stride: int | None = None) -> WindowMaps:
        """As `PatchNet.dense_maps`: one map, each entry of which is a patch."""
        stride = max(self.patch_size // 2, 1) if stride is None else stride
        _check_dense(self, images, stride)
        x = F.relu(F.conv2d(images, self.weight, self.bias, stride))
        return WindowMaps([self.blocks(x.permute(0, 2, 3, 1))], [Window()])


def _halving_kernels(patch_size: int) -> list[int]:
    """Kernels of the stride-2 convolutions: 4x4, then 3x3 while the map is odd and above 4."""
    kernels, side = [4], patch_size // 2 - 1
    while side > 4 and side % 2:
        kernels.append(3)
        side = (side - 1) // 2
    return kernels


def _conv_bn_relu(cin: int, cout: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(cin, cout, kernel, stride, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return [conv, nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]


@torch.no_grad()
def _start_at_cosines(conv: nn.Conv2d) -> None:
    """Sets filters to the two-dimensional cosine basis in opponent colors, lowest frequency first.

    Each function comes with both signs; filters beyond the basis keep their random weights.
    """
    side, channels = conv.kernel_size[0], conv.in_channels
    k = torch.arange(side)
    waves = F.normalize(torch.cos(math.pi / side * torch.outer(k, k + 0.5)), dim=1)
    colors, rank = torch.eye(channels), torch.zeros(channels)
    if channels == 3:  # luminance, red - blue, green - magenta
        colors = F.normalize(torch.tensor([[1.0, 1, 1], [1, 0, -1], [-1, 2, -1]]), dim=1)
        rank = torch.tensor([0.0, 4, 4])  # color matters as much as luminance at higher frequency
    basis = torch.einsum("ca,uh,vw->uvcahw", colors, waves, waves)
    rank = k[:, None, None] ** 2 + k[:, None] ** 2 + rank
    order = rank.flatten().argsort(stable=True)[: conv.out_channels // 2]
    filters = basis.flatten(0, 2)[order]
    conv.weight[: 2 * len(order)] = torch.cat([filters, -filters])


def _check_patches(net: PatchNet | PatchMLP, patches: Tensor) -> None:
    want = (net.in_channels, net.patch_size, net.patch_size)
    if patches.dim() != 4 or patches.shape[1:] != want or not patches.is_floating_point():
        raise ValueError(
            f"{type(net).__name__}: expected normalized float patches [N, {want[0]}, {want[1]}, "
            f"{want[2]}], got {patches.dtype} {list(patches.shape)}; build the encoder with the "
            "patches' size, or call .dense(images, stride) to embed every patch of whole images"
        )


def _check_dense(net: PatchNet | PatchMLP, images: Tensor, stride: int) -> None:
    name, size = type(net).__name__, net.patch_size
    if images.dim() != 4 or images.shape[1] != net.in_channels or not images.is_floating_point():
        raise ValueError(
            f"{name}.dense: expected normalized float images [N, {net.in_channels}, H, W], got "
            f"{images.dtype} {list(images.shape)}"
        )
    if stride < 1:
        raise ValueError(f"{name}.dense: stride {stride} must be at least 1 pixel")
    if min(images.shape[2:]) < size:
        raise ValueError(
            f"{name}.dense: images of {images.shape[2]}x{images.shape[3]} are smaller than the "
            f"patch of {size}x{size}; use larger views or a smaller patch_size"
        )
