# SPDX-License-Identifier: Apache-2.0
"""Matching many pairs on this machine: features kept, batches of equal size, one worker per device."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eloftr_ops.errors import ArgumentError, FileError
from eloftr_ops.matching import choose_device, load_matcher
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.reconstruction.features import FeatureStore, KeptImage, images_in_memory
from eloftr_ops.reconstruction.journal import PairMatches
from eloftr_ops.reconstruction.pairs import Pair, RefusedPair, reading_order

__all__ = ["LocalEngine", "MatchSettings", "PairWorker", "choose_devices"]

Outcome = PairMatches | RefusedPair


@dataclass(frozen=True)
class MatchSettings:
    """How the pairs are matched.

    Attributes:
        weights: as `eloftr_ops.match_images`.
        resize: images with a longer long side are reduced to it; 0: never.
        threshold: least confidence of a match; None: the weights' own.
        batch: pairs of equal sizes that go through the matcher together. A CPU matches them one by one.
        memory: bytes for backbone features, on each device.
        loaders: threads that read images, for each device.
    """

    weights: str = "small"
    resize: int = 640
    threshold: float | None = None
    batch: int = 4
    memory: int = 4 << 30
    loaders: int = 2

    def __post_init__(self) -> None:
        for name, least in (("resize", 0), ("batch", 1), ("memory", 1), ("loaders", 1)):
            if getattr(self, name) < least:
                raise ArgumentError(name, f"expected at least {least}, got {getattr(self, name)}.")
        if self.threshold is not None and not 0 <= self.threshold < float("inf"):
            raise ArgumentError("threshold", f"expected a confidence of 0 or more, got {self.threshold}.")


class PairWorker:
    """Matches tiles of pairs with one matcher on one device.

    Args:
        matcher: for inference; on its device.
        folder: of the images.
        settings: how to match.
    """

    def __init__(self, matcher: EfficientLoFTR, folder: Path, settings: MatchSettings) -> None:
        self._matcher, self._settings = matcher, settings
        self.store = FeatureStore(
            matcher, folder, resize=settings.resize, budget=settings.memory, loaders=settings.loaders
        )

    def match(self, pairs: Sequence[Pair], following: Sequence[Pair] = ()) -> Iterator[Outcome]:
        """The matches of each pair, or why there are none; each pair once, in no particular order.

        Args:
            pairs: what to match; best a tile of `reading_order`.
            following: pairs that come next: their images are read ahead.
        """
        self.store.expect(itertools.chain(*pairs, *following))
        waiting: dict[object, list[tuple[Pair, KeptImage, KeptImage]]] = {}
        for pair in pairs:
            try:
                image0 = self.store.get(pair[0])
                image1 = self.store.get(pair[1], keep=pair)
            except FileError as error:
                yield RefusedPair(pair, str(error))
                continue
            except torch.OutOfMemoryError:
                yield RefusedPair(pair, "out of GPU memory. Pass a smaller --resize or --memory.")
                continue
            if not (image0.features and image1.features):
                yield _pair_matches((pair, image0, image1), *_NONE)
                continue
            shape = image0.shape, image1.shape
            waiting.setdefault(shape, []).append((pair, image0, image1))
            if len(waiting[shape]) == self._settings.batch:
                yield from self._match_batch(waiting.pop(shape))
        for batch in waiting.values():
            yield from self._match_batch(batch)

    def _match_batch(self, batch: list[tuple[Pair, KeptImage, KeptImage]]) -> Iterator[Outcome]:
        try:
            with torch.inference_mode():
                found = self._matcher(
                    {
                        "features0": _stacked([image0.features for _, image0, _ in batch]),
                        "features1": _stacked([image1.features for _, _, image1 in batch]),
                    }
                )
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                yield RefusedPair(batch[0][0], "out of GPU memory. Pass a smaller --resize or --memory.")
                return
            for entry in batch:
                yield from self._match_batch([entry])
            return
        names = ("keypoints0", "keypoints1", "confidence", "batch_indexes")
        keypoints0, keypoints1, confidence, indexes = (found[name].cpu() for name in names)
        for number, entry in enumerate(batch):
            rows = indexes == number
            yield _pair_matches(entry, keypoints0[rows], keypoints1[rows], confidence[rows])

    def close(self) -> None:
        """Let the images go."""
        self.store.close()


class LocalEngine:
    """Matches pairs on the devices of this machine.

    Args:
        folder: of the images.
        settings: how to match.
        devices: one worker for each.
    """

    def __init__(self, folder: Path, settings: MatchSettings, devices: Sequence[torch.device]) -> None:
        self._folder, self._settings = folder, settings
        self._matchers = [load_matcher(settings.weights, device, threshold=settings.threshold) for device in devices]

    @property
    def matcher(self) -> EfficientLoFTR:
        """That of the first device."""
        return self._matchers[0]

    def run(self, pairs: Sequence[Pair]) -> Iterator[Outcome]:
        """The outcome of each pair, once, in no particular order."""
        if not pairs:
            return
        names = list(dict.fromkeys(itertools.chain(*pairs)))
        images = images_in_memory(
            self.matcher,
            self._folder,
            names,
            resize=self._settings.resize,
            budget=self._settings.memory,
        )
        tiles = reading_order(pairs, images, len(self._matchers) if len(self._matchers) > 1 else 1)
        if len(self._matchers) == 1:
            yield from self._run_alone(tiles)
        else:
            yield from self._run_together(tiles)

    def _run_alone(self, tiles: list[list[Pair]]) -> Iterator[Outcome]:
        worker = PairWorker(self.matcher, self._folder, self._settings)
        try:
            for tile, following in itertools.zip_longest(tiles, tiles[1:], fillvalue=()):
                yield from worker.match(tile, following)
        finally:
            worker.close()

    def _run_together(self, tiles: list[list[Pair]]) -> Iterator[Outcome]:
        """One thread per device; what ends one of them ends all."""
        todo: queue.SimpleQueue[list[Pair]] = queue.SimpleQueue()
        for tile in tiles:
            todo.put(tile)
        done: queue.Queue[Outcome | BaseException | None] = queue.Queue(maxsize=64)
        stop = threading.Event()
        for matcher in self._matchers:
            arguments = (PairWorker(matcher, self._folder, self._settings), todo, done, stop)
            threading.Thread(target=_work, args=arguments, daemon=True).start()
        running = len(self._matchers)
        try:
            while running:
                outcome = done.get()
                if outcome is None:
                    running -= 1
                elif isinstance(outcome, BaseException):
                    raise outcome
                else:
                    yield outcome
        finally:
            stop.set()
            while running:  # a full queue must not hold a thread
                running -= done.get() is None


def choose_devices(text: str) -> list[torch.device]:
    """Devices of a list such as ``cuda:0,cuda:1``; "auto": all CUDA GPUs, or the CPU.

    Raises:
        ArgumentError: no such device here, or one twice.
    """
    if text == "auto":
        return [torch.device("cuda", k) for k in range(torch.cuda.device_count())] or [torch.device("cpu")]
    devices = [choose_device(part.strip()) for part in text.split(",")]
    if len(set(devices)) < len(devices):
        raise ArgumentError("devices", f"expected every device once, got {text}.")
    return devices


def _work(
    worker: PairWorker,
    todo: queue.SimpleQueue[list[Pair]],
    done: queue.Queue[Outcome | BaseException | None],
    stop: threading.Event,
) -> None:
    try:
        while not stop.is_set():
            for outcome in worker.match(todo.get_nowait()):
                done.put(outcome)
                if stop.is_set():
                    break
    except queue.Empty:
        pass
    except BaseException as error:
        done.put(error)
    finally:
        worker.close()
        done.put(None)


_NONE = (torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0))


def _stacked(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([each[name] for each in features]) for name in features[0]}


def _pair_matches(
    entry: tuple[Pair, KeptImage, KeptImage], keypoints0: Tensor, keypoints1: Tensor, confidence: Tensor
) -> PairMatches:
    pair, image0, image1 = entry
    return PairMatches(
        pair,
        image0.loaded.to_original(keypoints0.float()).numpy(),
        image1.loaded.to_original(keypoints1.float()).numpy(),
        confidence.float().numpy(),
        image0.loaded.original_size_wh,
        image1.loaded.original_size_wh,
        (image0.state, image1.state),
    )
