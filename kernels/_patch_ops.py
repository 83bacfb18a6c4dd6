# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The stages of patch_views as device functions on tiles of a patch.

A tile is three planes r, g, b [TILE_H, TILE_W] of whole float32 numbers in 0..255. Every function
rounds as torchvision.transforms.v2.functional does on uint8 tensors: multiplications and additions
are fused exactly where torch fuses them, so kernels are compiled without contraction.
"""

import triton
import triton.language as tl

MAX_PRECISION: tl.constexpr = tl.constexpr(22)  # bits of torch's fixed-point resize weights


# ------------------------------------------------------------------------------ crop and resize


@triton.jit
def _filter(x, BICUBIC: tl.constexpr):
    """The triangle, or Keys' cubic with a = -1/2, of a float64 distance."""
    x = tl.abs(x)
    if BICUBIC:
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
        return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    return tl.where(x < 1.0, 1.0 - x, 0.0)


@triton.jit
def _axis_scale(size, out_size, BICUBIC: tl.constexpr):
    """(source pixels per output pixel, filter support, 1 / the filter's stretch) in float64."""
    scale = tl.full((), 1.0, tl.float64) * size / out_size  # sizes of 1 come as constants
    stretch = tl.maximum(scale, 1.0)
    support = stretch * 2.0 if BICUBIC else stretch * 1.0
    return scale, support, tl.where(scale >= 1.0, 1.0 / scale, 1.0)


@triton.jit
def _axis_windows(size, out_size, offs, BICUBIC: tl.constexpr):
    """Of the output pixels offs: first and end of the window, 1 / sum and largest of weights."""
    scale, support, inverse = _axis_scale(size, out_size, BICUBIC)
    center = scale * (offs.to(tl.float64) + 0.5)
    first = tl.maximum((center - support + 0.5).to(tl.int32), 0)
    end = tl.minimum((center + support + 0.5).to(tl.int32), size)
    total = tl.zeros_like(center)
    peak = tl.zeros_like(center)
    longest = tl.ceil(support.to(tl.float32)).to(tl.int32) * 2 + 1
    for k in range(longest):
        at = first + k
        weight = _filter((at.to(tl.float64) - center + 0.5) * inverse, BICUBIC)
        weight = tl.where(at < end, weight, 0.0)
        total += weight
        peak = tl.maximum(peak, weight)
    return first, end, 1.0 / tl.where(total == 0.0, 1.0, total), peak


@triton.jit
def axis_windows(size, out_size, offs, BICUBIC: tl.constexpr):
    """Of the output pixels offs: first and end of their windows, 1 / sum of the weights."""
    windows = _axis_windows(size, out_size, offs, BICUBIC)
    return windows[0], windows[1], windows[2]


@triton.jit
def axis_precision(size, out_size, offs, BICUBIC: tl.constexpr):
    """The most bits with which the largest weight of an axis (all its offs) fits an int16."""
    windows = _axis_windows(size, out_size, offs, BICUBIC)
    share = (windows[3] * windows[2]).to(tl.float32)
    largest = tl.max(tl.where(offs < out_size, share, 0.0))
    precision = tl.full((), 0, tl.int32)
    bound = largest * 2.0
    for _ in range(MAX_PRECISION):
        precision += tl.where(0.5 + bound < 32768.0, 1, 0)
        bound *= 2.0
    return precision


@triton.jit
def _weights(size, out_size, offs, at, first, end, norm, precision, BICUBIC: tl.constexpr):
    """Fixed-point weights of source pixels `at` for output pixels `offs`."""
    scale, _, inverse = _axis_scale(size, out_size, BICUBIC)
    center = scale * (offs.to(tl.float64) + 0.5)
    weight = _filter((at.to(tl.float64) - center + 0.5) * inverse, BICUBIC) * norm
    weight = tl.where((at >= first) & (at < end), weight, 0.0) * (1 << precision).to(tl.float64)
    return tl.where(weight < 0.0, weight - 0.5, weight + 0.5).to(tl.int32)


@triton.jit
def _round(total, precision):
    """Fixed point to a byte."""
    return tl.minimum(tl.maximum((total + (1 << (precision - 1))) >> precision, 0), 255)


@triton.jit
def resize_tile(
    crop_ptr, stride, crop_h, crop_w, out_h, out_w, offs_i, offs_j,
    first_i, end_i, norm_i, precision_i, first_j, end_j, norm_j, precision_j,
    BICUBIC: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Output pixels offs_i x offs_j of a resized crop; every source pixel they need is read once.

    All channels go through one product per axis and byte of the weights: rows (y, channel) x
    columns j, then rows i x columns (channel, j). No sum of bytes' products over a block exceeds
    2^24, so they are exact in float32. (One product per loop body: two that share an operand would
    be taken for a chain, and all warps be laid along the rows.)
    """
    in_i = offs_i < out_h
    in_j = (offs_j >= 0) & (offs_j < out_w)
    low_y = tl.min(tl.where(in_i, first_i, crop_h))
    high_y = tl.max(tl.where(in_i, end_i, 0))
    low_x = tl.min(tl.where(in_j, first_j, crop_w))
    high_x = tl.max(tl.where(in_j, end_j, 0))

    offs_yc = tl.arange(0, 4 * BLOCK_Y)
    channel = offs_yc % 4
    total = tl.zeros((TILE_H, 4 * TILE_W), tl.int32)
    for y in range(low_y, high_y, BLOCK_Y):
        narrow = tl.zeros((4 * BLOCK_Y, TILE_W), tl.int32)
        row_y = y + offs_yc // 4
        row_offs = row_y * stride + channel
        row_mask = (row_y < high_y) & (channel < 3)
        for x in range(low_x, high_x, BLOCK_X):
            offs_x = x + tl.arange(0, BLOCK_X)
            mask = row_mask[:, None] & (offs_x < high_x)[None, :]
            pixel_ptr = crop_ptr + (row_offs[:, None] + offs_x[None, :] * 3)
            pixels = tl.load(pixel_ptr, mask=mask, other=0).to(tl.float16)
            weights = _weights(
                crop_w, out_w, offs_j[None, :], offs_x[:, None], first_j[None, :], end_j[None, :],
                norm_j[None, :], precision_j, BICUBIC,
            )  # fmt: skip
            for byte in range(2):
                narrow += tl.dot(pixels, _byte(weights, byte)).to(tl.int32) << (8 - 8 * byte)
        rows = tl.reshape(_round(narrow, precision_j).to(tl.float16), (BLOCK_Y, 4 * TILE_W))
        offs_y = y + tl.arange(0, BLOCK_Y)
        weights = _weights(
            crop_h, out_h, offs_i[:, None], offs_y[None, :], first_i[:, None], end_i[:, None],
            norm_i[:, None], precision_i, BICUBIC,
        )  # fmt: skip
        for byte in range(2):
            total += tl.dot(_byte(weights, byte), rows).to(tl.int32) << (8 - 8 * byte)
    return split_channels(_round(total, precision_i).to(tl.float16), TILE_H, TILE_W)


@triton.jit
def _byte(weights, byte):
    """The high (signed) or the low byte of 16-bit weights, exact in float16."""
    return tl.where(byte == 0, weights >> 8, weights & 255).to(tl.float16)


@triton.jit
def split_channels(rows, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Bytes [TILE_H, 4 TILE_W] in float16, rows of (channel, column), to three float32 planes."""
    pixels = tl.permute(tl.reshape(rows, (TILE_H, 2, 2, TILE_W)), (0, 3, 1, 2))
    r_b, g_none = tl.split(pixels)
    r, b = tl.split(r_b)
    g = tl.split(g_none)[0]
    return r.to(tl.float32), g.to(tl.float32), b.to(tl.float32)


# ---------------------------------------------------------------------------------------- color


@triton.jit
def _truncate(x):
    """To a whole number in 0..255 as a cast to uint8 after a clamp."""
    return tl.minimum(tl.maximum(x, 0.0), 255.0).to(tl.int32).to(tl.float32)


@triton.jit
def _gray(r, g, b):
    return tl.fma(b, 0.114, tl.fma(g, 0.587, r * 0.2989)).to(tl.int32).to(tl.float32)


@triton.jit
def _blend(x, other, factor):
    return _truncate(tl.fma(other, 1.0 - factor, x * factor))


@triton.jit
def _divide(x, y):
    """x / y, rounded once, for plain numbers.

    (The hardware's rounded division calls a subroutine for all others: registers spill around it.)
    """
    inverse = 1.0 / y
    quotient = x * inverse
    return tl.fma(tl.fma(-quotient, y, x), inverse, quotient)


@triton.jit
def _shift_hue(r8, g8, b8, shift):
    """RGB to HSV, hue moved, back, with torch's roundings; two of the three channels are exact."""
    max8 = tl.maximum(tl.maximum(r8, g8), b8)
    min8 = tl.minimum(tl.minimum(r8, g8), b8)
    byte = 1.0 / 255.0
    r, g, b, v = r8 * byte, g8 * byte, b8 * byte, max8 * byte
    spread = v - min8 * byte
    divisor = tl.where(spread == 0.0, 1.0, spread)
    s = _divide(spread, tl.where(spread == 0.0, 1.0, v))

    is_r = max8 == r8
    is_g = max8 == g8
    plus = tl.where(is_r, b, tl.where(is_g, r, g))
    minus = tl.where(is_r, g, tl.where(is_g, b, r))
    start = tl.where(is_r, 0.0, tl.where(is_g, 2.0, 4.0))
    h = (_divide(v - plus, divisor) + start) - _divide(v - minus, divisor)
    h = h * (1.0 / 6.0) + 1.0
    h = tl.where(h >= 1.0, h - 1.0, h)
    h = h + shift
    h = tl.where(h < 0.0, h + 1.0, tl.where(h >= 1.0, h - 1.0, h))

    h6 = h * 6.0
    turn = h6.to(tl.int32)
    sf = s * (h6 - turn.to(tl.float32))
    middle = tl.where(turn % 2 == 1, 1.0 - sf, sf + (1.0 - s)) * v * 255.999
    middle = middle.to(tl.int32).to(tl.float32)
    sector = tl.where(turn == 6, 0.0, turn.to(tl.float32))
    from_r = tl.abs(sector - 2.5)  # r is v in sectors 5, 0 and the smallest in 2, 3
    from_g = tl.abs(sector - 1.5)  # g is v in 1, 2 and the smallest in 4, 5
    from_b = tl.abs(sector - 3.5)  # b is v in 3, 4 and the smallest in 0, 1
    r = tl.where(from_r > 2.0, max8, tl.where(from_r > 1.0, middle, min8))
    g = tl.where(from_g < 1.0, max8, tl.where(from_g < 2.0, middle, min8))
    b = tl.where(from_b < 1.0, max8, tl.where(from_b < 2.0, middle, min8))
    return r, g, b


@triton.jit
def _stage(order, step):
    """Which of brightness, contrast, saturation, hue comes at `step` of permutation `order`."""
    first = order // 6
    second = order % 6 // 2
    second += tl.where(second >= first, 1, 0)
    # Of the two left, the smaller one: the least number that is neither of the first two.
    has_0 = (first == 0) | (second == 0)
    has_1 = (first == 1) | (second == 1)
    smaller = tl.where(has_0, tl.where(has_1, 2, 1), 0)
    larger = 6 - first - second - smaller
    swapped = order % 2 == 1
    third = tl.where(swapped, larger, smaller)
    fourth = tl.where(swapped, smaller, larger)
    return tl.where(
        step == 0, first, tl.where(step == 1, second, tl.where(step == 2, third, fourth))
    )


@triton.jit
def mean_gray(gray_sum, num_pixels):
    return tl.div_rn(gray_sum.to(tl.float32), tl.full((), 1.0, tl.float32) * num_pixels)


@triton.jit
def jitter(
    r, g, b, mask, num_pixels, mean, row_ptr,
    MEAN_KNOWN: tl.constexpr, ONLY_MEAN: tl.constexpr,
):  # fmt: skip
    """Color jitter in the drawn order: (r, g, b, sum of grays before contrast).

    The mean gray that contrast blends with is that of the whole patch: taken here, or given
    (MEAN_KNOWN) from the sums over all tiles of an earlier call that went only so far (ONLY_MEAN).
    """
    order = tl.load(row_ptr + 9).to(tl.int32)
    factor_b = tl.load(row_ptr + 5)
    factor_c = tl.load(row_ptr + 6)
    factor_s = tl.load(row_ptr + 7)
    shift = tl.load(row_ptr + 8)
    gray_sum = tl.full((), 0, tl.int32)
    going = order >= 0
    for step in range(4):
        stage = _stage(order, step)
        if going & (stage == 0) & (factor_b != 1.0):
            r = _truncate(r * factor_b)
            g = _truncate(g * factor_b)
            b = _truncate(b * factor_b)
        if going & (stage == 1) & (factor_c != 1.0):
            if not MEAN_KNOWN:
                grays = tl.where(mask, _gray(r, g, b), 0.0).to(tl.int32)
                gray_sum = tl.sum(grays)
            if not ONLY_MEAN:
                level = mean
                if not MEAN_KNOWN:
                    level = mean_gray(gray_sum, num_pixels)
                r = _blend(r, level, factor_c)
                g = _blend(g, level, factor_c)
                b = _blend(b, level, factor_c)
        if going & (stage == 2) & (factor_s != 1.0):
            gray = _gray(r, g, b)
            r = _blend(r, gray, factor_s)
            g = _blend(g, gray, factor_s)
            b = _blend(b, gray, factor_s)
        if going & (stage == 3) & (shift != 0.0):
            r, g, b = _shift_hue(r, g, b, shift)
        if ONLY_MEAN:
            going = going & (stage != 1)
    return r, g, b, gray_sum


@triton.jit
def grayscale(r, g, b, row_ptr):
    if tl.load(row_ptr + 10) != 0.0:
        r = _gray(r, g, b)
        g = r
        b = r
    return r, g, b


# --------------------------------------------------------------------------------- blur and store


@triton.jit
def _gaussian(distance, sigma, pad):
    x = distance.to(tl.float32) / sigma
    return tl.where(tl.abs(distance) <= pad, tl.exp(-0.5 * x * x), 0.0)


@triton.jit
def _blur_band(out, source, size, sigma, pad):
    """Weights of pixels `source` for blurred pixels `out` of an axis reflected at both its ends."""
    total = 1.0
    for k in range(1, pad + 1):
        total += 2.0 * tl.exp(-0.5 * k * k / (sigma * sigma))
    weight = _gaussian(source - out, sigma, pad)
    weight += tl.where(source > 0, _gaussian(source + out, sigma, pad), 0.0)
    mirrored = 2 * (size - 1) - source
    weight += tl.where(source < size - 1, _gaussian(mirrored - out, sigma, pad), 0.0)
    return tl.where((source >= 0) & (source < size) & (out < size), weight / total, 0.0)


@triton.jit
def _half(x, part):
    """The first or the second float16 of a float32 that is their sum, to 22 bits."""
    high = x.to(tl.float16)
    if part == 1:
        high = (x - high.to(tl.float32)).to(tl.float16)
    return high


@triton.jit
def _blur_plane(x, down, across, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """down x across: float32 products as sums of float16 ones, of bytes or of two halves."""
    pixels = x.to(tl.float16)
    rows = tl.zeros((TILE_H, TILE_W), tl.float32)
    for part in range(2):
        rows = tl.dot(_half(down, part), pixels, rows)
    rows *= 1.0 / 1024.0
    out = tl.zeros((TILE_H, TILE_W), tl.float32)
    for part in range(3):  # high x high, high x low, low x high
        out = tl.dot(_half(rows, part // 2), _half(across, part % 2), out)
    return out * (1.0 / 1024.0)


@triton.jit
def blur_tile(
    r, g, b, offs_y, offs_x, offs_i, offs_j, out_h, out_w, sigma, pad,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """What pixels offs_y x offs_x contribute to blurred pixels offs_i x offs_j.

    Plane by plane in a loop, which keeps registers few. The bands are scaled by 1024 to keep their
    second halves out of the subnormals.
    """
    down = _blur_band(offs_i[:, None], offs_y[None, :], out_h, sigma, pad) * 1024.0
    across = _blur_band(offs_j[None, :], offs_x[:, None], out_w, sigma, pad) * 1024.0
    for c in range(3):
        plane = tl.where(c == 0, r, tl.where(c == 1, g, b))
        plane = _blur_plane(plane, down, across, TILE_H, TILE_W)
        r = tl.where(c == 0, plane, r)
        g = tl.where(c == 1, plane, g)
        b = tl.where(c == 2, plane, b)
    return r, g, b


@triton.jit
def round_half_even(x):
    """Adding and taking away 1.5 * 2^23 leaves the nearest whole number."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def solarize_and_store(r, g, b, row_ptr, scale_ptr, pixel_ptr, mask, NORMALIZE: tl.constexpr):
    """Inverts what reaches the threshold, normalizes, stores three neighbors per pixel."""
    threshold = tl.load(row_ptr + 12)
    r = tl.where(r >= threshold, 255.0 - r, r)
    g = tl.where(g >= threshold, 255.0 - g, g)
    b = tl.where(b >= threshold, 255.0 - b, b)
    if NORMALIZE:
        r = r * tl.load(scale_ptr) + tl.load(scale_ptr + 3)
        g = g * tl.load(scale_ptr + 1) + tl.load(scale_ptr + 4)
        b = b * tl.load(scale_ptr + 2) + tl.load(scale_ptr + 5)
    tl.store(pixel_ptr, r.to(pixel_ptr.dtype.element_ty), mask=mask)
    tl.store(pixel_ptr + 1, g.to(pixel_ptr.dtype.element_ty), mask=mask)
    tl.store(pixel_ptr + 2, b.to(pixel_ptr.dtype.element_ty), mask=mask)
