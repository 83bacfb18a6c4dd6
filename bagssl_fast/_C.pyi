"""The C++ data path of bagssl_fast."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bagssl_fast.augment import Augment

HAS_JPEG: bool
MAX_PIXELS: int
MAX_BYTES: int
MAX_SCANS: int
HELD_BATCHES: int

_Decoder = Callable[[memoryview, int], NDArray[np.uint8]] | None

def available_cpus() -> int: ...
def quota_cpus(root: str) -> int: ...
def simd_levels() -> list[str]: ...
def simd_level() -> str: ...
def force_simd_level(name: str | None) -> None: ...
def count_scans(file: bytes) -> int: ...
def index_tar(path: bytes) -> dict[str, Any]: ...
def decode_many(
    files: Sequence[bytes], threads: int, decoder: _Decoder, max_pixels: int
) -> int: ...
def decode(
    file: bytes,
    decoder: _Decoder,
    max_pixels: int,
    box: tuple[int, int, int, int] | None = None,
    denominator: int = 1,
    max_scans: int = ...,
) -> NDArray[np.uint8]: ...

class Source:
    def __len__(self) -> int: ...
    def read(self, index: int, max_bytes: int = ...) -> bytes | NDArray[np.uint8]: ...
    def decode(self, index: int, decoder: _Decoder, max_pixels: int) -> NDArray[np.uint8]: ...

class ShardSource(Source):
    def __init__(
        self,
        paths: Sequence[bytes],
        shard: NDArray[np.int32],
        offsets: NDArray[np.int64],
        sizes: NDArray[np.int64],
    ) -> None: ...

class FileSource(Source):
    def __init__(self, paths: Sequence[bytes]) -> None: ...

class ArraySource(Source):
    def __init__(self, images: NDArray[np.uint8]) -> None: ...

class ArrayFileSource(Source):
    def __init__(self, path: bytes, offset: int, shape: tuple[int, ...]) -> None: ...

class FunctionSource(Source):
    def __init__(self, read: Callable[[int], bytes | NDArray[np.uint8]], length: int) -> None: ...

class Loader:
    def __init__(
        self,
        *,
        source: Source,
        augments: Sequence[Augment],
        patches: int,
        sampler: str,
        dtype: str,
        seed: int,
        threads: int,
        batches_ahead: int,
        skip_bad: bool,
        dct_scaling: bool,
        max_pixels: int,
        max_bytes: int,
        max_scans: int,
        cut: bool,
        slots: Sequence[NDArray[np.uint8]],
        subset: NDArray[np.int64],
        decoder: _Decoder,
    ) -> None: ...
    def start(
        self,
        epoch: int,
        rows: NDArray[np.int64],
        batch_ends: NDArray[np.int64],
        first_batch: int,
    ) -> int: ...
    def next(self, run: int) -> tuple[int, NDArray[np.int64], int, int, str] | None: ...
    def move_pixels(self, run: int, slot: int, memory: NDArray[np.uint8]) -> None: ...
    def set_slot(self, slot: int, memory: NDArray[np.uint8]) -> None: ...
    def set_pixels(self, slot: int, memory: NDArray[np.uint8]) -> None: ...
    def stop(self, run: int = -1, patience: float = 5.0) -> list[int]: ...
    def after_fork(self) -> None: ...
    @property
    def skipped(self) -> list[tuple[int, str]]: ...

# float32, or the bits of bfloat16
Maps = NDArray[np.float32] | NDArray[np.uint16]

def conv_bn_relu(
    x: Maps,
    center: NDArray[np.float32] | None,
    scale: NDArray[np.float32] | None,
    shift: NDArray[np.float32] | None,
    weight: NDArray[np.float32],
    stride: int,
    padding: int,
    y: Maps,
    mean: NDArray[np.float32] | None,
    var: NDArray[np.float32] | None,
    num_threads: int,
) -> None: ...
def conv_bn_relu_backward(
    dy: Maps,
    y: Maps,
    mean: NDArray[np.float32] | None,
    dmean: NDArray[np.float32] | None,
    dvar: NDArray[np.float32] | None,
    x: Maps,
    center: NDArray[np.float32] | None,
    scale: NDArray[np.float32] | None,
    shift: NDArray[np.float32] | None,
    weight: NDArray[np.float32],
    stride: int,
    padding: int,
    dx: Maps | None,
    dscale: NDArray[np.float32] | None,
    dshift: NDArray[np.float32] | None,
    dweight: NDArray[np.float32] | None,
    num_threads: int,
) -> None: ...
def relu_mean(
    x: Maps,
    center: NDArray[np.float32],
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
    means: NDArray[np.float32],
    num_threads: int,
) -> None: ...
def relu_mean_backward(
    dmeans: NDArray[np.float32],
    x: Maps,
    center: NDArray[np.float32],
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
    dx: Maps,
    dscale: NDArray[np.float32],
    dshift: NDArray[np.float32],
    num_threads: int,
) -> None: ...
def add_relu(
    y: Maps,
    center: NDArray[np.float32],
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
    identity: Maps,
    identity_center: NDArray[np.float32] | None,
    identity_scale: NDArray[np.float32] | None,
    identity_shift: NDArray[np.float32] | None,
    relu: bool,
    out: Maps,
    num_threads: int,
) -> None: ...
def add_relu_backward(
    dout: Maps,
    out: Maps,
    y: Maps,
    center: NDArray[np.float32],
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
    identity: Maps,
    identity_center: NDArray[np.float32] | None,
    identity_scale: NDArray[np.float32] | None,
    identity_shift: NDArray[np.float32] | None,
    relu: bool,
    dy: Maps,
    dscale: NDArray[np.float32],
    dshift: NDArray[np.float32],
    didentity: Maps,
    didentity_scale: NDArray[np.float32] | None,
    didentity_shift: NDArray[np.float32] | None,
    num_threads: int,
) -> None: ...
def auto_blur_kernel(height: int, width: int) -> int: ...
def check_augment(augment: Augment) -> None: ...
def draw_views(
    augments: Sequence[Augment],
    sizes: NDArray[np.int64],
    images: NDArray[np.int64],
    *,
    patches: int,
    seed: int,
    epoch: int,
) -> NDArray[np.float32]: ...
def grid_views(
    augment: Augment, sizes: NDArray[np.int64], *, patches: int
) -> NDArray[np.float32]: ...
def center_views(sizes: NDArray[np.int64]) -> NDArray[np.float32]: ...
def patch_views(
    images: Sequence[NDArray[np.uint8]],
    params: NDArray[np.float32],
    *,
    size: tuple[int, int],
    interpolation: str = "bilinear",
    blur_kernel: int = 0,
    mean: Sequence[float] = (0, 0, 0),
    std: Sequence[float] = (1, 1, 1),
    dtype: str = "float32",
    out: NDArray[Any] | None = None,
    num_threads: int = 1,
) -> NDArray[Any]: ...
def bag_pool(
    x: NDArray[Any],
    *,
    mean: NDArray[Any],
    distance: NDArray[Any] | None = None,
    norm: NDArray[Any] | None = None,
    dot: NDArray[Any] | None = None,
    num_threads: int = 0,
) -> None: ...
def bag_pool_backward(
    x: NDArray[Any],
    *,
    dx: NDArray[Any],
    dmean: NDArray[Any],
    mean: NDArray[Any],
    of_x: NDArray[Any] | None = None,
    of_mean: NDArray[Any] | None = None,
    weight: NDArray[Any] | None = None,
    direction: NDArray[Any] | None = None,
    unit_scale: NDArray[Any] | None = None,
    num_threads: int = 0,
) -> None: ...
def patch_grid(
    pixels: NDArray[Any],
    *,
    down: tuple[Any, ...],
    across: tuple[Any, ...],
    slots: NDArray[np.int64],
    weight: NDArray[Any],
    bias: NDArray[Any] | None = None,
    relu: bool,
    y: NDArray[Any],
    num_threads: int = 0,
) -> None: ...
def patch_grid_backward(
    pixels: NDArray[Any],
    *,
    down: tuple[Any, ...],
    across: tuple[Any, ...],
    slots: NDArray[np.int64],
    dy: NDArray[Any],
    y: NDArray[Any] | None = None,
    dweight: NDArray[Any],
    dbias: NDArray[Any],
    num_threads: int = 0,
) -> None: ...
def patch_rows(
    pixels: NDArray[np.uint8],
    *,
    offsets: NDArray[np.int64],
    lines: int,
    stride: int,
    center: int,
    out: NDArray[Any],
    num_threads: int = 0,
) -> None: ...
