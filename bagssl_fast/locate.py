"""Where data sets and runs are: paths checked without opening what they name, without torch."""

from __future__ import annotations

import difflib
import glob
import os
from pathlib import Path

from bagssl_fast.files import is_leftover

LOCK = ".lock"  # in a run directory: held by the process that trains there
KINDS = (
    '"demo", a folder of images, a .tar (a list, a glob or a folder of them), a .npy or .npz '
    "array, or the folder of torchvision's CIFAR-10, CIFAR-100 or MNIST"
)
SPLITS = ("train", "test")
TESTS = ("val", "valid", "validation", "test")  # names of folders beside one called train
TORCHVISION = ("cifar-10-batches-py", "cifar-100-python", "MNIST", "raw")


def split_suffix(data: str) -> tuple[str, str | None]:
    """`x:test` -> ("x", "test"); ("x", None) without a split, or if a file has that very name."""
    for split in SPLITS:
        if data.endswith(f":{split}") and not os.path.exists(data):
            return data[: -len(split) - 1], split
    return data, None


def matches(path: str) -> list[str]:
    """The path itself if it exists, else what it matches as a glob pattern, sorted.

    Raises:
        FileNotFoundError: If there is nothing.
    """
    if os.path.exists(path):
        return [path]
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise FileNotFoundError(
            f"{path}: there is no such file or folder{_near(path)}; give {KINDS}"
        )
    return found


def check_data(data: str) -> None:
    """Refuses a data path that names nothing, as `data.open_source` would.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it holds a training set beside a test set.
    """
    path, _ = split_suffix(data)
    if path == "demo":
        return
    matches(path)
    names = os.listdir(path) if os.path.isdir(path) else []
    if not any(name.endswith(".tar") or name in TORCHVISION for name in names):
        check_one_set(path)


def check_one_set(folder: str) -> None:
    """Refuses a folder whose subfolders are a training set and a test set.

    Raises:
        ValueError: Naming the one to train on.
    """
    if not os.path.isdir(os.path.join(folder, "train")):
        return
    test = next((name for name in TESTS if os.path.isdir(os.path.join(folder, name))), None)
    if test is not None:
        raise ValueError(
            f"{folder} holds a training set and a test set, train/ and {test}/: give "
            f"{os.path.join(folder, 'train')}, and {os.path.join(folder, test)} as --test_data"
        )


def check_tar(destination: Path) -> None:
    """Refuses a path where no tar can be written.

    Raises:
        ValueError, FileNotFoundError: Saying what is expected.
    """
    if destination.suffix != ".tar":
        raise ValueError(f"{destination}: the destination's name must end in .tar")
    if not destination.parent.is_dir():
        raise FileNotFoundError(f"{destination.parent}: there is no such folder; make it first")


def check_described(folder: Path) -> None:
    """Refuses what is neither a run directory nor a folder that `bagssl export` wrote.

    Raises:
        FileNotFoundError: Naming what is missing.
    """
    give = (
        "give the run directory that `bagssl train` named in its first line, or a folder that "
        "`bagssl export` wrote"
    )
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a directory{_near(str(folder))}: {give}")
    if not any((folder / name).is_file() for name in ("config.yaml", "config.json")):
        raise FileNotFoundError(
            f"{folder} is not a run directory, it holds neither config.yaml nor config.json: {give}"
        )


def check_run(folder: Path) -> None:
    """As `check_described`, and refuses one without a trained model.

    Raises:
        FileNotFoundError: Naming what is missing.
    """
    check_described(folder)
    if (folder / "model.safetensors").is_file():
        return
    recipe = folder / "config.yaml"
    how = f"copy it from where {folder / 'config.json'} came from"
    if recipe.is_file():
        how = (
            "its training has not reached a checkpoint; resume it with bagssl train --config "
            f"{recipe} --run_dir {folder} --resume auto"
        )
    raise FileNotFoundError(f"{folder} holds no model.safetensors: {how}")


def check_run_dir(run_dir: Path, resume: str, overwrite: bool) -> None:
    """Refuses a directory to train in that holds what nobody asked to touch.

    Raises:
        ValueError: If it is a file, or not empty and neither `resume` nor `overwrite` is given.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"--run_dir {run_dir} is a file; name a directory")
    if resume != "never" or not run_dir.is_dir():
        return
    if all(path.name == LOCK or is_leftover(path.name) for path in run_dir.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"--run_dir {run_dir} is not empty; --resume auto resumes it, --overwrite true "
            "deletes what it holds"
        )
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(
            f"--overwrite true: {run_dir} holds files but no config.yaml, so it is not a run "
            "directory; delete it yourself or name another"
        )


def check_resume(resume: str) -> None:
    """Refuses a checkpoint or run directory to resume that is not there.

    Raises:
        ValueError: Saying what can be given.
    """
    if resume not in ("auto", "never") and not os.path.exists(resume):
        raise ValueError(
            f"--resume {resume}: no checkpoint there{_near(resume)}; give a file of a checkpoints/ "
            "folder, a run directory, auto or never"
        )


def _near(path: str) -> str:
    """A guess at the path that was meant, among its neighbors."""
    folder, name = os.path.split(path.rstrip(os.sep))
    names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    near = [] if os.path.exists(path) else difflib.get_close_matches(name, names, 1)
    return f" (did you mean {os.path.join(folder, near[0])}?)" if near else ""
