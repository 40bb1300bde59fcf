# SPDX-License-Identifier: Apache-2.0
"""What an entry must agree with before it is timed: outputs of ops, and matches of whole matchers.

An op's error is measured in three ways against float64, because one norm over a whole tensor hides a few lost rows:
the norm, the worst row, and the number of elements that are far off. A row is what one position, cell or window has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import eloftr_kernels
from benchmarks.measure import Disagreement
from benchmarks.ops import OPS, Arguments, Outputs

# Error that any implementation may have in a dtype, relative to float64; beyond it, twice that of the eager reference.
ERROR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
ROW = 4  # the worst row may be so many times less accurate than the whole; beyond it, three times the eager's
ELEMENT = 16  # an element is far off beyond so many times the bound
# A gradient jumps where rounding turns the sign of a hidden value. Its rows may be off by so much; a lost row is by 1.
JUMP = 0.25
OP_GATE = (
    "every output and gradient against the reference in float64. Relative error: at most twice that of the eager "
    "reference in the same dtype, or the dtype's bound. Worst row: at most three times the eager reference's, or four "
    "times the bound. Elements far off: at most twice as many, or one in 100,000. Chosen indices are judged by the "
    "score that they lose, windows also by the share with another pixel pair"
)
# Relative error of the coarse features that a dtype may have; match by match only float32 is held.
FEATURE_ERROR = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 0.15}
LEAST_AGREEMENT = 0.99
SAME_MATCH = 4.0  # pixels, half a coarse cell


class Error(NamedTuple):
    """How far one output is from the truth."""

    norm: float  # of the difference over that of the truth
    row: float  # the worst row's, over its own norm or the typical row's, whichever is larger
    far: int  # elements that are far off
    size: int  # all elements
    gradient: bool = False


def output_errors(op: str, got: Outputs, truth: Outputs, double: Arguments, bound: float) -> dict[str, Error]:
    """Error of every output and gradient by name.

    Args:
        op: a name in ``OPS``.
        got: outputs, then gradients.
        truth: the same in float64.
        double: the arguments in float64.
        bound: relative error that the dtype may have.

    Raises:
        Disagreement: another number of outputs, or other shapes.
    """
    entry = OPS[op]
    names = [*entry.outputs, *(f"gradient of {name}" for name in entry.differentiable)][: len(truth)]
    shapes = [tuple(x.shape) for x in got], [tuple(x.shape) for x in truth]
    if shapes[0] != shapes[1]:
        raise Disagreement(f"outputs: expected the shapes {shapes[1]}, got {shapes[0]}")
    valid = [double.get(name) if name else None for name in entry.valid] or [None] * len(truth)
    valid += [None] * (len(truth) - len(valid))
    same = slice(None)
    errors: dict[str, Error] = {}
    if entry.windows:
        same = (got[0] == truth[0]).all(1) & (got[1] == truth[1]).all(1)
        other = int((~same).sum())
        errors["share of other pixel pairs"] = Error(other / max(1, len(same)), 0.0, 0, len(same))
    for index, (name, mine, exact, mask) in enumerate(zip(names, got, truth, valid, strict=True)):
        if entry.windows and index < 2:
            continue
        if entry.indices and index < 2:
            mine, exact = (_chosen(best, index, double) for best in (mine, exact))
        gradient = index >= len(entry.outputs)
        rows = (_rows(x, entry.scalar and not gradient) for x in (mine, exact))
        picked = same if entry.windows and index == 2 else slice(None) if mask is None else mask
        # A window with another pixel pair has another gradient: then only the norm is held.
        uneven_pairs = entry.windows and gradient and errors["share of other pixel pairs"].norm > 0
        found = _error(*(x[picked] for x in rows), bound, gradient)
        errors[name] = found._replace(row=0.0, far=0) if uneven_pairs else found
    return errors


def hold_errors(found: dict[str, Error], eager: dict[str, Error], bound: float) -> None:
    """Raise Disagreement, naming each output that is further off than the bound and the eager reference allow."""
    bad: list[str] = []
    for name, error in found.items():
        allowed = max(bound, 2 * eager[name].norm)
        row = max(ROW * bound, 3 * eager[name].row, JUMP if error.gradient else 0.0)
        far = 2 * eager[name].far + error.size // 100_000
        if not error.norm <= allowed:
            bad.append(f"{name}: error {error.norm:.2g}, allowed {allowed:.2g}")
        elif not error.row <= row:
            bad.append(f"{name}: error of the worst row {error.row:.2g}, allowed {row:.2g}")
        elif error.far > far:
            bad.append(f"{name}: {error.far} elements of {error.size} are far off, allowed {far}")
    if bad:
        raise Disagreement("; ".join(bad))


def hold_features(got: Tensor, truth: Tensor, dtype: str) -> None:
    """Raise Disagreement unless coarse features are those of the plain float32 model within the dtype's bound."""
    error = float((got.float() - truth).norm() / truth.norm())
    if not error <= FEATURE_ERROR[dtype]:
        bound = FEATURE_ERROR[dtype]
        raise Disagreement(f"coarse features: relative error {error:.2g}, allowed {bound:.2g}")


def hold_agreement(shared: float) -> None:
    """Raise Disagreement unless nearly all matches are shared."""
    if not shared >= LEAST_AGREEMENT:
        raise Disagreement(f"matches: {shared:.1%} are shared with the plain way, expected {LEAST_AGREEMENT:.0%}")


def agreement(got: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Share of matches that the other side has too, the lesser of both ways; 1 where neither has any.

    Convention:
        Matches are the same when they are of one pair and both keypoints lie within half a coarse cell.
    """
    if not len(got["confidence"]) or not len(truth["confidence"]):
        return float(len(got["confidence"]) == len(truth["confidence"]))
    same = got["batch_indexes"][:, None] == truth["batch_indexes"]
    for key in ("keypoints0", "keypoints1"):
        same &= torch.cdist(got[key].float(), truth[key].float(), p=torch.inf) <= SAME_MATCH
    return float(min(same.any(0).float().mean(), same.any(1).float().mean()))


def _rows(value: Tensor, scalar: bool) -> Tensor:
    """The last dimension is what one position has."""
    if scalar or value.ndim < 2:
        return value[..., None]
    return value.movedim(1, -1) if value.ndim == 4 else value


def _error(got: Tensor, truth: Tensor, bound: float, gradient: bool) -> Error:
    """Of rows; infinite where a value is not a number."""
    if truth.numel() == 0:
        return Error(0.0, 0.0, 0, 0, gradient)
    difference = (got.double() - truth).nan_to_num(nan=torch.inf)
    size = truth.norm().clamp(min=1e-12)
    typical = size / truth.numel() ** 0.5
    rows = difference.norm(dim=-1) / truth.norm(dim=-1).clamp(min=typical * truth.shape[-1] ** 0.5)
    far = max(ELEMENT * bound, JUMP if gradient else 0.0) * truth.abs().clamp(min=typical)
    counted = int((difference.abs() > far).sum())
    return Error(float(difference.norm() / size), float(rows.max()), counted, truth.numel(), gradient)


def _chosen(best: Tensor, side: int, double: Arguments) -> Tensor:
    """Log-confidence in float64 of each cell of image ``side`` with its ``best`` partner."""
    batch = torch.arange(len(best), device=best.device).repeat_interleave(best.shape[1])
    own = torch.arange(best.shape[1], device=best.device).repeat(len(best))
    pair = (own, best.flatten()) if side == 0 else (best.flatten(), own)
    given = (double[name] for name in ("features0", "features1", "temperature"))
    scores = eloftr_kernels.pair_scores(*given, batch, *pair, double["row_lse"], double["col_lse"])
    return scores.view_as(best)
