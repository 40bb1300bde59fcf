# SPDX-License-Identifier: Apache-2.0
"""The files of docs/examples run, and give what they promise."""

import importlib.util
from pathlib import Path
from types import ModuleType

import kornia.geometry
import torch

from eloftr_ops.data import procedural_textures
from eloftr_ops.data.scenes import ScenePairs
from eloftr_ops.io import demo_pair
from eloftr_ops.losses import rotation_angle

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested_and_shown_in_the_docs() -> None:
    tested = Path(__file__).read_text()
    page = (EXAMPLES.parent / "examples.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'_example("{path.stem}")' in tested
        assert f'--8<-- "docs/examples/{path.name}:2:"' in page


def test_the_panorama_is_wider_than_its_images() -> None:
    """Two overlapping parts of one image: the panorama is as wide as both together."""
    image = demo_pair()[0][..., :256, :416].expand(1, 3, -1, -1)
    left, right = image[..., :320], image[..., 96:]
    panorama = _example("stitch").stitch(left, right)
    assert panorama.shape[2] == 256
    assert abs(panorama.shape[3] - 416) <= 2
    shown = panorama[..., :400]
    assert (shown - image[..., :400]).abs().mean() < 0.02


def test_the_tracker_follows_a_moved_target() -> None:
    target = demo_pair()[0][..., :256, :320]
    moved = kornia.geometry.warp_affine(target, torch.tensor([[[1.0, 0.0, 24.0], [0.0, 1.0, 12.0]]]), target.shape[-2:])
    (found,) = _example("track").track(target, [moved])
    torch.testing.assert_close(found[:2, 2], torch.tensor([24.0, 12.0]), atol=0.5, rtol=0)


def test_the_pose_of_a_rendered_scene_is_close_to_the_truth() -> None:
    generator = torch.Generator().manual_seed(1)
    scene = ScenePairs(procedural_textures(generator, 8, 512))(1, (384, 512), generator)
    R, t, inliers = _example("pose").relative_pose(scene.image0, scene.image1, scene.K0[0], scene.K1[0])
    assert inliers >= 30
    error = rotation_angle(R[None], scene.T_0to1[:, :3, :3].to(R)).rad2deg()
    assert error < 5  # 2.2 degrees here; the true rotation is larger than that
    assert rotation_angle(torch.eye(3)[None].to(R), scene.T_0to1[:, :3, :3].to(R)).rad2deg() > 5
    torch.testing.assert_close(t.norm(), torch.ones_like(t.norm()))


def test_training_through_the_homography_lowers_its_error() -> None:
    losses = _example("train_through_homography").tune(steps=4, size=128)
    assert min(losses[1:]) < losses[0]
