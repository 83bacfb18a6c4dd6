"""Whole steps of the GPU recipes on random patches: no data set, no decoder, no loader."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bagssl_fast import ops
from bagssl_fast.augment import Augment
from bagssl_fast.config import (
    BagConfig,
    Config,
    EncoderConfig,
    HeadConfig,
    LossConfig,
    OptimConfig,
)
from bagssl_fast.losses import build_loss
from bagssl_fast.models.bag_model import build_model
from bagssl_fast.training.cuda_graph import WARM_UP, Computed, GraphedStep
from bagssl_fast.training.optim import build_optimizer
from bagssl_fast.training.step import objective, tune_device
from harness.gpu_clock import milliseconds

# name -> (ops, compiled, graphed), the most telling first; "reference" is torch's own layers and
# products.
VARIANTS: dict[str, tuple[str | None, bool, bool]] = {
    "ours, compiled": (None, True, False),
    "torch, compiled": ("reference", True, False),
    "ours, eager": (None, False, False),
    "torch, eager": ("reference", False, False),
    "ours, compiled and graphed": (None, True, True),
    "ours, graphed": (None, False, True),
}
NEEDS = {"resnet18": "torchvision", "resnet50": "torchvision", "vit_small_patch16_224": "timm"}

EMP = Config(
    bag=BagConfig(patches=20),
    augment=Augment(size=32),
    encoder=EncoderConfig("resnet18"),
    head=HeadConfig(name="emp", hidden=4096, out=1024),
    loss=LossConfig("emp_ssl"),
    optim=OptimConfig(name="sgd_lars", lr=0.3, weight_decay=1e-4),
)
VICREG = Config(
    bag=BagConfig(patches=2),
    augment=Augment(size=64),
    encoder=EncoderConfig("resnet50"),
    head=HeadConfig(hidden=8192, out=8192, num_layers=3),
    loss=LossConfig("vicreg"),
    optim=OptimConfig(name="lars", lr=0.3, weight_decay=1e-6),
)
VIT = replace(
    VICREG,
    augment=Augment(size=224),
    encoder=EncoderConfig("vit_small_patch16_224"),
    optim=OptimConfig(name="adamw", lr=1e-3, weight_decay=0.05),
)
RECIPES: dict[str, Config] = {
    "ResNet-18, 20 patches 32x32, B 100": replace(EMP, batch_size=100),
    "ResNet-50, 2 views 64x64, B 512": replace(VICREG, batch_size=512),
    "ViT-S/16, 2 views 224x224, B 128": replace(VIT, batch_size=128),
    "ResNet-18, 20 patches 32x32, B 512": replace(EMP, batch_size=512),
    "ResNet-50, 2 views 224x224, B 128": replace(VICREG, augment=Augment(size=224), batch_size=128),
}
TOY: dict[str, Config] = {
    "PatchNet, 3 patches 8x8, B 4": Config(
        batch_size=4,
        bag=BagConfig(patches=3),
        augment=Augment(size=8),
        encoder=EncoderConfig("patchnet", width=4),
        head=HeadConfig(hidden=8, out=6, num_layers=2),
        optim=OptimConfig(name="lars", lr=0.1),
    )
}


@dataclass(frozen=True)
class StepCase:
    """A recipe in a variant; `label` says both."""

    recipe: str
    variant: str
    config: Config

    @property
    def label(self) -> str:
        return f"{self.recipe}: {self.variant}"


def step_cases(toy: bool) -> list[StepCase]:
    """Each pair of variants for all recipes, before the next pair."""
    names, recipes = list(VARIANTS), TOY if toy else RECIPES
    pairs = [names[i : i + 2] for i in range(0, len(names), 2)]
    return [
        StepCase(recipe, variant, config)
        for pair in pairs
        for recipe, config in recipes.items()
        for variant in pair
    ]


@dataclass
class Steps:
    """A recipe's training without its data: `run()` is one step."""

    compute: Callable[[Tensor], Computed]
    optimizer: torch.optim.Optimizer
    patches: Tensor

    def run(self) -> Computed:
        computed = self.compute(self.patches)
        self.optimizer.step()
        return computed


def missing(config: Config) -> str:
    """The package that a recipe needs and that is not here, "" if none."""
    package = NEEDS.get(config.encoder.name, "torch")
    return "" if find_spec(package) else package


def make_steps(config: Config, device: torch.device, compiled: bool, graphed: bool) -> Steps:
    """The training step as `training/loop.py` makes it; call it under the choice of ops."""
    tune_device(device)
    model: Any = build_model(config).to(device, memory_format=torch.channels_last).train()
    loss = build_loss(config.loss.name, **config.loss.options).to(device)
    optimizer = build_optimizer(model, config.optim)
    size, on_gpu = config.augment.size, device.type == "cuda"
    precision = torch.bfloat16 if on_gpu else torch.float32
    shape = (config.bag.patches, config.batch_size, size, size, 3)
    patches = torch.rand(shape, device=device, dtype=precision).permute(0, 1, 4, 2, 3)
    forward = torch.compile(model, dynamic=False) if compiled and on_gpu else model

    def step(patches: Tensor) -> Computed:
        value, terms, h, z = objective(forward, loss, patches, precision)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        return Computed(value.detach(), terms, h, z)

    compute: Callable[[Tensor], Computed] = GraphedStep(step) if graphed and on_gpu else step
    return Steps(compute, optimizer, patches)


def measure(config: Config, device: torch.device, variant: str, seconds: float) -> dict[str, Any]:
    """Milliseconds of a step (median), images per second, peak memory, host waits, top kernels.

    Args:
        config: A recipe.
        device: Where to run it.
        variant: A name of `VARIANTS`.
        seconds: About how long to time it.
    """
    impl, compiled, graphed = VARIANTS[variant]
    on_gpu = device.type == "cuda"
    with ops.use_impl(impl) if impl else nullcontext():
        if on_gpu:
            torch.compiler.reset()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        steps = make_steps(config, device, compiled, graphed)
        for _ in range(WARM_UP + 2 if on_gpu else 1):
            computed = steps.run()
        ms = milliseconds(steps.run, device, seconds)
        images = config.batch_size / ms * 1e3
        return {
            "ms": ms,
            "images_per_s": images,
            "patches_per_s": images * config.bag.patches,
            "memory_mb": torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else None,
            "finite": bool(computed.loss.isfinite()),
            "waits": host_waits(steps) if on_gpu else None,
            "kernels": top_kernels(steps) if on_gpu else [],
        }


def host_waits(steps: Steps) -> str:
    """What CUDA says where a step makes the host wait, "" where none does."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps.run()
        return ""
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def top_kernels(steps: Steps, count: int = 12) -> list[dict[str, Any]]:
    """The kernels that take most of a step: name, milliseconds, launches."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        steps.run()
        torch.cuda.synchronize()
    events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    return [
        {"name": e.key[:90], "ms": e.self_device_time_total / 1e3, "launches": e.count}
        for e in events[:count]
    ]
