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

from eloftr_kernels.dispatch import on_device_of

Launch = Callable[..., Any]
Backward = Callable[..., tuple[Any, ...]]
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_VALUES = frozenset((int, float, bool, type(None), torch.dtype))
_SINGLE = -1


class Operator:
    """An operator of ``torch.library``, for which a plain call does not pay.

    A trace, a dispatch mode, a transform, a profiler or a tensor subclass needs the registered operator. A call with
    nothing of that kind launches directly, under an ``autograd.Function`` where gradients are recorded. Both run the
    same launch function and the same formula of the gradient.

    Args:
        name: ``namespace::name``.
        launch: takes the operator's arguments, a tensor first.
        fake: as for :func:`operator`.
    """

    def __init__(self, name: str, launch: Launch, fake: Callable[..., Any]) -> None:
        self.launch = launch
        self.registered = torch.library.custom_op(name, mutates_args=())(launch)
        self.registered.register_fake(fake)
        self._recorded: type[torch.autograd.Function] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """The operator's outputs."""
        if torch.compiler.is_compiling():
            return self.registered(*arguments)
        recording = torch.is_grad_enabled()
        needed = False
        for argument in arguments:
            for x in argument if type(argument) is list else (argument,):
                kind = type(x)
                if kind in _PLAIN:
                    needed = needed or (recording and x.requires_grad)
                elif kind not in _VALUES and isinstance(x, Tensor):
                    return self.registered(*arguments)
        if _watched() or (needed and self._recorded is None):
            return self.registered(*arguments)
        if not needed or self._recorded is None:
            return self.launch(*arguments)
        layout = [len(argument) if type(argument) is list else _SINGLE for argument in arguments]
        flat = [x for argument in arguments for x in (argument if type(argument) is list else (argument,))]
        return self._recorded.apply(layout, *flat)

    def differentiable(self, save: Callable[[Any, tuple[Any, ...], Any], None], backward: Backward) -> None:
        """See :func:`differentiable`."""
        self.registered.register_autograd(backward, setup_context=save)
        launch = self.launch

        class Recorded(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, layout: list[int], *flat: Any) -> Any:
                arguments = _grouped(layout, flat)
                ctx.layout = layout
                output = launch(*arguments)
                save(ctx, arguments, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
                flat: list[Any] = []
                for count, grad in zip(ctx.layout, backward(ctx, *grads), strict=True):
                    if count == _SINGLE:
                        flat.append(grad)
                    else:
                        flat += [None] * count if grad is None else grad
                return None, *flat

        self._recorded = Recorded


def _grouped(layout: list[int], flat: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments again, lists as lists."""
    if max(layout) == _SINGLE:
        return flat
    arguments: list[Any] = []
    at = 0
    for count in layout:
        arguments.append(flat[at] if count == _SINGLE else list(flat[at : at + count]))
        at += 1 if count == _SINGLE else count
    return tuple(arguments)


def _watched() -> bool:
    """Whether something follows the operators that run: a trace, a mode, a transform, a profiler."""
    return bool(
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
        or torch._C._autograd._profiler_enabled()
    )


def operator(name: str, *, fake: Callable[..., Any]) -> Callable[[Launch], Operator]:
    """Register the decorated launch function as ``name``, on the device of its first tensor.

    Args:
        name: ``namespace::name``.
        fake: takes the same arguments, and gives empty results of the right shapes, dtypes and layouts.
    """

    def register(launch: Launch) -> Operator:
        @functools.wraps(launch)
        def on_device(first: Tensor, *rest: Any) -> Any:
            try:
                if first.device.type != "cuda":
                    return launch(first, *rest)
                with on_device_of(first):
                    return launch(first, *rest)
            except Exception as error:
                if raised_by_triton(error):
                    raise RuntimeError(explained(name, first.device, error)) from error
                raise

        return Operator(name, on_device, fake)

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
    forward: Operator,
    *,
    save: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Backward,
) -> None:
    """Give ``forward`` a gradient.

    Args:
        forward: of :func:`operator`.
        save: (context, inputs, output): keep what the backward pass needs.
        backward: (context, gradients of the outputs) -> gradients of all inputs, None where there is none.
    """
    forward.differentiable(save, backward)
