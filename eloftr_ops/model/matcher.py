# SPDX-License-Identifier: Apache-2.0
"""EfficientLoFTR: two images in, semi-dense matches out. ``forward`` has the five steps of the paper's figure 2."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from kornia.feature import LoFTR
from torch import Tensor, nn

from eloftr_ops.checks import check_image, check_mask, check_max_matches, check_range, checked_pair
from eloftr_ops.config import EfficientLoFTRConfig, GradientMode, WeightLayout, check_choice
from eloftr_ops.model.backbone import RepVGG
from eloftr_ops.model.coarse import match_cells, score_cells, select_fixed, select_matches
from eloftr_ops.model.fine import FeaturePyramid, match_windows, on_image
from eloftr_ops.model.sampling import check_sampling, draw_matches
from eloftr_ops.model.stages import stage
from eloftr_ops.model.transformer import CoarseTransformer
from eloftr_ops.types import (
    CoarseMatches,
    CoarseOutput,
    Features,
    ImageInput,
    Matches,
    PairInput,
    SampledMatches,
    StaticMatches,
    UncertainMatches,
)

SIZE_MULTIPLE = 32  # of the padded image: 4x4 aggregation of cells of 8x8 pixels
_KORNIA_NAMES = {"outdoor": "zju-community/efficientloftr"}  # what kornia calls LoFTR's weights of that data


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
        - confidence: dual-softmax probability of the coarse pair, in (threshold, 1], and in [0, 1] for threshold 0;
          raw similarity for ``score="similarity"``.
        - dtypes: keypoints and confidence are float32 for float32, float16 and bfloat16 models, float64 for float64.
        - a batch gives what its pairs give one by one; without gradient, a CPU matches them one by one.

    Gradient:
        ``confidence`` carries gradient to both images in every mode. ``keypoints0`` and ``keypoints1``: see
        :func:`eloftr_ops.model.fine.keypoints_from_windows` and ``docs/differentiability.md``.

    It is a ``kornia.feature.LoFTR`` by contract, not by code: kornia's stitcher and tracker ask for that class.

    Args:
        config: architecture and matching parameters; the authors' model by default. Or a name of weights, as
            ``pretrained``.
        fused: build the backbone with re-parameterised blocks (inference form).
        pretrained: weights to start with, as :meth:`from_pretrained` takes them, in evaluation mode, the way
            ``kornia.feature.LoFTR`` is built; ``outdoor`` is the authors' release on the Hub.

    Raises:
        TypeError: ``config`` is neither.
        ValueError: as :meth:`from_pretrained`; or ``fused`` with weights, whose form decides.
    """

    def __init__(
        self,
        config: EfficientLoFTRConfig | str | None = None,
        *,
        fused: bool = False,
        pretrained: str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # LoFTR's own constructor would build LoFTR's layers
        if isinstance(config, str):
            config, pretrained = None, config
        config = config or EfficientLoFTRConfig()
        if not isinstance(config, EfficientLoFTRConfig):
            kind = type(config).__name__
            raise TypeError(f"config: expected an EfficientLoFTRConfig or a name of weights, got {kind}.")
        if pretrained is not None:
            self._adopt(EfficientLoFTR.from_pretrained(_KORNIA_NAMES.get(pretrained, pretrained)), fused)
            return
        self.backbone: RepVGG = RepVGG(config, fused=fused)  # type: ignore[assignment]
        self.transformer = CoarseTransformer(config)
        self.pyramid = FeaturePyramid(config)
        self._config = config

    def _adopt(self, loaded: EfficientLoFTR, fused: bool) -> None:
        if fused:
            raise ValueError("fused: expected False with weights, which have one form. Call .fused() later.")
        self._config = loaded.config
        self.backbone, self.transformer, self.pyramid = loaded.backbone, loaded.transformer, loaded.pyramid
        self.eval()

    @property  # type: ignore[override]
    def config(self) -> EfficientLoFTRConfig:
        """Architecture and matching parameters.

        Assign a changed copy, ``matcher.config = matcher.config.replace(threshold=0.1)``: every part follows.

        Raises:
            TypeError: something that is no configuration.
            ValueError: a change of the architecture, which belongs to the weights.
        """
        return self._config

    @config.setter
    def config(self, config: EfficientLoFTRConfig) -> None:
        if not isinstance(config, EfficientLoFTRConfig):
            raise TypeError(f"config: expected an EfficientLoFTRConfig, got {type(config).__name__}.")
        changed = self._config.architecture_changes(config)
        if changed:
            raise ValueError(
                f"config: expected the architecture of the weights, got another {', '.join(changed)}. "
                "Build a new EfficientLoFTR(config) for it."
            )
        self._config = self.transformer.config = config

    @stage
    def forward(
        self, data: Mapping[str, Any], *, mode: GradientMode | None = None, covariance: bool = False
    ) -> dict[str, Tensor]:
        """Match a batch of pairs; the dictionaries are those of ``kornia.feature.LoFTR``.

        Args:
            data: ``image0`` (B, 1, H0, W0) and ``image1`` (B, 1, H1, W1), or ``features0`` / ``features1`` of
                :meth:`extract_features` in place of either; optionally ``mask0`` (B, H0, W0), ``mask1`` (B, H1, W1).
            mode: ``hard``, ``straight_through`` or ``soft``; default ``config.gradient_mode``.
            covariance: also return ``covariance0`` (M, 2, 2) and ``covariance1`` (M, 2, 2) of the keypoints, pixels
                squared: symmetric, positive definite, with gradient to both images, the same in every mode
                (:func:`eloftr_ops.model.covariance.calibrated_covariances`).

        Returns:
            ``keypoints0`` (M, 2), ``keypoints1`` (M, 2), ``confidence`` (M,), ``batch_indexes`` (M,) ascending int64.

        Raises:
            ValueError: shapes, sizes, ranges, devices or keys other than these.
            TypeError: types or dtypes other than these.
        """
        mode = check_choice("mode", mode or self.config.gradient_mode, GradientMode)
        pair = self.check_input(data)
        # 1. Backbone (section 3.1): maps at 1/2, 1/4 and 1/8 of each image.
        features0, features1 = self.extract_pair(pair)
        # 2. Transformer (3.2): aggregated self- and cross-attention on the coarse maps.
        coarse0, coarse1 = self.transform(features0, features1)
        # 3. Dual softmax (3.3): normalisers of the scores, and the nearest cell of each cell.
        coarse = self.match_coarse(features0, features1, coarse0, coarse1)
        # 4. Selection (3.3): mutual nearest cells above the threshold. Indices have no gradient.
        selected = select_matches(coarse, self.config)
        # 5. Fine matching (3.4): a pixel in the window of each cell, then its sub-pixel offset.
        return self.refine(features0, features1, coarse, selected, mode, covariance)._asdict()

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
        image = check_image("image", image, self.device)
        if mask is not None:
            mask = check_mask("mask", mask, "image", (image.shape[0], *image.shape[-2:]), self.device)
        check_range("image", image, mask)
        return self.extract(ImageInput(image, mask)).to_dict()

    def match_static(
        self,
        image0: Tensor,
        image1: Tensor,
        mask0: Tensor | None = None,
        mask1: Tensor | None = None,
        *,
        max_matches: int,
        mode: GradientMode | None = None,
    ) -> StaticMatches:
        """Match a batch of pairs with fixed shapes: what exported and compiled graphs, and CUDA graphs, run.

        With ``max_matches`` at least the number of matches, the valid rows are the matches of :meth:`forward`.
        Otherwise they are those with the highest scores; of equal scores the lower cell of image 0 comes first.

        Convention:
            Images, masks, keypoints and confidence as :meth:`forward`, but values are not checked: reading them would
            wait for the device. No shape depends on data, and nothing waits for the device.

        Gradient:
            As :meth:`forward` in the same mode; rows that are not valid give none.

        Args:
            image0: (B, 1, H0, W0) in [0, 1].
            image1: (B, 1, H1, W1) in [0, 1].
            mask0: (B, H0, W0), zero where there is no image.
            mask1: (B, H1, W1).
            max_matches: K, rows per pair; at most the coarse cells of image 0.
            mode: ``hard``, ``straight_through`` or ``soft``; default ``config.gradient_mode``.

        Raises:
            ValueError: shapes, sizes, devices, ``max_matches`` out of range.
            TypeError: types or dtypes other than these.
        """
        mode = check_choice("mode", mode or self.config.gradient_mode, GradientMode)
        data = {"image0": image0, "image1": image1, "mask0": mask0, "mask1": mask1}
        pair = self.check_input(data, values=False)
        check_max_matches(max_matches, tuple(image0.shape[-2:]), SIZE_MULTIPLE)
        return StaticMatches.from_rows(*self.match_rows(pair, mode, max_matches))

    def match_rows(self, pair: PairInput, mode: GradientMode, max_matches: int | None = None) -> tuple[Matches, Tensor]:
        """B * K rows, those of a pair together, and which are matches, (B, K) bool; see ``coarse.select_fixed``."""
        features0, features1 = self.extract_pair(pair)
        coarse0, coarse1 = self.transform(features0, features1)
        coarse = self.match_coarse(features0, features1, coarse0, coarse1)
        selected, valid = select_fixed(coarse, self.config, max_matches)
        fine = self.fine_features(features0, features1, coarse)
        matches = Matches(*match_windows(*fine, selected, coarse, mode, self.config)[:4])
        return matches, valid & on_image(matches, features0, features1).view_as(valid)

    def sample_matches(
        self,
        image0: Tensor,
        image1: Tensor,
        mask0: Tensor | None = None,
        mask1: Tensor | None = None,
        *,
        draws: int = 2,
        matches: int = 384,
        pixels: int = 0,
        generator: torch.Generator | None = None,
    ) -> SampledMatches:
        """Draw matches from their probabilities, each with its log-probability: the gradient of the selection.

        ``draws`` times, ``matches`` pairs of cells of each pair of images; with ``pixels`` also so many pairs of pixels
        in the window of each. :mod:`eloftr_ops.model.sampling` says how, and where gradient flows. Images, masks and
        errors as :meth:`forward`. A batch draws what its pairs draw one by one with the same generator.
        """
        check_sampling(self.config, draws, matches, pixels)
        data = {"image0": image0, "image1": image1, "mask0": mask0, "mask1": mask1}
        sides = self.extract_pair(self.check_input(data))
        coarse = score_cells(*self.transform(*sides), sides[0].coarse_mask, sides[1].coarse_mask, self.config)
        fine = self.fine_features(*sides, coarse) if pixels else None
        return draw_matches(sides, coarse, fine, self.config, draws, matches, pixels, generator)

    def fused(self) -> EfficientLoFTR:
        """A copy in evaluation mode, its RepVGG branches folded into single convolutions; still differentiable."""
        copied = copy.deepcopy(self).eval()
        copied.backbone.fuse_()
        return copied

    def optimize_for_inference(
        self,
        *,
        dtype: torch.dtype | None = None,
        compile: bool | str = False,  # noqa: A002 - torch's word for it
        cuda_graphs: bool = True,
    ) -> EfficientLoFTR:
        """A copy that only matches, without gradients: :class:`eloftr_ops.inference.optimized.InferenceMatcher`.

        Args:
            dtype: of the copy's weights and maps, for instance ``torch.bfloat16``; default: as they are.
            compile: run the dense parts through ``torch.compile``; True, or a backend's name.
            cuda_graphs: on a CUDA GPU, replay recorded launches (:mod:`eloftr_ops.inference.cuda_graphs`).
        """
        from eloftr_ops.inference.optimized import InferenceMatcher

        return InferenceMatcher(self, dtype=dtype, compiled=compile, cuda_graphs=cuda_graphs)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] = "small",
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        variant: str | None = None,
        entry: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        config: EfficientLoFTRConfig | None = None,
        **config_changes: Any,
    ) -> EfficientLoFTR:
        """A model with trained weights, in evaluation mode; see :func:`eloftr_ops.weights.load_pretrained`."""
        from eloftr_ops.weights import load_pretrained

        return load_pretrained(
            name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            variant=variant,
            entry=entry,
            device=device,
            dtype=dtype,
            config=config,
            **config_changes,
        )

    def save_pretrained(self, folder: str | os.PathLike[str], *, layout: WeightLayout = "eloftr_ops") -> None:
        """Write a folder that :meth:`from_pretrained` loads; see :func:`eloftr_ops.weights.save_pretrained`."""
        from eloftr_ops.weights import save_pretrained

        save_pretrained(self, folder, layout=layout)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module``; the authors' checkpoints go through :meth:`from_pretrained`."""
        return nn.Module.load_state_dict(self, state_dict, strict, assign)

    @property
    def device(self) -> torch.device:
        """Of the weights; inputs must be there."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the first weights: images are converted to it."""
        return next(self.parameters()).dtype

    def check_input(self, data: Mapping[str, Any], *, values: bool = True) -> PairInput:
        """The input of :meth:`forward`, checked; it raises what that raises.

        Args:
            data: as for :meth:`forward`.
            values: check the range of images and masks too, for which a GPU is waited for.
        """
        dtype = next(self.pyramid.parameters()).dtype  # that of the backbone's maps
        return checked_pair(data, self.config.stage_channels[1:], self.device, dtype, values=values)

    @stage
    def extract_pair(self, pair: PairInput) -> tuple[Features, Features]:
        """Step 1. Features of both images: given, or extracted, in one batch where the images allow it."""
        side0, side1 = pair
        if isinstance(side0, ImageInput) and isinstance(side1, ImageInput) and side0.stacks_with(side1):
            return self.extract(ImageInput(torch.cat([side0.pixels, side1.pixels]), None)).split()
        return self.extract(side0), self.extract(side1)

    def extract(self, image: ImageInput | Features) -> Features:
        """Backbone features of one image, completed by masked pixels to a multiple of 32; features stay as they are."""
        if isinstance(image, Features):
            return image
        pixels, mask = image.pixels.to(self.dtype), image.mask
        height, width = pixels.shape[-2:]
        pad = (0, -width % SIZE_MULTIPLE, 0, -height % SIZE_MULTIPLE)
        if mask is None and any(pad):
            mask = torch.ones((pixels.shape[0], height, width), dtype=torch.bool, device=pixels.device)
        if mask is not None:
            pixels, mask = F.pad(pixels.masked_fill(~mask[:, None], 0), pad), F.pad(mask, pad)
        half, quarter, coarse = self.backbone(pixels)
        return Features(half, quarter, coarse, mask)

    def transform(self, features0: Features, features1: Features) -> tuple[Tensor, Tensor]:
        """Step 2. Coarse maps after the transformer, (B, C, h0, w0) and (B, C, h1, w1)."""
        return self.transformer(  # type: ignore[no-any-return]
            features0.coarse, features1.coarse, features0.coarse_mask, features1.coarse_mask
        )

    def match_coarse(self, side0: Features, side1: Features, map0: Tensor, map1: Tensor) -> CoarseOutput:
        """Step 3. Scores and nearest cells; products of a half-precision model are of its dtype."""
        dtype = next(self.transformer.parameters()).dtype
        return match_cells(map0, map1, side0.coarse_mask, side1.coarse_mask, self.config, dtype)

    def refine(
        self,
        features0: Features,
        features1: Features,
        coarse: CoarseOutput,
        selected: CoarseMatches,
        mode: GradientMode,
        covariance: bool = False,
    ) -> Matches | UncertainMatches:
        """Step 5. Keypoints of selected cells; matches that leave the image, or reach masked pixels, are dropped."""
        fine = self.fine_features(features0, features1, coarse)
        matches = match_windows(*fine, selected, coarse, mode, self.config, covariance)
        inside = on_image(matches, features0, features1)
        return type(matches)(*(field[inside] for field in matches))

    def fine_features(self, features0: Features, features1: Features, coarse: CoarseOutput) -> tuple[Tensor, Tensor]:
        """Fused fine features at half resolution, (B, D, 4h, 4w) per image.

        In training both images go through together where their sizes agree, so that BatchNorm sees both; otherwise
        one after the other, which halves the peak of the largest maps.
        """
        maps0 = coarse.coarse0, features0.quarter, features0.half
        maps1 = coarse.coarse1, features1.quarter, features1.half
        if self.training and coarse.coarse0.shape == coarse.coarse1.shape:
            return self.pyramid(*map(torch.cat, zip(maps0, maps1, strict=True))).chunk(2)  # type: ignore[no-any-return]
        return self.pyramid(*maps0), self.pyramid(*maps1)
