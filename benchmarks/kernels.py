# SPDX-License-Identifier: Apache-2.0
"""Suite ``kernels``: who does each op. One registry entry per contender; ops are in ``benchmarks.ops``.

To add a contender: write a function that returns it for a case, and an :class:`OpEntry` in ``ENTRIES``. Nothing else
has to be edited. A kernel outside this repository needs no edit at all: ``--contender name=module:function --op OP``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.gates import ERROR, OP_GATE, Error, hold_errors, output_errors
from benchmarks.measure import DTYPES, Benchmark, Context, Entry, Run, Unavailable
from benchmarks.ops import (
    BACKWARD,
    OPS,
    Arguments,
    Function,
    KernelCase,
    Outputs,
    arguments_of,
    as_tuple,
    implementation,
    in_double,
)
from eloftr_kernels import dispatch

EAGER = "eager reference"
INTERPRETED = "agrees with the reference in Triton's interpreter, whose time says nothing"
_LARGEST_UNROLLED = 16  # blocks of the streaming reference that torch.compile may unroll
_BLOCK_ELEMENTS = 1 << 22  # of the streaming reference


class OpEntry(NamedTuple):
    """A contender: whose, what it needs, which cases it does, how it is built and held."""

    owner: str
    build: Callable[[KernelCase, torch.device], Function]  # named arguments in, a tuple out; raises Unavailable
    packages: tuple[str, ...] = ()
    applies: Callable[[KernelCase, str, torch.device], bool] = lambda case, mode, device: True
    graph: bool = False  # captured once as a CUDA graph, then replayed
    gate: Callable[[dict[str, Error], dict[str, Error], float], None] = hold_errors


def benchmarks(context: Context) -> list[Benchmark]:
    """Every case of the suite that is measured on this kind of device."""
    device, quick = context.device, context.quick
    return [
        Benchmark(
            case.name,
            case.op,
            mode,
            functools.partial(entries, case, mode, context),
            EAGER,
            OP_GATE,
            repeats=1 if quick else 20 if device.type == "cuda" else 5,
            least_seconds=0.0 if quick or device.type == "cpu" else 2e-3,
            peak_of_call=True,
        )
        for case in (cases.QUICK_KERNELS if quick else cases.KERNELS)
        if device.type in case.devices
        for mode in case.modes
    ]


def entries(case: KernelCase, mode: str, context: Context) -> list[Entry]:
    """Everybody who does ``case``, the baseline first; inputs and the truth are made when the first is built."""
    device, dtype, backward = context.device, DTYPES[context.dtype], mode == BACKWARD
    kept: dict[str, Any] = {}

    def given() -> Arguments:
        if "given" not in kept:
            kept["given"] = arguments_of(case, dtype, device)
        return cast("Arguments", kept["given"])

    def errors(run: Run) -> dict[str, Error]:
        if "truth" not in kept:
            kept["double"] = in_double(given())
            kept["truth"] = runner(case.op, implementation(case.op, "reference"), kept["double"], backward)()
        return output_errors(case.op, run(), kept["truth"], kept["double"], ERROR[dtype])

    def build(entry: OpEntry, name: str, gated: bool) -> Run:
        missing = [package for package in entry.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise Unavailable(f"{missing[0]} is not installed")
        interpreted = "triton" in entry.packages and device.type == "cpu"
        if interpreted and not (context.quick and gated):
            raise Unavailable("Triton kernels need a GPU; timing its interpreter measures nothing")
        run = runner(case.op, entry.build(case, device), given(), backward)
        if entry.graph:
            run = graphed(run)
        if gated:
            if "eager" not in kept:
                reference = implementation(case.op, "reference")
                kept["eager"] = errors(runner(case.op, reference, given(), backward))
            entry.gate(errors(run), kept["eager"], ERROR[dtype])
        if interpreted:
            raise Unavailable(INTERPRETED)
        return run

    work = OPS[case.op].work(case, dtype.itemsize)
    factor = 3.0 if backward else 1.0  # the backward pass has two products for each of the forward
    return [
        Entry(name, functools.partial(build, entry, name), factor * work.operations, factor * work.bytes)
        for name, entry in ENTRIES.items()
        if entry.applies(case, mode, device)
    ]


def runner(op: str, function: Function, arguments: Arguments, backward: bool) -> Run:
    """What is timed: outputs, then with ``backward`` the gradients of all inputs for random cotangents."""
    if not backward:
        return torch.no_grad()(lambda: function(**arguments))
    learnt = {name: arguments[name].detach().clone().requires_grad_() for name in OPS[op].differentiable}
    leaves = {**arguments, **learnt}
    cotangents: list[Tensor] = []

    def run() -> Outputs:
        outputs = function(**leaves)
        flowing = [output for output in outputs if output.requires_grad]
        if not flowing:
            raise Unavailable("its outputs have no gradient")
        if not cotangents:
            generator = torch.Generator().manual_seed(1)
            drawn = (torch.randn(o.shape, generator=generator) for o in flowing)
            cotangents.extend(t.to(o.device, o.dtype) for t, o in zip(drawn, flowing, strict=True))
        gradients = torch.autograd.grad(flowing, list(learnt.values()), cotangents)
        return *(o.detach() for o in outputs), *gradients

    return run


def graphed(run: Run) -> Run:
    """``run`` captured once as a CUDA graph, then replayed: the time without the launches' overhead."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def add_entry(description: str, op: str) -> str:
    """Add somebody's kernel for ``op``, given as ``name=module:function``; returns its name.

    The function gets the arguments of ``eloftr_kernels.<op>`` by name, and returns what that returns.

    Raises:
        ValueError: another form, a module that cannot be imported, or one without the function.
    """
    name, equals, path = description.partition("=")
    module_name, colon, attribute = path.partition(":")
    if not (name and equals and module_name and colon and attribute):
        raise ValueError(f"--contender: expected name=module:function, got {description!r}.")
    if name in ENTRIES:
        raise ValueError(f"--contender: expected a new name, got {name!r}. These are taken: {', '.join(ENTRIES)}.")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--contender: cannot load {path}: {error}. Is its folder on PYTHONPATH?") from error
    ENTRIES[name] = OpEntry(
        module_name,
        lambda case, device: as_tuple(function),
        applies=lambda case, mode, device: case.op == op,
    )
    return name


def _reference(case: KernelCase, device: torch.device) -> Function:
    return implementation(case.op, "reference")


def _triton(case: KernelCase, device: torch.device) -> Function:
    """The op through the public function, Triton demanded; Unavailable with the package's own reason."""
    if device.type == "cpu" and not dispatch.interpreting():
        raise Unavailable("Triton's interpreter is off: set TRITON_INTERPRET=1 before the start")
    function = implementation(case.op, "triton")

    def run(**arguments: Any) -> Outputs:
        try:
            return cast("Outputs", function(**arguments))
        except RuntimeError as error:
            if "cannot be honoured" in str(error):
                raise Unavailable(str(error)) from error
            raise

    return run


def _dense(case: KernelCase, device: torch.device) -> Function:
    dense = OPS[case.op].dense
    if dense is None:
        raise Unavailable("the op has no dense form")
    return as_tuple(dense)


def _compiled_reference(case: KernelCase, device: torch.device) -> Function:
    pairs = case.batch * math.prod(case.cells0) * math.prod(case.cells1)
    blocks = math.ceil(pairs / _BLOCK_ELEMENTS) if _has_dense(case) else 1
    if blocks > _LARGEST_UNROLLED:
        raise Unavailable(f"torch.compile would unroll the {blocks} blocks of the streaming reference")
    compiled = torch.compile(OPS[case.op].public, dynamic=False)
    return as_tuple(compiled, "reference")


def _compiled_dense(case: KernelCase, device: torch.device) -> Function:
    return cast("Function", torch.compile(_dense(case, device), dynamic=False))


def _has_dense(case: KernelCase) -> bool:
    return OPS[case.op].dense is not None


def _replayable(case: KernelCase, mode: str, device: torch.device) -> bool:
    return device.type == "cuda" and mode != BACKWARD


OURS = "eloftr_kernels"
# In the order of the rows, the baseline first.
ENTRIES: dict[str, OpEntry] = {
    EAGER: OpEntry(OURS, _reference),
    "triton": OpEntry(OURS, _triton, ("triton",)),
    "dense eager": OpEntry("torch", _dense, applies=lambda case, mode, device: _has_dense(case)),
    "torch.compile of the reference": OpEntry(
        "torch", _compiled_reference, applies=lambda case, mode, device: case.compiled
    ),
    "torch.compile of dense": OpEntry(
        "torch", _compiled_dense, applies=lambda case, mode, device: case.compiled and _has_dense(case)
    ),
    f"{EAGER}, CUDA graph": OpEntry(OURS, _reference, applies=_replayable, graph=True),
    "triton, CUDA graph": OpEntry(OURS, _triton, ("triton",), applies=_replayable, graph=True),
}
