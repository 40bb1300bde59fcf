# SPDX-License-Identifier: Apache-2.0
"""Operators and public functions of the streaming dual softmax; formulas in ``naive.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eloftr_kernels.arithmetic import upcast_for_accumulation
from eloftr_kernels.dispatch import (
    KERNEL_DTYPES,
    check_devices,
    check_dtype,
    check_indices,
    check_positive,
    check_shape,
    is_cpu_inference,
    once_per_signature,
    use_triton,
    why_not_triton,
)
from eloftr_kernels.dual_softmax import cpu, naive, one_pass
from eloftr_kernels.registration import differentiable, operator

# Of one pass in Triton. Below it a cell may have many pairs, which are weighed one group of columns after the other.
_LEAST_THRESHOLD = 0.02
_MOST_PAIRS = 2**31  # it keeps one number for 32 of them: 256 MB


def dual_softmax_lse(
    features0: Tensor,  # (B, L, C)
    features1: Tensor,  # (B, S, C)
    temperature: float,
    mask0: Tensor | None = None,  # (B, L) bool
    mask1: Tensor | None = None,  # (B, S) bool
    product_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Normalisers of the dual softmax (LoFTR, equation 3; EfficientLoFTR, section 3.3).

    :mod:`eloftr_kernels.dual_softmax.naive` has the formulas.
    Neither pass stores an L x S tensor. Accumulated in float32 (float64 for float64 input), also under
    autocast. Where a kernel's products round float32 features, under autocast, with ``product_dtype`` or in TF32, it
    takes out before what the features of an image have in common, and adds that part's products in float32:
    the same scores with less rounding. PyTorch's path multiplies in float32.

    Convention:
        The gradient flows to both feature sets; scores of masked cells are the constant -1e9 and carry none.
        With no cell in one image the other's normalisers are -inf, with zero gradient. The Triton path has no
        second derivative and says so; the reference has.

    Args:
        features0: (B, L, C) float32, float16 or bfloat16 (float64: reference), any strides.
        features1: (B, S, C), same dtype.
        temperature: positive.
        mask0: (B, L) bool, True where a cell is valid.
        mask1: (B, S) bool.
        product_dtype: of a kernel's products of float32 features; default autocast's where that is on, else float32.

    Returns:
        ``row_lse`` (B, L) and ``col_lse`` (B, S), float32 (float64 for float64 input). Masked rows and
        columns hold about -1e9.

    Raises:
        ValueError: shapes or devices that do not fit, a temperature that is not positive.
        TypeError: dtypes that differ, or masks that are not bool.
        RuntimeError: ``backend("triton")`` that cannot be honoured.
    """
    tensors = features0, features1, mask0, mask1
    dtype, triton = _decide(tensors, "dual_softmax_lse", temperature, product_dtype)
    if triton:
        row_lse, col_lse = _lse_op(features0, features1, temperature, mask0, mask1, dtype)
        return row_lse, col_lse
    if torch.compiler.is_exporting():
        features0, features1 = upcast_for_accumulation(features0), upcast_for_accumulation(features1)
        return naive.dual_softmax_lse(features0, features1, temperature, mask0, mask1)
    return cpu.dual_softmax_lse(features0, features1, temperature, mask0, mask1)


def mutual_best(
    features0: Tensor,  # (B, L, C)
    features1: Tensor,  # (B, S, C)
    temperature: float,
    row_lse: Tensor | None = None,  # (B, L)
    col_lse: Tensor | None = None,  # (B, S)
    mask0: Tensor | None = None,  # (B, L) bool
    mask1: Tensor | None = None,  # (B, S) bool
    product_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Best partner of every cell under the logarithm of the confidence, :math:`2 s_{ij} - r_i - c_j`.

    Without ``row_lse`` and ``col_lse`` the raw score :math:`s_{ij}` decides (*optimized* inference).

    Convention:
        Of scores that are equal but for rounding (:func:`eloftr_kernels.arithmetic.first_best`) the lowest index wins;
        in the kernels, of scores that are equal. No gradient. The best partner of a masked cell is not defined.
        With no cell in the other image the index is 0 and the score -inf.

    Args:
        features0: as for :func:`dual_softmax_lse`.
        features1: as for :func:`dual_softmax_lse`.
        temperature: positive.
        row_lse: (B, L) of :func:`dual_softmax_lse`; both normalisers or none.
        col_lse: (B, S).
        mask0: (B, L) bool.
        mask1: (B, S) bool.
        product_dtype: as for :func:`dual_softmax_lse`.

    Returns:
        ``best1`` (B, L) int64, ``best0`` (B, S) int64, and the highest score (B, L) of each cell of
        image 0, float32 (float64 for float64 input).

    Raises:
        ValueError: as :func:`dual_softmax_lse`, or one normaliser without the other.
        TypeError: as :func:`dual_softmax_lse`.
        RuntimeError: ``backend("triton")`` that cannot be honoured.
    """
    tensors = features0, features1, mask0, mask1, row_lse, col_lse
    dtype, triton = _decide(tensors, "mutual_best", temperature, product_dtype)
    with torch.no_grad():
        if triton:
            best1, best0, score1 = _best_op(features0, features1, temperature, row_lse, col_lse, mask0, mask1, dtype)
            return best1, best0, score1
        if torch.compiler.is_exporting():
            features0, features1 = upcast_for_accumulation(features0), upcast_for_accumulation(features1)
            return naive.mutual_best(features0, features1, temperature, row_lse, col_lse, mask0, mask1)
        return cpu.mutual_best(features0, features1, temperature, row_lse, col_lse, mask0, mask1)


def dual_softmax_best(
    features0: Tensor,  # (B, L, C)
    features1: Tensor,  # (B, S, C)
    temperature: float,
    threshold: float,
    mask0: Tensor | None = None,  # (B, L) bool
    mask1: Tensor | None = None,  # (B, S) bool
    product_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""Normalisers, and the best partner of every cell that has one with a confidence above ``threshold``.

    What :func:`dual_softmax_lse` and :func:`mutual_best` give, for callers who drop pairs below a threshold anyway.
    A single pass over the scores finds both: on a CPU with no gradient asked for, and in Triton from a threshold of
    0.02 and up to 2^31 pairs of cells; :func:`eloftr_kernels.dual_softmax.one_pass.dual_softmax_best` says why that is
    exact. Otherwise it is the two.

    Convention:
        Best partners as :func:`mutual_best`. Of a cell that has no pair above the threshold they are not defined, but
        indices of cells all the same, and its score is not above ``log(threshold)``. The gradient of the normalisers
        flows as in :func:`dual_softmax_lse`.

    Args:
        features0: as for :func:`dual_softmax_lse`.
        features1: as for :func:`dual_softmax_lse`.
        temperature: positive.
        threshold: a probability; 0 and less, all cells have a best partner.
        mask0: (B, L) bool.
        mask1: (B, S) bool.
        product_dtype: as for :func:`dual_softmax_lse`.

    Returns:
        ``row_lse`` (B, L), ``col_lse`` (B, S), ``best1`` (B, L) int64, ``best0`` (B, S) int64, ``score1`` (B, L).

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`dual_softmax_lse`.
    """
    tensors = features0, features1, mask0, mask1
    dtype, triton = _decide(tensors, "dual_softmax_best", temperature, product_dtype)
    B, L, S = *features0.shape[:2], features1.shape[1]
    if triton and threshold >= _LEAST_THRESHOLD and 0 < B * L * S <= _MOST_PAIRS:
        *found, score1 = _one_pass_op(features0, features1, temperature, threshold, mask0, mask1, dtype)
        return *found, score1.detach()
    if not triton and is_cpu_inference(features0) and threshold > 0 and 0 not in (L, S):
        return one_pass.dual_softmax_best(features0, features1, temperature, threshold, mask0, mask1)
    lse = dual_softmax_lse(features0, features1, temperature, mask0, mask1, product_dtype)
    return *lse, *mutual_best(features0, features1, temperature, *lse, mask0, mask1, product_dtype)


def pair_scores(
    features0: Tensor,  # (B, L, C)
    features1: Tensor,  # (B, S, C)
    temperature: float,
    batch: Tensor,  # (M,) int64
    cells0: Tensor,  # (M,) int64
    cells1: Tensor,  # (M,) int64
    row_lse: Tensor | None = None,  # (B, L)
    col_lse: Tensor | None = None,  # (B, S)
) -> Tensor:
    r"""Log-confidence :math:`2 s_{ij} - r_i - c_j` of given pairs, or :math:`s_{ij}` without normalisers.

    O(M C) work on rows that are gathered once: PyTorch on every device, a kernel has nothing to save.

    Convention:
        Differentiable in the features and, through the normalisers, in every feature of the other image. No
        pair gives an empty tensor. On the CPU an index out of range raises; on a GPU, where reading it would
        wait for the device, its pair gets NaN and gives no gradient. A call that ``torch.compile`` traces
        is not checked on the CPU either, and has the NaN.

    Returns:
        (M,) float32, or float64 for float64 input.

    Raises:
        ValueError: shapes or devices that do not fit, one normaliser without the other.
        TypeError: feature dtypes that differ, or indices that are not int64.
        IndexError: on the CPU, an index outside the features.
    """
    _check(features0, features1, temperature, None, None)
    _check_normalisers(features0, features1, row_lse, col_lse)
    check_devices({"features0": features0, "batch": batch, "cells0": cells0, "cells1": cells1})
    for name, index in (("batch", batch), ("cells0", cells0), ("cells1", cells1)):
        check_shape(name, index, (batch.shape[0] if batch.ndim else None,), "(M,)")
        check_dtype(name, index, torch.int64, "convert it with .long()")
    sizes = {"batch": features0.shape[0], "cells0": features0.shape[1], "cells1": features1.shape[1]}
    indices = {"batch": batch, "cells0": cells0, "cells1": cells1}
    check_indices({name: (index, sizes[name]) for name, index in indices.items()})
    if features0.device.type == "cpu" and not torch.compiler.is_compiling():
        return cpu.pair_scores(features0, features1, temperature, batch, cells0, cells1, row_lse, col_lse)
    # Forced into range, NaN where that moved one: nothing here waits for the device.
    valid = torch.stack([(index >= 0) & (index < sizes[name]) for name, index in indices.items()]).all(0)
    batch, cells0, cells1 = (i.clamp(0, max(0, sizes[name] - 1)) for name, i in indices.items())
    scores = cpu.pair_scores(features0, features1, temperature, batch, cells0, cells1, row_lse, col_lse)
    return scores.where(valid, torch.nan)


def why_not(
    features0: Tensor, features1: Tensor, mask0: Tensor | None = None, mask1: Tensor | None = None
) -> str | None:
    """Why Triton is not used for these arguments, as half a sentence; None where it is."""
    tensors = {"features0": features0, "features1": features1, "mask0": mask0, "mask1": mask1}
    return why_not_triton(tensors)


def _lse_fake(features0: Tensor, features1: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    row_lse = features0.new_empty(features0.shape[:2], dtype=torch.float32)
    return row_lse, features1.new_empty(features1.shape[:2], dtype=torch.float32)


@operator("eloftr::dual_softmax_lse", fake=_lse_fake)
def _lse_op(
    features0: Tensor,
    features1: Tensor,
    temperature: float,
    mask0: Tensor | None,
    mask1: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from eloftr_kernels.dual_softmax import launch

    return launch.dual_softmax_lse_forward(features0, features1, temperature, mask0, mask1, dtype)


def _lse_backward_fake(
    grad_row: Tensor, grad_col: Tensor, features0: Tensor, features1: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return features0.new_empty(features0.shape), features1.new_empty(features1.shape)


@operator("eloftr::dual_softmax_lse_backward", fake=_lse_backward_fake)
def _lse_backward_op(
    grad_row: Tensor,
    grad_col: Tensor,
    features0: Tensor,
    features1: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    temperature: float,
    mask0: Tensor | None,
    mask1: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from eloftr_kernels.dual_softmax import launch

    return launch.dual_softmax_lse_backward(
        grad_row, grad_col, features0, features1, row_lse, col_lse, temperature, mask0, mask1, dtype
    )


def _lse_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features0, features1, ctx.temperature, mask0, mask1, ctx.dtype = inputs
    ctx.save_for_backward(features0, features1, *output, mask0, mask1)


def _lse_gradients(ctx: Any, grad_row: Tensor, grad_col: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, mask0, mask1 = ctx.saved_tensors
    of_features = _lse_backward_op(grad_row, grad_col, *tensors, ctx.temperature, mask0, mask1, ctx.dtype)
    return *of_features, None, None, None, None


differentiable(_lse_op, save=_lse_save, backward=_lse_gradients)


def _best_fake(features0: Tensor, features1: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    best1, best0 = (f.new_empty(f.shape[:2], dtype=torch.int64) for f in (features0, features1))
    return best1, best0, features0.new_empty(features0.shape[:2], dtype=torch.float32)


@operator("eloftr::mutual_best", fake=_best_fake)
def _best_op(
    features0: Tensor,
    features1: Tensor,
    temperature: float,
    row_lse: Tensor | None,
    col_lse: Tensor | None,
    mask0: Tensor | None,
    mask1: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    from eloftr_kernels.dual_softmax import launch

    return launch.mutual_best_forward(features0, features1, temperature, row_lse, col_lse, mask0, mask1, dtype)


def _one_pass_fake(features0: Tensor, features1: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    best1, best0, score1 = _best_fake(features0, features1)
    return *_lse_fake(features0, features1), best1, best0, score1


@operator("eloftr::dual_softmax_best", fake=_one_pass_fake)
def _one_pass_op(
    features0: Tensor,
    features1: Tensor,
    temperature: float,
    threshold: float,
    mask0: Tensor | None,
    mask1: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from eloftr_kernels.dual_softmax import launch

    return launch.dual_softmax_best_forward(features0, features1, temperature, threshold, mask0, mask1, dtype)


def _one_pass_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features0, features1, temperature, _, *rest = inputs
    _lse_save(ctx, (features0, features1, temperature, *rest), (output[0], output[1]))


def _one_pass_gradients(ctx: Any, grad_row: Tensor, grad_col: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_lse_gradients(ctx, grad_row, grad_col), None


differentiable(_one_pass_op, save=_one_pass_save, backward=_one_pass_gradients)


@once_per_signature
def _decide(
    tensors: tuple[Tensor | None, ...], op: str, temperature: float, product_dtype: torch.dtype | None
) -> tuple[torch.dtype, bool]:
    """The dtype of products, and whether Triton runs; checks every argument."""
    features0, features1, mask0, mask1, *normalisers = tensors
    if features0 is None or features1 is None:
        raise TypeError("features0, features1: expected tensors, got None.")
    _check(features0, features1, temperature, mask0, mask1)
    if normalisers:
        _check_normalisers(features0, features1, *normalisers)
    triton = use_triton(op, why_not(features0, features1, mask0, mask1))
    return _product_dtype(features0, product_dtype), triton


def _product_dtype(features: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """Of a kernel's products."""
    if features.dtype != torch.float32:
        return features.dtype
    if wanted not in (None, *KERNEL_DTYPES):
        raise ValueError(f"product_dtype: expected float32, float16, bfloat16 or None, got {wanted}.")
    kind = features.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return wanted or features.dtype


def _check(
    features0: Tensor, features1: Tensor, temperature: float, mask0: Tensor | None, mask1: Tensor | None
) -> None:
    check_shape("features0", features0, (None, None, None), "(B, L, C)")
    B, L, C = features0.shape
    check_shape("features1", features1, (B, None, C), "(B, S, C)")
    check_dtype("features1", features1, features0.dtype, "convert both features to one dtype")
    for name, mask, cells in (("mask0", mask0, L), ("mask1", mask1, features1.shape[1])):
        if mask is not None:
            check_shape(name, mask, (B, cells), "(B, cells)")
            check_dtype(name, mask, torch.bool, "pass True where a cell is valid")
    check_devices({"features0": features0, "features1": features1, "mask0": mask0, "mask1": mask1})
    if not features0.is_floating_point():
        raise TypeError(f"features0: expected a floating-point dtype, got {features0.dtype}; convert it with .float().")
    check_positive("temperature", temperature)


def _check_normalisers(features0: Tensor, features1: Tensor, row_lse: Tensor | None, col_lse: Tensor | None) -> None:
    if (row_lse is None) != (col_lse is None):
        missing = "row_lse" if row_lse is None else "col_lse"
        raise ValueError(
            f"{missing}: expected both normalisers or none, got None; pass what dual_softmax_lse returned."
        )
    dtype = torch.float64 if features0.dtype == torch.float64 else torch.float32
    for name, lse, features in (("row_lse", row_lse, features0), ("col_lse", col_lse, features1)):
        if lse is not None:
            check_shape(name, lse, features.shape[:2], "(B, cells)")
            check_dtype(name, lse, dtype, "pass what dual_softmax_lse returned")
            check_devices({"features0": features0, name: lse})
