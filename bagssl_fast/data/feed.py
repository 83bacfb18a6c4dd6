"""Batches to a GPU, one step ahead of the work on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bagssl_fast.data.batch import Batch, ImageBatch


def ahead(
    batches: Iterable[Batch | ImageBatch], device: torch.device, cuda: Any = torch.cuda
) -> Iterator[Tensor]:
    """The patches of each batch [P, B, C, h, w] on the device, for the current stream.

    The next batch travels, and is cut where that is left to the device, on a stream of its own
    while this one is worked on. The loader may then use its memory again: a batch has arrived by
    the time the one after it is taken.

    Args:
        batches: Of a `BagLoader` with `pin_memory`.
        device: A CUDA device.
        cuda: `torch.cuda`, or something in its place.
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
