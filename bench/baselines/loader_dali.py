"""DALI's CPU pipeline: decodes only the random box, resizes, mirrors and normalizes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from nvidia.dali import fn, pipeline_def, types

from baselines.loader import Job

QUEUE = 2  # batches that the pipeline works ahead


class Dali:
    def __init__(self, job: Job) -> None:
        a, files = job.augment, job.files()

        @pipeline_def(
            batch_size=job.batch_size,
            num_threads=job.threads,
            device_id=None,
            prefetch_queue_depth=QUEUE,
        )
        def classic():  # type: ignore[no-untyped-def]
            data, _ = fn.readers.file(files=files, name="reader")
            image = fn.decoders.image_random_crop(
                data,
                device="cpu",
                output_type=types.RGB,
                random_area=list(a.scale),
                random_aspect_ratio=list(a.ratio),
            )
            image = fn.resize(image, size=[a.size, a.size], interp_type=types.INTERP_LINEAR)
            return fn.crop_mirror_normalize(
                image,
                dtype=types.FLOAT,
                output_layout="CHW",
                mean=[255 * v for v in a.mean],
                std=[255 * v for v in a.std],
                mirror=fn.random.coin_flip(probability=a.hflip),
            )

        self.pipeline = classic()
        self.pipeline.build()
        self.count, self.batch_size = len(files), job.batch_size

    def batch(self) -> torch.Tensor:
        (images,) = self.pipeline.run()
        return torch.from_dlpack(images.as_tensor())

    def drain(self) -> None:
        for _ in range(QUEUE):
            self.batch()

    def __call__(self) -> Iterator[torch.Tensor]:
        """One pass; the reader repeats the files endlessly, so the last batch is full."""
        for _ in range(math.ceil(self.count / self.batch_size)):
            yield self.batch()


def open_loader(job: Job) -> Dali:
    return Dali(job)
