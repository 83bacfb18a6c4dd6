"""Take a trained encoder elsewhere: `bagssl export RUN --out FOLDER [--onnx]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bagssl_fast import arguments, locate
from bagssl_fast.exits import WRONG_USAGE, errors_end, program
from bagssl_fast.terminal import say


@dataclass(frozen=True)
class Export:
    """Writes a trained encoder for use elsewhere.

    FOLDER then holds model.safetensors and config.json (what `BagEncoder.from_run` reads),
    backbone.safetensors (the backbone alone under its host's names: torchvision's or timm's
    `load_state_dict` takes it as it is) and, with --onnx, images.onnx or patches.onnx (images or
    patches in, bag embeddings out).

    Args:
        run: Run directory, or a folder that this command wrote.
        out: Folder to write to; always needed.
        onnx: Also write ONNX: images takes images of any size, cutting included, patches takes
            patches that are already cut; a bare --onnx means images.
        patches: Patches per image of the ONNX file: 1, 4, 9, 16, ... or center.
        layer: What the ONNX file computes: embedding or projection.
        normalize: L2-normalize the results of the ONNX file.
    """

    run: Path
    out: Path | None = None
    onnx: Literal["none", "images", "patches"] = field(default="none", metadata={"bare": "images"})
    patches: int | Literal["center"] = 16
    layer: Literal["embedding", "projection"] = "embedding"
    normalize: bool = False


@program
def main(argv: Sequence[str]) -> None:
    """The program."""
    with errors_end(WRONG_USAGE):
        options = arguments.read(Export, argv, "export")
        out = options.out
        if out is None:
            raise ValueError("--out FOLDER is missing: name the folder to write to")
        locate.check_run(options.run)

    from bagssl_fast.inference.bag_encoder import BagEncoder
    from bagssl_fast.inference.export import export
    from bagssl_fast.inference.graph import to_onnx

    with errors_end(WRONG_USAGE):
        export(options.run, out)
        if options.onnx != "none":
            encoder = BagEncoder.from_run(
                out,
                patches=options.patches,
                layer=options.layer,
                normalize=options.normalize,
                device="cpu",
            )
            to_onnx(encoder, out / f"{options.onnx}.onnx", options.onnx)
    say(f"written  {', '.join(str(path) for path in sorted(out.iterdir()))}")


if __name__ == "__main__":
    raise SystemExit(main())
