# SPDX-License-Identifier: Apache-2.0
"""Window matches: every kernel compiles without a GPU and fits; ``docs/kernels`` has the whole table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = {
    "_window_match_fwd",
    "_window_match_bwd",
    "_patches_to_map",
}
CHOSEN = [
    ("sm_90", "full", "fp16"),
    ("sm_80", "small", "bf16"),
]
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# The backward with expectations holds two windows, their scores and the scores' gradient: a little spills.
# The other 8 bytes are the assembler's choice of few registers.
SPILLED = {"_window_match_bwd": 256, "_patches_to_map": 8}


@pytest.mark.parametrize(("target", "shape", "dtype"), CHOSEN)
def test_kernels_compile_and_fit(target: str, shape: str, dtype: str) -> None:
    # A process of its own: in this one Triton may be set to interpret.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    chosen = ["--ops", "window_match", "--shapes", shape, "--dtypes", dtype, "--targets", target]
    command = [sys.executable, "-m", "benchmarks.compile_table", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    rows = [
        line.strip("| ").split(" | ")
        for line in done.stdout.splitlines()
        if line.startswith("| window_match")
    ]
    assert {row[1] for row in rows} == KERNELS, done.stdout + done.stderr
    for _, kernel, *_, spilled, shared in rows:
        assert int(spilled) <= SPILLED.get(kernel, 0), kernel
        assert int(shared) <= SHARED[target], kernel
