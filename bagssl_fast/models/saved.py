"""A saved run: the one reader and writer of config.yaml, config.json and model.safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bagssl_fast import cli, locate
from bagssl_fast.augment import Augment
from bagssl_fast.config import BagConfig, Config, EncoderConfig, EvalConfig, HeadConfig, patch_size
from bagssl_fast.files import write_atomic
from bagssl_fast.models.bag_model import BagModel, build_model

FORMAT = 2  # of config.json; 1 did not say how bags are cut
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Saved:
    """What a folder holds.

    Args:
        model: The trained model, in eval mode on the CPU.
        config: Its configuration; of an exported folder only what decides the model and its bags,
            defaults elsewhere.
        step: The training step of the weights.
    """

    model: BagModel
    config: Config
    step: int


def export(run_dir: Path, weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Writes model.safetensors and config.json, all that is needed to use the model."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    # The step goes with the weights: the two files are renamed one after the other. Nothing else
    # does: safetensors writes several entries in any order, and equal weights are equal files.
    metadata = {"step": str(description["step"])}
    write_atomic(run_dir / WEIGHTS, safetensors.torch.save(tensors, metadata=metadata))
    text = json.dumps(dict(description), indent=2) + "\n"
    write_atomic(run_dir / "config.json", text.encode())


def exported_step(folder: Path) -> int:
    """The training step of a folder's exported model, -1 if it has no whole one."""
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            step = int((file.metadata() or {})["step"])
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return min(step, int(described["step"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return -1


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


def load(folder: str | os.PathLike[str], config: Config | None = None) -> Saved:
    """Reads a trained model: a run directory, or a folder that `export` wrote.

    Args:
        folder: It holds model.safetensors, and config.yaml (which is then what counts) or
            config.json.
        config: Overrides the folder's configuration.

    Raises:
        FileNotFoundError: If the folder or a file of it is missing.
        ValueError: If a file is damaged, of another version, or does not fit the others.
    """
    folder = Path(folder)
    locate.check_run(folder)
    config = config or load_config(folder)
    path = folder / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            step = int((file.metadata() or {})["step"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        what = "it names no step" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} is damaged ({what}): copy it again from where it came from, or delete it and "
            "resume the training with --resume auto"
        ) from error
    model = build_model(config, pretrained=False)
    _check_sizes(model, weights, path)
    model.load_state_dict(weights)
    return Saved(model.eval(), config, step)


def load_config(folder: str | os.PathLike[str]) -> Config:
    """The configuration of a run directory, or of a folder that `export` wrote.

    Raises:
        FileNotFoundError: If the folder does not exist or holds no configuration.
        ValueError: If config.yaml or config.json is damaged or of another version.
    """
    folder = Path(folder)
    locate.check_described(folder)
    if (folder / "config.yaml").is_file():
        return cli.load(folder / "config.yaml")
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> Config:
    """The inverse of `describe`."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): copy it again from where it came from"
        ) from None
    version = described.get("format") if isinstance(described, dict) else None
    if version != FORMAT:
        raise ValueError(
            f"{path} is of format {version}, expected {FORMAT}: write it again from its run "
            "directory with `python -m bagssl_fast.export RUN --out FOLDER`, or use the version of "
            "bagssl_fast that wrote it"
        )
    try:
        crop = described["crop"]
        return Config(
            seed=described["seed"],
            bag=BagConfig(**described["bag"]),
            encoder=EncoderConfig(**described["encoder"]),
            head=HeadConfig(**described["head"]),
            augment=Augment.none(
                size=crop["size"],
                mean=tuple(described["mean"]),
                std=tuple(described["std"]),
                scale=tuple(crop["scale"]),
                ratio=tuple(crop["ratio"]),
            ),
            eval=EvalConfig(view=described["view"]),
        )
    except (KeyError, TypeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} does not describe a model ({what}): export the run again"
        ) from error


def _check_sizes(model: BagModel, weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuses weights of another model, where torch would list every tensor."""
    have = {name: list(tensor.shape) for name, tensor in weights.items()}
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    names = [*expected, *(name for name in have if name not in expected)]
    wrong = [name for name in names if have.get(name) != expected.get(name)]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{path} does not fit the configuration beside it: {name} has the shape "
            f"{have.get(name, 'none (it is missing)')}, expected "
            f"{expected.get(name, 'no such tensor')} ({len(wrong)} of {len(names)} tensors "
            "differ); set encoder and head back to what the model was trained with, which the "
            "config.json of its run says"
        )
