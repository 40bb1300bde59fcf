# SPDX-License-Identifier: Apache-2.0
"""Streaming dual softmax: each kernel compiles without a GPU and fits; ``docs/kernels`` has the whole table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = {
    "_dual_softmax_lse_fwd",
    "_lse_reduce",
    "_dual_softmax_lse_bwd",
    "_mutual_best_fwd",
    "_best_reduce",
}
CHOSEN = [
    ("sm_90", "full", "fp16"),
    ("sm_100", "full", "bf16"),
    ("gfx942", "small", "fp16"),
]
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


@pytest.mark.parametrize(("target", "shape", "dtype"), CHOSEN)
def test_kernels_compile_and_fit(target: str, shape: str, dtype: str) -> None:
    # A process of its own: in this one Triton may be set to interpret.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    chosen = ["--ops", "dual_softmax", "--shapes", shape, "--dtypes", dtype, "--targets", target]
    command = [sys.executable, "-m", "benchmarks.compile_table", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    rows = [
        line.strip("| ").split(" | ")
        for line in done.stdout.splitlines()
        if line.startswith("| dual_softmax")
    ]
    assert {row[1] for row in rows} == KERNELS, done.stdout + done.stderr
    for _, kernel, *_, spilled, shared in rows:
        assert int(spilled) <= 0, kernel
        assert int(shared) <= SHARED[target], kernel
