# SPDX-License-Identifier: Apache-2.0
"""Gradient checks that cannot pass because nothing is differentiable."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def check_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    *,
    eps: float = 1e-5,
    atol: float = 1e-6,
    rtol: float = 1e-4,
    fast: bool = False,
) -> None:
    """Compare the analytic Jacobian of every output in every input with finite differences, in float64.

    `torch.autograd.gradcheck` accepts a function without a differentiable output: it then verifies that the
    numerical gradient is zero. This one refuses it, and refuses every Jacobian that is zero throughout.

    Args:
        function: of the inputs; returns a tensor or a tuple of tensors, all of them to be checked.
        inputs: float64 tensors; each is checked.
        eps: step of the finite differences.
        atol: absolute tolerance on an entry of a Jacobian.
        rtol: relative tolerance.
        fast: compare along one random direction of inputs and outputs instead of entry by entry.

    Raises:
        AssertionError: an input is not float64; an output does not require grad; an output does not depend on any
            input, or an input moves no output; a gradient is not finite; analytic and numerical Jacobian differ.
    """
    for k, x in enumerate(inputs):
        assert x.dtype == torch.float64, f"input {k}: finite differences need float64, got {x.dtype}"
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    outputs = (result,) if isinstance(result, Tensor) else tuple(result)
    assert outputs, "the function returned nothing to check"
    moves = torch.zeros(len(outputs), len(leaves), dtype=torch.bool)
    for i, output in enumerate(outputs):
        assert output.requires_grad, f"output {i} does not require grad: the check would be vacuous"
        gradients = torch.autograd.grad(
            (output * _cotangent(output)).sum(), leaves, retain_graph=True, allow_unused=True
        )
        for k, gradient in enumerate(gradients):
            if gradient is not None:
                assert bool(torch.isfinite(gradient).all()), f"gradient of output {i} in input {k} is not finite"
                moves[i, k] = bool(gradient.any())
    for i in range(len(outputs)):
        assert bool(moves[i].any()), f"output {i} has an all-zero Jacobian: the check would be vacuous"
    for k in range(len(leaves)):
        assert bool(moves[:, k].any()), f"input {k} moves no output: the check would be vacuous"
    try:
        torch.autograd.gradcheck(function, leaves, eps=eps, atol=atol, rtol=rtol, fast_mode=fast)
    except RuntimeError as error:  # GradcheckError is one
        raise AssertionError(str(error)) from error


def finite_gradients(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a random projection of `output`; fails where output or gradient is NaN or infinite.

    Args:
        output: must require grad.
        inputs: what to differentiate in; one that is not used counts as gradient zero.

    Returns:
        One gradient per input.
    """
    assert output.requires_grad, "the output does not require grad"
    assert bool(torch.isfinite(output).all()), "the value is not finite"
    gradients = torch.autograd.grad((output * _cotangent(output)).sum(), inputs, retain_graph=True, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]
    for k, gradient in enumerate(filled):
        assert bool(torch.isfinite(gradient).all()), f"the gradient in input {k} is not finite"
    return filled


def _cotangent(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
