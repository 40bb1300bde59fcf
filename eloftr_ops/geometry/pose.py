# SPDX-License-Identifier: Apache-2.0
"""Essential matrices and relative poses from matches and intrinsics."""

from typing import NamedTuple

import torch
from torch import Tensor

from eloftr_ops.geometry._cameras import camera_scale, in_camera_coordinates
from eloftr_ops.geometry._charts import PoseChart
from eloftr_ops.geometry._checks import (
    batch_size_of,
    check_choice,
    check_intrinsics,
    check_matches,
    check_matrices,
    check_scale,
)
from eloftr_ops.geometry._covariances import (
    Covariances,
    check_covariances,
    relative_covariances,
)
from eloftr_ops.geometry._eight_point import (
    LEAST_MATCHES,
    eight_point,
    nearest_essential,
    to_pixels,
    with_fixed_sign,
)
from eloftr_ops.geometry._linalg import adjugate, homogeneous, safe_normalise, skew, unit_magnitude
from eloftr_ops.geometry._precision import eager, returned, to_work
from eloftr_ops.geometry._ragged import Matches, PaddedMatches, solve_in_pieces
from eloftr_ops.geometry._refine import RobustCost, levenberg_marquardt, minimise
from eloftr_ops.geometry._residuals import SampsonResidual
from eloftr_ops.geometry._robust import KERNELS, START_KERNEL, robust_weight, trusted_weights, votes
from eloftr_ops.geometry.fundamental import camera_matrix, robust_eight_point, supported
from eloftr_ops.geometry.homography import resolve_steps

__all__ = ["EssentialEstimate", "PoseEstimate", "essential_from_matches", "relative_pose_from_matches"]

LEAST_MATCHES_REFINED = 5
STEPS_OF_STARTS = 10


class EssentialEstimate(NamedTuple):
    """Essential matrices of B pairs, with flags and diagnostics."""

    E_0to1: Tensor  # (B, 3, 3), unit norm, largest entry positive; zero where not valid
    valid: Tensor  # (B,) bool: the matches determine an essential matrix
    converged: Tensor  # (B,) bool: the refinement reached its minimum; equals `valid` without refinement
    conditioning: Tensor  # (B,) in [0, 1]: how far from ill-posed; no gradient
    inlier_weights: Tensor  # (M,) in [0, 1], the robust kernel's weight of each match; differentiable


class PoseEstimate(NamedTuple):
    """Relative poses of B pairs, with flags and diagnostics."""

    T_0to1: Tensor  # (B, 4, 4), X1 = R X0 + t, |t| = 1; the identity where not valid
    valid: Tensor  # (B,) bool: the matches determine rotation and translation direction
    converged: Tensor  # (B,) bool: the refinement reached its minimum; equals `valid` without refinement
    conditioning: Tensor  # (B,) in [0, 1]: how far from ill-posed; no gradient
    inlier_weights: Tensor  # (M,) in [0, 1], the robust kernel's weight of each match; differentiable

    @property
    def rotation_0to1(self) -> Tensor:
        """Rotation `(B, 3, 3)`."""
        return self.T_0to1[:, :3, :3]

    @property
    def translation_0to1(self) -> Tensor:
        """Unit translation `(B, 3)`, in camera 1's axes; zero where not valid."""
        return self.T_0to1[:, :3, 3]


class _Motion(NamedTuple):
    R: Tensor  # (B, 3, 3)
    t: Tensor  # (B, 3), unit
    valid: Tensor  # (B,) bool
    converged: Tensor  # (B,) bool
    conditioning: Tensor  # (B,)
    inlier_weights: Tensor  # (M,)


@eager
def relative_pose_from_matches(
    keypoints0: Tensor,
    keypoints1: Tensor,
    K0: Tensor,
    K1: Tensor,
    batch_indexes: Tensor,
    *,
    weights: Tensor | None = None,
    covariance0: Tensor | None = None,
    covariance1: Tensor | None = None,
    robust: str | None = None,
    robust_scale: float = 1.0,
    refine_steps: int = 20,
    initial_0to1: Tensor | None = None,
) -> PoseEstimate:
    """Estimate rotation and translation direction of each pair of a ragged batch of matches.

    Eight-point essential matrix in camera coordinates, projected to singular values (1, 1, 0); of its four
    motions the one with most weight in front of both cameras (Hartley and Zisserman, section 9.6); then
    Levenberg-Marquardt on the Sampson error over rotation and translation direction (five parameters).

    Convention:
        - Direction: `X1 = R_0to1 X0 + t_0to1`, the order of COLMAP, OpenCV's `recoverPose` and kornia.
        - Frame: the keypoints' and the intrinsics' must be the same. With the centre of pixel (x, y) at
          (x + 0.5, y + 0.5), cx and cy are 0.5 larger than in OpenCV's frame; or move the keypoints with
          `to_integer_centers`. Axis order (x, y).
        - Units: keypoints, intrinsics and `robust_scale` in pixels; the translation has norm 1.
        - Weights: only their ratios within a pair matter.
        - Covariances: as `fundamental_from_matches`; the intrinsics carry them into camera coordinates.
        - dtype: computed in float64; the result has the keypoints' dtype, at least float32.
        - Degenerate input: too few matches of positive weight (eight, or five with `initial_0to1`), repeated
          or collinear points, a pure rotation, all weights zero, give `valid=False`, the identity and zero
          gradient, and leave the other pairs alone. Points on one plane do so too unless `initial_0to1` is
          given: the plane defeats the eight-point start, not the refinement.
        - Gradient: the choice among four motions is discrete and carries none. With refinement it is exact at
          the minimum by the implicit function theorem, and zero where the minimum was not reached; without
          (`refine_steps=0`) it is that of the eight-point solution and its projection. It flows to keypoints,
          weights and intrinsics, and is finite at an exact fit.

    Args:
        keypoints0: `(M, 2)` in image 0, pixels.
        keypoints1: `(M, 2)` in image 1, pixels.
        K0: `(B, 3, 3)` intrinsics of camera 0; B is the number of pairs.
        K1: `(B, 3, 3)` intrinsics of camera 1.
        batch_indexes: `(M,)` integers in [0, B), in any order.
        weights: `(M,)`, finite, >= 0; None for ones.
        covariance0: `(M, 2, 2)` of keypoints0, pixels squared, positive definite; None for exact points.
        covariance1: `(M, 2, 2)` of keypoints1.
        robust: None, "cauchy" or "geman_mcclure".
        robust_scale: Sampson error in pixels (at the mean focal length) at which a match starts to count as
            an outlier.
        refine_steps: the most iterations; 0 for the linear solution, which a robust kernel rules out.
        initial_0to1: `(B, 4, 4)`, start of the refinement instead of the eight-point solution, for instance
            from `estimate_robust`; its translation must not be zero. No gradient flows to it.

    Returns:
        A `PoseEstimate`.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite coordinates, negative or NaN weights, covariances that are
            not finite, symmetric and positive definite, an unknown kernel, intrinsics that are not invertible (naming
            the batch element).
        IndexError: a batch index out of range.
        TypeError: integer keypoints or weights, floating point batch indexes.
    """
    covariances = Covariances(covariance0, covariance1)
    matches = Matches(keypoints0, keypoints1, batch_indexes, batch_size_of("K0", K0), weights, covariances)
    motion = _estimate_motion(matches, (K0, K1), (robust, robust_scale), refine_steps, initial_0to1)
    upper = torch.cat([motion.R, motion.t[:, :, None]], dim=2)
    lower = upper.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(upper.shape[0], 1, 4)
    eye = torch.eye(4, dtype=upper.dtype, device=upper.device)
    T = torch.where(motion.valid[:, None, None], torch.cat([upper, lower], dim=1), eye)
    return PoseEstimate(*(returned(x, keypoints0) for x in (T, *motion[2:])))


@eager
def essential_from_matches(
    keypoints0: Tensor,
    keypoints1: Tensor,
    K0: Tensor,
    K1: Tensor,
    batch_indexes: Tensor,
    *,
    weights: Tensor | None = None,
    covariance0: Tensor | None = None,
    covariance1: Tensor | None = None,
    robust: str | None = None,
    robust_scale: float = 1.0,
    refine_steps: int = 20,
) -> EssentialEstimate:
    """Estimate the essential matrix of each pair of a ragged batch of matches.

    `[t]_x R` of `relative_pose_from_matches`, with the same arguments, errors, validity and gradient.

    Convention:
        - Direction: `(K1^-1 x1)^T E_0to1 (K0^-1 x0) = 0` for homogeneous keypoints x0, x1; E_1to0 is the
          transpose, up to sign.
        - Scale and sign: unit Frobenius norm, the entry of largest magnitude positive (it jumps where two
          tie).
        - Degenerate input: as for the pose, and the zero matrix.

    Args:
        keypoints0: `(M, 2)` in image 0, pixels.
        keypoints1: `(M, 2)` in image 1, pixels.
        K0: `(B, 3, 3)` intrinsics of camera 0.
        K1: `(B, 3, 3)` intrinsics of camera 1.
        batch_indexes: `(M,)` integers in [0, B), in any order.
        weights: `(M,)`, finite, >= 0; None for ones.
        covariance0: `(M, 2, 2)` of keypoints0, pixels squared, positive definite; None for exact points.
        covariance1: `(M, 2, 2)` of keypoints1.
        robust: None, "cauchy" or "geman_mcclure".
        robust_scale: Sampson error in pixels at which a match starts to count as an outlier.
        refine_steps: the most iterations; 0 for the linear solution.

    Returns:
        An `EssentialEstimate`.

    Raises:
        ValueError: as `relative_pose_from_matches`.
        IndexError: a batch index out of range.
        TypeError: integer keypoints or weights, floating point batch indexes.
    """
    covariances = Covariances(covariance0, covariance1)
    matches = Matches(keypoints0, keypoints1, batch_indexes, batch_size_of("K0", K0), weights, covariances)
    motion = _estimate_motion(matches, (K0, K1), (robust, robust_scale), refine_steps, None)
    E = torch.where(motion.valid[:, None, None], with_fixed_sign(skew(motion.t) @ motion.R), 0.0)
    return EssentialEstimate(*(returned(x, keypoints0) for x in (E, *motion[2:])))


def _estimate_motion(
    matches: Matches,
    intrinsics: tuple[Tensor, Tensor],
    kernel: tuple[str | None, float],
    refine_steps: int,
    initial: Tensor | None,
) -> _Motion:
    (K0, K1), (robust, robust_scale) = intrinsics, kernel
    check_matches(*matches[:5])
    check_covariances(*(matches.covariances or Covariances(None, None)), count=len(matches.keypoints0))
    check_intrinsics("K0", K0, matches.batch_size)
    check_intrinsics("K1", K1, matches.batch_size)
    check_choice("robust", robust, KERNELS)
    check_scale("robust_scale", robust_scale)
    steps = resolve_steps(refine_steps, robust, initial is not None)
    if initial is not None:
        check_initial_pose(initial, matches.batch_size)
        initial = to_work(initial.detach())
    cameras0, cameras1 = camera_matrix(K0), camera_matrix(K1)

    def solve(pixels: PaddedMatches, pairs: Tensor) -> tuple[Tensor, ...]:
        camera, usable = in_camera_coordinates(pixels, cameras0[pairs], cameras1[pairs])
        scale = camera_scale(robust_scale, cameras0[pairs], cameras1[pairs])
        relative, weights = relative_covariances(camera.covariances, camera.weights, summed=False)
        camera = camera._replace(covariances=relative)
        if steps == 0:
            R, t, valid, conditioning = _linear_motion(camera._replace(weights=weights))
            converged = valid
        else:
            start = None if initial is None else initial[pairs]
            R, t, valid, converged, conditioning = _refined_motion(camera, weights, (robust, scale), steps, start)
        squared = SampsonResidual.value(skew(t) @ R, camera.points0, camera.points1, relative).square().sum(-1)
        inlier_weights = robust_weight(squared, scale, robust)
        return R, t, valid & usable, converged & usable, conditioning, inlier_weights

    return _Motion(*solve_in_pieces(matches, solve))


def check_initial_pose(initial: Tensor, batch_size: int) -> None:
    """Raise unless `initial` is `(B, 4, 4)`, finite, with a translation."""
    check_matrices("initial_0to1", initial, batch_size, rows=4)
    still = initial[:, :3, 3].abs().amax(1) == 0
    if bool(still.any()):
        row = int(still.nonzero()[0, 0])
        raise ValueError(
            f"initial_0to1: expected a translation, got zero in batch element {row}; "
            "any direction can serve as the start"
        )


def _linear_motion(matches: PaddedMatches) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    solution = eight_point(matches, matches.weights)
    camera = to_pixels(solution.matrix, solution.frame0, solution.frame1)
    E, t, unique = nearest_essential(with_fixed_sign(camera))
    R, t, in_front = choose_motion(E, t, matches)
    return R, t, solution.determined & unique & in_front, solution.gap


def choose_motion(E: Tensor, t: Tensor, matches: PaddedMatches) -> tuple[Tensor, Tensor, Tensor]:
    """Of the four motions of E, the one with most weight in front of both cameras.

    `cof(E) -+ [t]_x E` are the two rotations of an E with singular values (1, 1, 0) and null vector t (Horn
    1990), a polynomial: no decomposition is differentiated.
    """
    # The transpose of the adjugate is the matrix of cofactors.
    cofactors, turned = adjugate(E).mT, skew(t) @ E
    rotations = torch.stack([cofactors - turned, cofactors + turned], dim=1)
    motions_R = rotations.repeat_interleave(2, dim=1)
    motions_t = torch.stack([t, -t, t, -t], dim=1)
    votes = torch.stack(
        [_weight_in_front(motions_R[:, k].detach(), motions_t[:, k].detach(), matches) for k in range(4)],
        dim=1,
    )
    best = votes.argmax(1)
    rows = torch.arange(E.shape[0], device=E.device)
    return motions_R[rows, best], motions_t[rows, best], votes[rows, best] > 0


def _weight_in_front(R: Tensor, t: Tensor, matches: PaddedMatches) -> Tensor:
    """Weight `(B,)` of matches whose rays meet at positive depth in both cameras."""
    x0, x1 = homogeneous(matches.points0.detach()) @ R.mT, homogeneous(matches.points1.detach())
    side = t[:, None].expand_as(x1)
    # z1 x1 = z0 R x0 + t, crossed with x1 and with R x0; only the signs of the depths matter.
    normal = torch.linalg.cross(x1, x0)
    depth0 = -(normal * torch.linalg.cross(x1, side)).sum(-1)
    depth1 = -(normal * torch.linalg.cross(x0, side)).sum(-1)
    front = (depth0 > 0) & (depth1 > 0)
    vote: Tensor = (matches.weights.detach() * front).sum(1)
    return vote


def _consensus(matches: PaddedMatches, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotation `(B, 3, 3)`, direction `(B, 3)` and flag `(B,)` of the motion that most matches agree with.

    The best five-point samples are re-weighted and then refined, each for itself; the best of those counts.
    """
    starts, _ = robust_eight_point("essential", matches, scale)
    tries = starts.shape[1]
    weights = votes(matches.points0, matches.points1, trusted_weights(matches), 2.0 * scale)
    many = matches._replace(
        points0=matches.points0.repeat_interleave(tries, 0),
        points1=matches.points1.repeat_interleave(tries, 0),
        weights=weights.repeat_interleave(tries, 0),
    )
    scales = scale.repeat_interleave(tries, 0)
    E, t, unique = nearest_essential(with_fixed_sign(starts.flatten(0, 1)))
    squared = SampsonResidual.value(E, many.points0, many.points1).square().sum(-1)
    agreeing = many.weights * robust_weight(squared, scales, START_KERNEL)
    R, t, _ = choose_motion(E, t, many._replace(weights=agreeing))
    cost = RobustCost(SampsonResidual(), many.points0, many.points1, many.weights, scales, START_KERNEL)
    chart = levenberg_marquardt(PoseChart.centred(R, t), cost, STEPS_OF_STARTS)
    value = cost.cost(skew(chart.t) @ chart.R).nan_to_num(nan=float("inf")).view(-1, tries)
    best = value.argmin(1) + tries * torch.arange(value.shape[0], device=value.device)
    return chart.R[best], chart.t[best], unique[best]


def _refined_motion(
    matches: PaddedMatches,
    linear_weights: Tensor,
    kernel: tuple[str | None, Tensor],
    steps: int,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    robust, scale = kernel
    with torch.no_grad():
        linear = eight_point(matches, linear_weights)
        ready = linear.frame0.spread & linear.frame1.spread
        if initial is not None:
            R, t = initial[:, :3, :3], safe_normalise(unit_magnitude(initial[:, :3, 3], (1,)))
            least = LEAST_MATCHES_REFINED
        else:
            if robust is None:
                camera = to_pixels(linear.matrix, linear.frame0, linear.frame1)
                E, t, unique = nearest_essential(with_fixed_sign(camera))
                R, t, in_front = choose_motion(E, t, matches)
                determined = linear.determined
            else:
                R, t, unique = _consensus(matches, scale)
                squared = SampsonResidual.value(skew(t) @ R, matches.points0, matches.points1).square().sum(-1)
                agreeing = matches.weights * robust_weight(squared, scale, robust)
                determined = eight_point(matches, agreeing).determined
                in_front = _weight_in_front(R, t, matches._replace(weights=agreeing)) > 0
            ready = ready & unique & in_front & determined
            least = LEAST_MATCHES
    data = (matches.points0, matches.points1, matches.weights, scale)
    objective = RobustCost(SampsonResidual(), *data, robust, matches.covariances)
    minimum = minimise(PoseChart.centred(R, t), objective, steps, linear.least_gap)
    R, t = minimum.chart.motion(minimum.delta)
    enough = (matches.weights > 0).sum(1) >= least
    valid = ready & enough & minimum.determined
    if robust is not None:
        unit = (linear.frame0.scale * linear.frame1.scale).sqrt()
        valid = valid & supported("essential", skew(t) @ R, matches, scale.detach(), unit)
    return R, t, valid, valid & minimum.converged, minimum.conditioning
