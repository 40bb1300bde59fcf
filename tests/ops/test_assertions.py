# SPDX-License-Identifier: Apache-2.0
"""The assertions that kernels are held to reject the faults they are there for."""

import pytest
import torch
from torch import Tensor

from support.ops import assert_as_accurate, checked_gradcheck, poisoned_buffers

EXACT = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SAME = EXACT.half()


def one_row(value: float) -> Tensor:
    faulty = SAME.clone()
    faulty[2, 3] = value
    return faulty


FAULTS = {
    "zeroed": SAME * 0,
    "sign": -SAME,
    "scaled": SAME * 1.02,
    "axes": SAME.transpose(1, 2).reshape(SAME.shape),
    "shifted": SAME.roll(1, 2),
    "half a step": (SAME + SAME.roll(1, 2)) / 2,
    "one stale row": one_row(0),
    "not finite": one_row(float("nan")),
    "dtype": SAME.float(),
    "shape": SAME[:, :, :7],
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_faults_are_rejected(fault: str) -> None:
    assert_as_accurate("x", SAME.clone(), SAME, EXACT)
    with pytest.raises(AssertionError, match="x: "):
        assert_as_accurate("x", FAULTS[fault], SAME, EXACT)


def test_a_zero_result_must_be_exactly_zero() -> None:
    zero = torch.zeros(3)
    assert_as_accurate("x", zero, zero, zero.double())
    with pytest.raises(AssertionError):
        assert_as_accurate("x", zero + 1e-30, zero, zero.double())


def test_gradcheck_is_not_vacuous() -> None:
    x = torch.randn(3, dtype=torch.float64)
    checked_gradcheck(torch.sin, [x])
    with pytest.raises(AssertionError, match="needs no gradient"):
        checked_gradcheck(lambda t: t.detach(), [x])
    with pytest.raises(AssertionError, match="is zero"):
        checked_gradcheck(lambda t: t * 0, [x])


def test_unwritten_buffers_show() -> None:
    with poisoned_buffers():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.ones(2)).isnan().all()
        assert torch.ones(2).new_empty((3,), dtype=torch.bool).all()
        assert (torch.empty(2, dtype=torch.int32) == -1).all()
