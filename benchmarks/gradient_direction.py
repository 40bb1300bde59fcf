# SPDX-License-Identifier: Apache-2.0
"""Which estimator's gradient still points the right way when matches are wrong?

`python -m benchmarks.gradient_direction` prints the table of docs/geometry.md: the cosine between the gradient of the
corner error in all coordinates of all matches, and the gradient with the right matches alone (zero at wrong ones).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.consensus import SIZE, Problems, problems
from eloftr_ops.geometry import consensus_from_matches, homography_from_matches
from eloftr_ops.losses import corner_error_loss

Loss = Callable[[Tensor, Problems, Tensor, int], Tensor]


def of_kernel(robust: str | None, scale: float) -> Loss:
    """Corner error of a refined estimate."""

    def loss(x1: Tensor, data: Problems, weights: Tensor, pairs: int) -> Tensor:
        found = homography_from_matches(
            data.keypoints0, x1, data.batch_indexes, batch_size=pairs, weights=weights,
            robust=robust, robust_scale=scale, refine_steps=20,
        )  # fmt: skip
        return _corner_error(found.H_0to1, data.truth, found.valid)

    return loss


def of_consensus(scale: float, refine_steps: int) -> Loss:
    """Expected corner error over hypotheses."""

    def loss(x1: Tensor, data: Problems, weights: Tensor, pairs: int) -> Tensor:
        found = consensus_from_matches(
            data.keypoints0, x1, data.batch_indexes, batch_size=pairs, weights=weights,
            robust_scale=scale, refine_steps=refine_steps,
        )  # fmt: skip
        many = found.probabilities.shape[1]
        errors = _corner_error(found.models_0to1.flatten(0, 1), data.truth.repeat_interleave(many, 0), None)
        return found.expected(errors.view(pairs, many))

    return loss


LOSSES: dict[str, Loss] = {
    "least squares": of_kernel(None, 2.0),
    "Cauchy, 4 px": of_kernel("cauchy", 4.0),
    "Cauchy, 2 px": of_kernel("cauchy", 2.0),
    "Geman-McClure, 4 px": of_kernel("geman_mcclure", 4.0),
    "Geman-McClure, 2 px": of_kernel("geman_mcclure", 2.0),
    "consensus, refined, 2 px": of_consensus(2.0, 20),
    "consensus, minimal, 2 px": of_consensus(2.0, 0),
}


def _corner_error(H: Tensor, truth: Tensor, valid: Tensor | None) -> Tensor:
    size = (int(SIZE[1]), int(SIZE[0]))
    return corner_error_loss(H, truth, size, valid=valid, saturation=32.0, reduction="none")


def cosines(loss: Loss, wrong: float, near: float | None, pairs: int, seed: int) -> Tensor:
    """Cosine `(B,)` of each problem; zero where either gradient is zero.

    Args:
        loss: of an estimator.
        wrong: share of wrong matches.
        near: wrong matches are that many pixels off; None for anywhere.
        pairs: B.
        seed: of the problems.
    """
    data = problems("homography", pairs, 100, wrong, noise=1.0, seed=seed)
    if near is not None:
        generator = torch.Generator().manual_seed(seed + 1)
        angle = 6.2831853 * torch.rand(data.right.shape[0], generator=generator, dtype=torch.float64)
        off = data.exact1 + near * torch.stack([angle.cos(), angle.sin()], dim=1)
        data = data._replace(keypoints1=torch.where(data.right[:, None], data.keypoints1, off))
    gradients = []
    for weights in (torch.ones_like(data.keypoints0[:, 0]), data.right.double()):
        x1 = data.keypoints1.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x1, data, weights, pairs).sum(), x1)
        gradients.append(gradient.view(pairs, -1))
    return torch.nn.functional.cosine_similarity(*gradients, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shares = (0.2, 0.4, 0.6)
    columns = [(share, near) for near in (None, 8.0) for share in shares]
    names = [f"{100 * share:.0f} %{'' if near is None else f', {near:.0f} px off'}" for share, near in columns]
    print(f"| estimator | {' | '.join(names)} |\n|---|" + "---|" * len(columns))
    for name, loss in LOSSES.items():
        cells = [
            f"{float(cosines(loss, share, near, arguments.problems, arguments.seed).median()):.2f}"
            for share, near in columns
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
