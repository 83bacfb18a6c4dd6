"""A trained encoder as files: the model, and the backbone under the names of its own library."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from bagssl_fast.config import Config
from bagssl_fast.files import write_atomic
from bagssl_fast.models import saved
from bagssl_fast.models.bag_model import BagModel
from bagssl_fast.models.encoders import ImageBackbone


def backbone_state(model: BagModel) -> dict[str, Tensor]:
    """A backbone's weights under the names of the library that made it.

    A network of torchvision or timm comes without its classifier (`fc = nn.Identity()`,
    `num_classes=0`).
    """
    weights = _network(model).state_dict()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def host(model: BagModel) -> str:
    """The class of the network whose names `backbone_state` has."""
    kind = type(_network(model))
    return f"{kind.__module__}.{kind.__qualname__}"


def _network(model: BagModel) -> nn.Module:
    backbone = model.backbone
    return backbone.net if isinstance(backbone, ImageBackbone) else backbone


def export(run: Path, out: Path) -> None:
    """Writes the files of `write` for a run directory, or for a folder that holds such files.

    Raises:
        ValueError: If the files of `run` are damaged or of another version, or `run` is `out`.
        FileNotFoundError: If `run` does not exist or holds no trained model.
    """
    if out.resolve() == run.resolve():
        raise ValueError(f"--out {out} is the run itself; name another folder")
    found = saved.load(run)
    write(out, found.model, found.config, found.step)


def write(out: Path, model: BagModel, config: Config, step: int) -> None:
    """Writes model.safetensors, config.json and backbone.safetensors."""
    saved.export(out, model.state_dict(), saved.describe(config, model, step))
    notes = {"format": "pt", "encoder": config.encoder.name, "host": host(model)}
    data = safetensors.torch.save(backbone_state(model), metadata=notes)
    write_atomic(out / "backbone.safetensors", data)
