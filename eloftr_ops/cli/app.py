# SPDX-License-Identifier: Apache-2.0
"""``eloftr-ops app``: a page in the browser that matches two images."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from eloftr_ops.cli.common import Device, Threads, UsageError, Weights, reported_mistakes
from eloftr_ops.matching import DEFAULT_WEIGHTS


def app_command(
    weights: Weights = DEFAULT_WEIGHTS,
    device: Device = "auto",
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The first free one from 7860 by default.")] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    threads: Threads = None,
) -> None:
    """Match two images on a page in the browser; Ctrl-C ends it. Needs the extra 'app'."""
    from eloftr_ops.app import serve

    with reported_mistakes():
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            serve(weights, device, host=host, port=port, browser=browser)
        except ImportError as error:
            raise UsageError(str(error)) from error
