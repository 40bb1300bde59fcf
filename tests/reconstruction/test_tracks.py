# SPDX-License-Identifier: Apache-2.0
"""Tracks from matches whose points differ from pair to pair, of a scene that is known."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from eloftr_ops.errors import ArgumentError
from eloftr_ops.reconstruction.adjustment import Constraints, adjust_keypoints, constraint_errors
from eloftr_ops.reconstruction.anchors import find_anchors, nearest_anchor
from eloftr_ops.reconstruction.field import sample_field
from eloftr_ops.reconstruction.journal import PairMatches
from eloftr_ops.reconstruction.quantisation import quantised_tracks
from eloftr_ops.reconstruction.tracks import TrackConfig, Tracks, build_tracks, components
from support.photographs import Photographs, photographs

RNG = np.random.default_rng(0)


SIZE_WH = (128, 96)
MANY = {"noise": 0.5, "wrong": 0.1}


@pytest.fixture(scope="module")
def scene() -> Photographs:
    return photographs(4, SIZE_WH)


@pytest.fixture(scope="module")
def exact(scene: Photographs) -> Tracks:
    return build_tracks(scene.matches(), 128)


@pytest.fixture(scope="module")
def noisy(scene: Photographs) -> Tracks:
    return build_tracks(scene.matches(**MANY), 128)


def errors(scene: Photographs, tracks: Tracks) -> npt.NDArray[np.float64]:
    """How far matched keypoints are from each other by the true geometry, where both see the point; pixels."""
    found = []
    for pair, rows in tracks.pairs.items():
        i, j = (tracks.names.index(name) for name in pair)
        points0, points1 = tracks.keypoints[i][rows[:, 0]], tracks.keypoints[j][rows[:, 1]]
        true, seen = scene.partners(i, j, torch.from_numpy(points0).double())
        found.append(np.linalg.norm(true.numpy() - points1, axis=1)[seen.numpy()])
    return np.concatenate(found)


def test_tracks_of_exact_matches_are_exact_and_long(scene: Photographs, exact: Tracks) -> None:
    rounded = quantised_tracks(scene.matches(), 128)
    # What is left is perspective within the reach of 6 px, and edges of panels.
    assert np.median(errors(scene, exact)) < 0.1
    # Rounding moves both ends by up to half a pixel per axis: about 0.38 px each in the mean.
    assert np.median(errors(scene, rounded)) > 0.5
    assert exact.report.mean_length > 3.4 > 2.6 > rounded.report.mean_length


def test_noise_is_averaged_and_wrong_matches_are_left_out(scene: Photographs, noisy: Tracks) -> None:
    """0.5 px of noise per axis are 0.59 px in the median; with about ten matches around a place it must be less."""
    found = errors(scene, noisy)
    assert np.median(found) < 0.45
    wrong = (errors(scene, quantised_tracks(scene.matches(**MANY), 128)) > 3).mean()
    assert (found > 3).mean() < 0.6 * wrong
    assert noisy.report.broken > 0


def test_a_track_has_one_point_per_image(noisy: Tracks) -> None:
    for numbers, keypoints in zip(noisy.track, noisy.keypoints, strict=True):
        assert len(np.unique(numbers)) == len(numbers) == len(keypoints)
    for (first, second), rows in noisy.pairs.items():
        i, j = noisy.names.index(first), noisy.names.index(second)
        np.testing.assert_array_equal(noisy.track[i][rows[:, 0]], noisy.track[j][rows[:, 1]])
    lengths = np.bincount(np.concatenate(noisy.track))
    assert lengths[lengths > 0].min() >= 2
    assert lengths[lengths > 0].mean() == pytest.approx(noisy.report.mean_length)


def test_the_order_of_a_pair_does_not_matter_much(scene: Photographs, exact: Tracks) -> None:
    swapped = [
        PairMatches(found.pair[::-1], found.keypoints1, found.keypoints0, found.confidence, SIZE_WH, SIZE_WH)
        for found in scene.matches()
    ]
    back = build_tracks(swapped, 128)
    assert back.report.tracks == pytest.approx(exact.report.tracks, rel=0.03)
    assert np.median(errors(scene, back)) < 0.1


def test_larger_originals_have_larger_keypoints(scene: Photographs, exact: Tracks) -> None:
    """The same matches of images of twice the size: the same tracks in pixels that are twice as many."""
    large = [
        found._replace(
            keypoints0=2 * found.keypoints0,
            keypoints1=2 * found.keypoints1,
            size0_wh=(256, 192),
            size1_wh=(256, 192),
        )
        for found in scene.matches()
    ]
    tracks = build_tracks(large, 128)
    assert tracks.report == exact.report
    np.testing.assert_array_equal(tracks.keypoints[2], 2 * exact.keypoints[2])


def test_most_matches_that_lead_anywhere_are_left_out() -> None:
    """As of images with nothing in common: a geometry that fits best explains a tenth of them by chance."""
    points0, points1 = RNG.uniform(10, 300, (2, 150, 2)).astype(np.float32)
    pair = PairMatches(("a", "b"), points0, points1, np.full(150, 0.3, np.float32), (320, 320), (320, 320))
    assert build_tracks([pair]).report.tracks < 25
    assert build_tracks([pair], config=TrackConfig(verification=None)).report.tracks > 50


def test_no_matches_give_no_keypoints() -> None:
    none = np.zeros((0, 2), np.float32)
    empty = PairMatches(("a", "b"), none, none, none[:, 0], (9, 9), (9, 9))
    for tracks in (build_tracks([empty]), quantised_tracks([empty]), build_tracks([])):
        assert tracks.report.tracks == 0
        assert all(len(keypoints) == 0 for keypoints in tracks.keypoints)
    assert build_tracks([empty]).pairs[("a", "b")].shape == (0, 2)


def test_one_match_is_a_track() -> None:
    point = np.array([[5.5, 6.5]], np.float32)
    one = PairMatches(("a", "b"), point, point + 3, np.ones(1, np.float32), (99, 99), (99, 99))
    tracks = build_tracks([one])
    np.testing.assert_allclose(tracks.keypoints[0], point, atol=1e-5)
    np.testing.assert_allclose(tracks.keypoints[1], point + 3, atol=1e-5)


def test_rounding_is_hlocs() -> None:
    """Two points of a cell become one; it lies in the square with most confidence, at a whole multiple."""
    points0 = np.array([[8.2, 8.1], [9.9, 10.2], [7.8, 7.7], [40.0, 40.0]], np.float32)
    confidence = np.array([0.9, 0.5, 0.3, 0.8], np.float32)
    points1 = points0 + 100
    pair = PairMatches(("a", "b"), points0, points1, confidence, (200, 200), (200, 200))
    tracks = quantised_tracks([pair], 0, cell_size=8, max_error=2)
    np.testing.assert_array_equal(tracks.keypoints[0], [[8, 8], [40, 40]])
    # 108.2 and 107.8 are in one cell of image 1, 109.9 in the next: of the three that share a point, the surest stays.
    assert len(tracks.pairs[("a", "b")]) == 2
    with pytest.raises(ArgumentError, match="cell_size"):
        quantised_tracks([pair], cell_size=1, max_error=2)


def test_a_field_is_exact_for_an_affine_map() -> None:
    A, b = np.array([[1.2, 0.3], [-0.2, 0.9]]), np.array([5.0, -3.0])
    points = RNG.uniform(0, 100, (400, 2))
    places = RNG.uniform(10, 90, (50, 2))
    field = sample_field(points, points @ A.T + b, np.ones(400), places, 12.0)
    assert (field.weight > 0).all()
    # The pull to the identity is 0.1 px^2 beside at least 10 px^2 of spread: 1 % of the deviation from it, 0.3.
    np.testing.assert_allclose(field.jacobian, np.broadcast_to(A, (50, 2, 2)), atol=0.01)
    # The mean of the neighbours lies within about 5 px.
    np.testing.assert_allclose(field.target, places @ A.T + b, atol=0.05)


def test_a_field_does_not_mix_the_two_sides_of_an_edge() -> None:
    y, x = np.mgrid[4:100:8, 4:100:8].reshape(2, -1).astype(float)
    points = np.stack([x, y], 1)
    targets = points + np.where(x < 50, 0.0, 20.0)[:, None] * [1, 0]
    field = sample_field(points, targets, np.ones(len(points)), np.array([[45.0, 50], [54, 50], [300, 50]]), 6.0)
    np.testing.assert_allclose(field.target[:2], [[45, 50], [74, 50]], atol=0.3)
    assert field.weight[2] == 0  # no match is near


def test_anchors_cover_all_points() -> None:
    points = RNG.uniform(0, 60, (500, 2))
    anchors = find_anchors(points, RNG.uniform(0.2, 1, 500), 4.0)
    assert (nearest_anchor(anchors, points, 4.0) >= 0).all()
    assert len(anchors) < 200
    brute = np.linalg.norm(points[:, None] - anchors, axis=2)
    assert (nearest_anchor(anchors, points, 4.0) == brute.argmin(1)).all()
    assert (nearest_anchor(anchors, points + 1000, 4.0) == -1).all()
    assert len(find_anchors(points[:0], points[:0, 0], 4.0)) == 0


def test_adjustment_solves_the_least_squares_problem() -> None:
    """Against the dense normal equations, without wrong matches: weights of Cauchy are 1 at zero error."""
    keypoints = RNG.uniform(0, 50, (4, 2))
    first, second = np.array([0, 1, 2, 0]), np.array([1, 2, 3, 3])
    jacobian = np.eye(2) + RNG.uniform(-0.3, 0.3, (4, 2, 2))
    # A chain, and a tie from its ends that agrees with it: a solution without error exists.
    point0 = keypoints[first] + RNG.uniform(-2, 2, (4, 2))
    chain = jacobian[2] @ jacobian[1] @ jacobian[0]
    jacobian[3] = chain
    point1 = np.zeros((4, 2))
    true = [keypoints[0]]
    for k in range(3):
        point1[k] = keypoints[second[k]] + RNG.uniform(-0.5, 0.5, 2)
        true.append(point1[k] + jacobian[k] @ (true[-1] - point0[k]))
    point1[3] = true[3] - chain @ (true[0] - point0[3])
    ties = Constraints(first, second, point0, point1, jacobian, np.full(4, 50.0))
    found = adjust_keypoints(ties, keypoints)
    assert np.abs(constraint_errors(ties, found)).max() < 5e-3
    assert np.abs(constraint_errors(ties, keypoints)).max() > 0.1


def test_components_are_those_of_the_graph() -> None:
    edges = np.array([[0, 1], [3, 2], [2, 4], [6, 5]])
    np.testing.assert_array_equal(components(edges, 8), [0, 0, 2, 2, 2, 5, 5, 7])
