# SPDX-License-Identifier: Apache-2.0
"""Launches of the window-match kernels: constants, workspaces, outputs. Imported on the first launch."""

from __future__ import annotations

import torch
from torch import Tensor

from eloftr_kernels.dispatch import dot_precision
from eloftr_kernels.kernel_common import dot_dtype, launch, power_of_2
from eloftr_kernels.window_match import kernel_backward, kernel_forward, naive

_CELL = naive.WINDOW // 2  # half-resolution positions per side of a cell
_PATCH_POSITIONS = (_CELL + 2) ** 2


def window_match_forward(
    map0: Tensor,
    map1: Tensor,
    batch: Tensor,
    cells0: Tensor,
    cells1: Tensor,
    subpixel_channels: int,
    subpixel_temperature: float,
    centred_subpixel: bool,
    soft_temperature: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """pixel0, pixel1, subpixel1, expected0, expected1 (M, 2), the last two empty if not asked for; best."""
    M, soft = len(batch), soft_temperature is not None
    pixel0, pixel1, subpixel1 = (map0.new_empty((M, 2), dtype=torch.float32) for _ in range(3))
    expected0, expected1 = (map0.new_empty((M if soft else 0, 2), dtype=torch.float32) for _ in range(2))
    best = map0.new_empty((M,), dtype=torch.int64)
    outputs = pixel0, pixel1, subpixel1, expected0, expected1, best
    if M:
        launch(kernel_forward._window_match_fwd, (M,),
            map0, map1, batch.contiguous(), cells0.contiguous(), cells1.contiguous(), *outputs,
            *_geometry(map0, map1, subpixel_channels, subpixel_temperature, soft_temperature),
            **_constants(map0, centred_subpixel, soft),
        )  # fmt: skip
    return outputs


def window_match_backward(
    grad_subpixel1: Tensor,
    grad_expected0: Tensor,
    grad_expected1: Tensor,
    best: Tensor,
    map0: Tensor,
    map1: Tensor,
    batch: Tensor,
    cells0: Tensor,
    cells1: Tensor,
    subpixel_channels: int,
    subpixel_temperature: float,
    centred_subpixel: bool,
    soft_temperature: float | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of both maps. Workspace: 36 D elements of the maps' type per match."""
    M, D = len(batch), map0.shape[1]
    grads = []
    for of, (fine_map, cells) in enumerate(((map0, cells0), (map1, cells1))):
        patches = map0.new_empty((M, _PATCH_POSITIONS, D))
        if M:
            launch(kernel_backward._window_match_bwd, (M,),
                map0, map1, batch.contiguous(), cells0.contiguous(), cells1.contiguous(), best,
                grad_subpixel1.contiguous(), grad_expected0.contiguous(), grad_expected1.contiguous(),
                patches, *_geometry(map0, map1, subpixel_channels, subpixel_temperature, soft_temperature),
                OF=of,
                **_constants(map0, centred_subpixel, soft_temperature is not None) | _backward_constants(map0),
            )  # fmt: skip
        grads.append(_to_map(patches, fine_map, batch, cells))
    return grads[0], grads[1]


def _to_map(patches: Tensor, like: Tensor, batch: Tensor, cells: Tensor) -> Tensor:
    """Add up the patches of every cell's matches, in order of the match: the same bits in every run."""
    B, D, H, W = like.shape
    out = torch.empty_like(like)
    if not out.numel():
        return out
    count = (H // _CELL) * (W // _CELL)
    ordered, order = torch.sort(batch * count + cells, stable=True)
    first_cells = torch.arange(B * count + 1, device=like.device)
    start = torch.searchsorted(ordered, first_cells)
    launch(
        kernel_backward._patches_to_map,
        (B * -(-H // _CELL) * -(-W // _CELL),),
        patches,
        order,
        start,
        out,
        *out.stride(),
        H,
        W,
        D,
        BLOCK_D=power_of_2(D),
        num_warps=2,
    )
    return out


def _geometry(
    map0: Tensor,
    map1: Tensor,
    subpixel_channels: int,
    subpixel_temperature: float,
    soft_temperature: float | None,
) -> tuple[int | float, ...]:
    D = map0.shape[1]
    return (
        *map0.stride(), *map1.stride(), map0.shape[0], *map0.shape[2:], *map1.shape[2:], D, D - subpixel_channels,
        1 / (subpixel_channels**0.5 * subpixel_temperature), 1 / (soft_temperature or 1.0),
    )  # fmt: skip


def _constants(like: Tensor, centred_subpixel: bool, soft: bool) -> dict[str, object]:
    return {
        "SHIFT": int(centred_subpixel),
        "SOFT": soft,
        "BLOCK_D": power_of_2(like.shape[1]),
        "DOT": dot_dtype(like.dtype),
        "PRECISION": kernel_forward.dot_precision(like.dtype),
        "num_warps": kernel_forward.num_warps(),
        "num_stages": 1,
    }


def _backward_constants(like: Tensor) -> dict[str, object]:
    """Channels at a time, and exact float32 products as such: three tf32 ones would not fit the registers."""
    return {
        "BLOCK_D": min(power_of_2(like.shape[1]), 16 if like.dtype == torch.float32 else 32),
        "PRECISION": dot_precision(like.dtype),
    }
