# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""What Triton's interpreter computes rightly. Imported where it is on, and asked for bfloat16."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

_SIDE = 16
_ABOVE_HALF = 1 + 0.75 * 2**-7  # nearer to the bfloat16 above it than to 1


@triton.jit
def _square(x_ptr, products_ptr, value_ptr, rounded_ptr, SIDE: tl.constexpr):
    """The matrix product of x and x, and a value in the type of x."""
    at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(products_ptr + at, tl.dot(x, x))
    tl.store(rounded_ptr, tl.load(value_ptr).to(x_ptr.dtype.element_ty))


def measure_bfloat16() -> bool:
    """Whether bfloat16 numbers are multiplied as numbers, and float32 is rounded to the nearest of them."""
    x = 1.5 * torch.eye(_SIDE, dtype=torch.bfloat16)
    products, rounded = torch.zeros(_SIDE, _SIDE), torch.zeros(1, dtype=torch.bfloat16)
    _square[(1,)](x, products, torch.full((1,), _ABOVE_HALF), rounded, SIDE=_SIDE)
    return bool(products.equal(x.float() @ x.float()) and rounded.item() > 1)


computes_bfloat16 = functools.cache(measure_bfloat16)
