"""The tars that benches read, made of the photographs inside scikit-image's wheel.

For a checkout without data: speeds are comparable with those on CIFAR-10 and ImageNet, since sizes
and compression are theirs; nothing can be learned from so few pictures.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from bagssl_fast.data.demo import PHOTOGRAPHS
from harness.common import paint

# Name of the tar -> images in it, the share of a photograph's sides that one covers, its size.
TARS = {
    "cifar10-train.tar": (1000, 0.2, (32, 32)),
    "imagenet-sample.tar": (64, 0.9, (500, 375)),
}


def data_folder(given: Path | None, work: Path) -> Path:
    """The folder of the tars: as given by --data or BAGSSL_DATA, else one made of photographs.

    Raises:
        SystemExit: If scikit-image is not installed.
    """
    if given is not None:
        return given
    print(
        paint(
            "no --data: crops of scikit-image's photographs stand in for CIFAR-10 and ImageNet",
            "yellow",
        )
    )
    try:
        from skimage import data_dir
    except ImportError:
        raise SystemExit(
            "without --data the images are scikit-image's photographs, and it is not installed: "
            "pip install scikit-image, or name the folder of the tars by --data or BAGSSL_DATA"
        ) from None
    folder = work / "photographs"
    folder.mkdir()
    for name, (count, share, size) in TARS.items():
        write_tar(folder / name, Path(data_dir), count, share, size)
    return folder


def write_tar(
    path: Path, photographs: Path, count: int, share: float, size: tuple[int, int]
) -> None:
    """Writes `count` JPEGs of `size` (width, height), one class per photograph."""
    pictures = [Image.open(photographs / name).convert("RGB") for name in PHOTOGRAPHS]
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            number = i % len(pictures)
            width, height = (round(share * side) for side in pictures[number].size)
            left, top = (
                int(generator.integers(side - part + 1))
                for side, part in zip(pictures[number].size, (width, height), strict=True)
            )
            crop = pictures[number].crop((left, top, left + width, top + height))
            buffer = io.BytesIO()
            crop.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            member = tarfile.TarInfo(f"{Path(PHOTOGRAPHS[number]).stem}/{i:04}.jpg")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)
