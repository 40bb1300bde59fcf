# SPDX-License-Identifier: Apache-2.0
"""The stages of our matcher: how long each takes, and how much arithmetic each is."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.measure import count_operations, synchronise

CPU = torch.device("cpu")
STAGES = ("backbone", "transformer", "coarse matching", "pyramid", "selection and windows")


@functools.cache
def plain_model(preset: str, device: torch.device = CPU) -> Any:
    """Unfused, eager, float32: the embedded ``small``, or ``full`` with seeded weights. Shared: do not change it."""
    from eloftr_ops import EfficientLoFTR

    if device.type != "cpu":
        # A copy: the model on the CPU stays there for all others who share it.
        return copy.deepcopy(plain_model(preset)).to(device)
    if preset == "small":
        return EfficientLoFTR.from_pretrained("small")
    from benchmarks.golden import golden_model

    return golden_model()


@contextmanager
def timed_stages(model: Any, device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds by stage of the calls inside: backbone, transformer, coarse matching, pyramid, and the whole."""
    seconds: dict[str, float] = {}
    depth: list[str] = []

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            synchronise(device)
            start = time.perf_counter()
            depth.append(stage)
            result = function(*args, **kwargs)
            synchronise(device)
            depth.pop()
            elapsed = time.perf_counter() - start
            seconds[stage] = seconds.get(stage, 0.0) + elapsed
            if depth:  # a stage's own time is without those inside it
                seconds[depth[-1]] = seconds.get(depth[-1], 0.0) - elapsed
            return result

        return call

    from eloftr_ops.model import matcher as matcher_module

    parts = {"backbone": (model.backbone, "forward"), "coarse matching": (matcher_module, "match_cells"),
             "transformer": (model.transformer, "forward"), "pyramid": (model, "fine_features"),
             "selection and windows": (model, "forward")}  # fmt: skip
    replaced = [(owner, attribute, vars(owner).get(attribute)) for owner, attribute in parts.values()]
    try:
        for stage, (owner, attribute) in parts.items():
            setattr(owner, attribute, timed(stage, getattr(owner, attribute)))
        yield seconds
    finally:
        for owner, attribute, own in replaced:
            delattr(owner, attribute) if own is None else setattr(owner, attribute, own)


@functools.cache
def stage_operations(preset: str, size: tuple[int, int]) -> dict[str, float]:
    """Operations by stage of one pair of (height, width), counted on tensors without data, all of every map.

    Convolutions count as what they are by definition, also where Winograd's algorithm takes a quarter of it. The
    windows, whose number the images decide, are left out: some thousandths of the whole.
    """
    from eloftr_kernels.dual_softmax import cpu
    from eloftr_ops.model.coarse import score_cells
    from eloftr_ops.types import Features

    # On the CPU whatever the run's device is: nothing is computed.
    model = plain_model(preset).optimize_for_inference()
    padded = [-(-side // 32) * 32 for side in size]
    operations: dict[str, float] = {}

    def counted(stage: str, function: Callable[..., Any], *arguments: Any) -> Any:
        results: list[Any] = []
        operations[stage] = count_operations(lambda: results.append(function(*arguments)))
        return results[0]

    # As if compiled: everything in one piece, and no branch on values, of which there are none.
    as_compiled = patch.object(torch.compiler, "is_compiling", lambda: True)
    one_block = patch.object(cpu, "BLOCK_ELEMENTS", 1 << 62)
    with as_compiled, one_block, FakeTensorMode(allow_non_fake_inputs=True):
        features = Features(*counted("backbone", model.backbone, torch.empty(1, 1, *padded)), mask=None)
        operations["backbone"] *= 2  # images
        counted("transformer", model.transformer, features.coarse, features.coarse)
        coarse = features.coarse.to(next(model.transformer.parameters()).dtype)
        cells = counted("coarse matching", score_cells, coarse, coarse, None, None, model.config)
        counted("pyramid", model.fine_features, features, features, cells)
    return operations
