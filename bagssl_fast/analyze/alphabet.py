"""A finite alphabet of patches whose co-occurrence is known, and losses on it in expectation.

An alphabet of K patches, images of C hidden kinds. A kind has its own distribution over the
alphabet, from which the patches of an image are drawn independently: the joint distribution of
two patches of one image is J = sum_c pi_c p_c p_c', known exactly. With marginals p and
A = D^-1/2 J D^-1/2, D = diag(p), everything that the spectral loss should reach has a closed form:

    L_C = sum_xy p_x p_y (w z_x . z_y - J_xy / (p_x p_y))^2 = 2 w L_S + |A|_F^2
    min L_S = -sum_{i <= d} lambda_i^2 / (2 w),  at  z = D^-1/2 V_d (Lambda_d / w)^1/2, rotated

VICReg's term is the same object: E_pp[(z . z')^2] = |E[z z']|_F^2, of centered z the squared
covariance, of which VICReg takes what is off the diagonal; its solutions are the eigenvectors
after the constant one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LETTERS, KINDS = 24, 8
# Of the first 200 draws one whose eigenvalues around the sixth are well separated: where two are
# nearly equal, the eigenvectors are ill-defined and no method finds them.
WORLD_SEED = 54


@dataclass(frozen=True)
class World:
    """The alphabet's distribution: kinds `prior` [C], their letters `given` [C, K]."""

    prior: Tensor
    given: Tensor

    @property
    def joint(self) -> Tensor:
        """[K, K], of two patches of one image."""
        return self.given.T @ (self.prior[:, None] * self.given)

    @property
    def marginal(self) -> Tensor:
        """[K]."""
        return self.prior @ self.given

    @property
    def normalized(self) -> Tensor:
        """A [K, K], the normalized co-occurrence."""
        root = self.marginal.sqrt()
        return self.joint / root[:, None] / root

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of A, largest first, and eigenvectors as columns."""
        values, vectors = torch.linalg.eigh(self.normalized)
        return values.flip(0), vectors.flip(1)

    def bags(self, patches: int, images: int, generator: torch.Generator) -> Tensor:
        """Letters of sampled images [P, B]."""
        kinds = torch.multinomial(self.prior, images, replacement=True, generator=generator)
        given = self.given[kinds]
        return torch.multinomial(given, patches, replacement=True, generator=generator).T


def make_world(letters: int = LETTERS, kinds: int = KINDS, seed: int = WORLD_SEED) -> World:
    """A random world in float64: kinds that like few letters each."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(kinds, letters, generator=generator, dtype=torch.float64).pow(6) + 1e-3
    prior = 0.5 + torch.rand(kinds, generator=generator, dtype=torch.float64)
    return World(prior / prior.sum(), raw / raw.sum(dim=1, keepdim=True))


def spectral_loss(world: World, z: Tensor, w: float = 1.0) -> Tensor:
    """L_S in expectation, for embeddings z [K, d] of the letters."""
    inner = z @ z.T
    product = torch.outer(world.marginal, world.marginal)
    return -(world.joint * inner).sum() + w / 2 * (product * inner.square()).sum()


def cooccurrence_loss(world: World, z: Tensor, w: float = 1.0) -> Tensor:
    """L_C in expectation: how far w z . z' is from the co-occurrence."""
    product = torch.outer(world.marginal, world.marginal)
    return (product * (w * z @ z.T - world.joint / product).square()).sum()


def vicreg_loss(world: World, z: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """VICReg in expectation: its terms with the moments of the world instead of a batch's."""
    z = z - world.marginal @ z
    second = z.T @ (world.marginal[:, None] * z)
    across = z.T @ (world.joint @ z)  # of two patches of one image
    invariance = 2 * (second - across).trace() / z.shape[1]
    variance = torch.relu(1 - (second.diagonal() + 1e-4).sqrt()).mean()
    off_diagonal = second.square().sum() - second.diagonal().square().sum()
    covariance = 2 * off_diagonal / z.shape[1]
    terms = zip(coefficients, (invariance, variance, covariance), strict=True)
    return torch.stack([coefficient * term for coefficient, term in terms]).sum()


def angle(world: World, z: Tensor, first: int = 0) -> float:
    """Largest angle, in degrees, between what z [K, d] spans and the eigenvectors first..first+d.

    With `first` > 0 the leading eigenvectors (the constant function) are projected out of z before.
    """
    _, vectors = world.spectrum()
    rows = world.marginal.sqrt()[:, None] * z.double()
    rows = rows - vectors[:, :first] @ (vectors[:, :first].T @ rows)
    spanned, _ = torch.linalg.qr(rows)
    needed = vectors[:, first : first + z.shape[1]]
    # The sine of the largest angle: exact for small angles, where a cosine is not.
    sine = torch.linalg.matrix_norm(needed - spanned @ (spanned.T @ needed), ord=2)
    return float(torch.rad2deg(torch.asin(sine.clamp(max=1))))
