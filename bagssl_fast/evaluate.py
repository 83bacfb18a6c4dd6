"""Evaluate a run: `python -m bagssl_fast.evaluate RUN [--patches 1,4,16,64,256] ...`.

For each number of patches the embeddings of a grid of unaugmented patches are averaged, and a
weighted kNN and a linear probe read the class from the bag: for the trained network and for the
same network at its random initialization, for embedding h and projection z. Beside them stands the
central crop: the whole central square, shrunk to the size of one patch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from bagssl_fast.config import Config, EvalConfig, check_eval

if __name__ == "__main__" and "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py


def make_parser() -> argparse.ArgumentParser:
    """The parser of the evaluation's command line; what is left out comes from the run."""
    parser = argparse.ArgumentParser("python -m bagssl_fast.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--data", help="training images of the probes (default: the run's)")
    parser.add_argument("--test-data", "--test_data", help="test images")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads, 0 = all cores")
    group = parser.add_argument_group("what is measured (defaults: the run's `eval` section)")
    group.add_argument("--patches", help="numbers of patches, e.g. 1,4,16,64,256")
    group.add_argument("--projection-patches", type=int, help="largest bag for the projection")
    group.add_argument("--no-random", action="store_true", help="leave the random network out")
    group.add_argument("--random-patches", type=int, help="largest bag of the random network")
    group.add_argument("--max-train-images", type=int, help="0 = all")
    group.add_argument("--max-test-images", type=int, help="0 = all")
    group.add_argument("--batch-size", type=int, help="images per forward pass")
    group.add_argument("--probe", choices=("ridge", "logistic"))
    group.add_argument("--knn-k", type=int)
    return parser


def override(config: Config, options: argparse.Namespace) -> Config:
    """The run's configuration with the flags over it."""
    given = {key: value for key, value in vars(options).items() if value is not None}
    top = {key: given[key] for key in ("data", "test_data", "device", "threads") if key in given}
    names = {field.name for field in fields(EvalConfig)} - {"patches"}
    inner: dict[str, Any] = {key: given[key] for key in names if key in given}
    if "patches" in given:
        try:
            inner["patches"] = tuple(int(n) for n in given["patches"].strip("[]").split(","))
        except ValueError:
            raise ValueError(
                f"--patches {given['patches']}: numbers with commas are expected, such as 1,4,16"
            ) from None
    if given["no_random"]:
        inner["random"] = False
    return replace(config, **top, eval=replace(config.eval, **inner))


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns 0, or 2 for wrong usage."""
    options = make_parser().parse_args(argv)

    from bagssl_fast.evaluation.measure import evaluate
    from bagssl_fast.models.saved import load_config

    try:
        config = override(load_config(options.run), options)
        check_eval(config.eval)
        evaluate(options.run, config)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
