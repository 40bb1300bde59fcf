# SPDX-License-Identifier: Apache-2.0
"""Camera poses from points in space and where an image shows them, and points in space from depth."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from eloftr_ops.geometry._cameras import FARTHEST, camera_scale
from eloftr_ops.geometry._charts import CameraChart
from eloftr_ops.geometry._checks import (
    batch_size_of,
    check_choice,
    check_floats,
    check_intrinsics,
    check_matches,
    check_matrices,
    check_points,
    check_scale,
)
from eloftr_ops.geometry._covariances import (
    Covariances,
    check_covariances,
    moved_covariances,
    projective_slope,
    relative_covariances,
)
from eloftr_ops.geometry._linalg import FAR, LEAST_GAP, ROUNDINGS, homogeneous, normalise_points
from eloftr_ops.geometry._precision import eager, result_dtype, returned, to_work
from eloftr_ops.geometry._ragged import Matches, PaddedMatches, solve_in_pieces
from eloftr_ops.geometry._refine import RobustCost, levenberg_marquardt, minimise
from eloftr_ops.geometry._residuals import ProjectionResidual
from eloftr_ops.geometry._robust import KERNELS, STARTS, far_point_weight, robust_weight, votes
from eloftr_ops.geometry._three_points import SAMPLE_SIZE, SOLUTIONS, best_poses
from eloftr_ops.geometry._validity import ACCEPTED_ALARMS, log_false_alarms
from eloftr_ops.geometry.fundamental import camera_matrix

__all__ = ["AbsolutePoseEstimate", "absolute_pose_from_matches", "points_from_depth"]

LEAST_MATCHES = 4
STEPS_OF_STARTS = 10
# Share of a pixel's weights, in the interpolation of depth, that may lie on pixels without depth.
MISSING = 1e-6


class AbsolutePoseEstimate(NamedTuple):
    """Poses of B cameras, with flags and diagnostics."""

    T_0to1: Tensor  # (B, 4, 4), X1 = R X0 + t, in the unit of the points; the identity where not valid
    valid: Tensor  # (B,) bool: the matches determine a pose, with the points in front of the camera
    converged: Tensor  # (B,) bool: the refinement reached its minimum
    conditioning: Tensor  # (B,) in [0, 1]: how far from ill-posed; no gradient
    inlier_weights: Tensor  # (M,) in [0, 1], the robust kernel's weight of each match; differentiable


@eager
def absolute_pose_from_matches(
    keypoints1: Tensor,
    points0: Tensor,
    K1: Tensor,
    batch_indexes: Tensor,
    *,
    weights: Tensor | None = None,
    covariance1: Tensor | None = None,
    robust: str | None = None,
    robust_scale: float = 2.0,
    refine_steps: int = 20,
    initial_0to1: Tensor | None = None,
) -> AbsolutePoseEstimate:
    """Estimate the pose of each camera of a ragged batch of matches of keypoints with points in space.

    The best of 512 three-point samples (Haralick et al. 1994), of which eight are refined, each for itself; then
    Levenberg-Marquardt on the reprojection error in pixels, or its Mahalanobis distance, over the six parameters.

    Convention:
        - Direction: `X1 = R_0to1 X0 + t_0to1`: frame 0 is that of the points (the world, or another camera), frame 1
          the camera's, z forward. `keypoints1 ~ K1 X1`.
        - Frame: that of the intrinsics, see `relative_pose_from_matches`. Axis order (x, y).
        - Units: keypoints, intrinsics and `robust_scale` in pixels; the translation in the unit of the points.
        - Weights and covariances: only their ratios within a pair matter; `robust_scale` stays in pixels, for a match
          with the geometric mean of the variances.
        - dtype: computed in float64; the result has the keypoints' dtype, at least float32.
        - Degenerate input: fewer than four matches of positive weight, or than four places, points on one line, all
          weights zero, a point of positive weight behind the camera (with a robust kernel: all that agree), give
          `valid=False`, the identity and zero gradient, and leave the other pairs alone. Points on one plane, and four
          or five points, are well-posed; then two poses may explain them almost as well, and the better one is taken.
        - Gradient: exact at the minimum by the implicit function theorem, zero where it was not reached; to keypoints,
          points, weights, covariances and intrinsics. It is finite at an exact fit.

    Args:
        keypoints1: `(M, 2)` in image 1, pixels.
        points0: `(M, 3)` in space; for pixels with depth see `points_from_depth`.
        K1: `(B, 3, 3)` intrinsics; B is the number of cameras.
        batch_indexes: `(M,)` integers in [0, B), in any order.
        weights: `(M,)`, finite, >= 0; None for ones.
        covariance1: `(M, 2, 2)` of keypoints1, pixels squared, positive definite; None for equal ones.
        robust: None, "cauchy" or "geman_mcclure".
        robust_scale: reprojection error in pixels (at the mean focal length) at which a match starts to count as an
            outlier.
        refine_steps: the most iterations, at least one.
        initial_0to1: `(B, 4, 4)`, start of the refinement instead of the samples. No gradient flows to it.

    Returns:
        An `AbsolutePoseEstimate`. A second derivative raises.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, negative weights, covariances that are not
            positive definite, an unknown kernel, intrinsics that are not invertible (naming the batch element).
        IndexError: a batch index out of range.
        TypeError: integer keypoints, points or weights, floating point batch indexes.
    """
    batch_size = batch_size_of("K1", K1)
    check_matches(keypoints1, keypoints1, batch_indexes, batch_size, weights)
    check_points("points0", points0, len(keypoints1))
    check_covariances(None, covariance1, len(keypoints1))
    check_intrinsics("K1", K1, batch_size)
    check_choice("robust", robust, KERNELS)
    check_scale("robust_scale", robust_scale)
    if refine_steps < 1:
        raise ValueError(f"refine_steps: expected >= 1, got {refine_steps}; the samples are only a start")
    if initial_0to1 is not None:
        check_matrices("initial_0to1", initial_0to1, batch_size, rows=4)
        initial_0to1 = to_work(initial_0to1.detach())
    cameras = camera_matrix(K1)

    def solve(pixels: PaddedMatches, pairs: Tensor) -> tuple[Tensor, ...]:
        matches, usable = _in_camera_coordinates(pixels, cameras[pairs])
        scale = camera_scale(robust_scale, cameras[pairs], cameras[pairs])
        start = None if initial_0to1 is None else _in_units(initial_0to1[pairs], pixels.unit0)
        R, t, valid, converged, conditioning = _refined_camera(matches, robust, scale, refine_steps, start)
        pose = torch.cat([R, t[:, :, None]], dim=2)
        squared = ProjectionResidual.value(pose, matches.points0, matches.points1, matches.covariances)
        inlier_weights = robust_weight(squared.clamp(-FAR, FAR).square().sum(-1), scale, robust)
        T = torch.eye(4, dtype=pose.dtype, device=pose.device).repeat(len(pose), 1, 1)
        T[:, :3] = torch.cat([R, pixels.unit0[:, None, None] * t[:, :, None]], dim=2)
        valid = valid & usable
        T = torch.where(valid[:, None, None], T, torch.eye(4, dtype=T.dtype, device=T.device))
        return T, valid, valid & converged, conditioning, inlier_weights

    matches = Matches(points0, keypoints1, batch_indexes, batch_size, weights, Covariances(None, covariance1))
    return AbsolutePoseEstimate(*(returned(x, keypoints1) for x in solve_in_pieces(matches, solve)))


def points_from_depth(keypoints: Tensor, depth: Tensor, K: Tensor, batch_indexes: Tensor) -> tuple[Tensor, Tensor]:
    """Points in space that keypoints show, by the depth of their pixels.

    Convention:
        - Frame: the centre of pixel (x, y) is (x + 0.5, y + 0.5), for keypoints and intrinsics. Axis order (x, y).
        - Depth is the z coordinate, not the distance, interpolated bilinearly. The points are in the camera's frame,
          z forward, in the unit of the depth.
        - Depth that is zero, negative, NaN or infinite is missing. A keypoint outside the image, or with a missing
          pixel among the four around it, is not valid: its point is zero and has no gradient.
        - Gradient: to keypoints, depth and intrinsics.

    Args:
        keypoints: `(M, 2)`, pixels.
        depth: `(B, H, W)`.
        K: `(B, 3, 3)` intrinsics.
        batch_indexes: `(M,)` integers in [0, B), in any order.

    Returns:
        Points `(M, 3)` in the keypoints' dtype, at least float32, and `valid` `(M,)` bool: pass `valid.float()` as a
        factor of the weights.

    Raises:
        ValueError: shapes that do not fit, keypoints that are not finite, intrinsics that are not invertible.
        IndexError: a batch index out of range.
        TypeError: integer keypoints or depth.
    """
    batch_size = batch_size_of("K", K)
    check_matches(keypoints, keypoints, batch_indexes, batch_size, None)
    check_intrinsics("K", K, batch_size)
    check_floats("depth", depth)
    if depth.ndim != 3 or depth.shape[0] != batch_size or depth.numel() == 0:
        raise ValueError(f"depth: expected shape (B, H, W) with B = {batch_size}, got {tuple(depth.shape)}")
    x, work = to_work(keypoints), to_work(depth)
    index = batch_indexes.to(x.device).long()
    there = torch.isfinite(work) & (work > 0)
    height, width = depth.shape[1:]
    place = (x - 0.5).detach().floor()
    fraction = x - 0.5 - place
    value, missing = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, row = place[:, 0] + dx, place[:, 1] + dy
        # A keypoint in the outer half of a border pixel takes that pixel's depth.
        column, row = column.clamp(0, width - 1).long(), row.clamp(0, height - 1).long()
        share = (fraction[:, 0] if dx else 1 - fraction[:, 0]) * (fraction[:, 1] if dy else 1 - fraction[:, 1])
        known = there[index, row, column]
        value = value + share * torch.where(known, work[index, row, column], 0.0)
        missing = missing + torch.where(known, 0.0, share.detach())
    inside = (x >= 0).all(1) & (x[:, 0] <= width) & (x[:, 1] <= height)
    valid = inside & (missing <= MISSING)
    ray = (torch.linalg.inv(camera_matrix(K))[index] @ homogeneous(x)[..., None])[..., 0]
    points = torch.where(valid[:, None], value[:, None] * ray / ray[:, 2:], 0.0)
    return points.to(result_dtype(keypoints.dtype)).to(keypoints.device), valid.to(keypoints.device)


def _in_camera_coordinates(pixels: PaddedMatches, K: Tensor) -> tuple[PaddedMatches, Tensor]:
    """Keypoints at depth 1 with relative covariances, unit ones in pixels if none are given; and usable pairs."""
    unit = pixels.unit1
    rows = torch.stack([1.0 / unit, 1.0 / unit, torch.ones_like(unit)], dim=1)
    inverse = torch.linalg.inv(rows[:, :, None] * K)
    mapped = homogeneous(pixels.points1) @ inverse.mT
    camera, depth = mapped[..., :2] / mapped[..., 2:], mapped[..., 2]
    sane = (camera.detach().abs().amax((1, 2)) < FARTHEST)[:, None, None]
    eye = torch.eye(2, dtype=camera.dtype, device=camera.device)
    given = pixels.covariances.points1 if pixels.covariances is not None else None
    covariance = moved_covariances(eye if given is None else given, projective_slope(inverse, camera, depth))
    covariance = torch.where(sane[..., None], covariance, eye)
    relative, _ = relative_covariances(Covariances(None, covariance), pixels.weights, summed=True)
    return pixels._replace(points1=torch.where(sane, camera, 0.0), covariances=relative), sane[:, 0, 0]


def _in_units(T: Tensor, unit: Tensor) -> Tensor:
    """The same poses `(B, 3, 4)` for points counted in units `(B,)`."""
    return torch.cat([T[:, :3, :3], T[:, :3, 3:] / unit[:, None, None]], dim=2)


def _refined_camera(
    matches: PaddedMatches, robust: str | None, scale: Tensor, steps: int, initial: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rotation, translation, valid, converged, conditioning."""
    with torch.no_grad():
        trusted = far_point_weight(matches.points0, matches.weights)
        centre, size, spread, rounding = _space_frame(matches.points0, trusted, matches.eps)
        frame1 = normalise_points(matches.points1, matches.weights, matches.eps)
        places = votes(matches.points1, matches.points1, trusted, 2.0 * scale)
    local = ((matches.points0 - centre[:, None]) / size[:, None, None]).clamp(-FAR, FAR)
    cost = RobustCost(ProjectionResidual(), local, matches.points1, matches.weights, scale, robust, matches.covariances)
    with torch.no_grad():
        if initial is None:
            start = _best_start(cost.detached(), places if robust is not None else trusted)
        else:
            R, t = initial[:, :, :3], initial[:, :, 3]
            start = CameraChart(R, (t + (R @ centre[..., None])[..., 0]) / size[:, None])
        least_gap = (ROUNDINGS * torch.maximum(rounding, frame1.rounding)).square().clamp_min(LEAST_GAP)
    minimum = minimise(start, cost, steps, least_gap)
    R, t = minimum.chart.motion(minimum.delta)
    pose = torch.cat([R, t[:, :, None]], dim=2).detach()
    valid = minimum.determined & spread & _is_supported(pose, cost.detached(), frame1.scale)
    t = size[:, None] * t - (R @ centre[..., None])[..., 0]
    return R, t, valid, minimum.converged, minimum.conditioning


def _space_frame(points: Tensor, weights: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre `(B, 3)`, size, whether points spread, and the rounding of their coordinates in that size, `(B,)`."""
    share = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    centre = (share[..., None] * points).sum(1)
    size = (share * (points - centre[:, None]).square().sum(-1)).sum(1).sqrt()
    magnitude = (share * points.square().sum(-1)).sum(1).sqrt()
    spread = size > (64 * eps * magnitude).clamp_min(1.0 / FAR**4)
    size = torch.where(spread, size, 1.0)
    return centre, size, spread, eps * magnitude / size


def _best_start(cost: RobustCost, weights: Tensor) -> CameraChart:
    """The best of several sampled poses, each refined for itself."""
    scale = None if cost.kernel is None else cost.scale
    poses = best_poses(cost.points0, cost.points1, weights, scale, STARTS)
    eye = torch.eye(3, 4, dtype=poses.dtype, device=poses.device)
    flat = torch.where(poses.flatten(2).any(2)[..., None, None], poses, eye).flatten(0, 1)
    many = cost.map(lambda x: x.repeat_interleave(STARTS, 0))
    chart = levenberg_marquardt(CameraChart(flat[:, :, :3], flat[:, :, 3]), many, STEPS_OF_STARTS)
    value = many.cost(chart.at(flat.new_zeros(len(flat), 6))).nan_to_num(nan=float("inf")).view(-1, STARTS)
    best = value.argmin(1) + STARTS * torch.arange(len(value), device=value.device)
    return CameraChart(chart.R[best], chart.t[best])


def _is_supported(pose: Tensor, cost: RobustCost, unit: Tensor) -> Tensor:
    """Pairs `(B,)` with enough places, in front of the camera, and with more support than an accident has."""
    present = (cost.weights > 0).to(cost.weights.dtype)
    depth = (homogeneous(cost.points0) @ pose[:, 2, :, None])[..., 0]
    tiny = torch.full_like(unit, 1e-9)
    distinct = torch.minimum(
        votes(cost.points0, cost.points0, present, tiny).sum(1), votes(cost.points1, cost.points1, present, tiny).sum(1)
    )
    enough = distinct > LEAST_MATCHES - 0.5
    squared = cost.squared(pose).clamp_max(FAR)
    if cost.kernel is None:
        return enough & ((depth > 0) | (present == 0)).all(1)
    agreeing = present * (squared < (3.0 * cost.scale).square()[:, None])
    support = votes(cost.points1, cost.points1, present, 2.0 * cost.scale)
    alarms = log_false_alarms(squared * unit.square()[:, None], support, cost.scale * unit, 2, SAMPLE_SIZE)
    no_accident = alarms + math.log(SOLUTIONS) <= math.log(ACCEPTED_ALARMS)
    untestable = support.sum(1) <= SAMPLE_SIZE + 1e-6
    return enough & ((agreeing * (depth > 0)).sum(1) > 0) & (no_accident | untestable)
