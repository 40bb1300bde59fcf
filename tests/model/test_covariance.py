# SPDX-License-Identifier: Apache-2.0
"""Covariances of matches: from window moments, in every mode and way to run, and calibrated for the embedded model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import eloftr_ops
from eloftr_ops import EfficientLoFTR, EfficientLoFTRConfig
from eloftr_ops.data.synthetic import HomographyPairs
from eloftr_ops.training.calibration import (
    calibration_report,
    chi_square_quantile,
    fit_covariances,
    measure_errors,
    squared_mahalanobis,
)
from support.models import random_images, tiny_model

MODES = ("hard", "straight_through", "soft")


def pair(batch: int = 2) -> dict[str, Tensor]:
    image0 = random_images(batch, 64, 96, seed=3)
    return {"image0": image0, "image1": 0.8 * image0.roll((3, 5), (-2, -1)) + 0.1}


def assert_covariances(out: dict[str, Tensor]) -> None:
    for name in ("covariance0", "covariance1"):
        S = out[name]
        assert S.shape == (len(out["confidence"]), 2, 2)
        assert torch.equal(S, S.mT)
        assert bool((torch.linalg.eigvalsh(S.double()) > 1e-4).all())  # finite too: NaN is not larger


@pytest.mark.parametrize("mode", MODES)
def test_covariances_come_on_request_and_change_nothing_else(mode: str) -> None:
    model = tiny_model(1)
    plain, asked = model(pair(), mode=mode), model(pair(), mode=mode, covariance=True)
    assert set(asked) - set(plain) == {"covariance0", "covariance1"}
    assert all(torch.equal(plain[name], asked[name]) for name in plain)
    assert_covariances(asked)
    assert asked["covariance0"].requires_grad
    hard = model(pair(), mode="hard", covariance=True)
    assert mode == "soft" or torch.equal(hard["covariance1"], asked["covariance1"])


def test_a_batch_with_masks_has_the_covariances_of_its_pairs() -> None:
    model, data = tiny_model(1), pair()
    data["mask0"] = torch.ones(2, 64, 96, dtype=torch.bool)
    data["mask0"][0, :, 70:] = False
    with torch.no_grad():
        whole = model(data, covariance=True)  # a CPU runs it pair by pair
    graded = model(data, covariance=True)  # and with a graph as one batch
    alone = model({name: value[:1] for name, value in data.items()}, covariance=True)
    assert_covariances(whole)
    first = whole["batch_indexes"] == 0
    for name in ("covariance0", "covariance1"):
        torch.testing.assert_close(whole[name][first], alone[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(whole[name], graded[name], rtol=1e-4, atol=1e-5)


def test_no_match_has_no_covariance() -> None:
    out = tiny_model(1, threshold=1.0)(pair(), covariance=True)
    assert out["covariance0"].shape == (0, 2, 2)
    out["covariance1"].sum().backward()


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_constant_images_have_finite_covariances(level: float) -> None:
    image = torch.full((1, 1, 64, 64), level, requires_grad=True)
    out = tiny_model(1)({"image0": image, "image1": image}, covariance=True)
    assert_covariances(out)
    (out["covariance0"].sum() + out["covariance1"].sum()).backward()
    assert image.grad is not None
    assert bool(torch.isfinite(image.grad).all())


def test_the_optimized_copy_has_them_too() -> None:
    model = tiny_model(1)
    with torch.no_grad():
        plain, fast = model(pair(), covariance=True), model.optimize_for_inference()(pair(), covariance=True)
    assert torch.equal(plain["batch_indexes"], fast["batch_indexes"])
    torch.testing.assert_close(plain["covariance1"], fast["covariance1"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bad", [(1.0,) * 6, (1.0,) * 6 + (-1.0,), (float("nan"),) + (1.0,) * 6, (9.0,) * 7, "1"])
def test_bad_calibrations_are_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="covariance_calibration: expected"):
        EfficientLoFTRConfig(covariance_calibration=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["eloftr_ops", "authors", "transformers"])
def test_the_calibration_is_saved_with_the_weights(layout: str, tmp_path: Path) -> None:
    numbers = (-0.5, 0.25, 0.5, 0.1, 0.4, 0.7, 0.2)
    model = tiny_model(1, covariance_calibration=numbers, centred_subpixel=False)
    model.save_pretrained(tmp_path, layout=layout)  # type: ignore[arg-type]
    assert EfficientLoFTR.from_pretrained(tmp_path).config.covariance_calibration == numbers


@pytest.fixture(scope="module")
def pairs() -> HomographyPairs:
    """Of the two photographs that the package brings; the embedded model has not seen them."""
    folder = Path(eloftr_ops.__file__).parent / "assets"
    return HomographyPairs(
        torch.from_numpy(np.array(Image.open(folder / f"demo_{k}.jpg").convert("L"))) for k in (0, 1)
    )


def test_the_embedded_model_is_calibrated(pairs: HomographyPairs) -> None:
    model, generator = EfficientLoFTR.from_pretrained(), torch.Generator().manual_seed(4)
    errors = measure_errors(model, (pairs(1, (192, 256), generator) for _ in range(4)))
    report = calibration_report(squared_mahalanobis(errors, model.config.covariance_calibration))
    assert report.matches > 500
    # Four pairs: their means alone differ by a third (docs/geometry.md has 10 % over many).
    assert 1.3 < report.mean < 2.7
    raw = calibration_report(squared_mahalanobis(errors, EfficientLoFTRConfig().covariance_calibration))
    assert abs(report.mean - 2.0) < abs(raw.mean - 2.0)
    fitted = squared_mahalanobis(errors, fit_covariances(errors))
    assert abs(float(fitted.mean()) - 2.0) < 0.05
    assert abs(chi_square_quantile(0.95) - 5.991) < 1e-3
