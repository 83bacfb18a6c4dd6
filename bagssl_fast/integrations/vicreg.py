"""The VICReg authors' script (facebookresearch/vicreg, 4e12602): `apply_to_vicreg`.

    import main_vicreg
    apply_to_vicreg(main_vicreg)

or two lines at the top of the script's own `main`: `apply_to_vicreg(sys.modules[__name__])`.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bagssl_fast.integrations import _losses
from bagssl_fast.integrations._patching import Handle, check_signature, find_class, owners
from bagssl_fast.integrations.heads import check_head, expander, fused_forward
from bagssl_fast.training.optim import lars_update

HOST = "vicreg"


def vicreg_loss(x: Tensor, y: Tensor, args: Any) -> Tensor:
    """The authors' loss of two projections [B, D], as the rest of their `VICReg.forward` has it.

    Args:
        x: Projections [B, D] of the first views.
        y: Of the second views.
        args: Has sim_coeff, std_coeff, cov_coeff and batch_size, the *global* batch size: its
            batch_size - 1 divides the covariance, also where the last batch is smaller.
    """
    _losses.check_pair("vicreg", x, y)
    group = _losses.all_ranks()
    total = len(x) * (1 if group is None else group.size())
    return _losses.vicreg_pair(
        x,
        y,
        sim=args.sim_coeff,
        std=args.std_coeff,
        cov=args.cov_coeff * ((total - 1) / (args.batch_size - 1)) ** 2,
        group=group,
    )


def Projector(args: Any, embedding: int) -> nn.Sequential:
    """The authors' expander of `args.mlp`, such as "8192-8192-8192"; has its state dict."""
    try:
        dims = [embedding, *map(int, args.mlp.split("-"))]
    except ValueError as error:
        raise ValueError(
            f"--mlp {args.mlp}: expected sizes joined by '-', 8192-8192-8192"
        ) from error
    return FusedSequential(*expander(dims, hidden_bias=True, last_bias=False))


class FusedSequential(nn.Sequential):
    """A Sequential whose groups of Linear, batch norm and ReLU are one op."""

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings [B, F] -> projections [B, D]."""
        return fused_forward(self, x)


def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
    """The `VICReg.forward` that is put in place of the authors'."""
    x = self.projector(self.backbone(x))
    y = self.projector(self.backbone(y))
    return vicreg_loss(x, y, self.args)


def lars_step(self: Any) -> None:
    """The `LARS.step` that is put in place of the authors': tensors of equal settings at once."""
    for group in self.param_groups:
        parts: dict[tuple[bool, bool], list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                filters = (group["weight_decay_filter"], group["lars_adaptation_filter"])
                decayed, adapted = (f is None or not f(p) for f in filters)
                parts.setdefault((decayed, adapted), []).append(p)
                if "mu" not in self.state[p]:
                    self.state[p]["mu"] = torch.zeros_like(p)
        for (decayed, adapted), weights in parts.items():
            own = {"adapt": adapted, "weight_decay": group["weight_decay"] if decayed else 0.0}
            buffers = [self.state[p]["mu"] for p in weights]
            lars_update({**group, **own}, "vicreg", weights, buffers)


def apply_to_vicreg(
    module: ModuleType,
    *,
    loss: bool = True,
    lars: bool = True,
    projector: bool = False,
    model: nn.Module | None = None,
) -> Handle:
    """Gives the authors' script our loss, optimizer step and projector.

    Args:
        module: The script as a module: `import main_vicreg`, or `sys.modules[__name__]` in it.
        loss: Replace what `VICReg.forward` does after the projector.
        lars: Replace `LARS.step`: the same steps, many tensors at once. Not with `model`.
        projector: Replace `Projector` (in a `model`, its projector's forward). No gain on a CPU.
        model: Change only this `VICReg` (or those inside this module, such as DDP); None changes
            the script's classes and functions.

    Returns:
        A handle with `revert()`, also a context manager.

    Raises:
        ValueError: Another script, a model without a `VICReg`, what is replaced already.
    """
    handle = Handle(HOST)
    theirs = find_class(HOST, module, "VICReg")
    if loss:
        check_signature(HOST, theirs, "forward", ("self", "x", "y"))
        for owner in owners(theirs, model):
            handle.plan_method("VICReg.forward", owner, "forward", forward)
    if projector and model is None:
        check_signature(HOST, module, "Projector", ("args", "embedding"))
        handle.plan("Projector", module, "Projector", Projector)
    elif projector:
        for owner in owners(theirs, model):
            check_head(HOST, owner.projector)
            handle.plan_method("projector", owner.projector, "forward", fused_forward)
    if lars and model is None:
        optimizer = find_class(HOST, module, "LARS")
        check_signature(HOST, optimizer, "step", ("self",))
        handle.plan_method("LARS.step", optimizer, "step", lars_step)
    return handle.commit()
