# SPDX-License-Identifier: Apache-2.0
"""Backbone features of images, kept within a memory budget, and read ahead by threads."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from eloftr_ops.checks import MIN_SIZE
from eloftr_ops.errors import FileError
from eloftr_ops.images import LoadedImage, read_image
from eloftr_ops.matching import has_texture
from eloftr_ops.model.matcher import SIZE_MULTIPLE, EfficientLoFTR

__all__ = ["FeatureStore", "KeptImage", "feature_bytes", "file_state", "images_in_memory"]

_SAMPLE = 32  # images whose size is looked at to plan the order
_LARGEST_SIDE = 1024  # pixels, of an image whose size cannot be known before it is read


class KeptImage(NamedTuple):
    """An image with its backbone features; those of a blank image are empty."""

    loaded: LoadedImage
    features: dict[str, Tensor]  # batch of one, see EfficientLoFTR.extract_features
    state: str  # of its file

    @property
    def shape(self) -> tuple[object, ...]:
        """What has to be equal in a batch."""
        return tuple((name, tuple(value.shape)) for name, value in sorted(self.features.items()))


class FeatureStore:
    """Gives images with features; keeps those that were used last.

    Files are read by threads, ahead of their use: call :meth:`expect` with the names in the order of use. Threads, not
    processes: reading takes 8 ms of a 768x512 JPEG and 41 ms of one of 12 megapixels (one core, long side 640), a
    hundredth of a pair's second on a CPU, and nearly all of it without Python's lock (another thread counted as fast
    as ever meanwhile). A process would send each image through a pipe, and would load torch anew.

    Args:
        matcher: whose features; on its device.
        folder: of the images.
        resize: as `eloftr_ops.images.read_image`; 0: never.
        budget: bytes for features. One pair of images is always kept.
        loaders: threads that read.
    """

    def __init__(self, matcher: EfficientLoFTR, folder: Path, *, resize: int, budget: int, loaders: int = 2) -> None:
        self._matcher, self._folder, self._resize, self._budget = matcher, folder, resize, budget
        self._kept: OrderedDict[str, KeptImage] = OrderedDict()
        self._broken: dict[str, str] = {}
        self._threads = ThreadPoolExecutor(max(1, loaders), thread_name_prefix="eloftr-ops-loader")
        self._expected: deque[str] = deque()
        self._reading: OrderedDict[str, Future[tuple[LoadedImage, str]]] = OrderedDict()
        self._ahead = 2 * max(1, loaders)
        self.extracted = 0  # how often an image went through the backbone

    def expect(self, names: Iterable[str]) -> None:
        """Read these images ahead; in place of those that were expected before."""
        self._expected = deque(dict.fromkeys(names))
        for name in set(self._reading) - set(self._expected):
            self._reading.pop(name).cancel()
        self._read_ahead()

    def get(self, name: str, keep: tuple[str, ...] = ()) -> KeptImage:
        """An image with its features.

        Args:
            name: of the image.
            keep: images that must not be dropped for it.

        Raises:
            FileError: it cannot be read, or is too small to match.
        """
        if name in self._broken:
            raise FileError(self._broken[name])
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        try:
            loaded, state = self._load(name)
        except FileError as error:
            self._broken[name] = str(error)
            raise
        features: dict[str, Tensor] = {}
        if has_texture(loaded):
            self._make_room(feature_bytes(self._matcher, loaded.size_wh), keep)
            device = self._matcher.device
            mask = None if loaded.mask is None else loaded.mask.to(device)
            with torch.inference_mode():
                features = self._matcher.extract_features(loaded.image.to(device), mask)
            self.extracted += 1
        # The pixels are not needed any more; an empty view keeps the sizes and lets their memory go.
        loaded = loaded._replace(image=torch.empty(1).expand(loaded.image.shape), mask=None)
        self._kept[name] = KeptImage(loaded, features, state)
        return self._kept[name]

    def close(self) -> None:
        """Stop the threads and let everything go."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._kept.clear()

    def _load(self, name: str) -> tuple[LoadedImage, str]:
        future = self._reading.pop(name, None)
        self._read_ahead()
        return self._read(name) if future is None else future.result()

    def _read_ahead(self) -> None:
        while self._expected and len(self._reading) < self._ahead:
            name = self._expected.popleft()
            if name not in self._kept and name not in self._reading and name not in self._broken:
                self._reading[name] = self._threads.submit(self._read, name)

    def _read(self, name: str) -> tuple[LoadedImage, str]:
        path = self._folder / name
        state = file_state(path)
        loaded = read_image(path, resize=self._resize or None)
        if min(loaded.size_wh) < MIN_SIZE:
            width, height = loaded.size_wh
            raise FileError(f"{name}: {width}x{height} pixels as matched, expected at least {MIN_SIZE} on each side.")
        return loaded, state

    def _make_room(self, needed: int, keep: tuple[str, ...]) -> None:
        used = sum(_bytes(image) for image in self._kept.values())
        for name in list(self._kept):
            if used + needed <= self._budget:
                return
            if name not in keep:
                used -= _bytes(self._kept.pop(name))


def file_state(path: Path) -> str:
    """Which state of a file it is, without reading it: its size and when it was written; empty if there is none."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"


def feature_bytes(matcher: EfficientLoFTR, size_wh: tuple[int, int]) -> int:
    """Bytes of the backbone features of an image of this size as matched, in float32."""
    half, quarter, coarse = matcher.config.stage_channels[1:]
    width, height = (side + -side % SIZE_MULTIPLE for side in size_wh)
    return int(width * height * 4 * (half / 4 + quarter / 16 + coarse / 64))


def images_in_memory(matcher: EfficientLoFTR, folder: Path, names: list[str], *, resize: int, budget: int) -> int:
    """How many images the budget holds, by the largest of a sample; at least 2."""
    step = max(1, len(names) // _SAMPLE)
    largest = max(feature_bytes(matcher, _size_as_matched(folder / name, resize)) for name in names[::step])
    return max(2, budget // largest)


def _size_as_matched(path: Path, resize: int) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Exception:  # whatever decoders raise; the image is named when its turn comes
        width = height = resize or _LARGEST_SIDE
    factor = min(1.0, resize / max(width, height)) if resize else 1.0
    return max(1, round(width * factor)), max(1, round(height * factor))


def _bytes(image: KeptImage) -> int:
    return sum(value.numel() * value.element_size() for value in image.features.values())
