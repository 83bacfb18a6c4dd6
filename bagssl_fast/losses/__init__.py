"""Losses over bags, as modules: `loss, terms = VICReg()(z)` with z [P, B, D].

`terms` are detached, unweighted scalars under the names that the metrics show; a loss subtracts
those that should grow. z may have the encoder's precision: all sums are float32 (float64 if z is),
also under autocast, and so are products but those of the Triton kernels, which take z's own
numbers. With a `group`, every rank returns the loss of the global batch; the
gradient convention is that of `distributed/collectives.py`: DDP's averaging makes it the gradient
of one device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from bagssl_fast.arguments import check_options
from bagssl_fast.losses.barlow_twins import BarlowTwins
from bagssl_fast.losses.byol import BYOL
from bagssl_fast.losses.emp_ssl import EMPSSL
from bagssl_fast.losses.info_nce import InfoNCE
from bagssl_fast.losses.sigreg import SIGReg
from bagssl_fast.losses.spectral import Spectral
from bagssl_fast.losses.vicreg import VICReg

__all__ = [
    "BYOL",
    "EMPSSL",
    "LOSSES",
    "BarlowTwins",
    "InfoNCE",
    "SIGReg",
    "Spectral",
    "VICReg",
    "build_loss",
]

LOSSES: dict[str, Callable[..., nn.Module]] = {
    "vicreg": VICReg,
    "emp_ssl": EMPSSL,
    "spectral": Spectral,
    "barlow_twins": BarlowTwins,
    "info_nce": InfoNCE,
    "byol": BYOL,
    "sigreg": SIGReg,
}


def build_loss(name: str, **options: Any) -> nn.Module:
    """The loss of `LOSSES` called `name`, with its options.

    Raises:
        ValueError: an unknown name or option.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; expected one of {', '.join(LOSSES)}")
    check_options(f"loss {name}", options, LOSSES[name], hidden=("group",))
    try:
        return LOSSES[name](**options)
    except TypeError as error:
        raise ValueError(f"loss {name!r}: {error}") from error
