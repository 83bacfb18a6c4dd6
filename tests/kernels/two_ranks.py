"""What `test_ranks.py` runs in two processes: `python two_ranks.py RANK FOLDER`."""

import datetime
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bagssl_fast.kernels.linear_bn_relu import linear_bn_relu
from bagssl_fast.kernels.tcr import tcr
from bagssl_fast.kernels.vicreg import vicreg

from bagssl_fast.distributed.collectives import gather

WORLD = 2


def evaluate(rank: int, world: int, group: Any) -> dict[str, torch.Tensor]:
    """Results and gradients of one rank's part of a batch of 12; the whole batch if world is 1."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    z = normal(3, 12, 9).chunk(world, dim=1)[rank].clone().requires_grad_()
    rows, weights = (normal(12, 5).chunk(world)[rank] for _ in range(2))
    x, grad = rows.clone().requires_grad_(), weights
    weight, gamma = normal(5, 5).requires_grad_(), (1 + 0.1 * normal(5)).requires_grad_()
    beta, mean, var = normal(5).requires_grad_(), torch.zeros(5), torch.ones(5)

    everyone = gather(z, 1, group)
    loss = sum(vicreg(everyone)) - tcr(everyone).sum()
    loss.backward()
    out = linear_bn_relu(x, weight, gamma, beta, mean, var, training=True, group=group)
    (out * grad).sum().backward()
    named = {"x": x, "weight": weight, "gamma": gamma, "beta": beta, "z": z}
    results = {"loss": loss.detach(), "out": out.detach(), "mean": mean, "var": var}
    return results | {f"d{name}": tensor.grad for name, tensor in named.items()}


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=300),
    )
    torch.save(evaluate(rank, WORLD, dist.group.WORLD), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
