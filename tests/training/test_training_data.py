# SPDX-License-Identifier: Apache-2.0
"""Which pairs make a step, labels of every source, and what validation counts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from kornia.geometry import transform_points
from torch import Tensor, nn

from eloftr_ops.training.batches import DEPTH, HOMOGRAPHY, POSE, batch_of_labelled, join_batches
from eloftr_ops.training.config import LossConfig, SourceConfig
from eloftr_ops.training.data import PairMixture, Textures, _open, batches, validation_batches
from eloftr_ops.training.objective import (
    batch_losses,
    coarse_labels,
    fine_labels,
    label_counts,
)
from eloftr_ops.training.validation import validate
from support.models import tiny_model
from support.pair_files import rendered, save_image
from support.training_runs import short


def _mixture(tmp_path: Path, **data: object) -> PairMixture:
    config = short(tmp_path, data=data).data
    return PairMixture(config, Textures(config, 0.0, 0), seed=3)


def _seeds(parts: list) -> set[int]:
    return {seed for part in parts if part is not None for seed in part.seeds.tolist()}


def test_processes_and_parts_share_the_pairs_of_a_step(tmp_path: Path) -> None:
    """Five pairs for two processes of three parts: each pair once, one part empty."""
    mixture = _mixture(tmp_path, batch_pixels=5 * 64 * 64, sizes=[[64, 64]])
    whole = next(batches(mixture, range(4, 5)))
    assert whole is not None
    shares = [list(batches(mixture, range(4, 5), process=p, processes=2, accumulate=3)) for p in (0, 1)]
    parts = [part for share in shares for part in share]
    assert [len(share) for share in shares] == [3, 3]
    assert [None if part is None else len(part.kinds) for part in parts] == [1, 1, 1, 1, 1, None]
    assert _seeds(parts) == _seeds([whole])
    assert {part.joined for part in parts if part is not None} == {5}
    in_order = join_batches([part for part in parts if part is not None])
    assert in_order is not None
    torch.testing.assert_close(in_order.image0, whole.image0, rtol=0, atol=0)


def test_workers_and_restarts_change_no_pair(tmp_path: Path) -> None:
    mixture = _mixture(tmp_path)
    alone = list(batches(mixture, range(3)))
    with_workers = list(batches(_mixture(tmp_path, workers=1), range(1, 3)))
    for one, other in zip(alone[1:], with_workers, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one.image1, other.image1)
        assert torch.equal(one.seeds, other.seeds)
    kinds = torch.cat([mixture[(step, 0)].kinds for step in range(12)])
    assert set(kinds.tolist()) == {HOMOGRAPHY, DEPTH}


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """One rendered scene three times: with depth, with its pose alone, and as if it were a homography."""
    truth = rendered()
    for side in (0, 1):
        save_image(tmp_path / f"{side}.png", truth.images[side])
        np.save(tmp_path / f"{side}.npy", truth.depths[side].numpy())
    images = {"image0": "0.png", "image1": "1.png"}
    posed = images | {
        "K0": truth.K[0].tolist(),
        "K1": truth.K[1].tolist(),
        "T_0to1": truth.T_0to1.tolist(),
    }
    flat = images | {"H_0to1": [[1, 0, 8.0], [0, 1, 0], [0, 0, 1]]}
    content = {
        "pixel_centers": 0.5,
        "pairs": [posed | {"depth0": "0.npy", "depth1": "1.npy"}, posed, flat],
    }
    (tmp_path / "pairs.json").write_text(json.dumps(content))
    return tmp_path / "pairs.json"


def test_labelled_pairs_of_all_kinds_are_supervised_together(pairs_file: Path, tmp_path: Path) -> None:
    """Images of 48 x 64 are filled up to 64 x 96; no label lies in the filling."""
    source = SourceConfig(kind="json", index=str(pairs_file))
    pairs = _open(source, short(tmp_path).data, Textures(short(tmp_path).data, 0.0, 0))
    batch = join_batches([batch_of_labelled(pairs[i], (64, 96), seed=i) for i in range(3)])
    assert batch is not None
    assert batch.mask0 is not None
    assert batch.kinds.tolist() == [DEPTH, POSE, HOMOGRAPHY]
    model = tiny_model()
    config = LossConfig(homography_weight=1.0, pose_weight=1.0, pose_distance=20.0)
    labels = coarse_labels(model, batch, config)
    assert set(labels.pairs.batch.tolist()) >= {0, 2}
    assert (labels.pairs.batch.diff() >= 0).all()
    for cells in (labels.pairs.cells0, labels.pairs.cells1):
        assert int((cells // 12).max()) < 6
        assert int((cells % 12).max()) < 8
    shifted = labels.pairs.batch == 2
    assert torch.equal(labels.pairs.cells1[shifted], labels.pairs.cells0[shifted] + 1)
    labels = fine_labels(batch, labels, config, total=len(labels.pairs.batch))
    assert labels.windows is not None
    assert labels.targets is not None
    assert set(labels.windows.batch.tolist()) == {0, 2}, "a pose alone tells no pixel"
    assert labels.targets.visible.any()
    assert label_counts(batch, labels).tolist()[3:5] == [1, 2]
    losses = batch_losses(model.train(), batch, config)
    sum(losses).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert float(losses.coarse.detach()) > 0


def test_reduced_images_take_their_labels_along(pairs_file: Path, tmp_path: Path) -> None:
    """Half the size: homography and intrinsics map halved points to halved points."""
    pairs = _open(SourceConfig(kind="json", index=str(pairs_file)), short(tmp_path).data, None)
    full, half = (batch_of_labelled(pairs[2], size, 0) for size in ((48, 64), (24, 32)))
    points = torch.tensor([[[3.0, 5.0], [40.0, 20.0]]])
    expected = transform_points(full.H_0to1, points) / 2
    torch.testing.assert_close(transform_points(half.H_0to1, points / 2), expected)
    K_full, K_half = (batch_of_labelled(pairs[0], size, 0).K0 for size in ((48, 64), (24, 32)))
    torch.testing.assert_close(K_half[0, :2], K_full[0, :2] / 2)
    assert half.image0.shape == (1, 1, 24, 32)
    assert batch_of_labelled(pairs[0], (24, 32), 0).depth0.shape == (1, 24, 32)


@pytest.mark.parametrize("padding", [False, True])
def test_windows_of_a_pair_do_not_depend_on_its_batch(tmp_path: Path, padding: bool) -> None:
    mixture = _mixture(tmp_path, batch_pixels=3 * 64 * 64, sizes=[[64, 64]])
    config, model = LossConfig(windows=12, padding=padding), tiny_model()
    single = [mixture[(0, position)] for position in range(3)]
    joined = join_batches(single)
    assert joined is not None
    labels = coarse_labels(model, joined, config)
    total = len(labels.pairs.batch)
    windows = fine_labels(joined, labels, config, total).windows
    assert windows is not None
    if padding:
        assert windows.batch.bincount(minlength=3).tolist() == [4, 4, 4]
    else:
        assert 0 < len(windows.batch) < total
    alone = [fine_labels(pair, coarse_labels(model, pair, config), config, total).windows for pair in single]
    for n, own in enumerate(alone):
        assert own is not None
        assert torch.equal(own.cells0, windows.cells0[windows.batch == n])


class _Planted(nn.Module):
    """Finds eight matches, at given distances from the truth."""

    def __init__(self, H: Tensor) -> None:
        super().__init__()
        self.H, self.weight = H, nn.Parameter(torch.zeros(()))

    def forward(self, data: dict[str, Tensor], mode: str) -> dict[str, Tensor]:
        points = 10 + 20 * torch.rand(8, 2)
        errors = torch.tensor([0, 0.5, 0.9, 1.1, 2.0, 2.9, 3.1, 50.0])
        moved = transform_points(self.H.double(), points[None].double())[0]
        moved[:, 0] += errors
        indexes = torch.zeros(8, dtype=torch.int64)
        return {
            "keypoints0": points,
            "keypoints1": moved,
            "confidence": torch.ones(8),
            "batch_indexes": indexes,
        }


def test_validation_counts_what_is_right(tmp_path: Path) -> None:
    config = short(tmp_path)
    textures = Textures(config.data, 0.0, 0)
    first, again = (list(validation_batches(config.validation, config.data, textures)) for _ in range(2))
    assert len(first) == 2
    assert all(torch.equal(a.image0, b.image0) for a, b in zip(first, again, strict=True))
    result = validate(_Planted(first[0].H_0to1), first[:1])
    assert (result.matches, result.right_1px, result.right_3px) == (8, 3, 6)
    assert (result.precision_1px, result.precision_3px) == (3 / 8, 6 / 8)
    assert result.score == pytest.approx(6 * 6 / 8)
    assert validate(tiny_model(threshold=1.0), first).precision_1px == 0


def test_every_tenth_image_is_held_out(tmp_path: Path) -> None:
    for number in range(20):
        save_image(tmp_path / "images" / f"{number:02d}.png", torch.full((130, 130), number / 255))
    config = short(tmp_path, data={"textures": str(tmp_path / "images"), "procedural": 1}).data
    textures = Textures(config, 0.1, 0)
    assert [int(image[0, 0]) for image in textures.held_out] == [0, 10]
    assert len(textures.training) == len(textures.weights) == 18 + 1
    assert len(Textures(config, 0.0, 0).training) == 21
