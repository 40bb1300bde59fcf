# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles without a GPU, spills nothing and fits; ``docs/kernels/compile.md`` has the whole table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = {
    "aggregated_attention": ["_tokens_fwd", "_attention_fwd", "_attention_bwd", "_tokens_bwd"],
    "upsample_mlp": ["_upsample_mlp_fwd", "_update_bwd", "_hidden_bwd", "_upsample_bwd"],
    "dual_softmax": [
        "_dual_softmax_lse_fwd",
        "_lse_reduce",
        "_dual_softmax_lse_bwd",
        "_mutual_best_fwd",
        "_best_reduce",
    ],
    "window_match": ["_window_match_fwd", "_window_match_bwd", "_patches_to_map"],
}
# One shape, one dtype and some ops per target, one process each: together they meet every kernel at least twice.
CHOSEN = [
    ("sm_80", "small", "bf16", ["aggregated_attention", "window_match"]),
    ("sm_90", "full", "fp16", ["dual_softmax", "upsample_mlp", "window_match"]),
    ("sm_100", "full", "bf16", ["aggregated_attention", "dual_softmax"]),
    ("gfx942", "small", "fp16", ["dual_softmax", "upsample_mlp"]),
]


@pytest.mark.parametrize(("target", "shape", "dtype", "ops"), CHOSEN, ids=[c[0] for c in CHOSEN])
def test_kernels_compile_spill_nothing_and_fit(target: str, shape: str, dtype: str, ops: list[str]) -> None:
    # A process of its own: in this one Triton may be set to interpret.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    chosen = ["--ops", *ops, "--shapes", shape, "--dtypes", dtype, "--targets", target]
    command = [sys.executable, "-m", "benchmarks.compile_table", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [(op, k) for op in ops for k in KERNELS[op]], done.stderr
    assert {row[-2] for row in rows} == {"0"}, done.stdout
    assert done.returncode == 0, done.stdout
