# SPDX-License-Identifier: Apache-2.0
"""From stored tensors to a model: names, architecture and shapes are settled before any memory is taken for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from eloftr_ops.config import EfficientLoFTRConfig, WeightLayout
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.weights.files import COUNTER
from eloftr_ops.weights.names import from_layout, to_layout

AUTHORS_PREFIX = "matcher."
SHOWN = 5  # names that an error lists of each kind


class Stored(NamedTuple):
    """Weights as found."""

    tensors: dict[str, Tensor]  # by the file's names
    layout: WeightLayout
    config: EfficientLoFTRConfig | None  # None where the source does not tell
    source: str


def guess_layout(names: Iterable[str]) -> WeightLayout:
    """Whose names these are; ours pass through the authors' table unchanged."""
    theirs = ("efficientloftr.", "refinement_layer.")
    return "transformers" if any(name.startswith(theirs) for name in names) else "authors"


def our_names(stored: Stored) -> dict[str, Tensor]:
    """Tensors by our names; names that no table knows keep theirs.

    Raises:
        ValueError: two names of one parameter.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in stored.tensors.items():
        ours = from_layout(name.removeprefix(AUTHORS_PREFIX), stored.layout)
        if ours in renamed:
            raise ValueError(f"{stored.source}: expected one entry per parameter, got {name} a second time.")
        renamed[ours] = tensor
    return renamed


def infer_config(tensors: Mapping[str, Tensor], source: str) -> EfficientLoFTRConfig:
    """Architecture that the shapes tell. They say nothing of heads (8, as in the released models) or matching.

    Raises:
        ValueError: not the weights of an EfficientLoFTR, or one that does not go with 8 heads.
    """
    channels, blocks = [], []
    for stage in range(4):
        head = f"backbone.stages.{stage}."
        first = next((tensors[n] for n in _first_convolution(head) if n in tensors), None)
        if first is None:
            theirs = " or ".join(to_layout(n, "authors") for n in _first_convolution(head))
            raise ValueError(
                f"{source}: expected EfficientLoFTR weights, which have {theirs}; got {_some(sorted(tensors))}."
            )
        channels.append(first.shape[0])
        blocks.append(_count(tensors, head))
    try:
        return EfficientLoFTRConfig().replace(
            stage_channels=channels,
            stage_blocks=blocks,
            num_layers=_count(tensors, "transformer.layers."),
            subpixel_channels=min(8, max(1, channels[1] - 1)),
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error} Pass config=EfficientLoFTRConfig(...) of these weights.") from error


def build_model(
    tensors: Mapping[str, Tensor],
    config: EfficientLoFTRConfig,
    layout: WeightLayout,
    source: str,
    device: torch.device,
    dtype: torch.dtype,
) -> EfficientLoFTR:
    """The model of ``config`` with ``tensors``, in evaluation mode.

    Raises:
        ValueError: missing or unexpected names, other shapes, or values that are not finite in ``dtype``.
    """
    model = _blueprint(tensors, config, source)
    expected = model.state_dict()
    _check_fit(tensors, expected, layout, source)
    state = {}
    for name in expected:
        if name.endswith(COUNTER):
            state[name] = torch.zeros((), dtype=torch.int64, device=device)
            state[name].copy_(tensors.get(name, state[name]))
            continue
        kept = tensors[name].detach().to(device=device, dtype=dtype, copy=True)
        if not torch.isfinite(kept).all():
            raise ValueError(
                f"{source}: {to_layout(name, layout)}: expected values that are finite in {dtype}, got NaN or infinite "
                "ones; the file is damaged, its training diverged, or it needs a wider dtype."
            )
        state[name] = kept.contiguous()
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _blueprint(tensors: Mapping[str, Tensor], config: EfficientLoFTRConfig, source: str) -> EfficientLoFTR:
    """A model without memory, after a check that its size is in proportion to the file's."""
    largest = max((max(tensor.shape, default=1) for tensor in tensors.values()), default=0)
    sizes = {
        "stage_channels": (max(config.stage_channels), largest),
        "stage_blocks": (sum(config.stage_blocks), len(tensors)),
        "num_layers": (config.num_layers, len(tensors)),
    }
    for name, (asked, found) in sizes.items():
        if asked > found:
            raise ValueError(
                f"{source}: {name}: the configuration asks for {getattr(config, name)}, "
                f"which is more than the weights have ({len(tensors)} tensors, largest side {largest})."
            )
    with torch.device("meta"):
        return EfficientLoFTR(config, fused=any(".fused." in name for name in tensors))


def _check_fit(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], layout: WeightLayout, source: str
) -> None:
    missing = [n for n in expected if n not in tensors and not n.endswith(COUNTER)]
    unexpected = [n for n in tensors if n not in expected]
    reshaped = [
        f"{to_layout(n, layout)} expected {tuple(expected[n].shape)}, got {tuple(tensors[n].shape)}"
        for n in expected
        if n in tensors and tensors[n].shape != expected[n].shape
    ]
    problems = [
        f"{kind} ({len(names)}): {_some(names)}."
        for kind, names in (
            ("Missing", [to_layout(n, layout) for n in missing]),
            ("Unexpected", [to_layout(n, layout) for n in unexpected]),
            ("Other shapes", reshaped),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{source}: expected the weights of the configured EfficientLoFTR. {' '.join(problems)} "
            "Check that the file is complete and that its configuration (config.json, or config=) describes it."
        )


def _first_convolution(head: str) -> tuple[str, str]:
    return f"{head}0.conv3x3.conv.weight", f"{head}0.fused.weight"


def _count(names: Iterable[str], head: str) -> int:
    """How many different numbers follow ``head``."""
    return len({match[1] for name in names if (match := re.match(re.escape(head) + r"(\d+)\.", name))})


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
