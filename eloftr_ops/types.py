# SPDX-License-Identifier: Apache-2.0
"""What the stages of the matcher hand to each other: named tuples whose fields carry shapes and frames.

Dimensions: B pairs, C coarse channels, D fine channels, H x W the image as given, h x w its coarse map
(1/8 of the image padded to multiples of 32), L = h0 * w0 and S = h1 * w1 coarse cells, M matches of the whole batch.
Names ending in 0 and 1 belong to image 0 and image 1; ``01`` means "from image 0 to image 1".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CELL = 8  # pixels per side of a coarse cell, and of its fine window


class ImageInput(NamedTuple):
    """One image of every pair of a batch, as given."""

    pixels: Tensor  # (B, 1, H, W)
    mask: Tensor | None  # (B, H, W) bool

    def stacks_with(self, other: ImageInput) -> bool:
        """Whether both go through in one batch: equal sizes, and nothing is masked."""
        return self.pixels.shape == other.pixels.shape and self.mask is None and other.mask is None


class Features(NamedTuple):
    """Backbone features of one image of every pair of a batch; they do not depend on the other image."""

    half: Tensor  # (B, C1, 4h, 4w) backbone map at 1/2
    quarter: Tensor  # (B, C2, 2h, 2w) backbone map at 1/4
    coarse: Tensor  # (B, C, h, w) backbone map at 1/8
    mask: Tensor | None  # (B, 8h, 8w) bool, pixels that exist and are valid; None: all of them

    @property
    def coarse_mask(self) -> Tensor | None:
        """(B, h, w) bool: a coarse cell is valid when the pixel at its corner, (8 column, 8 row), is."""
        return None if self.mask is None else self.mask[:, ::CELL, ::CELL]

    def split(self) -> tuple[Features, Features]:
        """Features of the first and of the second half of the batch."""
        count = self.coarse.shape[0] // 2
        first, second = (
            Features(*(None if x is None else x[part] for x in self))  # type: ignore[arg-type]
            for part in (slice(count), slice(count, None))
        )
        return first, second

    def to_dict(self) -> dict[str, Tensor]:
        """Tensors by name, batch first, without those that are None: what users keep."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class PairInput(NamedTuple):
    """A checked batch of pairs: images, or features that were extracted before."""

    side0: ImageInput | Features
    side1: ImageInput | Features


class CoarseScores(NamedTuple):
    """Everything needed to score any pair of cells without the (L, S) matrix; differentiable."""

    features0: Tensor  # (B, L, C) transformer output / sqrt(C)
    features1: Tensor  # (B, S, C)
    row_lse: Tensor | None  # (B, L) log-sum-exp of the scores over image 1; None for raw similarities
    col_lse: Tensor | None  # (B, S) log-sum-exp over image 0


class NearestCells(NamedTuple):
    """The best partner of each cell. Arbitrary, but in range, where no pair passes the threshold. No gradient."""

    nearest01: Tensor  # (B, L) int64: cell of image 1 with the highest score for each cell of image 0
    nearest10: Tensor  # (B, S) int64: cell of image 0 with the highest score for each cell of image 1
    score01: Tensor  # (B, L) score of each nearest01: log-confidence, or raw similarity


class CoarseOutput(NamedTuple):
    """The coarse stage of a batch of pairs, before any match is selected: all shapes are static."""

    coarse0: Tensor  # (B, C, h0, w0) transformer output
    coarse1: Tensor  # (B, C, h1, w1)
    mask0: Tensor | None  # (B, h0, w0) bool
    mask1: Tensor | None  # (B, h1, w1) bool
    scores: CoarseScores
    nearest: NearestCells | None  # None in training, which scores true pairs and selects none

    @property
    def grid0(self) -> tuple[int, int]:
        """(h0, w0)."""
        return self.coarse0.shape[-2], self.coarse0.shape[-1]

    @property
    def grid1(self) -> tuple[int, int]:
        """(h1, w1)."""
        return self.coarse1.shape[-2], self.coarse1.shape[-1]


class CoarseMatches(NamedTuple):
    """The selected cells. Indices carry no gradient, ``confidence`` does."""

    batch: Tensor  # (M,) int64, ascending
    cells0: Tensor  # (M,) int64, row * w0 + column
    cells1: Tensor  # (M,) int64, row * w1 + column
    confidence: Tensor  # (M,) dual-softmax probability, or raw similarity


class Matches(NamedTuple):
    """The result, in the frame where the centre of pixel (x, y) is (x + 0.5, y + 0.5)."""

    keypoints0: Tensor  # (M, 2) x, y in image 0, pixels
    keypoints1: Tensor  # (M, 2) x, y in image 1, pixels
    confidence: Tensor  # (M,)
    batch_indexes: Tensor  # (M,) int64, ascending


class UncertainMatches(NamedTuple):
    """The result with the covariance of each keypoint; the first four fields are those of Matches."""

    keypoints0: Tensor  # (M, 2) x, y in image 0, pixels
    keypoints1: Tensor  # (M, 2) x, y in image 1, pixels
    confidence: Tensor  # (M,)
    batch_indexes: Tensor  # (M,) int64, ascending
    covariance0: Tensor  # (M, 2, 2) of keypoints0, pixels squared
    covariance1: Tensor  # (M, 2, 2) of keypoints1


class StaticMatches(NamedTuple):
    """The result with fixed shapes: K rows per pair, most confident first; rows that are not valid are zero."""

    keypoints0: Tensor  # (B, K, 2) x, y in image 0, pixels, frame as in Matches
    keypoints1: Tensor  # (B, K, 2) x, y in image 1, pixels
    confidence: Tensor  # (B, K)
    valid: Tensor  # (B, K) bool

    @classmethod
    def from_rows(cls, matches: Matches, valid: Tensor) -> StaticMatches:
        """From B * K rows, those of a pair together, and which of them count, (B, K) bool."""
        keypoints0, keypoints1, confidence, _ = (x.unflatten(0, valid.shape) for x in matches)
        return cls(
            torch.where(valid[..., None], keypoints0, 0),
            torch.where(valid[..., None], keypoints1, 0),
            torch.where(valid, confidence, 0),
            valid,
        )


class SampledPixels(NamedTuple):
    """T pairs of pixels drawn in the windows of N pairs of cells, frame as in Matches."""

    keypoints0: Tensor  # (N, T, 2) x, y of the drawn pixel of image 0
    keypoints1: Tensor  # (N, T, 2) x, y in image 1
    log_probability: Tensor  # (N, T) of the pair of pixels, given the pair of cells
    valid: Tensor  # (N, T) bool: both lie on their image and on no masked pixel


class SampledMatches(NamedTuple):
    """D draws of K pairs of cells for each of B pairs of images, frame as in Matches; rows not valid are zero."""

    keypoints0: Tensor  # (B, D, K, 2) x, y of the middle of the cell of image 0, pixels
    keypoints1: Tensor  # (B, D, K, 2) x, y in image 1, pixels
    log_probability: Tensor  # (B, D, K) logarithm of the dual-softmax probability, with gradient
    valid: Tensor  # (B, D, K) bool
    cells0: Tensor  # (B, D, K) int64, row * w0 + column
    cells1: Tensor  # (B, D, K) int64, row * w1 + column
    pixels: SampledPixels | None = None  # of the windows of all B * D * K pairs of cells, in their order


class CoarsePairs(NamedTuple):
    """True pairs of cells."""

    batch: Tensor  # (M,) int64
    cells0: Tensor  # (M,) int64
    cells1: Tensor  # (M,) int64


class WindowTargets(NamedTuple):
    """Where the pixels of each pair's window in image 0 lie in its window in image 1."""

    visible: Tensor  # (M, 64) bool: the true pixel lies in the window
    pixels1: Tensor  # (M, 64) int64 nearest pixel of the 8x8 window of image 1
    offsets: Tensor  # (M, 64, 2) true position minus that pixel, -0.5 .. 0.5
