"""Batches to a GPU, one step ahead of the training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bagssl_fast.data.batch import Batch, ImageBatch


def prefetch(
    batches: Iterable[Batch | ImageBatch], device: torch.device, cuda: Any = torch.cuda
) -> Iterator[Tensor]:
    """The patches of each batch [P, B, C, h, w] on the device, for the current stream.

    While one batch is in use, the next one is copied, and with views="device" also cut, on a
    stream of its own. A batch has been copied by the time the one after it is taken, so the loader
    may reuse its memory.

    Args:
        batches: From a `BagLoader` with `Output(pin_memory=True)`.
        device: A CUDA device.
        cuda: `torch.cuda`, or a stand-in for it.
    """
    stream = cuda.Stream(device)
    ready: tuple[Tensor, Any] | None = None
    for batch in batches:
        with cuda.stream(stream):
            patches = batch.to(device, non_blocking=True).patches
            arrived = stream.record_event()
        if ready is not None:
            yield _arrive(*ready, cuda)
        arrived.synchronize()
        ready = patches, arrived
    if ready is not None:
        yield _arrive(*ready, cuda)


def _arrive(patches: Tensor, arrived: Any, cuda: Any) -> Tensor:
    """Orders the current stream behind a batch, and keeps the memory until this stream is done."""
    current = cuda.current_stream(patches.device)
    current.wait_event(arrived)
    patches.record_stream(current)
    return patches
