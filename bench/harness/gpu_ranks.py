"""Two processes: losses equal to one, and the speed of what connects them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bagssl_fast import ops
from harness.gpu_clock import milliseconds
from harness.gpu_ops import normal

WORLD = 2


def exchange(on_gpu: bool, shape: tuple[int, int, int], megabytes: int) -> dict[str, Any]:
    """Runs two processes, on two GPUs or by gloo.

    Returns:
        The farthest loss from one process, relative; whether that passed; GB/s that a rank
        receives in a large all-reduce by a ring.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, on_gpu, shape, megabytes)
        torch.multiprocessing.spawn(_rank, args=arguments, nprocs=WORLD)
        found: dict[str, Any] = torch.load(Path(folder) / "found.pt")
    return found


def _losses(z: torch.Tensor, group: Any) -> torch.Tensor:
    terms = [*ops.vicreg(z, group=group), ops.tcr(z, group=group).mean()]
    return torch.stack([term.detach().double().cpu() for term in terms])


def _rank(rank: int, folder: str, on_gpu: bool, shape: tuple[int, int, int], size: int) -> None:
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
    )
    try:
        z = normal(str(device), torch.float32, *shape)
        one = _losses(z, None)
        two = _losses(z.chunk(WORLD, dim=1)[rank], dist.group.WORLD)
        error = float(((two - one).abs() / one.abs()).max())
        buffer = torch.ones(size << 18, device=device)
        ms = milliseconds(lambda: dist.all_reduce(buffer), device, 0.0)
        if rank == 0:
            received = 2 * (WORLD - 1) / WORLD * buffer.nbytes
            found = {
                "backend": dist.get_backend(),
                "error": error,
                "passed": error < 1e-4,
                "all_reduce_gb_per_s": received / ms / 1e6,
            }
            torch.save(found, Path(folder) / "found.pt")
    finally:
        dist.destroy_process_group()
