# SPDX-License-Identifier: Apache-2.0
"""Two-view geometry from matches: batched, weighted, robust, differentiable.

An ill-posed pair is flagged (`valid=False`) and gets zero gradient. It never raises an error, and never changes the
other pairs of its batch.
"""

from eloftr_ops.geometry.absolute_pose import AbsolutePoseEstimate, absolute_pose_from_matches, points_from_depth
from eloftr_ops.geometry.consensus import ConsensusEstimate, estimate_robust
from eloftr_ops.geometry.frames import from_integer_centers, to_integer_centers
from eloftr_ops.geometry.fundamental import (
    FundamentalEstimate,
    fundamental_from_matches,
    fundamental_from_pose,
)
from eloftr_ops.geometry.homography import HomographyEstimate, apply_homography, homography_from_matches
from eloftr_ops.geometry.hypotheses import ConsensusHypotheses, consensus_from_matches
from eloftr_ops.geometry.planar import PlanarEstimate, affine_from_matches, similarity_from_matches
from eloftr_ops.geometry.pose import (
    EssentialEstimate,
    PoseEstimate,
    essential_from_matches,
    relative_pose_from_matches,
)
from eloftr_ops.geometry.residuals import (
    epipolar_residuals,
    sampson_residuals,
    symmetric_transfer_residuals,
    transfer_residuals,
)

__all__ = [
    "AbsolutePoseEstimate",
    "ConsensusEstimate",
    "ConsensusHypotheses",
    "EssentialEstimate",
    "FundamentalEstimate",
    "HomographyEstimate",
    "PlanarEstimate",
    "PoseEstimate",
    "absolute_pose_from_matches",
    "affine_from_matches",
    "apply_homography",
    "consensus_from_matches",
    "epipolar_residuals",
    "essential_from_matches",
    "estimate_robust",
    "from_integer_centers",
    "fundamental_from_matches",
    "fundamental_from_pose",
    "homography_from_matches",
    "points_from_depth",
    "relative_pose_from_matches",
    "sampson_residuals",
    "similarity_from_matches",
    "symmetric_transfer_residuals",
    "to_integer_centers",
    "transfer_residuals",
]
