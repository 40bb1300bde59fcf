# SPDX-License-Identifier: Apache-2.0
"""``train``: from a configuration to a folder that ``EfficientLoFTR.from_pretrained`` loads.

One process, or several under ``torchrun``. After an interruption the run continues with the same pairs, in the same
order.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy

from eloftr_ops.config import EfficientLoFTRConfig
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.storage import folder_lock
from eloftr_ops.training.batches import TrainingBatch
from eloftr_ops.training.budget import Budget
from eloftr_ops.training.checkpoints import load_checkpoint, save_checkpoint
from eloftr_ops.training.config import ModelConfig, TrainingConfig
from eloftr_ops.training.config_file import config_to_dict, read_config, write_config
from eloftr_ops.training.data import PairMixture, Textures, batches, validation_batches
from eloftr_ops.training.interruption import SIGNALS, Interruption
from eloftr_ops.training.objective import TERMS, term_weights
from eloftr_ops.training.optimization import learning_rate
from eloftr_ops.training.report import Reporter
from eloftr_ops.training.trainer import StepResult, Trainer
from eloftr_ops.training.validation import Validation, validate
from eloftr_ops.weights import save_pretrained


class TrainingResult(NamedTuple):
    """The state of a run when ``train`` returns."""

    folder: Path
    step: int
    finished: bool
    skipped: int  # steps that changed nothing
    best_score: float  # of the validations; -1 if there was none
    model: EfficientLoFTR  # the averaged weights, in evaluation mode
    signal: int | None = None  # that ended the run early: SIGINT or SIGTERM


def train(
    config: TrainingConfig,
    *,
    model: EfficientLoFTR | None = None,
    until: int | None = None,
    budget: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainingResult:
    """Train, or go on training, in ``config.run.folder``.

    Ctrl-C and SIGTERM end the run after the step that is being taken, with a checkpoint.

    Args:
        config: the run. If its folder has checkpoints, the run continues from the last complete one.
        model: to start from, in place of ``config.model``'s.
        until: stop after this step without a checkpoint, like a kill.
        budget: seconds after which the run must have stopped, with a checkpoint.
        clock: seconds since any moment.

    Raises:
        ValueError: values that do not fit, or a folder of another run or of damaged checkpoints only.
        FolderInUseError: (a ``ValueError``) another process trains in the folder.
        FileError: data that cannot be read.
        FloatingPointError: too many non-finite steps in a row; the last checkpoint is kept.
    """
    watch = Budget(budget, clock)
    fabric = build_fabric(config)
    fabric.launch()
    with contextlib.ExitStack() as stack:
        if fabric.is_global_zero:
            stack.enter_context(folder_lock(Path(config.run.folder), "train"))
        run = _Run(config, fabric, model, watch)
        stack.callback(run.reporter.close)
        return run.run(min(config.run.steps, until or config.run.steps), cut=until is not None)


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


class _Agreed(NamedTuple):
    """The same in all processes."""

    out_of_time: bool
    checkpoint_due: bool
    signal: int | None


class _Run:
    """A run in one process: the loop around :class:`Trainer`."""

    def __init__(self, config: TrainingConfig, fabric: Fabric, model: EfficientLoFTR | None, watch: Budget) -> None:
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
        self._saved_step, self._saved_at = self.trainer.step, watch.elapsed
        if fabric.is_global_zero:
            self._write_config(resumed=found is not None)
            self.reporter.say(
                f"training in {self._folder} on {fabric.device}: steps {self.trainer.step} to {config.run.steps}; "
                + self._mixture.describe(self._textures)
            )

    def run(self, end: int, *, cut: bool) -> TrainingResult:
        """Steps up to ``end``, then what closes a run; not if it is cut."""
        with Interruption() as interruption:
            stopped_by = self._take_steps(end, interruption)
        if not cut:
            self._export(self._folder / "last")
            if self.trainer.best_score < 0:
                self._export(self._folder)
        return TrainingResult(
            self._folder,
            self.trainer.step,
            self.trainer.step >= self._config.run.steps,
            self.trainer.skipped,
            self.trainer.best_score,
            self.trainer.averaged_matcher.eval(),
            stopped_by,
        )

    def _take_steps(self, end: int, interruption: Interruption) -> int | None:
        """Up to ``end``, the end of the time, or a signal, which is returned."""
        trainer, config = self.trainer, self._config.run
        if trainer.step == 0 and self._config.model.weights is not None:
            self._validate()
        shares = self._shares(range(trainer.step, end))
        while trainer.step < end:
            agreed = self._agree(interruption.signal)
            if agreed.out_of_time or agreed.signal is not None or agreed.checkpoint_due:
                self._save()
            if agreed.out_of_time or agreed.signal is not None:
                return agreed.signal
            since = self._watch.elapsed
            parts = [next(shares) for _ in range(self._config.optimizer.accumulate)]
            result = trainer.take_step(parts)
            self._watch.took("step", since)
            self._log_step(result)
            if self._validates_after(trainer.step):
                self._validate()
            if trainer.step == config.steps or trainer.step % config.checkpoint_every == 0:
                self._save()
        return None

    def _agree(self, received: int | None) -> _Agreed:
        """What all processes do before the next step, as soon as one of them has a reason."""
        upcoming = ["step", "checkpoint"]
        if self._validates_after(self.trainer.step + 1):
            upcoming.append("validation")
        due = self._watch.noted - self._saved_at >= self._config.run.checkpoint_seconds
        over = self._watch.is_over(*upcoming)
        reasons = [over, due, *(received == number for number in SIGNALS)]
        votes = torch.tensor([int(reason) for reason in reasons], device=self._fabric.device)
        over, due, *signals = (vote > 0 for vote in self.trainer.joined(votes).tolist())
        return _Agreed(over, due, next((int(n) for n, sent in zip(SIGNALS, signals, strict=True) if sent), None))

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

    def _log_step(self, result: StepResult) -> None:
        trainer = self.trainer
        self.reporter.advance(trainer.step)
        supervised = self._config.objective.kind == "supervised"
        if not result.taken:
            nothing = "no true pair" if supervised else "nothing that was drawn earned a reward"
            cause = nothing if result.finite else "a non-finite loss or gradient"
            self.reporter.say(f"step {trainer.step} skipped: {cause}")
        if not result.finite or trainer.step % self._config.run.log_every:
            return
        weights = dict(zip(TERMS, term_weights(self._config.loss, self._config.objective), strict=True))
        losses = {name: value for name, value in result.losses.items() if weights[name] > 0}
        values = {
            "loss": result.loss,
            **losses,
            "confidence" if supervised else "reward": result.confidence,
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
        """A checkpoint of this step, unless there is one."""
        if self._saved_step == self.trainer.step and self.trainer.step > 0:
            return
        since = self._watch.elapsed
        self.trainer.seconds = self._earlier + since
        if self._fabric.is_global_zero:
            save_checkpoint(
                self._folder / "checkpoints",
                self.trainer.step,
                self.trainer.state(),
                piece_mib=self._config.run.checkpoint_piece_mib,
            )
        self._fabric.barrier()
        self._watch.took("checkpoint", since)
        self._saved_step, self._saved_at = self.trainer.step, since

    def _export(self, folder: Path) -> None:
        if self._fabric.is_global_zero:
            save_pretrained(self.trainer.averaged_matcher, folder)

    def _write_config(self, *, resumed: bool) -> None:
        """Keep the configuration beside the run, and say what is not as it was."""
        path = self._folder / "training.yaml"
        if resumed:
            self.reporter.say(f"going on from step {self.trainer.step}{self._changes_since(path)}")
        write_config(self._config, path)

    def _changes_since(self, path: Path) -> str:
        """What is not as it was; the file is for readers, and a run goes on where it cannot be read."""
        if not path.exists():
            return ""
        try:
            before = config_to_dict(read_config(path))
        except ValueError as error:
            return f"; the earlier configuration is replaced, since it cannot be read ({error})"
        changed = [
            f"{section}.{name}"
            for section, fields in config_to_dict(self._config).items()
            for name, value in fields.items()
            if before[section][name] != value
        ]
        return f"; changed since then: {', '.join(changed)}" if changed else ""
