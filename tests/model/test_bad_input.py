# SPDX-License-Identifier: Apache-2.0
"""What users get wrong: the error names the argument, what was expected, what came and what to do."""

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eloftr_ops import EfficientLoFTR, EfficientLoFTRConfig
from support.models import random_images, tiny_model

IMAGE = random_images(1, 64, 64)
MODEL = tiny_model()
WITHOUT_BORDER = tiny_model(border_removal=0)

CASES: dict[str, tuple[Callable[[], dict], type[Exception], str]] = {
    "not a dict": (lambda: [IMAGE, IMAGE], TypeError, "data: expected a dict"),
    "missing image": (
        lambda: {"image0": IMAGE},
        ValueError,
        'exactly one of "image1" and "features1", got neither',
    ),
    "image and features": (
        lambda: {"image0": IMAGE, "features0": MODEL.extract_features(IMAGE), "image1": IMAGE},
        ValueError,
        'exactly one of "image0" and "features0", got both',
    ),
    "unknown key": (lambda: {"image0": IMAGE, "image1": IMAGE, "img2": IMAGE}, ValueError, "got img2"),
    "numpy": (
        lambda: {"image0": IMAGE.numpy(), "image1": IMAGE},
        TypeError,
        "image0: expected a torch.Tensor",
    ),
    "no batch": (lambda: {"image0": IMAGE[0], "image1": IMAGE}, ValueError, "Add the batch dimension"),
    "colour": (
        lambda: {"image0": IMAGE, "image1": IMAGE.expand(1, 3, 64, 64)},
        ValueError,
        r"image1: expected one gray channel, .*rgb_to_grayscale",
    ),
    "uint8": (
        lambda: {"image0": (IMAGE * 255).byte(), "image1": IMAGE},
        TypeError,
        "image0: expected a floating point image .* Scale it",
    ),
    "0 to 255": (
        lambda: {"image0": IMAGE * 255, "image1": IMAGE},
        ValueError,
        "image0: expected values in .0, 1.",
    ),
    "nan": (lambda: {"image0": IMAGE / 0 * 0, "image1": IMAGE}, ValueError, "image0: expected finite values"),
    "infinity": (
        lambda: {"image0": IMAGE, "image1": IMAGE / 0},
        ValueError,
        "image1: expected finite values",
    ),
    "too small": (lambda: {"image0": IMAGE[..., :31], "image1": IMAGE}, ValueError, "at least 32 pixels"),
    "other device": (
        lambda: {"image0": IMAGE.to("meta"), "image1": IMAGE},
        ValueError,
        "image0: expected on the model's device cpu, got meta",
    ),
    "batches differ": (
        lambda: {"image0": IMAGE.expand(2, 1, 64, 64), "image1": IMAGE},
        ValueError,
        "same batch size on both sides, got 2 and 1",
    ),
    "mask size": (
        lambda: {"image0": IMAGE, "image1": IMAGE, "mask0": torch.ones(1, 8, 8)},
        ValueError,
        r"mask0: expected the size of image0, .* = \(1, 64, 64\), got \(1, 8, 8\)",
    ),
    "mask nan": (
        lambda: {"image0": IMAGE, "image1": IMAGE, "mask1": torch.full((1, 64, 64), torch.nan)},
        ValueError,
        "mask1: expected finite values",
    ),
    "mask beside features": (
        lambda: {"features0": MODEL.extract_features(IMAGE), "image1": IMAGE, "mask0": torch.ones(1, 64, 64)},
        ValueError,
        'mask0: expected together with "image0"',
    ),
    "features of another model": (
        lambda: {
            "features0": tiny_model(stage_channels=(8, 8, 16, 32)).extract_features(IMAGE),
            "image1": IMAGE,
        },
        ValueError,
        r"features0\['half'\]: expected shape \(1, 12, 32, 32\)",
    ),
    "features that are a tensor": (
        lambda: {"features0": IMAGE, "image1": IMAGE},
        TypeError,
        "features0: expected the dict of tensors",
    ),
    "features with an entry missing": (
        lambda: {"features0": {"coarse": IMAGE}, "image1": IMAGE},
        ValueError,
        "features0: expected the entries half, quarter, coarse",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_data(name: str) -> None:
    make, error, message = CASES[name]
    with pytest.raises(error) as caught:
        MODEL(make())
    assert re.search(message, str(caught.value)), str(caught.value)


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode: expected one of hard, straight_through, soft"):
        MODEL({"image0": IMAGE, "image1": IMAGE}, mode="smooth")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shapes=st.tuples(*[st.lists(st.integers(0, 70), min_size=0, max_size=5)] * 2),
    channels=st.sampled_from([None, 1]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.uint8, torch.bool, torch.int64, torch.complex64]),
    scale=st.sampled_from([1.0, 255.0, float("nan")]),
    mask=st.sampled_from([None, "ones", "random", "wrong"]),
)
def test_fuzz_gives_results_or_documented_errors(shapes: tuple, channels: int | None, dtype, scale, mask) -> None:
    """Any tensors at all: a ValueError or TypeError with the argument's name, or finite matches on the images."""
    data = {}
    for side, shape in zip("01", shapes, strict=True):
        shape = [shape[0] % 3, channels, *shape[2:]] if channels and len(shape) == 4 else shape
        data[f"image{side}"] = (torch.rand(shape) * scale).to(dtype)
    if mask:
        shape0 = data["image0"].shape
        own = (*shape0[:1], *shape0[2:])
        data["mask0"] = {"ones": torch.ones(own), "random": torch.rand(own) > 0.5, "wrong": torch.ones(3)}[mask]
    out, message = None, ""
    try:
        with torch.no_grad():
            out = WITHOUT_BORDER(data)
    except (TypeError, ValueError) as error:
        message = str(error)
    if out is None:
        assert re.match(r"(image|mask)[01]: expected|data: expected", message), message
        return
    for side in "01":
        height, width = data[f"image{side}"].shape[-2:]
        x, y = out[f"keypoints{side}"].unbind(-1)
        assert ((x >= 0) & (x < width) & (y >= 0) & (y < height)).all()


BAD_CONFIGS = {
    "stage_channels": [(64, 64, 128), "full", (64, 64, 128, -1), (64, 64, 128, 100), (64, 8, 128, 256)],
    "stage_blocks": [(0, 1, 1, 1), (1, 2, 3)],
    "num_layers": [0, -1],
    "num_heads": [0, 3],
    "temperature": [0.0, -1.0, float("nan")],
    "threshold": [-0.1, 1.5, float("nan")],
    "border_removal": [-1],
    "score": ["softmax"],
    "gradient_mode": ["none"],
    "soft_neighbourhood": [2, 0],
    "position_scale": [(1.0,), (0.0, 1.0)],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD_CONFIGS.items() for v in values])
def test_bad_config_values_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"expected"):
        EfficientLoFTRConfig().replace(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("num_layers", 2.0), ("threshold", "high"), ("round_rotary", 1)])
def test_bad_config_types_are_refused(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=field):
        EfficientLoFTRConfig().replace(**{field: value})


def test_unknown_config_fields_and_presets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown configuration field\(s\) thresold; known: .*threshold"):
        EfficientLoFTRConfig.from_dict({"thresold": 0.3})
    with pytest.raises(ValueError, match="expected one of full, optimized, small, got 'large'"):
        EfficientLoFTRConfig.preset("large")


@pytest.mark.parametrize("name", ["full", "optimized", "small"])
def test_presets_round_trip_through_plain_data(name: str) -> None:
    config = EfficientLoFTRConfig.preset(name)
    assert EfficientLoFTRConfig.from_dict(config.to_dict()) == config


def test_config_is_frozen() -> None:
    with pytest.raises(AttributeError):
        EfficientLoFTRConfig().threshold = 0.5  # type: ignore[misc]


def test_small_is_small() -> None:
    """At most 3 M parameters and 60 GFLOP for a 640x480 pair; the authors' model has the 16 M of the paper."""
    from torch.utils.flop_counter import FlopCounterMode

    small, full = (EfficientLoFTR(EfficientLoFTRConfig.preset(n)).eval().fused() for n in ("small", "full"))
    assert sum(p.numel() for p in small.parameters()) <= 3e6
    assert 14e6 < sum(p.numel() for p in full.parameters()) < 17e6
    image = random_images(1, 480, 640)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small({"image0": image, "image1": image})
    assert counter.get_total_flops() <= 60e9


@pytest.mark.parametrize("hidden", [float("nan"), float("inf"), 255.0, -5.0])
def test_what_lies_under_a_mask_does_not_matter(hidden: float) -> None:
    mask = torch.ones(1, 64, 64, dtype=torch.bool)
    mask[..., 40:] = False
    black = IMAGE.masked_fill(~mask[:, None], 0)
    dirty = IMAGE.masked_fill(~mask[:, None], hidden)
    expected = MODEL({"image0": black, "image1": IMAGE, "mask0": mask})
    found = MODEL({"image0": dirty, "image1": IMAGE, "mask0": mask})
    assert len(expected["confidence"]) > 0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    MODEL.extract_features(dirty, mask)
    with pytest.raises(ValueError, match="image0: expected"):
        MODEL({"image0": dirty, "image1": IMAGE, "mask0": mask | True})


def test_no_gradient_comes_from_under_a_mask() -> None:
    mask = torch.ones(1, 64, 64, dtype=torch.bool)
    mask[..., 40:] = False
    image = IMAGE.masked_fill(~mask[:, None], float("nan")).requires_grad_()
    MODEL.extract_features(image, mask)["coarse"].square().sum().backward()
    assert image.grad is not None
    assert torch.isfinite(image.grad).all()
    assert image.grad[~mask[:, None]].abs().max() == 0
    assert image.grad.abs().max() > 0
