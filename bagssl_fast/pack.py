"""Re-encodes a data set into ordinary tar shards: smaller images decode several times faster.

python -m bagssl_fast.pack SRC DST.tar --short-side 256 --quality 90
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str) -> int:
    """Bytes from "500M" or "2GB" (powers of 1000)."""
    number = text.upper().removesuffix("B")
    unit = number[-1:] if number[-1:] in "KMGT" else ""
    try:
        return int(float(number[: len(number) - len(unit)]) * _UNITS[unit])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write 500M or 2G") from None


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bagssl_fast.pack",
        description="Re-encode a data set into tar shards of smaller JPEGs.",
    )
    parser.add_argument("source", help="whatever open_source takes: folder, tar(s), array, demo")
    parser.add_argument("destination", type=Path, help="the tar to write")
    parser.add_argument("--short-side", type=int, default=256, help="0 keeps the size")
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--shard-size", type=parse_size, default=0, help="such as 1G; 0: one tar")
    parser.add_argument("--layout", default="auto", choices=["auto", "folder", "webdataset"])
    parser.add_argument("--num-threads", type=int, default=0, help="0: all CPUs")
    parser.add_argument("--on-error", default="raise", choices=["raise", "skip"])
    options = parser.parse_args(arguments)

    from bagssl_fast.data import open_source
    from bagssl_fast.data.packing import pack

    try:
        report = pack(
            open_source(options.source, on_error=options.on_error),
            options.destination,
            short_side=options.short_side,
            quality=options.quality,
            shard_size=options.shard_size,
            layout=options.layout,
            num_threads=options.num_threads,
            on_error=options.on_error,
        )
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    for name, reason in report.skipped:
        sys.stderr.write(f"left out: {name}: {reason}\n")
    sys.stdout.write(
        f"{report.images} images ({report.kept} as they were, {len(report.skipped)} left out), "
        f"{report.bytes_in / 1e6:.1f} MB -> {report.bytes_out / 1e6:.1f} MB, "
        f"{report.paths[0]}{' ...' if len(report.paths) > 1 else ''}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
