# SPDX-License-Identifier: Apache-2.0
"""The HPatches layout, on two sequences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eloftr_ops.data.hpatches import LARGE_SEQUENCES, HPatchesPairs
from eloftr_ops.data.labelled import PairOptions
from eloftr_ops.io import FileError
from support.pair_files import save_image


def make_set(root: Path) -> torch.Tensor:
    """Image 1 and, as images 2 ... 6, itself enlarged by two; one sequence of each kind."""
    image = torch.rand(40, 50, generator=torch.Generator().manual_seed(0))
    enlarged = F.interpolate(image[None, None], scale_factor=2, mode="nearest")[0, 0]
    for name in ("i_dc", "v_wall"):
        save_image(root / name / "1.ppm", image)
        for k in range(2, 7):
            save_image(root / name / f"{k}.ppm", enlarged)
            # Pixel x becomes pixels 2 x and 2 x + 1, whose middle is 2 x + 0.5 with centres at integers.
            np.savetxt(root / name / f"H_1_{k}", [[2, 0, 0.5], [0, 2, 0.5], [0, 0, 1]])
    return image


def test_pairs_of_a_sequence(tmp_path: Path) -> None:
    image = make_set(tmp_path)
    pairs = HPatchesPairs(tmp_path)
    assert len(pairs) == 10
    pair = pairs[6]
    assert str(pair.name).endswith("3.ppm")
    assert "v_wall" in str(pair.name)
    assert pair.image1.shape == (1, 80, 100)
    torch.testing.assert_close(pair.image0[0], image, atol=0.5 / 255 + 1e-6, rtol=0)


def test_homographies_move_from_integer_centers(tmp_path: Path) -> None:
    make_set(tmp_path)
    pair = HPatchesPairs(tmp_path).load(0)
    torch.testing.assert_close(pair.H_0to1, torch.diag(torch.tensor([2.0, 2.0, 1.0])))


def test_subsets_and_exclusion(tmp_path: Path) -> None:
    make_set(tmp_path)
    assert [path.name for path in HPatchesPairs(tmp_path, subset="v").sequences] == ["v_wall"]
    assert [path.name for path in HPatchesPairs(tmp_path, exclude=LARGE_SEQUENCES).sequences] == ["v_wall"]
    with pytest.raises(ValueError, match="subset"):
        HPatchesPairs(tmp_path, subset="x")
    with pytest.raises(ValueError, match="root"):
        HPatchesPairs(tmp_path / "absent")


def test_broken_pairs_are_skipped_or_named(tmp_path: Path) -> None:
    make_set(tmp_path)
    (tmp_path / "i_dc" / "H_1_3").write_text("1 2 3")
    (tmp_path / "i_dc" / "H_1_4").write_text("0 0 0\n0 0 0\n0 0 0\n")
    (tmp_path / "i_dc" / "5.ppm").unlink()
    (tmp_path / "v_wall" / "H_1_2").unlink()
    pairs = HPatchesPairs(tmp_path)
    with pytest.warns(UserWarning, match="4 of 10 pairs skipped"):
        assert len(list(pairs)) == 6
    strict = HPatchesPairs(tmp_path, options=PairOptions(strict=True))
    for index, name in ((1, "H_1_3"), (2, "invertible"), (3, r"5\.ppm"), (5, "H_1_2")):
        with pytest.raises(FileError, match=name):
            strict[index]
