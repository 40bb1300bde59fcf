# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of a matcher: launches are recorded on the first call with some shapes, and repeated on the next ones.

At batch 1 a GPU waits for the host, which launches hundreds of small kernels. A graph launches them all at once. It has
fixed shapes, so it has a row for every cell of image 0, with the matches moved to the front: no pair has more mutual
nearest cells. The host then waits once, for the number of matches, and cuts the rows there. Matches, their order and
their values are those of the same kernels launched one by one.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eloftr_kernels.dispatch import chosen_backend
from eloftr_ops.checks import acceptable_values
from eloftr_ops.config import EfficientLoFTRConfig, GradientMode, check_choice
from eloftr_ops.inference.capture import CaptureBackend, CudaBackend
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.types import Matches

KEPT = 8  # captures of one matcher
SWITCHED_OFF = "switched off by cuda_graphs=False"
_REMEMBERED = 64  # signatures that were met while all places were taken

Entries = dict[tuple[str, ...], Tensor]


class FixedMatches(NamedTuple):
    """The matches of a batch with fixed shapes, on the device."""

    rows: Matches  # (B * L, ...): the matches come first, in the order of forward; the rest is arbitrary
    report: Tensor  # (2,) int64: 1 where all input values are acceptable; the number of matches


class Capture(NamedTuple):
    """A recorded call."""

    inputs: Entries  # where it reads
    outputs: FixedMatches  # where it writes
    replay: Callable[[], None]


class Weights(NamedTuple):
    """What a capture has read of a matcher. Changes in place reach a capture, replacements do not."""

    config: EfficientLoFTRConfig
    modules: tuple[nn.Module, ...]
    places: tuple[int, ...]


class CudaGraphs:
    """The captures of one matcher, at most ``limit`` of them: the least recently used one goes first.

    A call is captured when its shapes, dtypes, masks, mode and settings (autocast, precision, backend of the ops) are
    new. While all places are taken, it is captured when it is met a second time: images that all differ in size must
    not be captured one by one. All captures go when weights move or are replaced, or the configuration changes.

    Calls from several threads and streams go one after the other; a result belongs to the stream of its call.

    Args:
        limit: captures that are kept; they share the memory of what they compute on the way.
        off: why nothing is captured, in words; None where it is.
        backend: what records and repeats.

    Attributes:
        at_once: False: a call is captured when its shapes are met for the second time, whether places are free or not.
        off: the same as the argument. A capture that fails is reported by one warning, and is the reason from then on;
            assign None to try again. Shapes whose capture does not fit the memory are left out alone, without a
            warning.

    Raises:
        ValueError: a limit below 1.
    """

    def __init__(self, limit: int = KEPT, off: str | None = None, backend: CaptureBackend | None = None) -> None:
        if limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}. off='...' switches captures off.")
        self.limit, self.off, self.at_once = limit, off, True
        self._backend: CaptureBackend = CudaBackend() if backend is None else backend
        self._captures: OrderedDict[tuple[Any, ...], Capture] = OrderedDict()
        self._met: OrderedDict[tuple[Any, ...], None] = OrderedDict()
        self._too_large: set[tuple[Any, ...]] = set()
        self._weights: Weights | None = None
        self._storage: list[Tensor] = []  # a place of weights is not used again while a capture reads it
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Captures that are kept."""
        return len(self._captures)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a matcher records for itself."""
        return CudaGraphs, (self.limit, self.off), {"at_once": self.at_once}

    def why_not(self, device: torch.device) -> str | None:
        """Why a matcher on ``device`` runs without, as half a sentence; None where it captures."""
        return self.off or self._backend.why_not(device)

    def clear(self) -> None:
        """Forget all captures."""
        with self._lock:
            self._captures.clear()
            self._met.clear()
            self._too_large.clear()
            self._weights, self._storage = None, []
            self._backend.release()

    def match(self, matcher: EfficientLoFTR, data: Any, mode: GradientMode | None) -> dict[str, Tensor] | None:
        """What ``matcher.forward(data, mode=mode)`` gives, by a replay; None: call that, no replay can stand for it.

        Raises:
            ValueError, TypeError: as ``forward``, on the first call with some shapes. Later ones leave it to that.
        """
        device = matcher.device
        if torch.compiler.is_compiling() or self.why_not(device) is not None:
            return None
        entries = _entries(data)
        if entries is None or any(x.device != device for x in entries.values()):
            return None
        if self._backend.is_capturing(device):
            return None
        mode = check_choice("mode", mode or matcher.config.gradient_mode, GradientMode)
        key = (mode, *_settings(device), *((name, *_layout(x)) for name, x in entries.items()))
        with self._lock, torch.inference_mode(False), torch.no_grad():
            capture = self._captures.get(key)
            if capture is not None:
                self._captures.move_to_end(key)
                found, current = self._replay(capture, entries, matcher)
                if current:
                    return found
                self.clear()
            capture = self._new_capture(key, matcher, data, entries, mode)
            return None if capture is None else self._replay(capture, entries, matcher)[0]

    def _replay(
        self, capture: Capture, entries: Entries, matcher: EfficientLoFTR
    ) -> tuple[dict[str, Tensor] | None, bool]:
        """The matches, None for values that no matcher takes; and whether the capture knows the present weights."""
        with self._backend.exclusive(matcher.device):
            for name, place in capture.inputs.items():
                place.copy_(entries[name])
            capture.replay()
            current = _weights(matcher) == self._weights  # asked while the device works
            acceptable, count = capture.outputs.report.tolist()  # here the host waits
            if not acceptable:
                return None, current  # forward says what is wrong
            rows = capture.outputs.rows._asdict()
            return {name: field[:count].clone() for name, field in rows.items()}, current

    def _new_capture(
        self,
        key: tuple[Any, ...],
        matcher: EfficientLoFTR,
        data: Any,
        entries: Entries,
        mode: GradientMode,
    ) -> Capture | None:
        """Record this call, where that is possible and worth it."""
        weights = _weights(matcher)
        if weights is None:
            return None
        if self._weights is not None and weights != self._weights:
            self.clear()
        if key in self._too_large or not self._has_place(key):
            return None
        matcher.check_input(data)  # what no matcher takes is no reason to switch off
        capture = self._record(key, matcher, entries, mode)
        if capture is not None:
            self._weights = weights
            self._storage = [x.detach() for x in (*matcher.parameters(), *matcher.buffers())]
            self._captures[key] = capture
        return capture

    def _has_place(self, key: tuple[Any, ...]) -> bool:
        """Whether to capture this signature; makes place for it."""
        free = len(self._captures) < self.limit
        if free and self.at_once:
            return True
        if key not in self._met:
            self._met[key] = None
            if len(self._met) > _REMEMBERED:
                self._met.popitem(last=False)
            return False
        while len(self._captures) >= self.limit:
            self._captures.popitem(last=False)
        return True

    def _record(
        self, key: tuple[Any, ...], matcher: EfficientLoFTR, entries: Entries, mode: GradientMode
    ) -> Capture | None:
        try:
            inputs = {name: _place_for(x).copy_(x) for name, x in entries.items()}
            data = _nested(inputs)
            with self._backend.exclusive(matcher.device):
                recorded = self._backend.capture(lambda: fixed_matches(matcher, data, mode), matcher.device)
            return Capture(inputs, *recorded)
        except torch.OutOfMemoryError:
            self.clear()  # the plain way needs the memory
            self._too_large.add(key)
            return None
        except Exception as error:  # of the driver, of a kernel, of a library: none may cost the user a match
            self.clear()
            self.off = f"a capture failed: {type(error).__name__}: {_first_line(error)}"
            warnings.warn(
                f"CUDA graphs are off, {self.off}. Matching goes on without them.",
                RuntimeWarning,
                stacklevel=5,
            )
            return None


def fixed_matches(matcher: EfficientLoFTR, data: Mapping[str, Any], mode: GradientMode) -> FixedMatches:
    """The five steps of ``forward`` with fixed shapes; nothing waits for the device.

    Args:
        matcher: on any device.
        data: as for ``forward``; its values are not checked but reported.
        mode: as for ``forward``.
    """
    pair = matcher.check_input(data, values=False)
    rows, valid = matcher.match_rows(pair, mode)
    order = valid.flatten().logical_not().byte().argsort(stable=True)
    report = torch.stack([acceptable_values(data, pair).long(), valid.sum()])
    return FixedMatches(Matches(*(field[order] for field in rows)), report)


def _entries(data: Any) -> Entries | None:
    """The tensors of an input by their names; None for an input that no capture takes."""
    if not isinstance(data, Mapping):
        return None
    entries: Entries = {}
    for name in sorted(data, key=str):
        value = data[name]
        if isinstance(value, Mapping):
            entries |= {(name, inner): value[inner] for inner in sorted(value, key=str)}
        elif value is not None:
            entries[name,] = value
    plain = all(type(x) in (Tensor, nn.Parameter) and x.numel() > 0 for x in entries.values())
    return entries if entries and plain else None


def _nested(entries: Entries) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for (name, *inner), x in entries.items():
        if inner:
            data.setdefault(name, {})[inner[0]] = x
        else:
            data[name] = x
    return data


def _layout(x: Tensor) -> tuple[Any, ...]:
    channels_last = x.ndim == 4 and x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last)
    return x.shape, x.dtype, channels_last


def _place_for(x: Tensor) -> Tensor:
    """Memory that is laid out as the maps of the backbone are, or plainly."""
    *_, channels_last = _layout(x)
    return torch.empty_like(x, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _settings(device: torch.device) -> tuple[Any, ...]:
    """What decides which kernels run, besides the input."""
    return (
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        chosen_backend(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.are_deterministic_algorithms_enabled(),
    )


def _weights(matcher: EfficientLoFTR) -> Weights | None:
    """None for a matcher with hooks, which a replay would not call."""
    modules: list[nn.Module] = []
    places: list[int] = []
    for module in _modules(matcher):
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        modules.append(module)
        for tensors in (module._parameters, module._buffers):
            places += [0 if x is None else x.data_ptr() for x in tensors.values()]
    return Weights(matcher.config, tuple(modules), tuple(places))


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """As ``module.modules()``, several times as fast: this is asked for every pair."""
    waiting: list[nn.Module | None] = [module]
    while waiting:
        found = waiting.pop()
        if found is not None:
            yield found
            waiting += found._modules.values()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
