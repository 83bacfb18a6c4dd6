"""`bagssl COMMAND ...`, or `python -m bagssl_fast COMMAND ...`: one door to all commands."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from bagssl_fast import __version__
from bagssl_fast.exits import WRONG_USAGE

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
    name, *arguments = list(sys.argv[1:] if argv is None else argv) or [""]
    lines = [f"  {command:<10}{meaning}" for command, meaning in COMMANDS.items()]
    usage = (
        "usage: bagssl COMMAND [--option VALUE ...]\n\n"
        + "\n".join(lines)
        + "\n\nbagssl COMMAND --help lists the options of a command.\n"
    )
    if name in ("-h", "--help"):
        sys.stdout.write(usage)
        return 0
    if name == "--version":
        sys.stdout.write(f"{__version__}\n")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        sys.stderr.write(f"error: unknown command {name}{hint}\n" if name else "")
        sys.stderr.write("" if near else usage)
        return WRONG_USAGE
    module = "analyze.__main__" if name == "analyze" else name
    code: int = importlib.import_module(f"bagssl_fast.{module}").main(arguments)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
