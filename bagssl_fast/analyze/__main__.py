"""Test the paper's claims on your images: `python -m bagssl_fast.analyze --data PATH --out DIR`.

Trains what the chosen claims need, measures, and writes report.html, one PNG per figure and
results.json into the output directory. The same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bagssl_fast.analyze.study import CLAIMS
from bagssl_fast.terminal import say

if __name__ == "__main__" and "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py


def make_parser() -> argparse.ArgumentParser:
    """The parser of the analysis's command line."""
    parser = argparse.ArgumentParser("python -m bagssl_fast.analyze", description=__doc__)
    parser.add_argument("--data", help="training images, as for train (default: the built-in demo)")
    parser.add_argument("--test-data", help="test images (default: found by the name of the data)")
    parser.add_argument("--out", type=Path, default=Path("analysis"), help="output directory")
    parser.add_argument("--claims", default=CLAIMS, help="which claims, e.g. 1,3")
    parser.add_argument("--quick", action="store_true", help="a look in minutes, no measurement")
    parser.add_argument("--seeds", type=int, default=2, help="trainings per setting")
    parser.add_argument("--config", default="analysis", help="recipe of the models")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = all cores")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns 0, also when asked to stop, 1 if a training diverged, 2 wrong usage."""
    options = make_parser().parse_args(argv)

    from bagssl_fast.analyze.analysis import describe, examine, make_context, studies, write
    from bagssl_fast.analyze.models import Stopped, prepare_threads
    from bagssl_fast.training.meter import Diverged

    try:
        chosen = studies(options.claims)
        context = make_context(options)
        options.out.mkdir(parents=True, exist_ok=True)
        prepare_threads(context.base)
        results = [examine(study, context) for study in chosen]
        write(context, results, describe(options, context, results))
    except (Stopped, KeyboardInterrupt) as stop:
        say(f"{stop or 'interrupted'}: the same command goes on")
    except Diverged as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
