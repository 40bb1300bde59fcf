# SPDX-License-Identifier: Apache-2.0
"""Other ways to run a stage: the model says what a stage computes, an engine outside says how a device computes it.

A function marked with :func:`stage` runs as it is written, unless an engine has registered an implementation that
applies to the call. :mod:`eloftr_ops.inference.cpu.stages` registers those for inference on a CPU. While
``torch.compile`` or ``torch.export`` traces a call, no implementation applies: they see the definition.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

_Registered = list[tuple[Callable[..., bool], Callable[..., Any]]]
_implementations: dict[Callable[..., Any], _Registered] = {}


def stage(definition: Callable[P, R]) -> Callable[P, R]:
    """Mark a function or method whose implementation may be replaced; see :func:`implements`."""
    registered: _Registered = []

    @functools.wraps(definition)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        for applies, implementation in registered:
            if applies(*args, **kwargs):
                return implementation(*args, **kwargs)  # type: ignore[no-any-return]
        return definition(*args, **kwargs)

    _implementations[run] = registered
    return run


def implements(marked: Callable[..., Any], *, when: Callable[..., bool]) -> Callable[[F], F]:
    """Register the decorated function as the way to run a stage.

    Args:
        marked: a function that :func:`stage` marked.
        when: takes the arguments of the call; the implementation runs where it returns True. It must return False
            while a graph is traced.

    Raises:
        ValueError: ``marked`` is no stage.
    """
    if marked not in _implementations:
        raise ValueError(f"marked: expected a function that @stage marked, got {marked!r}.")

    def register(implementation: F) -> F:
        _implementations[marked].append((when, implementation))
        return implementation

    return register


def definition_of(marked: Callable[P, R]) -> Callable[P, R]:
    """The stage as the model states it, for an implementation that builds on it."""
    return marked.__wrapped__  # type: ignore[attr-defined, no-any-return]
