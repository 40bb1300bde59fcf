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
import itertools
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


class Target(NamedTuple):
    """A GPU, as far as a kernel's needs are concerned."""

    backend: str
    architecture: int | str
    warp: int  # threads
    shared: int  # bytes that one program may take
    shared_all: int  # bytes of a multiprocessor (compute unit)
    warps: int  # resident on a multiprocessor at most
    blocks: int


TARGETS = {
    "sm_75": Target("cuda", 75, 32, 64 * 1024, 64 * 1024, 32, 16),  # T4
    "sm_80": Target("cuda", 80, 32, 163 * 1024, 164 * 1024, 64, 32),  # A100
    "sm_86": Target("cuda", 86, 32, 99 * 1024, 100 * 1024, 48, 16),  # A10, RTX 3090
    "sm_89": Target("cuda", 89, 32, 99 * 1024, 100 * 1024, 48, 24),  # L4, RTX 4090
    "sm_90": Target("cuda", 90, 32, 227 * 1024, 228 * 1024, 64, 32),  # H100
    "sm_100": Target("cuda", 100, 32, 227 * 1024, 228 * 1024, 64, 32),  # B200
    "sm_120": Target("cuda", 120, 32, 99 * 1024, 100 * 1024, 48, 24),  # RTX 5090
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, 64 * 1024, 32, 32),  # MI300
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HEADER = (
    *(
        "op",
        "kernel",
        "shape",
        "dtype",
        "target",
        "warps",
        "matrix instructions",
        "cp.async",
        "TMA",
        "occupancy",
    ),
    *("registers", "spilled bytes", "shared memory"),
)
_REGISTERS = 65536  # of a multiprocessor
_BLOCK_SHARED = 1024  # bytes that the system takes of each program's shared memory, from sm_80 on
# Kind of matrix instruction: as it is written in PTX or in AMD's assembly. The first that occurs is meant.
_MATRIX = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma": r"\bmma\.sync", "mfma": r"v_mfma"}


class Compiled(NamedTuple):
    """What one kernel needs on one target; registers are per thread (vector registers on AMD)."""

    op: str
    kernel: str
    shape: str
    dtype: str
    target: str
    warps: int
    matrix: str  # wgmma, tcgen05, mma, mfma or none
    cp_async: bool  # copies to shared memory without registers
    tma: bool  # bulk copies of tensors
    occupancy: float  # resident warps over the most that there can be
    registers: int
    spilled: int
    shared: int

    @property
    def fits(self) -> bool:
        """Whether nothing is spilled and the shared memory of one program suffices."""
        return self.spilled == 0 and self.shared <= TARGETS[self.target].shared

    def cells(self) -> list[str]:
        """As text, in the order of ``HEADER``."""
        shown = {True: "yes", False: "no"}
        fields = self._replace(occupancy=f"{self.occupancy:.0%}")._asdict()  # type: ignore[arg-type]
        return [shown[value] if isinstance(value, bool) else str(value) for value in fields.values()]


class _Target:
    """Stands in for a GPU driver: names the target and can do nothing else."""

    def __init__(self, name: str) -> None:
        from triton.backends.compiler import GPUTarget

        target = TARGETS[name]
        self.target = GPUTarget(target.backend, target.architecture, target.warp)

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


def compile_case(op: str, shape: str, dtype: str, target: str, dump: Path | None = None) -> list[Compiled]:
    """Compile what ``op`` launches at ``shape`` and ``dtype`` for ``target``, in the order of the launches.

    A kernel that is launched in several variants has one row with the most that any of them needs.

    Args:
        op: a name of :func:`case_names`.
        shape: one of the case's ``SHAPES``.
        dtype: a name in ``DTYPES``.
        target: a name in ``TARGETS``.
        dump: a folder to write PTX and SASS (on AMD its assembly) to.

    Raises:
        RuntimeError: Triton's interpreter is on, so that kernels are not compilable functions.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError(
            "compile_case: expected TRITON_INTERPRET to be off, got 1; unset it before Triton is imported."
        )
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from eloftr_kernels import kernel_common

    case = importlib.import_module(f"benchmarks.compile_cases.{op}")
    found: dict[str, Compiled] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        row = _row(kernel, (op, self.__name__, shape, dtype, target))
        if dump is not None:
            _dump(kernel.asm, dump, "-".join(row[:5]))
        found[self.__name__] = _most(row, found[self.__name__]) if self.__name__ in found else row

    pretended = (
        mock.patch.object(driver, "_active", _Target(target)),
        mock.patch.object(dispatch, "shared_memory", return_value=TARGETS[target].shared),
        mock.patch.object(kernel_common, "_ON_AMD", TARGETS[target].backend == "hip"),
        mock.patch.object(JITFunction, "run", compile_only),
    )
    with contextlib.ExitStack() as stack:
        for patch in pretended:
            stack.enter_context(patch)
        case.launch(shape, DTYPES[dtype])
    return list(found.values())


def _row(kernel: Any, names: tuple[str, str, str, str, str]) -> Compiled:
    """What a compiled kernel needs."""
    text = kernel.asm["amdgcn"] if "amdgcn" in kernel.asm else kernel.asm["ptx"]
    matrix = next((kind for kind, pattern in _MATRIX.items() if re.search(pattern, text)), "none")
    registers, spilled = _resources(kernel.asm)
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    return Compiled(
        *names,
        warps,
        matrix,
        re.search(r"cp\.async\.c[ag]", text) is not None,
        "cp.async.bulk.tensor" in text,
        occupancy(names[-1], warps, registers, shared),
        registers,
        spilled,
        shared,
    )


def _most(row: Compiled, before: Compiled) -> Compiled:
    """A kernel that is launched twice, as for the two sides: what either may need."""
    needs = {
        name: max(getattr(row, name), getattr(before, name)) for name in ("warps", "registers", "spilled", "shared")
    }
    return row._replace(**needs, occupancy=min(row.occupancy, before.occupancy))


def occupancy(target: str, warps: int, registers: int, shared: int) -> float:
    """Resident warps of a multiprocessor over the most that there can be.

    Registers are handed out to a warp in units of 256. On AMD each of the four units has 512 vector registers per lane.
    """
    gpu = TARGETS[target]
    if gpu.backend == "hip":
        by_registers = 4 * min(8, 512 // max(1, -(-registers // 8) * 8)) // warps
        taken = shared
    else:
        by_registers = _REGISTERS // max(256, -(-registers * 32 // 256) * 256) // warps
        taken = shared + (_BLOCK_SHARED if gpu.shared < gpu.shared_all else 0)
    programs = min(by_registers, gpu.shared_all // max(1, taken), gpu.warps // warps, gpu.blocks)
    return programs * warps / gpu.warps


def _resources(asm: dict[str, Any]) -> tuple[int, int]:
    """(registers per thread, spilled bytes) of a compiled kernel."""
    if "amdgcn" in asm:
        found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", asm["amdgcn"]))
        return int(found["vgpr_count"]), 4 * int(found["vgpr_spill_count"])
    usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", _cuobjdump(asm, "--dump-resource-usage"))}
    # Local memory and stack hold what the registers cannot.
    return usage["REG"], usage.get("LOCAL", 0) + usage.get("STACK", 0)


def _cuobjdump(asm: dict[str, Any], option: str) -> str:
    """What NVIDIA's tool says of a kernel; Triton brings the tool."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _dump(asm: dict[str, Any], folder: Path, name: str) -> None:
    """Write the code of a kernel; one that is launched in several variants gets a number for each."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = (
        {"amdgcn": asm["amdgcn"]} if "amdgcn" in asm else {"ptx": asm["ptx"], "sass": _cuobjdump(asm, "--dump-sass")}
    )
    stems = (name if index == 1 else f"{name}-{index}" for index in itertools.count(1))
    stem = next(stem for stem in stems if not any((folder / f"{stem}.{kind}").exists() for kind in texts))
    for kind, text in texts.items():
        (folder / f"{stem}.{kind}").write_text(text, encoding="utf-8")


def markdown(rows: Iterable[Compiled]) -> str:
    """The rows as a table."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    return "\n".join(lines)


def main(arguments: list[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Print the table; the exit status is 1 when a kernel spills or needs more shared memory than there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", nargs="+", default=case_names(), choices=case_names())
    parser.add_argument("--shapes", nargs="+", default=None)
    parser.add_argument("--dtypes", nargs="+", default=["fp16", "bf16"], choices=list(DTYPES))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dump", type=Path, metavar="FOLDER", help="write PTX and SASS of every kernel")
    chosen = parser.parse_args(arguments)
    rows = [
        row
        for op in chosen.ops
        for shape in chosen.shapes or importlib.import_module(f"benchmarks.compile_cases.{op}").SHAPES
        for dtype in chosen.dtypes
        for target in chosen.targets
        for row in compile_case(op, shape, dtype, target, chosen.dump)
    ]
    show(markdown(rows))
    return 0 if all(row.fits for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
