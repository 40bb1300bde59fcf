# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs without a GPU: operations are recorded with the memory that they read and write, and repeated there."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from eloftr_ops.inference.capture import NoWaiting

_CHECK = ("eloftr_kernels.dual_softmax.op", "eloftr_kernels.window_match.op")
_SUM = ("eloftr_kernels.dual_softmax.cpu", "eloftr_kernels.window_match.cpu")
_CHOOSE = (
    "eloftr_kernels.dispatch",
    "eloftr_kernels.aggregated_attention.cpu",
    "eloftr_kernels.dual_softmax.op",
    "eloftr_kernels.window_match.cpu",
    "eloftr_ops.inference.cpu.stages",
    "eloftr_ops.inference.cpu.winograd",
)


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the code that a GPU takes: whole batches, maps in one piece, no value read by the host."""
    for name in _CHOOSE:
        monkeypatch.setattr(importlib.import_module(name), "is_cpu_inference", lambda x: False)
    for name in _CHECK:
        monkeypatch.setattr(importlib.import_module(name), "check_indices", lambda indices: None)
    for name in _SUM:
        monkeypatch.setattr(importlib.import_module(name), "two_way_logsumexp", _two_way_logsumexp)


def _two_way_logsumexp(scores: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``eloftr_kernels.arithmetic.two_way_logsumexp`` on a GPU."""
    return torch.logsumexp(scores, 2), torch.logsumexp(scores, 1)


class _Recorder(NoWaiting):
    """Notes every operation with its tensors, as far as a GPU could."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """No line of Python of the recorded function runs here, only its operations, in the same memory."""
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for func, args, kwargs, result in self.calls:
                repeated = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(repeated), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class RecordingBackend:
    """A :class:`eloftr_ops.inference.capture.CaptureBackend` of the CPU, which counts what it is asked for."""

    def __init__(self, fails: Callable[[], None] | None = None) -> None:
        self.captures = self.replays = self.releases = self.inside = 0
        self.busy: bool = False
        self._fails = fails

    def why_not(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "there is no fake of it"

    def is_capturing(self, device: torch.device) -> bool:
        return self.busy

    def capture(self, run: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        if self._fails is not None:
            self._fails()
        self.captures += 1
        with _Recorder() as recorder:
            result = run()

        def replay() -> None:
            assert self.inside == 1, "a replay outside of exclusive()"
            self.replays += 1
            recorder.replay()

        return result, replay

    @contextlib.contextmanager
    def exclusive(self, device: torch.device) -> Iterator[None]:
        self.inside += 1
        assert self.inside == 1, "two at a time"
        try:
            yield
        finally:
            self.inside -= 1

    def release(self) -> None:
        self.releases += 1
