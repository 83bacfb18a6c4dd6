"""Checks of arguments: what came, what was expected."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def check_integer(name: str, value: Any, least: int) -> None:
    """Raises a ValueError unless the value is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises a ValueError unless the value is one of the choices."""
    known = list(choices)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
