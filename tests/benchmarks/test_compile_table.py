# SPDX-License-Identifier: Apache-2.0
"""What the table of compiled kernels says of them; that all of them compile is a test of the ops."""

from types import SimpleNamespace

import pytest

from benchmarks import compile_table
from benchmarks.compile_table import HEADER, Compiled, occupancy


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "expected"),
    [
        ("sm_80", 8, 32, 0, 1.0),
        ("sm_86", 8, 64, 0, 32 / 48),  # 32 warps of 2,048 registers
        ("sm_90", 4, 128, 49408, 16 / 64),  # 16 warps by registers, 4 programs by shared memory
        ("sm_90", 4, 255, 0, 8 / 64),
        ("sm_90", 4, 32, 200 * 1024, 4 / 64),  # one program by shared memory
        ("sm_75", 4, 64, 81920, 0.0),  # more shared memory than there is
    ],
)
def test_occupancy_is_what_registers_and_shared_memory_leave(
    target: str, warps: int, registers: int, shared: int, expected: float
) -> None:
    assert occupancy(target, warps, registers, shared) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("code", "matrix", "cp_async", "tma"),
    [
        ("wgmma.mma_async.sync.aligned.m64n64k16; cp.async.cg.shared.global;", "wgmma", True, False),
        ("mma.sync.aligned.m16n8k16;", "mma", False, False),
        ("tcgen05.mma.cta_group::1; cp.async.bulk.tensor.2d;", "tcgen05", False, True),
        ("fma.rn.f32;", "none", False, False),
    ],
)
def test_instructions_are_read_from_the_code(
    code: str, matrix: str, cp_async: bool, tma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_table, "_cuobjdump", lambda asm, option: "REG:40 STACK:0 LOCAL:8")
    kernel = SimpleNamespace(asm={"ptx": code, "cubin": b""}, metadata=SimpleNamespace(num_warps=4, shared=1024))
    row = compile_table._row(kernel, ("op", "_op_fwd", "full", "fp16", "sm_90"))
    assert (row.matrix, row.cp_async, row.tma) == (matrix, cp_async, tma)
    assert (row.registers, row.spilled) == (40, 8)
    assert not row.fits  # it spills
    assert len(row.cells()) == len(HEADER) == len(Compiled._fields)


def test_code_of_every_variant_is_written(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_table, "_cuobjdump", lambda asm, option: "SASS")
    for text in ("first", "second"):
        compile_table._dump({"ptx": text}, tmp_path, "op-kernel")  # type: ignore[arg-type]
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}  # type: ignore[attr-defined]
    assert written == {
        "op-kernel.ptx": "first",
        "op-kernel.sass": "SASS",
        "op-kernel-2.ptx": "second",
        "op-kernel-2.sass": "SASS",
    }
