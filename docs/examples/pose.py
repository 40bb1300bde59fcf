# SPDX-License-Identifier: Apache-2.0
"""Relative pose of two views of a scene, and its error."""

import torch

from eloftr_ops import EfficientLoFTR
from eloftr_ops.data import procedural_textures
from eloftr_ops.data.scenes import ScenePairs
from eloftr_ops.geometry import estimate_robust, relative_pose_from_matches
from eloftr_ops.losses import rotation_angle, translation_direction_angle


def relative_pose(
    image0: torch.Tensor, image1: torch.Tensor, K0: torch.Tensor, K1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Rotation (3, 3), direction of the translation (3,), and the number of inliers; gray (1, 1, H, W), K (3, 3)."""
    matcher = EfficientLoFTR.from_pretrained("small").optimize_for_inference()
    with torch.inference_mode():
        out = matcher({"image0": image0, "image1": image1})
    matches = (out["keypoints0"], out["keypoints1"])
    cameras = {"K0": K0[None], "K1": K1[None]}
    robust = estimate_robust(*matches, out["batch_indexes"], batch_size=1, model="essential", **cameras)
    kept = robust.inliers
    estimate = relative_pose_from_matches(
        matches[0][kept],
        matches[1][kept],
        K0[None],
        K1[None],
        out["batch_indexes"][kept],
        weights=out["confidence"][kept],
        robust="cauchy",
    )
    return estimate.rotation_0to1[0], estimate.T_0to1[0, :3, 3], int(kept.sum())


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(1)
    scene = ScenePairs(procedural_textures(generator, 8, 512))(1, (384, 512), generator)
    R, t, inliers = relative_pose(scene.image0, scene.image1, scene.K0[0], scene.K1[0])
    true = scene.T_0to1[0].to(R)
    angles = (
        rotation_angle(R[None], true[None, :3, :3]),
        translation_direction_angle(t[None], true[None, :3, 3]),
    )
    print(f"{inliers} inliers, errors of", [round(float(a.rad2deg()), 2) for a in angles], "degrees")
