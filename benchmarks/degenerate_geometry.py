# SPDX-License-Identifier: Apache-2.0
"""Value and gradient of the geometry estimators on hard inputs, beside kornia's on the same inputs, in float32.

`python -m benchmarks.degenerate_geometry` prints the two tables of docs/geometry.md. Nothing is timed.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from kornia.geometry.epipolar import find_fundamental
from kornia.geometry.homography import find_homography_dlt, find_homography_dlt_iterated
from torch import Tensor

from eloftr_ops.geometry import apply_homography, fundamental_from_matches, homography_from_matches


class Case(NamedTuple):
    """One pair of matched point sets."""

    name: str
    keypoints0: Tensor  # (N, 2) float32
    keypoints1: Tensor  # (N, 2) float32
    well_posed: bool  # the matches determine the model, in exact arithmetic


class Outcome(NamedTuple):
    """What an estimator made of a case."""

    valid: bool | None  # the estimator's own flag; None where it has none
    value: float  # largest magnitude of the observed values; NaN if any is
    gradient: float  # largest magnitude of the gradient in any coordinate; NaN if any is


Estimator = Callable[[Tensor, Tensor], tuple[Tensor, bool | None]]


def homography_cases() -> list[Case]:
    """Return point sets that are hard for a homography estimator."""
    generator = torch.Generator().manual_seed(0)
    many = torch.rand(20, 2, generator=generator) * torch.tensor([640.0, 480.0])
    noise = torch.randn(20, 2, generator=generator)
    H = torch.tensor([[1.1, 0.05, 12.0], [-0.04, 0.95, -7.0], [1e-4, -5e-5, 1.0]])
    mapped = apply_homography(H[None], many[None])[0]
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    line = torch.arange(8.0)[:, None]
    outlier = mapped.clone()
    outlier[0] = 1e5
    steep = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.01, 0.0, -1.0]])
    across = torch.tensor([[60.0, 20.0], [140.0, 30.0], [150.0, 160.0], [50.0, 150.0], [80.0, 90.0]])
    spot = torch.tensor([[320.0, 240.0]]).repeat(6, 1)
    mostly = torch.cat([many[:3], many[:1].repeat(5, 1)])
    return [
        Case("noisy, 20 points", many, mapped + noise, True),
        Case("exact, 20 points", many, mapped, True),
        Case("exact identity", many, many.clone(), True),
        Case("4 points", many[:4], mapped[:4] + noise[:4], True),
        Case("unit square to itself", square, square.clone(), True),
        Case("unit square to a quadrangle", square, square + 0.1 * noise[:4], True),
        Case("coordinates in the thousands", many + 4000.0, mapped + 6000.0, True),
        Case("one outlier at 1e5", many, outlier, True),
        Case("points across the horizon", across, apply_homography(steep[None], across[None])[0], True),
        Case("collinear", line * torch.tensor([10.0, 5.0]) + 3.0, line * torch.tensor([7.0, 9.0]) + 1.0, False),
        Case("3 points, repeated", many[:3].repeat(4, 1), mapped[:3].repeat(4, 1), False),
        Case("3 distinct points of 8", mostly, mostly + 5.0, False),
        Case("one point, repeated", spot, spot + 3.0, False),
        Case("3 points", many[:3], mapped[:3], False),
    ]


def fundamental_cases() -> list[Case]:
    """Return point sets that are hard for a fundamental matrix estimator."""
    generator = torch.Generator().manual_seed(1)
    K = torch.tensor([[500.0, 0.0, 320.0], [0.0, 500.0, 240.0], [0.0, 0.0, 1.0]])
    X = torch.rand(20, 3, generator=generator) * torch.tensor([4.0, 3.0, 4.0]) + torch.tensor([-2.0, -1.5, 4.0])
    noise = torch.randn(20, 2, generator=generator)
    cosine, sine = math.cos(0.1), math.sin(0.1)
    R = torch.tensor([[cosine, 0.0, sine], [0.0, 1.0, 0.0], [-sine, 0.0, cosine]])
    t = torch.tensor([0.9, 0.1, 0.3])

    def pixels(points: Tensor) -> Tensor:
        projected = points.double() @ K.double().T
        return (projected[:, :2] / projected[:, 2:]).float()

    plane = torch.cat([X[:, :2], 6.0 + 0.3 * X[:, :1]], dim=1)
    seen0, seen1 = pixels(X), pixels(X @ R.T + t)
    outlier = seen1.clone()
    outlier[0] = 1e5
    line = torch.arange(12.0)[:, None]
    return [
        Case("noisy, 20 points", seen0, seen1 + noise, True),
        Case("exact, 20 points", seen0, seen1, True),
        Case("exact, 8 points", seen0[:8], seen1[:8], True),
        Case("translation along x", seen0, pixels(X + torch.tensor([1.0, 0.0, 0.0])), True),
        Case("coordinates in the thousands", seen0 + 4000.0, seen1 + 6000.0, True),
        Case("one outlier at 1e5", seen0, outlier, True),
        Case("pure rotation", seen0, pixels(X @ R.T), False),
        Case("points on a plane", pixels(plane), pixels(plane @ R.T + t), False),
        Case("identical images", seen0, seen0.clone(), False),
        Case("collinear", line * torch.tensor([10.0, 5.0]), line * torch.tensor([7.0, 9.0]) + 1.0, False),
        Case(
            "7 points, one repeated 6 times",
            seen0[[*range(7), *[0] * 5]],
            seen1[[*range(7), *[0] * 5]],
            False,
        ),
        Case("one point, repeated", seen0[:1].repeat(9, 1), seen1[:1].repeat(9, 1), False),
    ]


def _ours_homography(robust: str | None = None) -> Estimator:
    def estimate(x0: Tensor, x1: Tensor) -> tuple[Tensor, bool | None]:
        index = torch.zeros(x0.shape[0], dtype=torch.long)
        result = homography_from_matches(x0, x1, index, batch_size=1, robust=robust)
        return result.H_0to1, bool(result.valid)

    return estimate


def _ours_fundamental(x0: Tensor, x1: Tensor) -> tuple[Tensor, bool | None]:
    result = fundamental_from_matches(x0, x1, torch.zeros(x0.shape[0], dtype=torch.long), batch_size=1)
    return result.F_0to1, bool(result.valid)


HOMOGRAPHY_ESTIMATORS: dict[str, Estimator] = {
    "ours": _ours_homography(),
    "ours, robust": _ours_homography(robust="cauchy"),
    "kornia dlt, svd": lambda a, b: (find_homography_dlt(a[None], b[None], solver="svd"), None),
    "kornia dlt, lu": lambda a, b: (find_homography_dlt(a[None], b[None], solver="lu"), None),
    "kornia dlt_iterated": lambda a, b: (
        find_homography_dlt_iterated(a[None], b[None], torch.ones(1, a.shape[0])),
        None,
    ),
}
FUNDAMENTAL_ESTIMATORS: dict[str, Estimator] = {
    "ours": _ours_fundamental,
    "kornia find_fundamental": lambda a, b: (find_fundamental(a[None], b[None]), None),
    "the same, as returned": lambda a, b: (find_fundamental(a[None], b[None]), None),
}


def observe(case: Case, estimator: Estimator, homography: bool, as_returned: bool = False) -> Outcome:
    """Estimate, and differentiate what does not depend on the scale of the matrix.

    For a homography that is where it maps the corners of the points' bounding box; for a fundamental matrix, the
    matrix at unit norm, or with `as_returned` as it is. An exception counts as NaN.
    """
    x0, x1 = case.keypoints0.clone().requires_grad_(), case.keypoints1.clone().requires_grad_()
    try:
        matrix, valid = estimator(x0, x1)
        if homography:
            low, high = case.keypoints0.amin(0), case.keypoints0.amax(0)
            corners = torch.stack([low, torch.stack([high[0], low[1]]), high, torch.stack([low[0], high[1]])])
            observed = apply_homography(matrix, corners[None])
        elif as_returned:
            observed = matrix
        else:
            # Both matrices at unit norm and with one sign, so that the cotangent sees the same function.
            flat = matrix.flatten()
            largest = flat[flat.detach().abs().argmax()]
            size = torch.linalg.vector_norm(matrix) * largest.detach().sign()
            observed = matrix / torch.where(size == 0, 1.0, size)
        generator = torch.Generator().manual_seed(2)
        cotangent = torch.randn(observed.shape, generator=generator)
        gradients = torch.autograd.grad((observed * cotangent).sum(), (x0, x1))
    except (RuntimeError, AssertionError):
        return Outcome(None, math.nan, math.nan)
    return Outcome(valid, _largest(observed.detach()), max(map(_largest, gradients), key=_nan_last))


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _largest(values: Tensor) -> float:
    return math.nan if bool(values.isnan().any()) else float(values.abs().max())


def table(cases: list[Case], estimators: dict[str, Estimator], homography: bool) -> str:
    """Return a Markdown table: one row per case, value and gradient of each estimator."""
    head = ["input", "well-posed", *estimators]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in cases:
        cells = [case.name, "yes" if case.well_posed else "no"]
        for name, estimator in estimators.items():
            result = observe(case, estimator, homography, name.endswith("as returned"))
            flag = "" if result.valid is None else ("valid: " if result.valid else "flagged: ")
            cells.append(f"{flag}{_number(result.value)} / {_number(result.gradient)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "**NaN**" if math.isnan(value) else "**inf**"
    return f"{value:.2g}" if value < 1e6 else f"**{value:.1e}**"


def main() -> None:
    print("Homography: largest mapped corner / largest gradient\n")
    print(table(homography_cases(), HOMOGRAPHY_ESTIMATORS, True))
    print("\nFundamental matrix at unit norm: largest entry / largest gradient\n")
    print(table(fundamental_cases(), FUNDAMENTAL_ESTIMATORS, False))


if __name__ == "__main__":
    main()
