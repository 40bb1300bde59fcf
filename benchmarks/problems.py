# SPDX-License-Identifier: Apache-2.0
"""The ops as the suite ``kernels`` sees them: functions by name, seeded arguments, and the least work that each is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import PRESETS, KernelCase
from eloftr_kernels.aggregated_attention.reference import aggregated_attention
from eloftr_kernels.dual_softmax.reference import dual_softmax_lse, mutual_best
from eloftr_kernels.upsample_mlp.reference import upsample_mlp
from eloftr_kernels.window_match.reference import window_match

TEMPERATURE = 0.1

Outputs = tuple[Tensor, ...]
Op = Callable[..., Outputs]


class Implementation(NamedTuple):
    """Somebody's functions for all ops."""

    attention: Callable[..., Tensor]
    update: Callable[..., Tensor]
    lse: Callable[..., tuple[Tensor, Tensor]]
    best: Callable[..., tuple[Tensor, Tensor, Tensor]]
    window: Callable[..., Any]


REFERENCE = Implementation(aggregated_attention, upsample_mlp, dual_softmax_lse, mutual_best, window_match)


def dense_lse(features0: Tensor, features1: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The dual softmax as it is usually written: with the L x S matrix."""
    scores = (features0 / temperature @ features1.mT).float()
    return torch.logsumexp(scores, 2), torch.logsumexp(scores, 1)


def dense_best(
    features0: Tensor, features1: Tensor, temperature: float, row_lse: Tensor, col_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mutual arg-max with the L x S matrix."""
    scores = 2 * (features0 / temperature @ features1.mT).float() - row_lse[:, :, None] - col_lse[:, None]
    score1, best1 = scores.max(2)
    return best1, scores.argmax(1), score1


def operation(op: str, of: Implementation) -> Op:
    """``op`` as a function of tensors that returns a tuple of tensors."""

    def layer(x: Tensor, *rest: Any) -> Outputs:
        return (of.update(x, of.attention(x, x, *rest[:9]), *rest[9:]),)

    def window(*arguments: Any) -> Outputs:
        return tuple(output for output in of.window(*arguments) if output is not None)

    return {
        "aggregated_attention": lambda *a: (of.attention(*a),),
        "upsample_mlp": lambda *a: (of.update(*a),),
        "attention_layer": layer,
        "dual_softmax_lse": lambda *a: tuple(of.lse(*a)),
        "mutual_best": lambda *a: tuple(of.best(*a)),
        "window_match": window,
        "window_match soft": window,
    }[op]


def arguments_of(case: KernelCase, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Seeded arguments of ``case``."""
    widths, (height, width) = PRESETS[case.preset], case.cells0
    batch, channels = case.batch, widths.channels
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    def image(depth: int, rows: int, columns: int) -> Tensor:
        return normal(batch, depth, rows, columns).contiguous(memory_format=torch.channels_last)

    if case.op in ("dual_softmax_lse", "mutual_best"):
        sizes = height * width, case.cells1[0] * case.cells1[1]
        features = [normal(batch, n, channels, scale=channels**-0.5) for n in sizes]
        scored: tuple[Any, ...] = (*features, TEMPERATURE)
        return scored if case.op == "dual_softmax_lse" else (*scored, *dual_softmax_lse(*scored))
    if case.op.startswith("window_match"):
        map0 = 8 * image(
            widths.fine, 4 * height, 4 * width
        )  # pairs of pixels that stand out, as trained ones do
        cells = torch.randint(height * width, (batch * windows_per_pair(case),), generator=generator).to(
            device
        )
        owner = torch.arange(batch, device=device).repeat_interleave(windows_per_pair(case))
        soft = 1.0 if case.op.endswith("soft") else None
        map1 = map0 + image(widths.fine, 4 * height, 4 * width)
        return map0, map1, owner, cells, cells.clone(), widths.subpixel, 10.0, False, soft
    norm = [1 + normal(channels, scale=0.1), normal(channels, scale=0.1)]
    matrices = [normal(channels, channels, scale=channels**-0.5) for _ in range(4)]
    angles = 6 * torch.rand((height // 4) * (width // 4), channels // 2, generator=generator)
    rotary = torch.stack([angles.cos(), angles.sin()]).to(device, dtype)
    attention = (normal(channels, 1, 4, 4, scale=0.25), *norm, *matrices, widths.heads, rotary)
    wide = (2 * channels) ** -0.5
    update = (
        normal(2 * channels, 2 * channels, scale=wide),
        normal(channels, 2 * channels, scale=wide),
        *norm,
    )
    x = image(channels, height, width)
    if case.op == "aggregated_attention":
        return x, image(channels, height, width), *attention
    if case.op == "upsample_mlp":
        return x, image(channels, height // 4, width // 4), *update
    return x, *attention, *update


def windows_per_pair(case: KernelCase) -> int:
    """A third of the cells: what a pair with a good overlap gives."""
    return case.cells0[0] * case.cells0[1] // 3


def forward_work(case: KernelCase, item_bytes: int) -> tuple[float, float]:
    """Least work of the forward pass: operations of its matrix products; bytes of inputs and outputs, each once."""
    widths, batch = PRESETS[case.preset], case.batch
    channels, cells0, cells1 = widths.channels, math.prod(case.cells0), math.prod(case.cells1)
    if case.op in ("dual_softmax_lse", "mutual_best"):
        extra = 4 if case.op == "dual_softmax_lse" else 16  # outputs, and normalisers that are inputs
        moved = batch * (cells0 + cells1) * (channels * item_bytes + extra)
        return 2.0 * batch * cells0 * cells1 * channels, moved
    if case.op.startswith("window_match"):
        windows = batch * windows_per_pair(case)
        upsample = 2 * 6 * widths.fine * (8 * 6 + 8 * 8 + 10 * 6 + 10 * 10)
        correlate = 2 * 64 * 100 * (widths.fine - widths.subpixel)
        return float(windows * (upsample + correlate)), float(
            windows * (2 * 36 * widths.fine * item_bytes + 48)
        )
    tokens = cells0 // 16
    attention = 2.0 * batch * tokens * channels * (16 + 4 * channels + 2 * tokens)
    update = 4.0 * batch * channels**2 * (2 * cells0 + tokens)
    both_maps, message = 2 * batch * channels * cells0, batch * channels * tokens
    if case.op == "aggregated_attention":
        return attention, item_bytes * (both_maps + message + 4.0 * channels**2)
    if case.op == "upsample_mlp":
        return update, item_bytes * (both_maps + message + 6.0 * channels**2)
    return attention + update, item_bytes * (both_maps + 10.0 * channels**2)
