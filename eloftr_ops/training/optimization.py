# SPDX-License-Identifier: Apache-2.0
"""Parameter groups, learning rate, averaged weights, BatchNorm in training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.training.config import OptimizerConfig

_Tensors = tuple[Tensor, ...] | list[Tensor]


def build_optimizer(matcher: EfficientLoFTR, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW whose groups hold a ``factor`` on the rate; norms and biases are not decayed."""
    pyramid = set(matcher.pyramid.parameters())
    groups: list[dict[str, Any]] = []
    for fine in (False, True):
        own = [parameter for parameter in matcher.parameters() if (parameter in pyramid) == fine]
        factor = config.pyramid_rate if fine else 1.0
        matrices, vectors = [p for p in own if p.ndim > 1], [p for p in own if p.ndim <= 1]
        groups.append({"params": matrices, "weight_decay": config.weight_decay, "factor": factor})
        groups.append({"params": vectors, "weight_decay": 0.0, "factor": factor})
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99))


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up, then half a cosine down to ``final_rate`` of the rate at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * share)


def averaged(matcher: EfficientLoFTR, decay: float) -> torch.optim.swa_utils.AveragedModel:
    """Exponential average of weights and BatchNorm statistics.

    After n updates the decay is at most (1 + n) / (10 + n). Otherwise a short run would keep its initial weights.
    """

    def average(means: _Tensors, current: _Tensors, count: Tensor | int) -> None:
        n = float(count)
        warmed = min(decay, (1 + n) / (10 + n))
        torch.optim.swa_utils.get_ema_multi_avg_fn(warmed)(means, current, count)

    return torch.optim.swa_utils.AveragedModel(matcher, multi_avg_fn=average, use_buffers=True)


@contextmanager
def evaluation_mode(matcher: EfficientLoFTR) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module in the mode that it was in, frozen BatchNorms too."""
    modes = {module: module.training for module in matcher.modules()}
    matcher.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def train_mode(matcher: EfficientLoFTR, *, freeze_batch_norm: bool) -> None:
    """Training mode, but for BatchNorm if it is frozen."""
    matcher.train()
    if freeze_batch_norm:
        for module in matcher.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
