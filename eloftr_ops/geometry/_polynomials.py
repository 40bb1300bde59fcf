# SPDX-License-Identifier: Apache-2.0
"""Null spaces of a few equations and real roots of polynomials, for millions of minimal samples at once."""

import math

import torch
from torch import Tensor

BISECTIONS = 12
SECANTS = 4


def null_space(rows: Tensor) -> Tensor:
    """Orthonormal basis `(S, n - m, n)` of the vectors that m equations `(S, m, n)` map to zero.

    By elimination, in coordinates turned by a fixed rotation, so that no special position of the points makes a
    pivot vanish. Faster than a singular value decomposition by an order of magnitude.
    """
    count, size = rows.shape[1:]
    turn = _fixed_rotation(size).to(rows)
    turned = rows @ turn
    solved = torch.linalg.solve_ex(turned[..., :count], turned[..., count:])[0]
    free = torch.eye(size - count, dtype=rows.dtype, device=rows.device).expand(rows.shape[0], -1, -1)
    vectors = (turn @ torch.cat([-solved, free], dim=1)).mT
    basis: list[Tensor] = []
    for vector in vectors.unbind(1):
        for other in basis:
            vector = vector - (vector * other).sum(1, keepdim=True) * other
        basis.append(vector / torch.linalg.vector_norm(vector, dim=1, keepdim=True))
    return torch.stack(basis, dim=1)


def real_roots(coefficients: Tensor, most: int, directions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Real roots (c, s) on the unit circle of homogeneous polynomials `sum_k a_k c^(d - k) s^k`.

    Changes of sign between evenly spread directions, then bisection and secants. Two roots closer than the spacing
    are missed; such samples are ill-conditioned.

    Args:
        coefficients: `(S, d + 1)`.
        most: the most roots to return.
        directions: how many directions are tried.

    Returns:
        c and s `(S, most)`, and `(S, most)` bool, which of them are roots.
    """
    coefficients = coefficients / coefficients.abs().amax(1, keepdim=True).clamp_min(1e-300)
    degree = coefficients.shape[1] - 1
    angles = torch.arange(directions + 1, dtype=coefficients.dtype, device=coefficients.device)
    angles = angles * (math.pi / directions)
    c, s = angles.cos(), angles.sin()
    values = coefficients @ torch.stack([c ** (degree - k) * s**k for k in range(degree + 1)])
    change = (values[:, :-1] > 0) != (values[:, 1:] > 0)
    found, place = change.to(torch.uint8).topk(most, dim=1)
    low, high = angles[place], angles[place + 1]
    at_low, at_high = values.gather(1, place), values.gather(1, place + 1)
    for step in range(BISECTIONS + SECANTS):
        middle = 0.5 * (low + high)
        if step >= BISECTIONS:
            slope = at_high - at_low
            secant = low - at_low * (high - low) / torch.where(slope == 0, 1.0, slope)
            middle = torch.minimum(torch.maximum(secant, low), high)
        value = _evaluated(coefficients, middle)
        left = (value > 0) == (at_low > 0)
        low, at_low = torch.where(left, middle, low), torch.where(left, value, at_low)
        high, at_high = torch.where(left, high, middle), torch.where(left, at_high, value)
    best = torch.where(at_low.abs() < at_high.abs(), low, high)
    return best.cos(), best.sin(), found > 0


def _evaluated(coefficients: Tensor, angles: Tensor) -> Tensor:
    """Values `(S, C)` at angles, by Horner's rule in whichever of tan and cot is smaller."""
    c, s = angles.cos(), angles.sin()
    steep = s.abs() > c.abs()
    small, large = torch.where(steep, c, s), torch.where(steep, s, c)
    ratio = small / large
    value = torch.zeros_like(angles)
    count = coefficients.shape[1]
    for k in range(count):
        ahead = torch.where(steep, coefficients[:, k, None], coefficients[:, count - 1 - k, None])
        value = value * ratio + ahead
    result: Tensor = value * large ** (count - 1)
    return result


def _fixed_rotation(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rotation: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return rotation


def cubic_roots(coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Real roots (c, s) of homogeneous cubics `a0 c^3 + a1 c^2 s + a2 c s^2 + a3 s^3`, in closed form (Viete, Cardano).

    Args:
        coefficients: `(S, 4)`.

    Returns:
        c and s `(S, 3)`, and `(S, 3)` bool, which of them are roots: one or three.
    """
    # Of s / c and c / s the one whose leading coefficient is larger.
    swapped = coefficients[:, :1].abs() > coefficients[:, 3:].abs()
    lead, second, first, constant = torch.where(swapped, coefficients, coefficients.flip(1)).unbind(1)
    lead = torch.where(lead == 0, 1.0, lead)
    a, b, d = second / lead, first / lead, constant / lead
    q, r = (a * a - 3 * b) / 9, (2 * a**3 - 9 * a * b + 27 * d) / 54
    three = r.square() < q**3
    root = q.clamp_min(0).sqrt()
    angle = torch.arccos((r / (root**3).clamp_min(1e-300)).clamp(-1, 1))
    turns = torch.arange(3, dtype=q.dtype, device=q.device) * (2 * math.pi)
    many = -2 * root[:, None] * torch.cos((angle[:, None] + turns) / 3)
    outer = -r.sign() * (r.abs() + (r.square() - q**3).clamp_min(0).sqrt()) ** (1 / 3)
    single = outer + torch.where(outer == 0, 0.0, q / torch.where(outer == 0, 1.0, outer))
    value = torch.where(three[:, None], many, single[:, None]) - a[:, None] / 3
    size = torch.hypot(value, torch.ones_like(value))
    ratio, one = value / size, 1 / size
    real = three[:, None] | (turns == 0)
    return torch.where(swapped, ratio, one), torch.where(swapped, one, ratio), real
