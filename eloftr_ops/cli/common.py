# SPDX-License-Identifier: Apache-2.0
"""What the commands share: options, the user's mistakes, the matcher, and lines on the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.text import Text

from eloftr_ops.io import FileError
from eloftr_ops.model.matcher import EfficientLoFTR

Weights = Annotated[
    str, typer.Option(help="'small' (embedded), a file, a folder or a Hugging Face repository.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice by default.")]


class UsageError(Exception):
    """The user's mistake, in words for the user."""


@contextlib.contextmanager
def reported_mistakes() -> Iterator[None]:
    """Turn the user's mistakes into one line on standard error and exit code 2."""
    try:
        yield
    except (UsageError, FileError) as error:
        message = str(error)
    except torch.OutOfMemoryError:
        message = "out of GPU memory at this image size. Pass a smaller --resize, or --device cpu."
    else:
        return
    Console(stderr=True, highlight=False).print(
        Text.assemble(("Error: ", "bold red"), message), soft_wrap=True
    )
    raise typer.Exit(2)


def load_matcher(
    weights: str,
    device: str,
    *,
    threads: int | None = None,
    threshold: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> EfficientLoFTR:
    """The matcher for inference, fused, on its device.

    Raises:
        UsageError: weights, a device or a threshold that cannot be used.
    """
    chosen = chosen_device(device)
    if threshold is not None and not 0 <= threshold < float("inf"):
        raise UsageError(f"--threshold: expected a confidence of 0 or more, got {threshold}.")
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        matcher = EfficientLoFTR.from_pretrained(weights)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(f"--weights {weights}: {error}") from error
    matcher = matcher.optimize_for_inference(dtype=dtype).to(chosen)
    if threshold is not None:
        try:
            matcher.config = matcher.config.replace(threshold=threshold)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
    return matcher


def chosen_device(name: str) -> torch.device:
    """The device of that name; a GPU, if there is one, for "auto".

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # it must give results back, too
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # unknown, not built in, or not present
        raise UsageError(
            f"--device {name}: not a device that PyTorch can use here. Pass auto or cpu."
        ) from error
    return device


def describe_device(device: torch.device) -> str:
    """A device in words: the GPU's name, or the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return (
        f"{device.type}, {threads} thread{'s' if threads > 1 else ''}"
        if device.type == "cpu"
        else device.type
    )


def print_line(console: Console, label: str, value: str) -> None:
    """One line of a report: a label, and what is to be said about it."""
    # As Text, a path with brackets in it is not taken for markup.
    console.print(Text.assemble((f"{label:<13}", "bold"), value), soft_wrap=True)
