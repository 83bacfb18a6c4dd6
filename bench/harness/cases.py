"""The cases of `throughput.py`: model, data and loss of a training step; and their images."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bagssl_fast.augment import Augment
from bagssl_fast.config import OptimConfig

SMALL_HEAD = {"name": "projector", "hidden": 512, "out": 256, "num_layers": 2}
EMP_OPTIM = OptimConfig(name="sgd_lars", lr=0.3, momentum=0.9, weight_decay=1e-4, eta=0.005)
VICREG_OPTIM = OptimConfig(name="lars", lr=0.2, momentum=0.9, weight_decay=1e-6, eta=0.001)


@dataclass(frozen=True)
class Case:
    """One training step: the same for every system.

    Args:
        name: For the command line and the rows.
        title: For the tables.
        corpus: "cifar" (uint8 arrays in memory) or "imagenet" (JPEG files).
        encoder: "patchnet" or "resnet18".
        patch: Side of the patch that the encoder sees.
        area: The patch's share of the image's area.
        patches: P, patches per image.
        batch: Images per step.
        loss: "emp_ssl" (TCR) or "vicreg".
        optim: The optimizer, as published with the loss.
        head: Of the projector.
        width: Of PatchNet.
        view: Side of the whole image in a dense bag, None where the encoder has no dense form.
        stride: Of a dense bag's grid.
        views: Of each image in a dense bag; each has P / views patches on its grid.
        view_scale: A view's share of the image's area, drawn between the two; `area` is of a view.
    """

    name: str
    title: str
    corpus: str
    encoder: str
    patch: int
    area: float
    patches: int
    batch: int
    loss: str
    optim: OptimConfig
    head: dict[str, Any] = field(default_factory=lambda: dict(SMALL_HEAD))
    width: int | None = None
    view: int | None = None
    stride: int = 1
    views: int = 1
    view_scale: tuple[float, float] = (1.0, 1.0)

    @property
    def augment(self) -> Augment:
        """EMP-SSL's augmentation of a patch; its blur is Pillow's, cut off at three sigma."""
        low, high = (self.area * share for share in self.view_scale)
        return Augment(size=self.patch, scale=(low, high), blur_kernel=13)

    @property
    def view_augment(self) -> Augment:
        """The same augmentation of a whole view, whose patches all share one draw."""
        assert self.view is not None
        return replace(self.augment, size=self.view, scale=self.view_scale)

    def smaller(self, batch: int) -> Case:
        return replace(self, batch=min(batch, self.batch))


def _patchnet(name: str, title: str, loss: str, **more: Any) -> Case:
    setting: dict[str, Any] = {
        "corpus": "cifar",
        "encoder": "patchnet",
        "patch": 16,
        "area": 0.25,
        "patches": 25,
        "batch": 100,
        "view": 32,
        "stride": 4,
        "optim": EMP_OPTIM if loss == "emp_ssl" else VICREG_OPTIM,
    }
    return Case(name, title, loss=loss, **(setting | more))


TRAINING = {
    case.name: case
    for case in (
        _patchnet("cifar-tcr", "CIFAR-10, PatchNet, 25 patches of 16x16, TCR", "emp_ssl"),
        _patchnet("cifar-vicreg", "CIFAR-10, PatchNet, 25 patches of 16x16, VICReg", "vicreg"),
        Case(
            "cifar-resnet18",
            "CIFAR-10, ResNet-18, 4 patches of 16x16 brought to 32x32, TCR, EMP-SSL's head",
            corpus="cifar",
            encoder="resnet18",
            patch=32,
            area=0.25,
            patches=4,
            batch=16,
            loss="emp_ssl",
            optim=EMP_OPTIM,
            head={"name": "emp", "hidden": 4096, "out": 1024},
        ),
        _patchnet(
            "imagenet-tcr",
            "ImageNet JPEGs, PatchNet, 25 patches of 64x64, a ninth of the image each, TCR",
            "emp_ssl",
            corpus="imagenet",
            patch=64,
            area=1 / 9,
            batch=16,
            width=32,
            view=192,
            stride=32,
        ),
    )
}
EVALUATION = {"eval-25": 25, "eval-256": 256}
TARS = {
    "cifar": "cifar10-train.tar",
    "cifar-test": "cifar10-test.tar",
    "imagenet": "imagenet-sample.tar",
}


@dataclass(frozen=True)
class Images:
    """The images of a corpus: an array in memory, or JPEG files (and the same ones in a tar).

    `source` is what `bagssl_fast.open_source` takes, `classes` are the folders in the tar.
    """

    source: str
    array: NDArray[np.uint8] | None
    files: tuple[str, ...]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files) if self.array is None else len(self.array)


def prepare_images(corpus: str, data: Path, count: int, work: Path) -> Images:
    """Takes `count` evenly spread images (all, if there are fewer) from the tar of a corpus.

    CIFAR-10 is published as arrays: every system gets it as one. ImageNet is JPEG files: ours reads
    them from an uncompressed tar, others from a folder; both are in the page cache.
    """
    from PIL import Image

    if not (data / TARS[corpus]).is_file():
        raise SystemExit(
            f"{data / TARS[corpus]} is not there: make it with `bagssl pack SOURCE {TARS[corpus]} "
            "--short_side 0` from a folder of images (or torchvision's CIFAR files), or choose "
            "other --cases"
        )
    folder = work / f"{corpus}-{count}"
    folder.mkdir()
    arrays, files, classes = [], [], []
    with tarfile.open(data / TARS[corpus]) as tar:
        members = sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: m.name)
        count = min(count, len(members))
        for i in range(count):
            member = members[i * len(members) // count]
            classes.append(Path(member.name).parent.name)
            content = tar.extractfile(member).read()  # type: ignore[union-attr]
            if corpus.startswith("cifar"):
                arrays.append(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
            else:
                path = folder / "files" / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                files.append(str(path))
    if corpus.startswith("cifar"):
        np.save(folder / "images.npy", np.stack(arrays))
        return Images(str(folder / "images.npy"), np.stack(arrays), (), tuple(classes))
    with tarfile.open(folder / "images.tar", "w") as out:
        out.add(folder / "files", arcname=".")
    return Images(str(folder / "images.tar"), None, tuple(files), tuple(classes))
