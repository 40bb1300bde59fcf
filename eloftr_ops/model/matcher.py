# SPDX-License-Identifier: Apache-2.0
"""EfficientLoFTR: two images in, semi-dense matches out. The forward reads as the paper's figure 2."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from kornia.feature import LoFTR
from torch import Tensor, nn

from eloftr_kernels import window_match
from eloftr_kernels.dispatch import is_cpu_inference
from eloftr_ops.checks import check_features, check_image, check_mask, check_pair, check_same_batch
from eloftr_ops.config import EfficientLoFTRConfig, GradientMode, ScoreKind
from eloftr_ops.model.backbone import RepVGG
from eloftr_ops.model.coarse import match_cells, score_cells, select_matches
from eloftr_ops.model.fine import FeaturePyramid, positions
from eloftr_ops.model.transformer import CoarseTransformer
from eloftr_ops.types import BestCells, CoarseMatches, CoarseScores, Features, Matches

if TYPE_CHECKING:
    from eloftr_ops.inference.optimized import InferenceMatcher
    from eloftr_ops.weights.names import Layout

SIZE_MULTIPLE = 32  # of the padded image: 4x4 aggregation of cells of 8x8 pixels


class Image(NamedTuple):
    """One side of a batch of pairs, as given."""

    pixels: Tensor  # (B, 1, H, W)
    mask: Tensor | None  # (B, H, W) bool


Side = Image | Features


class PairMaps(NamedTuple):
    """Dense result for a batch of pairs, before any match is selected: static shapes, one graph."""

    coarse0: Tensor  # (B, C, h0, w0) after the transformer
    coarse1: Tensor  # (B, C, h1, w1)
    mask0: Tensor | None  # (B, h0, w0) bool
    mask1: Tensor | None  # (B, h1, w1) bool
    scores: CoarseScores
    best: BestCells | None  # None in training, which scores true pairs and selects none

    @property
    def grids(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(h0, w0), (h1, w1)."""
        return tuple(self.coarse0.shape[-2:]), tuple(self.coarse1.shape[-2:])  # type: ignore[return-value]


class EfficientLoFTR(LoFTR):
    r"""Semi-dense matcher of two images, differentiable in both keypoint sets and in the confidence.

    Wang, He, Peng, Tan, Zhou: "Efficient LoFTR: Semi-Dense Local Feature Matching with Sparse-Like Speed", CVPR 2024.

    Convention:
        - images: gray, (B, 1, H, W), floating point in [0, 1]; the two sizes may differ; any size of at least 32
          (completed inside with masked pixels to multiples of 32).
        - keypoints: (x, y) in pixels of the image as given, in the authors' frame, which is also
          ``kornia.feature.LoFTR``'s: the centre of pixel (x, y) is (x + 0.5, y + 0.5). Subtract 0.5 for the frame with
          integer centres (OpenCV, the rest of kornia): ``geometry.to_integer_centers``.
        - masks: (B, H, W), zero where there is no image; of any shape. What lies under a mask does not matter, and no
          keypoint lies on it.
        - confidence: dual-softmax probability of the coarse pair, in (threshold, 1]; raw similarity for
          ``score="similarity"``.
        - dtypes: keypoints and confidence are float32 for float32, float16 and bfloat16 models, float64 for float64.
        - a batch gives what its pairs give one by one; without gradient, a CPU matches them one by one.

    Gradient:
        ``confidence`` carries gradient to both images in every mode. ``keypoints0`` and ``keypoints1``: see
        :func:`eloftr_ops.model.fine.positions` and ``docs/differentiability.md``.

    It is a ``kornia.feature.LoFTR`` by contract, not by code: kornia's stitcher and tracker ask for that class, and
    nothing of its constructor or its layers is used.

    Args:
        config: architecture and matching parameters; the authors' model by default.
        fused: build the backbone with re-parameterised blocks (inference form).
    """

    def __init__(self, config: EfficientLoFTRConfig | None = None, *, fused: bool = False) -> None:
        nn.Module.__init__(self)  # LoFTR's own constructor would build LoFTR's layers
        self.config: EfficientLoFTRConfig = config or EfficientLoFTRConfig()  # type: ignore[assignment]
        self.backbone: RepVGG = RepVGG(self.config, fused=fused)  # type: ignore[assignment]
        self.transformer = CoarseTransformer(self.config)
        self.pyramid = FeaturePyramid(self.config)

    def forward(self, data: Mapping[str, Any], *, mode: GradientMode | None = None) -> dict[str, Tensor]:
        """Match a batch of pairs; the dictionaries are those of ``kornia.feature.LoFTR``.

        Args:
            data: ``image0`` (B, 1, H0, W0) and ``image1`` (B, 1, H1, W1), or ``features0`` / ``features1`` of
                :meth:`extract_features` in place of either; optionally ``mask0`` (B, H0, W0), ``mask1`` (B, H1, W1).
            mode: ``hard``, ``straight_through`` or ``soft``; default ``config.gradient_mode``.

        Returns:
            ``keypoints0`` (M, 2), ``keypoints1`` (M, 2), ``confidence`` (M,), ``batch_indexes`` (M,) int64 ascending.
            M = 0 when nothing matches.

        Raises:
            ValueError: shapes, sizes, ranges, devices or keys other than these.
            TypeError: types or dtypes other than these.
        """
        mode = self.config.replace(gradient_mode=mode or self.config.gradient_mode).gradient_mode
        side0, side1 = self._sides(data)
        batch = len(side0[0])
        if batch > 1 and is_cpu_inference(side0[0]):
            pairs = [self._match(_sample(side0, i), _sample(side1, i), mode) for i in range(batch)]
            return _joined(pairs)._asdict()
        return self._match(side0, side1, mode)._asdict()

    def extract_features(self, image: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The part of matching that one image needs alone: keep it to match the image against many.

        The result is a dictionary of tensors, batch first, for ``features0`` or ``features1`` of :meth:`forward`:
        backbone maps ``half``, ``quarter``, ``coarse`` and, where the image has masked or completed pixels, ``mask``.

        Args:
            image: (B, 1, H, W) in [0, 1].
            mask: (B, H, W), zero where there is no image.

        Raises:
            ValueError, TypeError: as :meth:`forward`.
        """
        image = check_image("image", image, self._device)
        if mask is not None:
            mask = check_mask("mask", mask, "image", (image.shape[0], *image.shape[-2:]), self._device)
        return self._extract(image, mask).to_dict()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As ``nn.Module``; the authors' checkpoints go through :meth:`from_pretrained`."""
        return nn.Module.load_state_dict(self, state_dict, strict, assign)

    def match_maps(self, features0: Features, features1: Features, *, with_best: bool = True) -> PairMaps:
        """Transformer and streaming coarse scores: everything before a match is selected; compiles as one graph."""
        mask0, mask1 = features0.coarse_mask, features1.coarse_mask
        coarse0, coarse1 = self.transformer(features0.coarse, features1.coarse, mask0, mask1)
        maps = coarse0, coarse1, mask0, mask1
        if not with_best:
            return PairMaps(*maps, score_cells(*maps, self.config), None)
        return PairMaps(*maps, *match_cells(*maps, self.config))

    def matches_from_maps(
        self, features0: Features, features1: Features, maps: PairMaps, mode: GradientMode
    ) -> Matches:
        """Select coarse matches and refine them in their fine windows."""
        if maps.best is None:
            raise ValueError("maps: expected match_maps(..., with_best=True), got maps without best cells.")
        grid0, grid1 = maps.grids
        coarse = select_matches(maps.scores, maps.best, grid0, grid1, maps.mask0, maps.mask1, self.config)
        fine0, fine1 = self.fine_maps(features0, features1, maps, _matched_cells(coarse, maps))
        fine = window_match(
            fine0,
            fine1,
            coarse.batch,
            coarse.cells0,
            coarse.cells1,
            self.config.subpixel_channels,
            self.config.subpixel_temperature,
            self.config.centred_subpixel,
            None if mode == "hard" else self.config.soft_temperature,
        )
        keypoints0, keypoints1 = positions(
            coarse, fine, maps.scores, grid0, grid1, maps.mask0, maps.mask1, mode, self.config
        )
        matches = Matches(keypoints0, keypoints1, coarse.confidence, coarse.batch)
        return _on_image(matches, features0, features1)

    def fine_maps(
        self,
        features0: Features,
        features1: Features,
        maps: PairMaps,
        wanted: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    ) -> tuple[Tensor, Tensor]:
        """Fused fine features at half resolution, (B, D, 4h, 4w) per image.

        In training both images go through together where their sizes agree, so that BatchNorm sees both; otherwise
        one after the other, which halves the peak of the largest maps. With ``wanted``, (B, h, w) bool per image, a
        CPU leaves out what lies far from these cells.
        """
        if self.training and maps.coarse0.shape == maps.coarse1.shape:
            coarse = torch.cat([maps.coarse0, maps.coarse1])
            quarter = torch.cat([features0.quarter, features1.quarter])
            half = torch.cat([features0.half, features1.half])
            fine0, fine1 = self.pyramid(coarse, quarter, half).chunk(2)
            return fine0, fine1
        return (
            self.pyramid(maps.coarse0, features0.quarter, features0.half, wanted[0]),
            self.pyramid(maps.coarse1, features1.quarter, features1.half, wanted[1]),
        )

    def fuse(self) -> EfficientLoFTR:
        """A copy in evaluation mode, its RepVGG branches folded into single convolutions.

        It is still differentiable, and can be saved. :meth:`optimize_for_inference` folds more and gives that up.
        """
        copied = copy.deepcopy(self).eval()
        copied.backbone.fuse()
        return copied

    def optimize_for_inference(
        self,
        *,
        dtype: torch.dtype | None = None,
        compile: bool | str = False,  # noqa: A002 - torch's word for it
    ) -> InferenceMatcher:
        """A copy that only matches, as fast as it can: see :class:`eloftr_ops.inference.optimized.InferenceMatcher`.

        The copy gives no gradients and says so; this matcher stays as it is.

        Args:
            dtype: of the copy's weights and maps, for instance ``torch.bfloat16``; default: as they are.
            compile: run the dense parts through ``torch.compile``; True, or a backend's name.
        """
        from eloftr_ops.inference.optimized import InferenceMatcher

        return InferenceMatcher(self, dtype=dtype, compiled=compile)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] = "small",
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        config: EfficientLoFTRConfig | None = None,
        threshold: float | None = None,
        score: ScoreKind | None = None,
        border_removal: int | None = None,
        position_scale: tuple[float, float] | None = None,
        gradient_mode: GradientMode | None = None,
    ) -> EfficientLoFTR:
        """A model with trained weights, in evaluation mode; see :func:`eloftr_ops.weights.load_pretrained`."""
        from eloftr_ops.weights import load_pretrained

        return load_pretrained(
            name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            device=device,
            dtype=dtype,
            config=config,
            threshold=threshold,
            score=score,
            border_removal=border_removal,
            position_scale=position_scale,
            gradient_mode=gradient_mode,
        )

    def save_pretrained(self, folder: str | os.PathLike[str], *, layout: Layout = "eloftr_ops") -> None:
        """Write a folder that :meth:`from_pretrained` loads; see :func:`eloftr_ops.weights.save_pretrained`."""
        from eloftr_ops.weights import save_pretrained

        save_pretrained(self, folder, layout=layout)

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def pair_features(self, data: Mapping[str, Any]) -> tuple[Features, Features]:
        """Features of both sides of what :meth:`forward` takes."""
        return self._features(*self._sides(data))

    def _match(self, side0: Side, side1: Side, mode: GradientMode) -> Matches:
        features0, features1 = self._features(side0, side1)
        maps = self.match_maps(features0, features1)
        return self.matches_from_maps(features0, features1, maps, mode)

    def _features(self, side0: Side, side1: Side) -> tuple[Features, Features]:
        """Given, or extracted; in one pass of the backbone where the images allow it and the device likes it."""
        if (
            isinstance(side0, Image)
            and isinstance(side1, Image)
            and side0.pixels.shape == side1.pixels.shape
            and side0.mask is None
            and side1.mask is None
            and not is_cpu_inference(side0.pixels)
        ):
            return self._extract(torch.cat([side0.pixels, side1.pixels]), None).split()
        features0, features1 = (
            self._extract(*side) if isinstance(side, Image) else side for side in (side0, side1)
        )
        return features0, features1

    def _sides(self, data: Mapping[str, Any]) -> tuple[Side, Side]:
        """Both sides of a batch of pairs, checked."""
        check_pair(data)
        sides: list[Side] = []
        for side in "01":
            if f"features{side}" in data:
                widths = self.config.stage_channels[1:]
                sides.append(check_features(f"features{side}", data[f"features{side}"], widths, self._device))
                continue
            mask = None
            pixels = check_image(f"image{side}", data[f"image{side}"], self._device)
            if data.get(f"mask{side}") is not None:
                shape = (pixels.shape[0], *pixels.shape[-2:])
                mask = check_mask(f"mask{side}", data[f"mask{side}"], f"image{side}", shape, self._device)
            sides.append(Image(pixels, mask))
        check_same_batch(len(sides[0][0]), len(sides[1][0]))
        return sides[0], sides[1]

    def _extract(self, image: Tensor, mask: Tensor | None) -> Features:
        height, width = image.shape[-2:]
        pad = (0, -width % SIZE_MULTIPLE, 0, -height % SIZE_MULTIPLE)
        image = image.to(self._dtype)
        if mask is None and any(pad):
            mask = torch.ones((image.shape[0], height, width), dtype=torch.bool, device=image.device)
        if mask is not None:
            image, mask = F.pad(image * mask[:, None], pad), F.pad(mask, pad)
        half, quarter, coarse = self.backbone(image)
        return Features(half, quarter, coarse, mask)


def _matched_cells(matches: CoarseMatches, maps: PairMaps) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(B, h, w) bool for each image, or nothing where the fine maps are computed as a whole."""
    if not is_cpu_inference(maps.coarse0):
        return None, None
    batch, grids = len(maps.coarse0), maps.grids
    matched = [torch.zeros(batch, *grid, dtype=torch.bool) for grid in grids]
    for cells, index in zip(matched, (matches.cells0, matches.cells1), strict=True):
        cells.flatten(1)[matches.batch, index] = True
    return matched[0], matched[1]


def _sample(side: Side, index: int) -> Side:
    """One sample of a batch, as a batch of one."""
    return side._replace(**{n: x[index : index + 1] for n, x in side._asdict().items() if x is not None})


def _joined(pairs: list[Matches]) -> Matches:
    """Matches of a batch from those of its pairs."""
    owners = [torch.full_like(matches.batch_indexes, i) for i, matches in enumerate(pairs)]
    keypoints0, keypoints1, confidence, _ = (torch.cat(field) for field in zip(*pairs, strict=True))
    return Matches(keypoints0, keypoints1, confidence, torch.cat(owners))


def _on_image(matches: Matches, features0: Features, features1: Features) -> Matches:
    """Drop matches that the fine stage moved off the image or onto masked pixels."""
    inside = torch.ones_like(matches.confidence, dtype=torch.bool)
    for keypoints, features in ((matches.keypoints0, features0), (matches.keypoints1, features1)):
        height, width = (8 * cells for cells in features.coarse.shape[-2:])
        column, row = keypoints.detach().floor().long().unbind(-1)
        inside = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        if features.mask is not None:
            row, column = row.clamp(0, height - 1), column.clamp(0, width - 1)
            inside = inside & features.mask[matches.batch_indexes, row, column]
    return Matches(*(field[inside] for field in matches))
