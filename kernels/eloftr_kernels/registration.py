# SPDX-License-Identifier: Apache-2.0
"""How a launch function becomes an operator of ``torch.library``: schema, device, fake results, gradient.

The schema is read from the annotations of the launch function. A schema knows tensors, lists of tensors, numbers and
None, but no NamedTuple and no keyword with a default that is a tensor: weights cross it as one list, in the order of
their NamedTuple, and are named again on the other side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from eloftr_kernels.dispatch import on_device_of

Launch = Callable[..., Any]


def operator(name: str, *, fake: Callable[..., Any]) -> Callable[[Launch], CustomOpDef]:
    """Register the decorated launch function as ``name``, on the device of its first tensor.

    Args:
        name: ``namespace::name``.
        fake: takes the same arguments, and gives empty results of the right shapes, dtypes and layouts.
    """

    def register(launch: Launch) -> CustomOpDef:
        @functools.wraps(launch)
        def on_device(first: Tensor, *rest: Any) -> Any:
            try:
                with on_device_of(first):
                    return launch(first, *rest)
            except Exception as error:
                if raised_by_triton(error):
                    raise RuntimeError(explained(name, first.device, error)) from error
                raise

        registered = torch.library.custom_op(name, mutates_args=())(on_device)
        registered.register_fake(fake)
        return registered

    return register


def raised_by_triton(error: BaseException) -> bool:
    """Whether Triton itself failed: its import, its compiler, its launcher."""
    if isinstance(error, ImportError) and (error.name or "").startswith("triton"):
        return True
    if type(error).__module__.startswith("triton"):
        return True
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and str(last.tb_frame.f_globals.get("__name__", "")).startswith("triton")


def explained(name: str, device: torch.device, error: BaseException) -> str:
    """What failed and what to do, in words."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0].strip() if lines else 'no reason given'}"
    return (
        f"{name}: Triton could not compile or launch the kernel on {device} ({reason}). "
        "Nothing was computed. Choose eloftr_kernels.backend('reference') for PyTorch's operations, "
        "and please report the error above."
    )


def differentiable(
    forward: CustomOpDef,
    *,
    save: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Any, ...]],
) -> None:
    """Give ``forward`` a gradient.

    Args:
        forward: of :func:`operator`.
        save: (context, inputs, output): keep what the backward pass needs.
        backward: (context, gradients of the outputs) -> gradients of all inputs, None where there is none.
    """
    forward.register_autograd(backward, setup_context=save)
