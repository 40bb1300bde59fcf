# SPDX-License-Identifier: Apache-2.0
"""Adapters of hloc, vismatch and glue-factory: their interfaces, and where the centre of a pixel is."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eloftr_ops import EfficientLoFTR
from eloftr_ops.errors import ArgumentError
from eloftr_ops.integrations import hloc as hloc_adapter
from eloftr_ops.integrations import vismatch as vismatch_adapter
from eloftr_ops.integrations.common import most_confident, to_gray
from eloftr_ops.io import demo_pair
from support import toolboxes

SHIFT = 16  # image 1 is image 0, moved by two cells, so that the truth is a shift by whole pixels
SIZE = 160


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    """A photograph and its shift: x1 = x0 - 16 in any frame, and (0.5, 0.5) is a pixel's centre in none but ours."""
    picture = demo_pair().image0[..., 200 : 200 + SIZE, 200 : 200 + SIZE + SHIFT]
    return picture[..., :SIZE].contiguous(), picture[..., SHIFT:].contiguous()


@pytest.fixture(scope="module")
def own(images: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Matches of the matcher itself, in the project's frame; image 1 first, as hloc's adapter calls it, too."""
    matcher = EfficientLoFTR.from_pretrained("small").eval()
    with torch.no_grad():
        straight = matcher({"image0": images[0], "image1": images[1]})
        turned = matcher({"image0": images[1], "image1": images[0]})
    assert len(straight["confidence"]) > 100
    assert len(turned["confidence"]) > 100
    return {**straight, "turned0": turned["keypoints1"], "turned1": turned["keypoints0"]}


def test_hloc_gets_keypoints_with_integer_centres(
    monkeypatch: pytest.MonkeyPatch, images: tuple[Tensor, Tensor], own: dict[str, Tensor]
) -> None:
    hloc = toolboxes.hloc(monkeypatch)
    monkeypatch.delitem(sys.modules, "hloc.matchers.eloftr", raising=False)
    hloc_adapter.register()
    hloc_adapter.register()
    try:
        assert set(hloc.confs) == {"loftr", "eloftr", "eloftr_aachen", "eloftr_superpoint"}
        model = hloc.load(hloc.confs["eloftr"]["model"])
    finally:
        sys.modules.pop("hloc.matchers.eloftr", None)
    pred = model({"image0": images[0], "image1": images[1]})
    torch.testing.assert_close(pred["keypoints0"] + 0.5, own["turned0"])
    torch.testing.assert_close(pred["keypoints1"] + 0.5, own["turned1"])
    # In COLMAP's frame, of images that hloc halved, a match is twice as far from the corner: 0.5 is added once only.
    keypoints0, keypoints1 = toolboxes.hloc_keypoints(pred, scale=2.0)
    np.testing.assert_allclose(keypoints0, 2 * own["turned0"].numpy(), rtol=1e-6)
    moved = np.median(keypoints0 - keypoints1, axis=0)
    np.testing.assert_allclose(moved, [2 * SHIFT, 0], atol=0.2)
    assert pred["scores"].shape == (len(keypoints0),)


def test_hloc_options(monkeypatch: pytest.MonkeyPatch, images: tuple[Tensor, Tensor]) -> None:
    toolboxes.hloc(monkeypatch)
    conf = {"name": "eloftr", "match_threshold": 0.5, "max_num_matches": 20}
    model = hloc_adapter.matcher_class()(conf).eval()
    pred = model({"image0": images[0], "image1": images[1]})
    assert len(pred["scores"]) == 20
    assert pred["scores"].min() > 0.5
    with pytest.raises(ArgumentError, match=r"image0: expected one image, \(1, 1, H, W\)"):
        model({"image0": images[0].expand(2, -1, -1, -1), "image1": images[1]})
    with pytest.raises(ArgumentError, match=r"weights: \./nowhere"):
        hloc_adapter.matcher_class()({"weights": "./nowhere.safetensors"})
    with pytest.raises(ArgumentError, match="threshold: expected a probability"):
        hloc_adapter.matcher_class()({"match_threshold": 3.0})


@pytest.mark.parametrize(("package", "outputs"), [("vismatch", 7), ("imm", 6)])
def test_vismatch_gets_the_frame_of_its_own_wrappers(
    monkeypatch: pytest.MonkeyPatch,
    images: tuple[Tensor, Tensor],
    own: dict[str, Tensor],
    package: str,
    outputs: int,
) -> None:
    base = type("BaseMatcher", (toolboxes.VismatchMatcher,), {"outputs": outputs})
    monkeypatch.setitem(sys.modules, "vismatch", None)
    toolboxes.module(monkeypatch, package, BaseMatcher=base)
    matcher = vismatch_adapter.matcher_class()(device="cpu", ransac_iters=7)
    assert matcher.options == {"ransac_iters": 7}
    colors = [image[0].expand(3, -1, -1) for image in images]
    found = matcher(*colors)
    # Gray again, but for the rounding of the three weights of luma.
    assert abs(len(found["matched_kpts0"]) - len(own["keypoints0"])) <= 0.02 * len(own["keypoints0"])
    moved = np.median(found["matched_kpts0"] - found["matched_kpts1"], axis=0)
    np.testing.assert_allclose(moved, [SHIFT, 0], atol=0.1)
    # Positions in image 0 are pixel centres, which are at 0.5 here.
    np.testing.assert_array_equal(found["matched_kpts0"] % 1, own["keypoints0"][0, 0].item() % 1)
    if outputs == 7:
        assert found["matched_confidences"].shape == (len(found["matched_kpts0"]),)
    tiny = matcher(torch.rand(3, 20, 200), torch.rand(3, 64, 64))
    assert tiny["matched_kpts0"].shape == (0, 2)


def test_glue_factory_gets_batches(
    monkeypatch: pytest.MonkeyPatch, images: tuple[Tensor, Tensor], own: dict[str, Tensor]
) -> None:
    toolboxes.module(monkeypatch, "gluefactory.models.base_model", BaseModel=toolboxes.GlueFactoryModel)
    adapter = importlib.reload(importlib.import_module("eloftr_ops.integrations.glue_factory"))
    model = adapter.__main_model__({"name": adapter.__name__}).eval()
    assert adapter.__main_model__ is type(model)
    blank = torch.zeros_like(images[0])
    data = {
        "view0": {"image": torch.cat([images[0], blank])},
        "view1": {"image": torch.cat([images[1], images[1]])},
    }
    with torch.no_grad():
        pred = model(data)
    count = len(own["confidence"])
    assert pred["keypoints0"].shape == (2, count, 2)
    torch.testing.assert_close(pred["keypoints0"][0], own["keypoints0"])  # COLMAP's frame is the project's
    torch.testing.assert_close(pred["keypoints1"][0], own["keypoints1"], atol=1e-3, rtol=0)
    assert pred["matches0"][0].tolist() == list(range(count))
    found = pred["matches0"][1] >= 0
    assert not pred["keypoints0"][1][~found].any()
    assert (pred["matching_scores0"][1][~found] == 0).all()
    with pytest.raises(NotImplementedError, match=r"eloftr_ops\.training"):
        model.loss(pred, data)


def test_glue_factory_limits_each_pair(monkeypatch: pytest.MonkeyPatch, images: tuple[Tensor, Tensor]) -> None:
    toolboxes.module(monkeypatch, "gluefactory.models.base_model", BaseModel=toolboxes.GlueFactoryModel)
    adapter = importlib.reload(importlib.import_module("eloftr_ops.integrations.glue_factory"))
    data = {"view0": {"image": images[0]}, "view1": {"image": images[1]}}
    with torch.no_grad():
        pred = adapter.model_class()({"max_num_matches": 30}).eval()(data)
        everything = adapter.model_class()({}).eval()(data)
    assert pred["matches0"].shape == (1, 30)
    assert pred["matching_scores0"].min() >= everything["matching_scores0"][0].sort(descending=True).values[29]
    with pytest.raises(ArgumentError, match="max_num_matches: expected at least 1"):
        adapter.model_class()({"max_num_matches": 0}).eval()(data)


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("hloc", hloc_adapter.register),
        ("vismatch", vismatch_adapter.matcher_class),
        (
            "gluefactory",
            lambda: importlib.import_module("eloftr_ops.integrations.glue_factory").model_class(),
        ),
    ],
)
def test_a_missing_toolbox_is_named(monkeypatch: pytest.MonkeyPatch, package: str, call: Any) -> None:
    for name in (package, "imm"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"^{package}.* cannot be imported: .* Install "):
        call()


def test_gray_and_the_most_confident() -> None:
    image = torch.rand(2, 3, 4, 5)
    expected = 0.299 * image[:, 0] + 0.587 * image[:, 1] + 0.114 * image[:, 2]
    torch.testing.assert_close(to_gray(image)[:, 0], expected)
    with pytest.raises(ArgumentError, match=r"image: expected \(B, 1, H, W\) or \(B, 3, H, W\), got \(2, 4, 4, 5\)"):
        to_gray(torch.rand(2, 4, 4, 5))
    confidence = torch.tensor([0.3, 0.9, 0.3, 0.5])
    assert most_confident(confidence, 3).tolist() == [0, 1, 3]
    assert most_confident(confidence, None).tolist() == [0, 1, 2, 3]
