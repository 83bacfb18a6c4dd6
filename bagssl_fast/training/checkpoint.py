"""Files of a run directory: training checkpoints, exported weights, and how a run finds them again.

Every file is written under another name, flushed and renamed, so a killed run leaves whole files
only. Checkpoints are read with `weights_only=True`: nothing in them is executed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bagssl_fast.files import write_atomic
from bagssl_fast.locate import check_resume, check_run_dir

FOLDER = "checkpoints"
_NAME = re.compile(r"step_(\d+)\.pt")


def save(run_dir: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Saves a training state as checkpoints/step_<step>.pt and drops all but the newest `keep`."""
    path = run_dir / FOLDER / f"step_{step:09d}.pt"
    write_atomic(path, lambda file: torch.save(dict(state), file))
    for old in _all(run_dir)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def _all(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = run_dir / FOLDER
    found = [p for p in folder.glob("step_*.pt") if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.stem.removeprefix("step_")))


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run directory, or None."""
    checkpoints = _all(run_dir)
    return checkpoints[-1] if checkpoints else None


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint.

    Raises:
        ValueError: If the file is damaged or is not a checkpoint of ours.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({error}); delete it to resume from the one "
            "before, or start a new run with --resume never --overwrite true"
        ) from error
    if not isinstance(state, dict) or "identity" not in state:
        raise ValueError(f"{path} is not a checkpoint of bagssl_fast.train")
    return state


def find(resume: str, run_dir: Path) -> Path | None:
    """The checkpoint that `--resume` means.

    Args:
        resume: never, auto (the newest of `run_dir`, if any), a checkpoint, or a run directory.
        run_dir: The directory of the run.

    Raises:
        ValueError: If a named path holds no checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return latest(run_dir)
    check_resume(resume)
    path = Path(resume)
    found = latest(path) if path.is_dir() else path
    if found is None:
        raise ValueError(f"--resume {resume}: no checkpoint there, {path / FOLDER} is empty")
    return found


def compare(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses to resume a run under another configuration.

    Raises:
        ValueError: Naming every option that changed, old and new value.
    """
    changed = [
        f"{key}: {saved.get(key, '(absent)')} -> {current.get(key, '(absent)')}"
        for key in sorted({*saved, *current})
        if saved.get(key) != current.get(key)
    ]
    if changed:
        raise ValueError(
            "the configuration is not the one this run was started with ("
            + "; ".join(changed)
            + "); set these back to resume, or start a new --run_dir"
        )


def open_run_dir(path: Path, resume: str, overwrite: bool) -> None:
    """Makes the run directory, emptied under `overwrite`.

    Raises:
        ValueError: If it holds what nobody asked to touch.
    """
    check_run_dir(path, resume, overwrite)
    if overwrite and resume == "never" and path.is_dir() and any(path.iterdir()):
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
