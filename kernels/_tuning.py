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
    """Tile of a pass over a matrix: `rows` x `cols` elements at a time, `repeat` times down."""

    rows: int
    cols: int
    num_warps: int
    repeat: int = 1


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def row_warps(width: int) -> int:
    """Warps for one row held in registers: 8 values per thread (one or two 16-byte loads)."""
    return min(max(width // 256, 1), 16)


def column_strip(rows: int, cols: int, programs: int) -> Strip:
    """Strip for statistics over rows: tall, since every strip leaves two floats per column behind.

    128 rows keep those under 7% of the bytes read even of 16-bit input; where that leaves
    processors idle, narrower and then shorter strips (the whole input is small then).
    """
    strip_rows, strip_cols = min(128, max(next_power_of_2(rows), 16)), 64
    if -(-rows // strip_rows) * -(-cols // strip_cols) < programs:
        strip_cols = 32
    # 16 values per thread: a strip needs three copies of them, and many warps hide the loads.
    return Strip(strip_rows, strip_cols, num_warps=max(strip_rows * strip_cols // 512, 1))


def sum_strip(rows: int, cols: int, programs: int) -> Strip:
    """Strip for sums over rows that each element of a tile adds up down `repeat` tiles.

    The reduction at the end (two shuffles per lane and row of warps) and the floats that a program
    leaves behind are then those of up to 512 rows; fewer where that leaves processors idle.
    16 values per thread: two sums of each, and loads of 16 bytes.
    """
    strip_cols = 64 if cols > 32 else 32
    strip_rows = 2048 // strip_cols
    repeat = 512 // strip_rows
    while repeat > 1 and -(-rows // (strip_rows * repeat)) * -(-cols // strip_cols) < 2 * programs:
        repeat //= 2
    return Strip(strip_rows, strip_cols, num_warps=4, repeat=repeat)


def gram_tile(is_float32: bool) -> Tile:
    """Tile of a symmetric Gram. Square, so that (i, j) serves (j, i); 64 since Grams are small.

    float32 is three TF32 products of split operands: a depth of 32 would spill registers.
    """
    if is_float32:
        return Tile(64, 64, depth=16, num_warps=4, num_stages=3)
    return Tile(64, 64, depth=64, num_warps=4, num_stages=3)


def gram_split(tiles: int, depth: int, tile: Tile, programs: int) -> int:
    """Into how many parts to cut the summed axis, so that few tiles still fill the processors."""
    most = max(depth // (4 * tile.depth), 1)
    return max(min(programs // max(tiles, 1), most, 16), 1)


def grad_tile(is_float32: bool) -> Tile:
    """Tile of a gradient, Gram times z; three TF32 products leave registers for 64 x 64 x 16."""
    if is_float32:
        return Tile(64, 64, depth=16, num_warps=4, num_stages=3)
    return Tile(64, 128, depth=64, num_warps=8, num_stages=3)


def row_strip(rows: int, cols: int, programs: int) -> Strip:
    """Strip for an elementwise pass: rows as wide as 16-byte loads of neighboring threads reach.

    A program goes down several strips, so that the columns' parameters (four to six floats each)
    are loaded once per 128 rows: under 7% of the bytes of 16-bit input.
    """
    strip_cols = min(max(next_power_of_2(cols), 32), 256)
    strip_rows = 4096 // strip_cols
    repeat = max(128 // strip_rows, 1)
    while repeat > 1 and -(-rows // (strip_rows * repeat)) * -(-cols // strip_cols) < 2 * programs:
        repeat //= 2
    return Strip(strip_rows, strip_cols, num_warps=4, repeat=repeat)


def embed_tile(is_float32: bool) -> Tile:
    """Tile of patch_embed: rows of patches times features. Bytes are gathered one by one, so that
    128 rows per program (each pixel is loaded once per 128 features) matter more than depth."""
    if is_float32:
        return Tile(64, 64, depth=32, num_warps=4, num_stages=2)
    return Tile(128, 128, depth=32, num_warps=8, num_stages=3)


def embed_grad_tile(is_float32: bool) -> Tile:
    """Tile of patch_embed's dW: features times pixels, summed over patches."""
    if is_float32:
        return Tile(64, 64, depth=32, num_warps=4, num_stages=2)
    return Tile(128, 64, depth=32, num_warps=4, num_stages=3)


def embed_grad_split(tiles: int, rows: int, tile: Tile, programs: int) -> int:
    """Into how many parts to cut the patches, whose partial dW are then added in order."""
    most = max(rows // (8 * tile.depth), 1)
    return max(min(2 * programs // max(tiles, 1), most, 64), 1)


@dataclass(frozen=True)
class ViewTiles:
    """Tiles of a patch view: output `height` x `width`, source block `block_y` x `block_x`."""

    height: int
    width: int
    block_y: int
    block_x: int
    num_warps: int
    programs_per_sm: int


def view_tiles(height: int, width: int, lanes: int) -> ViewTiles:
    """A patch in registers up to 64 x 64; above, tiles of 32 x 32, whose loops need registers too.

    Source blocks of 16 x 16, the least a tensor core takes: with larger ones the 64 x 64 tile's
    sums, products and float64 weights no longer fit 128 registers of 512 threads. Tiles of 32 x 64
    of large patches spill on sm_90, sm_100 and gfx942. `lanes` is the number of threads of a warp.
    """
    tile_h = max(next_power_of_2(height), 16)
    tile_w = max(next_power_of_2(width), 16)
    threads = min(max(tile_h * tile_w // 8, 128), 512)
    if tile_h > 64 or tile_w > 64:
        tile_h, tile_w, threads = min(tile_h, 32), min(tile_w, 32), 256
    return ViewTiles(tile_h, tile_w, 16, 16, threads // lanes, programs_per_sm=2)
