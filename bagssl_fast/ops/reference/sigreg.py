"""LeJEPA's regularizer SIGReg and its loss, as the paper writes them (2511.08544), over P slots.

    T(x)    = N * integral |ecf(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt     Epps-Pulley, rows x [N]
    ecf(t)  = 1/N sum_n exp(i t x_n)
    sigreg  = mean over slots and unit directions a of  T(z_p a)
    invariance = mean over slots, images and features of  (z_p - mean_q z_q)^2
    loss    = (1 - lambda) * invariance + lambda * sigreg

The integral is a trapezoid rule on equidistant points over [-t_max, t_max]; the paper has 17
points and t_max = 5, the authors' later code 33 points and t_max = 3. Truth for
`losses/sigreg.py`: float64, complex exponentials, one slot and one direction at a time.
"""

import torch
from torch import Tensor


def epps_pulley(x: Tensor, *, t_max: float = 5.0, num_points: int = 17) -> Tensor:
    """The Epps-Pulley statistic of `x` [N] against the standard normal distribution."""
    x = x.double()
    t = torch.linspace(-t_max, t_max, num_points, dtype=x.dtype, device=x.device)
    gauss = torch.exp(-t.square() / 2)
    ecf = torch.exp(1j * t[:, None] * x).mean(dim=1)
    return len(x) * torch.trapezoid((ecf - gauss).abs().square() * gauss, t)


def sigreg(
    z: Tensor, directions: Tensor, *, t_max: float = 5.0, num_points: int = 17
) -> tuple[Tensor, Tensor]:
    """Invariance and sketched statistic of `z` [P, B, D] along `directions` [D, M], in float64."""
    z, directions = z.double(), directions.double()
    invariance = (z - z.mean(dim=0)).square().mean()
    statistics = [
        epps_pulley(slot @ direction, t_max=t_max, num_points=num_points)
        for slot in z
        for direction in directions.T
    ]
    return invariance, torch.stack(statistics).mean()
