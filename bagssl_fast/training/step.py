"""A training step up to its loss, and trials of it that leave no trace."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tune_device(device: torch.device) -> None:
    """Settings of the device that training wants."""
    if device.type == "cuda":
        # A run has one shape: each convolution's fastest algorithm is looked for once.
        torch.backends.cudnn.benchmark = True


def objective(
    forward: nn.Module, loss: nn.Module, patches: Tensor, precision: torch.dtype
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """The loss of a batch, its terms, and h and z: patches `[P, B, C, h, w]`."""
    with torch.autocast(patches.device.type, precision, precision != torch.float32):
        h, z = forward(patches)
    value, terms = loss(z)  # as autocast made it: the losses sum in float32 themselves
    return value, terms, h, z


def trial(forward: nn.Module, loss: nn.Module, patches: Tensor, precision: torch.dtype) -> float:
    """Seconds of one forward and backward; use it under `no_trace`."""
    begin = time.perf_counter()
    objective(forward, loss, patches, precision)[0].backward()
    if patches.device.type == "cuda":
        torch.cuda.synchronize(patches.device)
    return time.perf_counter() - begin


@contextmanager
def no_trace(*modules: nn.Module) -> Iterator[None]:
    """Puts back what steps change: parameters' gradients, buffers, the random state."""
    states = [copy.deepcopy(module.state_dict()) for module in modules]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for module, state in zip(modules, states, strict=True):
                module.load_state_dict(state)
                module.zero_grad(set_to_none=True)
