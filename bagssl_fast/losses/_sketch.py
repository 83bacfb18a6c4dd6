"""What LeJEPA's SIGReg (2511.08544) is made of: random directions, characteristic functions.

On equidistant points t_k = k dt the exponentials are powers, exp(i t_k x) = exp(i dt x)^k: one
sine and cosine per number and a complex product per point instead of a sine and cosine per point.
The backward pass computes them again, so that only x is kept: 1 / (2 K) of what autograd would.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers of one piece on a CPU: it and its few temporaries stay in the cache of a core.
PIECE = 1 << 15


def unit_directions(
    dim: int, count: int, *, seed: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`count` random unit vectors [D, M], a function of the seed (and of the kind of device)."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.randn(count, dim, generator=generator, dtype=torch.float32, device=device)
    return torch.nn.functional.normalize(rows.to(dtype), dim=1).T


def characteristic(x: Tensor, dt: float, count: int) -> Tensor:
    """Empirical characteristic functions of the columns of each slot, at t = dt, 2 dt, ...

    Args:
        x: [P, B, M], float32 or float64; B is the number of samples.
        dt: distance of the points.
        count: their number K.

    Returns:
        Real and imaginary parts [2, K, P, M], differentiable once.
    """
    return _Characteristic.apply(x, dt, count)


def gaussian_distance(ecf: Tensor, dt: float, samples: int) -> Tensor:
    """Epps-Pulley statistics [P, M] of characteristic functions [2, K, P, M] against N(0, 1).

    The integrand is even and vanishes at 0: the trapezoid rule over [-K dt, K dt] is twice the sum
    over the points that `characteristic` takes, the last one halved.
    """
    count = ecf.shape[1]
    t = dt * torch.arange(1, count + 1, dtype=ecf.dtype, device=ecf.device)
    gauss = torch.exp(-t.square() / 2)
    weight = 2 * dt * gauss
    weight[-1] /= 2
    real, imaginary = ecf
    error = (real - gauss[:, None, None]).square() + imaginary.square()
    return samples * torch.einsum("k,kpm->pm", weight, error)


def _pieces(x: Tensor) -> list[slice]:
    """Ranges of slots to work on at once: all on a GPU, a cache full on a CPU."""
    num_slots, batch, columns = x.shape
    size = num_slots if x.is_cuda else max(1, PIECE // max(1, batch * columns))
    return [slice(start, start + size) for start in range(0, num_slots, size)]


def _product(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """(a + ib) (c + id)."""
    return torch.addcmul(a * c, b, d, value=-1), torch.addcmul(a * d, b, c)


class _Characteristic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: float, count: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dt = dt
        num_slots, _, columns = x.shape
        ecf = x.new_empty(2, count, num_slots, columns)
        for piece in _pieces(x):
            angle = x[piece] * dt
            cos, sin = angle.cos(), angle.sin()
            real, imaginary = cos, sin
            for k in range(count):
                if k > 0:
                    real, imaginary = _product(real, imaginary, cos, sin)
                torch.mean(real, dim=1, out=ecf[0, k, piece])
                torch.mean(imaginary, dim=1, out=ecf[1, k, piece])
        return ecf

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # d/dx mean cos(t x) = -t sin(t x) / B and d/dx mean sin(t x) = t cos(t x) / B.
        (x,) = ctx.saved_tensors
        count, batch = grad.shape[1], x.shape[1]
        t = ctx.dt / batch * torch.arange(1, count + 1, dtype=x.dtype, device=x.device)
        grad = (grad * t[:, None, None]).unsqueeze(3)  # [2, K, P, 1, M]
        dx = torch.empty_like(x)
        for piece in _pieces(x):
            angle = x[piece] * ctx.dt
            cos, sin = angle.cos(), angle.sin()
            # Horner: sum_k g_k exp(i t_k x) with complex g_k = dsin_k + i dcos_k; its real part
            # is sum_k dsin_k cos(t_k x) - dcos_k sin(t_k x).
            real, imaginary = torch.zeros_like(cos), torch.zeros_like(sin)
            for k in reversed(range(count)):
                real, imaginary = real + grad[1, k, piece], imaginary + grad[0, k, piece]
                real, imaginary = _product(real, imaginary, cos, sin)
            dx[piece] = real
        return dx, None, None


def step_length(t_max: float, num_points: int) -> tuple[float, int]:
    """Distance and number of the positive points among `num_points` over [-t_max, t_max].

    Raises:
        ValueError: For an even number of points, fewer than three, or a range that is none.
    """
    if num_points < 3 or num_points % 2 == 0:
        raise ValueError(
            f"SIGReg: num_points is {num_points}, expected an odd number from 3 on: as many points "
            "on either side of t = 0"
        )
    if not (t_max > 0 and math.isfinite(t_max)):
        raise ValueError(f"SIGReg: t_max is {t_max}, expected > 0")
    return 2 * t_max / (num_points - 1), num_points // 2
