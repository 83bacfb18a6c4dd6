"""Losses over bags, as modules: `loss, terms = VICReg()(z)` with z [P, B, D].

`terms` are detached scalars, each named and signed so that a reader of a log knows what is good:
they are unweighted, and a loss subtracts what should grow. All arithmetic is float32 (float64 if z
is), also under autocast. With a `group`, every rank returns the loss of the global batch; the
gradient convention is that of `distributed.py`: DDP's averaging makes it the one-device gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from bagssl_fast import ops, sketch
from bagssl_fast.correlation import cross_correlation
from bagssl_fast.distributed import all_reduce_mean, gather

LossOutput = tuple[Tensor, dict[str, Tensor]]


class VICReg(nn.Module):
    """Variance-invariance-covariance regularisation (2105.04906) over P slots.

    loss = sim_coeff * invariance + std_coeff * variance + cov_coeff * covariance; at P = 2 the loss
    of the authors' code, or of the codebase that `convention` names (see `ops.vicreg`).
    """

    def __init__(
        self,
        sim_coeff: float = 25.0,
        std_coeff: float = 25.0,
        cov_coeff: float = 1.0,
        *,
        gamma: float = 1.0,
        eps: float = 1e-4,
        convention: str = "official",
        group: ProcessGroup | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        if convention not in ops.CONVENTIONS:
            names = ", ".join(ops.CONVENTIONS)
            raise ValueError(f"VICReg: convention {convention!r} is none of {names}")
        self.sim_coeff, self.std_coeff, self.cov_coeff = sim_coeff, std_coeff, cov_coeff
        self.gamma, self.eps, self.convention = gamma, eps, convention
        self.group, self.impl = group, impl

    def forward(self, z: Tensor) -> LossOutput:
        invariance, variance, covariance = ops.vicreg(
            z,
            gamma=self.gamma,
            eps=self.eps,
            convention=self.convention,
            group=self.group,
            impl=self.impl,
        )
        loss = self.sim_coeff * invariance + self.std_coeff * variance + self.cov_coeff * covariance
        return loss, _detached(invariance=invariance, variance=variance, covariance=covariance)


class EMPSSL(nn.Module):
    """EMP-SSL (2304.03977): patches agree with their bag's mean, slots have a large coding rate.

    loss = -patch_sim * bag_cosine - tcr * coding_rate. Both terms should grow, so the loss is
    negative. EMP-SSL's rows z have norm 1 (its head's last step); they are not normalised here.
    """

    def __init__(
        self,
        patch_sim: float = 200.0,
        tcr: float = 1.0,
        *,
        eps: float = 0.2,
        group: ProcessGroup | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        self.patch_sim, self.tcr, self.eps = patch_sim, tcr, eps
        self.group, self.impl = group, impl

    def forward(self, z: Tensor) -> LossOutput:
        _check_slots("EMPSSL", z)
        pooled = ops.bag_pool(z, cosine=True, impl=self.impl)
        assert pooled.cosine is not None
        bag_cosine = all_reduce_mean(pooled.cosine.mean(), self.group)
        coding_rate = ops.tcr(z, eps=self.eps, group=self.group, impl=self.impl).mean()
        loss = -self.patch_sim * bag_cosine - self.tcr * coding_rate
        return loss, _detached(bag_cosine=bag_cosine, coding_rate=coding_rate)


class Spectral(nn.Module):
    """The spectral contrastive loss, BagSSL's co-occurrence objective (2206.08954), lambda = w / 2.

        loss = -E_joint[z . z'] + lambda E_product[(z . z')^2]

    E_joint runs over ordered pairs of different slots of one image (`joint`, should grow),
    E_product over all patches of different images (`product`, should shrink); both are unbiased.
    Up to 2w and a constant this is the squared error of w z . z' against the co-occurrence
    p(x, x') / (p(x) p(x')). Cost: one Gram of all rows on its shorter side, linear in P, plus a
    P x P Gram per image. z is not normalised here.
    """

    def __init__(self, w: float = 1.0, *, group: ProcessGroup | None = None) -> None:
        super().__init__()
        if w <= 0:
            raise ValueError(f"Spectral: w is {w}, wanted > 0")
        self.w, self.group = w, group

    def forward(self, z: Tensor) -> LossOutput:
        _check_slots("Spectral", z)
        with torch.autocast(z.device.type, enabled=False):
            z = gather(_full(z), 1, self.group)
            num_slots, batch, _ = z.shape
            _check_images("Spectral", z)
            same_image = z.square().sum()  # of a patch with itself
            joint = z.sum(dim=0).square().sum() - same_image
            joint = joint / (num_slots * (num_slots - 1) * batch)

            everything = _gram(z.flatten(0, 1)).square().sum()
            same_image = _gram(z.transpose(0, 1)).square().sum()
            product = (everything - same_image) / (num_slots**2 * batch * (batch - 1))
            loss = -joint + self.w / 2 * product
        return loss, _detached(joint=joint, product=product)


class BarlowTwins(nn.Module):
    """Barlow Twins (2103.03230): the cross-correlation of two slots becomes the identity.

    loss = sum_i (C_ii - 1)^2 + lambda_offdiag * sum_{i != j} C_ij^2, averaged over the ring of
    successive slots (p, p + 1 mod P): slots are exchangeable, so the ring estimates the mean over
    all pairs in O(P). At P = 2 it is the original. Features are standardised over the batch.
    """

    def __init__(
        self,
        lambda_offdiag: float = 0.005,
        *,
        eps: float = 1e-5,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.lambda_offdiag, self.eps, self.group = lambda_offdiag, eps, group

    def forward(self, z: Tensor) -> LossOutput:
        _check_slots("BarlowTwins", z)
        with torch.autocast(z.device.type, enabled=False):
            z = gather(_full(z), 1, self.group)
            num_slots = len(z)
            _check_images("BarlowTwins", z)
            var, mean = torch.var_mean(z, dim=1, correction=0, keepdim=True)
            z = (z - mean) * torch.rsqrt(var + self.eps)
            # Of two slots, the pair and its mirror image have one value: once is enough.
            firsts, seconds = (z[:1], z[1:]) if num_slots == 2 else (z, z.roll(-1, dims=0))
            diagonal, squares = cross_correlation(firsts, seconds)
            on_diagonal = (diagonal - 1).square().sum(dim=1).mean()
            off_diagonal = (squares - diagonal.square().sum(dim=1)).mean()
            loss = on_diagonal + self.lambda_offdiag * off_diagonal
        return loss, _detached(on_diagonal=on_diagonal, off_diagonal=off_diagonal)


class InfoNCE(nn.Module):
    """InfoNCE over bags: each patch must find the other patches of its image among all others.

    For anchor i with the P - 1 positives j of its image, the loss is the mean of
    -log(exp(s_ij) / sum_{k != i} exp(s_ik)), s = cosine / temperature: SimCLR's NT-Xent at P = 2,
    the supervised contrastive loss with images as labels beyond it.
    loss = log_partition - alignment / temperature. Memory: (P B)^2 words.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"InfoNCE: temperature is {temperature}, wanted > 0")
        self.temperature, self.group = temperature, group

    def forward(self, z: Tensor) -> LossOutput:
        _check_slots("InfoNCE", z)
        with torch.autocast(z.device.type, enabled=False):
            z = gather(_full(z), 1, self.group)
            num_slots, batch, _ = z.shape
            _check_images("InfoNCE", z)
            z = F.normalize(z, dim=2)
            # sum over ordered pairs of one image = |sum_p z_p|^2 - P
            alignment = (z.sum(dim=0).square().sum() - z.square().sum()) / (
                num_slots * (num_slots - 1) * batch
            )
            rows = z.flatten(0, 1)
            similarity = rows @ rows.T / self.temperature
            itself = torch.eye(len(rows), dtype=torch.bool, device=z.device)
            log_partition = similarity.masked_fill(itself, -torch.inf).logsumexp(dim=1).mean()
            loss = log_partition - alignment / self.temperature
        return loss, _detached(alignment=alignment, log_partition=log_partition)


class BYOL(nn.Module):
    """BYOL (2006.07733): what a predictor makes of a patch is its siblings' moving-average target.

    loss = 2 - 2 * agreement, the mean over ordered pairs of different slots of the cosine between
    the prediction of one and the target of the other, in O(P). z holds prediction and target side
    by side, [P, B, 2 D], as a model with `head.momentum` gives them; the target carries no
    gradient. Nothing compares images: the moving average alone keeps it from collapse.
    """

    def __init__(self, *, group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group

    def forward(self, z: Tensor) -> LossOutput:
        _check_slots("BYOL", z)
        if z.shape[2] % 2:
            raise ValueError(
                f"BYOL: z is {list(z.shape)}, wanted prediction and target side by side, "
                "[P, B, 2 D]; a head with momentum above 0 gives them"
            )
        with torch.autocast(z.device.type, enabled=False):
            num_slots, batch, _ = z.shape
            prediction, target = _full(z).chunk(2, dim=2)
            prediction, target = F.normalize(prediction, dim=2), F.normalize(target.detach(), dim=2)
            pairs = (prediction.sum(dim=0) * target.sum(dim=0)).sum() - (prediction * target).sum()
            agreement = pairs / (num_slots * (num_slots - 1) * max(batch, 1))
            agreement = all_reduce_mean(agreement, self.group)
            loss = 2 - 2 * agreement
        return loss, _detached(agreement=agreement)


class SIGReg(nn.Module):
    """LeJEPA (2511.08544): patches at their bag's centroid, each slot an isotropic Gaussian.

    loss = (1 - lambda_sigreg) * invariance + lambda_sigreg * sigreg

    `invariance` is the mean squared distance to the centroid of the bag, `sigreg` the Epps-Pulley
    statistic of the slots' projections on random unit directions against N(0, 1), averaged: about
    1.06 for Gaussian rows whatever the batch, 0.41 times the batch for collapsed ones. Both should
    shrink. Linear in P, B and D. z is not normalised here.

    Directions are a function of `seed` and of `step`, which counts calls in training mode and is
    part of `state_dict()`: equal on all ranks and after a restart.

    Args:
        lambda_sigreg: Weight of the regulariser, in [0, 1].
        num_directions: Directions per step.
        t_max: The statistic's integral runs over [-t_max, t_max].
        num_points: Its equidistant points there, an odd number. The authors' later code has
            t_max = 3 and the like of 33 points here.
        seed: Of the directions.
        group: The ranks that share a batch.
    """

    def __init__(
        self,
        lambda_sigreg: float = 0.05,
        *,
        num_directions: int = 256,
        t_max: float = 5.0,
        num_points: int = 17,
        seed: int = 0,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= lambda_sigreg <= 1:
            raise ValueError(f"SIGReg: lambda_sigreg is {lambda_sigreg}, wanted in [0, 1]")
        if num_directions < 1:
            raise ValueError(f"SIGReg: num_directions is {num_directions}, wanted at least 1")
        self.dt, self.points = sketch.step_length(t_max, num_points)
        self.lambda_sigreg, self.num_directions = lambda_sigreg, num_directions
        self.seed, self.group = seed, group
        self.step = 0

    def directions(self, z: Tensor) -> Tensor:
        """The unit directions [D, M] of the step at hand, of the type of z [P, B, D]."""
        seed = self.seed * 1_000_003 + self.step  # CPU generators read 32 bits
        return sketch.unit_directions(
            z.shape[-1], self.num_directions, seed=seed, dtype=z.dtype, device=z.device
        )

    def forward(self, z: Tensor) -> LossOutput:
        _check_slots("SIGReg", z)
        _check_images("SIGReg", z)
        with torch.autocast(z.device.type, enabled=False):
            z = _full(z)
            invariance = all_reduce_mean((z - z.mean(dim=0)).square().mean(), self.group)
            ecf = sketch.characteristic(z @ self.directions(z), self.dt, self.points)
            ecf = all_reduce_mean(ecf, self.group)
            samples = z.shape[1] * (1 if self.group is None else self.group.size())
            sigreg = sketch.gaussian_distance(ecf, self.dt, samples).mean()
            loss = (1 - self.lambda_sigreg) * invariance + self.lambda_sigreg * sigreg
        self.step += self.training
        return loss, _detached(invariance=invariance, sigreg=sigreg)

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.step = state["step"]


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
        raise ValueError(f"loss {name!r} is none of {', '.join(LOSSES)}")
    try:
        return LOSSES[name](**options)
    except TypeError as error:
        raise ValueError(f"loss {name!r}: {error}") from error


def _detached(**terms: Tensor) -> dict[str, Tensor]:
    return {name: term.detach() for name, term in terms.items()}


def _full(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _gram(rows: Tensor) -> Tensor:
    """The Gram matrix of rows [..., N, D] on its shorter side; both have the same squared norm."""
    return rows @ rows.mT if rows.shape[-2] < rows.shape[-1] else rows.mT @ rows


def _check_slots(name: str, z: Tensor) -> None:
    if z.dim() != 3 or not z.is_floating_point():
        raise ValueError(f"{name}: z is {z.dtype} {list(z.shape)}, wanted floating [P, B, D]")
    if z.shape[0] < 2:
        raise ValueError(f"{name}: one slot in z {list(z.shape)}, pairs of patches need P >= 2")


def _check_images(name: str, z: Tensor) -> None:
    if z.shape[1] < 2 or z.shape[2] == 0:
        raise ValueError(
            f"{name}: z is {list(z.shape)}, wanted at least 2 images in the (global) batch and one "
            "feature; drop_last=True avoids a last batch of one"
        )
