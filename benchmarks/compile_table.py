# SPDX-License-Identifier: Apache-2.0
"""Compile every kernel ahead of time, without a GPU, and print what it needs: ``python -m benchmarks.compile_table``.

The launchers run on meta tensors; what they would launch is compiled for each target instead. Modules in
``benchmarks/compile_cases/`` are found by name: each has ``SHAPES``, names of the shapes, and ``launch(shape, dtype)``,
which calls the op's launchers once, forward and backward.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from eloftr_kernels import dispatch

TARGETS = {  # name: backend, architecture, threads per warp, shared memory of a program in bytes
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HEADER = ("op", "kernel", "shape", "dtype", "target", "warps", "registers", "spilled bytes", "shared memory")


class Compiled(NamedTuple):
    """What one kernel needs on one target; registers are per thread (vector registers on AMD)."""

    op: str
    kernel: str
    shape: str
    dtype: str
    target: str
    warps: int
    registers: int
    spilled: int
    shared: int

    @property
    def fits(self) -> bool:
        """Whether nothing is spilled and the shared memory of one program suffices."""
        return self.spilled == 0 and self.shared <= TARGETS[self.target][3]


class _Target:
    """Stands in for a GPU driver: names the target and can do nothing else."""

    def __init__(self, name: str) -> None:
        from triton.backends.compiler import GPUTarget

        backend, architecture, warp, _ = TARGETS[name]
        self.target = GPUTarget(backend, architecture, warp)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)  # kernels are cached by device

    def get_current_stream(self, device: object) -> int:
        return 0


def case_names() -> list[str]:
    """The ops that have a module in ``compile_cases``."""
    folder = Path(__file__).parent / "compile_cases"
    return sorted(module.name for module in pkgutil.iter_modules([str(folder)]))


def compile_case(op: str, shape: str, dtype: str, target: str) -> list[Compiled]:
    """Compile what ``op`` launches at ``shape`` and ``dtype`` for ``target``, in the order of the launches.

    A kernel that is launched in several variants has one row with the most that any of them needs.

    Raises:
        RuntimeError: Triton's interpreter is on, so that kernels are not compilable functions.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError(
            "compile_case: expected TRITON_INTERPRET to be off, got 1; unset it before Triton is imported."
        )
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    case = importlib.import_module(f"benchmarks.compile_cases.{op}")
    found: dict[str, Compiled] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        metadata = kernel.metadata
        registers, spilled = _resources(kernel.asm)
        needs = (metadata.num_warps, registers, spilled, metadata.shared)
        before = found.get(self.__name__)
        if before is not None:  # a kernel that is launched twice, as for the two sides: what either may need
            needs = tuple(max(pair) for pair in zip(needs, before[-4:], strict=True))
        found[self.__name__] = Compiled(op, self.__name__, shape, dtype, target, *needs)

    pretended = (
        mock.patch.object(driver, "_active", _Target(target)),
        mock.patch.object(dispatch, "shared_memory", return_value=TARGETS[target][3]),
        mock.patch.object(JITFunction, "run", compile_only),
    )
    with contextlib.ExitStack() as stack:
        for patch in pretended:
            stack.enter_context(patch)
        case.launch(shape, DTYPES[dtype])
    return list(found.values())


def _resources(asm: dict[str, Any]) -> tuple[int, int]:
    """(registers per thread, spilled bytes) of a compiled kernel."""
    if "amdgcn" in asm:
        text = asm["amdgcn"]
        counts = {
            key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")
        }  # type: ignore[index]
        return counts["vgpr_count"], 4 * counts["vgpr_spill_count"]
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
    # Local memory and stack hold what the registers cannot.
    return usage["REG"], usage.get("LOCAL", 0) + usage.get("STACK", 0)


def markdown(rows: Iterable[Compiled]) -> str:
    """The rows as a table."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    lines += ["| " + " | ".join(str(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def main(arguments: list[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Print the table; the exit status is 1 when a kernel spills or needs more shared memory than there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", nargs="+", default=case_names(), choices=case_names())
    parser.add_argument("--shapes", nargs="+", default=None)
    parser.add_argument("--dtypes", nargs="+", default=["fp16", "bf16"], choices=list(DTYPES))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    chosen = parser.parse_args(arguments)
    rows = [
        row
        for op in chosen.ops
        for shape in chosen.shapes or importlib.import_module(f"benchmarks.compile_cases.{op}").SHAPES
        for dtype in chosen.dtypes
        for target in chosen.targets
        for row in compile_case(op, shape, dtype, target)
    ]
    show(markdown(rows))
    return 0 if all(row.fits for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
