# SPDX-License-Identifier: Apache-2.0
"""Robust estimators on random problems with known answers: this project's consensus beside OpenCV and PoseLib.

`python -m benchmarks.consensus` prints the tables of docs/geometry.md: error and success at 30 to 80 % wrong matches,
time per pair, and whether every gradient of the differentiable consensus is finite.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eloftr_ops.geometry import (
    apply_homography,
    consensus_from_matches,
    estimate_robust,
)
from eloftr_ops.losses import corner_error_loss, rotation_angle, sampson_loss, translation_direction_angle

SIZE = (640.0, 480.0)
FOCAL = 500.0
# An answer is a success below this: pixels at the corners, pixels of Sampson error, degrees.
SUCCESS = {"homography": 10.0, "fundamental": 2.0, "pose": 10.0}
# Pairs of one call.
BATCH = 50


class Problems(NamedTuple):
    """Matches of B pairs with N matches each, in random order, and the truth."""

    keypoints0: Tensor  # (B * N, 2) float64
    keypoints1: Tensor  # (B * N, 2)
    batch_indexes: Tensor  # (B * N,)
    right: Tensor  # (B * N,) bool
    exact0: Tensor  # (B * N, 2), without noise; meaningful for right matches
    exact1: Tensor  # (B * N, 2)
    truth: Tensor  # (B, 3, 3) homographies or (B, 4, 4) poses
    K: Tensor  # (B, 3, 3), of both cameras

    @property
    def matches(self) -> tuple[Tensor, Tensor, Tensor]:
        """What an estimator sees."""
        return self.keypoints0, self.keypoints1, self.batch_indexes


def problems(model: str, pairs: int, count: int, wrong: float, *, noise: float, seed: int) -> Problems:
    """Draw problems: corners moved by up to 100 px, or two cameras one unit apart and points 4 to 8 units away."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    size = torch.tensor(SIZE, dtype=torch.float64)
    K = torch.tensor([[FOCAL, 0, SIZE[0] / 2], [0, FOCAL, SIZE[1] / 2], [0, 0, 1]], dtype=torch.float64)
    if model == "homography":
        truth = _random_homographies(200.0 * (uniform(pairs, 4, 2) - 0.5))
        exact0 = uniform(pairs, count, 2) * size
        exact1 = apply_homography(truth, exact0)
    else:
        X = torch.cat([6.0 * (uniform(pairs, count, 2) - 0.5), 4.0 + 4.0 * uniform(pairs, count, 1)], dim=2)
        x, y, z = (0.15 * normal(pairs, 3)).unbind(1)
        zero = torch.zeros_like(x)
        R = torch.linalg.matrix_exp(torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).view(-1, 3, 3))
        t = torch.nn.functional.normalize(normal(pairs, 3), dim=1)
        exact0, exact1 = (p[..., :2] / p[..., 2:] for p in (X @ K.T, (X @ R.mT + t[:, None]) @ K.T))
        truth = torch.eye(4, dtype=torch.float64).repeat(pairs, 1, 1)
        truth[:, :3, :3], truth[:, :3, 3] = R, t
    x0 = exact0 + (0.0 if model == "homography" else noise * normal(pairs, count, 2))
    x1 = exact1 + noise * normal(pairs, count, 2)
    right = uniform(pairs, count).argsort(1) >= round(wrong * count)
    x1 = torch.where(right[..., None], x1, uniform(pairs, count, 2) * size)
    index = torch.arange(pairs).repeat_interleave(count)
    flat = [v.flatten(0, 1) for v in (x0, x1, right, exact0, exact1)]
    return Problems(flat[0], flat[1], index, *flat[2:], truth, K.repeat(pairs, 1, 1))


def _random_homographies(moves: Tensor) -> Tensor:
    """Homographies that move the four image corners by `(B, 4, 2)` pixels."""
    corners = torch.tensor([[0, 0], [SIZE[0], 0], [*SIZE], [0, SIZE[1]]], dtype=torch.float64)
    x0, x1 = corners.expand_as(moves), corners + moves
    one, zero = torch.ones_like(x0[..., :1]), torch.zeros_like(x0)
    first = torch.cat([x0, one, zero, 0 * one, -x1[..., :1] * x0], dim=2)
    second = torch.cat([zero, 0 * one, x0, one, -x1[..., 1:] * x0], dim=2)
    right = torch.cat([x1[..., :1], x1[..., 1:]], dim=1)
    solution = torch.linalg.solve(torch.cat([first, second], dim=1), right)[..., 0]
    return torch.cat([solution, torch.ones_like(solution[:, :1])], dim=1).view(-1, 3, 3)


def errors(model: str, found: Tensor, data: Problems) -> Tensor:
    """Error `(B,)` of each estimate: corners in pixels, Sampson error of the exact matches, or degrees."""
    if model == "homography":
        size = (int(SIZE[1]), int(SIZE[0]))
        return corner_error_loss(found, data.truth, size, smoothing=1e-6, reduction="none")
    if model == "fundamental":
        right = data.right
        return sampson_loss(
            data.exact0[right],
            data.exact1[right],
            data.batch_indexes[right],
            found,
            smoothing=1e-6,
            reduction="none",
        )
    turn = rotation_angle(found[:, :3, :3], data.truth[:, :3, :3])
    return torch.rad2deg(torch.maximum(turn, translation_direction_angle(found[:, :3, 3], data.truth[:, :3, 3])))


class Line(NamedTuple):
    """One line of the table."""

    error: float  # median over the problems; those without an answer count as infinitely wrong
    success: float  # share of the problems
    wrong_but_valid: float  # share of the problems: an answer called valid that is no success
    milliseconds: float  # per pair


def measured(model: str, backend: str, wrong: float, arguments: argparse.Namespace) -> Line:
    """Run one estimator on all problems of one share of wrong matches."""
    batches = [batch_measured(model, backend, wrong, start, arguments) for start in range(0, arguments.problems, BATCH)]
    error, valid = (torch.tensor([x for batch in batches for x in batch[name]]) for name in ("errors", "valid"))
    success = error < SUCCESS[model]
    return Line(
        float(error.median()),
        float(success.double().mean()),
        float((valid & ~success).double().mean()),
        1000.0 * sum(batch["seconds"] for batch in batches) / error.shape[0],
    )


def batch_measured(model: str, backend: str, wrong: float, start: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Errors, flags and CPU seconds of one batch: from the record, or measured and added to it."""
    key = [model, backend, wrong, arguments.seed + start, arguments.matches, arguments.noise, arguments.threshold]
    if arguments.record is not None and arguments.record.exists():
        for line in arguments.record.read_text().splitlines():
            kept: dict[str, Any] = json.loads(line)
            if kept["key"] == key:
                return kept
    data = problems(model, BATCH, arguments.matches, wrong, noise=arguments.noise, seed=arguments.seed + start)
    cameras = {"K0": data.K, "K1": data.K} if model == "pose" else {}
    began = time.process_time()
    estimate = estimate_robust(
        *data.matches, batch_size=BATCH, model=model, backend=backend, threshold=arguments.threshold, **cameras
    )
    seconds = time.process_time() - began
    error = torch.where(estimate.valid, errors(model, estimate.model_0to1, data), math.inf)
    found = {"key": key, "errors": error.tolist(), "valid": estimate.valid.tolist(), "seconds": seconds}
    if arguments.record is not None:
        with arguments.record.open("a") as file:
            file.write(json.dumps(found) + "\n")
    return found


class GradientLine(NamedTuple):
    """What the differentiable consensus did."""

    finite: bool  # every gradient of every problem
    error: float  # median of the expected error
    milliseconds: float  # per pair, forward
    milliseconds_backward: float


def differentiated(model: str, wrong: float, refine_steps: int, arguments: argparse.Namespace) -> GradientLine:
    """Differentiate the expected error of every problem."""
    finite, expected, forward, backward = True, [], 0.0, 0.0
    for start in range(0, arguments.problems, BATCH):
        data = problems(model, BATCH, arguments.matches, wrong, noise=arguments.noise, seed=arguments.seed + start)
        cameras = {"K0": data.K, "K1": data.K} if model == "pose" else {}
        x0, x1 = data.keypoints0.requires_grad_(), data.keypoints1.requires_grad_()
        weights = torch.ones_like(x0[:, 0]).requires_grad_()
        began = time.process_time()
        found = consensus_from_matches(
            x0, x1, data.batch_indexes, batch_size=BATCH, model=model, weights=weights,
            robust_scale=arguments.threshold, refine_steps=refine_steps, **cameras,
        )  # fmt: skip
        forward += time.process_time() - began
        many = found.models_0to1.shape[1]
        repeated = data._replace(
            truth=data.truth.repeat_interleave(many, 0),
            batch_indexes=data.batch_indexes * many,
        )
        if model == "fundamental":
            values = torch.stack([errors(model, found.models_0to1[:, k], data) for k in range(many)], dim=1)
        else:
            values = errors(model, found.models_0to1.flatten(0, 1), repeated).view(BATCH, many)
        loss = found.expected(values)
        began = time.process_time()
        gradients = torch.autograd.grad(loss.sum(), (x0, x1, weights))
        backward += time.process_time() - began
        finite = finite and all(bool(torch.isfinite(g).all()) for g in (loss, *gradients))
        expected.append(loss.detach())
    return GradientLine(
        finite,
        float(torch.cat(expected).median()),
        1000.0 * forward / arguments.problems,
        1000.0 * backward / arguments.problems,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--matches", type=int, default=200)
    parser.add_argument("--noise", type=float, default=1.0)
    parser.add_argument("--threshold", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=10_000)
    parser.add_argument("--models", nargs="+", default=["homography", "fundamental", "pose"])
    parser.add_argument("--backends", nargs="+", default=["opencv", "poselib", "torch"])
    parser.add_argument("--wrong", nargs="+", type=float, default=[0.3, 0.5, 0.7, 0.8])
    parser.add_argument("--record", type=Path, help="file of finished batches; a second run goes on where it ended")
    parser.add_argument("--no-gradients", action="store_true")
    arguments = parser.parse_args()
    print(
        f"| model | wrong | {' | '.join(f'{b}: error / success / wrong but valid / ms' for b in arguments.backends)} |"
    )
    print("|" + "---|" * (2 + len(arguments.backends)))
    for model in arguments.models:
        for wrong in arguments.wrong:
            cells = [
                f"{x.error:.3g} / {100 * x.success:.1f} % / {100 * x.wrong_but_valid:.1f} % / {x.milliseconds:.1f}"
                for x in (measured(model, backend, wrong, arguments) for backend in arguments.backends)
            ]
            print(f"| {model} | {100 * wrong:.0f} % | {' | '.join(cells)} |", flush=True)
    if arguments.no_gradients:
        return
    print("\n| model | wrong | hypotheses | gradients finite | expected error | forward, ms | backward, ms |")
    print("|" + "---|" * 7)
    for model in arguments.models:
        for wrong in arguments.wrong:
            for steps, name in ((20, "refined"), (0, "minimal")):
                x = differentiated(model, wrong, steps, arguments)
                print(
                    f"| {model} | {100 * wrong:.0f} % | {name} | {'all' if x.finite else '**no**'} | {x.error:.3g} | "
                    f"{x.milliseconds:.1f} | {x.milliseconds_backward:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
