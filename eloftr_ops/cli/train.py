# SPDX-License-Identifier: Apache-2.0
"""``eloftr-ops train``: a configuration file, or trained weights and a folder of images."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from eloftr_ops.cli.common import Threads, UsageError, reported_mistakes
from eloftr_ops.inference.cpu.allocator import keep_all_memory

if TYPE_CHECKING:  # heavy, and of no use to the other commands
    from eloftr_ops.training.config import TrainingConfig

_EXTRA = "training needs more packages ({missing}). Install them with: pip install 'eloftr-ops[train]'"


def train(
    config: Annotated[
        Path | None, typer.Argument(help="Configuration, YAML; see docs/training.md.", show_default=False)
    ] = None,
    fine_tune: Annotated[
        str | None,
        typer.Option(help="Weights to fine-tune, instead of a configuration: small, a file, a folder, ..."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of images, without labels, in place of the configuration's.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps in all.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Stop, with a checkpoint, within this time: 90s, 25m, 1h30m.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    precision: Annotated[str | None, typer.Option(help="32-true, bf16-mixed or 16-mixed.")] = None,
    threads: Threads = None,
) -> None:
    """Train a matcher, or fine-tune one on a folder of images; the same command goes on after an interruption.

    Under torchrun, all processes share every step: torchrun --nproc-per-node 2 --no-python eloftr-ops train FILE
    """
    started = time.monotonic()
    with reported_mistakes():
        try:
            from eloftr_ops.training.budget import parse_duration
            from eloftr_ops.training.loop import train as run
        except ModuleNotFoundError as error:
            raise UsageError(_EXTRA.format(missing=error.name)) from error
        if threads is not None:
            torch.set_num_threads(threads)
        if not torch.cuda.is_available():
            keep_all_memory()
        options: dict[str, dict[str, Any]] = {
            "data": {"textures": data},
            "run": {"folder": output, "steps": steps, "device": device, "precision": precision},
        }
        try:
            chosen = _chosen_config(config, fine_tune, data, _given(options))
            seconds = None
            if budget is not None:
                seconds = parse_duration(budget) - (time.monotonic() - started)  # imports count
            result = run(chosen, budget=seconds)
        except (ValueError, FloatingPointError, OSError) as error:
            raise UsageError(str(error)) from error
        finally:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":
        state = "stopped and saved; run the same command to go on"
        state = "finished" if result.finished else f"interrupted, {state}" if result.signal else state
        typer.echo(
            f"step {result.step} of {chosen.run.steps}: {state}. Weights: {result.folder}, {result.folder / 'last'}"
        )
    if result.signal:
        raise typer.Exit(128 + result.signal)


def _chosen_config(
    path: Path | None, fine_tune: str | None, data: Path | None, changes: dict[str, dict[str, Any]]
) -> TrainingConfig:
    from eloftr_ops.training.config_file import config_from_dict, config_to_dict, read_config, read_recipe

    if (path is None) == (fine_tune is None):
        raise UsageError("expected a configuration file, or --fine-tune WEIGHTS with --data FOLDER.")
    if fine_tune is not None:
        if data is None:
            raise UsageError("--data: expected a folder of images to fine-tune on, got none.")
        return read_recipe("fine_tune", {"model": {"weights": fine_tune}, **changes})
    values = config_to_dict(read_config(str(path)))
    for section, fields in changes.items():
        values[section].update(fields)
    return config_from_dict(values)


def _given(options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the user set, paths as text."""
    return {
        section: {
            name: str(value) if isinstance(value, Path) else value
            for name, value in fields.items()
            if value is not None
        }
        for section, fields in options.items()
    }
