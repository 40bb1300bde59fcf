# SPDX-License-Identifier: Apache-2.0
"""Matching many pairs on a Ray cluster: one actor per worker, work in small chunks, dead workers replaced.

The driver hands out chunks, one per worker at a time, and counts a chunk's pairs once, when its result has come. A
worker that dies takes only its chunk with it: another worker takes its place, and the chunk is handed out again. A pair
that kills its workers time and again is refused.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from eloftr_ops.errors import ArgumentError
from eloftr_ops.matching import load_matcher
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.reconstruction.engine import MatchSettings, Outcome, PairWorker
from eloftr_ops.reconstruction.features import images_in_memory
from eloftr_ops.reconstruction.pairs import Pair, RefusedPair, reading_order

__all__ = ["RayEngine", "require_ray"]

_CHUNK = 16  # pairs
_ATTEMPTS = 3


class _Chunk(NamedTuple):
    """Pairs that are handed out together."""

    pairs: list[Pair]
    attempts: int = 0


def require_ray() -> ModuleType:
    """The package ray.

    Raises:
        ArgumentError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ArgumentError(
            "engine", "ray needs the package ray. Install it with pip install 'eloftr-ops[ray]'."
        ) from error
    return ray


class RayEngine:
    """Matches pairs on the workers of a Ray cluster.

    The images must lie at the same path on all machines, and this package must be installed there.

    Args:
        folder: of the images.
        settings: how to match; ``memory`` is per worker.
        address: of a running cluster, as ``ray.init`` takes it; None: a cluster on this machine alone.
        workers: how many; None: one per GPU of the cluster, or one per CPU if it has no GPU.
        chunk: pairs that are handed out together.

    Raises:
        ArgumentError: ray is not installed, or no cluster answers at the address.
    """

    def __init__(
        self,
        folder: Path,
        settings: MatchSettings,
        *,
        address: str | None = None,
        workers: int | None = None,
        chunk: int = _CHUNK,
    ) -> None:
        self._ray = require_ray()
        self._folder, self._settings, self._chunk = folder.resolve(), settings, chunk
        self._own_cluster = not self._ray.is_initialized()
        if self._own_cluster:
            try:
                self._ray.init(address=address, num_cpus=workers if address is None else None, **_QUIET)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ArgumentError("address", f"no Ray cluster answers at {address}: {error}.") from error
        resources = self._ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        count = workers or gpus or int(resources.get("CPU", 1))
        self._actor = self._ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_restarts=0)(_Worker)
        self._workers = [self._new_worker() for _ in range(count)]
        self._matcher: EfficientLoFTR | None = None

    @property
    def matcher(self) -> EfficientLoFTR:
        """One with the same weights, on this machine's CPU."""
        if self._matcher is None:
            self._matcher = load_matcher(self._settings.weights, "cpu", threshold=self._settings.threshold)
        return self._matcher

    def processes(self) -> list[int]:
        """The process of each worker, on its machine."""
        pids: list[int] = self._ray.get([worker.process.remote() for worker in self._workers])
        return pids

    def run(self, pairs: Sequence[Pair]) -> Iterator[Outcome]:
        """The outcome of each pair, once, in no particular order."""
        waiting = deque(self._chunks(pairs))
        running: dict[Any, tuple[_Chunk, int]] = {}
        idle = deque(range(len(self._workers)))
        while waiting or running:
            while waiting and idle:
                chunk, number = waiting.popleft(), idle.popleft()
                running[self._workers[number].match.remote(chunk.pairs)] = chunk, number
            (reference,), _ = self._ray.wait(list(running), num_returns=1)
            chunk, number = running.pop(reference)
            idle.append(number)
            try:
                outcomes: list[Outcome] = self._ray.get(reference)
            except self._ray.exceptions.RayActorError as error:
                self._workers[number] = self._new_worker()
                outcomes, again = _after_a_death(chunk, str(error))
                waiting.extend(again)
            yield from outcomes

    def close(self) -> None:
        """Stop the workers, and the cluster if it was begun here."""
        for worker in self._workers:
            self._ray.kill(worker)
        if self._own_cluster:
            self._ray.shutdown()

    def _new_worker(self) -> Any:
        return self._actor.remote(str(self._folder), self._settings)

    def _chunks(self, pairs: Sequence[Pair]) -> list[_Chunk]:
        if not pairs:
            return []
        names = list(dict.fromkeys(itertools.chain(*pairs)))
        images = images_in_memory(
            self.matcher,
            self._folder,
            names,
            resize=self._settings.resize,
            budget=self._settings.memory,
        )
        tiles = reading_order(pairs, images, len(self._workers))
        return [
            _Chunk(tile[first : first + self._chunk]) for tile in tiles for first in range(0, len(tile), self._chunk)
        ]


class _Worker:
    """Runs in a process of the cluster."""

    def __init__(self, folder: str, settings: MatchSettings) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            torch.set_num_threads(1)  # a worker has one CPU
        matcher = load_matcher(settings.weights, device, threshold=settings.threshold)
        self._worker = PairWorker(matcher, Path(folder), settings)

    def match(self, pairs: list[Pair]) -> list[Outcome]:
        """The outcome of each pair."""
        return list(self._worker.match(pairs))

    def process(self) -> int:
        """Its number on this machine."""
        return os.getpid()


def _after_a_death(chunk: _Chunk, error: str = "") -> tuple[list[Outcome], list[_Chunk]]:
    """What becomes of a chunk whose worker died: again, then each pair alone, then refused."""
    attempts = chunk.attempts + 1
    if attempts < _ATTEMPTS:
        return [], [_Chunk(chunk.pairs, attempts)]
    if len(chunk.pairs) > 1:
        return [], [_Chunk([pair]) for pair in chunk.pairs]
    reason = f"its worker died {attempts} times. Too little memory? Pass a smaller --resize or --memory. {error}"
    reason = " ".join(reason.split())
    return [RefusedPair(chunk.pairs[0], reason)], []


_QUIET: dict[str, Any] = {
    "include_dashboard": False,
    "log_to_driver": False,
    "logging_level": "error",
    "configure_logging": False,
}
