"""Optimizers and the schedule: AdamW, SGD, and LARS as VICReg and as EMP-SSL define it.

Vectors (biases, the gains of norms) get neither weight decay nor LARS's adaptation, as in both
papers' code. The learning rate is a pure function of the step: a resumed run needs the step alone.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bagssl_fast.config import OptimConfig
from bagssl_fast.models.bag_model import move_average

PIECE = 1 << 18  # elements; the pieces of four tensors fit a cache of 4 MiB together


class LARS(Optimizer):
    """SGD with momentum whose step per tensor is scaled to the tensor's own norm (You et al. 2017).

    With g the gradient, p the weights, wd the decay and u = g + wd p:

    - `form="vicreg"` (VICReg, Bardes et al. 2022): u is multiplied by eta |p| / |u|.
    - `form="emp"` (EMP-SSL, Tong et al. 2023): u is multiplied by
      min(eta |p| / ((|g| + wd |p| + 1e-8) lr), 1), and the momentum is Nesterov's.

    Groups with `adapt=False` are stepped by plain SGD without the ratio.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        momentum: Momentum.
        weight_decay: Weight decay.
        eta: Trust coefficient.
        form: vicreg or emp.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.001,
        form: Literal["vicreg", "emp"] = "vicreg",
    ) -> None:
        if form not in ("vicreg", "emp"):
            raise ValueError(f"LARS: form={form!r}; supported: 'vicreg', 'emp'")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eta": eta,
            "adapt": True,
        }
        super().__init__(params, defaults)
        self.form = form

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; nothing is read back from the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._step_group(group, weights)
        return loss

    def _step_group(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        for p in weights:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in weights]
        lars_update(group, self.form, weights, buffers)


@torch.no_grad()
def lars_update(
    group: Mapping[str, Any], form: str, weights: list[Tensor], buffers: list[Tensor]
) -> None:
    """One step of LARS for tensors that share their settings.

    Args:
        group: lr, momentum, weight_decay, eta and adapt, as `LARS` has them.
        form: vicreg or emp.
        weights: Changed in place, by their `grad`.
        buffers: Their momenta, changed in place.
    """
    grads = [p.grad for p in weights if p.grad is not None]
    if weights[0].is_cpu:
        for p, grad, buffer in zip(weights, grads, buffers, strict=True):
            _update_in_cache(group, form, p, grad, buffer)
    elif not _update_at_once(group, form, weights, grads, buffers):
        _update_foreach(group, form, weights, grads, buffers)


def _update_at_once(
    group: Mapping[str, Any],
    form: str,
    weights: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
) -> bool:
    """By the kernel, in three launches; False where there is no Triton or it does not serve."""
    if find_spec("triton") is None:
        return False
    lars = importlib.import_module("bagssl_fast.kernels._lars")  # which needs Triton
    if not lars.serves(weights, grads, buffers):
        return False
    names = ("lr", "momentum", "weight_decay", "eta", "adapt")
    options = {name: group[name] for name in names}
    lars.lars(weights, grads, buffers, **options, emp=form == "emp")
    return True


def _update_foreach(
    group: Mapping[str, Any],
    form: str,
    weights: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
) -> None:
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    updates = list(torch._foreach_add(grads, weights, alpha=decay))
    if group["adapt"]:
        measured = updates if form == "vicreg" else grads
        weight_norm = torch.stack(torch._foreach_norm(weights))
        other_norm = torch.stack(torch._foreach_norm(measured))
        ratio = _ratio(group, form, weight_norm, other_norm)
        torch._foreach_mul_(updates, list(ratio.unbind()))
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, updates)
    if form == "emp":
        torch._foreach_add_(updates, buffers, alpha=momentum)
        torch._foreach_add_(weights, updates, alpha=-lr)
    else:
        torch._foreach_add_(weights, buffers, alpha=-lr)


def _update_in_cache(
    group: Mapping[str, Any], form: str, p: Tensor, grad: Tensor, buffer: Tensor
) -> None:
    """The same for one tensor, piece by piece: on a CPU what counts is trips to memory."""
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    pieces = _pieces(p, grad, buffer)
    scratch = torch.empty_like(pieces[0][0])
    ratio = scratch.new_ones(())
    if group["adapt"]:
        weight_norms, other_norms = [], []
        for w, g, _ in pieces:
            measured = g
            if form == "vicreg":
                measured = torch.add(g, w, alpha=decay, out=scratch[: len(w)])
            weight_norms.append(_norm(w))
            other_norms.append(_norm(measured))
        weight_norm, other_norm = (_norm(torch.stack(n)) for n in (weight_norms, other_norms))
        ratio = _ratio(group, form, weight_norm, other_norm)
    for w, g, m in pieces:
        update = torch.add(g, w, alpha=decay, out=scratch[: len(w)]).mul_(ratio)
        m.mul_(momentum).add_(update)
        if form == "emp":
            w.sub_(update.add_(m, alpha=momentum), alpha=lr)
        else:
            w.sub_(m, alpha=lr)


def _ratio(group: Mapping[str, Any], form: str, weight_norm: Tensor, other_norm: Tensor) -> Tensor:
    """The factor of the update from |p| and |u| (vicreg) or |g| (emp)."""
    if form == "vicreg":
        ratio = group["eta"] * weight_norm / other_norm
    else:
        ratio = group["eta"] * weight_norm
        ratio = ratio / (other_norm + group["weight_decay"] * weight_norm + 1e-8)
        ratio = (ratio / max(group["lr"], 1e-30)).clamp(max=1.0)
    alive = (weight_norm > 0) & (other_norm > 0)
    return torch.where(alive, ratio, torch.ones_like(ratio))


def _norm(x: Tensor) -> Tensor:
    # torch.dot reads at nearly twice the speed of vector_norm on a CPU.
    return torch.dot(x, x).sqrt() if x.dim() == 1 else torch.linalg.vector_norm(x)


def _pieces(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Flat pieces of the tensors, in step; one piece where they do not lie alike in memory."""
    order = sorted(range(tensors[0].dim()), key=tensors[0].stride, reverse=True)
    alike = [t.permute(order) for t in tensors]
    if all(t.is_contiguous() for t in alike):
        return list(zip(*(t.view(-1).split(PIECE) for t in alike), strict=True))
    return [tensors]


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimizer of `config` over two groups: matrices and kernels, and vectors (ndim <= 1).

    Raises:
        ValueError: For an unknown name.
    """
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    lr, momentum = config.lr, config.momentum
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=config.betas, fused=True)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)
    if config.name in ("lars", "sgd_lars"):
        groups[1]["adapt"] = False
        if config.name == "lars":
            return LARS(groups, lr, momentum, eta=config.eta or 0.001, form="vicreg")
        return LARS(groups, lr, momentum, eta=config.eta or 0.005, form="emp")
    raise ValueError(f"--optim.name {config.name}: supported are adamw, sgd, lars and sgd_lars")


def learning_rate(
    config: OptimConfig, step: int, total_steps: int, steps_per_epoch: int, batch_size: int
) -> float:
    """The learning rate of one step: linear warmup, then a cosine (or constant) to the last step.

    Args:
        config: Peak, warmup, schedule, final fraction.
        step: 0 for the first step of the run.
        total_steps: Steps of the whole run.
        steps_per_epoch: Steps of one epoch, the unit of the warmup.
        batch_size: Images per step over all ranks, for `lr_batch`.
    """
    peak = config.lr * (batch_size / config.lr_batch if config.lr_batch else 1.0)
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    progress = (step - warmup) / max(total_steps - warmup, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return peak * (config.final_lr + (1.0 - config.final_lr) * cosine)


class WeightAverage:
    """A moving average of a model's weights; statistics and counters are the newest ones.

    Args:
        model: Whose weights; the average starts at them.
        decay: Share of the old average that each update keeps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.learned = {name for name, _ in model.named_parameters()}
        self.weights = {name: v.detach().clone() for name, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the weights after one step: on a GPU a launch for each type of number."""
        values = model.state_dict()
        learned, others = list[str](), dict[torch.dtype, list[str]]()
        for name, value in values.items():
            (learned if name in self.learned else others.setdefault(value.dtype, [])).append(name)
        move_average(
            [self.weights[name] for name in learned], [values[name] for name in learned], self.decay
        )
        for names in others.values():
            torch._foreach_copy_(
                [self.weights[name] for name in names], [values[name] for name in names]
            )

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Takes a saved average."""
        for name, value in weights.items():
            self.weights[name].copy_(value)
