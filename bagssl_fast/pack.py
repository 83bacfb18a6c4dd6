"""Re-encode a data set into ordinary tar shards: smaller images decode several times faster.

bagssl pack SOURCE DESTINATION.tar --short_side 256 --quality 90
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bagssl_fast import arguments, locate
from bagssl_fast.exits import FAILED, WRONG_USAGE, errors_end, program
from bagssl_fast.terminal import say

SKIP = "--on_error skip"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Pack:
    """Re-encodes a data set into tar shards of smaller JPEGs, which decode several times faster.

    Args:
        source: A folder of images, a .tar (a glob or folder of them), .npy/.npz, a torchvision
            CIFAR/MNIST root, or demo.
        destination: The .tar to write; of several shards, name-000000.tar and so on.
        short_side: Images are scaled down to it, never up; 0 keeps their size.
        quality: Quality of the JPEGs, 1 to 100.
        shard_size: Size after which a new shard begins, such as 500M or 2G; 0 writes one tar.
        layout: folder (class/name.jpg), webdataset (key.jpg and key.cls), or auto: folders wherever
            they keep the numbers of the classes.
        labels: auto keeps the classes that the data has, none writes images without labels.
        num_threads: Threads; 0 takes every core this process may use.
        on_error: What a broken image does: raise stops, skip leaves it out and lists it.
        overwrite: Replace the destination where it exists, all of its shards.
    """

    source: str
    destination: Path
    short_side: int = 256
    quality: int = 90
    shard_size: str = "0"
    layout: Literal["auto", "folder", "webdataset"] = "auto"
    labels: Literal["auto", "none"] = "auto"
    num_threads: int = 0
    on_error: Literal["raise", "skip"] = "raise"
    overwrite: bool = False


def parse_size(text: str) -> int:
    """Bytes from "500M" or "2GB" (powers of 1000).

    Raises:
        ValueError: If it is not a size.
    """
    number = text.upper().removesuffix("B")
    unit = number[-1:] if number[-1:] in "KMGT" else ""
    try:
        return int(float(number[: len(number) - len(unit)]) * _UNITS[unit])
    except ValueError:
        raise ValueError(f"--shard_size {text} is not a size: write 500M or 2G") from None


def existing(destination: Path) -> list[Path]:
    """The files that a destination names: itself and its shards."""
    shard = re.compile(re.escape(destination.stem) + r"-\d{6}\.tar")
    beside = destination.parent.iterdir() if destination.parent.is_dir() else ()
    return sorted(p for p in beside if p.name == destination.name or shard.fullmatch(p.name))


@program
def main(argv: Sequence[str]) -> None:
    """The program."""
    with errors_end(WRONG_USAGE):
        options = arguments.read(Pack, argv, "pack")
        shard_size = parse_size(options.shard_size)
        locate.check_data(options.source)
        locate.check_tar(options.destination)
        old = existing(options.destination)
        if old and not options.overwrite:
            raise ValueError(
                f"{old[0]} exists{f' ({len(old)} files)' if len(old) > 1 else ''}: name another "
                "destination, or replace it with --overwrite true"
            )

    from bagssl_fast.data import open_source
    from bagssl_fast.data.packing import check, pack

    how: dict[str, Any] = {
        "short_side": options.short_side,
        "quality": options.quality,
        "shard_size": shard_size,
        "layout": options.layout,
        "on_error": options.on_error,
    }
    with errors_end(WRONG_USAGE, SKIP):
        check(options.destination, **how)
        source = open_source(options.source, labels=options.labels, on_error=options.on_error)
    with errors_end(FAILED, SKIP):
        report = pack(source, options.destination, num_threads=options.num_threads, **how)
    for path in set(old) - set(report.paths):
        path.unlink()
    for name, reason in report.skipped:
        sys.stderr.write(f"left out: {name}: {reason}\n")
    say(
        f"{report.images} images ({report.kept} as they were, {len(report.skipped)} left out), "
        f"{report.bytes_in / 1e6:.1f} MB -> {report.bytes_out / 1e6:.1f} MB, "
        f"{report.paths[0]}{' ...' if len(report.paths) > 1 else ''}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
