# SPDX-License-Identifier: Apache-2.0
"""The ops that the suites ``kernels`` and ``launch`` measure: one registry entry per op.

To add an op: write its arguments, its work and a :class:`Op` entry in ``OPS``. Arguments go by name. Nothing else has
to be edited. Needs torch and ``eloftr_kernels`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import eloftr_kernels
from eloftr_kernels import AttentionWeights, MlpWeights

TEMPERATURE = 0.1
CELLS = (60, 80)  # of a 640x480 image, (height, width)
FORWARD, BACKWARD = "forward", "forward+backward"
ANYWHERE, GPU = ("cuda", "cpu"), ("cuda",)

Arguments = dict[str, Any]
Outputs = tuple[Tensor, ...]
Function = Callable[..., Any]


class Widths(NamedTuple):
    """What the ops see of a preset."""

    channels: int
    heads: int
    fine: int
    subpixel: int = 8


PRESETS = {"full": Widths(256, 8, 64), "small": Widths(96, 6, 24)}


class KernelCase(NamedTuple):
    """An op at one set of shapes."""

    op: str
    preset: str
    batch: int
    cells0: tuple[int, int] = CELLS  # of the coarse map, 1/8 of the image
    cells1: tuple[int, int] = CELLS
    modes: tuple[str, ...] = (FORWARD, BACKWARD)
    devices: tuple[str, ...] = ANYWHERE  # elsewhere the case would take minutes
    compiled: bool = True  # beside torch.compile, which takes longer to compile than all else takes together
    masked: bool = False  # the last rows and columns are padding, where the op takes masks

    @property
    def name(self) -> str:
        """Op, preset, batch and shape."""
        cells = math.prod(self.cells0)
        name = f"{self.op} {self.preset} batch {self.batch}, {cells} cells"
        return f"{name}, {'masked, ' if self.masked else ''}uneven" if self.uneven else name

    @property
    def uneven(self) -> bool:
        """Whether a side of the map is no multiple of the kernels' tiles."""
        return any(side % 4 for side in (*self.cells0, *self.cells1))


class Draw:
    """Seeded tensors of a case's device and dtype."""

    def __init__(self, case: KernelCase, dtype: torch.dtype, device: torch.device) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.widths = PRESETS[case.preset]
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers."""
        return (scale * torch.randn(shape, generator=self.generator)).to(self.device, self.dtype)

    def image(self, channels: int, rows: int, columns: int) -> Tensor:
        """(B, channels, rows, columns), channels last in memory."""
        drawn = self.normal(self.case.batch, channels, rows, columns)
        return drawn.contiguous(memory_format=torch.channels_last)

    def mask(self, cells: tuple[int, int]) -> Tensor | None:
        """(B, h, w) bool without the last rows and columns; None where the case has no masks."""
        if not self.case.masked:
            return None
        height, width = cells
        mask = torch.zeros(self.case.batch, height, width, dtype=torch.bool, device=self.device)
        mask[:, : height - height // 5, : width - width // 4] = True
        return mask


class Work(NamedTuple):
    """Least work of a forward pass."""

    operations: float  # of its matrix products
    bytes: float  # of inputs and outputs, each moved once


class Op(NamedTuple):
    """What a suite has to know of an op."""

    arguments: Callable[[Draw], Arguments]
    work: Callable[[KernelCase, int], Work]  # of a case and the bytes of an element
    differentiable: tuple[str, ...]  # arguments that gradients are taken of
    public: Function  # through the door that users take
    outputs: tuple[str, ...]
    valid: tuple[str | None, ...] = ()  # per output the mask, an argument, of what is defined; () if all is
    scalar: bool = False  # one number per cell: each is a row of its own
    dense: Function | None = None  # as the op is usually written, with the whole matrix of scores
    modes: tuple[str, ...] = (FORWARD, BACKWARD)
    indices: bool = False  # outputs are indices: judged by the score that they lose
    windows: bool = False  # outputs depend on a chosen pixel pair: judged where the pair agrees


def implementation(op: str, backend: str) -> Function:
    """``op`` by ``backend`` ("reference" or "triton"): a function of named arguments that returns a tuple."""
    return as_tuple(OPS[op].public, backend)


def as_tuple(function: Function, backend: str | None = None) -> Function:
    """``function`` with its outputs as a tuple of tensors, without those that are None."""

    def call(**arguments: Any) -> Outputs:
        if backend is None:
            return _tensors(function(**arguments))
        with eloftr_kernels.backend(backend):  # type: ignore[arg-type]
            return _tensors(function(**arguments))

    return call


def arguments_of(case: KernelCase, dtype: torch.dtype, device: torch.device) -> Arguments:
    """Seeded arguments of ``case`` by name."""
    return OPS[case.op].arguments(Draw(case, dtype, device))


def in_double(arguments: Mapping[str, Any]) -> Arguments:
    """The same numbers in float64."""
    return {name: value.double() if is_float(value) else value for name, value in arguments.items()}


def is_float(value: Any) -> bool:
    """Whether ``value`` is a tensor of floating-point numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


def windows_per_pair(case: KernelCase) -> int:
    """A third of the cells: what a pair with a good overlap gives."""
    return math.prod(case.cells0) // 3


def dense_lse(
    features0: Tensor,
    features1: Tensor,
    temperature: float,
    mask0: Tensor | None = None,
    mask1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The dual softmax as it is usually written: with the L x S matrix."""
    scores = _dense_scores(features0, features1, temperature, mask0, mask1)
    return torch.logsumexp(scores, 2), torch.logsumexp(scores, 1)


def dense_best(
    features0: Tensor,
    features1: Tensor,
    temperature: float,
    row_lse: Tensor,
    col_lse: Tensor,
    mask0: Tensor | None = None,
    mask1: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mutual arg-max with the L x S matrix."""
    scores = 2 * _dense_scores(features0, features1, temperature, mask0, mask1)
    scores = scores - row_lse[:, :, None] - col_lse[:, None]
    score1, best1 = scores.max(2)
    return best1, scores.argmax(1), score1


def _dense_scores(
    features0: Tensor, features1: Tensor, temperature: float, mask0: Tensor | None, mask1: Tensor | None
) -> Tensor:
    scores = (features0 / temperature @ features1.mT).float()
    if mask0 is None or mask1 is None:
        return scores
    return scores.masked_fill(~(mask0[:, :, None] & mask1[:, None]), -1e9)


def _tensors(outputs: Any) -> Outputs:
    if isinstance(outputs, Tensor):
        return (outputs,)
    return tuple(output for output in outputs if output is not None)


def _attention_layer(x: Tensor, mask: Tensor | None = None, **rest: Any) -> Tensor:
    """Self-attention on ``x``, then the update: what a layer of the transformer is."""
    update = {name: rest.pop(name) for name in ("expand_weight", "contract_weight")}
    norms = {name.removeprefix("update_"): rest.pop(name) for name in ("update_norm_weight", "update_norm_bias")}
    message = _aggregated_attention(x, x, mask=mask, source_mask=mask, **rest)
    return _upsample_mlp(x, message, **update, **norms, mask=mask)


def _aggregated_attention(x: Tensor, source: Tensor, **rest: Any) -> Tensor:
    """The op, its weights by their names in this registry."""
    weights = {field: rest.pop(name) for field, name in zip(AttentionWeights._fields, _WEIGHTS, strict=True)}
    return eloftr_kernels.aggregated_attention(x, source, AttentionWeights(**weights), **rest)


def _upsample_mlp(x: Tensor, message: Tensor, mask: Tensor | None = None, **rest: Any) -> Tensor:
    """The op, its weights by their names in this registry."""
    names = (*_UPDATE, "norm_weight", "norm_bias")
    weights = {field: rest.pop(name) for field, name in zip(MlpWeights._fields, names, strict=True)}
    return eloftr_kernels.upsample_mlp(x, message, MlpWeights(**weights), mask=mask)


def _norm(draw: Draw) -> Arguments:
    channels = draw.widths.channels
    return {
        "norm_weight": 1 + draw.normal(channels, scale=0.1),
        "norm_bias": draw.normal(channels, scale=0.1),
    }


def _attention_weights(draw: Draw) -> Arguments:
    channels, cells = draw.widths.channels, draw.case.cells0
    names = ("q_weight", "k_weight", "v_weight", "merge_weight")
    matrices = {name: draw.normal(channels, channels, scale=channels**-0.5) for name in names}
    tokens = math.prod(-(-side // 4) for side in cells)
    angles = 6 * torch.rand(tokens, channels // 2, generator=draw.generator)
    rotary = torch.stack([angles.cos(), angles.sin()]).to(draw.device, draw.dtype)
    aggregate = {"aggregate_weight": draw.normal(channels, 1, 4, 4, scale=0.25)}
    return {**aggregate, **_norm(draw), **matrices, "num_heads": draw.widths.heads, "rotary": rotary}


def _update_weights(draw: Draw) -> Arguments:
    channels = draw.widths.channels
    wide = (2 * channels) ** -0.5
    return {
        "expand_weight": draw.normal(2 * channels, 2 * channels, scale=wide),
        "contract_weight": draw.normal(channels, 2 * channels, scale=wide),
    }


def _attention_arguments(draw: Draw) -> Arguments:
    maps = {name: draw.image(draw.widths.channels, *draw.case.cells0) for name in ("x", "source")}
    mask = draw.mask(draw.case.cells0)
    return {**maps, **_attention_weights(draw), "mask": mask, "source_mask": mask}


def _update_arguments(draw: Draw) -> Arguments:
    channels, (height, width) = draw.widths.channels, draw.case.cells0
    maps = {
        "x": draw.image(channels, height, width),
        "message": draw.image(channels, -(-height // 4), -(-width // 4)),
    }
    return {**maps, **_update_weights(draw), **_norm(draw), "mask": draw.mask(draw.case.cells0)}


def _layer_arguments(draw: Draw) -> Arguments:
    x = {"x": draw.image(draw.widths.channels, *draw.case.cells0), "mask": draw.mask(draw.case.cells0)}
    norms = {f"update_{name}": value for name, value in _norm(draw).items()}
    return {**x, **_attention_weights(draw), **_update_weights(draw), **norms}


def _lse_arguments(draw: Draw) -> Arguments:
    channels, cells = draw.widths.channels, (draw.case.cells0, draw.case.cells1)
    made: Arguments = {"temperature": TEMPERATURE}
    for side, shape in enumerate(cells):
        size = math.prod(shape)
        made[f"features{side}"] = draw.normal(draw.case.batch, size, channels, scale=channels**-0.5)
        mask = draw.mask(shape)
        made[f"mask{side}"] = None if mask is None else mask.flatten(1)
    return made


def _best_arguments(draw: Draw) -> Arguments:
    scored = _lse_arguments(draw)
    row_lse, col_lse = implementation("dual_softmax_lse", "reference")(**scored)
    return {**scored, "row_lse": row_lse, "col_lse": col_lse}


def _window_arguments(draw: Draw, soft: float | None = None) -> Arguments:
    case, (height, width) = draw.case, draw.case.cells0
    count = windows_per_pair(case)
    # Pairs of pixels that stand out, as trained ones do.
    map0 = 8 * draw.image(draw.widths.fine, 4 * height, 4 * width)
    drawn = torch.randint(height * width, (case.batch * count,), generator=draw.generator)
    cells = drawn.to(draw.device)
    return {
        "map0": map0,
        "map1": map0 + draw.image(draw.widths.fine, 4 * height, 4 * width),
        "batch": torch.arange(case.batch, device=draw.device).repeat_interleave(count),
        "cells0": cells,
        "cells1": cells.clone(),
        "subpixel_channels": draw.widths.subpixel,
        "subpixel_temperature": 10.0,
        "soft_temperature": soft,
    }


def _attention_work(case: KernelCase, item: int) -> Work:
    channels, cells = PRESETS[case.preset].channels, math.prod(case.cells0)
    tokens = math.prod(-(-side // 4) for side in case.cells0)
    operations = 2.0 * case.batch * tokens * channels * (16 + 4 * channels + 2 * tokens)
    maps = case.batch * channels * (2 * cells + tokens)
    return Work(operations, item * (maps + 4.0 * channels**2))


def _update_work(case: KernelCase, item: int) -> Work:
    channels, cells = PRESETS[case.preset].channels, math.prod(case.cells0)
    tokens = math.prod(-(-side // 4) for side in case.cells0)
    operations = 4.0 * case.batch * channels**2 * (2 * cells + tokens)
    maps = case.batch * channels * (2 * cells + tokens)
    return Work(operations, item * (maps + 6.0 * channels**2))


def _layer_work(case: KernelCase, item: int) -> Work:
    channels, cells = PRESETS[case.preset].channels, math.prod(case.cells0)
    operations = _attention_work(case, item).operations + _update_work(case, item).operations
    return Work(operations, item * (2 * case.batch * channels * cells + 10.0 * channels**2))


def _score_work(case: KernelCase, item: int, extra: int) -> Work:
    """``extra``: bytes per cell of outputs, and of normalisers that are inputs."""
    channels, sizes = PRESETS[case.preset].channels, (math.prod(case.cells0), math.prod(case.cells1))
    operations = 2.0 * case.batch * math.prod(sizes) * channels
    return Work(operations, float(case.batch * sum(sizes) * (channels * item + extra)))


def _window_work(case: KernelCase, item: int) -> Work:
    widths, windows = PRESETS[case.preset], case.batch * windows_per_pair(case)
    upsample = 2 * 6 * widths.fine * (8 * 6 + 8 * 8 + 10 * 6 + 10 * 10)
    correlate = 2 * 64 * 100 * (widths.fine - widths.subpixel)
    return Work(float(windows * (upsample + correlate)), float(windows * (2 * 36 * widths.fine * item + 48)))


_WEIGHTS = (
    "aggregate_weight",
    "norm_weight",
    "norm_bias",
    "q_weight",
    "k_weight",
    "v_weight",
    "merge_weight",
)
_UPDATE = ("expand_weight", "contract_weight")
_WINDOW: dict[str, Any] = {
    "work": _window_work,
    "differentiable": ("map0", "map1"),
    "public": eloftr_kernels.window_match,
    "windows": True,
}
# What matters most comes first: a run that spends its minutes leaves the last cases out.
OPS: dict[str, Op] = {
    "attention_layer": Op(  # aggregated_attention, then upsample_mlp
        _layer_arguments,
        _layer_work,
        ("x", *_WEIGHTS, *_UPDATE, "update_norm_weight", "update_norm_bias"),
        _attention_layer,
        ("y",),
    ),
    "dual_softmax_lse": Op(
        _lse_arguments,
        lambda case, item: _score_work(case, item, 4),
        ("features0", "features1"),
        eloftr_kernels.dual_softmax_lse,
        ("row_lse", "col_lse"),
        valid=("mask0", "mask1"),
        scalar=True,
        dense=dense_lse,
    ),
    "aggregated_attention": Op(
        _attention_arguments,
        _attention_work,
        ("x", "source", *_WEIGHTS),
        _aggregated_attention,
        ("message",),
    ),
    "upsample_mlp": Op(
        _update_arguments,
        _update_work,
        ("x", "message", *_UPDATE, "norm_weight", "norm_bias"),
        _upsample_mlp,
        ("y",),
    ),
    "mutual_best": Op(
        _best_arguments,
        lambda case, item: _score_work(case, item, 16),
        (),
        eloftr_kernels.mutual_best,
        ("best1", "best0", "score1"),
        valid=("mask0", "mask1", "mask0"),
        scalar=True,
        dense=dense_best,
        modes=(FORWARD,),
        indices=True,
    ),
    "window_match": Op(_window_arguments, outputs=("pixel0", "pixel1", "subpixel1"), modes=(FORWARD,), **_WINDOW),
    "window_match soft": Op(  # with the expectations that training needs
        lambda draw: _window_arguments(draw, soft=1.0),
        outputs=("pixel0", "pixel1", "subpixel1", "expected0", "expected1"),
        **_WINDOW,
    ),
}
