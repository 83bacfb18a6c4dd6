"""JPEG decoders, from bytes in memory to RGB, in one thread: ours and other fast ones."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from baselines.loader import Job


class Decoder(NamedTuple):
    """How one image is decoded to [H, W, 3], and a pass over many."""

    one: Callable[[bytes], Any]
    many: Callable[[list[bytes]], Any]

    @staticmethod
    def each(one: Callable[[bytes], Any]) -> Decoder:
        def many(files: list[bytes]) -> None:
            for file in files:
                one(file)

        return Decoder(one, many)


def decoders() -> dict[str, Decoder]:
    """simplejpeg, Pillow, and torchvision where it is installed."""
    from PIL import Image

    found = {
        "simplejpeg": Decoder.each(simplejpeg.decode_jpeg),
        "Pillow": Decoder.each(
            lambda file: np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
        ),
    }
    try:
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        return found

    def torchvision(file: bytes) -> Any:
        data = torch.frombuffer(bytearray(file), dtype=torch.uint8)
        return decode_jpeg(data, mode=ImageReadMode.RGB).permute(1, 2, 0)

    found["torchvision"] = Decoder.each(torchvision)
    return found


def ours() -> Decoder:
    """The loader's own decoder, its buffers reused from image to image as in the loader."""
    from bagssl_fast import _C
    from bagssl_fast.data.decoding import MAX_PIXELS, decode_image

    return Decoder(
        lambda file: _C.decode(file, decode_image, MAX_PIXELS),
        lambda files: _C.decode_many(files, 1, decode_image, MAX_PIXELS),
    )


def read(job: Job) -> list[bytes]:
    return [Path(path).read_bytes() for path in job.files()]


def largest_difference(decoder: Decoder, files: list[bytes]) -> float:
    """Largest difference of a decoder's pixels from simplejpeg's, over a few files."""
    return max(
        float(np.abs(np.asarray(decoder.one(f)).astype(int) - simplejpeg.decode_jpeg(f)).max())
        for f in files
    )
