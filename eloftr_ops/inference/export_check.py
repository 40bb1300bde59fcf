# SPDX-License-Identifier: Apache-2.0
"""Whether a graph that left Python gives the matches of the matcher it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_ops.io import demo_pair
from eloftr_ops.types import CELL, StaticMatches

PIXELS = {torch.float32: 0.01, torch.float16: 1.0}  # how far a keypoint of the graph may move
LEAST_SHARED = {torch.float32: 0.995, torch.float16: 0.9}  # of the matches of the float32 matcher
ENOUGH_MATCHES = 300  # after so many no further images are taken
LEAST_MATCHES = 20  # fewer prove nothing

Graph = Callable[..., StaticMatches]


class ExportError(RuntimeError):
    """The graph cannot be exported, cannot be checked, or disagrees with its matcher."""


class Sample(NamedTuple):
    """Inputs of the graph, and what the float32 matcher makes of them."""

    inputs: tuple[Tensor, ...]
    expected: StaticMatches


class Agreement(NamedTuple):
    """How a graph compares with its matcher."""

    matches: int  # of the float32 matcher
    shared: float  # share that both find: the same cells, and keypoints within ``tolerance``
    tolerance: float  # pixels


def check_images(
    size0: tuple[int, int], size1: tuple[int, int], batch: int, masks: bool
) -> Iterator[tuple[Tensor, ...]]:
    """Batches of images that have matches: the bundled pair, and its image 0 with itself; these mirrored, in turn.

    With ``masks``, the lower eighth of images 0 and the right eighth of images 1 are masked.
    """
    demo = demo_pair()
    pairs = [
        (first.flip(axes), second.flip(axes))
        for axes in ([], [-1], [-2], [-2, -1])
        for first, second in ((demo.image0, demo.image1), (demo.image0, demo.image0))
    ]
    for start in range(0, len(pairs), batch):
        chosen = [pairs[(start + index) % len(pairs)] for index in range(batch)]
        images = [
            torch.cat([_resized(pair[side], size) for pair in chosen]) for side, size in enumerate((size0, size1))
        ]
        if not masks:
            yield tuple(images)
            continue
        mask0, mask1 = (torch.ones(len(x), *x.shape[-2:], dtype=torch.bool) for x in images)
        mask0[:, size0[0] - size0[0] // 8 :] = False
        mask1[..., size1[1] - size1[1] // 8 :] = False
        yield *images, mask0, mask1


def samples(matcher: Graph, batches: Iterator[tuple[Tensor, ...]]) -> list[Sample]:
    """Run the float32 matcher on images until it has found enough matches.

    Raises:
        ExportError: all images together have too few.
    """
    found: list[Sample] = []
    matches = 0
    for inputs in batches:
        expected = StaticMatches(*matcher(*inputs))
        found.append(Sample(inputs, expected))
        matches += int(expected.valid.sum())
        if matches >= ENOUGH_MATCHES:
            break
    if matches < LEAST_MATCHES:
        raise ExportError(
            f"The matcher finds {matches} matches on the images that check the graph, expected at least "
            f"{LEAST_MATCHES}: too few to compare. Nothing was written. Choose a larger size, or weights and a "
            "threshold that give matches."
        )
    return found


def checked(graph: Graph, of: list[Sample], dtype: torch.dtype) -> Agreement:
    """Hold a written graph to its matcher.

    Raises:
        ExportError: they share too few matches.
    """
    tolerance = PIXELS[dtype]
    counts = [compare(graph(*sample.inputs), sample.expected, tolerance) for sample in of]
    near, most = (sum(numbers) for numbers in zip(*counts, strict=True))
    shared = near / most
    if shared < LEAST_SHARED[dtype]:
        raise ExportError(
            f"The exported graph shares {shared:.1%} of the matches with its matcher, expected at least "
            f"{LEAST_SHARED[dtype]:.1%}. Nothing was written."
        )
    return Agreement(sum(int(sample.expected.valid.sum()) for sample in of), shared, tolerance)


def compare(got: StaticMatches, expected: StaticMatches, tolerance: float) -> tuple[int, int]:
    """Matches that both have: the same cells, all coordinates within ``tolerance``; and the larger of both counts."""
    mine, theirs = _by_cells(got), _by_cells(expected)
    near = sum(
        bool(((mine[cells] - keypoints).abs() <= tolerance).all())
        for cells, keypoints in theirs.items()
        if cells in mine
    )
    return near, max(len(mine), len(theirs))


def _by_cells(matches: StaticMatches) -> dict[tuple[int, ...], Tensor]:
    """Coordinates (4,) of each valid row by its pair and cells; windows are centred on the corners of cells."""
    pair, row = matches.valid.nonzero(as_tuple=True)
    keypoints = torch.cat([matches.keypoints0[pair, row], matches.keypoints1[pair, row]], 1).double()
    cells = ((keypoints + CELL / 2) / CELL).floor().long()
    keys = torch.cat([pair[:, None], cells[:, :2]], 1).tolist()
    return {tuple(key): value for key, value in zip(keys, keypoints, strict=True)}


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)
