"""Images in any of the usual forms as upright RGB arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from bagssl_fast.data.decoding import to_rgb

KINDS = (
    "uint8 [H, W, 3], [3, H, W] or [H, W], or a batch [N, H, W, 3 or 1] or [N, 3 or 1, H, W]; a "
    "PIL image; a path; or a list of these, of any sizes"
)


def split_images(images: Any) -> Sequence[Any]:
    """One item per image: the rows of a batch, the items of a list, or the image itself.

    Three dimensions are always one image: as a stack, three gray images could not be told from one
    color image.

    Raises:
        ValueError: For anything that is neither an image nor a batch of images.
    """
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [images]
    if isinstance(images, Tensor):
        images = images.detach().cpu().numpy()
    if hasattr(images, "__array__"):
        images = np.asarray(images)
        if images.dtype.kind in "OUS":  # an array of paths or of images, as numpy makes from lists
            return list(images.reshape(-1))
        if images.ndim == 3 and _channels_axis(images) is None:
            raise ValueError(
                f"images: got the shape {list(images.shape)}, which is not one image [H, W, 3], "
                "[3, H, W] or [H, W]; a stack of gray images has a channel axis, [N, H, W, 1]: "
                "images[..., None]"
            )
        return [images] if images.ndim < 4 else list(images)
    if isinstance(images, Sequence) and not isinstance(images, bytes):
        return images
    if isinstance(images, Iterator):
        return list(images)
    raise ValueError(f"images: got a {type(images).__name__}; expected {KINDS}")


def is_path(item: Any) -> bool:
    """Whether an item names a file."""
    return isinstance(item, (str, os.PathLike))


def to_array(item: Any, index: int) -> NDArray[np.uint8]:
    """One image as uint8 [H, W, 3], C-contiguous.

    Args:
        item: An array or tensor, or a PIL image.
        index: Its place among the images, for errors.

    Raises:
        ValueError: Naming the image and what is wrong with it.
    """
    if isinstance(item, Image.Image):
        return to_rgb(ImageOps.exif_transpose(item))
    if isinstance(item, Tensor):
        item = item.detach().cpu()
    if not hasattr(item, "__array__"):
        raise ValueError(f"image {index} is a {type(item).__name__}; expected {KINDS}")
    array = np.asarray(item)
    if array.dtype != np.uint8:
        hint = (
            "; convert pixels in 0..1 by (x * 255).round().astype('uint8')"
            if array.dtype.kind == "f"
            else ""
        )
        raise ValueError(
            f"image {index} is {array.dtype} {list(array.shape)}; expected uint8 values 0 to 255, "
            f"neither scaled nor normalized{hint}"
        )
    whole = array[..., None] if array.ndim == 2 else array
    axis = _channels_axis(whole) if whole.ndim == 3 else None
    if axis is None or whole.size == 0:
        alpha = "; remove the alpha channel by image[..., :3]" if array.shape[-1:] == (4,) else ""
        raise ValueError(
            f"image {index} has shape {list(array.shape)}; expected [H, W, 3], [3, H, W] or "
            f"[H, W]{alpha}"
        )
    whole = np.moveaxis(whole, axis, 2)
    return np.ascontiguousarray(np.broadcast_to(whole, (*whole.shape[:2], 3)))


def _channels_axis(array: NDArray[Any]) -> int | None:
    """The axis of the 1 or 3 channels of [H, W, C] or [C, H, W]; the last one if both fit."""
    return next((axis for axis in (2, 0) if array.shape[axis] in (1, 3)), None)
