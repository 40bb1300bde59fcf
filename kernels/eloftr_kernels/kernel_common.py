# SPDX-License-Identifier: Apache-2.0
"""What the kernels of several ops share and what needs Triton: imported by kernels and launches only."""

from __future__ import annotations

import torch
import triton.language as tl

NORM_EPS = tl.constexpr(1e-5)  # of torch.nn.functional.layer_norm

_FLOAT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Operand type of ``tl.dot`` for tensors of ``dtype``."""
    return _FLOAT[dtype]


def power_of_2(size: int) -> int:
    """The smallest power of two that is not below ``size``, and at least 16, the least that ``tl.dot`` takes."""
    return max(16, 1 << max(0, size - 1).bit_length())


def next_power_of_2(size: int) -> int:
    """The least power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def blocks(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)
