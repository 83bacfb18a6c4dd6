"""A saved run: the one reader and writer of config.yaml, config.json and model.safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from bagssl_fast import cli
from bagssl_fast.augment import Augment
from bagssl_fast.config import BagConfig, Config, EncoderConfig, EvalConfig, HeadConfig, patch_size
from bagssl_fast.files import write_atomic
from bagssl_fast.models.bag_model import BagModel, build_model

FORMAT = 2  # of config.json; 1 did not say how bags are cut


def export(run_dir: Path, weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Writes model.safetensors and config.json, all that is needed to use the model."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_atomic(run_dir / "model.safetensors", data)
    text = json.dumps(dict(description), indent=2) + "\n"
    write_atomic(run_dir / "config.json", text.encode())


def describe(config: Config, model: BagModel, step: int) -> dict[str, Any]:
    """What config.json says of an exported model: how to build it, and how to cut its bags."""
    crop = config.augment
    return {
        "format": FORMAT,
        "encoder": asdict(config.encoder) | {"patch_size": patch_size(config)},
        "head": asdict(config.head),
        "bag": asdict(config.bag),
        "crop": {"size": crop.size, "scale": crop.scale, "ratio": crop.ratio},
        "view": config.eval.view,
        "mean": crop.mean,
        "std": crop.std,
        "seed": config.seed,
        "embedding_dim": model.embedding_dim,
        "projection_dim": model.projection_dim,
        "step": step,
    }


def load_config(run_dir: Path) -> Config:
    """The configuration of a run.

    Raises:
        ValueError: If the directory is no run.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{run_dir} is no run directory (it has no config.yaml): give the directory that "
            "`python -m bagssl_fast.train` named in its first line"
        )
    return cli.load(path)


def load_model(run_dir: Path, config: Config | None = None) -> tuple[BagModel, int]:
    """The trained model of a run, in eval mode on the CPU, and the step it was saved at.

    Raises:
        ValueError: If the run holds no model.
    """
    weights = run_dir / "model.safetensors"
    if not weights.is_file():
        raise ValueError(
            f"{run_dir} holds no model.safetensors: its training has not come to a checkpoint; "
            f"go on with python -m bagssl_fast.train --config {run_dir / 'config.yaml'} "
            f"--run_dir {run_dir} --resume auto"
        )
    model = build_model(config or load_config(run_dir), pretrained=False)
    model.load_state_dict(safetensors.torch.load_file(weights))
    step = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))["step"]
    return model.eval(), int(step)


def load_exported(folder: str | os.PathLike[str]) -> tuple[BagModel, Config, int]:
    """Reads what `export` wrote, be it a run directory or a folder of these two files alone.

    Returns:
        The model, in eval mode on the CPU; its configuration as far as it decides the model and
        its bags, defaults elsewhere; the step it was saved at.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the files are of another version, damaged, or not of one model.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}: give a run directory whose training has come to a "
                "checkpoint, or a folder that `python -m bagssl_fast.export` wrote"
            )
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is not valid JSON ({error})") from None
    version = described.get("format") if isinstance(described, dict) else None
    if version != FORMAT:
        raise ValueError(
            f"{folder / 'config.json'} is of format {version}, expected {FORMAT}: write it again "
            "from its run directory by `python -m bagssl_fast.export RUN --out FOLDER`, or use the "
            "version of bagssl_fast that wrote it"
        )
    try:
        config = _config_of(described)
        model = build_model(config, pretrained=False)
        model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
        return model.eval(), config, int(described["step"])
    except (KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        what = f"no {error} in config.json" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{folder}: config.json and model.safetensors do not make a model ({what}); export "
            "the run again"
        ) from error


def _config_of(described: Mapping[str, Any]) -> Config:
    """The inverse of `describe`."""
    crop = described["crop"]
    augment = Augment.none(
        size=crop["size"],
        mean=tuple(described["mean"]),
        std=tuple(described["std"]),
        scale=tuple(crop["scale"]),
        ratio=tuple(crop["ratio"]),
    )
    return Config(
        seed=described["seed"],
        bag=BagConfig(**described["bag"]),
        encoder=EncoderConfig(**described["encoder"]),
        head=HeadConfig(**described["head"]),
        augment=augment,
        eval=EvalConfig(view=described["view"]),
    )
