# SPDX-License-Identifier: Apache-2.0
"""Essential matrices of five matches (Nister 2004), for many samples at once."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from eloftr_ops.geometry._polynomials import null_space, real_roots

# Sign changes of the polynomial of degree ten are looked for between so many directions.
DIRECTIONS = 192
# Monomials in the unknowns (x, y, z, 1), as powers of x, y and z. The first ten are eliminated.
_Powers = tuple[int, int, int]
_CUBIC: list[_Powers] = [
    (3, 0, 0), (0, 3, 0), (2, 1, 0), (1, 2, 0), (2, 0, 1), (2, 0, 0), (0, 2, 1), (0, 2, 0), (1, 1, 1), (1, 1, 0),
    (1, 0, 2), (1, 0, 1), (1, 0, 0), (0, 1, 2), (0, 1, 1), (0, 1, 0), (0, 0, 3), (0, 0, 2), (0, 0, 1), (0, 0, 0),
]  # fmt: skip
_LINEAR: list[_Powers] = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]
_QUADRATIC: list[_Powers] = [p for p in itertools.product(range(3), range(3), range(3)) if sum(p) <= 2]


def essentials_of_five(rows: Tensor) -> Tensor:
    """Essential matrices `(S, 10, 3, 3)` of five equations `(S, 5, 9)` each; zero where there are fewer.

    Five equations leave `E = x X + y Y + z Z + W`. `det E = 0` and `2 E E^T E = tr(E E^T) E` are ten cubic equations.
    Elimination of the ten monomials of degree two or more in x and y leaves a 3x3 system in (x, y, 1) whose
    determinant is a polynomial of degree ten in z.
    """
    basis = null_space(rows)
    eliminated = _eliminated(_constraints(basis.mT.reshape(-1, 3, 3, 4)))
    system = _system(eliminated)
    cosine, sine, real = real_roots(_determinant(system), 10, DIRECTIONS)
    x, y, w = _null_of_system(system, cosine, sine)
    X, Y, Z, W = basis[:, None].unbind(2)
    found = x * X + y * Y + w * (sine[..., None] * Z + cosine[..., None] * W)
    matrices: Tensor = torch.where(real[..., None], found, 0.0).unflatten(2, (3, 3))
    return matrices


def _product_table(left: Sequence[_Powers], right: Sequence[_Powers], out: Sequence[_Powers]) -> Tensor:
    """`(len(left) * len(right), len(out))`: which monomial the product of two monomials is."""
    table = torch.zeros(len(left), len(right), len(out), dtype=torch.float64)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            table[i, j, out.index((a[0] + b[0], a[1] + b[1], a[2] + b[2]))] = 1.0
    return table.flatten(0, 1)


_SQUARE = _product_table(_LINEAR, _LINEAR, _QUADRATIC)
_CUBE = _product_table(_QUADRATIC, _LINEAR, _CUBIC)


def _constraints(E: Tensor) -> Tensor:
    """Ten cubic equations `(S, 10, 20)` of matrices `(S, 3, 3, 4)` of linear polynomials."""
    count = E.shape[0]
    square, cube = _SQUARE.to(E), _CUBE.to(E)
    # Entries of E E^T, quadratic; then times E, cubic. The sums over k run inside the matrix products.
    gram = torch.einsum("sikp,sjkq->sijpq", E, E).flatten(3) @ square
    trace = gram[:, 0, 0] + gram[:, 1, 1] + gram[:, 2, 2]
    eye = torch.eye(3, dtype=E.dtype, device=E.device)
    doubled = 2.0 * gram - eye[..., None] * trace[:, None, None]
    nine = torch.einsum("sijp,sjkq->sikpq", doubled, E).flatten(3) @ cube
    minors = [
        torch.einsum("sp,sq->spq", E[:, 1, a], E[:, 2, b]) - torch.einsum("sp,sq->spq", E[:, 1, b], E[:, 2, a])
        for a, b in ((1, 2), (2, 0), (0, 1))
    ]
    determinant = sum(
        torch.einsum("sp,sq->spq", minor.flatten(1) @ square, E[:, 0, k]).flatten(1) @ cube
        for k, minor in enumerate(minors)
    )
    return torch.cat([nine.reshape(count, 9, 20), torch.as_tensor(determinant)[:, None]], dim=1)


def _eliminated(constraints: Tensor) -> Tensor:
    """Coefficients `(S, 10, 10)` of the last ten monomials, after the first ten were eliminated."""
    solved: Tensor = torch.linalg.solve_ex(constraints[..., :10], constraints[..., 10:])[0]
    return solved


def _system(eliminated: Tensor) -> list[list[Tensor]]:
    """Three equations in (x, y, 1), each coefficient a polynomial `(S, 4 or 5)` in z, lowest power first."""
    equations = []
    for first, second in ((4, 5), (6, 7), (8, 9)):
        plain, shifted = eliminated[:, first], eliminated[:, second]
        equation = []
        for start, stop in ((0, 3), (3, 6), (6, 10)):
            a, b = plain[:, start:stop].flip(1), shifted[:, start:stop].flip(1)
            zero = torch.zeros_like(a[:, :1])
            equation.append(torch.cat([a, zero], dim=1) - torch.cat([zero, b], dim=1))
        equations.append(equation)
    return equations


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Product of polynomials `(S, m)` and `(S, n)`."""
    result = a.new_zeros(a.shape[0], a.shape[1] + b.shape[1] - 1)
    for k in range(a.shape[1]):
        result[:, k : k + b.shape[1]] += a[:, k, None] * b
    return result


def _determinant(system: list[list[Tensor]]) -> Tensor:
    first, second, third = system
    total = None
    for k, (a, b) in enumerate(((1, 2), (2, 0), (0, 1))):
        minor = _times(second[a], third[b]) - _times(second[b], third[a])
        term = _times(minor, first[k])
        total = term if total is None else total + term
    return torch.as_tensor(total)


def _null_of_system(system: list[list[Tensor]], cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Null vectors of the 3x3 systems at the roots, each component `(S, 10, 1)`: the largest cross product of rows."""
    rows = []
    for equation in system:
        entries = []
        for polynomial in equation:
            degree = polynomial.shape[1] - 1
            powers = [cosine ** (degree - k) * sine**k for k in range(degree + 1)]
            entries.append(sum(p * polynomial[:, k, None] for k, p in enumerate(powers)))
        rows.append(torch.stack([torch.as_tensor(e) for e in entries], dim=-1))
    crosses = torch.stack([torch.linalg.cross(rows[a], rows[b]) for a, b in ((0, 1), (1, 2), (2, 0))], dim=2)
    best = crosses.square().sum(-1).argmax(2, keepdim=True)
    vector = crosses.gather(2, best[..., None].expand(*best.shape, 3))[:, :, 0]
    size = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    x, y, w = (vector / torch.where(size > 0, size, 1.0)).split(1, dim=-1)
    return x, y, w
