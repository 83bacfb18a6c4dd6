"""Training checkpoints of a run directory: saved, found again, compared.

A checkpoint is on the disk before it takes its name, and ends in a checksum: one that was damaged
later is told from a whole one, and the one before it is used. Checkpoints are read with
`weights_only=True`: nothing in them is executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bagssl_fast.files import Damaged, check_seal, write_atomic
from bagssl_fast.locate import check_resume

FOLDER = "checkpoints"
_NAME = re.compile(r"step_(\d+)\.pt")


@dataclass(frozen=True)
class Found:
    """A checkpoint that was read.

    Args:
        path: The file.
        state: Its content.
        digest: Its checksum.
        damaged: Newer ones that could not be used, and why.
    """

    path: Path
    state: dict[str, Any]
    digest: str
    damaged: dict[Path, str]


def save(run_dir: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Saves a training state as checkpoints/step_<step>.pt and drops older ones but for `keep`.

    Raises:
        OSError: If it cannot be written; those before it are still there.
    """
    path = run_dir / FOLDER / f"step_{step:09d}.pt"
    write_atomic(path, lambda file: torch.save(dict(state), file), sealed=True)
    for old in [p for p in _all(run_dir) if p <= path][:-keep]:
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
        FileNotFoundError: If there is no such file.
        Damaged: If it is torn, changed, or not a checkpoint of ours.
        ValueError: If it is whole, but of another version.
    """
    return load_newest(path, older=False).state


def load_newest(path: Path, older: bool) -> Found:
    """Reads a checkpoint, or with `older` the newest whole one that is not newer than it.

    Raises:
        ValueError: If there is none.
    """
    candidates = [p for p in reversed(_all(path.parent.parent)) if p <= path] if older else [path]
    damaged: dict[Path, str] = {}
    for candidate in candidates:
        try:
            digest = _check(candidate)
            return Found(candidate, _read(candidate), digest, damaged)
        except Damaged as error:
            if not older:
                raise
            damaged[candidate] = str(error)
    raise ValueError(
        f"no checkpoint in {path.parent} is whole ({'; '.join(damaged.values())}): start a new run "
        "with --resume never --overwrite true"
    )


def _check(path: Path) -> str:
    """The checksum of a whole checkpoint."""
    try:
        return check_seal(path)
    except Damaged as error:
        raise Damaged(
            f"{path} cannot be read as a checkpoint ({error}): it is not a checkpoint of "
            "bagssl_fast.train, or no longer whole; --resume auto takes the one before it"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint ({error})") from error
    if not isinstance(state, dict) or "identity" not in state:
        raise ValueError(f"{path} is not a checkpoint of bagssl_fast.train")
    return state


def set_aside(damaged: Iterable[Path]) -> dict[Path, Path]:
    """Renames damaged checkpoints, so that none counts as one any more: old name -> new name."""
    aside = {path: path.with_name(f"{path.name}.damaged") for path in damaged}
    for path, new in aside.items():
        path.replace(new)
    return aside


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


def changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """The options that differ: name -> "old -> new"."""
    return {
        key: f"{saved.get(key, '(absent)')} -> {current.get(key, '(absent)')}"
        for key in sorted({*saved, *current})
        if saved.get(key) != current.get(key)
    }


def compare(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses to resume a run under another configuration.

    Raises:
        ValueError: Naming every option that changed, old and new value.
    """
    changed = changes(saved, current)
    if changed:
        raise ValueError(
            "the configuration is not the one this run was started with ("
            + "; ".join(f"{key}: {values}" for key, values in changed.items())
            + "); set these back to resume, or start a new --run_dir"
        )
