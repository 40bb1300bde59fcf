# SPDX-License-Identifier: Apache-2.0
"""Simulated views to search through: an image turned, reduced, or seen at a slant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from eloftr_ops.guided.looks import Look, Setting
from eloftr_ops.guided.warps import Warp, tilted

__all__ = ["stages"]

_SIZE = 0.75  # of the long side of a frame, for a search


class _View(NamedTuple):
    """Of one image; as it is by default."""

    tilt: float = 1.0
    degrees: float = 0.0
    zoom: float = 1.0

    def __str__(self) -> str:
        if self.tilt > 1:
            return f"slanted {self.tilt:g} times across {self.degrees:g} degrees"
        return f"turned by {self.degrees:g} degrees" if self.degrees else f"reduced {self.zoom:g} times"


_PLAIN = _View()


def _of_one(*views: _View) -> list[tuple[_View, _View]]:
    """Each view of image 0 with image 1 as it is, then the other way round."""
    return [(view, _PLAIN) for view in views] + [(_PLAIN, view) for view in views]


def _turned(*degrees: float) -> list[tuple[_View, _View]]:
    return [(_PLAIN, _View(degrees=angle)) for angle in degrees]


_TILTS = [_View(2.0, angle) for angle in (0.0, 45.0, 90.0, 135.0)]
# What is most frequent and cheapest comes first. Angles are as dense as a tilt needs (Yu and Morel 2011).
_STAGES = (
    _turned(90.0, 180.0, 270.0) + _of_one(_View(zoom=2.0), _View(zoom=3.0)),
    _of_one(*_TILTS),
    _turned(45.0, 135.0, 225.0, 315.0) + _of_one(_View(zoom=4.0), _View(zoom=5.0)),
    _of_one(*(_View(4.0, angle) for angle in (0.0, 30.0, 60.0, 90.0, 120.0, 150.0))),
    [(view0, view1) for view0 in _TILTS for view1 in _TILTS],
)


def stages(setting: Setting) -> Iterator[list[Look]]:
    """Groups of looks, to be tried one group after the other."""
    reduced = [max(1.0, max(size) / (_SIZE * setting.longest)) for size in setting.sizes]
    plain = [tilted(size, 1.0, 0.0, by)._replace(lasting=True) for size, by in zip(setting.sizes, reduced, strict=True)]
    for pairs in _STAGES:
        looks = []
        for pair in pairs:
            warps = [_warp(*of) for of in zip(pair, setting.sizes, reduced, plain, strict=True)]
            words = [f"image {side} {view}" for side, view in enumerate(pair) if view != _PLAIN]
            looks.append(Look(warps[0], warps[1], " and ".join(words)))
        yield looks


def _warp(view: _View, size_wh: tuple[int, int], reduced: float, plain: Warp) -> Warp:
    return plain if view == _PLAIN else tilted(size_wh, view.tilt, view.degrees, max(view.zoom, reduced))
