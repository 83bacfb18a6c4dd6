"""Launch configurations as data: tile sizes, warps and stages with the reason for each.

No autotuning at run time: a start is predictable, and the interpreter takes exactly one
configuration anyway. Registers, spills and shared memory of every row are read back from the
compiled binaries by `bench/kernel_report.py`, which is where the reasons come from.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Tile of a matrix product: `rows` x `cols` outputs, `depth` of the summed axis per step."""

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Strip:
    """Tile of a pass over a matrix: `rows` x `cols` elements per program."""

    rows: int
    cols: int
    num_warps: int


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def row_warps(width: int) -> int:
    """Warps for one row held in registers: 8 values per thread (one or two 16-byte loads)."""
    return min(max(width // 256, 1), 16)
