# SPDX-License-Identifier: Apache-2.0
"""Sampled selection: matches drawn from their probabilities, each with its log-probability.

Arg-max selection has no gradient: an index does not move. A probability does. What is drawn here, cells and pixels,
can be judged by anything that is computed from it, and the judgement weights the gradient of the log-probability
(:func:`eloftr_ops.losses.expected_reward_loss`). So cells are learnt that no right match led to before.

After Tyszkiewicz, Fua and Trulls, "DISK", NeurIPS 2020, and Bhowmik et al., "Reinforced Feature Points", CVPR 2020,
which draw keypoints; here it is the matcher's own dual softmax, of cells and of pixels, that is drawn from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eloftr_kernels import pair_scores
from eloftr_kernels.dual_softmax.sampled_pairs import sample_pairs
from eloftr_kernels.noise import keys
from eloftr_kernels.window_match import WINDOW
from eloftr_kernels.window_match.sampled_pixels import sample_pixels
from eloftr_ops.config import EfficientLoFTRConfig
from eloftr_ops.model.fine import cell_positions, on_image
from eloftr_ops.types import CoarseOutput, Features, Matches, SampledMatches, SampledPixels

_PIXEL_STREAM = 1 << 20  # of the noise of windows: far from the numbers of draws


def check_sampling(config: EfficientLoFTRConfig, draws: int, matches: int, pixels: int) -> None:
    """Raise unless there are probabilities to draw from, and the counts are in range.

    Raises:
        ValueError: they are not.
        TypeError: a count that is no integer.
    """
    if config.score != "dual_softmax":
        raise ValueError(
            f"score: expected dual_softmax, whose probabilities can be drawn from, got {config.score}. Set "
            "model.config = model.config.replace(score='dual_softmax', threshold=0.2)."
        )
    limits = {"draws": (draws, 1, 1000), "matches": (matches, 1, 1 << 20), "pixels": (pixels, 0, WINDOW**4)}
    for name, (value, least, most) in limits.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}.")
        if not least <= value <= most:
            raise ValueError(f"{name}: expected {least} to {most}, got {value}.")


def draw_matches(
    sides: tuple[Features, Features],
    coarse: CoarseOutput,
    fine: tuple[Tensor, Tensor] | None,
    config: EfficientLoFTRConfig,
    draws: int,
    matches: int,
    pixels: int,
    generator: torch.Generator | None,
) -> SampledMatches:
    """Cells, and with ``fine`` pixels in the window of each: :func:`draw_cells`, :func:`draw_pixels`."""
    seeds = pair_seeds(len(coarse.coarse0), generator, coarse.coarse0.device)
    drawn = draw_cells(*sides, coarse, config, seeds=seeds, draws=draws, matches=matches)
    if fine is None:
        return drawn
    rows = torch.arange(drawn.valid.numel(), device=seeds.device)
    found = draw_pixels(*sides, coarse, *fine, config, drawn, rows=rows, seeds=seeds, pixels=pixels)
    return drawn._replace(pixels=found)


def pair_seeds(count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """(B,) int64, one seed for each pair of images, in order: a batch gets those that its pairs get one by one."""
    source = torch.device("cpu") if generator is None else generator.device
    return torch.randint(2**62, (count,), generator=generator, device=source).to(device)


def draw_cells(
    features0: Features,
    features1: Features,
    coarse: CoarseOutput,
    config: EfficientLoFTRConfig,
    *,
    seeds: Tensor,
    draws: int,
    matches: int,
) -> SampledMatches:
    """D draws of K pairs of cells for each pair of images, without replacement within a draw.

    Convention:
        - A pair (i, j) is drawn in proportion to its dual-softmax probability: that cell i, by its softmax over
          image 1, chooses j, and j chooses i. Neither mutual best, nor threshold, nor border play a part. Masked cells
          are never drawn.
        - ``keypoints`` are the middles of the windows of the cells.
        - What is drawn for a pair of images depends on its seed alone.

    Gradient:
        ``log_probability`` to the coarse maps of both images; finite at every probability. None to keypoints.

    Args:
        features0: of image 0, for its masked pixels.
        features1: of image 1.
        coarse: of ``match_cells`` or ``score_cells``.
        config: temperature.
        seeds: (B,) int64, as :func:`pair_seeds` gives them.
        draws: D.
        matches: K.

    Raises:
        ValueError: ``coarse`` of raw similarities.
    """
    scores = coarse.scores
    if scores.row_lse is None or scores.col_lse is None:
        raise ValueError("coarse: expected dual-softmax scores, got raw similarities.")
    masks = [None if mask is None else mask.flatten(1) for mask in (coarse.mask0, coarse.mask1)]
    cells0, cells1, valid = sample_pairs(
        scores.features0.detach(),
        scores.features1.detach(),
        config.temperature,
        scores.row_lse.detach(),
        scores.col_lse.detach(),
        *masks,
        seeds=seeds,
        draws=draws,
        count=matches,
    )
    batch = torch.arange(len(seeds), device=seeds.device)[:, None, None].expand_as(cells0).flatten()
    flat0, flat1 = cells0.flatten(), cells1.flatten()
    normalised = scores.row_lse, scores.col_lse
    log_probability = pair_scores(
        scores.features0, scores.features1, config.temperature, batch, flat0, flat1, *normalised
    )
    log_probability = log_probability.clamp(max=0).view_as(valid)
    points0 = cell_positions(cells0, coarse.grid0, log_probability.dtype)
    points1 = cell_positions(cells1, coarse.grid1, log_probability.dtype)
    return SampledMatches(
        torch.where(valid[..., None], points0, 0),
        torch.where(valid[..., None], points1, 0),
        torch.where(valid, log_probability, 0),
        valid,
        cells0,
        cells1,
    )


def draw_pixels(
    features0: Features,
    features1: Features,
    coarse: CoarseOutput,
    fine0: Tensor,
    fine1: Tensor,
    config: EfficientLoFTRConfig,
    drawn: SampledMatches,
    *,
    rows: Tensor,
    seeds: Tensor,
    pixels: int,
) -> SampledPixels:
    """T pairs of pixels in the windows of chosen pairs of cells, without replacement within a window.

    Convention:
        - The probability is the joint probability of the window, whose sum over the 64 x 64 pairs is one: given the
          pair of cells. Frame and units as ``Matches``; pixels are at half-integer offsets.
        - What is drawn in a window depends on the seed of its pair of images, the number of the draw and its cells.

    Gradient:
        ``log_probability`` to the fine maps of both images. None to keypoints.

    Args:
        features0: of image 0.
        features1: of image 1.
        coarse: where the cells come from.
        fine0: (B, D, 4h0, 4w0), fused fine map.
        fine1: (B, D, 4h1, 4w1).
        config: channels of the fine maps.
        drawn: of :func:`draw_cells`.
        rows: (N,) int64: which of the B * D * K pairs of cells.
        seeds: (B,) int64, those of ``drawn``.
        pixels: T.
    """
    _, draws, matches = drawn.valid.shape
    batch, draw = rows // (draws * matches), rows // matches % draws
    cells0, cells1 = drawn.cells0.flatten()[rows], drawn.cells1.flatten()[rows]
    stream = keys(seeds[batch], _PIXEL_STREAM + draw).long()
    found = sample_pixels(
        fine0,
        fine1,
        batch,
        cells0,
        cells1,
        config.subpixel_channels,
        keys=keys(keys(stream, cells0).long(), cells1),
        draws=pixels,
    )
    dtype = found.log_probability.dtype
    points0 = cell_positions(cells0, coarse.grid0, dtype)[:, None] + found.pixel0
    points1 = cell_positions(cells1, coarse.grid1, dtype)[:, None] + found.pixel1
    flat = Matches(points0.flatten(0, 1), points1.flatten(0, 1), batch, batch.repeat_interleave(pixels))
    inside = on_image(flat, features0, features1).view_as(found.log_probability)
    inside = inside & drawn.valid.flatten()[rows, None]
    return SampledPixels(points0, points1, found.log_probability, inside)
