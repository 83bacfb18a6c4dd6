"""Other codebases for the tests: small stand-ins with their public names, or the real ones.

A stand-in has the host's signatures and formulas, written for these tests. The real host is used
where `BAGSSL_HOSTS` names a folder with checkouts `vicreg`, `solo-learn` and `EMP-SSL`.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn as dist_nn
import torch.nn.functional as F
from torch import Tensor, nn

from harness.swap_hosts import definitions

VICREG_ARGS = SimpleNamespace(
    mlp="16-16-12", batch_size=16, sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0, arch="resnet34"
)


def load(host: str, kind: str) -> ModuleType:
    """The module that `apply_to_*` is given: of the stand-in, or of the checkout (or skip)."""
    if kind == "stand-in":
        return {"vicreg": vicreg, "solo-learn": solo_learn, "EMP-SSL": emp_ssl}[host]()
    root = os.environ.get("BAGSSL_HOSTS")
    folder = Path(root or ".", host)
    if root is None or not folder.is_dir():
        pytest.skip(f"the real {host}: BAGSSL_HOSTS names no folder with a checkout of it")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        if host == "vicreg":
            return importlib.import_module("main_vicreg")
        if host == "solo-learn":
            return importlib.import_module("solo.losses")
        return definitions(folder / "main.py", "emp_ssl_main")
    except ImportError as error:
        pytest.skip(f"the real {host} cannot be imported: {error}")


# --------------------------------------------------------------------------------------- formulas


def everywhere(x: Tensor) -> Tensor:
    """All ranks' rows, with the gradient of all ranks."""
    return torch.cat(dist_nn.all_gather(x)) if dist.is_initialized() else x


def std_term(z: Tensor) -> Tensor:
    return F.relu(1 - torch.sqrt(z.var(dim=0) + 1e-4)).mean()


def cov_term(z: Tensor, denominator: int) -> Tensor:
    z = z - z.mean(dim=0)
    cov = z.T @ z / denominator
    return (cov - torch.diag(cov.diag())).square().sum() / z.shape[1]


def coding_rate(z: Tensor, eps: float) -> Tensor:
    batch, dim = z.shape
    return torch.logdet(torch.eye(dim, dtype=z.dtype) + dim / (batch * eps) * z.T @ z) / 2


def mlp(sizes: list[int], last_bias: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(len(sizes) - 2):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.BatchNorm1d(sizes[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1], bias=last_bias))


# ------------------------------------------------------------------------------------- stand-ins


def vicreg() -> ModuleType:
    """The authors' script: VICReg, Projector, LARS."""
    module = ModuleType("main_vicreg_stand_in")

    class VICReg(nn.Module):
        def __init__(self, args):
            super().__init__()
            self.args = args
            self.backbone = nn.Sequential(nn.Flatten(), nn.LazyLinear(8))
            self.projector = module.Projector(args, 8)

        def forward(self, x, y):
            x, y = self.projector(self.backbone(x)), self.projector(self.backbone(y))
            similarity = F.mse_loss(x, y)
            x, y = everywhere(x), everywhere(y)
            std = (std_term(x) + std_term(y)) / 2
            rows = self.args.batch_size - 1
            cov = cov_term(x, rows) + cov_term(y, rows)
            args = self.args
            return args.sim_coeff * similarity + args.std_coeff * std + args.cov_coeff * cov

    def Projector(args, embedding):
        return mlp([embedding, *map(int, args.mlp.split("-"))], last_bias=False)

    class LARS(torch.optim.Optimizer):
        def __init__(
            self,
            params,
            lr,
            weight_decay=0,
            momentum=0.9,
            eta=0.001,
            weight_decay_filter=None,
            lars_adaptation_filter=None,
        ):
            defaults = {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "eta": eta,
                "weight_decay_filter": weight_decay_filter,
                "lars_adaptation_filter": lars_adaptation_filter,
            }
            super().__init__(params, defaults)

        @torch.no_grad()
        def step(self):
            for g in self.param_groups:
                no_decay, no_ratio = g["weight_decay_filter"], g["lars_adaptation_filter"]
                for p in (p for p in g["params"] if p.grad is not None):
                    update = p.grad.clone()
                    if no_decay is None or not no_decay(p):
                        update += g["weight_decay"] * p
                    adapted = no_ratio is None or not no_ratio(p)
                    if adapted and p.norm() > 0 and update.norm() > 0:
                        update *= g["eta"] * p.norm() / update.norm()
                    mu = self.state[p].setdefault("mu", torch.zeros_like(p))
                    mu.mul_(g["momentum"]).add_(update)
                    p.sub_(g["lr"] * mu)

    module.VICReg, module.Projector, module.LARS = VICReg, Projector, LARS
    return module


def solo_learn() -> ModuleType:
    """A package `solo` with the two losses and the two methods that call them."""
    names = ["solo", "solo.losses", "solo.methods"]
    names += [f"solo.{name}" for name in ("losses.vicreg", "losses.barlow")]
    names += [f"solo.{name}" for name in ("methods.vicreg", "methods.barlow_twins")]
    modules = {name: ModuleType(name) for name in names}
    for name in names[:3]:
        modules[name].__path__ = []
    sys.modules.update(modules)

    def vicreg_loss_func(z1, z2, sim_loss_weight=25.0, var_loss_weight=25.0, cov_loss_weight=1.0):
        similarity = F.mse_loss(z1, z2)
        z1, z2 = everywhere(z1), everywhere(z2)
        std = std_term(z1) + std_term(z2)
        cov = cov_term(z1, len(z1) - 1) + cov_term(z2, len(z2) - 1)
        return sim_loss_weight * similarity + var_loss_weight * std + cov_loss_weight * cov

    def barlow_loss_func(z1, z2, lamb=5e-3, scale_loss=0.025):
        z1, z2 = (F.batch_norm(z, None, None, training=True) for z in (z1, z2))
        corr = z1.T @ z2 / len(z1)
        if dist.is_initialized():
            dist.all_reduce(corr)  # which autograd does not see
            corr = corr / dist.get_world_size()
        diagonal = corr.diagonal()
        off_diagonal = corr.square().sum() - diagonal.square().sum()
        return scale_loss * ((diagonal - 1).square().sum() + lamb * off_diagonal)

    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.projector = mlp([8, 16, 16, 12], last_bias=True)

        def forward(self, X):
            return {"feats": X}

        def training_step(self, batch, batch_idx):
            return {"loss": 0.0, "z": [self.forward(X)["z"] for X in batch[1]]}

    def method(name: str, loss_name: str) -> type:
        text = f"""
class {name}(Base):
    def forward(self, X):
        out = super().forward(X)
        out.update({{"z": self.projector(out["feats"])}})
        return out

    def training_step(self, batch, batch_idx):
        out = super().training_step(batch, batch_idx)
        z1, z2 = out["z"]
        return {loss_name}(z1, z2) + out["loss"]
"""
        module = modules[f"solo.methods.{'vicreg' if name == 'VICReg' else 'barlow_twins'}"]
        vars(module).update({"Base": Base, loss_name: globals_[loss_name]})
        exec(text, vars(module))
        return vars(module)[name]

    globals_ = {"vicreg_loss_func": vicreg_loss_func, "barlow_loss_func": barlow_loss_func}
    losses = modules["solo.losses"]
    for name in ("vicreg", "barlow"):
        function = globals_[f"{name}_loss_func"]
        setattr(modules[f"solo.losses.{name}"], function.__name__, function)
        setattr(losses, function.__name__, function)
    method("VICReg", "vicreg_loss_func")
    method("BarlowTwins", "barlow_loss_func")
    return losses


def emp_ssl() -> ModuleType:
    """EMP-SSL's script: its losses and its encoder."""
    module = ModuleType("emp_ssl_stand_in")

    class TotalCodingRate(nn.Module):
        def __init__(self, eps=0.01):
            super().__init__()
            self.eps = eps

        def forward(self, X):
            return -coding_rate(X, self.eps)

    class Similarity_Loss(nn.Module):
        def forward(self, z_list, z_avg):
            z = torch.stack(list(z_list))
            cosine = F.cosine_similarity(z, z.mean(dim=0, keepdim=True), dim=-1).mean()
            return -cosine, cosine.detach()

    class encoder(nn.Module):
        def __init__(self, z_dim=12, hidden_dim=16, norm_p=2):
            super().__init__()
            self.backbone, self.norm_p = nn.Identity(), norm_p
            self.pre_feature = mlp([8, hidden_dim, 1], last_bias=True)[:3]
            self.projection = mlp([hidden_dim, hidden_dim, z_dim], last_bias=True)

        def forward(self, x, is_test=False):
            feature = self.pre_feature(self.backbone(x))
            z = F.normalize(self.projection(feature), p=self.norm_p)
            return (z, feature) if is_test else z

    def cal_TCR(z, criterion, num_patches):
        return sum(criterion(slot) for slot in z.chunk(num_patches)) / num_patches

    def chunk_avg(x, n_chunks=2, normalize=False):
        mean = torch.stack(x.chunk(n_chunks)).mean(0)
        return F.normalize(mean, dim=1) if normalize else mean

    for piece in (TotalCodingRate, Similarity_Loss, encoder, cal_TCR, chunk_avg):
        setattr(module, piece.__name__, piece)
    return module
