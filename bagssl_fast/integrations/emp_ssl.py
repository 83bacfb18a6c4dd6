"""EMP-SSL's script (tsb0601/EMP-SSL, 8fc3758): `apply_to_emp_ssl`, and its losses by name.

The script has no importable part (it parses arguments and trains on import): put
`apply_to_emp_ssl(sys.modules[__name__])` before its `main()`.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagssl_fast import ops
from bagssl_fast.integrations._losses import ShapeError
from bagssl_fast.integrations._patching import Handle, check_signature, find_class, owners
from bagssl_fast.integrations.heads import check_head, fused_forward

HOST = "EMP-SSL"


class TotalCodingRate(nn.Module):
    """Minus the coding rate of one slot.

    Args:
        eps: Distortion (the paper's epsilon squared); EMP-SSL trains with 0.2.
    """

    def __init__(self, eps: float = 0.01) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, X: Tensor) -> Tensor:
        """X [B, D] -> a scalar."""
        if X.dim() != 2:
            raise ShapeError(f"TotalCodingRate: X is {list(X.shape)}, expected [B, D]")
        return -ops.tcr(X[None], eps=self.eps)[0]


class Similarity_Loss(nn.Module):
    """Minus the mean cosine of patches to their bag's mean."""

    def forward(
        self, z_list: Sequence[Tensor], z_avg: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """P tensors [B, D] -> (the loss, the mean cosine detached).

        As in EMP-SSL's code `z_avg` is not used: the mean is computed here.
        """
        cosine = ops.bag_pool(torch.stack(list(z_list)), cosine=True).cosine
        assert cosine is not None
        similarity = cosine.mean()
        return -similarity, similarity.detach()


def cal_TCR(z: Tensor, criterion: Callable[[Tensor], Tensor], num_patches: int) -> Tensor:
    """The mean of `criterion` over the slots of z [P * B, D]; TotalCodingRate is one call."""
    slots = _slots("cal_TCR", z, num_patches)
    if type(criterion).__name__ == "TotalCodingRate":
        return -ops.tcr(slots, eps=criterion.eps).mean()  # type: ignore[attr-defined]
    return torch.stack([criterion(slot) for slot in slots]).mean()


def chunk_avg(x: Tensor, n_chunks: int = 2, normalize: bool = False) -> Tensor:
    """Bag means [B, D] of x [P * B, D], P = `n_chunks`; of length 1 if `normalize`."""
    return ops.bag_pool(_slots("chunk_avg", x, n_chunks), normalize=normalize).mean


def encoder_forward(self: Any, x: Tensor, is_test: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """The `encoder.forward` that is put in place of EMP-SSL's."""
    feature = fused_forward(self.pre_feature, self.backbone(x))
    z = F.normalize(fused_forward(self.projection, feature), p=self.norm_p)
    return (z, feature) if is_test else z


def apply_to_emp_ssl(
    module: ModuleType,
    *,
    tcr: bool = True,
    similarity: bool = True,
    pool: bool = True,
    head: bool = False,
    model: nn.Module | None = None,
) -> Handle:
    """Gives EMP-SSL's script our losses (and head); of the pieces that `module` has.

    Args:
        module: `sys.modules[__name__]` in the script; or its module `loss`, `func`, `model.model`.
        tcr: Replace `TotalCodingRate` and `cal_TCR`, which then computes all patches in one call.
        similarity: Replace `Similarity_Loss`.
        pool: Replace `chunk_avg`.
        head: Replace what `encoder.forward` does after the backbone. No gain on a CPU.
        model: Change only the losses and encoders inside this module, no functions; None changes
            the script's classes and functions.

    Returns:
        A handle with `revert()`, also a context manager.

    Raises:
        ValueError: A module that has none of the pieces, other arguments, what is replaced already.
    """
    handle = Handle(HOST)
    methods: list[tuple[bool, str, Callable[..., Any], tuple[str, ...]]] = [
        (tcr, "TotalCodingRate", TotalCodingRate.forward, ("self", "X")),
        (similarity, "Similarity_Loss", Similarity_Loss.forward, ("self", "z_list", "z_avg")),
        (head, "encoder", encoder_forward, ("self", "x", "is_test")),
    ]
    for needed, name, ours, arguments in methods:
        if needed and hasattr(module, name):
            theirs = find_class(HOST, module, name)
            check_signature(HOST, theirs, "forward", arguments)
            for owner in owners(theirs, model):
                if name == "encoder" and isinstance(owner, nn.Module):
                    check_head(HOST, owner.pre_feature)
                    check_head(HOST, owner.projection)
                handle.plan_method(name, owner, "forward", ours)
    functions: list[tuple[bool, str, Callable[..., Any], tuple[str, ...]]] = [
        (tcr, "cal_TCR", cal_TCR, ("z", "criterion", "num_patches")),
        (pool, "chunk_avg", chunk_avg, ("x", "n_chunks", "normalize")),
    ]
    for needed, name, function, arguments in functions:
        if needed and model is None and hasattr(module, name):
            check_signature(HOST, module, name, arguments)
            handle.plan_function(name, module, name, function)
    return handle.commit()


def _slots(name: str, x: Tensor, num_slots: int) -> Tensor:
    if x.dim() != 2 or num_slots < 1 or len(x) % num_slots:
        raise ShapeError(
            f"{name}: {list(x.shape)} for {num_slots} patches, expected [P * B, D], patch by patch "
            "(all first patches, then all second ones)"
        )
    return x.unflatten(0, (num_slots, -1))
