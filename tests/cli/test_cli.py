# SPDX-License-Identifier: Apache-2.0
"""The command line from image files to match files, with a tiny model in place of trained weights."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from kornia.geometry import transform_points
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from eloftr_ops import EfficientLoFTR, Matches, __version__
from eloftr_ops.cli import app
from support.models import TINY, StandIn, put_for_pretrained

# Finds a few matches with its random weights.
ONE_LAYER = TINY.replace(
    stage_channels=(8, 8, 16, 32),
    stage_blocks=(1, 1, 1, 1),
    num_layers=1,
    subpixel_channels=2,
    centred_subpixel=False,
)
ASSETS = resources.files("eloftr_ops") / "assets"
H_DEMO = torch.tensor(json.loads((ASSETS / "demo.json").read_text())["H_0to1"], dtype=torch.float64)


class KnownMatches(StandIn):
    """Finds the true matches of the demo pair, whatever the size it sees it at, and every fifth one wrong."""

    def forward(self, data: Mapping[str, Any], **_: Any) -> dict[str, Tensor]:
        size0, size1 = (torch.tensor(data[f"image{side}"].shape[:1:-1], dtype=torch.float64) for side in "01")
        demo_wh = torch.tensor([640.0, 480.0], dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        points0 = torch.rand(400, 2, generator=generator, dtype=torch.float64) * demo_wh
        points1 = transform_points(H_DEMO[None], points0[None])[0]
        seen = ((points1 > 0) & (points1 < demo_wh)).all(1)
        points0, points1 = points0[seen], points1[seen]
        points1[::5] = points1[::5].flip(0)
        confidence = torch.rand(len(points0), generator=generator)
        confidence = confidence.where(confidence > self.config.threshold, 0)
        kept = confidence > 0
        return {
            "keypoints0": (points0 * (size0 / demo_wh))[kept].float(),
            "keypoints1": (points1 * (size1 / demo_wh))[kept].float(),
            "confidence": confidence[kept],
            "batch_indexes": torch.zeros(int(kept.sum()), dtype=torch.int64),
        }


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Call the command line in an empty folder, with the class of matcher that is asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for name in ("demo_0.jpg", "demo_1.jpg"):
        (tmp_path / name).write_bytes((ASSETS / name).read_bytes())

    def call(*arguments: object, matcher: type[EfficientLoFTR] = EfficientLoFTR) -> Result:
        put_for_pretrained(monkeypatch, matcher, ONE_LAYER)
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return call


PAIR = ("demo_0.jpg", "demo_1.jpg")
COMMAND = "from eloftr_ops.cli import app; app()"


def number(result: Result, label: str) -> float:
    """The first number of the line that starts with a label."""
    (line,) = (line for line in result.stdout.splitlines() if line.startswith(label))
    return float(line.removeprefix(label).split()[0])


def assert_one_line_error(result: Result, *parts: str) -> None:
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    for part in parts:
        assert part in result.stderr


def test_version(run: Callable[..., Result]) -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"eloftr-ops {__version__}\n")


def test_help_names_both_commands(run: Callable[..., Result]) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "match" in result.stdout
    assert "demo" in result.stdout


@pytest.mark.parametrize("name", ["matches.npz", "matches.json", "matches.csv"])
def test_match_writes_what_the_model_finds(run: Callable[..., Result], name: str) -> None:
    result = run("match", *PAIR, "-o", f"out/{name}", "--viz", "out/matches.png", "--resize", 128)
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in Path("out").iterdir()) == sorted([name, "matches.png"])
    with Image.open("out/matches.png") as picture:
        picture.verify()
    path = Path("out", name)
    if name.endswith(".csv"):
        count = len(list(csv.DictReader(path.read_text().splitlines())))
    else:
        count = len((np.load(path) if name.endswith(".npz") else json.loads(path.read_text()))["confidence"])
    assert count == number(result, "matches") > 0
    assert "640x480 as 128x96" in result.stdout
    assert number(result, "time") >= 0


def test_keypoints_and_homography_are_those_of_the_original_images(run: Callable[..., Result]) -> None:
    # Image 1 is stored at half its size: the true homography then ends in half-size pixels.
    with Image.open("demo_1.jpg") as image:
        image.resize((320, 240)).save("half.png")
    arguments = ("--model", "homography", "--resize", 160)
    result = run("match", PAIR[0], "half.png", "-o", "out/m.npz", *arguments, matcher=KnownMatches)
    assert result.exit_code == 0, result.stderr
    matches = np.load("out/m.npz")
    assert (matches["size0_wh"].tolist(), matches["size1_wh"].tolist()) == ([640, 480], [320, 240])
    H_0to1 = np.diag([0.5, 0.5, 1.0]) @ H_DEMO.numpy()
    # float32 pixels of a 160 px image carry errors of 1e-5 px into a model of hundreds of exact matches.
    np.testing.assert_allclose(matches["H_0to1"], H_0to1, rtol=1e-3, atol=1e-6)
    good = torch.from_numpy(matches["inliers"])
    assert 0.75 < good.float().mean() <= 0.81
    assert number(result, "homography") == good.sum()
    expected = transform_points(torch.from_numpy(H_0to1)[None], torch.from_numpy(matches["keypoints0"]).double()[None])[
        0
    ]
    torch.testing.assert_close(
        torch.from_numpy(matches["keypoints1"])[good].double(), expected[good], atol=1e-3, rtol=0
    )


def test_fundamental_matrix_is_that_of_the_original_images(run: Callable[..., Result]) -> None:
    class Parallax(KnownMatches):
        def forward(self, data: Mapping[str, Any], **_: Any) -> dict[str, Tensor]:
            """A translating camera: points move along one direction, by their inverse depth."""
            generator = torch.Generator().manual_seed(0)
            points0 = torch.rand(200, 2, generator=generator) * torch.tensor([130.0, 80.0])
            inverse_depth = torch.rand(200, 1, generator=generator) * 30
            points1 = points0 + inverse_depth * torch.tensor([0.6, 0.1])
            confidence, batch = torch.ones(200), torch.zeros(200, dtype=torch.int64)
            return Matches(points0, points1, confidence, batch)._asdict()

    result = run("match", *PAIR, "-o", "out/m.json", "--resize", 160, matcher=Parallax)
    assert result.exit_code == 0, result.stderr
    matches = json.loads(Path("out/m.json").read_text())
    points0, points1 = (np.c_[np.array(matches[f"keypoints{side}"]), np.ones(200)] for side in "01")
    lines = points0 @ np.array(matches["F_0to1"]).T
    distance = np.abs((lines * points1).sum(1)) / np.linalg.norm(lines[:, :2], axis=1)
    assert distance.max() < 1e-2  # original pixels
    assert number(result, "fundamental") == 200


def test_exif_rotated_images_match_upright(run: Callable[..., Result]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open("demo_0.jpg") as image:
        image.transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    result = run("match", "turned.png", PAIR[1], "-o", "out/m.npz", "--resize", 128, matcher=KnownMatches)
    assert result.exit_code == 0, result.stderr
    assert np.load("out/m.npz")["size0_wh"].tolist() == [640, 480]


def test_transparent_parts_hold_no_match(run: Callable[..., Result]) -> None:
    with Image.open("demo_0.jpg") as image:
        image = image.convert("RGBA")
        image.paste((0, 0, 0, 0), (0, 0, 320, 480))
        image.save("cut.png")
    result = run("match", "cut.png", PAIR[1], "-o", "out/m.npz", "--resize", 256)
    assert result.exit_code == 0, result.stderr
    keypoints0 = np.load("out/m.npz")["keypoints0"]
    assert len(keypoints0)
    assert keypoints0[:, 0].min() >= 320 - 3  # the edge's pixel of 2.5 original ones may lie on either side


def test_max_matches_keeps_the_most_confident_in_their_order(run: Callable[..., Result]) -> None:
    run("match", *PAIR, "-o", "out/all.npz", matcher=KnownMatches)
    run("match", *PAIR, "-o", "out/best.npz", "--max-matches", 50, matcher=KnownMatches)
    everything, best = np.load("out/all.npz"), np.load("out/best.npz")
    kept = everything["confidence"] >= np.sort(everything["confidence"])[-50]
    np.testing.assert_array_equal(best["confidence"], everything["confidence"][kept])
    np.testing.assert_array_equal(best["keypoints1"], everything["keypoints1"][kept])


def test_threshold_reaches_the_model(run: Callable[..., Result]) -> None:
    run("match", *PAIR, "-o", "out/m.npz", "--threshold", 0.7, matcher=KnownMatches)
    confidence = np.load("out/m.npz")["confidence"]
    assert len(confidence)
    assert confidence.min() > 0.7


def test_threads_are_set(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    run("match", *PAIR, "--resize", 64, "--threads", 3)
    run("match", *PAIR, "--resize", 64)
    assert asked == [3]


def test_no_model_leaves_out_inliers(run: Callable[..., Result]) -> None:
    result = run("match", *PAIR, "-o", "out/m.npz", "--model", "none", matcher=KnownMatches)
    assert set(np.load("out/m.npz")) == {
        *("format", "version", "frame", "size0_wh", "size1_wh", "keypoints0", "keypoints1", "confidence"),
        *("related", "chance"),
    }
    assert "inliers" not in result.stdout


def test_matches_of_a_plane_determine_no_fundamental_matrix(run: Callable[..., Result]) -> None:
    result = run("match", *PAIR, "-o", "out/m.npz", "--max-matches", 5, matcher=KnownMatches)
    assert result.exit_code == 0
    assert "not determined by the 5 matches; try --model homography" in result.stdout
    assert not np.load("out/m.npz")["inliers"].any()


def test_any_number_of_matches_of_a_plane_determine_no_fundamental_matrix(run: Callable[..., Result]) -> None:
    result = run("match", *PAIR, "-o", "out/m.npz", matcher=KnownMatches)
    assert "the matches show a plane, or a camera that only rotates; try --model homography" in result.stdout
    matches = np.load("out/m.npz")
    assert "F_0to1" not in matches
    assert not matches["inliers"].any()


def test_the_verdict_is_printed_and_written(run: Callable[..., Result]) -> None:
    result = run("match", *PAIR, "-o", "out/m.npz", matcher=KnownMatches)
    assert "related: less than 0.1% of unrelated pairs agree as much" in result.stdout
    assert np.load("out/m.npz")["related"]
    assert np.load("out/m.npz")["chance"] < 1e-3
    result = run("match", *PAIR, "-o", "out/m.json", "--max-matches", 4, matcher=KnownMatches)
    assert "not known to be related: 100.0% of unrelated pairs agree as much" in result.stdout
    assert json.loads(Path("out/m.json").read_text())["related"] is False


def test_files_are_written_before_a_reader_that_goes_away_is_missed(run: Callable[..., Result]) -> None:
    """The pipe is closed while the command still works."""
    command = [sys.executable, "-c", COMMAND, "match", *PAIR, "--resize", "96", "-o", "out/m.npz"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
    assert len(np.load("out/m.npz")["confidence"]) >= 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_a_full_disk_behind_standard_output_is_one_line(run: Callable[..., Result]) -> None:
    command = [sys.executable, "-c", COMMAND, "match", *PAIR, "--resize", "96", "-o", "out/m.npz"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "Error: standard output cannot be written: No space left on device.\n"
    assert Path("out/m.npz").exists()


@pytest.mark.parametrize("suffix", [".npz", ".json", ".csv"])
def test_no_match_is_no_error(run: Callable[..., Result], suffix: str) -> None:
    result = run("match", *PAIR, "-o", f"out/m{suffix}", "--viz", "out/m.png", "--threshold", 1, matcher=KnownMatches)
    assert result.exit_code == 0, result.stderr
    assert "0: no match above the threshold" in result.stdout
    assert {path.name for path in Path("out").iterdir()} == {f"m{suffix}", "m.png"}


def test_results_do_not_vary(run: Callable[..., Result]) -> None:
    for name in ("first", "second"):
        run("match", *PAIR, "-o", f"out/{name}.npz", "--model", "homography", matcher=KnownMatches)
    assert Path("out/first.npz").read_bytes() == Path("out/second.npz").read_bytes()


def test_brackets_in_a_path_are_no_markup(run: Callable[..., Result]) -> None:
    name = "[bold]a[red] b.jpg"
    Path(PAIR[0]).rename(name)
    result = run("match", name, PAIR[1], "--resize", 64, "--model", "none")
    assert result.exit_code == 0, result.stderr
    assert name in result.stdout
    assert_one_line_error(run("match", "[red].jpg", PAIR[1]), "[red].jpg: no such file")


# --- bad usage and bad input: code 2, one line, and nothing computed or written ---


def test_wrong_arguments_are_refused(run: Callable[..., Result]) -> None:
    for arguments in (
        ["match", PAIR[0]],
        ["match", *PAIR, "--model", "affine"],
        ["match", *PAIR, "--resize", "-1"],
        ["match", *PAIR, "--max-matches", "0"],
        ["match", *PAIR, "--threshold", "high"],
        ["match", *PAIR, "--unknown"],
        ["unknown"],
    ):
        result = run(*arguments)
        assert result.exit_code == 2, arguments
        assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("-o", "out/m.txt"), ("out/m.txt", ".npz, .json, .csv")),
        (("-o", "missing/m.npz"), ("missing/m.npz", "the folder missing does not exist")),
        (("-o", "out"), ("out", "got none")),
        (("--viz", "out/m.bmp"), ("out/m.bmp", ".png")),
        (("--threshold", "-0.1"), ("--threshold", "-0.1")),
        (("--threshold", "nan"), ("--threshold", "nan")),
        (("--threshold", "1.5"), ("--threshold", "probability in [0, 1]")),
        (("--inlier-threshold", "0"), ("--inlier-threshold", "positive")),
        (("--device", "abacus"), ("--device", "'abacus'", "Pass auto or cpu")),
        (("--device", "meta"), ("--device", "'meta'")),
        (("--weights", "large"), ("--weights", "no weights called large")),
        (
            ("--resize", "40"),
            ("demo_0.jpg: 40x30 pixels after a resize to 40", "at least 32", "larger resize"),
        ),
    ],
)
def test_bad_options_are_named(run: Callable[..., Result], options: tuple[str, ...], parts: tuple[str, ...]) -> None:
    assert_one_line_error(run("match", *PAIR, *options), *parts)
    assert list(Path("out").iterdir()) == []


def test_a_gpu_that_is_not_there_is_refused(run: Callable[..., Result]) -> None:
    assert_one_line_error(run("match", *PAIR, "--device", f"cuda:{torch.cuda.device_count()}"), "--device", "cuda:")


def test_bad_images_are_named(run: Callable[..., Result]) -> None:
    Path("empty.png").touch()
    Path("text.png").write_text("no image")
    Path("broken.jpg").write_bytes(Path(PAIR[0]).read_bytes()[:5000])
    Image.new("L", (20, 100)).save("small.png")
    os.mkfifo("pipe.png")
    for name, part in (
        ("missing.png", "no such file"),
        ("out", "got a folder"),
        ("empty.png", "is empty"),
        ("text.png", "not an image"),
        ("broken.jpg", "broken or unsupported"),
        ("small.png", "20x100 pixels, expected at least 32"),
        ("pipe.png", "got a pipe or a device"),
        ("n" * 300 + ".png", "File name too long"),
        ("~nosuchuser/a.png", "no such file"),
    ):
        assert_one_line_error(run("match", name, PAIR[1], "-o", "out/m.npz"), name, part)
        assert_one_line_error(run("match", PAIR[0], name, "-o", "out/m.npz"), name, part)
    assert list(Path("out").iterdir()) == []


def test_out_of_gpu_memory_says_what_to_do(run: Callable[..., Result]) -> None:
    class TooLarge(StandIn):
        def forward(self, data: Mapping[str, Any], **_: Any) -> dict[str, Tensor]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert_one_line_error(run("match", *PAIR, matcher=TooLarge), "--resize")


def test_the_unexpected_is_code_1_and_leaves_no_file(run: Callable[..., Result]) -> None:
    class Broken(StandIn):
        def forward(self, data: Mapping[str, Any], **_: Any) -> dict[str, Tensor]:
            raise RuntimeError("a defect")

    result = run("match", *PAIR, "-o", "out/m.npz", matcher=Broken)
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)
    assert list(Path("out").iterdir()) == []


# --- demo ---


def test_demo_compares_with_the_true_homography(run: Callable[..., Result]) -> None:
    result = run("demo", "--output-dir", "made/for/it", matcher=KnownMatches)
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in Path("made/for/it").iterdir()} == {"matches.npz", "matches.png"}
    assert number(result, "corner error") < 0.1
    assert number(result, "homography") > 100


def test_demo_with_a_poor_model_still_ends_well(run: Callable[..., Result]) -> None:
    assert run("demo").exit_code == 0
    assert Path("eloftr-demo/matches.npz").is_file()


def test_demo_into_a_file_is_refused(run: Callable[..., Result]) -> None:
    assert_one_line_error(run("demo", "--output-dir", PAIR[0]), PAIR[0], "cannot be made")


def test_bundled_pair_is_small_and_explained() -> None:
    assert sum(len((ASSETS / name).read_bytes()) for name in PAIR) < 150_000
    assert "unrestricted use" in (ASSETS / "README.md").read_text()


def test_the_package_imports_without_the_tools_of_the_command_line() -> None:
    """And the command line imports without what a single command needs."""
    code = (
        "import sys, eloftr_ops; print(*{'typer', 'matplotlib', 'cv2'} & set(sys.modules));"
        "import eloftr_ops.cli; needed = ('eloftr_ops.evaluation', 'eloftr_ops.data', 'cv2');"
        "print(*[name for name in sys.modules if name.startswith(needed)])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
