# SPDX-License-Identifier: Apache-2.0
"""Robust non-linear least squares on a chart, with the gradient of its minimum.

The iterations run without a graph. At the minimum x* of a cost C(x, d) of the data d, the first derivative
vanishes identically, so `dx*/dd = -C_xx^-1 C_xd` (the implicit function theorem). One differentiable Newton
step with a constant Hessian, whose value is subtracted again, has this derivative and leaves the value as it
is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor

from eloftr_ops.geometry._charts import ChartT
from eloftr_ops.geometry._covariances import Covariances
from eloftr_ops.geometry._linalg import LEAST_GAP
from eloftr_ops.geometry._residuals import Residual
from eloftr_ops.geometry._robust import robust_cost, robust_weight

# Gauss-Newton step, in local coordinates of unit size, below which the minimum counts as reached.
CONVERGED = 1e-4
# A cost may rise by this share of itself: rounding, not a failed step.
SLACK = 1e-9
POLISHING_STEPS = 6
# Step below which another one changes nothing but rounding.
SETTLED = 1e-12


class RobustCost(NamedTuple):
    """A robust, weighted sum of squared residuals of padded matches; points in a frame of unit size."""

    residual: Residual
    points0: Tensor  # (B, N, 2), or (B, N, 3) in space
    points1: Tensor  # (B, N, 2)
    weights: Tensor  # (B, N)
    scale: Tensor  # (B,), robust scale in the unit of the points
    kernel: str | None
    covariances: Covariances | None = None  # relative ones

    def map(self, function: Callable[[Tensor], Tensor]) -> "RobustCost":
        """Apply a function to all data."""
        return RobustCost(
            self.residual,
            function(self.points0),
            function(self.points1),
            function(self.weights),
            function(self.scale),
            self.kernel,
            None if self.covariances is None else self.covariances.map(function),
        )

    def detached(self) -> "RobustCost":
        """Return the same objective without a graph."""
        return self.map(lambda x: x.detach())

    def with_gradient_where(self, pairs: Tensor) -> "RobustCost":
        """Return the same objective, whose other pairs pass no gradient on, not even NaN."""
        return self.map(lambda x: torch.where(pairs.view(-1, *([1] * (x.ndim - 1))), x, x.detach()))

    def _shares(self) -> Tensor:
        total = self.weights.detach().sum(1, keepdim=True)
        return self.weights / torch.where(total > 0, total, 1.0)

    def squared(self, matrix: Tensor) -> Tensor:
        """Squared residuals `(B, N)`."""
        return self.residual.value(matrix, self.points0, self.points1, self.covariances).square().sum(-1)

    def cost(self, matrix: Tensor) -> Tensor:
        """Cost `(B,)`."""
        return (self._shares() * robust_cost(self.squared(matrix), self.scale, self.kernel)).sum(1)

    def normal_equations(self, matrix: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Gauss-Newton matrix `(B, p, p)` and gradient of the cost `(B, p)` in local coordinates."""
        data = (matrix, self.points0, self.points1, self.covariances)
        value = self.residual.value(*data)
        slope = self.residual.jacobian(*data) @ tangent[:, None]
        weight = self._shares() * robust_weight(value.square().sum(-1), self.scale, self.kernel)
        scaled = (slope * weight[..., None, None]).flatten(1, 2)
        return scaled.mT @ slope.flatten(1, 2), (scaled.mT @ value.flatten(1, 2)[..., None])[..., 0]


@dataclass(frozen=True)
class Minimum(Generic[ChartT]):
    """Where the iterations ended."""

    chart: ChartT
    delta: Tensor  # (B, p): exactly zero, carrying the gradient
    determined: Tensor  # (B,) bool: the data fix every local coordinate
    conditioning: Tensor  # (B,): smallest over largest eigenvalue of the Gauss-Newton matrix
    converged: Tensor  # (B,) bool


def minimise(chart: ChartT, objective: RobustCost, steps: int, least_gap: Tensor) -> Minimum[ChartT]:
    """Levenberg-Marquardt from `chart`, then the implicit gradient at the end point.

    Args:
        chart: start, without gradient.
        objective: what to minimise; its points and weights may carry gradients.
        steps: the most iterations; stops early when every pair has converged.
        least_gap: `(B,)`, relative eigenvalue of the Gauss-Newton matrix below which a pair is ill-posed.

    Returns:
        The minimum. A pair that is ill-posed or has not converged has gradient zero: away from the minimum
        the implicit gradient does not exist, and its formula is unbounded.
    """
    constant = objective.detached()
    with torch.no_grad():
        chart = levenberg_marquardt(chart, constant, steps)
        if objective.kernel is not None:
            chart = _polished(chart, constant)
        zero = chart.tangent.new_zeros(chart.tangent.shape[0], chart.tangent.shape[2])
        gauss_newton, slope = constant.normal_equations(chart.at(zero), chart.tangent)
        finite = torch.isfinite(gauss_newton).flatten(1).all(1)
        eye = torch.eye(zero.shape[1], dtype=zero.dtype, device=zero.device)
        gauss_newton = torch.where(finite[:, None, None], gauss_newton, eye)
        values = torch.linalg.eigvalsh(gauss_newton)
        conditioning = values[:, 0] / torch.where(values[:, -1] > 0, values[:, -1], 1.0)
        determined = finite & (conditioning > least_gap)
        safe = torch.where(determined[:, None, None], gauss_newton, eye)
        newton = torch.linalg.solve_ex(safe, slope)[0]
        converged = determined & (torch.linalg.vector_norm(newton, dim=1) < CONVERGED)
    delta = zero
    if torch.is_grad_enabled() and _carries_gradient(objective):
        hessian = _usable_hessian(chart, constant, safe, converged)
        _, live = objective.with_gradient_where(converged).normal_equations(chart.at(zero), chart.tangent)
        live = torch.where(converged[:, None], live, 0.0)
        step = -torch.linalg.solve_ex(hessian, live)[0]
        delta = first_order(step - step.detach())
    return Minimum(chart, delta, determined, conditioning, converged)


class _FirstOrder(torch.autograd.Function):
    """Identity that refuses a second differentiation, for which the constant Hessian would be wrong."""

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        # Tied to the value too: a loss linear in the estimate has a constant incoming gradient.
        return _refuse(grads[0], value)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError(
            "a refined estimate can be differentiated once: its gradient comes from the implicit function theorem; "
            "use refine_steps=0 and robust=None for second derivatives"
        )


_refuse: Callable[[Tensor, Tensor], Tensor] = _Refuse.apply
first_order: Callable[[Tensor], Tensor] = _FirstOrder.apply


def _carries_gradient(objective: RobustCost) -> bool:
    data = [objective.points0, objective.points1, objective.weights, objective.scale]
    data += [] if objective.covariances is None else objective.covariances.given
    return any(part.requires_grad for part in data)


def levenberg_marquardt(chart: ChartT, objective: RobustCost, steps: int) -> ChartT:
    tangent = chart.tangent
    zero = tangent.new_zeros(tangent.shape[0], tangent.shape[2])
    eye = torch.eye(zero.shape[1], dtype=zero.dtype, device=zero.device)
    cost = objective.cost(chart.at(zero))
    damping = zero.new_full((zero.shape[0],), 1e-4)
    for _ in range(steps):
        matrix, slope = objective.normal_equations(chart.at(zero), chart.tangent)
        ridge = damping[:, None, None] * (matrix.diagonal(dim1=-2, dim2=-1)[:, :, None] * eye) + 1e-15 * eye
        step = -torch.linalg.solve_ex(matrix + ridge, slope)[0].nan_to_num(0.0, 0.0, 0.0)
        candidate = chart.moved(step)
        new_cost = objective.cost(candidate.at(zero))
        accepted = new_cost <= cost * (1.0 + SLACK)
        chart = candidate.where(accepted, chart)
        cost = torch.where(accepted, new_cost, cost)
        damping = (damping * torch.where(accepted, 0.1, 10.0)).clamp(1e-12, 1e6)
        if bool((torch.linalg.vector_norm(step, dim=1) < SETTLED).all()):
            break
    return chart


def _polished(chart: ChartT, objective: RobustCost) -> ChartT:
    """Newton steps with the full Hessian; re-weighting alone converges too slowly for an exact gradient."""
    for _ in range(POLISHING_STEPS):
        hessian = _hessian(chart, objective)
        zero = hessian.new_zeros(hessian.shape[0], hessian.shape[1])
        definite = _positive_definite(hessian)
        eye = torch.eye(zero.shape[1], dtype=zero.dtype, device=zero.device)
        _, slope = objective.normal_equations(chart.at(zero), chart.tangent)
        safe = torch.where(definite[:, None, None], hessian, eye)
        step = -torch.linalg.solve_ex(safe, slope)[0]
        candidate = chart.moved(step)
        cost, new_cost = objective.cost(chart.at(zero)), objective.cost(candidate.at(zero))
        chart = candidate.where(definite & (new_cost <= cost * (1.0 + SLACK)), chart)
        if bool((torch.linalg.vector_norm(step, dim=1) < SETTLED).all()):
            break
    return chart


def _usable_hessian(chart: ChartT, objective: RobustCost, gauss_newton: Tensor, converged: Tensor) -> Tensor:
    """Full Hessian where it is positive definite, the Gauss-Newton matrix (or the identity) elsewhere."""
    hessian = _hessian(chart, objective)
    definite = converged & _positive_definite(hessian)
    return torch.where(definite[:, None, None], hessian, gauss_newton)


def _positive_definite(matrix: Tensor) -> Tensor:
    size = matrix.diagonal(dim1=-2, dim2=-1).abs().sum(-1)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    shifted = matrix - (LEAST_GAP * size)[:, None, None] * eye
    finite = torch.isfinite(shifted).flatten(1).all(1)
    info: Tensor = torch.linalg.cholesky_ex(torch.where(finite[:, None, None], shifted, eye))[1]
    return finite & (info == 0)


def _hessian(chart: ChartT, objective: RobustCost) -> Tensor:
    """Second derivative `(B, p, p)` of the cost; pairs do not interact, so p backward passes suffice."""
    with torch.inference_mode(False), torch.enable_grad():
        normal = objective.map(lambda x: x.clone())
        start = chart.where(torch.ones_like(objective.scale, dtype=torch.bool), chart)
        delta = start.tangent.new_zeros(start.tangent.shape[0], start.tangent.shape[2])

        def slope(moved: Tensor) -> Tensor:
            gradient: Tensor = torch.func.grad(lambda d: normal.cost(start.at(d)).sum())(moved)
            return gradient

        pull_back = torch.func.vjp(slope, delta)[1]
        units = torch.eye(delta.shape[1], dtype=delta.dtype, device=delta.device)
        rows = [pull_back(unit.expand_as(delta).contiguous())[0] for unit in units]
    hessian = torch.stack(rows, dim=1).detach()
    return 0.5 * (hessian + hessian.mT)
