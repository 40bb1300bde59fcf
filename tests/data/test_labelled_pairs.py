# SPDX-License-Identifier: Apache-2.0
"""What all loaders share: sizes, padding, overlap, unusable pairs, batches."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from kornia.geometry.linalg import transform_points
from torch.utils.data import DataLoader

from eloftr_ops.data.labelled import (
    ImagePair,
    LabelledPairs,
    PairOptions,
    View,
    assemble,
    collate_pairs,
    pair_overlap,
)
from eloftr_ops.data.scene_geometry import reproject
from eloftr_ops.io import FileError
from support.pair_files import Truth, rendered, save_image


class Numbered(LabelledPairs):
    """Ten pairs of flat images, of which some are broken."""

    def __init__(self, broken: set[int], options: PairOptions | None = None) -> None:
        super().__init__(options)
        self._broken = broken

    def __len__(self) -> int:
        return 10

    def load(self, index: int) -> ImagePair:
        if index in self._broken:
            raise FileError(f"pair{index}.png: broken")
        image, mask = torch.full((1, 4, 4), index / 10), torch.ones(4, 4, dtype=torch.bool)
        return ImagePair(image, image, mask, mask, torch.ones(2), torch.ones(2), f"pair{index}")


def views(folder: Path, truth: Truth, *, depth: bool = True) -> tuple[View, View]:
    """The files of a rendered pair."""
    both = []
    for side in (0, 1):
        path = folder / f"{side}.png"
        save_image(path, truth.images[side])
        both.append(View(path, truth.K[side].double().numpy(), truth.depths[side].numpy() if depth else None))
    return both[0], both[1]


def test_labels_follow_a_resize(tmp_path: Path) -> None:
    truth = rendered(size_hw=(96, 128))
    T = truth.T_0to1.double().numpy()
    full = assemble(*views(tmp_path, truth), PairOptions(), T_0to1=T)
    half = assemble(*views(tmp_path, truth), PairOptions(resize=64), T_0to1=T)
    assert half.image0.shape == (1, 48, 64)
    assert half.depth0 is not None
    assert half.depth0.shape == (48, 64)
    torch.testing.assert_close(half.scale0, torch.tensor([2.0, 2.0]))
    points = torch.rand(1, 20, 2) * torch.tensor([128.0, 96.0])
    depth = torch.rand(1, 20) + 3
    moved, _ = reproject(points, depth, full.K0[None], full.K1[None], full.T_0to1[None])
    moved_half, _ = reproject(points / 2, depth, half.K0[None], half.K1[None], half.T_0to1[None])
    torch.testing.assert_close(moved_half * 2, moved, atol=1e-3, rtol=1e-5)


def test_depth_is_taken_from_the_nearest_pixel(tmp_path: Path) -> None:
    truth = rendered(size_hw=(96, 128))
    half = assemble(*views(tmp_path, truth), PairOptions(resize=64), T_0to1=truth.T_0to1.double().numpy())
    # The centre of the reduced pixel (x, y) is the corner between four: the lower right one is taken.
    torch.testing.assert_close(half.depth0, truth.depths[0][1::2, 1::2])


def test_homography_follows_a_resize(tmp_path: Path) -> None:
    save_image(tmp_path / "0.png", torch.rand(60, 80))
    save_image(tmp_path / "1.png", torch.rand(40, 100))
    H = np.array([[1.1, 0.1, 3.0], [0.0, 0.7, 2.0], [1e-4, 0.0, 1.0]])
    both = (View(tmp_path / "0.png"), View(tmp_path / "1.png"))
    pair = assemble(*both, PairOptions(resize=50), H_0to1=H)
    points = torch.rand(1, 20, 2) * 30
    moved = transform_points(torch.from_numpy(H)[None].float(), points)
    assert pair.H_0to1 is not None
    scaled = transform_points(pair.H_0to1[None], points / pair.scale0)
    torch.testing.assert_close(scaled * pair.scale1, moved, atol=1e-3, rtol=1e-5)


def test_shorter_side(tmp_path: Path) -> None:
    save_image(tmp_path / "0.png", torch.rand(60, 80))
    both = (View(tmp_path / "0.png"), View(tmp_path / "0.png"))
    pair = assemble(*both, PairOptions(resize=30, shorter_side=True))
    assert pair.image0.shape == (1, 30, 40)
    assert assemble(*both, PairOptions(resize=90, shorter_side=True)).image0.shape == (1, 60, 80)


def test_padding_is_masked_and_moves_nothing(tmp_path: Path) -> None:
    truth = rendered()
    T = truth.T_0to1.double().numpy()
    plain = assemble(*views(tmp_path, truth), PairOptions(), T_0to1=T)
    padded = assemble(*views(tmp_path, truth), PairOptions(pad_to=(64, 80)), T_0to1=T)
    assert padded.image0.shape == (1, 64, 80)
    assert padded.mask0[:48, :64].all()
    assert padded.mask0.sum() == 48 * 64
    torch.testing.assert_close(padded.image0[:, :48, :64], plain.image0)
    torch.testing.assert_close(padded.depth1[:48, :64], plain.depth1)
    assert (padded.depth1[48:] == 0).all()
    torch.testing.assert_close(padded.K0, plain.K0)
    with pytest.raises(FileError, match=r"0\.png.*pad_to"):
        assemble(*views(tmp_path, truth), PairOptions(pad_to=(32, 80)), T_0to1=T)


def test_overlap_from_depth_and_from_a_homography(tmp_path: Path) -> None:
    truth = rendered()
    pair = assemble(*views(tmp_path, truth), PairOptions(), T_0to1=truth.T_0to1.double().numpy())
    shares = pair_overlap(pair)
    assert shares is not None
    assert 0.4 < min(shares) <= max(shares) <= 1
    assert pair_overlap(pair._replace(depth0=None)) is None
    shift = torch.eye(3)
    shift[0, 2] = 16.0
    flat = pair._replace(H_0to1=shift)
    assert pair_overlap(flat) == pytest.approx((0.75, 0.75))
    same = pair._replace(T_0to1=torch.eye(4), depth1=pair.depth0, K1=pair.K0)
    assert pair_overlap(same) == pytest.approx((1.0, 1.0))


def test_a_pair_without_overlap_is_refused(tmp_path: Path) -> None:
    truth = rendered()
    away = truth.T_0to1.double().numpy().copy()
    away[0, 3] += 100.0
    with pytest.raises(FileError, match=r"0\.png.*overlap by 0\.000"):
        assemble(*views(tmp_path, truth), PairOptions(), T_0to1=away)
    assert assemble(*views(tmp_path, truth), PairOptions(min_overlap=None), T_0to1=away).T_0to1 is not None
    # Without depth nobody can tell.
    assert assemble(*views(tmp_path, truth, depth=False), PairOptions(), T_0to1=away).depth0 is None
    behind = np.array([[1.0, 0, 500], [0, 1, 0], [0, 0, 1]])
    with pytest.raises(FileError, match="overlap"):
        assemble(*views(tmp_path, truth), PairOptions(), H_0to1=behind)


def test_depth_of_another_size_names_the_image(tmp_path: Path) -> None:
    truth = rendered()
    view0, view1 = views(tmp_path, truth)
    with pytest.raises(FileError, match=r"0\.png: the image has 64 x 48 pixels, its depth map"):
        assemble(view0._replace(depth=np.ones((4, 5), np.float32)), view1, PairOptions())


@pytest.mark.parametrize(
    "T",
    [np.eye(3), np.full((4, 4), np.nan), 2 * np.eye(4), np.diag([1.0, 1, -1, 1])],
    ids=["3x3", "nan", "2x", "flip"],
)
def test_impossible_poses_are_refused(tmp_path: Path, T: np.ndarray) -> None:
    truth = rendered()
    with pytest.raises(FileError, match=r"0\.png"):
        assemble(*views(tmp_path, truth), PairOptions(), T_0to1=T)


def test_iterating_skips_counts_and_warns_once() -> None:
    pairs = Numbered({2, 7})
    with pytest.warns(UserWarning, match="2 of 10 pairs skipped; the last: pair7") as caught:
        names = [pair.name for pair in pairs]
    assert names == [f"pair{i}" for i in range(10) if i not in {2, 7}]
    assert len(caught) == 1
    assert pairs.skipped == {2: "pair2.png: broken", 7: "pair7.png: broken"}


def test_indexing_gives_the_next_usable_pair() -> None:
    pairs = Numbered({3, 4, 9})
    with pytest.warns(UserWarning, match="1 of 10 pairs skipped so far: pair3"):
        assert pairs[3].name == "pair5"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the second to the ninth are counted in silence
        assert pairs[9].name == "pair0"
        assert pairs[-1].name == "pair0"
    assert len(pairs.skipped) == 3
    with pytest.raises(IndexError, match="10"):
        pairs[10]


def test_strict_raises_and_names_the_file() -> None:
    pairs = Numbered({3}, PairOptions(strict=True))
    with pytest.raises(FileError, match=r"pair3\.png"):
        pairs[3]
    with pytest.raises(FileError, match=r"pair3\.png"):
        list(pairs)


def test_nothing_usable_is_an_error() -> None:
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(FileError, match="none of the 10"):
        Numbered(set(range(10)))[4]


def test_batches_from_a_loader_with_a_worker() -> None:
    pairs = Numbered(set())
    batches = list(DataLoader(pairs, batch_size=5, collate_fn=collate_pairs, num_workers=1))
    assert [batch.image0.shape for batch in batches] == [(5, 1, 4, 4)] * 2
    assert batches[1].name == [f"pair{i}" for i in range(5, 10)]
    assert batches[0].K0 is None


def test_collating_what_does_not_fit_is_an_error() -> None:
    pair = Numbered(set())[0]
    with pytest.raises(ValueError, match=r"image0 of one shape.*pad_to"):
        collate_pairs([pair, pair._replace(image0=torch.zeros(1, 5, 4))])
    with pytest.raises(ValueError, match="H_0to1 in all pairs"):
        collate_pairs([pair, pair._replace(H_0to1=torch.eye(3))])
    with pytest.raises(ValueError, match="at least one"):
        collate_pairs([])


def test_option_errors_name_the_option() -> None:
    with pytest.raises(ValueError, match="resize"):
        PairOptions(resize=0)
    with pytest.raises(ValueError, match="pad_to"):
        PairOptions(pad_to=(0, 5))
    with pytest.raises(ValueError, match="min_overlap"):
        PairOptions(min_overlap=1.0)
