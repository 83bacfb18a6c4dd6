# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""One step of LARS for any number of tensors in three launches (You et al. 2017).

With weights w, gradient g, momentum buffer m and u = g + decay w, for each tensor

    vicreg   r = eta |w| / |u|;                                     m = mu m + r u;  w -= lr m
    emp      r = min(eta |w| / ((|g| + decay |w| + 1e-8) lr), 1);   m = mu m + r u;
             w -= lr (r u + mu m)

and r = 1 where a norm is 0, or for a group that is not adapted (one launch then). The forms are
those of VICReg (2105.04906) and of EMP-SSL (2304.03977).

A table holds the addresses of all tensors; a program takes one chunk of one of them. Launches: sums
of squares by chunk; r by tensor, from its chunks in their order (no atomics); the update.
Bytes: 8 n for the norms and 20 n for the update of n weights. torch's multi-tensor ops take 60 n,
and one launch per tensor for factors that differ by tensor.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ._common import INTERPRET, device_guard, launch_options

BLOCK = 1024  # elements at a time: 8 of each operand per thread of 128
CHUNK = 16 * BLOCK  # elements of a program


@triton.jit
def _pointer(address, start, ALIGNED: tl.constexpr):
    ptr = address.to(tl.pointer_type(tl.float32)) + start
    return tl.multiple_of(ptr, 16) if ALIGNED else ptr


@triton.jit
def _chunk(addresses_ptr, chunks_ptr, ALIGNED: tl.constexpr):
    """Of this program's chunk: tensor, elements from its start on, and pointers to w, g, m."""
    pid = tl.program_id(0)
    tensor = tl.load(chunks_ptr + 3 * pid)
    start = tl.load(chunks_ptr + 3 * pid + 1)
    left = tl.load(chunks_ptr + 3 * pid + 2)
    addresses_ptr += 3 * tensor
    w_ptr = _pointer(tl.load(addresses_ptr), start, ALIGNED)
    g_ptr = _pointer(tl.load(addresses_ptr + 1), start, ALIGNED)
    m_ptr = _pointer(tl.load(addresses_ptr + 2), start, ALIGNED)
    return tensor, left, w_ptr, g_ptr, m_ptr


@triton.jit
def _load(ptr, offs, left, FULL: tl.constexpr):
    """A block; a full one without a mask, whose unknown end would split loads of 16 bytes."""
    return tl.load(ptr + offs) if FULL else tl.load(ptr + offs, mask=offs < left, other=0.0)


@triton.jit
def _squares(
    w_ptr, g_ptr, left, decay,
    FULL: tl.constexpr, EMP: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    w_square = tl.zeros((BLOCK,), tl.float32)
    u_square = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CHUNK, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        w = _load(w_ptr, offs, left, FULL)
        u = _load(g_ptr, offs, left, FULL)
        if not EMP:
            u += decay * w
        w_square += w * w
        u_square += u * u
    return tl.sum(w_square), tl.sum(u_square)


@triton.jit
def _lars_norms_kernel(
    addresses_ptr,  # [T, 3]: of w, g, m
    chunks_ptr,  # [C, 3]: tensor, first element, elements from there on
    square_partial_ptr,  # [C, 2]: of w, and of u or g
    decay,
    EMP: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, left, w_ptr, g_ptr, _ = _chunk(addresses_ptr, chunks_ptr, ALIGNED)
    if left >= CHUNK:
        w_square, u_square = _squares(w_ptr, g_ptr, left, decay, True, EMP, CHUNK, BLOCK)
    else:
        w_square, u_square = _squares(w_ptr, g_ptr, left, decay, False, EMP, CHUNK, BLOCK)
    pid = tl.program_id(0)
    tl.store(square_partial_ptr + 2 * pid, w_square)
    tl.store(square_partial_ptr + 2 * pid + 1, u_square)


@triton.jit
def _lars_ratio_kernel(
    square_partial_ptr,  # [C, 2]
    ends_ptr,  # [T + 1]: chunk after a tensor's last one, behind a 0
    ratio_ptr,  # [T]
    lr,
    decay,
    eta,
    EMP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor = tl.program_id(0)
    first, end = tl.load(ends_ptr + tensor), tl.load(ends_ptr + tensor + 1)
    w_square = tl.zeros((BLOCK,), tl.float32)
    u_square = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        w_square += tl.load(square_partial_ptr + 2 * offs, mask=offs < end, other=0.0)
        u_square += tl.load(square_partial_ptr + 2 * offs + 1, mask=offs < end, other=0.0)
    w_norm, u_norm = tl.sqrt(tl.sum(w_square)), tl.sqrt(tl.sum(u_square))
    if EMP:
        ratio = eta * w_norm / (u_norm + decay * w_norm + 1e-8)
        ratio = tl.minimum(ratio / tl.maximum(lr, 1e-30), 1.0)
    else:
        ratio = eta * w_norm / u_norm
    alive = (w_norm > 0.0) & (u_norm > 0.0)
    tl.store(ratio_ptr + tensor, tl.where(alive, ratio, 1.0))


@triton.jit
def _update(
    w_ptr, g_ptr, m_ptr, left, ratio, lr, momentum, decay,
    FULL: tl.constexpr, EMP: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for start in range(0, CHUNK, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        w = _load(w_ptr, offs, left, FULL)
        u = ratio * (_load(g_ptr, offs, left, FULL) + decay * w)
        m = momentum * _load(m_ptr, offs, left, FULL) + u
        if EMP:
            w -= lr * (u + momentum * m)
        else:
            w -= lr * m
        if FULL:
            tl.store(m_ptr + offs, m)
            tl.store(w_ptr + offs, w)
        else:
            tl.store(m_ptr + offs, m, mask=offs < left)
            tl.store(w_ptr + offs, w, mask=offs < left)


@triton.jit
def _lars_update_kernel(
    addresses_ptr,  # [T, 3]
    chunks_ptr,  # [C, 3]
    ratio_ptr,  # [T]
    lr,
    momentum,
    decay,
    EMP: tl.constexpr,
    ADAPT: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, left, w_ptr, g_ptr, m_ptr = _chunk(addresses_ptr, chunks_ptr, ALIGNED)
    ratio = 1.0
    if ADAPT:
        ratio = tl.load(ratio_ptr + tensor)
    if left >= CHUNK:
        _update(
            w_ptr, g_ptr, m_ptr, left, ratio, lr, momentum, decay, True, EMP, CHUNK, BLOCK
        )  # fmt: skip
    else:
        _update(
            w_ptr, g_ptr, m_ptr, left, ratio, lr, momentum, decay, False, EMP, CHUNK, BLOCK
        )  # fmt: skip


@lru_cache(maxsize=16)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunks [C, 3] of tensors of these sizes, and where each tensor's chunks end [T + 1]."""
    rows, ends = [], [0]
    for tensor, size in enumerate(sizes):
        rows += [(tensor, start, size - start) for start in range(0, size, CHUNK)]
        ends.append(len(rows))
    table = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
    return table.to(device), torch.tensor(ends, dtype=torch.int64).to(device)


def _to_device(addresses: list[int], device: torch.device) -> torch.Tensor:
    """Gradients move every step: their addresses go there without waiting for the device."""
    table = torch.tensor(addresses, dtype=torch.int64)
    return (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)


def serves(*tensors: Sequence[torch.Tensor]) -> bool:
    """Whether `lars` takes weights, gradients and momenta: float32 tensors without gaps on one GPU,
    each triple alike in memory."""
    first = tensors[0][0]
    return (first.is_cuda or INTERPRET) and all(
        t.dtype == torch.float32 and t.device == first.device and t.stride() == triple[0].stride()
        for triple in zip(*tensors, strict=True)
        for t in triple
    ) and all(_is_dense(t) for t in tensors[0])  # fmt: skip


def _is_dense(x: torch.Tensor) -> bool:
    """Whether the elements fill their stretch of memory, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def lars(
    weights: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    eta: float,
    adapt: bool,
    emp: bool,
) -> None:
    """Changes weights and momenta in place.

    Args:
        weights, grads, momenta: T tensors each, as `serves` asks.
        lr, momentum, weight_decay, eta: As of the formulas.
        adapt: Whether to scale each tensor's step by r.
        emp: EMP-SSL's form rather than VICReg's.
    """
    triples = list(zip(weights, grads, momenta, strict=True))
    addresses = [t.data_ptr() for triple in triples for t in triple]
    device = weights[0].device
    chunks, ends = _chunks(tuple(w.numel() for w in weights), device)
    if not len(chunks):
        return
    table = _to_device(addresses, device)
    square = torch.empty((len(chunks), 2), dtype=torch.float32, device=device)
    ratio = torch.empty((len(weights),), dtype=torch.float32, device=device)
    shared = {"ALIGNED": all(a % 16 == 0 for a in addresses), "CHUNK": CHUNK, "BLOCK": BLOCK}
    with device_guard(weights[0]):
        if adapt:
            _lars_norms_kernel[(len(chunks),)](
                addresses_ptr=table,
                chunks_ptr=chunks,
                square_partial_ptr=square,
                decay=weight_decay,
                EMP=emp,
                **shared,
                **launch_options(4),
            )
            _lars_ratio_kernel[(len(weights),)](
                square_partial_ptr=square,
                ends_ptr=ends,
                ratio_ptr=ratio,
                lr=lr,
                decay=weight_decay,
                eta=eta,
                EMP=emp,
                BLOCK=256,
                **launch_options(2),
            )
        _lars_update_kernel[(len(chunks),)](
            addresses_ptr=table,
            chunks_ptr=chunks,
            ratio_ptr=ratio,
            lr=lr,
            momentum=momentum,
            decay=weight_decay,
            EMP=emp,
            ADAPT=adapt,
            **shared,
            **launch_options(4),
        )
