"""What test_ranks_exchange.py runs in two processes: losses on half a batch, and what they send."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from two_ranks import WORLD, process_group

from bagssl_fast import ops
from bagssl_fast.distributed import collectives
from bagssl_fast.losses import build_loss

LOSSES: dict[str, tuple[str, tuple[int, int, int]]] = {
    "vicreg, B < D": ("vicreg", (3, 8, 18)),
    "vicreg, B >= D": ("vicreg", (3, 8, 6)),
    "spectral": ("spectral", (3, 8, 6)),
    "barlow_twins": ("barlow_twins", (3, 8, 6)),
    "info_nce": ("info_nce", (3, 8, 6)),
    "byol": ("byol", (3, 8, 6)),
    "sigreg": ("sigreg", (3, 8, 6)),
    "emp_ssl": ("emp_ssl", (3, 8, 6)),  # slots 2 and 1
    "emp_ssl, as many slots on each": ("emp_ssl", (4, 8, 6)),
}
ONE_SLOT = (1, 8, 6)  # the second rank has none
DIRECTIONS, POINTS = 5, 8


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def evaluate(name: str, z: Tensor, group: Any) -> dict[str, Tensor]:
    options = {"num_directions": DIRECTIONS} if name == "sigreg" else {}
    z = z.clone().requires_grad_()
    loss, _ = build_loss(name, group=group, **options)(z)
    loss.backward()
    return {"loss": loss.detach(), "dz": z.grad}


def rates(z: Tensor, group: Any) -> dict[str, Tensor]:
    z = z.clone().requires_grad_()
    rate = ops.tcr(z, group=group)
    (rate * torch.arange(1.0, 1 + len(rate))).sum().backward()
    return {"loss": rate.detach(), "dz": z.grad}


@contextlib.contextmanager
def wire() -> Iterator[list[int]]:
    """Bytes that this rank receives, by ring algorithms, of every collective in the block."""
    received: list[int] = []
    share = (WORLD - 1) / WORLD
    places = (
        (dist, "all_reduce", 2 * share),  # a ring passes the sums around once more
        (collectives, "_all_gather", share),
        (dist, "all_to_all_single", share),
    )

    def counting(collective: Any, factor: float) -> Any:
        def call(result: Tensor, *args: Any, **kwargs: Any) -> Any:
            received.append(round(factor * result.nbytes))
            return collective(result, *args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for owner, name, factor in places:
            collective = getattr(owner, name)
            stack.callback(setattr, owner, name, collective)
            setattr(owner, name, counting(collective, factor))
        yield received


def main(rank: int, folder: str) -> None:
    """One rank: writes results and bytes to `folder`."""
    with process_group(rank, folder) as group:
        results: dict[str, Any] = {}
        for case, (name, shape) in LOSSES.items():
            z = make(shape).chunk(WORLD, dim=1)[rank]
            with wire() as received:
                results[case] = evaluate(name, z, group)
            results[case]["bytes"] = sum(received)
        results["one slot"] = rates(make(ONE_SLOT).chunk(WORLD, dim=1)[rank], group)
        half = make((3, 8, 18), torch.bfloat16).chunk(WORLD, dim=1)[rank]
        with wire() as received:
            results["bfloat16"] = evaluate("vicreg", half, group)
        results["bfloat16"]["bytes"] = sum(received)
        torch.save(results, Path(folder) / f"rank{rank}.pt")
