# SPDX-License-Identifier: Apache-2.0
"""Looks, run by a matcher: several at once where their frames have one size, features kept where frames come again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eloftr_ops.guided.looks import Found, Look
from eloftr_ops.guided.warps import Source, Warp, seen_through
from eloftr_ops.model.matcher import EfficientLoFTR

__all__ = ["Runner"]

_Shape = tuple[tuple[int, int], tuple[int, int]]


class _Frame(NamedTuple):
    """What a look shows of one image."""

    pixels: Tensor  # (1, 1, h, w)
    mask: Tensor | None  # (1, h, w)
    features: dict[str, Tensor] | None  # of the pixels, if they are kept


class _Request(NamedTuple):
    pair: int
    look: Look


class Runner:
    """Runs looks of a batch of pairs.

    Args:
        matcher: takes and gives kornia LoFTR's dictionaries. Of an `EfficientLoFTR`, features of frames that come again
            are kept.
        sources: both images of each pair.
        at_once: looks per call of the matcher, at most.
        options: passed on to the matcher.
    """

    def __init__(
        self,
        matcher: Callable[..., Mapping[str, Tensor]],
        sources: Sequence[tuple[Source, Source]],
        at_once: int,
        options: Mapping[str, Any],
    ) -> None:
        self._matcher, self._sources, self._at_once, self._options = matcher, sources, at_once, options
        self._extract = matcher.extract_features if isinstance(matcher, EfficientLoFTR) else None
        self._kept: dict[tuple[int, int], tuple[Warp, _Frame]] = {}

    def run(self, requests: Sequence[tuple[int, Look]]) -> list[Found]:
        """What each look (pair, look) finds, on the CPU."""
        results: dict[int, Found] = {}
        for places in self._batches(requests):
            found = self._run([_Request(*requests[place]) for place in places])
            results.update(zip(places, found, strict=True))
        return [results[place] for place in range(len(requests))]

    def _batches(self, requests: Sequence[tuple[int, Look]]) -> Iterator[list[int]]:
        """Places of requests whose frames have the same sizes."""
        groups: dict[_Shape, list[int]] = {}
        for place, (_, look) in enumerate(requests):
            groups.setdefault((look.warp0.size_wh, look.warp1.size_wh), []).append(place)
        for places in groups.values():
            for start in range(0, len(places), self._at_once):
                yield places[start : start + self._at_once]

    def _run(self, requests: list[_Request]) -> list[Found]:
        frames = [[self._frame(request, side) for side in (0, 1)] for request in requests]
        shown = [place for place, pair in enumerate(frames) if all(_shows_something(frame) for frame in pair)]
        results = [_nothing() for _ in requests]
        if shown:
            data: dict[str, Any] = {}
            for side in (0, 1):
                data |= _batched(str(side), [frames[place][side] for place in shown])
            out = self._matcher(data, **self._options)
            batch = out["batch_indexes"].cpu() if len(shown) > 1 else None
            for row, place in enumerate(shown):
                mine = slice(None) if batch is None else batch == row
                results[place] = self._found(requests[place], out, mine)
        return results

    def _frame(self, request: _Request, side: int) -> _Frame:
        warp, source = request.look.warps[side], self._sources[request.pair][side]
        key = (request.pair, side)
        if key in self._kept and self._kept[key][0] is warp:
            return self._kept[key][1]
        frame = _Frame(*seen_through(source, warp), None)
        if warp.lasting and self._extract is not None and _shows_something(frame):
            frame = frame._replace(features=self._extract(frame.pixels, frame.mask))
            self._kept[key] = (warp, frame)
        return frame

    def _found(self, request: _Request, out: Mapping[str, Tensor], rows: Any) -> Found:
        """The matches of one look, those aside that lie outside an image or on its mask."""
        seen = [out[name].cpu()[rows] for name in ("keypoints0", "keypoints1")]
        points = [warp.to_image(x) for warp, x in zip(request.look.warps, seen, strict=True)]
        sources = self._sources[request.pair]
        covered = sources[0].covers(points[0]) & sources[1].covers(points[1])
        return Found(points[0], points[1], out["confidence"].cpu()[rows], seen[0], seen[1]).rows(covered)


def _shows_something(frame: _Frame) -> bool:
    return frame.mask is None or bool(frame.mask.any())


def _batched(side: str, frames: list[_Frame]) -> dict[str, Any]:
    """One side of the matcher's input."""
    features = [frame.features for frame in frames if frame.features is not None]
    if len(features) == len(frames) and len({frozenset(each) for each in features}) == 1:
        return {f"features{side}": {name: torch.cat([each[name] for each in features]) for name in features[0]}}
    data = {f"image{side}": torch.cat([frame.pixels for frame in frames])}
    if any(frame.mask is not None for frame in frames):
        masks = [
            torch.ones_like(frame.pixels[:, 0], dtype=torch.bool) if frame.mask is None else frame.mask
            for frame in frames
        ]
        data[f"mask{side}"] = torch.cat(masks)
    return data


def _nothing() -> Found:
    none = torch.zeros(0, 2, dtype=torch.float64)
    return Found(none, none, torch.zeros(0), none, none)
