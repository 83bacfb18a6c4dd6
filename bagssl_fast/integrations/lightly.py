"""lightly (1.5, 1.6): `apply_to_lightly`, and its losses and heads by name.

    from bagssl_fast.integrations import apply_to_lightly
    apply_to_lightly()  # changes lightly's classes: existing objects and imports change, too

or, without changing lightly, `from bagssl_fast.integrations.lightly import VICRegLoss`: same
constructor, same `forward`.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from bagssl_fast.integrations import _losses
from bagssl_fast.integrations._losses import ShapeError
from bagssl_fast.integrations._patching import (
    Handle,
    check_signature,
    find_class,
    import_host,
    owners,
)
from bagssl_fast.integrations.heads import check_head, expander, fused_forward

HOST = "lightly"
_LOSSES, _HEADS = "lightly.loss", "lightly.models.modules.heads"
_HOW_TO_FIX = "pip install lightly, or use the classes of bagssl_fast.integrations.lightly"


class VICRegLoss(nn.Module):
    """lightly's VICReg loss (the authors' convention) of two views [B, ..., D].

    Args:
        lambda_param: Weight of the invariance.
        mu_param: Weight of the variance.
        nu_param: Weight of the covariance.
        gather_distributed: Take variance and covariance over the images of all ranks.
        eps: Added to the variance before its root, positive.
    """

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 0.0001,
    ) -> None:
        super().__init__()
        _check_gather("VICRegLoss", gather_distributed)
        self.lambda_param, self.mu_param, self.nu_param = lambda_param, mu_param, nu_param
        self.gather_distributed, self.eps = gather_distributed, eps

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of views [B, ..., D], B at least 2, statistics per position of `...`."""
        _losses.check_pair("VICRegLoss", z_a, z_b, ranks=(2, 3, 4, 5))
        return _losses.vicreg_pair(
            z_a,
            z_b,
            sim=self.lambda_param,
            std=self.mu_param,
            cov=self.nu_param,
            eps=self.eps,
            group=_group(self.gather_distributed),
        )


class BarlowTwinsLoss(nn.Module):
    """lightly's Barlow Twins loss of two views [B, D].

    Args:
        lambda_param: Weight of the off-diagonal.
        gather_distributed: Average the cross-correlation over all ranks.
    """

    def __init__(self, lambda_param: float = 5e-3, gather_distributed: bool = False) -> None:
        super().__init__()
        _check_gather("BarlowTwinsLoss", gather_distributed)
        self.lambda_param, self.gather_distributed = lambda_param, gather_distributed

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of views [B, D], B at least 2."""
        _losses.check_pair("BarlowTwinsLoss", z_a, z_b)
        group = _group(self.gather_distributed)
        return _losses.barlow_pair(z_a, z_b, off_diagonal=self.lambda_param, group=group)


class EMPSSLLoss(nn.Module):
    """EMP-SSL's loss of a bag's patches, with the sign of its authors' code.

    lightly (up to 1.6) *adds* the coding rate, so that its loss is lower the closer the patches
    collapse; here it is subtracted, as in the paper.

    Args:
        tcr_eps: Distortion of the coding rate (the paper's epsilon squared).
        inv_coef: Weight of the agreement with the bag's mean.
        host_sign: Add the coding rate, as lightly does.
    """

    host_sign = False

    def __init__(
        self, tcr_eps: float = 0.2, inv_coef: float = 200.0, *, host_sign: bool = False
    ) -> None:
        super().__init__()
        self.tcr_eps, self.inv_coef, self.host_sign = tcr_eps, inv_coef, host_sign

    def forward(self, z_views: Sequence[Tensor]) -> Tensor:
        """The loss of P views [B, D] each, a list or a tensor [P, B, D]."""
        z = z_views if isinstance(z_views, Tensor) else torch.stack(list(z_views))
        if z.dim() != 3:
            raise ShapeError(f"EMPSSLLoss: z is {list(z.shape)}, expected P views of [B, D]")
        tcr = -1.0 if self.host_sign else 1.0
        return _losses.emp_ssl(z, patch_sim=self.inv_coef, tcr=tcr, eps=self.tcr_eps)


class ProjectionHead(nn.Module):
    """The forward of lightly's heads: `layers` by `fused_forward`."""

    layers: nn.Sequential

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings [B, F] -> projections [B, D]."""
        return fused_forward(self.layers, x)


class VICRegProjectionHead(ProjectionHead):
    """lightly's VICReg head; loads and saves its state dict.

    Args:
        input_dim: Embedding size F.
        hidden_dim: Units of the hidden layers.
        output_dim: Projection size D.
        num_layers: Linear layers in all, at least 2.
    """

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 8192,
        output_dim: int = 8192,
        num_layers: int = 3,
    ) -> None:
        super().__init__()
        if num_layers < 2:
            raise ValueError(
                f"VICRegProjectionHead: num_layers is {num_layers}, expected at least 2"
            )
        dims = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = expander(dims, hidden_bias=False, last_bias=True)


class BarlowTwinsProjectionHead(ProjectionHead):
    """lightly's Barlow Twins head; loads and saves its state dict.

    Args:
        input_dim: Embedding size F.
        hidden_dim: Units of the hidden layers.
        output_dim: Projection size D.
    """

    def __init__(
        self, input_dim: int = 2048, hidden_dim: int = 8192, output_dim: int = 8192
    ) -> None:
        super().__init__()
        dims = [input_dim, hidden_dim, hidden_dim, output_dim]
        self.layers = expander(dims, hidden_bias=False, last_bias=True)


def apply_to_lightly(
    *,
    vicreg: bool = True,
    barlow_twins: bool = True,
    emp_ssl: bool = True,
    projection_head: bool = False,
    emp_ssl_host_sign: bool = False,
    model: nn.Module | None = None,
) -> Handle:
    """Gives lightly's losses (and heads) our forward: same arguments, value and gradient.

    Args:
        vicreg: Replace `VICRegLoss` (and so the part of VICRegL that uses it).
        barlow_twins: Replace `BarlowTwinsLoss`.
        emp_ssl: Replace `EMPSSLLoss`. **Corrects its sign**: lightly adds the coding rate.
        projection_head: Replace the forward of heads built on lightly's `ProjectionHead`. No
            gain on a CPU.
        emp_ssl_host_sign: Keep lightly's sign of the coding rate.
        model: Change only the losses and heads inside this module; None changes lightly's classes.

    Returns:
        A handle with `revert()`, also a context manager.

    Raises:
        ImportError: lightly is not installed.
        ValueError: A version with other arguments, a model in which there is nothing to replace,
            or what is replaced already.
    """
    pieces: list[tuple[bool, str, type[nn.Module], tuple[str, ...]]] = [
        (vicreg, _LOSSES, VICRegLoss, ("self", "z_a", "z_b")),
        (barlow_twins, _LOSSES, BarlowTwinsLoss, ("self", "z_a", "z_b")),
        (emp_ssl, _LOSSES, EMPSSLLoss, ("self", "z_views")),
        (projection_head, _HEADS, ProjectionHead, ("self", "x")),
    ]
    handle = Handle(HOST)
    for needed, module, ours, arguments in pieces:
        if not needed:
            continue
        theirs = find_class(HOST, import_host(module, HOST, _HOW_TO_FIX), ours.__name__)
        check_signature(HOST, theirs, "forward", arguments)
        for owner in owners(theirs, model):
            if ours is ProjectionHead and isinstance(owner, nn.Module):
                check_head(HOST, owner.layers)
            if ours is EMPSSLLoss:
                handle.plan(ours.__name__, owner, "host_sign", emp_ssl_host_sign)
            handle.plan_method(ours.__name__, owner, "forward", ours.forward)
    sign = "lightly's reversed sign, as asked" if emp_ssl_host_sign else "the authors' sign"
    note = f" (EMPSSLLoss has {sign})" if handle.plans("EMPSSLLoss") else ""
    return handle.commit(note)


def _check_gather(name: str, gather_distributed: bool) -> None:
    if gather_distributed and not dist.is_available():
        raise ValueError(
            f"{name}: gather_distributed=True, but this torch has no torch.distributed; set it to "
            "False, or install a torch that has"
        )


def _group(gather_distributed: bool) -> ProcessGroup | None:
    return _losses.all_ranks() if gather_distributed else None
