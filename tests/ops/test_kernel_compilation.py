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
        "_best_above_fwd",
        "_mutual_best_fwd",
        "_best_reduce",
    ],
    "window_match": ["_window_match_fwd", "_window_match_bwd", "_patches_to_map"],
}
# Kernels whose inner products are Hopper's instructions for a group of four warps, in half precision.
WGMMA = {
    *("_dual_softmax_lse_fwd", "_dual_softmax_lse_bwd", "_mutual_best_fwd"),
    *("_upsample_mlp_fwd", "_update_bwd", "_hidden_bwd"),
    *("_window_match_fwd", "_window_match_bwd"),
}
# Two programs on a multiprocessor: one multiplies while the other takes exponentials.
SHARED_MULTIPROCESSOR = {"_dual_softmax_lse_fwd": 2 * 8 / 64}
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
        ("dual_softmax", "mixed", "fp16", "sm_86"),
        ("dual_softmax", "small", "fp16", "gfx942"),
        ("upsample_mlp", "small", "fp16", "gfx942"),
    ],
}
SCRIPT = """
import json, sys
from benchmarks.compile_table import compile_case
for arguments in json.loads(sys.argv[1]):
    rows = compile_case(*arguments)
    print(json.dumps([[row.op, row.kernel, row.spilled, row.fits, row.matrix, row.occupancy] for row in rows]))
"""


@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=list(CHOSEN))
def test_kernels_compile_spill_nothing_and_fit(chosen: list[tuple[str, str, str, str]]) -> None:
    # A process of its own: in this one Triton may be set to interpret.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-c", SCRIPT, json.dumps(chosen)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (op, shape, _, target), line in zip(chosen, done.stdout.splitlines(), strict=True):
        kernels = ["_centre", *KERNELS[op]] if (op, shape) == ("dual_softmax", "mixed") else KERNELS[op]
        assert [row[:4] for row in json.loads(line)] == [[op, kernel, 0, True] for kernel in kernels], line
        if target == "sm_90":
            assert {row[1] for row in json.loads(line) if row[4] == "wgmma"} == WGMMA & set(kernels), line
            assert all(row[5] >= SHARED_MULTIPROCESSOR.get(row[1], 0) for row in json.loads(line)), line


def test_every_kernel_and_every_vendor_is_compiled() -> None:
    together = [case for cases in CHOSEN.values() for case in cases]
    assert {op for op, shape, *_ in together if shape == "full"} == set(KERNELS)
    assert {target for *_, target in together} == {"sm_80", "sm_86", "sm_90", "sm_100", "gfx942"}


SAME_ARGUMENTS = """
import itertools
import torch
from unittest import mock
from benchmarks.launch import _Driver
from triton.runtime import driver
from eloftr_kernels import kernel_common
from eloftr_kernels.dual_softmax.kernel_forward import _lse_reduce

launched, handles = [], itertools.count()
load = staticmethod(lambda *arguments: (1, next(handles), 0, 0, 1024))  # every compiled kernel has a handle of its own
class Launcher(_Driver.launcher_cls):
    def __call__(self, *arguments, **named):
        # Grid, stream, handle, and what the kernel gets; between them, what Triton tells its hooks.
        launched.append([*arguments[:5], *[a for a in arguments[5:] if not callable(a)][2:]])

def call(run, part, out, parts, block=64):
    run(_lse_reduce, (2, 1), part, out, parts, 70, ACCUMULATE=False, BLOCK=block, num_warps=2)

part, out, long = torch.ones(3, 70), torch.ones(70), torch.ones(71)
with mock.patch.object(driver, "_active", _Driver()), mock.patch.object(_Driver, "launcher_cls", Launcher), \\
        mock.patch.object(_Driver.utils, "load_binary", load):
    plain = lambda kernel, grid, *arguments, **options: kernel[grid](*arguments, **options)
    cases = [(part, out, 3), (part, out, 16), (part, long[1:], 3), (part.half(), out, 3), (part, out, 3, 128)]
    for case in cases:
        call(plain, *case)
        for _ in range(2):  # the second time it is bound
            call(kernel_common.launch, *case)
assert len({usual[4] for usual in launched[::3]}) == len(cases)
assert len(launched) == 3 * len(cases) and len(kernel_common._bound) == len(cases)
for usual, first, second in zip(*[iter(launched)] * 3):
    for other in (first, second):
        assert len(usual) == len(other)
        assert all(a is b or a == b for a, b in zip(usual, other)), (usual, other)
"""


def test_a_bound_launch_hands_over_what_tritons_own_does() -> None:
    """For another number, alignment, type and constant too; nothing is launched."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", SAME_ARGUMENTS], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
