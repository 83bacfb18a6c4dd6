"""What a bug report needs: `bagssl env`. Every run keeps it as env.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from bagssl_fast import arguments, machine
from bagssl_fast.exits import WRONG_USAGE, errors_end, program
from bagssl_fast.terminal import say


@dataclass(frozen=True)
class Env:
    """Prints versions, machine and settings as JSON, for a bug report. It has no options."""


@program
def main(argv: Sequence[str]) -> None:
    """The program."""
    with errors_end(WRONG_USAGE):
        arguments.read(Env, argv, "env")
    say(json.dumps(machine.report(), indent=2))


if __name__ == "__main__":
    raise SystemExit(main())
