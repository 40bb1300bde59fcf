# SPDX-License-Identifier: Apache-2.0
"""What the kernels of several ops share and what needs Triton: imported by kernels and launches only."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from eloftr_kernels.arithmetic import TIE as TIED_ROUNDINGS
from eloftr_kernels.dispatch import interpreting

NORM_EPS = tl.constexpr(1e-5)  # of torch.nn.functional.layer_norm
TIE = tl.constexpr(TIED_ROUNDINGS * torch.finfo(torch.float32).eps)  # of a magnitude: what equals the best score
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))

_ON_AMD = torch.version.hip is not None  # whose compiler asks for the sizes of tensors, too
_FLOAT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def exp2(x, FLUSH: tl.constexpr):
    """2^x; with FLUSH in one instruction of NVIDIA's GPUs, which gives zero below 2^-126."""
    if FLUSH:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def log2(x, FLUSH: tl.constexpr):
    """The inverse of ``exp2``, as quick; -inf below 2^-126."""
    if FLUSH:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = tl.log2(x)
    return y


def flushes() -> bool:
    """Whether ``exp2`` and ``log2`` may use that instruction here: neither on AMD nor in the interpreter."""
    return not _ON_AMD and not interpreting()


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


_bound: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_MOST_BOUND = 4096
_VALUES = frozenset((int, float, bool, type(None)))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)``, without Triton's work on every argument of every call.

    Triton compiles a kernel for the types of its arguments, the alignment of its pointers, and what its numbers are
    divisible by. A compiled kernel is kept for the types and alignments of tensors and the values of numbers, and is
    launched as it is.

    Args:
        kernel: whose constants come last in its signature.
        grid: one to three sizes.
        arguments: tensors on one device, None and numbers.
        options: the constants, and options of the compiler.
    """
    if type(kernel) is not triton.JITFunction or _ON_AMD:
        kernel[grid](*arguments, **options)
        return
    key: list[Any] = [id(kernel), *options.values()]
    for argument in arguments:
        if type(argument) in _VALUES:
            key.append(argument)
        else:
            key += (argument.dtype, argument.data_ptr() % 16 == 0)
    key.append(arguments[0].device)
    signature = tuple(key)
    found = _bound.get(signature)
    if found is not None:
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*arguments, *constants)
        return
    compiled = kernel[grid](*arguments, **options)
    if compiled is not None:
        constants = tuple(options[name] for name in kernel.arg_names[len(arguments) :])
        if len(_bound) >= _MOST_BOUND:
            _bound.clear()
        _bound[signature] = compiled, constants
