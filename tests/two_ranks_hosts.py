"""What test_integrations_ranks.py runs in two processes: every gathering host beside ours."""

from pathlib import Path
from types import SimpleNamespace

import hosts
import torch
from lightly import loss as lightly_loss
from torch import Tensor
from two_ranks import WORLD, process_group

from bagssl_fast.integrations import lightly, solo_learn, vicreg

SHAPES = {"gathered (B < D)": (8, 18), "all-reduced (B >= D)": (8, 5)}  # of the global batch


def make_views(batch: int, dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch * dim)
    shape = (batch, dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def losses() -> dict[str, tuple]:
    """(the host's loss, ours) by name; the stand-ins of the hosts that are no test dependency."""
    solo = hosts.solo_learn()
    args = SimpleNamespace(sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0, batch_size=8)

    authors = hosts.vicreg().VICReg
    identity = torch.nn.Identity()
    model = SimpleNamespace(args=args, backbone=identity, projector=identity)

    return {
        "lightly VICReg": (
            lightly_loss.VICRegLoss(gather_distributed=True),
            lightly.VICRegLoss(gather_distributed=True),
        ),
        "lightly VICReg, not gathered": (lightly_loss.VICRegLoss(), lightly.VICRegLoss()),
        "lightly Barlow Twins": (
            lightly_loss.BarlowTwinsLoss(gather_distributed=True),
            lightly.BarlowTwinsLoss(gather_distributed=True),
        ),
        "vicreg": (
            lambda x, y: authors.forward(model, x, y),
            lambda x, y: vicreg.vicreg_loss(x, y, args),
        ),
        "solo-learn VICReg": (solo.vicreg_loss_func, solo_learn.vicreg_loss_func),
        "solo-learn Barlow Twins": (
            solo.barlow_loss_func,
            solo_learn.barlow_loss_func_host_gradient,
        ),
        "solo-learn Barlow Twins, corrected": (
            solo.barlow_loss_func,
            solo_learn.barlow_loss_func,
        ),
    }


def evaluate(loss, views: list[Tensor]) -> dict:
    views = [z.clone().requires_grad_() for z in views]
    value = loss(*views)
    return {"value": value.detach(), "gradients": torch.autograd.grad(value, views)}


def main(rank: int, folder: str) -> None:
    """One rank: writes what host and ours give to `folder`."""
    with process_group(rank, folder):
        results = {}
        for case, shape in SHAPES.items():
            mine = [z.chunk(WORLD)[rank] for z in make_views(*shape)]
            for name, pair in losses().items():
                results[name, case] = tuple(evaluate(loss, mine) for loss in pair)
        torch.save(results, Path(folder) / f"rank{rank}.pt")
