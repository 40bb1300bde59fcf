# SPDX-License-Identifier: Apache-2.0
"""``eloftr-ops evaluate`` on small data sets, with matchers whose matches are known."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from eloftr_ops import EfficientLoFTR, __version__
from eloftr_ops.cli import app
from support.models import TINY, StandIn, put_for_pretrained

K = [[100.0, 0, 64], [0, 100, 48], [0, 0, 1]]


class Identity(StandIn):
    """Matches each point of a grid with the same point of the other image."""

    def forward(self, data: Mapping[str, Any], **_: Any) -> dict[str, Tensor]:
        height, width = data["image0"].shape[-2:]
        steps = (torch.linspace(2, side - 2, 8) for side in (width, height))
        points = torch.cartesian_prod(*steps)
        assert next(self.parameters()).dtype in (torch.float32, torch.bfloat16)
        return {"keypoints0": points, "keypoints1": points.clone(), "confidence": torch.ones(len(points))}


class Nothing(StandIn):
    """Matches nothing."""

    def forward(self, data: Mapping[str, Any], **_: Any) -> dict[str, Tensor]:
        none = torch.zeros(0, 2)
        return {"keypoints0": none, "keypoints1": none, "confidence": torch.zeros(0)}


class Interrupted(Identity):
    """Is stopped by the user at its third image pair, the first being matched twice."""

    def forward(self, data: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
        if data["image0"].mean() > 0.5:
            raise KeyboardInterrupt
        return super().forward(data, **options)


class TooLarge(Identity):
    """Does not fit on the GPU where an image is bright."""

    def forward(self, data: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
        if data["image0"].mean() > 0.5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(data, **options)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Call ``evaluate`` in an empty folder, with the class of matcher that is asked for."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, matcher: type[EfficientLoFTR] = Identity) -> Result:
        put_for_pretrained(monkeypatch, matcher, TINY.replace(threshold=0.2))
        return CliRunner().invoke(app, ["evaluate", *[str(argument) for argument in arguments]])

    return call


def write_pairs(*levels: int) -> list[dict[str, Any]]:
    """``pairs.json`` of even images with these gray levels, in turn with a homography and with a pure rotation."""
    pairs: list[dict[str, Any]] = []
    for number, level in enumerate(levels):
        Image.new("L", (128, 96), level).save(f"{number}.png")
        truth: dict[str, Any] = {"K0": K, "K1": K, "T_0to1": np.eye(4).tolist()}
        if number % 2 == 0:
            truth = {"H_0to1": np.eye(3).tolist()}
        pairs.append({"image0": f"{number}.png", "image1": f"{number}.png", **truth})
    Path("pairs.json").write_text(json.dumps({"pixel_centers": 0.5, "pairs": pairs}))
    return pairs


def record() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path("results.json").read_text())
    return content


JSON = ("--dataset", "json", "--index", "pairs.json", "--runs", "1", "-o", "results.json")


def test_json_pairs_of_both_kinds(run: Callable[..., Result]) -> None:
    write_pairs(10, 20, 30)
    result = run(*JSON, "--resize", "64", "--threshold", "0.3", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.stderr
    for part in ("3 of 3 pairs", "64.0 per pair", "corner auc@3", "100.00 %", "written", "results.json"):
        assert part in result.stdout
    content = record()
    assert content["complete"] is True
    assert content["version"] == __version__
    assert content["totals"]["homography"]["corner_auc@3"] == pytest.approx(100, abs=0.1)
    assert content["totals"]["homography"]["pairs"] == 2
    assert content["totals"]["pose"]["precision@0.0001"] == 100
    wanted = {"dataset": "json", "weights": "small", "resize": 64, "threshold": 0.3, "dtype": "bfloat16"}
    assert wanted.items() <= content["run"].items()
    assert content["configuration"]["original_pixels"] is True


def test_hpatches_sequences(run: Callable[..., Result]) -> None:
    for name in ("i_one", "v_two"):
        Path(name).mkdir()
        for number in range(1, 7):
            Image.new("L", (128, 96), 40).save(f"{name}/{number}.ppm")
        for number in range(2, 7):
            np.savetxt(f"{name}/H_1_{number}", np.eye(3))
    result = run(
        "--dataset", "hpatches", "--root", ".", "--resize", 48, "--limit", 4, "-o", "results.json"
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "4 of 10 pairs" in result.stdout
    content = record()
    assert [pair["index"] for pair in content["pairs"]] == [0, 3, 6, 9]
    assert content["configuration"]["original_pixels"] is False
    assert (content["run"]["resize"], content["run"]["shorter_side"]) == (48, True)
    assert content["totals"]["homography"]["corner_auc@3"] == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize("estimator", ["magsac", "ransac", "project"])
def test_each_estimator_is_reached_from_the_command(run: Callable[..., Result], estimator: str) -> None:
    write_pairs(10)
    assert run(*JSON, "--estimator", estimator).exit_code == 0
    assert record()["configuration"]["estimator"] == estimator
    assert record()["totals"]["homography"]["corner_auc@3"] > 99


@pytest.mark.parametrize(("effort", "searched"), [("fast", False), ("thorough", True)])
def test_an_effort_is_reached_from_the_command(run: Callable[..., Result], effort: str, searched: bool) -> None:
    asked: list[int] = []

    class Counted(Nothing):
        def forward(self, data: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
            asked.append(1)
            return super().forward(data, **options)

    write_pairs(10)
    assert run(*JSON, "--effort", effort, matcher=Counted).exit_code == 0
    assert record()["run"]["effort"] == effort
    assert (len(asked) > 40) is searched


def test_a_matcher_that_finds_nothing_gets_zero(run: Callable[..., Result]) -> None:
    write_pairs(10, 20)
    result = run(*JSON, matcher=Nothing)
    assert result.exit_code == 0
    totals = record()["totals"]
    assert totals["pose"]["auc@20"] == totals["homography"]["corner_auc@10"] == 0
    assert record()["pairs"][0]["errors"]["corner"] == [None]


def test_broken_pairs_are_counted_or_with_strict_fatal(run: Callable[..., Result]) -> None:
    write_pairs(10, 20, 30)
    Path("1.png").unlink()
    result = run(*JSON)
    assert result.exit_code == 0
    assert "1 pairs could not be read" in result.stdout
    assert "1.png: no such file" in result.stdout
    assert record()["totals"]["failed"] == 1
    assert record()["complete"] is True
    strict = run(*JSON, "--strict")
    assert strict.exit_code == 2
    assert "1.png: no such file" in strict.stderr
    assert record()["complete"] is False


def test_no_usable_pair_is_an_error(run: Callable[..., Result]) -> None:
    write_pairs(10)
    Path("0.png").unlink()
    result = run(*JSON)
    assert result.exit_code == 2
    assert "none of the 1 pairs could be evaluated" in result.stderr


@pytest.mark.parametrize(("matcher", "code"), [(Interrupted, 130), (TooLarge, 2)])
def test_what_was_measured_outlives_an_interruption(
    run: Callable[..., Result], matcher: type[EfficientLoFTR], code: int
) -> None:
    write_pairs(10, 20, 200, 30)
    result = run(*JSON, matcher=matcher)
    assert result.exit_code == code
    assert "stopped after 2 of 4 pairs" in result.stdout
    assert record()["complete"] is False
    assert [pair["index"] for pair in record()["pairs"]] == [0, 1]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--dataset", "json"), "--index: expected the JSON file"),
        (("--dataset", "json", "--index", "missing.json"), "missing.json: missing"),
        (("--dataset", "megadepth", "--root", "."), "--index: expected the scene_info"),
        (("--dataset", "hpatches"), "--root: expected the folder"),
        (("--dataset", "hpatches", "--root", "."), "--root: expected folders i_* or v_*"),
        (("--dataset", "scannet", "--root", "."), "test.npz: no such file"),
        ((*JSON, "--pose-threshold", "0"), "--pose-threshold: expected a positive number"),
        ((*JSON, "--threshold", "2"), "--threshold"),
        ((*JSON, "--device", "abacus"), "--device: expected"),
        ((*JSON, "--weights", "large"), "--weights: large"),
        ((*JSON, "-o", "results.txt"), "results.txt"),
    ],
)
def test_mistakes_are_one_line(run: Callable[..., Result], options: tuple[str, ...], part: str) -> None:
    write_pairs(10)
    result = run(*options)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1
    assert part in result.stderr
    assert not Path("results.json").exists()


def test_a_file_without_pairs_is_refused(run: Callable[..., Result]) -> None:
    write_pairs()
    result = run(*JSON)
    assert (result.exit_code, "names no pair" in result.stderr) == (2, True)


def test_help_at_80_columns_names_every_option_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in app.registered_commands:
        name = command.name or command.callback.__name__.replace("_", "-")
        text = CliRunner().invoke(app, [name, "--help"]).stdout
        assert max(map(len, text.splitlines())) <= 80
        for option in inspect.signature(command.callback).parameters.values():
            if option.default is not option.empty and option.name != "config":  # train's only argument
                assert f"--{option.name.replace('_', '-')}" in text
