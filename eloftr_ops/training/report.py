# SPDX-License-Identifier: Apache-2.0
"""What a run tells while it goes: ``log.jsonl``, TensorBoard scalars, a progress bar or plain lines."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eloftr_ops.storage import write_file


class Reporter:
    """Of one process: all but the first say nothing.

    Args:
        folder: of the run.
        steps: in all.
        step: that the run starts from; records of later steps, which a kill left behind, are removed.
        tensorboard: write scalars.
        speaks: this is the first process.
    """

    def __init__(self, folder: Path, steps: int, step: int, *, tensorboard: bool, speaks: bool) -> None:
        self._log = folder / "log.jsonl"
        self._speaks = speaks
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
            self.say(f"step {step}  {shown}")
        else:
            self._progress.update(self._task, description=shown)

    def advance(self, step: int) -> None:
        """The step is done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """A line on standard error."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        elif self._speaks:
            typer.echo(text, err=True)

    def close(self) -> None:
        """End the bar and flush the scalars."""
        if self._progress is not None:
            self._progress.stop()
        if self._writer is not None:
            self._writer.close()


def _forget_after(log: Path, step: int) -> None:
    """Drop records of steps that will be done again, and a line that a kill cut off."""
    if not log.exists():
        return
    lines = log.read_text().splitlines(keepends=True)
    write_file(log, "".join(line for line in lines if _step_of(line) <= step).encode())


def _step_of(line: str) -> float:
    """Infinity for half a line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
