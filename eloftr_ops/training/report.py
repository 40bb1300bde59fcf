# SPDX-License-Identifier: Apache-2.0
"""The reports of a run: ``log.jsonl``, TensorBoard scalars, a progress bar or plain lines."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eloftr_ops.storage import write_file

_FIRST_PACE = 10.0  # seconds after which the time left is told for the first time


class Reporter:
    """The reports of one process; only the first process writes any.

    Args:
        folder: of the run.
        steps: in all.
        step: that the run starts from; records of later steps, which a kill left behind, are removed.
        tensorboard: write scalars.
        speaks: this is the first process.
    """

    def __init__(self, folder: Path, steps: int, step: int, *, tensorboard: bool, speaks: bool) -> None:
        self._log = folder / "log.jsonl"
        self._speaks, self._steps = speaks, steps
        self._start, self._first, self._paced = time.monotonic(), step, False
        self._writer: Any = None
        self._progress: Progress | None = None
        if not speaks:
            return
        folder.mkdir(parents=True, exist_ok=True)
        _forget_after(self._log, step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if sys.stderr.isatty():
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._progress = Progress(*columns, console=Console(stderr=True))
            self._task = self._progress.add_task("", total=steps, completed=step)
            self._progress.start()

    def record(self, step: int, values: dict[str, float | int]) -> None:
        """One line of the log, and one scalar per value."""
        if not self._speaks:
            return
        rounded = {name: float(f"{v:.7g}") if isinstance(v, float) else v for name, v in values.items()}
        with self._log.open("a") as file:
            file.write(json.dumps({"step": step, **rounded}) + "\n")
        for name, value in rounded.items():
            if self._writer is not None:
                self._writer.add_scalar(name, value, step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in rounded.items())
        if self._progress is None:
            self.say(f"step {step} of {self._steps}  {shown}  {self._pace(step)}")
        else:
            self._progress.update(self._task, description=shown)

    def advance(self, step: int) -> None:
        """The step is done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)
        elif not self._paced and time.monotonic() - self._start >= _FIRST_PACE:
            self.say(f"step {step} of {self._steps}  {self._pace(step)}")
            self._paced = True

    def say(self, text: str) -> None:
        """A line on standard error."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        elif self._speaks:
            typer.echo(text, err=True)

    def _pace(self, step: int) -> str:
        """Time per step, validations and checkpoints included, and until the end."""
        if step <= self._first:
            return ""
        each = (time.monotonic() - self._start) / (step - self._first)
        return f"{each:.2g} s a step, {_in_words(each * (self._steps - step))} left"

    def close(self) -> None:
        """End the bar and flush the scalars."""
        if self._progress is not None:
            self._progress.stop()
        if self._writer is not None:
            self._writer.close()


def _in_words(seconds: float) -> str:
    """90 s, 25 min or 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _forget_after(log: Path, step: int) -> None:
    """Drop records of steps that will be done again, and a line that a kill cut off."""
    if not log.exists():
        return
    lines = log.read_bytes().splitlines(keepends=True)
    write_file(log, b"".join(line for line in lines if _step_of(line) <= step))


def _step_of(line: bytes) -> float:
    """Infinity for half a line, and for one that is no text."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
