"""Small pictures, files and tars that the tests of the data path share."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def waves(height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth colors with some noise, as photographs have; uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([np.sin(y / (5 + c) + seed) + np.cos(x / (7 - c)) for c in range(3)], -1)
    noisy = 128 + 55 * smooth + rng.normal(0, 8, smooth.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def noise(count: int = 24, height: int = 20, width: int = 26) -> np.ndarray:
    """Pictures of which no two are alike; uint8 [count, H, W, 3]."""
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def jpeg(pixels: np.ndarray, **options) -> bytes:
    """A file of gray [H, W], RGB [H, W, 3] or CMYK [H, W, 4] pixels."""
    image = Image.fromarray(pixels)
    if image.mode == "RGBA":
        image = Image.frombytes("CMYK", image.size, pixels.tobytes())
    out = io.BytesIO()
    image.save(out, "JPEG", **{"quality": 90, **options})
    return out.getvalue()


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def exif_rotated(pixels: np.ndarray, orientation: int = 6) -> bytes:
    """A JPEG that EXIF says to turn; 6: by a quarter, clockwise."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(pixels, exif=exif.tobytes())


def write_tar(path: Path, members, format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of (name, bytes) members."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
