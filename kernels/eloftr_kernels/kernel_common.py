# SPDX-License-Identifier: Apache-2.0
"""What the kernels of several ops share and what needs Triton: imported by kernels and launches only."""

from __future__ import annotations

from typing import Any

import torch
import triton
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


_bound: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_MOST_BOUND = 4096
_VALUES = frozenset((int, float, bool, type(None)))
_ON_AMD = torch.version.hip is not None  # whose compiler asks for the sizes of tensors, too


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
