"""torchvision's two pipelines in a DataLoader, as in EMP-SSL's and most training scripts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
import torchvision
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from baselines.loader import Job


class PILBlur:
    """Gaussian blur by Pillow, as in EMP-SSL's and VICReg's code."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


def transform(augment, tensor: bool) -> Callable:  # type: ignore[no-untyped-def]
    """The augmentation as torchvision transforms: v1 for PIL images, or v2 for uint8 tensors."""
    a, t = augment, v2 if tensor else v1
    steps: list[Callable] = [
        t.RandomResizedCrop(a.size, scale=a.scale, ratio=a.ratio, antialias=True),
        t.RandomHorizontalFlip(a.hflip),
    ]
    if a.jitter_prob:
        jitter = t.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)
        steps.append(t.RandomApply([jitter], p=a.jitter_prob))
    if a.grayscale_prob:
        steps.append(t.RandomGrayscale(a.grayscale_prob))
    if a.blur_prob:
        kernel = a.blur_kernel
        blur = v2.GaussianBlur(kernel, a.blur_sigma) if tensor else PILBlur(a.blur_sigma)
        steps.append(t.RandomApply([blur], p=a.blur_prob))
    if a.solarize_prob:
        steps.append(t.RandomSolarize(a.solarize_threshold, p=a.solarize_prob))
    steps.append(v2.ToDtype(torch.float32, scale=True) if tensor else v1.ToTensor())
    return t.Compose([*steps, t.Normalize(a.mean, a.std)])


class Bags(Dataset):
    """P transformed patches of each file."""

    def __init__(self, job: Job, tensor: bool) -> None:
        self.files, self.patches, self.tensor = job.files(), job.patches, tensor
        self.transform = transform(job.augment, tensor)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor | list[torch.Tensor]:
        if self.tensor:
            data = torchvision.io.read_file(self.files[index])
            image = torchvision.io.decode_jpeg(data, mode=torchvision.io.ImageReadMode.RGB)
        else:
            with open(self.files[index], "rb") as file:
                image = Image.open(file).convert("RGB")
        if self.patches == 1:
            return self.transform(image)
        return [self.transform(image) for _ in range(self.patches)]


def open_loader(job: Job, tensor: bool) -> Callable[[], Iterator[torch.Tensor]]:
    torch.set_num_threads(1)
    workers = 0 if job.inline else job.threads
    loader: DataLoader = DataLoader(
        Bags(job, tensor),
        batch_size=job.batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
    )

    def batches() -> Iterator[torch.Tensor]:
        for batch in loader:
            yield from batch if isinstance(batch, list) else (batch,)

    return batches


def pil(job: Job) -> Callable[[], Iterator[torch.Tensor]]:
    return open_loader(job, tensor=False)


def v2_tensor(job: Job) -> Callable[[], Iterator[torch.Tensor]]:
    return open_loader(job, tensor=True)
