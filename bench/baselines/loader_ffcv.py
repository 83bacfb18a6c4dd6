"""FFCV: the same JPEG bytes in its own file format, its compiled CPU pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
from ffcv.writer import DatasetWriter

from baselines.loader import Job


class OriginalJPEG(RGBImageField):
    """Stores a JPEG file as it is: FFCV's own field would re-encode it."""

    def encode(self, destination, data: bytes, malloc) -> None:  # type: ignore[no-untyped-def]
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        destination["mode"] = 0  # JPEG
        destination["height"], destination["width"] = height, width
        destination["data_ptr"], storage = malloc(len(data))
        storage[:] = np.frombuffer(data, np.uint8)


class Files:
    """(bytes, label) of each file, as the writer needs them."""

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return Path(self.files[index]).read_bytes(), 0


def open_loader(job: Job) -> Callable[[], Iterator[torch.Tensor]]:
    beton = Path(job.tar).with_suffix(".beton")
    if not beton.exists():
        fields = {"image": OriginalJPEG(), "label": IntField()}
        DatasetWriter(str(beton), fields, num_workers=1).from_indexed_dataset(Files(job.files()))
    a = job.augment
    image = [
        RandomResizedCropRGBImageDecoder((a.size, a.size), scale=a.scale, ratio=a.ratio),
        RandomHorizontalFlip(a.hflip),
        NormalizeImage(np.array(a.mean) * 255, np.array(a.std) * 255, np.float32),
        ToTensor(),
        ToTorchImage(convert_back_int16=False),
    ]
    loader = Loader(
        str(beton),
        batch_size=job.batch_size,
        num_workers=job.threads,
        order=OrderOption.SEQUENTIAL,
        os_cache=True,
        drop_last=False,
        custom_fields={"image": RGBImageField},
        pipelines={"image": image, "label": None},
    )

    def batches() -> Iterator[torch.Tensor]:
        for (batch,) in loader:
            yield batch

    return batches
