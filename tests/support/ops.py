# SPDX-License-Identifier: Apache-2.0
"""How the kernels are held against their references: error bounds, poisoned buffers, proof of what ran."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

# Kernel error over the error of the reference run in the kernel's dtype: both measured against the reference in
# float64. Above one because blocked sums round in another order, and because a maximum over few elements varies.
ERROR_RATIO = 2.0


def assert_as_accurate(
    name: str, actual: Tensor, same_dtype: Tensor, exact: Tensor, ratio: float = ERROR_RATIO
) -> None:
    """``actual`` deviates from ``exact`` (float64) at most ``ratio`` times as much as ``same_dtype`` does.

    In the norm, in the largest element, and in direction, so that neither one wrong row, nor a scaled or zeroed
    result passes. The floor is a few roundings of the largest element, for results that the reference gets exactly.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    assert actual.dtype == same_dtype.dtype, f"{name}: {actual.dtype}, not {same_dtype.dtype}"
    assert torch.isfinite(actual).all(), f"{name}: {int((~torch.isfinite(actual)).sum())} values are not finite"
    if exact.numel() == 0:
        return
    error, allowed = (t.double() - exact for t in (actual, same_dtype))
    floor = torch.finfo(actual.dtype).eps * exact.abs().max()
    limits = {
        "norm": (error.norm(), ratio * allowed.norm() + floor * exact.numel() ** 0.5),
        "largest": (error.abs().max(), 2 * ratio * allowed.abs().max() + 2 * floor),
    }
    for measure, (value, limit) in limits.items():
        assert value <= limit, f"{name}: {measure} of the error {value:.3e} > {limit:.3e}"
    assert_same_direction(name, actual, exact)


def assert_same_direction(name: str, actual: Tensor, exact: Tensor) -> None:
    """Cosine and length of the two as vectors agree to 1 % (a zeroed or flipped result cannot pass a loose bound)."""
    a, e = actual.double().flatten(), exact.double().flatten()
    if e.norm() == 0:
        assert a.norm() == 0, f"{name}: expected zeros"
        return
    cosine, length = a @ e / (a.norm() * e.norm()).clamp(min=1e-300), a.norm() / e.norm()
    assert cosine > 0.99, f"{name}: cosine {cosine:.4f}"
    assert 0.99 < length < 1.01, f"{name}: length ratio {length:.4f}"


@contextlib.contextmanager
def poisoned_buffers() -> Iterator[None]:
    """``torch.empty`` and its kin return NaN (all bits set for integers): what is not written shows."""
    with contextlib.ExitStack() as stack:
        for name in ("empty", "empty_like", "empty_strided"):
            stack.enter_context(mock.patch.object(torch, name, _poisoned(getattr(torch, name))))
        for name in ("new_empty", "new_empty_strided"):
            stack.enter_context(mock.patch.object(Tensor, name, _poisoned(getattr(Tensor, name))))
        yield


def _poisoned(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: object, **kwargs: object) -> Tensor:
        out = create(*args, **kwargs)
        if out.device.type == "meta" or not out.numel():
            return out
        return out.fill_(float("nan") if out.is_floating_point() else (1 if out.dtype == torch.bool else -1))

    return poisoned


@contextlib.contextmanager
def spy(module: ModuleType, *names: str) -> Iterator[dict[str, int]]:
    """Count the calls of ``module``'s functions: which implementation ran."""
    calls = dict.fromkeys(names, 0)

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(module, name, counted(name, getattr(module, name))))
        yield calls


def value_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """``function(*inputs)``, and its gradients to every floating-point input for a random cotangent."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    wanted = [t for t in leaves if t.requires_grad]
    return out.detach(), list(torch.autograd.grad(out, wanted, cotangent))


def checked_gradcheck(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """``torch.autograd.gradcheck`` that cannot pass vacuously: outputs must need gradients, and no gradient is zero."""
    leaves = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    out = function(*leaves)
    assert out.requires_grad, "the output needs no gradient: there is nothing to check"
    for index, gradient in enumerate(value_and_gradients(function, leaves)[1]):
        assert gradient.abs().max() > 0, f"the gradient to floating-point input {index} is zero"
    assert torch.autograd.gradcheck(function, tuple(leaves), fast_mode=True)


def interpret_bfloat16_as_gpus_do() -> None:
    """Teach Triton's interpreter bfloat16: it multiplies the bits as if they were integers, and rounds towards zero.

    Products of two bfloat16 numbers are exact in float32, in which GPUs accumulate; conversion rounds to the nearest.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16 or handle.data.dtype != np.uint16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        return multiply(self, widened(a), widened(b), *rest)

    def cast_impl(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.uint16)
        return TensorHandle(rounded.numpy(), tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
