# SPDX-License-Identifier: Apache-2.0
"""A matcher by name, or one of the user's own: loaded, put on a device, kept for the next call."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eloftr_ops.errors import ArgumentError
from eloftr_ops.inference.optimized import InferenceMatcher
from eloftr_ops.model.matcher import EfficientLoFTR

__all__ = ["Matcher", "checked_matcher", "choose_device", "device_of", "kept_matcher", "load_matcher"]

Matcher = Callable[[dict[str, Any]], Mapping[str, Tensor]]  # kornia LoFTR's dictionaries in and out

_KEPT = 4  # matchers
_MATCHERS: OrderedDict[tuple[Any, ...], Matcher] = OrderedDict()


def load_matcher(
    weights: str | os.PathLike[str],
    device: str | torch.device = "auto",
    *,
    threshold: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> EfficientLoFTR:
    """The matcher for inference, optimized, on its device.

    Raises:
        ArgumentError: weights, a device or a threshold that cannot be used.
    """
    chosen = choose_device(device)
    try:
        matcher = EfficientLoFTR.from_pretrained(weights)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise ArgumentError("weights", f"{weights}: {error}") from error
    matcher = matcher.optimize_for_inference(dtype=dtype).to(chosen)
    if isinstance(matcher, InferenceMatcher):
        matcher.cuda_graphs.at_once = False  # many pairs come alone
    if threshold is not None:
        try:
            matcher.config = matcher.config.replace(threshold=threshold)
        except ValueError as error:
            raise ArgumentError("threshold", str(error).removeprefix("threshold: ")) from error
    return matcher


def choose_device(device: str | torch.device) -> torch.device:
    """The device of that name; a GPU, if there is one, for "auto".

    Raises:
        ArgumentError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()  # it must give results back, too
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        # Unknown, not built in, or not present.
        reason = f"expected a device that PyTorch can use here, got {str(device)!r}. Pass auto or cpu."
        raise ArgumentError("device", reason) from error
    return chosen


def kept_matcher(weights: str | os.PathLike[str], device: str | torch.device, threshold: float | None) -> Matcher:
    """A matcher made before from the same weights, or a new one."""
    chosen = choose_device(device)
    key = (str(weights), _modified(weights), str(chosen), threshold)
    matcher = _MATCHERS.pop(key, None) or load_matcher(weights, chosen, threshold=threshold)
    _MATCHERS[key] = matcher
    while len(_MATCHERS) > _KEPT:
        _MATCHERS.popitem(last=False)
    return matcher


def _modified(weights: str | os.PathLike[str]) -> int | None:
    """When a file or folder was last written: new weights under an old name are read anew."""
    try:
        path = Path(weights)
        inside = list(path.iterdir()) if path.is_dir() else []
        return max(entry.stat().st_mtime_ns for entry in (path, *inside))
    except OSError:
        return None


def checked_matcher(matcher: Any, device: str | torch.device, threshold: float | None) -> Matcher:
    """The user's own matcher, if it can be used so.

    Raises:
        ArgumentError: it cannot.
    """
    if not callable(matcher):
        raise ArgumentError("weights", f"expected a name, a path or a matcher, got {type(matcher).__name__}.")
    if isinstance(matcher, nn.Module) and matcher.training:
        raise ArgumentError("weights", "expected a matcher in evaluation mode. Call its .eval() first.")
    own = device_of(matcher)
    if device != "auto" and torch.empty(0, device=choose_device(device)).device != own:
        raise ArgumentError("device", f"expected auto, or {own}, where the matcher is, got {str(device)!r}.")
    least = getattr(getattr(matcher, "config", None), "threshold", None)
    if threshold is not None and isinstance(least, float) and threshold < least:
        raise ArgumentError(
            "threshold",
            f"expected at least {least:g}, the matcher's own, got {threshold}. Change its config.",
        )
    return matcher  # type: ignore[no-any-return]


def device_of(matcher: Any) -> torch.device:
    """Where a matcher takes its images."""
    parameter = next(matcher.parameters(), None) if isinstance(matcher, nn.Module) else None
    device = getattr(matcher, "device", None) if parameter is None else parameter.device
    return device if isinstance(device, torch.device) else torch.device("cpu")
