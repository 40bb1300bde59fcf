# SPDX-License-Identifier: Apache-2.0
"""``eloftr-ops calibrate``: weights with a calibration, and one line for a folder that cannot be used."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import eloftr_ops
from eloftr_ops import EfficientLoFTR
from eloftr_ops.cli import app

PHOTOGRAPH = Path(eloftr_ops.__file__).parent / "assets" / "demo_0.jpg"


def folder_of(count: int, folder: Path) -> Path:
    folder.mkdir()
    for index in range(count):
        shutil.copy(PHOTOGRAPH, folder / f"{index}.jpg")
    return folder


def test_the_weights_are_saved_with_their_calibration(tmp_path: Path) -> None:
    arguments = ["calibrate", str(folder_of(3, tmp_path / "images")), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--pairs", "2", "--size", "96", "128", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "held out" in result.output
    calibrated, embedded = EfficientLoFTR.from_pretrained(tmp_path / "out"), EfficientLoFTR.from_pretrained()
    assert calibrated.config.covariance_calibration != embedded.config.covariance_calibration
    numbers = ", ".join(f"{number:g}" for number in calibrated.config.covariance_calibration)
    assert numbers in " ".join(result.output.split())


@pytest.mark.parametrize(("count", "message"), [(0, "readable photo"), (2, "expected at least 3 photographs, got 2")])
def test_too_few_photographs_are_one_line(count: int, message: str, tmp_path: Path) -> None:
    arguments = ["calibrate", str(folder_of(count, tmp_path / "images")), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
