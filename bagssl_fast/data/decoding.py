"""Image files that the C++ core does not decode: formats other than JPEG, by Pillow."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from bagssl_fast._extension import _C

# Limits of what an image may cost. That of pixels is Pillow's own, above which it treats a file as
# a decompression bomb.
MAX_PIXELS: int = _C.MAX_PIXELS
MAX_BYTES: int = _C.MAX_BYTES
MAX_SCANS: int = _C.MAX_SCANS
# zlib makes a thousand bytes of one; photographs grow less than twofold, masks tenfold.
MAX_INFLATION = 200
TWELVE_BITS = 1 << 12

_JPEG_START = b"\xff\xd8\xff"
_EXIF = b"Exif\x00\x00"


class ImageError(ValueError):
    """An image that cannot be decoded.

    Attributes:
        name: The file or member.
        reason: What is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f'{name}: {reason} (on_error="skip" replaces such images)')
        self.name = name
        self.reason = reason


def check_inflation(path: Path, inflated: int, max_inflation: int) -> None:
    """Refuses a compressed file of arrays that would take far more memory than it has bytes.

    Args:
        path: The file.
        inflated: Bytes that it claims to hold; what fits `MAX_BYTES` is no harm.
        max_inflation: How many times its own size that may be.

    Raises:
        ValueError: Before anything is inflated.
    """
    stored = path.stat().st_size
    if inflated > max(MAX_BYTES, max_inflation * stored):
        raise ValueError(
            f"{stored} bytes would inflate to {inflated}, {inflated // max(stored, 1)} times as "
            f"many, over the limit of {max_inflation}: raise max_inflation, or save the arrays "
            "uncompressed"
        )


def decode_image(data: memoryview | bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decodes one file to upright RGB, uint8 [H, W, 3]; called from the loader's threads.

    Raises:
        ValueError: With the reason; the caller knows the file's name.
    """
    if not _C.HAS_JPEG and bytes(data[:3]) == _JPEG_START:
        image = _decode_plain_jpeg(data, max_pixels)
        if image is not None:
            return image
    return _decode_with_pillow(data, max_pixels)


def _decode_plain_jpeg(data: memoryview | bytes, max_pixels: int) -> NDArray[np.uint8] | None:
    """By simplejpeg, or None where Pillow is needed: EXIF rotation, CMYK, damaged headers."""
    if _EXIF in bytes(data[:65536]):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colorspace not in ("YCbCr", "Gray", "RGB"):
        return None
    _check_size(width, height, max_pixels)
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        # A truncated file, or one that libjpeg only warns about: Pillow tells them apart.
        return None


def _decode_with_pillow(data: memoryview | bytes, max_pixels: int) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_size(image.width, image.height, max_pixels)
            ImageOps.exif_transpose(image, in_place=True)  # without a copy where it is upright
            return to_rgb(image)
    except UnidentifiedImageError:
        raise ValueError("not an image of a format that Pillow reads") from None


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels of a PIL image of any mode, uint8 [H, W, 3]."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Pillow would clip 16-bit gray at 255. One scale for all images: a guess at the range of
        # each would change their brightness against each other.
        pixels = np.asarray(image).astype(np.uint32)
        if 0 < pixels.max(initial=0) < TWELVE_BITS:
            warnings.warn(
                "a 16-bit image uses 12 bits or less (no pixel reaches 4096 of 65535) and becomes "
                "nearly black, as others may: scale such images to 16 bits and save them again",
                stacklevel=2,
            )
        gray = (pixels >> 8).astype(np.uint8)
        return np.ascontiguousarray(np.repeat(gray[:, :, None], 3, axis=2))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(
            f"an image of {width} x {height} pixels exceeds the limit of {max_pixels} pixels "
            "(raise max_pixels)"
        )
