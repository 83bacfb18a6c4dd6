"""The ops at the shapes of the recipes: inputs, our call, and what one would write without us."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bagssl_fast import ops

Inputs = tuple[Tensor, ...]
STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
# Relative L2 distance to float64 of results and gradients; of the Triton kernels, whose half
# precision products take half precision operands.
LIMIT = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class OpCase:
    """One op at one shape.

    Args:
        op: its name.
        label: the shape in words.
        make: a dtype and a device -> inputs; those that are floating get gradients.
        call: inputs, impl -> results.
        limit: factor of `LIMIT`.
    """

    op: str
    label: str
    make: Callable[[torch.dtype, str], Inputs]
    call: Callable[..., Any]
    limit: float = 1.0


def normal(device: str, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.2 + torch.randn(shape, generator=generator)).to(device, dtype)


def vicreg(num_slots: int, batch: int, dim: int) -> OpCase:
    return OpCase(
        "vicreg",
        f"P={num_slots} B={batch} D={dim}",
        lambda dtype, device: (normal(device, dtype, num_slots, batch, dim),),
        lambda z, impl: ops.vicreg(z, impl=impl),
    )


def tcr(num_slots: int, batch: int, dim: int) -> OpCase:
    return OpCase(
        "tcr",
        f"P={num_slots} B={batch} D={dim}",
        lambda dtype, device: (
            F.normalize(normal(device, torch.float32, num_slots, batch, dim), dim=2).to(dtype),
        ),
        lambda z, impl: ops.tcr(z, impl=impl),
        limit=10.0,  # its float32 Gram's rounding is magnified by I + a Gram's condition
    )


def bag_pool(num_slots: int, batch: int, dim: int) -> OpCase:
    return OpCase(
        "bag_pool",
        f"P={num_slots} B={batch} D={dim}",
        lambda dtype, device: (normal(device, dtype, num_slots, batch, dim),),
        lambda x, impl: ops.bag_pool(x, deviation=True, cosine=True, impl=impl),
    )


def linear_bn_relu(rows: int, depth: int, cols: int) -> OpCase:
    """Without the ReLU: rounding decides on which side of its kink a value lies."""

    def call(x: Tensor, weight: Tensor, impl: str) -> Tensor:
        ones = x.new_ones(cols, dtype=torch.promote_types(x.dtype, torch.float32))
        return ops.linear_bn_relu(
            x, weight, ones, 0 * ones, None, None, training=True, relu=False, impl=impl
        )

    return OpCase(
        "linear_bn_relu",
        f"N={rows} F={depth} M={cols}",
        lambda dtype, device: (
            normal(device, dtype, rows, depth),
            normal(device, torch.float32, cols, depth, seed=1) / depth**0.5,
        ),
        call,
    )


def patch_embed(batch: int, side: int, positions: int, patch: int, out_dim: int) -> OpCase:
    def make(dtype: torch.dtype, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        shape = (batch, side, side, 3)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        where = torch.randint(0, side - patch + 1, (positions, 2), generator=generator)
        weight = normal(device, torch.float32, out_dim, 3, patch, patch, seed=1) / patch
        return images.to(device), where.to(device), weight.to(dtype)

    return OpCase(
        "patch_embed",
        f"B={batch} {side}x{side}, {positions} patches {patch}x{patch}, M={out_dim}",
        make,
        lambda images, where, weight, impl: ops.patch_embed(
            images, weight, None, where, **STATISTICS, impl=impl
        ),
    )


def op_cases(toy: bool) -> list[OpCase]:
    """Those of the recipes, the largest steps' first; or shapes for an interpreter."""
    if toy:
        return [
            vicreg(2, 6, 10),
            tcr(2, 6, 10),
            bag_pool(3, 2, 12),
            linear_bn_relu(10, 4, 6),
            patch_embed(2, 6, 3, 4, 5),
        ]
    return [
        vicreg(2, 512, 8192),
        vicreg(2, 256, 2048),
        vicreg(2, 2048, 1024),
        tcr(20, 100, 1024),
        tcr(20, 512, 1024),
        bag_pool(20, 100, 1024),
        bag_pool(20, 512, 4096),
        linear_bn_relu(2000, 512, 4096),
        linear_bn_relu(10240, 4096, 4096),
        linear_bn_relu(1024, 8192, 8192),
        patch_embed(256, 224, 20, 32, 512),
    ]


def every(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [x for x in out if x is not None]


def leaves(inputs: Inputs) -> list[Tensor]:
    return [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]


def both_ways(call: Callable[..., Any], inputs: Sequence[Tensor], impl: str) -> list[Tensor]:
    """Results, and the gradients of fixed gradients of them."""
    outs = every(call(*inputs, impl))
    douts = [normal(str(x.device), torch.float32, *x.shape, seed=2).to(x.dtype) for x in outs]
    needed = [x for x in inputs if x.requires_grad]
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, needed, douts)]


def parity(case: OpCase, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The farthest result or gradient of ours from float64, by relative L2 distance."""
    inputs = case.make(dtype, device)
    ours = both_ways(case.call, leaves(inputs), "cuda")
    doubled = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    truth = both_ways(case.call, leaves(doubled), "reference")
    errors = [
        float((a.double() - b).norm() / (b.norm() + 1e-30))
        for a, b in zip(ours, truth, strict=True)
    ]
    error = max(errors) if all(e == e for e in errors) else float("nan")
    limit = case.limit * LIMIT[dtype]
    return {"error": error, "limit": limit, "passed": error <= limit}


def timed_calls(case: OpCase, dtype: torch.dtype, device: str, toy: bool) -> dict[str, Any]:
    """name -> a call of forward and backward: ours, the reference ops eager and compiled."""
    inputs = leaves(case.make(dtype, device))
    needed = [x for x in inputs if x.requires_grad]

    def step(call: Callable[..., Any], impl: str) -> Callable[[], None]:
        with torch.no_grad():
            douts = [torch.ones_like(x) for x in every(call(*inputs, impl))]

        def run() -> None:
            torch.autograd.grad(every(call(*inputs, impl)), needed, douts)

        return run

    calls = {"ours": step(case.call, "cuda"), "reference": step(case.call, "reference")}
    if not toy:
        compiled = torch.compile(case.call, dynamic=False)
        calls["compiled reference"] = step(compiled, "reference")
    return calls
