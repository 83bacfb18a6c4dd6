"""solo-learn (1.0.6 to 1.0.8, 9187ea3): `apply_to_solo_learn`, and its loss functions by name."""

import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from bagssl_fast.integrations import _losses
from bagssl_fast.integrations._patching import Handle, check_signature, import_host, with_globals
from bagssl_fast.integrations.heads import check_head, fused_forward

HOST = "solo-learn"
_HOW_TO_FIX = (
    "put solo-learn's folder on the path, or use the functions of "
    "bagssl_fast.integrations.solo_learn"
)


def vicreg_loss_func(
    z1: Tensor,
    z2: Tensor,
    sim_loss_weight: float = 25.0,
    var_loss_weight: float = 25.0,
    cov_loss_weight: float = 1.0,
) -> Tensor:
    """solo-learn's VICReg loss of two views [B, D]; its variance is a sum, not a mean, of two.

    Variance and covariance are those of the images of all ranks.
    """
    _losses.check_pair("vicreg_loss_func", z1, z2)
    return _losses.vicreg_pair(
        z1,
        z2,
        sim=sim_loss_weight,
        std=var_loss_weight,
        cov=cov_loss_weight,
        convention="solo_learn",
        group=_losses.all_ranks(),
    )


def barlow_loss_func(
    z1: Tensor, z2: Tensor, lamb: float = 5e-3, scale_loss: float = 0.025
) -> Tensor:
    """solo-learn's Barlow Twins loss of two views [B, D], with the gradient of its value.

    Over W ranks solo-learn's own gradient is 1 / W of that: its all-reduce has no backward.
    """
    _losses.check_pair("barlow_loss_func", z1, z2)
    loss = _losses.barlow_pair(z1, z2, off_diagonal=lamb, group=_losses.all_ranks())
    return scale_loss * loss


def barlow_loss_func_host_gradient(
    z1: Tensor, z2: Tensor, lamb: float = 5e-3, scale_loss: float = 0.025
) -> Tensor:
    """`barlow_loss_func` with solo-learn's own gradient, 1 / W of the true one over W ranks."""
    group = _losses.all_ranks()
    world_size = 1 if group is None else dist.get_world_size(group)
    return _losses.scale_gradient(barlow_loss_func(z1, z2, lamb, scale_loss), 1 / world_size)


def apply_to_solo_learn(
    *,
    vicreg: bool = True,
    barlow: bool = True,
    projector: bool = False,
    barlow_host_gradient: bool = False,
    model: Any = None,
) -> Handle:
    """Gives solo-learn's methods our losses (and projector): same arguments, value and gradient.

    Args:
        vicreg: Replace `vicreg_loss_func`, also in modules that have imported it.
        barlow: Replace `barlow_loss_func`. **Corrects its gradient over ranks**: over W ranks
            solo-learn's is 1 / W of that of its value.
        projector: Replace the forward of `VICReg`'s and `BarlowTwins`' projector. No gain on a
            CPU.
        barlow_host_gradient: Keep solo-learn's gradient over ranks.
        model: Change only this method (a `VICReg`, a `BarlowTwins`); None changes solo-learn's
            functions and classes.

    Returns:
        A handle with `revert()`, also a context manager.

    Raises:
        ImportError: solo-learn cannot be imported.
        ValueError: A version with other arguments, a model in which there is nothing to replace,
            or what is replaced already.
    """
    handle = Handle(HOST)
    barlow_loss = barlow_loss_func_host_gradient if barlow_host_gradient else barlow_loss_func
    pieces: list[tuple[bool, str, str, Callable[..., Any]]] = [
        (vicreg, "vicreg", "VICReg", vicreg_loss_func),
        (barlow, "barlow", "BarlowTwins", barlow_loss),
    ]
    for needed, module_name, method, ours in pieces:
        name = f"{module_name}_loss_func"
        if needed:
            module = import_host(f"solo.losses.{module_name}", HOST, _HOW_TO_FIX)
            check_signature(HOST, module, name, _arguments(ours))
            if model is None:
                handle.plan_function(name, module, name, ours)
            elif name in vars(sys.modules[type(model).__module__]):
                step = with_globals(type(model).training_step, {name: ours})
                handle.plan_method(name, model, "training_step", step)
        if projector and model is None:
            _plan_class_projector(handle, module_name, method)
    if projector and model is not None:
        check_head(HOST, getattr(model, "projector", None))
        handle.plan_method("projector", model.projector, "forward", fused_forward)
    gradient = (
        "solo-learn's, 1/W of its value's, as asked" if barlow_host_gradient else "its value's"
    )
    note = f" (Barlow's gradient over W ranks is {gradient})"
    return handle.commit(note if handle.plans("barlow_loss_func") else "")


def _plan_class_projector(handle: Handle, module_name: str, method: str) -> None:
    module_name = {"barlow": "barlow_twins"}.get(module_name, module_name)
    module = import_host(f"solo.methods.{module_name}", HOST, _HOW_TO_FIX)
    theirs = getattr(module, method)
    check_signature(HOST, theirs, "forward", ("self", "X"))

    def forward(self: Any, X: Tensor) -> dict[str, Any]:
        out: dict[str, Any] = super(theirs, self).forward(X)
        out["z"] = fused_forward(self.projector, out["feats"])
        return out

    handle.plan_method(f"{method}.projector", theirs, "forward", forward)


def _arguments(function: Callable[..., Any]) -> tuple[str, ...]:
    code = function.__code__
    return code.co_varnames[: code.co_argcount]
