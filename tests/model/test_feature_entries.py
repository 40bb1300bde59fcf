# SPDX-License-Identifier: Apache-2.0
"""Kept features that do not fit are named by their entry; weights by name in the constructor; bounded numbers."""

import time

import pytest
import torch

from eloftr_ops import EfficientLoFTR, EfficientLoFTRConfig
from support.models import random_images, tiny_model

IMAGE = random_images(1, 64, 64)


@pytest.mark.parametrize("entry", ["half", "quarter", "coarse"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(entry: str, value: float) -> None:
    model = tiny_model()
    features = {name: x.detach().clone() for name, x in model.extract_features(IMAGE).items()}
    features[entry][0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=rf"features1\['{entry}'\]: expected finite values, got NaN or"):
        model({"image0": IMAGE, "features1": features})


@pytest.mark.parametrize("entry", ["half", "quarter", "coarse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_maps_of_another_dtype(entry: str, dtype: torch.dtype) -> None:
    model = tiny_model()
    features = model.extract_features(IMAGE)
    features[entry] = features[entry].detach().to(dtype)
    with pytest.raises(TypeError, match=rf"features0\['{entry}'\]: expected torch.float32, got {dtype}"):
        model({"features0": features, "image1": IMAGE})


def test_features_of_a_bfloat16_copy_fit_that_copy() -> None:
    model = tiny_model().optimize_for_inference(dtype=torch.bfloat16)
    model({"features0": model.extract_features(IMAGE), "image1": IMAGE})


def test_the_constructor_takes_a_name_as_kornia_s_does() -> None:
    expected = EfficientLoFTR.from_pretrained("small")
    for model in (EfficientLoFTR("small"), EfficientLoFTR(pretrained="small")):
        assert model.config == expected.config
        assert not model.training
        assert all(torch.equal(v, model.state_dict()[n]) for n, v in expected.state_dict().items())


def test_kornia_s_name_is_the_authors_release(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(EfficientLoFTR, "from_pretrained", lambda name: asked.append(name) or tiny_model())
    EfficientLoFTR("outdoor")
    EfficientLoFTR(pretrained="outdoor")
    assert asked == ["zju-community/efficientloftr"] * 2


def test_other_first_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="config: expected an EfficientLoFTRConfig or a name of weights, got dict"):
        EfficientLoFTR({"backbone_type": "ResNetFPN_8_2"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fused: expected False with weights"):
        EfficientLoFTR("small", fused=True)


@pytest.mark.parametrize("border", [40, 3000, 10**12])
def test_a_border_as_wide_as_the_image_leaves_no_match_at_once(border: int) -> None:
    model = tiny_model(border_removal=border, threshold=0.0)
    started = time.monotonic()
    with torch.no_grad():
        assert len(model({"image0": IMAGE, "image1": IMAGE})["confidence"]) == 0
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("soft_neighbourhood", 65), ("soft_neighbourhood", 1001), ("temperature", float("inf")),
        ("temperature", 1e-300), ("subpixel_temperature", 1e300), ("soft_temperature", float("inf")),
        ("position_scale", (1.0, float("inf"))), ("position_scale", (float("nan"), 1.0)),
    ],
)  # fmt: skip
def test_numbers_without_a_bound_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected"):
        EfficientLoFTRConfig(**{field: value})  # type: ignore[arg-type]
