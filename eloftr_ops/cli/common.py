# SPDX-License-Identifier: Apache-2.0
"""What the commands share: options, the user's mistakes, the matcher, and lines on the terminal."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.text import Text

from eloftr_ops.errors import ArgumentError, FileError

Weights = Annotated[str, typer.Option(help="'small' (embedded), a file, a folder or a Hugging Face repository.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice by default.")]
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # of a disk that takes no more


class UsageError(Exception):
    """The user's mistake, in words for the user."""


class Report(Console):
    """Standard output, line by line; a reader that went away, as ``head`` does, is no error."""

    def __init__(self) -> None:
        super().__init__(highlight=False)

    def on_broken_pipe(self) -> None:
        """Say nothing more."""
        silence()


def silence() -> None:
    """Send what is left of standard output nowhere, so that Python's last flush does not fail again."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def reported_mistakes() -> Iterator[None]:
    """Turn the user's mistakes into one line on standard error and exit code 2."""
    try:
        yield
    except ArgumentError as error:
        message = f"--{error.argument.replace('_', '-')}: {error.reason}"
    except (UsageError, FileError) as error:
        message = str(error)
    except torch.OutOfMemoryError:
        message = "out of GPU memory at this image size. Pass a smaller --resize, or --device cpu."
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        silence()
        message = f"standard output cannot be written: {error.strerror}."
    else:
        return
    Console(stderr=True, highlight=False).print(Text.assemble(("Error: ", "bold red"), message), soft_wrap=True)
    raise typer.Exit(2)


def print_line(console: Console, label: str, value: str) -> None:
    """One line of a report: a label, and what is to be said about it."""
    # As Text, a path with brackets in it is not taken for markup.
    console.print(Text.assemble((f"{label:<13}", "bold"), value), soft_wrap=True)
