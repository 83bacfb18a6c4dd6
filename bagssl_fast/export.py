"""Take a trained encoder elsewhere: `python -m bagssl_fast.export RUN --out FOLDER [--onnx]`.

FOLDER then holds, whatever RUN's own copies are good for:

    model.safetensors, config.json   what `BagEncoder.from_run` reads
    backbone.safetensors             the backbone alone under its host's names: torchvision's or
                                     timm's `load_state_dict` takes it as it is
    images.onnx or patches.onnx      with --onnx: images (or patches) in, bag embeddings out
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from torch import Tensor

from bagssl_fast import checkpoint
from bagssl_fast.bag_encoder import LAYERS, BagEncoder
from bagssl_fast.encoders import ImageBackbone
from bagssl_fast.evaluate import load_config, load_model
from bagssl_fast.graph import TAKES, to_onnx
from bagssl_fast.metrics import say
from bagssl_fast.model import BagModel


def backbone_state(model: BagModel) -> dict[str, Tensor]:
    """A backbone's weights under the names of the library that made it.

    A network of torchvision or timm comes without its classifier (`fc = nn.Identity()`,
    `num_classes=0`).
    """
    backbone = model.backbone
    net = backbone.net if isinstance(backbone, ImageBackbone) else backbone
    return {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}


def host(model: BagModel) -> str:
    """The class of the network whose names `backbone_state` has."""
    net = getattr(model.backbone, "net", model.backbone)
    return f"{type(net).__module__}.{type(net).__qualname__}"


def export(run: Path, out: Path) -> None:
    """Writes model.safetensors, config.json and backbone.safetensors.

    Raises:
        ValueError: If `run` holds no trained model, or is `out`.
        FileNotFoundError: If `run` does not exist.
    """
    if out.resolve() == run.resolve():
        raise ValueError(f"--out {out} is the run itself; name another folder")
    if (run / "config.yaml").is_file():
        config = load_config(run)
        model, step = load_model(run, config)
    else:
        model, config, step = checkpoint.load_exported(run)
    checkpoint.export(out, model.state_dict(), checkpoint.describe(config, model, step))
    notes = {"format": "pt", "encoder": config.encoder.name, "host": host(model)}
    data = safetensors.torch.save(backbone_state(model), metadata=notes)
    checkpoint.write_atomic(out / "backbone.safetensors", data)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        "python -m bagssl_fast.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--onnx",
        choices=TAKES,
        nargs="?",
        const="images",
        help="also write ONNX that takes images of any size, cutting included, or cut patches",
    )
    group = parser.add_argument_group("what the ONNX file computes")
    group.add_argument("--patches", default="16", help='per image: 1, 4, 9, 16, ... or "center"')
    group.add_argument("--layer", choices=tuple(LAYERS), default="embedding")
    group.add_argument("--normalize", action="store_true", help="L2-normalise the results")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns 0, or 2 for wrong usage."""
    options = make_parser().parse_args(argv)
    patches = int(options.patches) if options.patches.isdigit() else options.patches
    try:
        export(options.run, options.out)
        if options.onnx:
            encoder = BagEncoder.from_run(
                options.out,
                patches=patches,
                layer=options.layer,
                normalize=options.normalize,
                device="cpu",
            )
            to_onnx(encoder, options.out / f"{options.onnx}.onnx", options.onnx)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    say(f"written  {', '.join(str(path) for path in sorted(options.out.iterdir()))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
