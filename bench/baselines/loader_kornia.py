"""kornia's batched transforms: each step on all patches at once, drawn patch by patch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import kornia.augmentation as k
import numpy as np
import simplejpeg
import torch

from baselines.loader import Job


def pipeline(augment: Any) -> k.AugmentationSequential:
    """The augmentation as kornia transforms, for float images in 0..1."""
    a = augment
    size = (a.size, a.size)
    steps = [
        k.RandomResizedCrop(size, scale=a.scale, ratio=a.ratio, cropping_mode="resample"),
        k.RandomHorizontalFlip(p=a.hflip),
    ]
    if a.jitter_prob:
        steps.append(k.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue, p=a.jitter_prob))
    if a.grayscale_prob:
        steps.append(k.RandomGrayscale(p=a.grayscale_prob))
    if a.blur_prob:
        kernel = a.blur_kernel
        steps.append(k.RandomGaussianBlur((kernel, kernel), a.blur_sigma, p=a.blur_prob))
    if a.solarize_prob:
        at = a.solarize_threshold / 255
        steps.append(k.RandomSolarize((at, at), (0.0, 0.0), p=a.solarize_prob))
    normalize = k.Normalize(torch.tensor(a.mean), torch.tensor(a.std))
    return k.AugmentationSequential(*steps, normalize, data_keys=["input"])


def batched(job: Job) -> Callable[[], Iterator[torch.Tensor]]:
    torch.set_num_threads(job.threads)
    transform = pipeline(job.augment)
    files = job.files()

    def decode(path: str) -> torch.Tensor:
        with open(path, "rb") as file:
            image = simplejpeg.decode_jpeg(file.read())
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))

    def batches() -> Iterator[torch.Tensor]:
        # Consecutive images of one size are processed together.
        start = 0
        while start < len(files):
            group = [decode(files[start])]
            start += 1
            while start < len(files) and len(group) < job.batch_size:
                image = decode(files[start])
                if image.shape != group[0].shape:
                    break
                group.append(image)
                start += 1
            images = torch.stack(group).float().div_(255)
            with torch.inference_mode():
                yield transform(images.repeat(job.patches, 1, 1, 1))

    return batches
