"""Checks of arguments: what came, what was expected."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises a ValueError unless the value is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if most is None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if most is not None and not least <= value <= most:
        raise ValueError(f"{name} must be from {least} to {most}, got {value}")


def check_bool(name: str, value: Any) -> None:
    """Raises a ValueError unless the value is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises a ValueError unless the value is one of the choices."""
    known = list(choices)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_type(name: str, value: Any, kind: type) -> None:
    """Raises a ValueError unless the value is of that class."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
