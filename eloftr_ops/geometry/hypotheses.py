# SPDX-License-Identifier: Apache-2.0
"""Differentiable sample consensus: many hypotheses of each pair, their probabilities, and expected losses."""

from typing import NamedTuple

import torch
from torch import Tensor

from eloftr_ops.geometry._cameras import camera_scale, in_camera_coordinates
from eloftr_ops.geometry._checks import (
    check_cameras,
    check_choice,
    check_matches,
    check_sampling,
    check_scale,
    check_tensor,
)
from eloftr_ops.geometry._consensus import Framed, Hypotheses, consensus, framed, repeated, squared_residuals
from eloftr_ops.geometry._eight_point import nearest_essential, with_fixed_sign
from eloftr_ops.geometry._linalg import homography_in_units, skew
from eloftr_ops.geometry._minimal import SAMPLE_SIZE, log_probability_of_samples
from eloftr_ops.geometry._precision import eager, returned
from eloftr_ops.geometry._ragged import Matches, PaddedMatches, solve_in_pieces
from eloftr_ops.geometry._robust import START_KERNEL, robust_weight
from eloftr_ops.geometry._validity import is_no_accident
from eloftr_ops.geometry.fundamental import camera_matrix, fundamental_in_pixels
from eloftr_ops.geometry.homography import LEAST_DETERMINANT, with_unit_determinant
from eloftr_ops.geometry.pose import choose_motion

__all__ = ["ConsensusHypotheses", "consensus_from_matches"]

MODELS = ("homography", "fundamental", "essential", "pose")
CALIBRATED = ("essential", "pose")


class ConsensusHypotheses(NamedTuple):
    """K hypotheses for each of B pairs."""

    models_0to1: Tensor  # (B, K, 3, 3), or (B, K, 4, 4) poses; the identity (zero for F and E) where not determined
    probabilities: Tensor  # (B, K), sums to one; zero where not determined, and for a pair without any hypothesis
    scores: Tensor  # (B, K), soft number of matches that agree
    log_probability: Tensor  # (B, K), of the draw that a hypothesis came from; gradient to the weights
    best: Tensor  # (B,), index of the hypothesis of highest score; no gradient
    valid: Tensor  # (B,) bool: the best hypothesis is determined, and its support is no accident
    inlier_weights: Tensor  # (M,) in [0, 1], agreement with the best hypothesis; zero without any; differentiable

    @property
    def best_0to1(self) -> Tensor:
        """The hypothesis of highest score `(B, 3, 3)`, or `(B, 4, 4)`."""
        return self.models_0to1[torch.arange(self.best.shape[0], device=self.best.device), self.best]

    def expected(self, values: Tensor) -> Tensor:
        """Expectation `(B,)` over the hypotheses of values `(B, K)`: with losses, DSAC's expected loss."""
        check_tensor("values", values)
        if values.shape != self.probabilities.shape:
            raise ValueError(
                f"values: expected shape (B, K) = {tuple(self.probabilities.shape)}, got {tuple(values.shape)}"
            )
        counted = torch.where(self.probabilities > 0, values, 0.0)
        return (self.probabilities * counted).sum(1)


@eager
def consensus_from_matches(
    keypoints0: Tensor,
    keypoints1: Tensor,
    batch_indexes: Tensor,
    *,
    batch_size: int,
    model: str = "homography",
    weights: Tensor | None = None,
    K0: Tensor | None = None,
    K1: Tensor | None = None,
    robust_scale: float = 2.0,
    hypotheses: int = 8,
    temperature: float = 1.0,
    refine_steps: int = 20,
    confidence: float = 0.9999,
    max_iterations: int = 4096,
    generator: torch.Generator | None = None,
) -> ConsensusHypotheses:
    """Differentiable sample consensus: hypotheses of each pair of a ragged batch, with a probability for each.

    Minimal samples (4 matches for a homography, 7 for a fundamental, 5 for an essential matrix) are drawn by the
    weights without replacement (Gumbel top-k, Kool et al. 2019) and scored by a soft MSAC count (Torr and
    Zisserman 2000). The best K are refined on the robust cost, and a softmax over their scores gives probabilities,
    so that `expected(losses)` is the expected loss of DSAC (Brachmann et al. 2017). Pairs and hypotheses are one batch.

    Convention:
        - Direction, frames and normalisation of the models: as `homography_from_matches`,
          `fundamental_from_matches`, `essential_from_matches` and `relative_pose_from_matches`.
        - Units: keypoints, intrinsics and `robust_scale` in pixels; scores and `temperature` in matches.
        - Weights: only their ratios within a pair matter. Matches that share a place, a cell twice as wide as
          `robust_scale` in either image, share one vote.
        - dtype: computed in float64; the results have the keypoints' dtype, at least float32.
        - Degenerate input: a pair with too few matches, or whose samples determine no model, gets probabilities of
          zero, `valid=False` and zero gradient, and leaves the other pairs alone.
        - Gradient: to keypoints, weights and intrinsics, through models and scores. That of a refined hypothesis is
          exact at its minimum (the implicit function theorem) and zero where the minimum was not reached; with
          `refine_steps=0` it is that of the minimal sample's equations. None through the choice of samples, of the K
          best, and among the four motions of an essential matrix: use `log_probability` for a score-function
          gradient of the draw. A second derivative raises.
        - Refined hypotheses mostly agree: then the expected loss is that of the best model. Minimal ones
          (`refine_steps=0`) differ, so that the scores learn which matches lead to a good model.

    Args:
        keypoints0: `(M, 2)` in image 0, pixels.
        keypoints1: `(M, 2)` in image 1.
        batch_indexes: `(M,)` integers in [0, batch_size), in any order.
        batch_size: B, the number of pairs.
        model: "homography", "fundamental", "essential" or "pose".
        weights: `(M,)`, finite, >= 0; None for ones. The matcher's confidence, for instance.
        K0: `(B, 3, 3)` intrinsics of camera 0; needed for "essential" and "pose".
        K1: `(B, 3, 3)` intrinsics of camera 1.
        robust_scale: error at which a match starts to count as wrong.
        hypotheses: K, how many are kept.
        temperature: of the softmax over the scores.
        refine_steps: the most iterations of the refinement; 0 for minimal hypotheses.
        confidence: in (0, 1), the probability with which to find the best model.
        max_iterations: the most samples per pair.
        generator: of the samples, on the CPU; None for a fixed seed. No global random state is read.

    Returns:
        A `ConsensusHypotheses`.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite coordinates, negative weights, an unknown model, an option
            out of range, missing or singular intrinsics.
        IndexError: a batch index out of range.
        TypeError: integer keypoints or weights, floating point batch indexes.
    """
    check_matches(keypoints0, keypoints1, batch_indexes, batch_size, weights)
    check_choice("model", model, MODELS)
    check_cameras(model in CALIBRATED, K0, K1, batch_size)
    check_sampling(confidence, max_iterations)
    check_scale("robust_scale", robust_scale)
    check_scale("temperature", temperature)
    _check_counts(hypotheses, refine_steps)
    seed = _seed_from(generator)
    cameras = None if K0 is None or K1 is None else (camera_matrix(K0), camera_matrix(K1))
    kind = "essential" if model == "pose" else model

    def solve(pixels: PaddedMatches, pairs: Tensor) -> tuple[Tensor, ...]:
        of_pairs = None if cameras is None else (cameras[0][pairs], cameras[1][pairs])
        matches, scale, usable = in_frame_of(kind, pixels, robust_scale, of_pairs)
        problem = framed(kind, matches, scale)
        found = consensus(
            problem,
            hypotheses,
            max_samples=max_iterations,
            confidence=confidence,
            seed=seed,
            refine_steps=refine_steps,
        )
        found = found._replace(determined=found.determined & usable[:, None])
        models, determined = _models(model, problem, found, matches, pixels)
        score = torch.where(determined, found.score, 0.0)
        best = torch.where(determined, score.detach(), -1.0).argmax(1)
        rows = torch.arange(best.shape[0], device=best.device)
        valid = determined[rows, best] & no_accident(problem, found.matrices[rows, best])
        squared = squared_residuals(kind, found.matrices[rows, best], problem.points0, problem.points1)
        agreement = robust_weight(squared, problem.problem.scale, "cauchy")
        agreement = torch.where(determined[rows, best][:, None], agreement, 0.0)
        drawn = log_probability_of_samples(_or_more_columns(problem.weights, SAMPLE_SIZE[kind]), found.samples)
        drawn = torch.where(determined, drawn, 0.0)
        return models, _probabilities(score / temperature, determined), score, drawn, best, valid, agreement

    matches = Matches(keypoints0, keypoints1, batch_indexes, batch_size, weights)
    solved = solve_in_pieces(matches, solve, one_unit=kind == "fundamental")
    return ConsensusHypotheses(*(returned(x, keypoints0) for x in solved))


def _check_counts(hypotheses: int, refine_steps: int) -> None:
    if hypotheses < 1 or refine_steps < 0:
        raise ValueError(f"hypotheses, refine_steps: expected at least 1 and 0, got {hypotheses} and {refine_steps}")


def _seed_from(generator: torch.Generator | None) -> int:
    if generator is None:
        return 0
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def in_frame_of(
    kind: str, pixels: PaddedMatches, scale: float, cameras: tuple[Tensor, Tensor] | None
) -> tuple[PaddedMatches, Tensor, Tensor]:
    """Matches and scale `(B,)` in the coordinates a model is estimated in, and the pairs `(B,)` that can be."""
    if kind == "essential" and cameras is not None:
        camera, usable = in_camera_coordinates(pixels, *cameras)
        return camera, camera_scale(scale, *cameras).detach(), usable
    return pixels, scale / pixels.unit1, torch.ones_like(pixels.unit1, dtype=torch.bool)


def no_accident(problem: Framed, matrices: Tensor) -> Tensor:
    """Pairs `(B,)` whose model `(B, 3, 3)`, in the frame of the problem, is well supported."""
    plain = problem.problem
    points = (plain.points0, plain.points1)
    return is_no_accident(plain.model, matrices, points, problem.share, plain.scale, problem.unit)


def _probabilities(scores: Tensor, determined: Tensor) -> Tensor:
    """Softmax over the hypotheses that are determined; zero for a pair without any."""
    some = determined.any(1, keepdim=True)
    hidden = torch.where(determined | ~some, scores, float("-inf"))
    return torch.where(determined, hidden.softmax(1), 0.0)


def _or_more_columns(weights: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(weights, (0, max(size - weights.shape[1], 0)))


def _models(
    model: str, problem: Framed, found: Hypotheses, matches: PaddedMatches, pixels: PaddedMatches
) -> tuple[Tensor, Tensor]:
    """Models `(B, K, 3, 3)` or `(B, K, 4, 4)` of the user's coordinates, and which are determined."""
    shape, times = found.determined.shape, found.determined.shape[1]
    matrices, determined = found.matrices.flatten(0, 1), found.determined.flatten()
    determined = determined & torch.isfinite(matrices.detach()).flatten(1).all(1)
    if model == "homography":
        determined = determined & (torch.linalg.det(matrices.detach()).abs() > LEAST_DETERMINANT)
    safe = torch.eye(3, dtype=matrices.dtype, device=matrices.device)
    matrices = torch.where(determined[:, None, None], matrices, safe)
    unit0, unit1 = (x.repeat_interleave(times) for x in (pixels.unit0, pixels.unit1))
    empty = torch.zeros_like(safe)
    if model == "homography":
        frame0, frame1 = repeated(problem, times).frames
        result = with_unit_determinant(matrices, frame0, frame1)
        ratio = (unit0 / unit1).pow(2.0 / 3.0)[:, None, None]
        result, empty = homography_in_units(result, unit0, unit1) * ratio, safe
    elif model == "fundamental":
        frame0, frame1 = repeated(problem, times).frames
        result = with_fixed_sign(frame1.transform.mT @ matrices @ frame0.transform)
        result = with_fixed_sign(fundamental_in_pixels(result, unit0))
    else:
        E, t, _ = nearest_essential(with_fixed_sign(matrices))
        # Only matches that agree vote for one of the four motions.
        many, x0, x1 = repeated(problem, times), *(x.repeat_interleave(times, 0) for x in matches[:2])
        agreeing = many.weights * robust_weight(
            squared_residuals("essential", E, x0, x1), many.problem.scale, START_KERNEL
        )
        R, t, front = choose_motion(E, t, matches._replace(points0=x0, points1=x1, weights=agreeing))
        determined = determined & front
        if model == "essential":
            result = with_fixed_sign(skew(t) @ R)
        else:
            empty = torch.eye(4, dtype=R.dtype, device=R.device)
            last = empty[3:].expand(R.shape[0], 1, 4)
            result = torch.cat([torch.cat([R, t[:, :, None]], dim=2), last], dim=1)
    result = torch.where(determined[:, None, None], result, empty)
    return result.unflatten(0, shape), determined.view(shape)
