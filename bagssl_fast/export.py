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

from bagssl_fast.terminal import say

LAYERS = ("embedding", "projection")
TAKES = ("images", "patches")


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
    group.add_argument("--layer", choices=LAYERS, default="embedding")
    group.add_argument("--normalize", action="store_true", help="L2-normalize the results")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns 0, or 2 for wrong usage."""
    options = make_parser().parse_args(argv)

    from bagssl_fast.inference.bag_encoder import BagEncoder
    from bagssl_fast.inference.export import export
    from bagssl_fast.inference.graph import to_onnx

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
