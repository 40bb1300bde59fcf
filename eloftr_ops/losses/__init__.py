# SPDX-License-Identifier: Apache-2.0
"""Losses: per pair, weighted, with explicit reduction; finite for perfect matches and for matches at infinity."""

from eloftr_ops.losses.absolute_pose import absolute_pose_loss
from eloftr_ops.losses.epipolar import sampson_loss, symmetric_epipolar_loss, weak_pose_loss
from eloftr_ops.losses.expected_reward import (
    Candidates,
    agreement_rewards,
    expected_choice_loss,
    expected_reward_loss,
    homography_reward,
    leave_one_out,
    pose_reward,
    support_reward,
)
from eloftr_ops.losses.homography import (
    corner_error_loss,
    cycle_consistency_loss,
    symmetric_transfer_loss,
    weak_homography_loss,
)
from eloftr_ops.losses.matching import MatchingLosses, coarse_focal_loss, window_losses
from eloftr_ops.losses.photometric import photometric_loss
from eloftr_ops.losses.pose import pose_loss, rotation_angle, translation_direction_angle

__all__ = [
    "Candidates",
    "MatchingLosses",
    "absolute_pose_loss",
    "agreement_rewards",
    "coarse_focal_loss",
    "corner_error_loss",
    "cycle_consistency_loss",
    "expected_choice_loss",
    "expected_reward_loss",
    "homography_reward",
    "leave_one_out",
    "photometric_loss",
    "pose_loss",
    "pose_reward",
    "rotation_angle",
    "sampson_loss",
    "support_reward",
    "symmetric_epipolar_loss",
    "symmetric_transfer_loss",
    "translation_direction_angle",
    "weak_homography_loss",
    "weak_pose_loss",
    "window_losses",
]
