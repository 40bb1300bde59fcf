# SPDX-License-Identifier: Apache-2.0
"""The loss without labels: zero where the images agree, lower at the truth, finite on anything."""

import math

import pytest
import torch
from torch import Tensor

from eloftr_ops.losses import photometric_loss
from support.gradients import check_gradients, finite_gradients


def _texture(height: int, width: int, shift: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """A smooth pattern `(1, 1, H, W)`, sampled at pixel centres, moved by `shift` pixels (x, y)."""
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) + 0.5,
        torch.arange(width, dtype=torch.float64) + 0.5,
        indexing="ij",
    )
    x, y = x - shift[0], y - shift[1]
    pattern = torch.sin(0.4 * x) * torch.cos(0.3 * y) + 0.5 * torch.sin(0.17 * x + 0.23 * y)
    return 0.5 + 0.2 * pattern[None, None]


def _translation(x: float, y: float) -> Tensor:
    return torch.tensor([[[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]]], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_images_cost_nothing(dtype: torch.dtype) -> None:
    image = _texture(24, 32).to(dtype)
    H = torch.eye(3, dtype=dtype)[None].clone().requires_grad_()
    loss = photometric_loss(image, image.clone(), H)
    assert float(loss.detach()) < 1e-9
    (gradient,) = finite_gradients(loss, [H])
    # Grey values reach float32 rounding; the derivative in the perspective entries is multiplied by x^2.
    assert float(gradient.abs().max()) < (1e-2 if dtype == torch.float32 else 1e-9)


def test_a_shift_by_whole_pixels_is_exact_in_the_half_pixel_frame() -> None:
    image0, image1 = _texture(24, 32), _texture(24, 32, shift=(3.0, -2.0))
    assert float(photometric_loss(image0, image1, _translation(3.0, -2.0), match_contrast=False)) < 1e-9
    assert float(photometric_loss(image0, image1, _translation(2.5, -2.0))) > 0.01
    assert float(photometric_loss(image0, image1, _translation(-3.0, 2.0))) > 0.1


def test_exposure_costs_nothing_with_matched_contrast() -> None:
    image0, image1 = _texture(24, 32), 0.3 + 0.5 * _texture(24, 32, shift=(2.0, 0.0))
    H = _translation(2.0, 0.0)
    # The floor under the variance, 1e-4, leaves a difference of a few thousandths.
    assert float(photometric_loss(image0, image1, H)) < 5e-3
    assert float(photometric_loss(image0, image1, H, match_contrast=False)) > 0.05


def test_gradient_agrees_with_finite_differences() -> None:
    image0, image1 = _texture(8, 10), _texture(8, 10, shift=(0.6, 0.3))
    H = torch.tensor([[[1.01, 0.02, 0.313], [-0.01, 0.99, 0.217], [1e-4, -2e-4, 1.0]]], dtype=torch.float64)
    check_gradients(lambda a, b, h: photometric_loss(a, b, h), [image0, image1, H], eps=1e-7, rtol=1e-3)


def test_descending_finds_the_shift() -> None:
    image0, image1 = _texture(32, 40), _texture(32, 40, shift=(1.4, -0.8))
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for _ in range(150):
        H = torch.eye(3, dtype=torch.float64)[None] + torch.nn.functional.pad(shift[None, :, None], (2, 0, 0, 1))
        (gradient,) = torch.autograd.grad(photometric_loss(image0, image1, H), shift)
        with torch.no_grad():
            shift -= 0.3 * gradient
    assert shift.tolist() == pytest.approx([1.4, -0.8], abs=0.1)


@pytest.mark.parametrize("case", ["away", "horizon", "behind", "zero", "flat images"])
def test_nothing_to_compare_is_finite(case: str) -> None:
    image = _texture(16, 20).float()
    H = {
        "away": _translation(1e6, 0.0),
        "horizon": torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-0.1, 0.0, 1.0]]]),
        "behind": torch.diag(torch.tensor([1.0, 1.0, -1.0]))[None],
        "zero": torch.zeros(1, 3, 3),
        "flat images": torch.eye(3)[None],
    }[case]
    image1 = torch.full_like(image, 0.5) if case == "flat images" else image.clone()
    inputs = [image.requires_grad_(), image1.requires_grad_(), H.float().requires_grad_()]
    loss = photometric_loss(*inputs)
    gradients = finite_gradients(loss, inputs)
    if case in ("away", "behind"):
        assert float(loss.detach()) == 0.0
        assert not any(bool(g.any()) for g in gradients)


def test_pairs_without_overlap_do_not_dilute_the_mean() -> None:
    image0, image1 = (
        _texture(16, 20).repeat(2, 1, 1, 1),
        _texture(16, 20, shift=(2.0, 0.0)).repeat(2, 1, 1, 1),
    )
    H = torch.cat([_translation(0.0, 0.0), _translation(500.0, 0.0)])
    each = photometric_loss(image0, image1, H, reduction="none")
    assert float(each[1]) == 0.0
    assert torch.equal(photometric_loss(image0, image1, H), each[0])
    assert math.isclose(float(photometric_loss(image0, image1, H, valid=torch.tensor([False, True]))), 0.0)


def test_images_may_differ_in_size() -> None:
    image0, image1 = _texture(16, 20), _texture(24, 28)
    assert float(photometric_loss(image0, image1, _translation(0.0, 0.0), match_contrast=False)) < 1e-9


def test_arguments_that_make_no_sense_are_named() -> None:
    image, H = _texture(8, 8), _translation(0.0, 0.0)
    with pytest.raises(TypeError, match="image1: expected a floating point dtype"):
        photometric_loss(image, (255 * image).byte(), H)
    with pytest.raises(ValueError, match=r"image0: expected shape \(B, C, H, W\)"):
        photometric_loss(image[0], image, H)
    with pytest.raises(ValueError, match="image1: expected B and C of image0"):
        photometric_loss(image, image.repeat(1, 3, 1, 1), H)
    with pytest.raises(ValueError, match="least_overlap"):
        photometric_loss(image, image, H, least_overlap=2.0)
