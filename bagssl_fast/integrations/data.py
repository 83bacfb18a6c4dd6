"""Our data path in other people's scripts: a loader, a data set, and a transform.

`MultiCropLoader` replaces a script's DataLoader, `BagDataset` its data set with a multi-crop
transform, and `PatchViews` the augmentation of uint8 batches on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bagssl_fast import ops
from bagssl_fast._extension import _C
from bagssl_fast.augment import Augment, differing
from bagssl_fast.data import BagLoader, Batch, Source, open_source
from bagssl_fast.data.batch import ImageBatch

LAYOUTS = ("pair", "lightly", "solo_learn")


class MultiCropLoader(BagLoader):
    """A `BagLoader` whose batches have the form of a multi-crop DataLoader's.

    A batch's crops are a list of P tensors [B, 3, h, w], channels-last in memory. As in `BagLoader`
    their memory is reused after two more batches: clone what is kept longer.

    Args:
        source: A `Source`, or what `open_source` takes.
        batch_size: Images per batch and rank.
        patches: P, crops per image.
        augment: How crops are made; of a tuple, slot p uses entry p % len.
        layout: What a batch is: "pair" for (crops, labels), as from a torchvision data set with a
            list of transforms (the scripts of VICReg and EMP-SSL); "lightly" for
            (crops, labels, names); "solo_learn" for [indices, crops, labels].
        **options: The others of `BagLoader`: sampler, order, share, output, decoding, threads.

    Raises:
        ValueError: For arguments out of range, and how to fix it.
    """

    def __init__(
        self,
        source: Source | Any,
        batch_size: int = 256,
        patches: int = 2,
        augment: Augment | Sequence[Augment] | None = None,
        *,
        layout: str = "pair",
        **options: Any,
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout={layout!r} is unknown: {', '.join(LAYOUTS)}")
        super().__init__(source, batch_size, patches, augment, **options)
        self.layout = layout

    @property
    def dataset(self) -> Source:
        """The images: `len(loader.dataset)`."""
        return self.source

    def __iter__(self) -> Iterator[Any]:
        return map(self._arranged, super().__iter__())

    def _arranged(self, batch: Batch | ImageBatch) -> Any:
        crops = list(batch.patches)
        if self.layout == "lightly":
            return crops, batch.labels, [self.source.name(i) for i in batch.index.tolist()]
        if self.layout == "solo_learn":
            return [batch.index, crops, batch.labels]
        return crops, batch.labels


class BagDataset(Dataset[tuple[list[Tensor], int]]):
    """A map-style data set of (P crops [3, h, w], label) for a script that keeps its DataLoader.

    The bags are those of a `BagLoader` over the same source: a function of (seed, epoch, index,
    patch), the same in any worker. `MultiCropLoader` is faster.

    Args:
        source: A `Source`, or what `open_source` takes.
        patches: P, crops per image.
        augment: How crops are made; of a tuple, slot p uses entry p % len.
        seed: Of the bags.
    """

    def __init__(
        self,
        source: Source | Any,
        patches: int = 2,
        augment: Augment | Sequence[Augment] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.source = open_source(source)
        self.views = PatchViews(augment, patches, seed=seed)
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # workers share it

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the bags, also in workers that are already running."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        index = range(len(self))[index]  # also from the end, and IndexError beyond it
        image = torch.from_numpy(self.source.decode(index))
        patches = self.views([image], torch.tensor([index]), epoch=int(self._epoch))
        labels = self.source.labels
        return list(patches[:, 0]), -1 if labels is None else int(labels[index])


class PatchViews(nn.Module):
    """Cuts and augments the P patches of uint8 batches on their device: on a GPU by one kernel.

    Args:
        augment: How patches are made; of a tuple, slot p uses entry p % len (these may differ in
            what is drawn, not in size, interpolation, blur kernel, mean and std).
        patches: P, patches per image.
        seed: Of the draws.
        dtype: Of the patches.
        impl: "reference", "cpu" or "cuda"; by default what the device has.

    Raises:
        ValueError: For arguments out of range, and how to fix it.
    """

    drawn: Tensor

    def __init__(
        self,
        augment: Augment | Sequence[Augment] | None = None,
        patches: int = 2,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        augment = Augment() if augment is None else augment
        self.augments = (augment,) if isinstance(augment, Augment) else tuple(augment)
        if patches < 1 or seed < 0 or not self.augments:
            raise ValueError(
                f"PatchViews: patches={patches}, seed={seed} and {len(self.augments)} augments, "
                "expected at least 1, 0 and 1"
            )
        if names := differing(self.augments):
            raise ValueError(
                f"PatchViews: the augments differ in {', '.join(names)}; one PatchViews for each, "
                "or MultiCropLoader, which allows it in all but size"
            )
        self.patches, self.seed, self.dtype, self.impl = patches, seed, dtype, impl
        for each in self.augments:
            _C.check_augment(each)
        # Counts the images so far: every call has other draws, also after a state was loaded.
        self.register_buffer("drawn", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        index: Tensor | None = None,
        epoch: int = 0,
    ) -> Tensor:
        """The patches [P, B, 3, h, w], channels-last in memory.

        Args:
            images: uint8 [B, 3, H, W] or [B, H, W, 3], or B tensors [H, W, 3] of any sizes.
            index: Places in the data set, int64 [B]: with (seed, epoch) they decide what is drawn.
                Without them every call has other draws.
            epoch: Of the draws.
        """
        images = _channels_last(images)
        if index is None:
            index = torch.arange(len(images)) + int(self.drawn)
            self.drawn += len(images)
        if len(index) != len(images):
            raise ValueError(f"PatchViews: {len(index)} indices for {len(images)} images")
        shapes = [images.shape[1:]] * len(images) if isinstance(images, Tensor) else None
        shapes = shapes or [image.shape for image in images]
        sizes = np.array([shape[:2] for shape in shapes], dtype=np.int64).reshape(-1, 2)
        places = np.ascontiguousarray(index.cpu().numpy(), dtype=np.int64)
        table = _C.draw_views(
            self.augments, sizes, places, patches=self.patches, seed=self.seed, epoch=epoch
        )
        device = images.device if isinstance(images, Tensor) else images[0].device
        first = self.augments[0]
        return ops.patch_views(
            images,
            torch.from_numpy(table).to(device),
            size=first.size,
            interpolation=first.interpolation,
            blur_kernel=first.blur_kernel,
            mean=first.mean,
            std=first.std,
            dtype=self.dtype,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"{self.patches} patches of {self.augments[0].size} x {self.augments[0].size}"


def _channels_last(images: Tensor | Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
    """[B, H, W, 3] from either order of dimensions."""
    if not isinstance(images, Tensor):
        return images
    if images.dim() != 4 or images.dtype != torch.uint8:
        raise ValueError(
            f"PatchViews: images are {images.dtype} {list(images.shape)}, expected uint8 "
            "[B, 3, H, W] or [B, H, W, 3]; put it before ToTensor and Normalize"
        )
    if images.shape[3] == 3:
        return images
    if images.shape[1] != 3:
        raise ValueError(f"PatchViews: images are {list(images.shape)}, expected 3 channels")
    return images.permute(0, 2, 3, 1).contiguous()
