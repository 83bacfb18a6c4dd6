"""Cut, augment and normalize patches: the truth that every fast path is held to.

One row of `params` per patch (see `csrc/view_params.h`): 0 top, 1 left, 2 height, 3 width, 4 flip,
5 brightness, 6 contrast, 7 saturation, 8 hue, 9 order (lexicographic permutation of the four as
applied, -1: none), 10 grayscale, 11 blur sigma (0: none), 12 solarize threshold (256: none).
Stages, always in this order, each rounded to uint8:

crop + resize, flip, jitter, grayscale, blur, solarize, normalize: (x / 255 - mean) / std

The pixels are those of `torchvision.transforms.v2.functional` on uint8 tensors (bit for bit on a
CPU with AVX2, whose resize has 16-bit weights; the blur may round a tie the other way). Its PIL
path is within 1/255 of them, except for hue, which Pillow knows in 256 steps: 15/255 at most.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ORDERS = tuple(itertools.permutations(range(4)))
NO_SOLARIZE = 256
GRAY = (0.2989, 0.587, 0.114)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def auto_blur_kernel(height: int, width: int) -> int:
    """A tenth of the shorter side made odd, at least 3; 1 (no blur) for patches of one pixel."""
    shorter = min(height, width)
    return max(3, (shorter // 10) | 1) if shorter > 1 else 1


def patch_views(
    images: Tensor | Sequence[Tensor],
    params: Tensor,
    *,
    size: int | tuple[int, int],
    interpolation: str = "bilinear",
    blur_kernel: int = 0,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Patches [P, B, 3, h, w] (channels-last memory) of uint8 images [B] x [H, W, 3].

    Args:
        images: uint8 [B, H, W, 3], or B tensors [H, W, 3] of any sizes.
        params: float32 [P, B, 16].
        size: height and width of a patch.
        interpolation: "bilinear" or "bicubic", both antialiased.
        blur_kernel: odd size of the Gaussian kernel, 0 = `auto_blur_kernel`.
        mean, std: per channel, of pixels in 0..1.
        dtype: torch.float32, bfloat16 or float16 (normalized), or uint8 (not normalized).

    Raises:
        ValueError: an argument of another shape or value, or a crop that leaves its image.
    """
    height, width = (size, size) if isinstance(size, int) else size
    kernel = blur_kernel or auto_blur_kernel(height, width)
    if interpolation not in ("bilinear", "bicubic"):
        raise ValueError(
            f"patch_views: interpolation {interpolation!r}; supported: 'bilinear', 'bicubic'"
        )
    if dtype not in (*_FLOATS, torch.uint8):
        raise ValueError(f"patch_views: dtype {dtype}; supported: {_FLOATS} and torch.uint8")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(
            f"patch_views: blur_kernel {blur_kernel}; expected an odd number, 0 = auto"
        )
    if params.ndim != 3 or params.shape[1] != len(images) or params.shape[2] != 16:
        raise ValueError(
            f"patch_views: params {list(params.shape)} for {len(images)} images; "
            "expected [P, B, 16]"
        )
    patches = params.new_empty((*params.shape[:2], height, width, 3), dtype=dtype)
    rows = params.tolist()
    for b, image in enumerate(images):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"patch_views: image {b} is {image.dtype} {list(image.shape)}; "
                "expected uint8 [H, W, 3]"
            )
        planes = image.to(params.device).permute(2, 0, 1)
        for p in range(params.shape[0]):
            view = _view(planes, rows[p][b], height, width, interpolation, kernel)
            patches[p, b] = _normalize(view, mean, std, dtype).permute(1, 2, 0)
    return patches.permute(0, 1, 4, 2, 3)


def _view(
    image: Tensor, row: list[float], height: int, width: int, interpolation: str, kernel: int
) -> Tensor:
    """One patch: integer-valued float32 [3, height, width] of uint8 `image` [3, H, W]."""
    top, left, crop_h, crop_w = (int(x) for x in row[:4])
    if crop_h < 1 or crop_w < 1 or top < 0 or left < 0:
        raise ValueError(f"patch_views: no crop: top, left, height, width = {row[:4]}")
    if top + crop_h > image.shape[1] or left + crop_w > image.shape[2]:
        raise ValueError(
            f"patch_views: crop top, left, height, width = {row[:4]} leaves the image of "
            f"{list(image.shape[1:])} pixels"
        )
    x = image[:, top : top + crop_h, left : left + crop_w].double()
    x = _resize_last(x, width, interpolation)
    x = _resize_last(x.mT, height, interpolation).mT.float()
    if row[4]:
        x = x.flip(-1)
    if row[9] >= 0:
        for stage in ORDERS[int(row[9])]:
            x = (_brightness, _contrast, _saturation, _hue)[stage](x, row[5 + stage])
    if row[10]:
        x = _gray(x).expand(3, -1, -1)
    if row[11] > 0:
        x = _blur(x, row[11], kernel)
    if row[12] < NO_SOLARIZE:
        x = torch.where(x >= row[12], 255 - x, x)
    return x


def _filter(x: Tensor, interpolation: str) -> Tensor:
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    a = -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def resize_weights(size_in: int, size_out: int, interpolation: str) -> tuple[Tensor, int]:
    """Integer weights of an antialiased resize, float64 [out, in], and their binary precision.

    Windows and weights as Pillow's; precision as torch's: the most bits that fit 16-bit weights.
    """
    scale = size_in / size_out
    support = (1.0 if interpolation == "bilinear" else 2.0) * max(scale, 1.0)
    center = scale * (torch.arange(size_out, dtype=torch.float64)[:, None] + 0.5)
    first = (center - support + 0.5).trunc().clamp(min=0)
    end = (center + support + 0.5).trunc().clamp(max=size_in)
    index = torch.arange(size_in, dtype=torch.float64)[None]
    weights = _filter((index - center + 0.5) / max(scale, 1.0), interpolation)
    weights = weights * ((index >= first) & (index < end))
    weights = weights / weights.sum(dim=1, keepdim=True)
    largest = weights.max().item()
    precision = 0
    while precision < 22 and 0.5 + largest * 2 ** (precision + 1) < 2**15:
        precision += 1
    exact = weights * 2**precision
    return (exact + torch.where(exact < 0, -0.5, 0.5)).trunc(), precision


def _resize_last(x: Tensor, size: int, interpolation: str) -> Tensor:
    """Resize the last axis of integer-valued float64 `x` and round to uint8's values."""
    if x.shape[-1] == size:
        return x
    weights, precision = resize_weights(x.shape[-1], size, interpolation)
    sums = x @ weights.to(x.device).T  # of integers below 2^53: exact
    return ((sums + 2 ** (precision - 1)) / 2**precision).floor().clamp(0, 255)


def _gray(x: Tensor) -> Tensor:
    """[1, h, w], floored, of [3, h, w]."""
    r, g, b = x
    return r.mul(GRAY[0]).add_(g, alpha=GRAY[1]).add_(b, alpha=GRAY[2]).floor_()[None]


def _blend(x: Tensor, other: Tensor, factor: float) -> Tensor:
    return x.mul(factor).add_(other, alpha=1.0 - factor).clamp_(0, 255).floor_()


def _brightness(x: Tensor, factor: float) -> Tensor:
    return x.mul(factor).clamp_(0, 255).floor_()


def _contrast(x: Tensor, factor: float) -> Tensor:
    return _blend(x, _gray(x).mean(), factor)


def _saturation(x: Tensor, factor: float) -> Tensor:
    return _blend(x, _gray(x), factor)


def _hue(x: Tensor, shift: float) -> Tensor:
    """Turn the hue of [3, h, w] in HSV space by `shift` of a full turn."""
    x = x * (1 / 255)
    r, g = x[0], x[1]
    low, high = x.aminmax(dim=0)
    gray = high == low
    spread = torch.where(gray, 1, high - low)
    s = (high - low) / torch.where(gray, 1, high)
    rc, gc, bc = (high - x) / spread
    h = torch.where(high == r, bc - gc, torch.where(high == g, rc + 2 - bc, gc + 4 - rc))
    h = (h * (1 / 6) + 1).fmod(1).add(shift).remainder(1) * 6
    sector = h.floor()
    f = h - sector
    values = torch.stack((high, (1 - s * f) * high, (s * f + (1 - s)) * high, (1 - s) * high))
    v, q, t, p = range(4)
    choice = torch.tensor(
        [[v, q, p, p, t, v], [t, v, v, q, p, p], [p, p, t, v, v, q]], device=x.device
    )
    rgb = values.gather(0, choice[:, sector.long() % 6])
    return rgb.mul(255.999).floor()


def _blur(x: Tensor, sigma: float, kernel: int) -> Tensor:
    pad = kernel // 2
    if pad >= min(x.shape[1:]):
        raise ValueError(
            f"patch_views: a blur kernel of {kernel} reflects {pad} pixels, more than a patch of "
            f"{list(x.shape[1:])} has; choose a smaller blur_kernel"
        )
    offsets = torch.arange(-pad, pad + 1, dtype=torch.float64, device=x.device)
    weights = torch.softmax(-0.5 * (offsets / sigma) ** 2, dim=0)
    x = F.pad(x.double()[None], (pad, pad, pad, pad), mode="reflect")
    columns = weights.view(1, 1, kernel, 1).expand(3, -1, -1, -1)
    x = F.conv2d(F.conv2d(x, columns, groups=3), columns.mT, groups=3)
    return x[0].round().float()


def _normalize(
    x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    if dtype == torch.uint8:
        return x.to(dtype)
    center = torch.tensor(mean, dtype=torch.float32, device=x.device).double().view(3, 1, 1)
    spread = torch.tensor(std, dtype=torch.float32, device=x.device).double().view(3, 1, 1)
    if not bool((spread > 0).all()) or not math.isfinite(float(center.sum())):
        raise ValueError(f"patch_views: mean {tuple(mean)}, std {tuple(std)}; expected std > 0")
    # In float32 as a multiply and an add: the roundings every implementation shares.
    return (x * (1 / (255 * spread)).float() + (-center / spread).float()).to(dtype)
