# SPDX-License-Identifier: Apache-2.0
"""How a CUDA GPU records and repeats launches; :mod:`eloftr_ops.inference.cuda_graphs` decides which, and when."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")
_aten = torch.ops.aten
_WAITING = {
    _aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal, _aten.is_nonzero, _aten._unique2
}  # fmt: skip
WARM_UPS = 2  # kernels are compiled, and libraries choose their algorithms, before the capture
_one_capture = threading.Lock()  # a process can record one graph at a time


class HostWaitsError(RuntimeError):
    """The host would have to wait for the device, or fill its memory, in the midst of a capture."""


class NoWaiting(TorchDispatchMode):
    """Refuses what cannot be recorded, in this thread alone: a capture that fails half-way leaves its pool unusable."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``.

        Raises:
            HostWaitsError: it reads a value, has a shape that depends on values, or copies between devices.
        """
        kwargs = kwargs or {}
        if func.overloadpacket in _WAITING or _crosses(func.overloadpacket, args, kwargs):
            raise HostWaitsError(f"{func} makes the host wait for the device, which no graph can record")
        return func(*args, **kwargs)


def _crosses(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation copies from device to device, or picks elements by a mask."""
    if operation is _aten.copy_:
        return bool(args[0].device != args[1].device)
    if operation is _aten._to_copy:
        to, device = kwargs.get("device"), args[0].device
        return to is not None and (to.type != device.type or to.index not in (None, device.index))
    if operation in (_aten.index, _aten.index_put, _aten.index_put_):
        return any(isinstance(x, Tensor) and x.dtype is torch.bool for x in args[1])
    return False


class CaptureBackend(Protocol):
    """What records and repeats. Its captures share memory: they are repeated one after the other."""

    def why_not(self, device: torch.device) -> str | None:
        """Why nothing can be recorded on ``device``, as half a sentence; None where it can."""
        ...

    def is_capturing(self, device: torch.device) -> bool:
        """Whether somebody else is recording the current stream: this call belongs to that record."""
        ...

    def capture(self, run: Callable[[], T], device: torch.device) -> tuple[T, Callable[[], None]]:
        """Run once and record; the result, and what computes it anew, in the same memory, from what lies in the inputs.

        Raises:
            Exception: it cannot be recorded; nothing is left behind.
        """
        ...

    def exclusive(self, device: torch.device) -> AbstractContextManager[None]:
        """For the work of a replay: it waits for that of the last one, on whichever stream that was."""
        ...

    def release(self) -> None:
        """All captures are gone: so may the memory that they shared."""
        ...


class CudaBackend:
    """CUDA graphs, in one memory pool.

    ``torch.cuda.graph`` says what a capture may do. Other threads may go on with their own work meanwhile.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}  # memory is shared by captures on one stream
        self._done: torch.cuda.Event | None = None

    def why_not(self, device: torch.device) -> str | None:
        """See :class:`CaptureBackend`."""
        return None if device.type == "cuda" else f"the weights are on the device {device}, which has none"

    def is_capturing(self, device: torch.device) -> bool:
        """See :class:`CaptureBackend`."""
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    def capture(self, run: Callable[[], T], device: torch.device) -> tuple[T, Callable[[], None]]:
        """See :class:`CaptureBackend`."""
        with _one_capture, torch.cuda.device(device):
            current = torch.cuda.current_stream(device)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))
            stream.wait_stream(current)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(current):  # a capture that fails leaves its own stream in place
                with torch.cuda.stream(stream):
                    with NoWaiting():  # type: ignore[no-untyped-call]
                        run()
                    for _ in range(WARM_UPS):
                        run()
                current.wait_stream(stream)
                with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                    outputs = run()
            return outputs, graph.replay

    @contextlib.contextmanager
    def exclusive(self, device: torch.device) -> Iterator[None]:
        """See :class:`CaptureBackend`."""
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device)
            if self._done is not None:
                stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done = torch.cuda.Event()
                self._done.record(stream)

    def release(self) -> None:
        """See :class:`CaptureBackend`."""
        if self._done is not None:
            self._done.synchronize()
        self._pool = self._done = None
