"""The seeds of each target, made here: small, valid and of every kind that the reader knows."""

from __future__ import annotations

import io
import pickle
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

TINY = ["--data", "demo", "--encoder.width", "8", "--head.hidden", "8", "--head.out", "8"]
_RANDOM = np.random.default_rng(0)


def _pixels(height: int, width: int, channels: int = 3) -> np.ndarray:
    return _RANDOM.integers(0, 256, (height, width, channels), np.uint8)


def jpegs() -> list[bytes]:
    """Baseline, progressive, gray, CMYK, rotated, with restarts, of several subsamplings."""
    color = Image.fromarray(_pixels(40, 56))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [
        (color, {"quality": 90}),
        (color, {"quality": 30, "subsampling": 2}),
        (color, {"subsampling": 0, "optimize": True}),
        (color, {"progressive": True}),
        (color, {"exif": exif}),
        (color, {"restart_marker_blocks": 2}),
        (color, {"comment": b"x" * 40}),
        (Image.fromarray(_pixels(17, 9)[..., 0]), {}),
        (Image.fromarray(_pixels(9, 17)[..., 0]), {"progressive": True}),
        (Image.fromarray(_pixels(16, 16, 4), "CMYK"), {}),
        (Image.fromarray(_pixels(1, 1)), {}),
    ]
    out = []
    for image, options in files:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", **options)
        out.append(buffer.getvalue())
    return out


def tars() -> list[bytes]:
    """The three formats; long names, links, classes, folders, empty members."""
    out = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
            folder = tarfile.TarInfo("cat")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            names = ["cat/a.jpg", "cat/a.cls", "x" * 60 + "/" + "y" * 60 + ".png", "e.jpg"]
            if kind != tarfile.USTAR_FORMAT:
                names.append("long/" + "n" * 200 + ".jpg")
                names.append("größe.jpg")
            for name in names:
                member = tarfile.TarInfo(name)
                content = b"" if name == "e.jpg" else b"0" * (len(name) * 9 % 700)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            for link, where in ((tarfile.LNKTYPE, "cat/a.jpg"), (tarfile.SYMTYPE, "a.jpg")):
                member = tarfile.TarInfo(f"cat/link{link.decode()}.jpg")
                member.type, member.linkname = link, where
                tar.addfile(member)
        out.append(buffer.getvalue())
    return out


def indices() -> list[bytes]:
    """Cached indices of tars with classes from folders, from members, and without."""
    from bagssl_fast.data.source import NameTable
    from bagssl_fast.data.tars import ShardIndex, save_index

    names = NameTable.of([b"cat/a.jpg", b"dog/b.jpg", "größe.jpg".encode()])
    offsets, sizes = np.array([512, 1536, 2560]), np.array([700, 3, 0])
    out = []
    for classes, labels, numbered in (
        (["cat", "dog"], [0, 1, -1], False),
        (["0", "12"], [0, 1, 1], True),
        ([], [-1, -1, -1], False),
    ):
        index = ShardIndex(names, offsets, sizes, np.array(labels), classes, numbered)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "index.npz"
            save_index(path, index)
            out.append(path.read_bytes())
    return out


def arrays() -> list[bytes]:
    """.npy and .npz of images, with labels, splits and classes."""
    images = _pixels(6, 4)[None].repeat(3, 0)
    out = []
    for save, values in (
        (np.save, images),
        (np.save, np.asfortranarray(images)),
        (np.save, images[..., 0]),
        (np.savez, {"images": images, "labels": np.array([0, 1, 2])}),
        (np.savez_compressed, {"images": images, "classes": np.array(["a", "b"])}),
        (np.savez, {"train_images": images, "train_labels": np.array([[0], [1], [0]], np.uint8)}),
    ):
        buffer = io.BytesIO()
        if isinstance(values, dict):
            save(buffer, **values)
        else:
            save(buffer, values)
        out.append(buffer.getvalue())
    return out


def pickles() -> list[bytes]:
    """CIFAR's batches and class names, as protocols 0, 2 and 4 write them."""
    batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2], "filenames": ["a", "b"]}
    names = {"label_names": ["cat", "dog"]}
    return [pickle.dumps(value, protocol=p) for p in (0, 2, 4) for value in (batch, names)]


def tables() -> list[bytes]:
    """View tables of two images, behind a header that `targets.views` reads."""
    from bagssl_fast import _C
    from bagssl_fast.augment import Augment

    out = []
    for size, augment in ((8, Augment()), (5, Augment.none(size=5))):
        sizes = np.array([[30, 20], [9, 33]])
        table = _C.draw_views([augment], sizes, np.arange(2), patches=3, seed=0, epoch=0)
        header = bytes([30, 20, 9, 33, size, size + 1, 0, 0])
        out.append(header + table.astype("<f4").tobytes())
    return out


def run_files() -> list[bytes]:
    """A letter for the kind, then config.yaml, config.json or model.safetensors of a tiny model."""
    from bagssl_fast import cli
    from bagssl_fast.models import saved
    from bagssl_fast.models.bag_model import build_model

    config = cli.parse(TINY)
    model = build_model(config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved.export(folder, model.state_dict(), saved.describe(config, model, 3))
        return [
            b"y" + cli.to_yaml(config).encode(),
            b"j" + (folder / "config.json").read_bytes(),
            b"w" + (folder / saved.WEIGHTS).read_bytes(),
        ]
