# SPDX-License-Identifier: Apache-2.0
"""Suite ``launch``: what a call of an op costs on the host, and where that time goes.

On a GPU the calls are queued and not waited for. Without one, kernels are compiled for sm_90 but not launched, and the
library's matrix products return zeros: all host code around them is real. One eager ``torch.add`` of the same run is
the unit.
"""

from __future__ import annotations

import contextlib
import cProfile
import functools
import importlib
import importlib.util
import pkgutil
import pstats
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import eloftr_kernels
from benchmarks.measure import DTYPES, Benchmark, Context, Elapsed, Entry, Run, Unavailable
from benchmarks.ops import OPS, Arguments, KernelCase, arguments_of
from eloftr_kernels import dispatch

ADD = "one torch.add"
RECORDING = "forward, recording gradients"
BACKWARD = "forward and backward"
ARCHITECTURE, SHARED_MEMORY = 90, 232448  # of the GPU that is pretended where there is none
# Part of the host's time: what the file or the built-in function is called. The first that fits counts.
PARTS: dict[str, tuple[str, ...]] = {
    "Triton's launcher": ("/triton/",),
    "registration and dispatch": ("/torch/_library", "/torch/_ops.py", "/torch/library.py"),
    "autograd": ("/torch/autograd/", "/torch/_functorch/", "run_backward"),
    "checks and choice": ("/dispatch.py", "/op.py"),
    "our launch code": ("/eloftr_kernels/",),
    "allocations and views": ("empty", "zeros", "view", "as_strided", "contiguous", "reshape"),
}
OTHER = "other"


def benchmarks(context: Context) -> list[Benchmark]:
    """One benchmark per op, at the shapes of a 640x480 pair."""
    preset = "small" if context.quick else "full"
    return [
        Benchmark(
            KernelCase(op, preset, 1).name,
            op,
            "host",
            functools.partial(_entries, KernelCase(op, preset, 1), context),
            ADD,
            "none: the suite kernels holds the values",
            repeats=1 if context.quick else 5,
        )
        for op in OPS
        if op != "attention_layer"  # two ops
    ]


def _entries(case: KernelCase, context: Context) -> list[Entry]:
    """An eager operation, then the op's modes, each followed by its parts."""
    modes = ["forward"]
    if OPS[case.op].differentiable:
        modes += [RECORDING] + ([BACKWARD] if context.device.type == "cuda" else [])
    made = [Entry(ADD, lambda gated: _add(context), has_peak=False)]
    for mode in modes:
        latest: dict[str, float] = {}
        build = functools.partial(_build, case, mode, context, latest)
        made.append(Entry(mode, lambda gated, build=build: build(), has_peak=False))  # type: ignore[misc]
        for part in (*PARTS, OTHER):
            row = functools.partial(_part, latest, part)
            made.append(Entry(f"{mode}: {part}", lambda gated, row=row: row, has_peak=False))  # type: ignore[misc]
    return made


def _part(latest: dict[str, float], part: str) -> Elapsed:
    return Elapsed(latest.get(part, 0.0))


def _add(context: Context) -> Run:
    a, b = (torch.ones(8, device=context.device, dtype=DTYPES[context.dtype]) for _ in range(2))
    return lambda: Elapsed(_host_seconds(lambda: torch.add(a, b), context, calls=200))


def _build(case: KernelCase, mode: str, context: Context, latest: dict[str, float]) -> Run:
    """Host time of a call; keeps the seconds of its parts in ``latest``."""
    arguments = arguments_of(case, DTYPES[context.dtype], context.device)
    if mode != "forward":
        for name in OPS[case.op].differentiable:
            arguments[name] = arguments[name].detach().requires_grad_()
    call = _call(case, mode, arguments)
    calls = 5 if context.quick else 40

    def run() -> Elapsed:
        with _ready(context), eloftr_kernels.backend("triton"), torch.set_grad_enabled(mode != "forward"):
            seconds = _host_seconds(call, context, calls)
            shares = _shares(call, calls)
        latest.clear()
        latest.update({part: share * seconds for part, share in shares.items()})
        return Elapsed(seconds)

    return run


def _call(case: KernelCase, mode: str, arguments: Arguments) -> Callable[[], Any]:
    public = OPS[case.op].public
    if mode != BACKWARD:
        return lambda: public(**arguments)
    learnt = [arguments[name] for name in OPS[case.op].differentiable]

    def call() -> None:
        outputs = public(**arguments)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        flowing = [x for x in outputs if x is not None and x.requires_grad]
        torch.autograd.grad(flowing, learnt, [torch.ones_like(x) for x in flowing])

    return call


def _host_seconds(call: Callable[[], Any], context: Context, calls: int) -> float:
    """Per call, until the last one is queued; few enough that the queue does not fill."""
    for _ in range(3):
        call()
    if context.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    seconds = (time.perf_counter() - start) / calls
    if context.device.type == "cuda":
        torch.cuda.synchronize()
    return seconds


def _shares(call: Callable[[], Any], calls: int) -> dict[str, float]:
    """Share of each part in the host's time, by a profile of its own."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(calls):
        call()
    profile.disable()
    seconds = dict.fromkeys((*PARTS, OTHER), 0.0)
    stats: dict[Any, tuple[Any, ...]] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for function, (_, _, own, _, callers) in stats.items():
        part = _part_of(function)
        if part != OTHER or not callers:
            seconds[part] += own
            continue
        for caller, (_, _, spent, _) in callers.items():  # a built-in function belongs to who calls it
            seconds[_part_of(caller)] += spent
    total = sum(seconds.values()) or 1.0
    return {part: value / total for part, value in seconds.items()}


def _part_of(function: tuple[str, int, str]) -> str:
    file, _, name = function
    where = f"{file} {name}".replace("\\", "/")
    return next((part for part, marks in PARTS.items() if any(mark in where for mark in marks)), OTHER)


def _ready(context: Context) -> contextlib.AbstractContextManager[None]:
    if importlib.util.find_spec("triton") is None:
        raise Unavailable("triton is not installed")
    if context.device.type == "cuda":
        return contextlib.nullcontext()
    if dispatch.interpreting():
        raise Unavailable("Triton's interpreter is on; run the suite launch with TRITON_INTERPRET unset")
    return nothing_launched()


class _Driver:
    """Stands in for the driver of a GPU: kernels compile for it, and nothing is launched."""

    binary_ext = "cubin"

    class utils:  # noqa: N801 - Triton's name
        """What Triton asks of the driver."""

        load_binary = staticmethod(lambda *arguments: (1, 1, 0, 0, 1024))
        get_device_properties = staticmethod(
            lambda device: {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": 132, "warpSize": 32}
        )

    class launcher_cls:  # noqa: N801 - Triton's name
        """A launcher that launches nothing."""

        global_scratch_size = profile_scratch_size = 0

        def __init__(self, source: Any, metadata: Any) -> None: ...

        def __call__(self, *arguments: Any, **named: Any) -> None: ...

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCHITECTURE, 32)


@contextlib.contextmanager
def nothing_launched() -> Iterator[None]:
    """Inside, ops take CPU tensors down the Triton path; launches and library products cost nothing."""
    from triton.runtime import driver

    for found in pkgutil.walk_packages(eloftr_kernels.__path__, "eloftr_kernels."):
        importlib.import_module(found.name)
    stubs = {"use_triton": lambda op, reason: True, "shared_memory": lambda device: SHARED_MEMORY}
    products: dict[tuple[int, ...], Tensor] = {}

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = (*x.shape[:-1], weight.shape[0])
        if shape not in products:
            products[shape] = x.new_zeros(shape)
        return products[shape].detach()

    modules = [module for name, module in sys.modules.items() if name.startswith("eloftr_kernels")]
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, stub in stubs.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, stub))
        stack.enter_context(mock.patch.object(F, "linear", linear))
        stack.enter_context(mock.patch.object(driver, "_active", _Driver()))
        yield
