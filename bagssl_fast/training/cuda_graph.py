"""Forward, loss and backward of a training step as one CUDA graph.

Where a step is many small kernels the host cannot launch them as fast as the GPU ends them. A
graph's launch costs the host the same however many kernels are in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

WARM_UP = 3  # steps before the capture: libraries choose their kernels and set memory aside


class Computed(NamedTuple):
    """What a step computes before the optimizer's turn; the gradients are in the parameters."""

    loss: Tensor
    terms: dict[str, Tensor]
    h: Tensor
    z: Tensor


class GraphedStep:
    """A step that is captured once and replayed from then on.

    The first steps run as they come, on a stream beside, as a capture wants them. What `step` does
    on the host is done at the capture only: it must be the same every time, wait for nothing on the
    device and set the gradients to None before its backward, so that replays write them afresh
    where the capture left them. h and z are overwritten by the next call.

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
            return self._beside(patches)
        if self.graph is None:
            self._capture(patches)  # which computes nothing
        self.patches.copy_(patches)
        self.graph.replay()
        loss, terms, h, z = self.computed
        return Computed(loss.clone(), {name: x.clone() for name, x in terms.items()}, h, z)

    def _beside(self, patches: Tensor) -> Computed:
        current, beside = self.cuda.current_stream(), self.cuda.Stream()
        beside.wait_stream(current)
        with self.cuda.stream(beside):
            computed = self.step(patches)
        current.wait_stream(beside)
        return computed

    def _capture(self, patches: Tensor) -> None:
        self.patches = patches.clone()
        self.graph = self.cuda.CUDAGraph()
        with self.cuda.graph(self.graph):
            self.computed = self.step(self.patches)
