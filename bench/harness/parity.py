"""Does a system do the same work? Loss and gradient against the float64 reference.

The truth is our model and loss in float64 with the reference implementation of every op. A system
gets the same patches and weights; the loss and the gradient of all weights (the whole vector, by
its norm) are compared, so that neither a wrong formula nor a wrong encoder passes. A dense system
is compared twice: with patch-by-patch encoding of the same patches under fixed batch-norm
statistics, where the two must agree, and in training mode with dense encoding in float64, since
there batch statistics weight overlapping positions differently.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bagssl_fast import ops
from bagssl_fast.losses import build_loss
from baselines.step import System
from harness.cases import Case
from harness.ours import OursDense, our_model

IMAGES = 8  # of a parity check; a compiled system takes its own batch, whose code it will run
# Relative: of the loss, of the gradient. Channels-last (torch 2.14, CPU), gradients through
# batch norm have errors up to 5e-3, plain torch's as ours; contiguous ones 1e-6.
# bfloat16 has 8 bits: gradients through the 20 layers of an untrained ResNet-18 are off by 0.35,
# plain torch's as ours. So a system is checked in float32 as well (if it need not be compiled).
TOLERANCE = {"fp32": (1e-4, 1e-2), "bf16": (2e-2, 0.5)}


class Parity(NamedTuple):
    """Relative errors, whether they are small enough, and the seconds that they took.

    `seconds` are those of the system's own forward and backward: of a compiled one, its first,
    which is its compilation.
    """

    loss: float
    gradient: float
    green: bool
    seconds: float

    def __str__(self) -> str:
        return f"relative errors: loss {self.loss:.1e}, gradient {self.gradient:.1e}"


def check(system: System) -> Parity:
    """Compares a system with the truth on a small batch."""
    setup = system.setup
    if setup.precision == "fp32" or system.compiled or setup.device == "cuda":
        return check_in_precision(system)
    system.setup = replace(setup, precision="fp32")
    exact = check_in_precision(system)
    system.setup = setup
    return check_in_precision(system) if exact.green else exact


def check_in_precision(system: System) -> Parity:
    """`check` as the system is set up."""
    example = system.example(None if system.compiled else IMAGES)
    if isinstance(system, OursDense):
        patches = torch.cat([cut(view, system.case) for view in example])
        found = [
            compare(system, example, truth(system.case, system, patches, train=False), train=False),
            compare(system, example, truth(system.case, system, example, train=True), train=True),
        ]
    else:
        found = [compare(system, example, truth(system.case, system, example, True), True)]
    loss = max(errors.loss for errors in found)
    gradient = max(errors.gradient for errors in found)
    seconds = found[-1].seconds  # in training mode
    most = TOLERANCE[system.setup.precision]
    return Parity(loss, gradient, loss <= most[0] and gradient <= most[1], seconds)


Result = tuple[Tensor, Tensor]  # the loss, the gradient of all weights as one vector


class Errors(NamedTuple):
    """Relative errors of a system's loss and gradient, and the seconds that it took for both."""

    loss: float
    gradient: float
    seconds: float


def truth(case: Case, system: System, inputs: Tensor, train: bool) -> Result:
    """Loss and gradient of the reference in float64; inputs [P, B, 3, h, w] or views."""
    model = our_model(case, dense=train and isinstance(system, OursDense)).double().train(train)
    with torch.no_grad():
        for mine, given in zip(model.parameters(), system.setup.weights, strict=True):
            mine.copy_(given)
    with ops.use_impl("reference"):
        loss, _ = build_loss(case.loss)(model(inputs.double())[1])
        loss.backward()
    return loss.detach(), gradient(model.parameters())


def compare(system: System, inputs: Tensor, needed: Result, train: bool) -> Errors:
    """Compares a system with the truth; its model is not changed."""
    model = system.model
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train(train)
    batch = system.adapt(inputs.to(system.setup.device))
    begin = time.perf_counter()
    loss = system.loss(system.encode(batch).float())
    loss.backward()
    got = gradient(model.parameters()).double().cpu()
    seconds = time.perf_counter() - begin
    system.optimizer.zero_grad()
    model.load_state_dict(state)
    model.train()
    value = loss.detach().double().cpu()
    error = ((value - needed[0]) / needed[0]).abs().item()
    return Errors(error, ((got - needed[1]).norm() / needed[1].norm()).item(), seconds)


def gradient(parameters: Any) -> Tensor:
    return torch.cat([p.grad.detach().flatten() for p in parameters])


def cut(views: Tensor, case: Case) -> Tensor:
    """The patches of views [B, 3, H, W] on the dense grid: [P, B, 3, h, w], row-major."""
    tops = range(0, views.shape[2] - case.patch + 1, case.stride)
    side = case.patch
    return torch.stack([views[:, :, t : t + side, s : s + side] for t in tops for s in tops])


def model_flops(system: System) -> float:
    """Multiplications and additions of one step's encoder and projector, forward and backward."""
    images = 2
    model: Any = our_model(system.case, isinstance(system, OursDense))
    with ops.use_impl("reference"), FlopCounterMode(display=False) as counter:
        model(system.example(images))[1].sum().backward()
    return counter.get_total_flops() / images * system.case.batch


def gemm_peak(device: str, seconds: float = 0.5) -> float:
    """FLOP/s of the machine's matrix product: float32 on the CPU, bfloat16 on a GPU."""
    on_gpu = device == "cuda"
    n = 8192 if on_gpu else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    (a @ a).sum()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        wait()
        begin = time.perf_counter()
        a @ a
        wait()
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best
