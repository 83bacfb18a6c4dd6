"""What a person reads on the terminal."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """One line to the terminal, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
