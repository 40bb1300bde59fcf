# SPDX-License-Identifier: Apache-2.0
"""The gradient checks reject what they exist to reject."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from support.gradients import check_gradients, finite_gradients


class _Cube(torch.autograd.Function):
    """`x^3` with a backward pass that a test may break."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.fault = fault
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.fault(3 * x**2 * grads[0]), None


def _cube(fault: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: _Cube.apply(x, fault)


X = torch.tensor([[0.61, -1.13], [2.07, 1.57]], dtype=torch.float64)


def test_accepts_a_right_gradient() -> None:
    check_gradients(_cube(lambda g: g), [X])


@pytest.mark.parametrize(
    "fault",
    [
        lambda g: -g,
        lambda g: g.mT.contiguous(),
        lambda g: 1.01 * g,
        lambda g: torch.cat([g[:1], torch.zeros_like(g[1:])]),
        lambda g: g.float().half().double(),
    ],
    ids=["flipped sign", "swapped axes", "one per cent", "one stale row", "half precision"],
)
def test_rejects_a_wrong_gradient(fault: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError):
        check_gradients(_cube(fault), [X])


def test_rejects_an_output_without_graph_which_gradcheck_accepts() -> None:
    def piecewise_constant(x: Tensor) -> Tensor:
        return x.detach().round()

    assert torch.autograd.gradcheck(piecewise_constant, [X.clone().requires_grad_()])
    with pytest.raises(AssertionError, match="does not require grad"):
        check_gradients(piecewise_constant, [X])


def test_rejects_one_output_without_graph_among_others() -> None:
    with pytest.raises(AssertionError, match="output 1 does not require grad"):
        check_gradients(lambda x: (x**2, x.detach() * 2), [X])


def test_rejects_a_zero_jacobian_which_gradcheck_accepts() -> None:
    def constant(x: Tensor) -> Tensor:
        return 0.0 * x + 1.0

    assert torch.autograd.gradcheck(constant, [X.clone().requires_grad_()])
    with pytest.raises(AssertionError, match="all-zero Jacobian"):
        check_gradients(constant, [X])


def test_rejects_an_input_that_moves_nothing() -> None:
    with pytest.raises(AssertionError, match="input 1 moves no output"):
        check_gradients(lambda x, y: x**2, [X, X])


def test_rejects_float32_inputs() -> None:
    with pytest.raises(AssertionError, match="float64"):
        check_gradients(lambda x: x**2, [X.float()])


def test_rejects_a_gradient_that_is_not_finite() -> None:
    with pytest.raises(AssertionError, match="not finite"):
        check_gradients(torch.sqrt, [torch.zeros(2, dtype=torch.float64)])


def test_finite_gradients_returns_them() -> None:
    x, unused = X.clone().requires_grad_(), X.clone().requires_grad_()
    moved, still = finite_gradients(3.0 * x, [x, unused])
    assert bool((moved != 0).all())
    assert not bool(still.any())


@pytest.mark.parametrize("planted", ["value", "gradient", "graph"])
def test_finite_gradients_rejects(planted: str) -> None:
    x = torch.zeros(2, requires_grad=True)
    broken = {"value": lambda: 1.0 / x, "gradient": x.sqrt, "graph": lambda: x.detach()}[planted]
    with pytest.raises(AssertionError):
        finite_gradients(broken(), [x])
