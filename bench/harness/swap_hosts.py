"""What bench_swap.py trains: each host's own loss, projector and optimizer on a small backbone.

A host is available if its package is installed (lightly) or if `BAGSSL_HOSTS` names a folder with
a checkout of it. Where the loss is swapped, the backbone is one linear layer over the patch's
pixels, as a ResNet on a CPU would take all the time of a step; where the host's own ResNet-18 is
fused (`fuse`), the loss stays the host's.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[Sequence[Tensor]], Tensor]  # one optimizer step on P crops [B, 3, h, w]; the loss
PIXELS, FEATURES = 16, 512


class Missing(Exception):
    """A host that is not installed; the message says how to get it."""


@dataclass(frozen=True)
class Host:
    """One training of a host."""

    checkout: str  # folder in BAGSSL_HOSTS; "" for an installed package
    build: Callable[[ModuleType], Step]
    load: Callable[[], ModuleType]
    apply: Callable[[ModuleType], contextlib.AbstractContextManager]
    shape: str
    patches: int = 2
    batch: int = 128
    pixels: int = PIXELS


def checkout(name: str) -> Path:
    """The folder of a host's source, also put on the path."""
    root = os.environ.get("BAGSSL_HOSTS")
    folder = Path(root or ".", name)
    if root is None or not folder.is_dir():
        raise Missing(f"set BAGSSL_HOSTS to a folder with a checkout of {name} (docs/swap-in.md)")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return folder


def revision(host: Host) -> str:
    """The version of a host: of its package, or the commit of its checkout."""
    if not host.checkout:
        return importlib.metadata.version("lightly")
    command = ["git", "-C", str(checkout(host.checkout)), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "no git"


def imported(name: str) -> ModuleType:
    """A host's module, or Missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"cannot import {name}: {error}") from error


def definitions(path: Path, name: str) -> ModuleType:
    """A script's imports, functions and classes, without its top-level statements."""
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, kept)]
    module = ModuleType(name)
    sys.modules[name] = module
    exec(compile(tree, str(path), "exec"), vars(module))
    return module


def backbone() -> nn.Module:
    """Patches [B, 3, 16, 16] -> [B, 512]."""
    layer = nn.Linear(3 * PIXELS**2, FEATURES)
    return nn.Sequential(nn.Flatten(), layer, nn.BatchNorm1d(FEATURES), nn.ReLU())


def resnet(small_stem: bool) -> nn.Module:
    """torchvision's ResNet-18, crops [B, 3, h, w] -> [B, 512], as the hosts' examples build it."""
    net = imported("torchvision.models").resnet18()
    if small_stem:  # as solo-learn's, for CIFAR
        net.conv1 = nn.Conv2d(3, 64, 3, 1, 2, bias=False)
        net.maxpool = nn.Identity()
    net.fc = nn.Identity()
    net = net.to(memory_format=torch.channels_last)
    return _fuse(net)


def _fuse(net: nn.Module) -> nn.Module:
    """What is done to a host's backbone: nothing, or `fuse` within `apply_fuse`."""
    return net


@contextlib.contextmanager
def apply_fuse(_: ModuleType) -> Iterator[None]:
    """Models built within have a fused backbone; nothing else differs."""
    global _fuse
    from bagssl_fast.models.fused import fuse

    before, _fuse = _fuse, fuse
    try:
        yield
    finally:
        _fuse = before


def stepper(model: nn.Module, loss: Callable[..., Tensor], optimizer: Any) -> Step:
    """A training step; `loss` takes the crops."""

    def step(crops: Sequence[Tensor]) -> Tensor:
        optimizer.zero_grad()
        value = loss(crops)
        value.backward()
        optimizer.step()
        return value.detach()

    model.train()
    return step


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


# ---------------------------------------------------------------------------------------- lightly


def lightly_pair(
    name: str, lr: float, encoder: Callable[[], nn.Module] = backbone
) -> Callable[[ModuleType], Step]:
    def build(loss: ModuleType) -> Step:
        heads = imported("lightly.models.modules.heads")
        model = nn.Sequential(encoder(), heads.VICRegProjectionHead(FEATURES, 1024, 1024))
        criterion = getattr(loss, name)()
        return stepper(model, lambda crops: criterion(*(model(x) for x in crops)), sgd(model, lr))

    return build


def lightly_emp_ssl(loss: ModuleType) -> Step:
    heads = imported("lightly.models.modules.heads")
    model = nn.Sequential(backbone(), heads.VICRegProjectionHead(FEATURES, 1024, 512))
    criterion = loss.EMPSSLLoss()

    def value(crops: Sequence[Tensor]) -> Tensor:
        z = nn.functional.normalize(model(torch.cat(list(crops))), dim=1)
        return criterion(list(z.chunk(len(crops))))

    return stepper(model, value, sgd(model, 3e-5))


def apply_lightly(_: ModuleType) -> contextlib.AbstractContextManager:
    from bagssl_fast.integrations import apply_to_lightly

    return apply_to_lightly(emp_ssl_host_sign=True)  # to compare like with like


# --------------------------------------------------------------------------- the VICReg authors'


def load_vicreg() -> ModuleType:
    checkout("vicreg")
    if not torch.distributed.is_initialized():  # the authors' code always gathers
        store = Path(tempfile.mkdtemp(), "store")
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=0, world_size=1
        )
    return imported("main_vicreg")


def vicreg(module: ModuleType) -> Step:
    module.resnet.patches = lambda **_: (backbone(), FEATURES)
    args = SimpleNamespace(arch="patches", mlp="1024-1024-1024", batch_size=128)
    args.sim_coeff, args.std_coeff, args.cov_coeff = 25.0, 25.0, 1.0
    model = module.VICReg(args)
    skip = module.exclude_bias_and_norm
    optimizer = module.LARS(model.parameters(), 0.1, 1e-6, 0.9, 0.001, skip, skip)
    return stepper(model, lambda crops: model(*crops), optimizer)


def apply_vicreg(module: ModuleType) -> contextlib.AbstractContextManager:
    from bagssl_fast.integrations import apply_to_vicreg

    return apply_to_vicreg(module)


# ------------------------------------------------------------------------------------- solo-learn


def load_solo() -> ModuleType:
    checkout("solo-learn")
    return imported("solo.methods")


def solo(
    name: str, encoder: Callable[[], nn.Module] = backbone, **method_kwargs: float
) -> Callable[[ModuleType], Step]:
    def build(methods: ModuleType) -> Step:
        from omegaconf import OmegaConf

        sizes = {"proj_hidden_dim": 1024, "proj_output_dim": 1024}
        cfg = OmegaConf.create(
            {
                "method": name,
                "backbone": {"name": "resnet18"},
                "data": {"dataset": "cifar10", "num_classes": 10, "num_large_crops": 2},
                "method_kwargs": {**sizes, **method_kwargs},
                "optimizer": {
                    "name": "sgd",
                    "batch_size": 128,
                    "lr": 1e-3,
                    "weight_decay": 0.0,
                    "classifier_lr": 0.1,
                },
                "scheduler": {"name": "none"},
                "max_epochs": 1,
                "knn_eval": {"enabled": False},
            }
        )
        cfg.data.num_small_crops = 0
        cls = methods.METHODS[name]
        model = cls(cls.add_and_assert_specific_cfg(cfg))
        model.backbone = encoder()

        def value(crops: Sequence[Tensor]) -> Tensor:
            labels = torch.zeros(len(crops[0]), dtype=torch.int64)
            return model.training_step([None, list(crops), labels], 0)

        return stepper(model, value, sgd(model, 1e-3))

    return build


def apply_solo(_: ModuleType) -> contextlib.AbstractContextManager:
    from bagssl_fast.integrations import apply_to_solo_learn

    return apply_to_solo_learn()


# ---------------------------------------------------------------------------------------- EMP-SSL


def load_emp_ssl() -> ModuleType:
    path = checkout("EMP-SSL") / "main.py"
    try:
        return definitions(path, "emp_ssl_main")
    except ImportError as error:
        raise Missing(f"cannot import what EMP-SSL's main.py imports: {error}") from error


def emp_ssl(module: ModuleType) -> Step:
    model = module.encoder(z_dim=512, hidden_dim=1024)
    model.backbone = backbone()
    criterion, contractive = module.TotalCodingRate(eps=0.2), module.Similarity_Loss()

    def value(crops: Sequence[Tensor]) -> Tensor:  # as in the script's loop
        z = model(torch.cat(list(crops)))
        z_list, z_avg = z.chunk(len(crops)), module.chunk_avg(z, len(crops))
        similarity, _ = contractive(z_list, z_avg)
        return 200 * similarity + module.cal_TCR(z, criterion, len(crops))

    return stepper(model, value, sgd(model, 1e-4))


def apply_emp_ssl(module: ModuleType) -> contextlib.AbstractContextManager:
    from bagssl_fast.integrations import apply_to_emp_ssl

    return apply_to_emp_ssl(module)


PAIR = "2 crops, B 128, 768-512-1024-1024-1024"
BAG = "8 crops, B 64, 768-512-1024-512"
_WEIGHTS = {"sim_loss_weight": 25.0, "var_loss_weight": 25.0, "cov_loss_weight": 1.0}


def _lightly_loss() -> ModuleType:
    return imported("lightly.loss")


HOSTS = {
    "lightly VICReg": Host(
        "", lightly_pair("VICRegLoss", 1e-3), _lightly_loss, apply_lightly, PAIR
    ),
    "lightly Barlow Twins": Host(
        "", lightly_pair("BarlowTwinsLoss", 1e-4), _lightly_loss, apply_lightly, PAIR
    ),
    "lightly EMP-SSL": Host("", lightly_emp_ssl, _lightly_loss, apply_lightly, BAG, 8, 64),
    "vicreg": Host("vicreg", vicreg, load_vicreg, apply_vicreg, PAIR),
    "solo-learn VICReg": Host(
        "solo-learn", solo("vicreg", **_WEIGHTS), load_solo, apply_solo, PAIR
    ),
    "solo-learn Barlow Twins": Host(
        "solo-learn",
        solo("barlow_twins", lamb=0.0051, scale_loss=0.024),
        load_solo,
        apply_solo,
        PAIR,
    ),
    "EMP-SSL": Host(
        "EMP-SSL",
        emp_ssl,
        load_emp_ssl,
        apply_emp_ssl,
        "8 crops, B 64, 768-512-1024-1024-512",
        8,
        64,
    ),
    "fuse in lightly VICReg": Host(
        "",
        lightly_pair("VICRegLoss", 1e-3, partial(resnet, small_stem=False)),
        _lightly_loss,
        apply_fuse,
        "2 crops of 32x32, B 128, torchvision's ResNet-18, 512-1024-1024",
        pixels=32,
    ),
    "fuse in solo-learn VICReg": Host(
        "solo-learn",
        solo("vicreg", partial(resnet, small_stem=True), **_WEIGHTS),
        load_solo,
        apply_fuse,
        "2 crops of 32x32, B 16, ResNet-18 with solo-learn's stem for CIFAR, 512-1024-1024-1024",
        batch=16,
        pixels=32,
    ),
}
