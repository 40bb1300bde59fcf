# SPDX-License-Identifier: Apache-2.0
"""The picture shows the matches it was given, in the keypoints' frame, and touches no global state."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from eloftr_ops.io import FileError
from eloftr_ops.visualization import draw_matches

IMAGE0, IMAGE1 = torch.rand(1, 1, 48, 64), torch.rand(1, 1, 32, 40)


def some_matches(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    keypoints0 = torch.rand(count, 2, generator=generator) * torch.tensor([64.0, 48.0])
    keypoints1 = torch.rand(count, 2, generator=generator) * torch.tensor([40.0, 32.0])
    return keypoints0, keypoints1, torch.rand(count, generator=generator)


def lines(figure: Figure) -> tuple[LineCollection, LineCollection]:
    """Outliers and inliers."""
    below, above = (part for part in figure.axes[0].collections if isinstance(part, LineCollection))
    return below, above


def test_lines_join_the_keypoints_where_the_images_lie() -> None:
    keypoints0, keypoints1, confidence = some_matches(5)
    figure = draw_matches(IMAGE0, IMAGE1, keypoints0, keypoints1, confidence)
    left0, right0, bottom0, top0 = figure.axes[0].images[0].get_extent()
    left1, right1, bottom1, top1 = figure.axes[0].images[1].get_extent()
    # One unit is one pixel of either image, and an image's corner is (0, 0), not (-0.5, -0.5).
    assert (right0 - left0, bottom0 - top0) == (64, 48)
    assert (right1 - left1, bottom1 - top1) == (40, 32)
    assert left1 > right0
    segments = np.array(lines(figure)[1].get_segments())
    order = confidence.argsort().numpy()  # the most confident on top
    np.testing.assert_allclose(segments[:, 0], keypoints0.numpy()[order] + [left0, top0], rtol=1e-6)
    np.testing.assert_allclose(segments[:, 1], keypoints1.numpy()[order] + [left1, top1], rtol=1e-6)


def test_outliers_are_red_thin_and_below() -> None:
    keypoints0, keypoints1, confidence = some_matches(10)
    inliers = torch.arange(10) < 7
    bad, good = lines(draw_matches(IMAGE0, IMAGE1, keypoints0, keypoints1, confidence, inliers))
    assert (len(bad.get_segments()), len(good.get_segments())) == (3, 7)
    red, green, blue = to_rgb(bad.get_colors()[0][:3])
    assert red > 0.9
    assert max(green, blue) < 0.3
    assert bad.get_linewidths()[0] < good.get_linewidths()[0]


def test_colours_follow_confidence_on_one_scale() -> None:
    keypoints0, keypoints1, _ = some_matches(3)
    figures = [
        draw_matches(IMAGE0, IMAGE1, keypoints0, keypoints1, torch.tensor(c)) for c in ([0.2, 0.5, 1.0], [0.5] * 3)
    ]
    first, second = (lines(figure)[1].get_colors() for figure in figures)
    np.testing.assert_array_equal(first[1], second[0])  # 0.5 looks the same in both pictures
    assert len({tuple(color) for color in first}) == 3


def test_raw_scores_take_the_whole_scale() -> None:
    keypoints0, keypoints1, _ = some_matches(3)
    figure = draw_matches(IMAGE0, IMAGE1, keypoints0, keypoints1, torch.tensor([25.0, 30.0, 99.0]))
    (bar,) = figure.axes[0].child_axes
    assert bar.get_ylim() == (25.0, 99.0)


@pytest.mark.parametrize(("limit", "drawn"), [(4, 4), (0, 0), (None, 500), (10_000, 500)])
def test_at_most_max_matches_are_drawn_and_all_are_counted(limit: int | None, drawn: int) -> None:
    figure = draw_matches(IMAGE0, IMAGE1, *some_matches(500), max_matches=limit)
    assert len(lines(figure)[1].get_segments()) == drawn
    assert "500 matches" in figure.axes[0].get_title(loc="left")
    points = [part for part in figure.axes[0].collections if isinstance(part, PathCollection)]
    assert sum(len(part.get_offsets()) for part in points) == 2 * drawn


def test_those_drawn_are_spread_over_the_confidences() -> None:
    keypoints0, keypoints1, confidence = some_matches(500)
    good = confidence > 0.5
    figure = draw_matches(IMAGE0, IMAGE1, keypoints0, keypoints1, confidence, good, max_matches=100)
    share = len(lines(figure)[1].get_segments()) / 100
    assert abs(share - float(good.float().mean())) <= 0.01  # every fifth in order: at most one off


@pytest.mark.parametrize("count", [0, 1])
def test_few_matches(tmp_path: Path, count: int) -> None:
    path = tmp_path / "out.png"
    figure = draw_matches(IMAGE0, IMAGE1, *some_matches(count), torch.ones(count, dtype=torch.bool), path=path)
    assert figure.axes[0].get_title(loc="left").startswith(("no match", "1 match "))
    with Image.open(path) as picture:
        assert picture.size[0] > 1000


@pytest.mark.parametrize(
    "image",
    [
        torch.rand(1, 3, 48, 64),
        torch.rand(1, 48, 64, dtype=torch.bfloat16),
        torch.rand(48, 64, requires_grad=True),
        np.random.default_rng(0).random((48, 64)),
        np.zeros((48, 64, 3), dtype=np.uint8),
        np.zeros((48, 64, 1), dtype=np.float16),
    ],
    ids=["rgb batch", "gray bfloat16", "requires grad", "array", "uint8 rgb", "one channel"],
)
def test_images_of_each_kind(image: torch.Tensor | np.ndarray) -> None:
    figure = draw_matches(image, IMAGE1, np.ones((2, 2)), torch.ones(2, 2, requires_grad=True))
    assert figure.axes[0].images[0].get_extent()[1] == 64
    assert figure.axes[0].images[0].get_array().max() <= 1


@pytest.mark.parametrize("name", ["out.png", "out.JPG", "out.svg", "out.pdf", "out.webp"])
def test_file_formats(tmp_path: Path, name: str) -> None:
    draw_matches(IMAGE0, IMAGE1, *some_matches(3), path=tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).stat().st_size > 0


def test_given_axes_are_drawn_into() -> None:
    figure = Figure()
    first, second = figure.subplots(1, 2)
    assert draw_matches(IMAGE0, IMAGE1, *some_matches(3), ax=second) is figure
    assert len(second.images) == 2
    assert not first.images


def test_no_global_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it raises
    before = matplotlib.rcParams.copy()
    draw_matches(IMAGE0, IMAGE1, *some_matches(3), path=tmp_path / "out.png")
    assert matplotlib.rcParams.copy() == before


def test_a_failed_drawing_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("interrupted")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        draw_matches(IMAGE0, IMAGE1, *some_matches(3), path=tmp_path / "out.png")
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_named(tmp_path: Path) -> None:
    keypoints0, keypoints1, confidence = some_matches(3)
    with pytest.raises(ValueError, match="image1: expected one gray or RGB image"):
        draw_matches(IMAGE0, torch.rand(2, 1, 32, 32), keypoints0, keypoints1)
    with pytest.raises(ValueError, match="image0: expected one gray or RGB image"):
        draw_matches(torch.rand(4, 32, 32), IMAGE1, keypoints0, keypoints1)
    with pytest.raises(ValueError, match=r"keypoints0: expected shape \(M, 2\), got \(3, 3\)"):
        draw_matches(IMAGE0, IMAGE1, torch.ones(3, 3), keypoints1)
    with pytest.raises(ValueError, match=r"keypoints1: expected shape .*got \(2, 2\)"):
        draw_matches(IMAGE0, IMAGE1, keypoints0, keypoints1[:2])
    with pytest.raises(ValueError, match="confidence: expected one value per match"):
        draw_matches(IMAGE0, IMAGE1, keypoints0, keypoints1, confidence[:2])
    with pytest.raises(ValueError, match="inliers: expected one value per match"):
        draw_matches(IMAGE0, IMAGE1, keypoints0, keypoints1, confidence, confidence[:2] > 0)
    with pytest.raises(ValueError, match="max_matches: expected 0 or more"):
        draw_matches(IMAGE0, IMAGE1, keypoints0, keypoints1, max_matches=-1)
    with pytest.raises(FileError, match=r"got \.txt"):
        draw_matches(IMAGE0, IMAGE1, keypoints0, keypoints1, path=tmp_path / "out.txt")
