# SPDX-License-Identifier: Apache-2.0
"""Exported graphs: the matcher's matches outside of it, and no file that was not held to them."""

import errno
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks import matchers
from benchmarks.cases import EXPORTED
from benchmarks.measure import Context
from eloftr_ops import EfficientLoFTR
from eloftr_ops.cli import app
from eloftr_ops.inference import export as exporting
from eloftr_ops.inference import export_check
from eloftr_ops.inference.export import ExportError, ExportReport, export, foreign_operators
from eloftr_ops.io import FileError
from eloftr_ops.types import StaticMatches
from support.models import random_images, tiny_model

SIZE, CELLS = (64, 96), 8 * 12
CLIENT = Path(__file__).parents[2] / "docs" / "clients" / "onnx_client.py"
NAMES = ["keypoints0", "keypoints1", "confidence", "valid"]


def small_matcher() -> EfficientLoFTR:
    return tiny_model(num_layers=1, border_removal=0)


def pair(batch: int, size0: tuple[int, int] = SIZE) -> list[torch.Tensor]:
    """Images that the export never saw: image 1 is image 0, a little darker and perhaps larger."""
    images = random_images(batch, *SIZE, seed=5)
    return [images[..., : size0[0], : size0[1]].contiguous(), 0.95 * images]


def assert_agrees(got: StaticMatches, expected: StaticMatches) -> None:
    """At least 99.5 % of the matches, within 0.01 pixels: what an export promises."""
    near, most = export_check.compare(got, expected, 0.01)
    assert most >= 20
    assert near >= 0.995 * most
    assert got.valid.shape == expected.valid.shape


@pytest.fixture(scope="module")
def onnx_report(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return export(small_matcher(), file, size=SIZE, batch=None, max_matches=CELLS)


def test_an_onnx_file_says_how_it_was_checked(onnx_report: ExportReport) -> None:
    assert onnx_report.path.stat().st_size == onnx_report.file_bytes > 1e5
    assert onnx_report.shared >= 0.995
    assert onnx_report.matches >= export_check.LEAST_MATCHES
    assert list(onnx_report.path.parent.iterdir()) == [onnx_report.path]


def test_an_onnx_file_has_standard_operators_alone(onnx_report: ExportReport) -> None:
    model = onnx.load(onnx_report.path)
    assert [(opset.domain, opset.version) for opset in model.opset_import if opset.domain == ""] == [("", 18)]
    assert foreign_operators(onnx_report.path) == []
    assert not model.functions
    assert [value.name for value in model.graph.input] == ["image0", "image1"]
    assert [value.name for value in model.graph.output] == NAMES


@pytest.mark.parametrize("batch", [1, 3])
def test_onnxruntime_gives_the_matches_of_the_matcher(onnx_report: ExportReport, batch: int) -> None:
    images = pair(batch)
    session = onnxruntime.InferenceSession(onnx_report.path, providers=["CPUExecutionProvider"])
    fields = session.run(NAMES, {f"image{side}": image.numpy() for side, image in enumerate(images)})
    with torch.no_grad():
        expected = small_matcher().match_static(*images, max_matches=CELLS)
    assert_agrees(StaticMatches(*map(torch.from_numpy, fields)), expected)


def test_the_benchmark_runs_the_file(
    onnx_report: ExportReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row of ``benchmarks.run cpu``, with a file that is there already: held to the matcher it came from."""
    monkeypatch.setattr(matchers, "plain_model", lambda *_: small_matcher())
    shutil.copy(onnx_report.path, tmp_path / "small-96x64.onnx")
    context = Context(torch.device("cpu"), "fp32", tmp_path, quick=True)
    row = matchers.load(EXPORTED, context)
    assert matchers.gate(EXPORTED, row, SIZE, context, alike=True) == 1
    found, expected = (
        row.match(*pair(1)),
        small_matcher()(dict(zip(("image0", "image1"), pair(1), strict=True))),
    )
    assert len(found["confidence"]) == len(found["batch_indexes"]) == len(expected["confidence"]) > 0


def test_the_python_client_needs_no_torch(onnx_report: ExportReport, tmp_path: Path) -> None:
    """The program of docs/deployment.md, in a process where importing torch or this package fails."""
    for side, image in enumerate(pair(1)):
        pixels = Image.fromarray((255 * image[0, 0]).round().to(torch.uint8).numpy())
        pixels.resize((192, 128)).save(tmp_path / f"{side}.png")  # of another size than the graph
    blocked = "import sys; sys.modules.update(torch=None, eloftr_ops=None, eloftr_kernels=None)\n"
    program = f"{blocked}import runpy; runpy.run_path({str(CLIENT)!r}, run_name='__main__')"
    files = [str(onnx_report.path), "0.png", "1.png", "matches.csv"]
    command = [sys.executable, "-c", program, *files]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = np.loadtxt(tmp_path / "matches.csv", delimiter=",", skiprows=1)
    images = [Image.open(tmp_path / f"{side}.png").resize((96, 64), Image.Resampling.LANCZOS) for side in "01"]
    gray = [torch.tensor(np.asarray(image)) / 255 for image in images]
    with torch.no_grad():
        found = small_matcher()({f"image{side}": x[None, None] for side, x in enumerate(gray)})
    assert len(rows) == pytest.approx(len(found["confidence"]), rel=0.02)
    expected = torch.cat([2 * found["keypoints0"], 2 * found["keypoints1"]], 1)  # pixels of the files
    distance = torch.cdist(torch.from_numpy(rows[:, :4]).float(), expected, p=torch.inf).amin(1)
    assert (distance < 0.02).float().mean() >= 0.98


def test_the_command_writes_a_program_with_masks_and_two_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EfficientLoFTR, "from_pretrained", lambda *_: small_matcher())
    file = tmp_path / "model.pt2"
    options = [
        "--format",
        "torch-export",
        "--size",
        "60x90",
        "--size1",
        "64x96",
        "--masks",
        "--max-matches",
        "40",
    ]
    done = CliRunner().invoke(app, ["export", *options, "-o", str(file)])
    assert done.exit_code == 0, done.output
    assert f"{file} (torch-export, " in done.output
    assert "matches within 0.01 pixels" in done.output
    images = pair(1, (60, 90))  # no multiples of 32
    masks = [torch.ones_like(image[:, 0], dtype=torch.bool) for image in images]
    masks[0][:, 40:] = False
    loaded = torch.export.load(file).module()
    names = ["image0", "image1", "mask0", "mask1"]
    with torch.no_grad():
        got = StaticMatches(*loaded(**dict(zip(names, [*images, *masks], strict=True))))
        expected = small_matcher().match_static(*images, *masks, max_matches=40)
    near, most = export_check.compare(got, expected, 0.01)
    assert near == most > 0
    assert got.keypoints0[got.valid][:, 1].max() < 40


def test_a_program_of_any_size_and_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving and loading are left to the other tests."""
    programs: list[Any] = []

    def write(program: torch.export.ExportedProgram, file: Path) -> export_check.Graph:
        file.touch()
        programs.append(program.module())
        return exporting._by_name(programs[0])

    monkeypatch.setitem(exporting._WRITERS, "torch-export", write)
    options = {"size": (64, 64), "batch": None, "max_matches": 60, "open_size": True}
    report = export(small_matcher(), tmp_path / "model.pt2", format="torch-export", **options)
    assert report.shared >= 0.995
    for batch, (height, width) in ((1, (64, 96)), (3, (128, 64))):
        image = random_images(batch, height, width, seed=3)
        with torch.no_grad():
            got = StaticMatches(*programs[0](image0=image, image1=0.95 * image))
            expected = small_matcher().match_static(image, 0.95 * image, max_matches=60)
        assert_agrees(got, expected)


def wrong(graph: export_check.Graph) -> export_check.Graph:
    """A graph whose keypoints are a pixel off."""

    def run(*inputs: torch.Tensor) -> StaticMatches:
        found = graph(*inputs)
        return found._replace(keypoints1=found.keypoints1 + 1)

    return run


def test_a_file_that_disagrees_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = small_matcher().match_static
    old = tmp_path / "model.pt2"
    old.write_text("an older export")

    def write(program: object, file: Path) -> export_check.Graph:
        file.write_text("a new one")
        return wrong(lambda *images: exact(*images, max_matches=CELLS, mode="hard"))

    monkeypatch.setitem(exporting._WRITERS, "torch-export", write)
    monkeypatch.setattr(exporting, "_traced", lambda *_, **__: None)
    with pytest.raises(ExportError, match=r"shares 0\.0% of the matches with its matcher, expected at least 99\.5%"):
        export(small_matcher(), old, format="torch-export", size=SIZE, max_matches=CELLS)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an older export"]


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(program: object, file: Path) -> export_check.Graph:
        file.write_text("half of a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(exporting._WRITERS, "torch-export", write)
    monkeypatch.setattr(exporting, "_traced", lambda *_, **__: None)
    with pytest.raises(FileError, match=r"model.pt2: cannot be written \(No space left on device\)"):
        export(small_matcher(), tmp_path / "model.pt2", format="torch-export", size=SIZE, max_matches=CELLS)
    assert not list(tmp_path.iterdir())


def test_too_few_matches_prove_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="finds 0 matches on the images that check the graph, expected at least 20"):
        export(tiny_model(threshold=1.0), tmp_path / "model.onnx", size=SIZE, max_matches=CELLS)
    assert not list(tmp_path.iterdir())


def test_agreement_is_of_the_same_cells_in_the_same_pair() -> None:
    keypoints = torch.tensor([[[4.0, 4.0], [20.0, 4.0]], [[4.0, 4.0], [0.0, 0.0]]])
    valid = torch.tensor([[True, True], [True, False]])
    found = StaticMatches(keypoints, keypoints + 1, torch.ones(2, 2), valid)
    assert export_check.compare(found, found, 0.01) == (3, 3)
    reordered = StaticMatches(*(x.flip(1) for x in found))
    assert export_check.compare(reordered, found, 0.01) == (3, 3)
    other_pair = StaticMatches(*(x.flip(0) for x in found))
    assert export_check.compare(other_pair, found, 0.01) == (2, 3)
    assert export_check.compare(found._replace(valid=valid & False), found, 0.01) == (0, 3)
    moved = found._replace(keypoints1=found.keypoints1 + torch.tensor([0.02, 0.0]))
    assert export_check.compare(moved, found, 0.01) == (0, 3)
    assert export_check.compare(moved, found, 0.03) == (3, 3)


BAD = {
    "no rows": ({"max_matches": 0}, ValueError, "max_matches: expected 1 to 96, the coarse cells of image0, got 0"),
    "more rows than cells": ({"max_matches": 97}, ValueError, "max_matches: expected 1 to 96"),
    "too small": ({"size": (16, 96)}, ValueError, r"size: expected \(height, width\), whole numbers of at least 32"),
    "image 1 too small": ({"size1": (64, 31)}, ValueError, r"size1: expected .* at least 32, got \(64, 31\)"),
    "bfloat16": ({"dtype": torch.bfloat16}, ValueError, "dtype: expected torch.float32 or torch.float16"),
    "no pairs": ({"batch": 0}, ValueError, "batch: expected a whole number of at least 1, or None, got 0"),
    "another format": ({"format": "tflite"}, ValueError, "format: expected .*onnx.*, got 'tflite'"),
    "any batch": ({"format": "aoti", "batch": None}, ValueError, "batch: expected a number for aoti, got None"),
    "open for onnx": ({"open_size": True}, ValueError, "open_size: expected the format torch-export, got onnx"),
    "an open size that is small": (
        {"format": "torch-export", "open_size": True, "path": "model.pt2", "max_matches": 96},
        ValueError,
        "size: expected one size for both images, multiples of 32 of at least 96 for an open size",
    ),
    "another suffix": ({"path": "model.pt"}, FileError, "model.pt: expected a name that ends in .onnx, got .pt"),
    "no folder": ({"path": "nowhere/model.onnx"}, FileError, "the folder .*nowhere does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_before_any_work(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, error, words = BAD[case]
    options = {"format": "onnx", "size": SIZE, "max_matches": CELLS, "path": "model.onnx", **changes}
    if options["format"] == "aoti":
        options["path"] = "model.pt2"
    path = tmp_path / options.pop("path")
    monkeypatch.setattr(exporting, "_traced", lambda *_, **__: pytest.fail("it was traced"))
    with pytest.raises(error, match=words):
        export(small_matcher(), path, **options)
    assert not list(tmp_path.iterdir())


def test_an_optimized_copy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="matcher: expected a plain EfficientLoFTR, got a copy optimized"):
        export(small_matcher().optimize_for_inference(), tmp_path / "model.onnx", size=SIZE, max_matches=9)


def test_without_onnx_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name))
    with pytest.raises(ImportError, match=r"onnx: needed .* Run: pip install 'eloftr-ops\[export\]'"):
        export(small_matcher(), tmp_path / "model.onnx", size=SIZE, max_matches=9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "640"], "--size: expected HEIGHTxWIDTH such as 480x640, got 640"),
        (["--size", "16x64"], "size: expected (height, width), whole numbers of at least 32, got (16, 64)"),
        (["--batch", "0"], "--batch: expected a number of at least 1, or any, got 0"),
        (["--max-matches", "0"], "max_matches: expected 1 to 4800"),
        (["-o", "nowhere/model.onnx"], "the folder nowhere does not exist"),
        (["--weights", "no-such-weights"], "no-such-weights"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = CliRunner().invoke(app, ["export", "-o", "model.onnx", *arguments])
    assert done.exit_code == 2
    assert words in done.output
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())
