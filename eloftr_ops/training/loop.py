# SPDX-License-Identifier: Apache-2.0
"""``train``: from a configuration to a folder that ``EfficientLoFTR.from_pretrained`` loads.

One process, or several under ``torchrun``; interrupted at any moment, it goes on with the same pairs in the same order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy

from eloftr_ops.config import EfficientLoFTRConfig
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.training.batches import TrainingBatch
from eloftr_ops.training.budget import Budget
from eloftr_ops.training.checkpoints import load_checkpoint, save_checkpoint
from eloftr_ops.training.config import ModelConfig, TrainingConfig
from eloftr_ops.training.config_file import config_to_dict, read_config, write_config
from eloftr_ops.training.data import PairMixture, Textures, batches, validation_batches
from eloftr_ops.training.optimization import learning_rate
from eloftr_ops.training.report import Reporter
from eloftr_ops.training.trainer import StepResult, Trainer
from eloftr_ops.training.validation import Validation, validate
from eloftr_ops.weights import save_pretrained


class TrainingResult(NamedTuple):
    """Where a run stands."""

    folder: Path
    step: int
    finished: bool
    skipped: int  # steps that changed nothing
    best_score: float  # of the validations; -1 if there was none
    model: EfficientLoFTR  # the averaged weights, in evaluation mode


def train(
    config: TrainingConfig,
    *,
    model: EfficientLoFTR | None = None,
    until: int | None = None,
    budget: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainingResult:
    """Train, or go on training, in ``config.run.folder``.

    Args:
        config: the run. Where its folder holds checkpoints, it goes on from the last one that is whole.
        model: to start from, in place of ``config.model``'s.
        until: stop after this step, as a kill would: without a checkpoint of it.
        budget: seconds after which the run must have stopped, with a checkpoint.
        clock: seconds since any moment.

    Raises:
        ValueError: values that do not fit, or a folder of another run or of damaged checkpoints only.
        FileError: data that cannot be read.
        FloatingPointError: too many non-finite steps in a row; the last checkpoint is kept.
    """
    watch = Budget(budget, clock)
    fabric = build_fabric(config)
    fabric.launch()
    run = _Run(config, fabric, model, watch)
    try:
        return run.go(min(config.run.steps, until or config.run.steps), cut=until is not None)
    finally:
        run.reporter.close()


def build_fabric(config: TrainingConfig) -> Fabric:
    """Lightning Fabric with the device and precision of the configuration; DDP under ``torchrun``."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    accelerator = config.run.device
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device, got none. Set run.device to cpu or auto.")
    return Fabric(
        accelerator=accelerator,
        devices=local,
        num_nodes=max(1, world // local),
        strategy=DDPStrategy() if world > 1 else "auto",
        precision=config.run.precision,
    )


def build_model(config: ModelConfig, seed: int) -> EfficientLoFTR:
    """The model of the configuration: pretrained, or random weights of the seed.

    Raises:
        ValueError: unknown preset, weights or field.
    """
    if config.weights is not None:
        model = EfficientLoFTR.from_pretrained(config.weights)
        if config.changes:
            changed = model.config.replace(**config.changes)
            model = EfficientLoFTR.from_pretrained(config.weights, config=changed)
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EfficientLoFTR(EfficientLoFTRConfig.preset(config.preset).replace(**config.changes))


class _Run:
    """A run in one process: the loop around :class:`Trainer`."""

    def __init__(
        self, config: TrainingConfig, fabric: Fabric, model: EfficientLoFTR | None, watch: Budget
    ) -> None:
        self._config, self._fabric, self._watch = config, fabric, watch
        self._folder = Path(config.run.folder)
        self._textures = Textures(config.data, config.validation.hold_out, config.run.seed)
        self._mixture = PairMixture(config.data, self._textures, config.run.seed)
        matcher = model or build_model(config.model, config.run.seed)
        self.trainer = Trainer(config, fabric, matcher)
        found = load_checkpoint(self._folder / "checkpoints")
        if found is not None:
            self.trainer.load_state(found[1])
        self._earlier = self.trainer.seconds
        self.reporter = Reporter(
            self._folder,
            config.run.steps,
            self.trainer.step,
            tensorboard=config.run.tensorboard,
            speaks=fabric.is_global_zero,
        )
        if fabric.is_global_zero:
            self._note_config(resumed=found is not None)

    def go(self, end: int, *, cut: bool) -> TrainingResult:
        """Steps up to ``end``, then what closes a run; not if it is cut."""
        trainer, config = self.trainer, self._config.run
        if trainer.step == 0 and self._config.model.weights is not None:
            self._validate()
        shares = self._shares(range(trainer.step, end))
        while trainer.step < end:
            if self._is_out_of_time():
                self._save()
                break
            since = self._watch.elapsed
            parts = [next(shares) for _ in range(self._config.optimizer.accumulate)]
            result = trainer.take_step(parts)
            self._watch.took("step", since)
            self._tell(result)
            if self._validates_after(trainer.step):
                self._validate()
            if trainer.step == config.steps or trainer.step % config.checkpoint_every == 0:
                self._save()
        if not cut:
            self._export(self._folder / "last")
            if trainer.best_score < 0:
                self._export(self._folder)
        return TrainingResult(
            self._folder,
            trainer.step,
            trainer.step >= config.steps,
            trainer.skipped,
            trainer.best_score,
            trainer.averaged_matcher.eval(),
        )

    def _is_out_of_time(self) -> bool:
        """For all processes together, as soon as it is so for one."""
        upcoming = ["step", "checkpoint"]
        if self._validates_after(self.trainer.step + 1):
            upcoming.append("validation")
        over = torch.tensor([int(self._watch.is_over(*upcoming))], device=self._fabric.device)
        return int(self.trainer.joined(over)) > 0

    def _validates_after(self, step: int) -> bool:
        every = self._config.validation.every
        return every > 0 and (step % every == 0 or step == self._config.run.steps)

    def _shares(self, steps: range) -> Iterator[TrainingBatch | None]:
        return batches(
            self._mixture,
            steps,
            process=self._fabric.global_rank,
            processes=self._fabric.world_size,
            accumulate=self._config.optimizer.accumulate,
        )

    def _tell(self, result: StepResult) -> None:
        trainer = self.trainer
        self.reporter.advance(trainer.step)
        if not result.taken:
            cause = "no true pair" if result.finite else "a non-finite loss or gradient"
            self.reporter.say(f"step {trainer.step} skipped: {cause}")
        if not result.finite or trainer.step % self._config.run.log_every:
            return
        weights = {"homography": self._config.loss.homography_weight, "pose": self._config.loss.pose_weight}
        losses = {name: value for name, value in result.losses.items() if weights.get(name, 1.0) > 0}
        values = {
            "loss": result.loss,
            **losses,
            "confidence": result.confidence,
            "gradient_norm": result.gradient_norm,
            "learning_rate": learning_rate(trainer.step - 1, self._config.run.steps, self._config.optimizer),
            "skipped": trainer.skipped,
            "seconds": self._earlier + self._watch.elapsed,
        }
        self.reporter.record(trainer.step, values)

    def _validate(self) -> None:
        """In the first process; the others wait."""
        since, trainer = self._watch.elapsed, self.trainer
        if self._fabric.is_global_zero:
            pairs = validation_batches(self._config.validation, self._config.data, self._textures)
            result: Validation = validate(trainer.averaged_matcher.fused(), pairs)
            self.reporter.record(
                trainer.step,
                {
                    "matches": result.matches,
                    "right_3px": result.right_3px,
                    "precision_1px": result.precision_1px,
                    "precision_3px": result.precision_3px,
                    "score": result.score,
                },
            )
            if result.score > trainer.best_score:
                trainer.best_score = result.score
                self._export(self._folder)
        self._fabric.barrier()
        self._watch.took("validation", since)

    def _save(self) -> None:
        since = self._watch.elapsed
        self.trainer.seconds = self._earlier + self._watch.elapsed
        if self._fabric.is_global_zero:
            save_checkpoint(
                self._folder / "checkpoints",
                self.trainer.step,
                self.trainer.state(),
                piece_mib=self._config.run.checkpoint_piece_mib,
            )
        self._fabric.barrier()
        self._watch.took("checkpoint", since)

    def _export(self, folder: Path) -> None:
        if self._fabric.is_global_zero:
            save_pretrained(self.trainer.averaged_matcher, folder)

    def _note_config(self, *, resumed: bool) -> None:
        """Keep the configuration beside the run, and say what is not as it was."""
        path = self._folder / "training.yaml"
        if resumed:
            before: dict[str, Any] = config_to_dict(read_config(path)) if path.exists() else {}
            now = config_to_dict(self._config)
            changed = [
                f"{section}.{name}"
                for section, fields in now.items()
                for name, value in fields.items()
                if before and before[section][name] != value
            ]
            self.reporter.say(
                f"going on from step {self.trainer.step}"
                + (f"; changed since then: {', '.join(changed)}" if changed else "")
            )
        write_config(self._config, path)
