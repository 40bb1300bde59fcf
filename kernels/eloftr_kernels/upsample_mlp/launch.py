# SPDX-License-Identifier: Apache-2.0
"""Launches of the kernels of the message's upsampling and MLP: tiles, buffers, and what library products do."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_kernels import dispatch
from eloftr_kernels.aggregated_attention.naive import AGGREGATION, token_mask
from eloftr_kernels.kernel_common import blocks, launch, next_power_of_2, power_of_2
from eloftr_kernels.upsample_mlp.kernel_backward import _hidden_bwd, _update_bwd, _upsample_bwd
from eloftr_kernels.upsample_mlp.kernel_forward import _upsample_mlp_fwd
from eloftr_kernels.upsample_mlp.naive import MlpWeights, common_part


class Tiles(NamedTuple):
    """What a program takes: positions of the map, multiples of a token's four, and hidden units at a time."""

    rows: int
    columns: int
    hidden: int
    num_warps: int
    num_stages: int


# A larger tile reads the weights less often. Hopper multiplies 64 rows at a time and needs 128 for two groups of warps.
EXACT = Tiles(4, 4, 16, 4, 1)  # float32
TILES = (  # half precision, by the least shared memory
    (200 * 1024, Tiles(8, 16, 64, 8, 2)),
    (120 * 1024, Tiles(8, 8, 32, 8, 2)),
    (0, Tiles(4, 8, 32, 4, 2)),
)
# The recomputation has more to keep in registers.
RECOMPUTED = {
    Tiles(8, 16, 64, 8, 2): Tiles(8, 8, 64, 8, 2),
    Tiles(8, 8, 32, 8, 2): Tiles(4, 8, 32, 8, 2),
    Tiles(4, 8, 32, 4, 2): Tiles(4, 8, 32, 8, 2),
}


def forward(
    x: Tensor,
    message: Tensor,
    weights: MlpWeights,
    mask: Tensor | None,
) -> Tensor:
    """Launch the forward kernel. Workspace: (B, h * w, 2C), the first layer of the message at its own resolution."""
    batch, channels, height, width = x.shape
    y = x.new_empty((batch, height, width, channels))
    coarse, common = _first_layer(x, _tokens(message), weights.expand)
    options = _options(x, coarse.dtype, mask is not None)
    if batch:
        launch(_upsample_mlp_fwd, (_count(options, height, width), batch),
            x, coarse, common, weights.expand.contiguous(), weights.contract.contiguous(), weights.norm.contiguous(),
            weights.norm_bias.contiguous(), *_masks(x, mask), y, height, width, *x.stride(), **options,
        )  # fmt: skip
    return y.permute(0, 3, 1, 2)


def backward(
    grad: Tensor,  # (B, C, H, W)
    x: Tensor,
    message: Tensor,
    weights: MlpWeights,
    mask: Tensor | None,
) -> list[Tensor]:
    """Gradients to x, message and the weights, in the order of :class:`MlpWeights`.

    Workspaces, of which only the backward pass has need: (B, H * W, 2C) activations and their gradients, and
    (B, H * W, C) of the update, from which ``torch.matmul`` makes the weight gradients.
    """
    batch, channels, height, width = x.shape
    dtype, masked = weights.expand.dtype, mask is not None
    tokens = _tokens(message)
    coarse, common = _first_layer(x, tokens, weights.expand)
    mask_, valid = _masks(x, mask)
    grad_x, grad_coarse = torch.empty_like(x), torch.empty_like(coarse)
    grad_update = x.new_empty((batch, height * width, channels), dtype=dtype)
    active, grad_hidden = (x.new_empty((batch, height * width, 2 * channels), dtype=dtype) for _ in range(2))
    share = x.new_empty((batch, height, width) if masked else (0,), dtype=torch.float32)
    expand, contract = weights.expand.contiguous(), weights.contract.contiguous()
    recompute, through = _options(x, dtype, masked, recompute=True), _options(x, dtype, masked)
    tiles = _count(recompute, height, width)
    norm = x.new_empty((batch * tiles, 2, channels), dtype=torch.float32)
    if batch:
        launch(_update_bwd, (tiles, batch),
            grad, x, coarse, common, expand, contract, weights.norm.contiguous(), mask_, valid, grad_update,
            active, share, norm, height, width, *grad.stride(), *x.stride(), **recompute,
        )  # fmt: skip
        positions = through.pop("ROWS") * through.pop("COLUMNS")
        del through["BLOCK_T"]
        launch(_hidden_bwd, (blocks(height * width, positions), batch),
            grad, grad_update, active, expand, contract, mask_, grad_hidden, grad_x, height, width,
            *grad.stride(), *grad_x.stride(), **(through | {"BLOCK_P": positions}),
        )  # fmt: skip
        launch(_upsample_bwd, (blocks(tokens.shape[1], 16), blocks(2 * channels, 64), batch),
            grad_hidden, valid, share, grad_coarse, height, width, C=channels, HAS_MASK=masked, BLOCK_T=16,
            BLOCK_U=64, num_warps=4,
        )  # fmt: skip
    cells = x.permute(0, 2, 3, 1).reshape(-1, channels).to(dtype)
    grad_expand = torch.cat(
        [grad_hidden.flatten(0, 1).T @ cells, grad_coarse.flatten(0, 1).T @ tokens.flatten(0, 1)], 1
    )
    grad_contract = grad_update.flatten(0, 1).T @ active.flatten(0, 1)
    grad_message = (grad_coarse @ expand[:, channels:]).reshape(batch, *message.shape[2:], channels)
    grad_norm = norm.sum(0).to(weights.norm.dtype)
    of_weights = MlpWeights(
        expand=grad_expand,
        contract=grad_contract,
        # Two views of one buffer may not leave an operator.
        norm=grad_norm[0].clone(),
        norm_bias=grad_norm[1].clone(),
    )
    return [grad_x, grad_message.permute(0, 3, 1, 2), *of_weights]


def _first_layer(x: Tensor, tokens: Tensor, expand: Tensor) -> tuple[Tensor, Tensor | None]:
    """(B, h * w, 2C) the message's part of it, with that of what all positions of ``x`` have in common; the latter."""
    of_x, of_message = expand.split(x.shape[1], 1)
    common = common_part(x, expand.dtype)
    if common is None:
        return F.linear(tokens, of_message), None
    shift = F.linear(common, of_x)[:, None]
    return torch.baddbmm(shift, tokens, of_message.T.expand(len(tokens), -1, -1)), common


def _tokens(message: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h * w, C), a view where it is channels last in memory."""
    batch, channels = message.shape[:2]
    return message.permute(0, 2, 3, 1).reshape(batch, message.shape[2] * message.shape[3], channels)


def _masks(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mask of cells and of tokens; without one, stand-ins that no kernel reads."""
    return (x, x) if mask is None else (mask.contiguous(), token_mask(mask))


def _options(x: Tensor, dtype: torch.dtype, masked: bool, *, recompute: bool = False) -> dict[str, Any]:
    """Constants of a kernel over positions: one fixed choice per dtype and machine, no timing at the first call."""
    shared = dispatch.shared_memory(x.device)
    tiles = EXACT if dtype == torch.float32 else next(t for least, t in TILES if shared >= least)
    tiles = RECOMPUTED.get(tiles, tiles) if recompute else tiles
    tokens = (tiles.rows // AGGREGATION + 2) * (tiles.columns // AGGREGATION + 2)
    return {
        "C": x.shape[1],
        "HAS_MASK": masked,
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "BLOCK_T": power_of_2(tokens),
        "BLOCK_C": next_power_of_2(x.shape[1]),
        "BLOCK_U": tiles.hidden,
        "PRECISION": dispatch.dot_precision(dtype),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _count(options: dict[str, Any], height: int, width: int) -> int:
    """Tiles of positions that cover a map."""
    return blocks(height, options["ROWS"]) * blocks(width, options["COLUMNS"])
