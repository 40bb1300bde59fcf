# SPDX-License-Identifier: Apache-2.0
"""Derivatives that an op does not compute are refused with the reason; none is silently zero."""

import pytest
import torch

from eloftr_kernels import MlpWeights, backend, dual_softmax_lse, mutual_best, upsample_mlp, window_match
from eloftr_kernels.dual_softmax import why_not


@pytest.mark.parametrize("op", [dual_softmax_lse, mutual_best])
def test_a_temperature_that_requires_a_gradient_is_refused(op):
    features = torch.randn(1, 5, 16)
    with pytest.raises(TypeError, match=r"temperature: expected a number.*requires a gradient"):
        op(features, features, torch.tensor(0.1, requires_grad=True))


@pytest.mark.parametrize("name", ["subpixel_temperature", "soft_temperature"])
def test_a_temperature_of_window_match_that_requires_a_gradient_is_refused(name):
    fine, index = torch.randn(1, 8, 8, 8), torch.zeros(1, dtype=torch.int64)
    options = {"subpixel_channels": 2, "subpixel_temperature": 1.0}
    options[name] = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(TypeError, match=rf"{name}: expected a number.*requires a gradient"):
        window_match(fine, fine, index, index, index, **options)


def test_kernels_refuse_forward_mode_and_give_the_reason():
    features = torch.randn(1, 5, 16)
    assert "forward-mode" not in str(why_not(features, features))
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in str(why_not(features, features))
        with backend("triton"), pytest.raises(RuntimeError, match="forward-mode derivative"):
            dual_softmax_lse(features, features, 0.1)


def test_forward_mode_through_the_reference_agrees_with_finite_differences():
    torch.manual_seed(0)
    x, tangent = torch.randn(2, 1, 4, 4, 4, dtype=torch.float64)
    message = torch.randn(1, 4, 1, 1, dtype=torch.float64)
    weights = [torch.randn(s, dtype=torch.float64) for s in ((8, 8), (4, 8), (4,), (4,))]

    def update(value):
        return upsample_mlp(value, message, MlpWeights(*weights))

    _, along = torch.func.jvp(update, (x,), (tangent,))
    difference = (update(x + 1e-6 * tangent) - update(x - 1e-6 * tangent)) / 2e-6
    torch.testing.assert_close(along, difference, rtol=1e-6, atol=1e-6)
