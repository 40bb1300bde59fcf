# SPDX-License-Identifier: Apache-2.0
"""The images that guided matching is measured on are what their map says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.guided import changed, main, right_matches


@pytest.mark.parametrize("change", ["turned by 30", "turned by 90", "reduced 2"])
def test_the_map_leads_to_the_same_place(change: str) -> None:
    """The centre of a white square lies where the map says, within a tenth of a pixel."""
    photo = Image.new("L", (96, 64), 0)
    photo.paste(255, (60, 20, 68, 28))
    other, H_0to1 = changed(photo, change)
    pixels = torch.tensor(list(other.tobytes()), dtype=torch.float64).view(other.height, other.width)
    ys, xs = (torch.arange(side) + 0.5 for side in pixels.shape)
    centre = torch.stack([(pixels * xs).sum(), (pixels * ys[:, None]).sum()]) / pixels.sum()
    expected = torch.tensor([64.0, 24.0], dtype=torch.float64) @ H_0to1[:2, :2].T + H_0to1[:2, 2]
    torch.testing.assert_close(centre, expected, atol=0.1, rtol=0)
    points = torch.tensor([[64.0, 24.0], [10.0, 10.0]])
    assert right_matches(points, expected.expand(2, 2), H_0to1) == 1


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Image.effect_noise((96, 64), 60).save(tmp_path / "photo.png")
    main(["--photo", str(tmp_path / "photo.png"), "--changes", "reduced 2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| image 1 | fast | normal | thorough |"
    assert lines[2].startswith("| reduced 2 | ")
