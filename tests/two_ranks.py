"""What test_losses.py runs in two processes: every loss on its half of a batch."""

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from bagssl_fast import ops
from bagssl_fast.losses import build_loss

WORLD = 2
SHAPE = (3, 8, 6)  # the global batch [P, B, D]
LOSSES: dict[str, tuple[str, dict]] = {
    "vicreg, gathered (B < D)": ("vicreg", {"wide": True}),
    "vicreg, all-reduced moments (B >= D)": ("vicreg", {}),
    "emp_ssl": ("emp_ssl", {}),
    "spectral": ("spectral", {}),
    "barlow_twins": ("barlow_twins", {}),
    "info_nce": ("info_nce", {}),
    "byol": ("byol", {}),
    "sigreg": ("sigreg", {"num_directions": 5}),
}


def make_bag(wide: bool = False) -> Tensor:
    num_slots, batch, dim = SHAPE
    generator = torch.Generator().manual_seed(0)
    shape = (num_slots, batch, 3 * dim if wide else dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def evaluate(name: str, options: dict, z: Tensor, group: dist.ProcessGroup | None) -> dict:
    """The loss, its terms and its gradient."""
    options = {key: value for key, value in options.items() if key != "wide"}
    z = z.clone().requires_grad_()
    loss, terms = build_loss(name, group=group, **options)(z)
    loss.backward()
    return {"loss": loss.detach(), "terms": terms, "dz": z.grad}


def linear_bn_relu(x: Tensor, group: dist.ProcessGroup | None) -> dict:
    """A projector's block with synchronized statistics: output, gradients, running statistics."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, x.shape[-1], generator=generator, dtype=x.dtype).requires_grad_()
    gamma = torch.rand(5, generator=generator, dtype=x.dtype).requires_grad_()
    beta = torch.zeros(5, dtype=x.dtype, requires_grad=True)
    running_mean, running_var = torch.zeros(5, dtype=x.dtype), torch.ones(5, dtype=x.dtype)
    x = x.clone().requires_grad_()
    y = ops.linear_bn_relu(
        x, weight, gamma, beta, running_mean, running_var, training=True, group=group
    )
    y.square().sum().backward()
    grads = {"x": x.grad, "weight": weight.grad, "gamma": gamma.grad, "beta": beta.grad}
    return {"y": y.detach(), "grads": grads, "running": (running_mean, running_var)}


def make_maps() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(8, 3, 6, 5, generator=generator)


def conv_bn_relu(x: Tensor, group: dist.ProcessGroup | None, impl: str) -> dict:
    """Two blocks with synchronized statistics on maps [N, C, H, W], as `linear_bn_relu`."""
    generator = torch.Generator().manual_seed(1)
    x = x.clone().requires_grad_()
    at, grads, running = x, {"x": x}, []
    for i, channels in enumerate((3, 7)):
        weight = torch.randn(7, channels, 2, 2, generator=generator).to(x.dtype)
        gamma, beta = (torch.rand(7, generator=generator).to(x.dtype) for _ in range(2))
        running += [torch.zeros(7, dtype=x.dtype), torch.ones(7, dtype=x.dtype)]
        own = [v.requires_grad_() for v in (weight, gamma, beta)]
        grads |= {
            f"{name} {i}": v for name, v in zip(("weight", "gamma", "beta"), own, strict=True)
        }
        at = ops.conv_bn_relu(at, *own, *running[-2:], training=True, group=group, impl=impl)
    y = ops.relu_mean(at, impl=impl)
    y.square().sum().backward()
    return {"y": y.detach(), "grads": {k: v.grad for k, v in grads.items()}, "running": running}


@contextlib.contextmanager
def process_group(rank: int, folder: str) -> Iterator[dist.ProcessGroup]:
    """One of `WORLD` processes on a machine that have `folder` in common."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=120),
    )
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def main(rank: int, folder: str) -> None:
    """One rank: writes its results to `folder`."""
    with process_group(rank, folder) as group:
        results: dict[str, dict] = {}
        for case, (name, options) in LOSSES.items():
            z = make_bag(options.get("wide", False)).chunk(WORLD, dim=1)[rank]
            results[case] = evaluate(name, options, z, group)
        results["linear_bn_relu"] = linear_bn_relu(make_bag().chunk(WORLD, dim=1)[rank], group)
        maps = make_maps().chunk(WORLD)[rank]
        for impl in ("reference", "cpu"):
            results[f"conv_bn_relu {impl}"] = conv_bn_relu(maps, group, impl)
        torch.save(results, Path(folder) / f"rank{rank}.pt")
