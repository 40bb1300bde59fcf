# SPDX-License-Identifier: Apache-2.0
"""A matcher over a data set: expected totals from known errors, frames, failures, the record."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eloftr_ops.data import JsonPairs, PairOptions
from eloftr_ops.evaluation import EvaluationConfig, EvaluationResult, PairResult, evaluate
from eloftr_ops.evaluation.runner import chosen_indexes
from eloftr_ops.io import FileError
from support.two_view import SIZE, planar_scene, project, rotation, scene

WIDTH, HEIGHT = int(SIZE[0]), int(SIZE[1])
HALF = PairOptions(resize=WIDTH // 2, min_overlap=None)


class KnownMatches:
    """Knows the matches of each pair, in pixels of the files; the pair is told by its images' gray level."""

    def __init__(self, *matches: tuple[Tensor, Tensor]) -> None:
        self.matches = matches
        self.seen: list[set[str]] = []

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Tensor]:
        self.seen.append(set(data))
        x0, x1 = self.matches[round(data["image0"].max().item() * 255) - 1]
        scale = data["image0"].shape[-1] / WIDTH
        confidence = torch.linspace(1, 0.5, len(x0))
        return {"keypoints0": x0 * scale, "keypoints1": x1 * scale, "confidence": confidence}


def write_pairs(folder: Path, *labels: dict[str, Any], pixel_centers: float = 0.5) -> Path:
    """Pairs of two equal, even images each; gray level 1 for the first pair, and so on."""
    entries = []
    for number, label in enumerate(labels, start=1):
        name = f"{number}.png"
        Image.new("L", (WIDTH, HEIGHT), number).save(folder / name)
        values = {key: value.tolist() for key, value in label.items()}
        entries.append({"image0": name, "image1": name, **values})
    path = folder / "pairs.json"
    path.write_text(json.dumps({"pixel_centers": pixel_centers, "pairs": entries}))
    return path


def pose_labels(seed: int, **options: Any) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    view = scene(1, 200, seed=seed, **options)
    return (view.keypoints0, view.keypoints1), {"K0": view.K0[0], "K1": view.K1[0], "T_0to1": view.T_0to1[0]}


def test_true_matches_are_perfect_whatever_the_size_they_were_matched_at(tmp_path: Path) -> None:
    matches, label = pose_labels(0)
    plane = planar_scene(1, 200, seed=1)
    path = write_pairs(tmp_path, label, {"H_0to1": plane.H_0to1[0]})
    matcher = KnownMatches(matches, (plane.keypoints0, plane.keypoints1))
    for original in (True, False):
        config = EvaluationConfig(runs=2, original_pixels=original)
        result = evaluate(matcher, JsonPairs(path, options=HALF), config)
        totals = result.totals()
        assert totals["pose"]["auc@5"] > 99.5
        assert totals["homography"]["corner_auc@3"] > 99
        assert totals["homography"]["overlap_auc@1"] > 99
        assert totals["pose"]["precision@0.0001"] == totals["homography"]["precision@1px"] == 100
        assert totals["matches_per_pair"] == 200
        assert result.complete


def test_integer_centres_of_the_labels_are_half_a_pixel_off(tmp_path: Path) -> None:
    """The same numbers, declared to be in the other frame: a doubling then differs by half a pixel in x and y."""
    double = torch.diag(torch.tensor([2.0, 2.0, 1.0]))
    x0 = torch.rand(100, 2, generator=torch.Generator().manual_seed(0)) * 200
    errors = {}
    for centres in (0.5, 0):
        path = write_pairs(tmp_path, {"H_0to1": double}, pixel_centers=centres)
        result = evaluate(KnownMatches((x0, 2 * x0)), JsonPairs(path, options=HALF), EvaluationConfig(runs=1))
        errors[centres] = result.pairs[0].errors["corner"][0]
    assert errors[0.5] < 1e-3
    assert errors[0] == pytest.approx(math.hypot(0.5, 0.5), abs=1e-3)


def test_a_known_rotation_error_gives_the_auc_by_hand(tmp_path: Path) -> None:
    """Matches of a pose that is turned by three degrees.

    Three runs with that error: recall goes straight to (3, 1/3), jumps to 1 there, and stays.
    """
    view = scene(1, 200, seed=2)
    truth = view.T_0to1[0].clone()
    truth[:3, :3] = rotation(torch.tensor([[0.0, 0.0, 3.0]]).double().deg2rad())[0] @ truth[:3, :3]
    path = write_pairs(tmp_path, {"K0": view.K0[0], "K1": view.K1[0], "T_0to1": truth})
    matcher = KnownMatches((view.keypoints0, view.keypoints1))
    result = evaluate(matcher, JsonPairs(path, options=HALF), EvaluationConfig(runs=3))
    assert result.pairs[0].errors["rotation"] == pytest.approx([3.0] * 3, abs=0.02)
    measures = result.totals()["pose"]
    for bound in (5, 10, 20):
        assert measures[f"auc@{bound}"] == pytest.approx(100 * (0.5 + bound - 3) / bound, abs=0.5)


def test_a_known_shift_in_pixels_of_the_files_or_of_the_matched_images(tmp_path: Path) -> None:
    plane = planar_scene(1, 200, seed=3)
    shifted = plane.keypoints1 + torch.tensor([3.0, 4.0])
    path = write_pairs(tmp_path, {"H_0to1": plane.H_0to1[0]})
    pairs = JsonPairs(path, options=HALF)
    for original, expected in ((True, 5.0), (False, 2.5)):
        config = EvaluationConfig(runs=1, original_pixels=original)
        result = evaluate(KnownMatches((plane.keypoints0, shifted)), pairs, config)
        assert result.pairs[0].errors["corner"][0] == pytest.approx(expected, abs=0.01)
        assert result.pairs[0].errors["overlap"][0] == pytest.approx(expected, abs=0.01)
        measures = result.totals()["homography"]
        assert measures["corner_auc@10"] == pytest.approx(100 * (10 - expected / 2) / 10, abs=0.2)
        assert measures["precision@3px"] == (0 if original else 100)


def test_no_match_is_an_infinite_error_and_counts(tmp_path: Path) -> None:
    matches, label = pose_labels(4)
    none = torch.zeros(0, 2)
    plane = {"H_0to1": torch.eye(3)}
    path = write_pairs(tmp_path, label, label, plane)
    result = evaluate(
        KnownMatches(matches, (none, none), (none, none)),
        JsonPairs(path, options=HALF),
        EvaluationConfig(runs=2),
    )
    assert result.pairs[1].errors == {"rotation": [math.inf] * 2, "translation": [math.inf] * 2}
    assert result.pairs[2].errors == {"corner": [math.inf] * 2, "overlap": [math.inf] * 2}
    totals = result.totals()
    assert totals["pose"]["auc@5"] == pytest.approx(50, abs=0.5)
    assert totals["pose"]["precision@0.0001"] == 50
    assert (totals["pose"]["without_model"], totals["homography"]["without_model"]) == (1, 1)
    assert totals["homography"]["corner_auc@10"] == 0
    assert totals["failed"] == 0


def test_broken_pairs_are_counted_listed_and_in_no_average(tmp_path: Path) -> None:
    matches, label = pose_labels(5)
    path = write_pairs(tmp_path, label, label, label)
    (tmp_path / "1.png").write_bytes(b"")
    Image.new("L", (WIDTH, 20), 3).save(tmp_path / "3.png")  # too small for any matcher
    result = evaluate(KnownMatches(matches, matches, matches), JsonPairs(path, options=HALF))
    assert [failure.index for failure in result.failures] == [0, 2]
    assert "1.png" in result.failures[0].reason
    assert "at least 32" in result.failures[1].reason
    assert result.complete
    totals = result.totals()
    assert (totals["evaluated"], totals["failed"]) == (1, 2)
    assert totals["pose"]["auc@5"] > 99
    with pytest.raises(FileError, match=r"1\.png"):
        evaluate(KnownMatches(matches), JsonPairs(path, options=HALF), strict=True)


def test_only_the_most_confident_matches_count(tmp_path: Path) -> None:
    plane = planar_scene(1, 100, seed=6)
    wrong = plane.keypoints1.clone()
    wrong[50:] += 40  # the less confident half
    path = write_pairs(tmp_path, {"H_0to1": plane.H_0to1[0]})
    pairs = JsonPairs(path, options=HALF)
    for most, share in ((None, 50), (50, 100)):
        config = EvaluationConfig(runs=1, max_matches=most)
        totals = evaluate(KnownMatches((plane.keypoints0, wrong)), pairs, config).totals()
        assert totals["homography"]["precision@3px"] == share


def test_masked_images_come_with_their_masks(tmp_path: Path) -> None:
    matches, label = pose_labels(7)
    path = write_pairs(tmp_path, label)
    transparent = np.full((HEIGHT, WIDTH, 2), (1, 255), dtype=np.uint8)
    transparent[: HEIGHT // 2, :, 1] = 0
    matcher = KnownMatches(matches)
    evaluate(matcher, JsonPairs(path, options=HALF), EvaluationConfig(runs=1))
    Image.fromarray(transparent, "LA").save(tmp_path / "1.png")
    evaluate(matcher, JsonPairs(path, options=HALF), EvaluationConfig(runs=1))
    assert matcher.seen[0] == {"image0", "image1"}
    assert matcher.seen[-1] == {"image0", "image1", "mask0", "mask1"}


def test_a_limit_spreads_over_the_data_set(tmp_path: Path) -> None:
    assert chosen_indexes(10, 3) == [0, 4, 9]
    assert chosen_indexes(3, 3) == chosen_indexes(3, 9) == chosen_indexes(3, None) == [0, 1, 2]
    with pytest.raises(ValueError, match="limit"):
        chosen_indexes(3, 0)
    matches, label = pose_labels(8)
    pairs = JsonPairs(write_pairs(tmp_path, *[label] * 5), options=HALF)
    result = evaluate(KnownMatches(*[matches] * 5), pairs, EvaluationConfig(runs=1), limit=2)
    assert [pair.index for pair in result.pairs] == [0, 4]
    assert (result.available, result.chosen) == (5, 2)


def test_keypoints_that_are_no_numbers_are_a_defect(tmp_path: Path) -> None:
    matches, label = pose_labels(9)
    pairs = JsonPairs(write_pairs(tmp_path, label), options=HALF)
    with pytest.raises(ValueError, match=r"NaN or infinity at .*1\.png"):
        evaluate(KnownMatches((matches[0] * math.nan, matches[1])), pairs)


@pytest.mark.parametrize(
    "setting",
    [
        {"estimator": "lmeds"},
        {"runs": 0},
        {"pose_threshold": 0.0},
        {"homography_threshold": math.inf},
        {"epipolar_threshold": math.nan},
        {"max_matches": 0},
    ],
)
def test_bad_settings_are_named(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        EvaluationConfig(**setting)


def test_the_record_is_strict_json_with_everything(tmp_path: Path) -> None:
    _, label = pose_labels(10)
    path = write_pairs(tmp_path, label, label)
    (tmp_path / "2.png").unlink()
    none = torch.zeros(0, 2)
    result = evaluate(KnownMatches((none, none)), JsonPairs(path, options=HALF), EvaluationConfig(runs=2))
    result.write(tmp_path / "results.json", {"dataset": "json"})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert set(record) == {
        "format", "version", "versions", "complete", "run", "configuration", "totals", "pairs", "failures"
    }  # fmt: skip
    assert record["format"] == "eloftr-ops evaluation 1"
    assert set(record["versions"]) == {"python", "torch", "kornia", "numpy", "opencv"}
    assert record["run"] == {"dataset": "json"}
    assert record["configuration"]["runs"] == 2
    assert record["complete"] is True
    (pair,) = record["pairs"]
    assert set(pair) == {"index", "name", "kind", "matches", "seconds", "precision", "errors"}
    assert pair["errors"]["rotation"] == [None, None]  # infinite
    assert [failure["index"] for failure in record["failures"]] == [1]
    assert record["totals"]["pose"]["auc@5"] == 0


def test_totals_of_nothing_are_not_numbers() -> None:
    result = EvaluationResult(EvaluationConfig(), 3, 2, [], [])
    assert not result.complete
    assert math.isnan(result.totals()["matches_per_pair"])
    assert "pose" not in result.totals()
    assert result.record()["totals"]["seconds_per_pair"] is None


def test_runs_are_pooled_and_not_averaged() -> None:
    """One pair, one run good and one failed: half of the recall, not an infinite mean."""
    pair = PairResult(
        0, "a, b", "pose", 9, 0.1, {"0.0001": 0.5}, {"rotation": [0.0, math.inf], "translation": [0.0] * 2}
    )
    measures = EvaluationResult(EvaluationConfig(runs=2), 1, 1, [pair], []).totals()["pose"]
    assert measures["auc@5"] == pytest.approx(50)
    assert measures["without_model"] == 0


def test_precision_ignores_the_robust_estimator(tmp_path: Path) -> None:
    plane = planar_scene(1, 100, seed=11, wrong=0.3)
    pairs = JsonPairs(write_pairs(tmp_path, {"H_0to1": plane.H_0to1[0]}), options=HALF)
    shares = [
        evaluate(
            KnownMatches((plane.keypoints0, plane.keypoints1)),
            pairs,
            EvaluationConfig(estimator=name, runs=1),
        )
        .pairs[0]
        .precision["3px"]
        for name in ("magsac", "ransac", "project")
    ]
    truth = project(plane.H_0to1[0][None], plane.keypoints0[None])[0]
    expected = float(((truth - plane.keypoints1).norm(dim=1) < 3).double().mean())
    assert shares == pytest.approx([expected] * 3)
