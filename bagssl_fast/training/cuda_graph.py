"""Forward, loss and backward of a training step as one CUDA graph.

In a step of many small kernels, the host cannot launch them as fast as the GPU finishes them. A
graph's launch costs the host the same however many kernels it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

WARM_UP = 3  # steps before the capture: libraries choose their kernels and allocate memory


class Computed(NamedTuple):
    """What a step computes before the optimizer runs; the gradients are in the parameters."""

    loss: Tensor
    terms: dict[str, Tensor]
    h: Tensor
    z: Tensor


class GraphedStep:
    """A step that is captured once and replayed from then on.

    The first steps run uncaptured on a side stream, which warms up libraries and the allocator as
    a capture requires. What `step` does on the host happens at the capture only: it must be the
    same every time, must not wait for the device, and must set the gradients to None before its
    backward, so that replays write new gradients into the memory of the captured ones. h and z are
    overwritten by the next call.

    Args:
        step: Patches of one shape on a CUDA device -> `Computed`.
        cuda: `torch.cuda`, or something in its place.
    """

    def __init__(self, step: Callable[[Tensor], Computed], cuda: Any = torch.cuda) -> None:
        self.step, self.cuda = step, cuda
        self.steps = 0
        self.graph: Any = None

    def __call__(self, patches: Tensor) -> Computed:
        self.steps += 1
        if self.steps <= WARM_UP:
            return self._on_side_stream(patches)
        if self.graph is None:
            self._capture(patches)  # which computes nothing
        self.patches.copy_(patches)
        self.graph.replay()
        loss, terms, h, z = self.computed
        return Computed(loss.clone(), {name: x.clone() for name, x in terms.items()}, h, z)

    def _on_side_stream(self, patches: Tensor) -> Computed:
        current, side = self.cuda.current_stream(), self.cuda.Stream()
        side.wait_stream(current)
        with self.cuda.stream(side):
            computed = self.step(patches)
        current.wait_stream(side)
        return computed

    def _capture(self, patches: Tensor) -> None:
        self.patches = patches.clone()
        self.graph = self.cuda.CUDAGraph()
        with self.cuda.graph(self.graph):
            self.computed = self.step(self.patches)
