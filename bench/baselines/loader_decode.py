"""JPEG decoders, from bytes in memory to RGB, one image at a time in one thread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from baselines.loader import Job

Decoder = Callable[[bytes], Any]


def read(job: Job) -> list[bytes]:
    return [Path(path).read_bytes() for path in job.files()]


def decoders() -> dict[str, Decoder]:
    """Ours, simplejpeg's, and torchvision's where it is installed."""
    found: dict[str, Decoder] = {}
    found["simplejpeg"] = simplejpeg.decode_jpeg
    return found


def largest_difference(decode: Decoder, files: list[bytes]) -> float:
    """How far a decoder is from simplejpeg, over a few files."""
    differences = []
    for data in files:
        image = np.asarray(decode(data)).astype(int)
        differences.append(np.abs(image - simplejpeg.decode_jpeg(data)).max())
    return float(max(differences))
