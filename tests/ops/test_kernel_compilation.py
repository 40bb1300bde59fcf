# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles without a GPU, spills nothing and fits; ``docs/kernels/compile.md`` has the whole table."""

import json
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
# Every kernel once at least at the width of `full`, every target once; the table has all combinations.
CHOSEN = {
    "sm_90": [
        ("dual_softmax", "full", "fp16", "sm_90"),
        ("upsample_mlp", "full", "fp16", "sm_90"),
        ("window_match", "full", "fp16", "sm_90"),
    ],
    "others": [
        ("aggregated_attention", "small", "bf16", "sm_80"),
        ("aggregated_attention", "full", "bf16", "sm_100"),
        ("dual_softmax", "small", "fp16", "gfx942"),
        ("upsample_mlp", "small", "fp16", "gfx942"),
    ],
}
SCRIPT = """
import json, sys
from benchmarks.compile_table import compile_case
for arguments in json.loads(sys.argv[1]):
    print(json.dumps([[row.op, row.kernel, row.spilled, row.fits] for row in compile_case(*arguments)]))
"""


@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=list(CHOSEN))
def test_kernels_compile_spill_nothing_and_fit(chosen: list[tuple[str, str, str, str]]) -> None:
    # A process of its own: in this one Triton may be set to interpret.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-c", SCRIPT, json.dumps(chosen)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (op, *_), line in zip(chosen, done.stdout.splitlines(), strict=True):
        assert json.loads(line) == [[op, kernel, 0, True] for kernel in KERNELS[op]], (op, line)


def test_every_kernel_and_every_vendor_is_compiled() -> None:
    together = [case for cases in CHOSEN.values() for case in cases]
    assert {op for op, shape, *_ in together if shape == "full"} == set(KERNELS)
    assert {target for *_, target in together} == {"sm_80", "sm_90", "sm_100", "gfx942"}
