"""`bagssl COMMAND ...`, or `python -m bagssl_fast COMMAND ...`: one door to all commands."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a bag-of-patches model",
    "evaluate": "kNN and linear probe on a trained run",
    "analyze": "test the paper's claims on your images",
    "pack": "re-encode a data set into tar shards",
    "export": "take a trained encoder elsewhere: weights, ONNX",
    "env": "versions and machine, for a bug report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns what the command returns, or 2 for an unknown one."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    lines = [f"  {name:<10}{meaning}" for name, meaning in COMMANDS.items()]
    usage = "usage: bagssl COMMAND [--option VALUE ...]\n\n" + "\n".join(lines) + "\n"
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage)
        return 0 if arguments else 2
    name = arguments[0]
    if name not in COMMANDS:
        sys.stderr.write(f"error: unknown command {name!r}\n{usage}")
        return 2
    module = "analyze.__main__" if name == "analyze" else name
    status: int = importlib.import_module(f"bagssl_fast.{module}").main(arguments[1:])
    return status


if __name__ == "__main__":
    raise SystemExit(main())
