# SPDX-License-Identifier: Apache-2.0
"""Supervised training on rendered homographies: resumable at any step, on one device.

Every step draws its data from a generator seeded with (seed, step), so a run that was interrupted and resumed sees
the batches of one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_ops.config import EfficientLoFTRConfig
from eloftr_ops.data import HomographyBatch, HomographyPairs
from eloftr_ops.losses.matching import MatchingLosses, coarse_focal_loss, window_losses
from eloftr_ops.matcher import EfficientLoFTR
from eloftr_ops.training.supervision import (
    pairs_from_homography,
    sample_pairs,
    window_targets_from_homography,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How :func:`train` goes about it.

    Args:
        steps: optimiser steps in all.
        batch_pixels: pixels per image side of a batch: the batch holds as many pairs of the step's size as fit.
        sizes: (height, width) of the pairs, one drawn per step.
        learning_rate: after warm-up; constant until the decay.
        warmup_steps: linear warm-up.
        decay_steps: last steps, over which the rate falls linearly to a hundredth.
        fine_from: step from which the fine losses are trained too; before it the pyramid is not run.
        windows: windows of true pairs that the fine losses look at, per batch.
        fine_weight: of the pixel and sub-pixel losses together.
        subpixel_weight: of the sub-pixel loss within them.
        weight_decay: AdamW.
        clip_norm: largest gradient norm.
        ema_decay: of the averaged weights, which are what is exported.
        max_bad_steps: non-finite steps in a row (skipped, counted) after which the run stops.
        checkpoint_every: steps between checkpoints.
        log_every: steps between log lines.
        bfloat16: autocast to bfloat16.
        seed: of the data.
    """

    steps: int = 20_000
    batch_pixels: int = 4 * 256 * 256
    sizes: tuple[tuple[int, int], ...] = ((256, 256),)
    learning_rate: float = 1e-3
    warmup_steps: int = 300
    decay_steps: int = 3_000
    fine_from: int = 0
    windows: int = 128
    fine_weight: float = 0.25
    subpixel_weight: float = 1.0
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    max_bad_steps: int = 20
    checkpoint_every: int = 250
    log_every: int = 50
    bfloat16: bool = True
    seed: int = 0


class StepResult(NamedTuple):
    """What one batch gave."""

    losses: MatchingLosses
    confidence: Tensor  # mean confidence of true pairs


def train(
    model: EfficientLoFTR,
    pairs: HomographyPairs,
    config: TrainingConfig,
    folder: Path,
    *,
    until: int | None = None,
) -> EfficientLoFTR:
    """Train, or go on training, ``model`` in ``folder``; returns the averaged model in evaluation mode.

    Args:
        model: starting point; where ``folder`` holds a checkpoint, that is loaded over it.
        pairs: what the batches are rendered from, on the model's device.
        config: the run.
        folder: ``checkpoint.pt`` (replaced atomically) and ``log.jsonl`` are kept here.
        until: stop after this step instead of ``config.steps``; the schedule stays that of ``config``.

    Raises:
        FloatingPointError: too many non-finite steps in a row; the last checkpoint is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        _groups(model, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.99)
    )
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema_decay), use_buffers=True
    )
    step = _resume(folder / "checkpoint.pt", model, optimizer, average)
    bad, started = 0, time.monotonic()
    while step < min(config.steps, until or config.steps):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        result = _step(model, optimizer, pairs, config, step)
        bad = 0 if result is not None else bad + 1
        if bad >= config.max_bad_steps:
            raise FloatingPointError(
                f"{bad} steps in a row, up to {step}, had a non-finite loss or gradient. "
                "Lower learning_rate, or train without bfloat16."
            )
        if result is not None:
            average.update_parameters(model)
        step += 1
        if result is not None and step % config.log_every == 0:
            _log(folder / "log.jsonl", step, result, time.monotonic() - started)
        if step % config.checkpoint_every == 0 or step == config.steps:
            _save(folder / "checkpoint.pt", step, model, optimizer, average)
    trained = average.module
    if not isinstance(trained, EfficientLoFTR):
        raise TypeError(f"model: expected an EfficientLoFTR, got {type(trained).__name__}.")
    return trained.eval()


def batch_losses(
    model: EfficientLoFTR,
    batch: HomographyBatch,
    config: TrainingConfig,
    generator: torch.Generator,
    *,
    fine: bool,
) -> StepResult:
    """Losses of one rendered batch; ``generator`` draws the windows, ``fine`` runs the fine stage."""
    model_config: EfficientLoFTRConfig = model.config
    features0, features1 = model.pair_features({"image0": batch.image0, "image1": batch.image1})
    maps = model.match_maps(features0, features1, with_best=False)
    grid0, grid1 = maps.grids
    valid0, valid1 = _valid_cells(batch.valid0, grid0), _valid_cells(batch.valid1, grid1)
    true = pairs_from_homography(batch.H_0to1, grid0, grid1, valid0, valid1)
    coarse, confidence = coarse_focal_loss(maps.scores, true, model_config)
    pixel = subpixel = coarse.new_zeros(())
    if fine:
        sampled = sample_pairs(true, config.windows, generator)
        targets = window_targets_from_homography(batch.H_0to1, sampled, grid0, grid1)
        fine0, fine1 = model.fine_maps(features0, features1, maps)
        pixel, subpixel = window_losses(fine0, fine1, sampled, targets, model_config)
    return StepResult(MatchingLosses(coarse, pixel, subpixel), confidence)


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Warm-up, plateau, linear decay to a hundredth."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    left = min(1.0, max(0.01, (config.steps - step) / max(1, config.decay_steps)))
    return config.learning_rate * warm * left


def _step(
    model: EfficientLoFTR,
    optimizer: torch.optim.Optimizer,
    pairs: HomographyPairs,
    config: TrainingConfig,
    step: int,
) -> StepResult | None:
    """One optimiser step; None, and nothing changed but BatchNorm statistics, if it is not finite."""
    generator = torch.Generator().manual_seed((config.seed << 32) + step)
    size = config.sizes[int(torch.randint(len(config.sizes), (), generator=generator))]
    batch = pairs.sample(max(1, config.batch_pixels // math.prod(size)), size, generator)
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=config.bfloat16):
        result = batch_losses(model, batch, config, generator, fine=step >= config.fine_from)
    coarse, pixel, subpixel = result.losses
    loss = coarse + config.fine_weight * (pixel + config.subpixel_weight * subpixel)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    if not bool(torch.isfinite(norm + loss)):
        return None
    optimizer.step()
    return StepResult(MatchingLosses(*(x.detach() for x in result.losses)), result.confidence)


def _valid_cells(valid: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, 1, H, W) bool pixels -> (B, h, w) bool cells; those that complete the image are not valid."""
    cells = valid[:, 0, ::8, ::8]
    return F.pad(cells, (0, grid[1] - cells.shape[2], 0, grid[0] - cells.shape[1]))


def _groups(model: EfficientLoFTR, weight_decay: float) -> list[dict[str, Any]]:
    """Norms and biases are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _save(path: Path, step: int, model: Any, optimizer: Any, average: Any) -> None:
    """Write beside, then rename: a kill leaves the old file or the new one, never half of one."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average.state_dict(),
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def _resume(path: Path, model: Any, optimizer: Any, average: Any) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    average.load_state_dict(state["average"])
    return int(state["step"])


def _log(path: Path, step: int, result: StepResult, seconds: float) -> None:
    record = {"step": step, "seconds": round(seconds, 1), "confidence": round(float(result.confidence), 4)}
    record |= {name: round(float(value), 4) for name, value in result.losses._asdict().items()}
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
