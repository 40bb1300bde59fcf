# SPDX-License-Identifier: Apache-2.0
"""The matches of two images: in the images' own pixels, with their two-view models, pictures and files."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from eloftr_ops.errors import ArgumentError
from eloftr_ops.images import LoadedImage
from eloftr_ops.io import MATCH_SUFFIXES, check_output, write_matches

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from eloftr_ops.efforts import Effort
    from eloftr_ops.geometry.verification import Verdict
    from eloftr_ops.match_page import MatchPage

__all__ = ["INLIER_THRESHOLD", "ImageMatches", "TwoViewModel"]

INLIER_THRESHOLD = 1.5  # pixels of the images as matched
_MATRIX = {"homography": "H_0to1", "fundamental": "F_0to1"}


class TwoViewModel(NamedTuple):
    """A homography or a fundamental matrix, and the matches that agree with it."""

    matrix: Tensor | None  # (3, 3) float64, between pixels of the images as given; None: none was found
    inliers: Tensor  # (M,) bool; all False without a matrix
    reason: str = ""  # why there is no matrix


@dataclass(frozen=True, eq=False, repr=False)
class ImageMatches:
    """The matches of two images, in the pixels of the images as given.

    Convention:
        Keypoints are (x, y); the centre of pixel (x, y) is (x + 0.5, y + 0.5). Subtract 0.5 for OpenCV. A file or URL
        is turned upright as its EXIF data say; its keypoints are in pixels of the upright image. Everything is on the
        CPU and carries no gradient.
    """

    keypoints0: Tensor  # (M, 2) float32
    keypoints1: Tensor  # (M, 2) float32
    confidence: Tensor  # (M,) float32
    image0: LoadedImage  # as matched
    image1: LoadedImage
    names: tuple[str, str]  # what the images were called
    seconds: float  # of the matcher alone
    device: torch.device  # of the matcher
    # Of tiled matching: its first pass. The keypoints were then matched at full size.
    coarse: ImageMatches | None = None
    effort: Effort = "fast"
    looks: int = 1  # that were taken
    expired: bool = False  # whether the time budget kept a look from being taken
    views: tuple[str, ...] = ("as they are",)  # how the images were seen where the matches come from, in words
    _kept: dict[Any, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.confidence)

    def __repr__(self) -> str:
        sizes = " and ".join("{}x{}".format(*im.original_size_wh) for im in (self.image0, self.image1))
        if not len(self):
            return f"ImageMatches(no match, {sizes} pixels)"
        count = f"{len(self):,} match{'es' if len(self) > 1 else ''}"
        low, middle, high = (float(v) for v in (self.confidence.min(), self.confidence.median(), self.confidence.max()))
        sure = f"confidence {low:.2f} to {high:.2f}, median {middle:.2f}"
        related = "related" if self.verdict.related else "not known to be related"
        return f"ImageMatches({count}, {sure}, {related}, {sizes} pixels)"

    @property
    def verdict(self) -> Verdict:
        """Whether the images show the same scene; see `eloftr_ops.geometry.verification.related`."""
        if "verdict" not in self._kept:
            from eloftr_ops.geometry.verification import related

            if self.coarse is not None:
                return self.coarse.verdict
            sizes = self.image0.size_wh, self.image1.size_wh
            self._kept["verdict"] = related(*self._matched_keypoints(), *sizes, effort=self.effort)
        verdict: Verdict = self._kept["verdict"]
        return verdict

    def homography(self, threshold: float = INLIER_THRESHOLD) -> TwoViewModel:
        """The homography that most matches agree with (OpenCV's MAGSAC++).

        Convention:
            ``matrix`` is ``H_0to1``, ``x1 ~ H_0to1 x0``, between pixels of the images as given, last entry 1.

        Args:
            threshold: largest error of an inlier, in pixels of the images as matched.

        Raises:
            ArgumentError: a threshold that is not a positive number.
        """
        return self._model("homography", threshold)

    def fundamental(self, threshold: float = INLIER_THRESHOLD) -> TwoViewModel:
        """The fundamental matrix that most matches agree with (OpenCV's MAGSAC++).

        Convention:
            ``matrix`` is ``F_0to1``, ``x1^T F_0to1 x0 = 0``, between pixels of the images as given, of norm 1. There
            is none, and ``reason`` says so, if the matches show a plane or a camera that only rotates: see
            `eloftr_ops.geometry.verification.shows_parallax`.

        Args:
            threshold: as :meth:`homography`.

        Raises:
            ArgumentError: as :meth:`homography`.
        """
        return self._model("fundamental", threshold)

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        model: str | None = None,
        threshold: float = INLIER_THRESHOLD,
        max_matches: int | None = 200,
        ax: Axes | None = None,
        backend: Literal["matplotlib", "html"] | None = None,
    ) -> Figure | SubFigure | MatchPage:
        """Draw both images side by side with lines between their matches; see `draw_matches`.

        Args:
            path: picture to write, too: .png, .jpg, .webp, .pdf or .svg, or a page to look at in a browser, .html.
            model: "homography" or "fundamental": draw its outliers thin and red. None: draw all alike.
            threshold: of the model's inliers.
            max_matches: the most lines drawn; None for all.
            ax: axes to draw into; None makes a figure.
            backend: "matplotlib" or "html"; None: as the suffix of ``path`` says, else matplotlib.

        Returns:
            The figure, or the page, whose coordinates are in pixels of the images as given.

        Raises:
            FileError: ``path`` cannot be written.
            ArgumentError: an unknown model.
        """
        from eloftr_ops.visualization import draw_matches, is_page

        if backend is None:
            backend = "html" if is_page(path) else "matplotlib"
        found = None if model is None else self._model(model, threshold)
        pictures = [image.image if image.color is None else image.color for image in (self.image0, self.image1)]
        keypoints0, keypoints1 = self._shown_keypoints()
        inliers = None if found is None or found.matrix is None else found.inliers
        return draw_matches(
            pictures[0],
            pictures[1],
            keypoints0,
            keypoints1,
            self.confidence,
            inliers,
            backend=backend,
            max_matches=max_matches,
            path=path,
            ax=ax,
            size0_wh=self.image0.original_size_wh,
            size1_wh=self.image1.original_size_wh,
        )

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        model: str | None = "fundamental",
        threshold: float = INLIER_THRESHOLD,
    ) -> None:
        """Write a file of matches (.npz, .json, .csv), a picture or a page, as the command line does.

        The file is whole, or there is none. The fields are listed in docs/cli.md.

        Args:
            path: file to write; its suffix chooses the format.
            model: whose inliers and matrix go into the file: "fundamental", "homography" or None.
            threshold: of the model's inliers.

        Raises:
            FileError: an unknown suffix, or a place that cannot be written.
            ArgumentError: an unknown model.
        """
        from eloftr_ops.visualization import PICTURE_SUFFIXES

        if check_output(path, (*MATCH_SUFFIXES, *PICTURE_SUFFIXES)).suffix.lower() in PICTURE_SUFFIXES:
            self.plot(path, model=model, threshold=threshold)
            return
        found = None if model is None else self._model(model, threshold)
        write_matches(
            path,
            self.keypoints0,
            self.keypoints1,
            self.confidence,
            size0_wh=self.image0.original_size_wh,
            size1_wh=self.image1.original_size_wh,
            inliers=None if found is None else found.inliers,
            matrices={} if found is None or found.matrix is None else {_MATRIX[str(model)]: found.matrix},
            verdict=self.verdict,
        )

    def _shown_keypoints(self) -> tuple[Tensor, Tensor]:
        """In pixels of ``image0`` and ``image1``, float64."""
        return self.image0.from_original(self.keypoints0), self.image1.from_original(self.keypoints1)

    def _matched_keypoints(self) -> tuple[Tensor, Tensor]:
        """In pixels of the images as matched, float64."""
        if self.coarse is not None:
            return self.keypoints0.double(), self.keypoints1.double()
        return self._shown_keypoints()

    def _model(self, model: str, threshold: float) -> TwoViewModel:
        if model not in _MATRIX:
            raise ArgumentError("model", f"expected {' or '.join(_MATRIX)}, got {model!r}.")
        if not 0 < threshold < float("inf"):
            raise ArgumentError("threshold", f"expected a positive number of pixels, got {threshold}.")
        key = (model, float(threshold))
        if key not in self._kept:
            self._kept[key] = self._estimated(model, threshold)
        found: TwoViewModel = self._kept[key]
        return found

    def _estimated(self, model: str, threshold: float) -> TwoViewModel:
        matrix, inliers = _robust_model(model, threshold, *self._matched_keypoints())
        if matrix is None:
            return TwoViewModel(None, inliers, f"not determined by the {len(self)} matches")
        if model == "fundamental" and self._is_plane(matrix, threshold):
            reason = "not determined: the matches show a plane, or a camera that only rotates"
            return TwoViewModel(None, torch.zeros_like(inliers), reason)
        one = (1.0, 1.0)
        scales = (one, one) if self.coarse is not None else (self.image0.scale_xy, self.image1.scale_xy)
        return TwoViewModel(_between_originals(matrix, model, *scales), inliers)

    def _is_plane(self, F_0to1: Tensor, threshold: float) -> bool:
        """Whether a homography explains the matches so well that they determine no fundamental matrix."""
        from eloftr_ops.geometry.verification import shows_parallax

        H_0to1, _ = _robust_model("homography", threshold, *self._matched_keypoints())
        if H_0to1 is None:
            return False
        return not shows_parallax(*self._matched_keypoints(), F_0to1, H_0to1, threshold=threshold)


def _robust_model(model: str, threshold: float, keypoints0: Tensor, keypoints1: Tensor) -> tuple[Tensor | None, Tensor]:
    """The matrix (3, 3) between the frames of the keypoints, and the inliers (M,)."""
    from eloftr_ops.geometry import estimate_robust  # OpenCV is not loaded for anything else

    batch = torch.zeros(len(keypoints0), dtype=torch.int64)
    estimate = estimate_robust(keypoints0, keypoints1, batch, batch_size=1, model=model, threshold=threshold)
    return estimate.model_0to1[0] if estimate.valid.item() else None, estimate.inliers


def _between_originals(
    matrix: Tensor, model: str, scale0_xy: tuple[float, float], scale1_xy: tuple[float, float]
) -> Tensor:
    """The matrix between the images as matched, made one between the original images."""
    up0, up1 = (torch.diag(torch.tensor([*scale_xy, 1.0], dtype=torch.float64)) for scale_xy in (scale0_xy, scale1_xy))
    if model == "homography":
        moved: Tensor = up1 @ matrix @ torch.linalg.inv(up0)
        return moved / torch.where(moved[2, 2] == 0, 1.0, moved[2, 2])  # OpenCV's and kornia's scale
    moved = torch.linalg.inv(up1) @ matrix @ torch.linalg.inv(up0)
    scaled: Tensor = moved / torch.linalg.norm(moved)
    return scaled
