# SPDX-License-Identifier: Apache-2.0
"""One optimiser step over all processes, and the state from which a run continues.

A step has ``processes * accumulate`` micro-batches. First all are labelled, and the label counts are summed over all
processes. Then each goes forward and backward. The gradient is that of one large batch, except for BatchNorm that is
not frozen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from eloftr_ops.geometry._precision import has_float64
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.training.batches import TrainingBatch
from eloftr_ops.training.config import TrainingConfig
from eloftr_ops.training.objective import (
    TERMS,
    Labels,
    Objective,
    Part,
    coarse_labels,
    fine_labels,
    label_counts,
    no_labels,
    term_weights,
)
from eloftr_ops.training.optimization import averaged, build_optimizer, learning_rate, train_mode


class GradientResult(NamedTuple):
    """What the gradient of a step came with, the same in every process."""

    loss: float
    losses: dict[str, float]  # by term: mean over the joined batch, before weights
    confidence: float  # mean of the true pairs; with rewards, the mean reward
    pairs: int  # true pairs of cells; with rewards, pairs of images
    finite: bool


class StepResult(NamedTuple):
    """The results of a step, the same in each process."""

    loss: float
    losses: dict[str, float]  # by term: mean over the joined batch, before weights
    confidence: float  # mean of the true pairs; with rewards, the mean reward
    gradient_norm: float  # before clipping
    pairs: int  # true pairs of cells; with rewards, pairs of images
    taken: bool  # the weights were changed
    finite: bool


class Trainer:
    """The model, its optimiser and its averaged weights; ``take_step`` trains them.

    Args:
        config: of the run.
        fabric: launched.
        matcher: what is trained; moved to the device.

    Raises:
        ValueError: a model that cannot be trained with this configuration.
    """

    def __init__(self, config: TrainingConfig, fabric: Fabric, matcher: EfficientLoFTR) -> None:
        if matcher.config.score != "dual_softmax":
            raise ValueError(
                f"model: expected score dual_softmax, got {matcher.config.score}; the losses are of probabilities. Set "
                "model.changes: {score: dual_softmax, threshold: 0.2} and change it back at inference."
            )
        if config.model.sync_batch_norm:
            if fabric.device.type != "cuda":
                raise ValueError(
                    "sync_batch_norm: expected CUDA devices, got the CPU. Use freeze_batch_norm, or neither."
                )
            matcher = nn.SyncBatchNorm.convert_sync_batchnorm(matcher)
        if config.model.channels_last:
            matcher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.config, self.fabric, self.matcher = config, fabric, matcher
        self.step = self.skipped = self.bad_in_a_row = 0
        self.best_score = -1.0
        self.seconds = 0.0
        self._adam = build_optimizer(matcher, config.optimizer)
        objective = Objective(matcher, config.loss, config.objective, touch_all=fabric.world_size > 1)
        self._module, self._optimizer = fabric.setup(objective, self._adam)
        self.average = averaged(matcher, config.optimizer.ema_decay)
        if config.model.compile:
            for part in (matcher.backbone, matcher.transformer, matcher.pyramid):
                part.compile()

    @property
    def averaged_matcher(self) -> EfficientLoFTR:
        """The averaged model."""
        module = self.average.module
        if not isinstance(module, EfficientLoFTR):
            raise TypeError(f"model: expected an EfficientLoFTR, got {type(module).__name__}.")
        return module

    def take_step(self, parts: Sequence[TrainingBatch | None]) -> StepResult:
        """Gradient of the parts of all processes, then a step of the optimiser if all is finite.

        A step that is not finite leaves weights, their average, the optimiser and BatchNorm statistics as they were.
        One without any gradient other than zero (no true pair anywhere) changes no weights either.

        Raises:
            FloatingPointError: too many non-finite steps in a row; in every process.
        """
        before = [buffer.clone() for buffer in self.matcher.buffers()]
        result = self._update(self.gradients(parts))
        if not result.finite:
            for buffer, old in zip(self.matcher.buffers(), before, strict=True):
                buffer.copy_(old)
        self.step += 1
        self.skipped += not result.taken
        self.bad_in_a_row = 0 if result.finite else self.bad_in_a_row + 1
        if self.bad_in_a_row >= self.config.optimizer.max_bad_steps:
            raise FloatingPointError(
                f"{self.bad_in_a_row} steps in a row, up to {self.step}, had a non-finite loss or gradient. The last "
                "checkpoint is kept. Lower optimizer.learning_rate, or set run.precision to 32-true."
            )
        return result

    def gradients(self, parts: Sequence[TrainingBatch | None]) -> GradientResult:
        """Leave the gradient of the joined batch in the parameters of every process, before clipping.

        Args:
            parts: the process's own share; every process has the same number of parts.
        """
        train_mode(self.matcher, freeze_batch_norm=self.config.model.freeze_batch_norm)
        self._optimizer.zero_grad(set_to_none=True)
        fine = self.step >= self.config.loss.fine_from
        batches = [None if part is None else self.fabric.to_device(part) for part in parts]
        labels, counts = self._label(batches, fine)
        device = self.fabric.device
        dtype = torch.float64 if has_float64(device) else torch.float32
        sums = torch.zeros(len(TERMS) + 1, device=device, dtype=dtype)
        for number, (batch, own) in enumerate(zip(batches, labels, strict=True), 1):
            with self.fabric.no_backward_sync(self._module, enabled=number < len(batches)):
                loss, part_sums = self._module(Part(batch, own, counts))
                # Processes average their gradients, while the counts are those of all of them.
                self.fabric.backward(loss * self.fabric.world_size)
            sums += part_sums
        if not fine:
            self.matcher.pyramid.zero_grad(set_to_none=True)
        return self._result(self.joined(sums), counts)

    def _label(self, batches: Sequence[TrainingBatch | None], fine: bool) -> tuple[list[Labels | None], Tensor]:
        """Labels of the parts, and the counts (6,) of the joined batch."""
        config, objective, device = self.config.loss, self.config.objective, self.fabric.device
        if objective.kind != "supervised":
            unlabelled = [None if batch is None else no_labels(batch) for batch in batches]
            return unlabelled, self.joined(self._counted(batches, unlabelled))
        with self.fabric.autocast():
            labels = [
                None if batch is None else coarse_labels(self.matcher, batch, config, fine=fine) for batch in batches
            ]
        if fine:
            own = sum(len(found.pairs.batch) for found in labels if found is not None)
            total = int(self.joined(torch.tensor([own], device=device)))
            labels = [
                None if batch is None or found is None else fine_labels(batch, found, config, total)
                for batch, found in zip(batches, labels, strict=True)
            ]
        return labels, self.joined(self._counted(batches, labels))

    def _counted(self, batches: Sequence[TrainingBatch | None], labels: Sequence[Labels | None]) -> Tensor:
        """Label counts (6,) of the parts of this process."""
        counts = torch.zeros(len(TERMS), device=self.fabric.device, dtype=torch.int64)
        for batch, found in zip(batches, labels, strict=True):
            if batch is not None and found is not None:
                counts += label_counts(batch, found, self.config.objective)
        return counts

    def _result(self, sums: Tensor, counts: Tensor) -> GradientResult:
        # One transfer for all numbers: each waits for the device.
        numbers = torch.cat([sums[:-1] / counts.clamp_min(1), sums, counts.to(sums)]).tolist()
        means, totals, found = numbers[: len(counts)], numbers[len(counts) : -len(counts)], numbers[-len(counts) :]
        weighted = zip(means, term_weights(self.config.loss, self.config.objective), strict=True)
        loss = sum(mean * weight for mean, weight in weighted if weight > 0)
        pairs = int(found[0] if self.config.objective.kind == "supervised" else found[-1])
        return GradientResult(
            loss=loss,
            losses=dict(zip(TERMS, means, strict=True)),
            confidence=totals[-1] / max(pairs, 1),
            pairs=pairs,
            finite=all(map(math.isfinite, totals)),
        )

    def _update(self, gradients: GradientResult) -> StepResult:
        """Clip, decide, step; gradients are the same in every process, and so is the decision."""
        rate = learning_rate(self.step, self.config.run.steps, self.config.optimizer)
        for group in self._adam.param_groups:
            group["lr"] = rate * group["factor"]
        norm = self.fabric.clip_gradients(
            self._module,
            self._optimizer,
            max_norm=self.config.optimizer.clip_norm,
            error_if_nonfinite=False,
        )
        if norm is None:
            raise RuntimeError("clip_gradients: expected a norm, got none.")
        length = float(norm)
        finite = gradients.finite and math.isfinite(length)
        taken = finite and length > 0
        if taken:
            self._optimizer.step()
            self.average.update_parameters(self.matcher)
        elif (scaler := getattr(self.fabric.strategy.precision, "scaler", None)) is not None:
            scaler.update()  # lowers the scale if it was the cause
        return StepResult(
            loss=gradients.loss,
            losses=gradients.losses,
            confidence=gradients.confidence,
            gradient_norm=length,
            pairs=gradients.pairs,
            taken=taken,
            finite=finite,
        )

    def joined(self, tensor: Tensor) -> Tensor:
        """Sum over all processes."""
        reduced = self.fabric.all_reduce(tensor, reduce_op="sum")
        if not isinstance(reduced, Tensor):
            raise TypeError(f"all_reduce: expected a tensor, got {type(reduced).__name__}.")
        return reduced

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, but for the data, which depend on the step alone."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "bad_in_a_row": self.bad_in_a_row,
            "best_score": self.best_score,
            "seconds": self.seconds,
            "model": self.matcher.state_dict(),
            "optimizer": self._adam.state_dict(),
            "average": self.average.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`.

        Raises:
            ValueError: it is that of another model, or lacks something.
        """
        try:
            self.matcher.load_state_dict(state["model"])
            self._adam.load_state_dict(state["optimizer"])
            self.average.load_state_dict(state["average"])
            self.fabric.strategy.precision.load_state_dict(state["precision"])
            self.step, self.skipped = int(state["step"]), int(state["skipped"])
            self.bad_in_a_row, self.best_score = int(state["bad_in_a_row"]), float(state["best_score"])
            self.seconds = float(state["seconds"])
        except (KeyError, RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(
                f"checkpoint: expected the state of this configuration's model, got another one ({error}). Use another "
                "run.folder, or the configuration that the folder was made with (its training.yaml)."
            ) from error
