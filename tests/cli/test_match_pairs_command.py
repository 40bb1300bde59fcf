# SPDX-License-Identifier: Apache-2.0
"""``eloftr-ops match-pairs``: what it prints, and the user's mistakes."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from eloftr_ops.cli import app
from support.models import random_images, tiny_model
from support.pair_files import save_image


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    tiny_model(border_removal=0).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    picture = random_images(1, 80, 80)[0, 0]
    for number in range(3):
        save_image(tmp_path / "images" / f"{number}.png", picture[8 * number :, :][:64, :64])
    return tmp_path / "images"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["match-pairs", *(str(argument) for argument in arguments)])


def test_a_folder_and_a_list(images: Path, tmp_path: Path, weights: str) -> None:
    options = ("--weights", weights, "--devices", "cpu")
    result = run(images, "-o", tmp_path / "m.h5", *options)
    assert result.exit_code == 0, result.stderr
    assert "3 matched" in result.stdout
    (images / "1.png").write_bytes(b"broken")
    (tmp_path / "pairs.txt").write_text("0.png 1.png\n0.png 2.png\n0.png\n")
    result = run(tmp_path / "pairs.txt", "--images", images, "-o", tmp_path / "m.h5", *options)
    assert result.exit_code == 0, result.stderr
    assert "0 matched, 1 of an earlier run" in result.stdout
    assert "refused      2, listed in" in result.stdout
    result = run(images, "-o", tmp_path / "r.h5", "--pairs", "retrieval", "--neighbours", 1, *options)
    assert result.exit_code == 0, result.stderr
    assert "1 matched" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "-o", "m.h5"), "nowhere: expected a folder of images"),
        ((".", "-o", "m.h5"), "no image in this folder"),
        ((".", "-o", "m.npz"), "expected a name that ends in .h5"),
        ((".", "-o", "m.h5", "--devices", "tpu9"), "--device"),
        ((".", "-o", "m.h5", "--pairs", "file"), "expected a text file of pairs"),
        ((".", "-o", "m.h5", "--weights", "none-of-these"), "--weights"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert not (tmp_path / "m.h5").exists()
