# SPDX-License-Identifier: Apache-2.0
"""Suite ``kernels``: who does each op, held to float64 before timing; needs torch and ``eloftr_kernels`` alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

import eloftr_kernels
from benchmarks.cases import KernelCase
from benchmarks.measure import DTYPES, Contender, Disagreement, Run, Unavailable
from benchmarks.problems import (
    REFERENCE,
    Implementation,
    Op,
    Outputs,
    arguments_of,
    dense_best,
    dense_lse,
    forward_work,
    operation,
)
from eloftr_kernels.dual_softmax.reference import BLOCK_ELEMENTS, pair_scores

EAGER = "eager reference"
# Error that any implementation may have in a dtype, relative to float64; beyond it, twice that of the eager reference.
ERROR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
GATE = (
    "relative error of every output and gradient against the reference in float64, at most twice that of the eager "
    "reference in the same dtype or the dtype's bound; the same of the score that chosen indices lose, and of the "
    "share of windows with another pixel pair"
)
_LARGEST_UNROLLED = 16  # blocks of the streaming reference that torch.compile may unroll


def contenders(case: KernelCase, measure: str, dtype_name: str, device: torch.device) -> list[Contender]:
    """Everybody who does ``case``; inputs and the float64 truth are made when the first is built."""
    dtype, backward = DTYPES[dtype_name], measure == "forward+backward"
    cache: dict[str, Any] = {}

    def given() -> tuple[Any, ...]:
        if "given" not in cache:
            cache["given"] = arguments_of(case, dtype, device)
        return cast("tuple[Any, ...]", cache["given"])

    def errors(run: Run) -> dict[str, float]:
        if "truth" not in cache:
            cache["double"] = tuple(a.double() if _is_float(a) else a for a in given())
            cache["truth"] = runner(case.op, operation(case.op, REFERENCE), cache["double"], backward)()
        return output_errors(case.op, run(), cache["truth"], cache["double"])

    def build(name: str, gated: bool) -> Run:
        run = _build(name, case, given(), backward)
        if gated:
            if "eager" not in cache:
                cache["eager"] = errors(runner(case.op, operation(case.op, REFERENCE), given(), backward))
            hold_errors(errors(run), cache["eager"], ERROR[dtype])
        return run

    operations, moved = forward_work(case, dtype.itemsize)
    factor = 3.0 if backward else 1.0  # the backward pass has two products for each of the forward
    return [
        Contender(name, functools.partial(build, name), factor * operations, factor * moved)
        for name in contender_names(case, backward, device)
    ]


def contender_names(case: KernelCase, backward: bool, device: torch.device) -> list[str]:
    """Baseline first."""
    dense = case.op in ("dual_softmax_lse", "mutual_best")
    names = [EAGER, "triton"]
    names += ["dense eager"] if dense else []
    if case.compiled:
        names += ["torch.compile of the reference"]
        names += ["torch.compile of dense"] if dense else []
    if device.type == "cuda" and not backward:
        names += [f"{EAGER}, CUDA graph", "triton, CUDA graph"]
    return names


def runner(op: str, function: Op, arguments: tuple[Any, ...], backward: bool) -> Run:
    """What is timed: outputs, then with ``backward`` the gradients of all inputs for random cotangents."""
    if not backward:
        return torch.no_grad()(lambda: function(*arguments))
    fixed = {"aggregated_attention": 10, "attention_layer": 9}.get(op)  # the rotary table
    leaves = [
        a.detach().clone().requires_grad_() if _is_float(a) and i != fixed else a
        for i, a in enumerate(arguments)
    ]
    learnt = [leaf for leaf in leaves if _is_float(leaf) and leaf.requires_grad]
    cotangents: list[Tensor] = []

    def run() -> Outputs:
        outputs = function(*leaves)
        flowing = [output for output in outputs if output.requires_grad]
        if not cotangents:
            generator = torch.Generator().manual_seed(1)
            drawn = (torch.randn(o.shape, generator=generator) for o in flowing)
            cotangents.extend(t.to(o.device, o.dtype) for t, o in zip(drawn, flowing, strict=True))
        return *(o.detach() for o in outputs), *torch.autograd.grad(flowing, learnt, cotangents)

    return run


def output_errors(op: str, got: Outputs, truth: Outputs, double: tuple[Any, ...]) -> dict[str, float]:
    """Error of every output by name: relative norms; for indices, what choosing them costs (see ``GATE``)."""
    if op == "mutual_best":
        return {
            f"score of best{1 - side}": _relative(
                _chosen(got[side], side, double), _chosen(truth[side], side, double)
            )
            for side in (0, 1)
        }
    names = [f"output {i}" for i in range(len(truth))]
    if not op.startswith("window_match"):
        return {n: _relative(g, t) for n, g, t in zip(names, got, truth, strict=True)}
    same = (got[0] == truth[0]).all(1) & (got[1] == truth[1]).all(1)
    found = {"share of other pixel pairs": 1 - same.double().mean().item()}
    found["sub-pixel offset"] = _relative(got[2][same], truth[2][same])
    return found | {n: _relative(g, t) for n, g, t in zip(names[3:], got[3:], truth[3:], strict=True)}


def hold_errors(found: dict[str, float], eager: dict[str, float], bound: float) -> None:
    """Raise Disagreement, naming each output whose error is neither within the bound nor twice the eager one."""
    allowed = {name: max(bound, 2 * eager[name]) for name in found}
    bad = [f"{n}: error {e:.2g}, allowed {allowed[n]:.2g}" for n, e in found.items() if not e <= allowed[n]]
    if bad:
        raise Disagreement("; ".join(bad))


def _build(name: str, case: KernelCase, arguments: tuple[Any, ...], backward: bool) -> Run:
    if name.endswith(", CUDA graph"):
        return graphed(_build(name.removesuffix(", CUDA graph"), case, arguments, backward))
    if name == "triton":
        return runner(case.op, _triton(case.op, arguments[0].device.type), arguments, backward)
    dense = REFERENCE._replace(lse=dense_lse, best=dense_best)
    function = operation(case.op, dense if "dense" in name else REFERENCE)
    if "compile" in name:
        blocks = math.prod(case.cells0) * math.prod(case.cells1) * case.batch / BLOCK_ELEMENTS
        if (
            "dense" not in name
            and case.op in ("dual_softmax_lse", "mutual_best")
            and blocks > _LARGEST_UNROLLED
        ):
            raise Unavailable(
                f"torch.compile would unroll the {math.ceil(blocks)} blocks of the streaming reference"
            )
        function = torch.compile(function, dynamic=False)
    return runner(case.op, function, arguments, backward)


def _triton(op: str, kind: str) -> Op:
    """``op`` through the public functions, Triton demanded; Unavailable with the package's own reason."""
    if kind == "cpu":
        raise Unavailable("Triton kernels need a GPU; timing its interpreter measures nothing")
    demand = getattr(eloftr_kernels, "backend", None)
    public = Implementation(*(getattr(eloftr_kernels, reference.__name__) for reference in REFERENCE))
    if demand is None or any(f.__module__.endswith(".reference") for f in _used(op, public)):
        raise Unavailable("no Triton kernel is written")
    function = operation(op, public)

    def run(*arguments: Any) -> Outputs:
        with demand("triton"):
            try:
                return function(*arguments)
            except RuntimeError as error:
                if "cannot be honoured" in str(error):
                    raise Unavailable(str(error)) from error
                raise

    return run


def _used(op: str, of: Implementation) -> list[Callable[..., Any]]:
    fields = {"attention_layer": ("attention", "update"), "aggregated_attention": ("attention",),
              "upsample_mlp": ("update",), "dual_softmax_lse": ("lse",), "mutual_best": ("best",)}  # fmt: skip
    return [getattr(of, field) for field in fields.get(op, ("window",))]


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


def _chosen(best: Tensor, side: int, double: tuple[Any, ...]) -> Tensor:
    """Log-confidence in float64 of each cell of image ``side`` with its ``best`` partner."""
    batch = torch.arange(len(best), device=best.device).repeat_interleave(best.shape[1])
    own = torch.arange(best.shape[1], device=best.device).repeat(len(best))
    pair = (own, best.flatten()) if side == 0 else (best.flatten(), own)
    features0, features1, temperature, row_lse, col_lse = double
    return pair_scores(features0, features1, temperature, batch, *pair, row_lse, col_lse)


def _relative(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm().clamp(min=1e-12))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
