# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for each architecture without a GPU, spill little and fit; the whole table is in the docs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# One shape, dtype and op per target: together they meet every kernel twice.
CHOSEN = [
    ("sm_80", "small", "bf16", "aggregated_attention"),
    ("sm_90", "full", "fp16", "upsample_mlp"),
    ("sm_100", "full", "bf16", "aggregated_attention"),
    ("gfx942", "small", "fp16", "upsample_mlp"),
]


@pytest.mark.parametrize(("target", "shape", "dtype", "op"), CHOSEN)
def test_kernels_compile_and_fit(target: str, shape: str, dtype: str, op: str) -> None:
    # A process of its own: in this one Triton may be set to interpret.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    chosen = ["--ops", op, "--shapes", shape, "--dtypes", dtype, "--targets", target]
    command = [sys.executable, "-m", "benchmarks.compile_table", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == 2 + 4, "four kernels"
