# SPDX-License-Identifier: Apache-2.0
"""Backbone features with the maps in between, or without keeping them; attention weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eloftr_kernels.aggregated_attention.naive import rotate_pairs, token_mask
from eloftr_ops import EfficientLoFTR
from eloftr_ops.integrations.transformers.labels import PairFeatures
from eloftr_ops.model.matcher import SIZE_MULTIPLE
from eloftr_ops.model.transformer import AGGREGATION, AggregatedAttention, TransformerLayer, rotary_table

Block = Callable[[nn.Module, Tensor], Tensor]


def walked_features(
    matcher: EfficientLoFTR, images: tuple[Tensor, Tensor], run: Block
) -> tuple[PairFeatures, list[Tensor]]:
    """What ``extract_features`` gives for both images, and the maps (2 B, C, h, w) after every block.

    Both images go through in one batch, all of image 0 first. ``run`` calls a block.
    """
    pixels = torch.cat(images).to(matcher.dtype)
    height, width = pixels.shape[-2:]
    pad = (0, -width % SIZE_MULTIPLE, 0, -height % SIZE_MULTIPLE)
    mask = None
    if any(pad):
        mask = F.pad(torch.ones(len(pixels), height, width, dtype=torch.bool, device=pixels.device), pad)
    maps, ends = [], []
    x = F.pad(pixels, pad).contiguous(memory_format=torch.contiguous_format)
    for index, stage in enumerate(matcher.backbone.stages):
        for block in stage.children():
            x = run(block, x)
            maps.append(x)
        x = x.contiguous(memory_format=torch.channels_last) if index == 0 else x
        ends.append(x)
    named = dict(zip(("half", "quarter", "coarse"), ends[1:], strict=True))
    if mask is not None:
        named["mask"] = mask
    halves = {name: value.chunk(2) for name, value in named.items()}
    first, second = ({name: pair[side] for name, pair in halves.items()} for side in (0, 1))
    return PairFeatures(first, second), maps


def paired(x: Tensor) -> Tensor:
    """(2 B, ...), all of image 0 first -> (2 B, ...), the images of a pair side by side, as transformers has them."""
    pairs: Tensor = x.unflatten(0, (2, -1))
    return pairs.transpose(0, 1).flatten(0, 1)


def run_block(block: nn.Module, x: Tensor) -> Tensor:
    """Call a block."""
    y: Tensor = block(x)
    return y


def recomputed_block(block: nn.Module, x: Tensor) -> Tensor:
    """Call a block, keep its input alone and compute the rest again where the gradient needs it."""
    contexts: Callable[[], Any] = lambda: (contextlib.nullcontext(), _statistics_kept(block))  # noqa: E731
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """The second run of a block must not count a second time in the statistics of its BatchNorms."""
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    tracked = [(norm, norm.running_mean, norm.running_var, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                value = getattr(norm, name)
                setattr(norm, name, None if value is None else value.clone())
        yield
    finally:
        for norm, mean, variance, count in tracked:
            norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, variance, count


def attention_weights(matcher: EfficientLoFTR, features: PairFeatures) -> tuple[Tensor, ...]:
    """The attention weights of every layer; see the output class for their order and shapes."""
    x0, x1 = features.features0["coarse"], features.features1["coarse"]
    mask0, mask1 = (side["mask"][:, ::8, ::8] if "mask" in side else None for side in features)
    tokens = [size // AGGREGATION for size in x0.shape[-2:]]
    rotary = rotary_table(tokens[0], tokens[1], matcher.config, x0.device).to(x0.dtype)
    found: list[Tensor] = []
    for layer in cast(Iterable[TransformerLayer], matcher.transformer.layers):
        within, across = layer.self_attention, layer.cross_attention
        both = torch.cat([x0, x1])
        mask = None if mask0 is None or mask1 is None else torch.cat([mask0, mask1])
        found.append(paired(layer_weights(within, both, both, rotary, mask, mask)))
        x0, x1 = layer.attend_within(x0, x1, rotary, rotary, mask0, mask1)
        found.append(layer_weights(across, x0, x1, None, mask0, mask1))
        x0 = across(x0, x1, None, mask0, mask1)
        found.append(layer_weights(across, x1, x0, None, mask1, mask0))
        x1 = across(x1, x0, None, mask1, mask0)
    return tuple(found)


def layer_weights(
    layer: AggregatedAttention,
    x: Tensor,
    source: Tensor,
    rotary: Tensor | None,
    mask: Tensor | None,
    source_mask: Tensor | None,
) -> Tensor:
    """(B, C, h, w) and the map it attends to -> (B, heads, N, N'), rows sum to one; masked tokens get none."""
    weight = layer.aggregate.weight
    if mask is not None:
        x = x * mask[:, None]
    query = F.conv2d(x, weight, stride=AGGREGATION, groups=x.shape[1])
    if source_mask is not None:
        source = source.masked_fill(~source_mask[:, None], torch.finfo(source.dtype).min)
    key = F.max_pool2d(source, AGGREGATION)
    valid = None if source_mask is None else token_mask(source_mask)
    if valid is not None:
        key = torch.where(valid[:, None], key, 0)
    query, key = (layer.token_norm(t.flatten(2).mT) for t in (query, key))
    q, k = layer.q_proj(query), layer.k_proj(key)
    if rotary is not None:
        q, k = rotate_pairs(q, rotary), rotate_pairs(k, rotary)
    q, k = (t.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for t in (q, k))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if valid is not None:
        scores = scores.masked_fill(~valid.flatten(1)[:, None, None], torch.finfo(scores.dtype).min)
    weights: Tensor = scores.softmax(-1)
    return weights
