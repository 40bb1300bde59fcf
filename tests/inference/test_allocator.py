# SPDX-License-Identifier: Apache-2.0
"""Freed memory that stays with the process, measured in one that does nothing else."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_SCRIPT = """
import torch
from eloftr_ops.inference.cpu import allocator

def resident():
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmRSS")) / 1024

{call}
before = resident()
torch.ones({megabytes} << 18)
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory as they see fit")
@pytest.mark.parametrize(
    ("call", "megabytes", "kept"),
    [
        ("", 200, False),
        ("allocator.keep_small_blocks()", 24, True),
        ("allocator.keep_small_blocks()", 200, False),
        ("assert allocator.keep_all_memory()", 200, True),
    ],
)
def test_freed_memory_stays(call: str, megabytes: int, kept: bool) -> None:
    script = _SCRIPT.format(call=call, megabytes=megabytes)
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    growth = float(done.stdout)
    assert growth > 0.9 * megabytes if kept else growth < 0.3 * megabytes
