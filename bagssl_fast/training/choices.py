"""What each `auto` of a run becomes: chosen once, said, and kept in its checkpoints.

A resumed run takes what was chosen when it began, on whatever machine: another choice computes
other last bits. An option that is not `auto` is taken as it is given.

`precision`: bf16 where a GPU computes it. On a CPU, bf16 where the processor itself multiplies it
and a short timing of this model on a batch of this size finds it faster. Else fp32.

`compile`: true for runs of `LONG` steps and more. Compilation takes about a minute and saves up to
a quarter of a step, which shorter runs do not earn back. False where the encoder's time goes into
our ops on a CPU: torch.compile calls those as they are.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from bagssl_fast import machine, ops
from bagssl_fast._extension import _C
from bagssl_fast.augment import differing
from bagssl_fast.config import Config
from bagssl_fast.distributed.ranks import Ranks
from bagssl_fast.terminal import say
from bagssl_fast.training.step import PRECISIONS, no_trace, trial

LONG = 1000  # steps that pay for a compilation
TIMED = 100  # steps that pay for timing two precisions
KEPT = "as the run began"
FUSED = ("patchnet", "resnet18", "resnet50")  # encoders whose time goes into our ops on a CPU


@dataclass(frozen=True)
class Choices:
    """What a run computes with.

    Args:
        device: cpu or cuda.
        precision: fp32, bf16 or fp16.
        compile: Whether torch.compile compiles the model.
        dtype: Type of the patches.
        views: Where patches are cut, host or device.
        ops: The implementation of each op on this device.
        simd: SIMD level of the C++ loops.
        why: Reasons, by field, of what `auto` chose.
    """

    device: str
    precision: str
    compile: bool
    dtype: str
    views: str
    ops: dict[str, str]
    simd: str
    why: dict[str, str] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """What checkpoints and env.json keep."""
        return {name: value for name, value in vars(self).items() if name != "why"}

    def __str__(self) -> str:
        """What a run says of it."""
        because = {name: f" (auto: {reason})" for name, reason in self.why.items()}
        return (
            f"precision {self.precision}{because.get('precision', '')}, "
            f"compile {str(self.compile).lower()}{because.get('compile', '')}, "
            f"patches cut on the {self.views}, C++ loops {self.simd}"
        )


def choose(
    config: Config,
    me: Ranks,
    kept: Mapping[str, Any] | None,
    steps: int,
    bf16_is_faster: Callable[[], tuple[bool, str]],
) -> Choices:
    """Chooses for a run.

    Args:
        config: What was asked for.
        me: This process; all take what rank 0 chooses.
        kept: `Choices.state` of the run to resume.
        steps: Of the whole run.
        bf16_is_faster: Times both precisions on a CPU: whether bf16 is, and both times in words.

    Raises:
        ValueError: If what the run began with cannot be had here.
    """
    device, why = me.device.type, dict[str, str]()
    if kept is not None:
        kept = _still_possible(config, device, kept)
    simd = _simd_level(kept)
    kept = kept or {}
    precision: str = config.precision
    compiled: bool | str = config.compile
    if precision == "auto":
        precision, why["precision"] = (
            (kept["precision"], KEPT)
            if "precision" in kept
            else _precision(me, steps, bf16_is_faster)
        )
    if compiled == "auto":
        compiled, why["compile"] = (
            (kept["compile"], KEPT)
            if "compile" in kept
            else _compile(config, device, precision, steps)
        )
    dtype, views = config.loader.dtype, config.loader.views
    if dtype == "auto":
        half = precision == "bf16" and device == "cuda"
        dtype = kept.get("dtype", "bfloat16" if half else "float32")
    if views == "auto":
        views = kept.get("views", _views(config, device))
    if precision != "bf16" and simd in ("avx512_bf16", "amx"):
        simd = "avx512"  # those above differ for bfloat16 alone: resume it on more machines
    cells = {op: ops.cell(op, device) for op in ops.DISPATCH}
    changed = [op for op, cell in kept.get("ops", {}).items() if cells.get(op) != cell]
    if config.impl == "auto" and changed:
        raise ValueError(
            f"the run began with other implementations of {', '.join(changed)} than this version "
            f"of bagssl_fast takes: resume it with the version that its env.json names, or give "
            f"--impl {device} to take those of this one, which differ in the last bits"
        )
    return Choices(device, precision, bool(compiled), dtype, views, cells, simd, why)


def _still_possible(config: Config, device: str, kept: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of what a run began with, what holds on this device.

    Raises:
        ValueError: If `auto` means the run's own device or precision and it is not here.
    """
    if kept["device"] != device:
        if config.device == "auto":
            raise ValueError(
                f"the run began on {kept['device']}, and --device auto takes {device} here: give "
                f"--device {kept['device']} where there is one, or --device {device} to continue "
                "on it, which does not compute the same bits"
            )
        return {"precision": kept["precision"]}  # the rest was chosen for the other device
    if kept["precision"] == "bf16" and config.precision == "auto" and not computes_bf16(device):
        raise ValueError(
            f"the run began in bf16, which the {device} of this machine does not compute itself: "
            "resume it where that is so, or give --precision bf16 to have it emulated, slowly and "
            "with other last bits"
        )
    return kept


def _simd_level(kept: Mapping[str, Any] | None) -> str:
    """Puts the SIMD level of the run in force, unless BAGSSL_SIMD names one.

    Raises:
        ValueError: If this processor does not have it.
    """
    level = (kept or {}).get("simd")
    if level is not None and "BAGSSL_SIMD" not in os.environ and level not in _C.simd_levels():
        mine = _C.simd_levels()[-1]
        raise ValueError(
            f"the run began with {level} loops, and this machine has {mine} at most: resume it on "
            f"a machine like the first, or set BAGSSL_SIMD={mine} to continue here, with other "
            "last bits"
        )
    _C.force_simd_level(None if "BAGSSL_SIMD" in os.environ else level)
    return str(_C.simd_level())


def computes_bf16(device: str) -> bool:
    """Whether the device computes bfloat16 itself, rather than emulates it."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return machine.computes_bf16(machine.cpu_flags())


def _precision(
    me: Ranks, steps: int, bf16_is_faster: Callable[[], tuple[bool, str]]
) -> tuple[str, str]:
    device = me.device.type
    if not computes_bf16(device):
        return "fp32", f"this {device} does not compute bf16 itself"
    if device == "cuda":
        return "bf16", "this GPU computes it"
    if steps < TIMED:
        return "fp32", f"{steps} steps are too few to time bf16"
    faster, times = bf16_is_faster()
    return ("bf16" if me.from_main("bf16" if faster else "fp32") == "bf16" else "fp32"), times


def _compile(config: Config, device: str, precision: str, steps: int) -> tuple[bool, str]:
    if steps < LONG:
        return False, f"{steps} steps do not earn back the compilation, {LONG} do"
    fused = config.encoder.name in FUSED and ops.cell("conv_bn_relu", device) == "cpu"
    if fused and precision != "fp16":  # in which the reference runs, in torch's own ops
        return False, f"{config.encoder.name} runs on fused ops, which stay as they are"
    return True, f"{steps} steps earn back the compilation"


def _views(config: Config, device: str) -> str:
    odd = config.augment_odd
    augments = (config.augment,) if odd is None else (config.augment, odd)
    by_kernel = device == "cuda" and config.impl in ("auto", "cuda")
    by_kernel = by_kernel and find_spec("triton") is not None and not differing(augments)
    return "device" if by_kernel else "host"


def time_precisions(model: nn.Module, loss: nn.Module, patches: Tensor) -> tuple[bool, str]:
    """Whether bf16 is faster than fp32, and both times in words: medians of three, interleaved."""
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    with no_trace(model, loss):
        for _ in range(4):
            for name, seconds in times.items():
                seconds.append(trial(model, loss, patches, PRECISIONS[name]))
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    words = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in medians.items())
    return medians["bf16"] < medians["fp32"], f"forward and backward take {words}"


def compiled_or_eager(
    forward: nn.Module,
    loss: nn.Module,
    patches: Tensor,
    config: Config,
    choices: Choices,
    me: Ranks,
) -> tuple[nn.Module, bool]:
    """The model compiled by a trial step; as it is where `auto` chose to and that fails.

    Raises:
        ValueError: If it fails and was asked for, or is how the run began.
    """
    from torch._dynamo.exc import TorchDynamoException  # a second that other runs save

    # A run has one shape. Code for any shape is slower, and for ResNets torch fails to write it.
    compiled: Any = torch.compile(forward, dynamic=False)
    failure = ""
    with no_trace(forward, loss):
        try:
            seconds = trial(compiled, loss, patches, PRECISIONS[choices.precision])
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            failure = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}"
    if not me.maximum([float(bool(failure))])[0]:
        if me.is_main:
            say(f"compiled in {seconds:.0f} s")
        return compiled, True
    failure = failure or "on another rank"
    if config.compile != "auto":
        raise ValueError(
            f"--compile true: torch.compile fails here ({failure}); --compile false trains without"
        )
    if choices.why["compile"] == KEPT:
        raise ValueError(
            f"the run began compiled, and torch.compile fails here ({failure}): resume it where it "
            "works, or give --compile false to continue without, with other last bits"
        )
    if me.is_main:
        say(f"torch.compile fails here ({failure}): the run is not compiled")
    return forward, False
