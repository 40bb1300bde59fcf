# SPDX-License-Identifier: Apache-2.0
"""Where and in which dtype the small problems of geometry are computed: float64, on the CPU where a device lacks it."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from eloftr_ops.errors import ArgumentError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def eager(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Leave a function out of `torch.compile`.

    Its loops stop when the data say so. A compiler would split it at each such place, for nothing: the small
    problems cost the same either way.
    """
    disabled: Callable[Arguments, Result] = torch.compiler.disable(function)
    return disabled


def has_float64(device: torch.device) -> bool:
    """Return whether tensors of float64 exist on a device; Apple's `mps` for instance has none."""
    if device.type in ("cpu", "cuda"):
        return True
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # NotImplementedError is a RuntimeError
        return False
    return True


def check_has_float64(argument: str, device: torch.device) -> None:
    """Refuse a device for what is drawn and rendered in float64 on the device itself.

    Raises:
        ArgumentError: the device has no float64.
    """
    if not has_float64(device):
        raise ArgumentError(
            argument,
            f"expected a device that has float64, got {device}. Draw and render on the CPU, and move the result.",
        )


def work_device(device: torch.device) -> torch.device:
    """Return the device that computes for `device`: itself, or the CPU where it has no float64."""
    return device if has_float64(device) else torch.device("cpu")


def to_work(values: Tensor) -> Tensor:
    """Values in float64, on the device itself or on the CPU; the gradient flows back."""
    # Two steps: a device without float64 cannot convert, it can only be copied from.
    return values.to(work_device(values.device)).to(torch.float64)


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of results for an input dtype: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def returned(values: Tensor, like: Tensor) -> Tensor:
    """Results on the device of an input, in its dtype, at least float32; flags keep their dtype."""
    if values.is_floating_point():
        values = values.to(result_dtype(like.dtype))
    return values.to(like.device)
