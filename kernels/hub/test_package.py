# SPDX-License-Identifier: Apache-2.0
"""Tests that ship with the package; kernel-builder runs those marked ``kernels_ci``."""

import pytest
import torch

import eloftr_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.kernels_ci
def test_dual_softmax_against_the_formula() -> None:
    features0, features1 = (torch.randn(1, 96, 32, device=DEVICE) for _ in range(2))
    row, column = eloftr_kernels.dual_softmax_lse(features0, features1, temperature=0.5)
    scores = features0 @ features1.mT / 0.5
    # float32 products on a GPU may be rounded to TF32: 10 bits of mantissa.
    torch.testing.assert_close(row, scores.logsumexp(2), atol=5e-2, rtol=0)
    torch.testing.assert_close(column, scores.logsumexp(1), atol=5e-2, rtol=0)


@pytest.mark.kernels_ci
def test_ops_are_in_a_namespace_of_their_own() -> None:
    from eloftr_kernels._ops import add_op_namespace_prefix

    name = add_op_namespace_prefix("dual_softmax_lse")
    assert not name.startswith("eloftr::")
    namespace, op = name.split("::")
    assert hasattr(getattr(torch.ops, namespace), op)
