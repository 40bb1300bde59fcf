# SPDX-License-Identifier: Apache-2.0
"""Whole matchers, ours and peers', behind one call; each held to the plain float32 model before it is timed."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.cases import MATCHERS, MatcherSpec
from benchmarks.measure import DTYPES, Disagreement, Run, Unavailable, count_operations, synchronise
from benchmarks.operators import graphed

GATE_SIZE = (256, 320)  # multiples of 32: transformers takes no others
# Relative error of the coarse features that a dtype may have; match by match only float32 is held.
FEATURE_ERROR = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 0.15}
LEAST_AGREEMENT = 0.99
SAME_MATCH = 4.0  # pixels, half a coarse cell
GATE = (
    "coarse features against the plain float32 model (transformers: the same weights) within the dtype's bound; "
    "float32 matches: 99 % the same within half a cell, both ways. kornia's LoFTR is another model: not held to ours"
)
_OWNERS = {
    "eloftr_ops": ("kornia", "safetensors"),
    "transformers": ("kornia", "transformers"),
    "kornia": ("kornia",),
}


class Matcher(NamedTuple):
    """A loaded matcher."""

    match: Callable[[Tensor, Tensor], dict[str, Tensor]]  # (B, 1, H, W) twice, in this dtype
    coarse: Callable[[Tensor, Tensor], Tensor] | None  # features of image 0 after the transformer
    dtype: torch.dtype  # of the images
    model: Any


class Context(NamedTuple):
    """What all matchers of a run share."""

    device: torch.device
    dtype: str
    folder: Path  # of exported weights
    quick: bool = False


def load(name: str, context: Context) -> Matcher:
    """Build the matcher called ``name``.

    Raises:
        Unavailable: a package that is missing, a mode that needs a GPU.
    """
    spec = MATCHERS[name]
    for package in _OWNERS[spec.owner]:
        if importlib.util.find_spec(package) is None:
            raise Unavailable(f"{package} is not installed")
    if spec.mode in ("graph", "reduce-overhead") and context.device.type != "cuda":
        raise Unavailable("CUDA graphs need a GPU")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return {"eloftr_ops": _ours, "transformers": _transformers, "kornia": _kornia}[spec.owner](spec, context)


def images(
    size: tuple[int, int], batch: int, device: torch.device, *, alike: bool = False
) -> tuple[Tensor, Tensor]:
    """The bundled photograph and its warp, or itself, (B, 1, H, W) each, resized."""
    from eloftr_ops.io import demo_pair

    photograph, warped, _ = demo_pair()
    pair = photograph, photograph if alike else warped
    first, second = (F.interpolate(x, size, mode="bilinear", antialias=True) for x in pair)
    return first.repeat(batch, 1, 1, 1).to(device), second.repeat(batch, 1, 1, 1).to(device)


def gate(
    name: str, matcher: Matcher, size: tuple[int, int], context: Context, *, alike: bool = False
) -> float | None:
    """Hold a matcher to the plain float32 model of its preset on a small pair; returns the share of common matches.

    Raises:
        Disagreement: says what differs and by how much.
    """
    spec = MATCHERS[name]
    if spec.owner == "kornia":
        return None
    pair = images(min(size, GATE_SIZE), 1, context.device, alike=alike)
    own_pair = [x.to(matcher.dtype) for x in pair]
    dtype = spec.dtype or context.dtype
    with torch.inference_mode():
        plain = plain_model(spec.preset).to(context.device)
        truth = coarse_map(plain, *pair)
        if matcher.coarse is not None:
            error = float((matcher.coarse(*own_pair).float() - truth).norm() / truth.norm())
            if not error <= FEATURE_ERROR[dtype]:
                bound = FEATURE_ERROR[dtype]
                raise Disagreement(f"coarse features: relative error {error:.2g}, allowed {bound:.2g}")
        if spec.owner != "eloftr_ops":
            return None
        matches = plain({"image0": pair[0], "image1": pair[1]})
        shared = agreement(matcher.match(own_pair[0], own_pair[1]), matches)
    if dtype == "fp32":
        hold_agreement(shared)
    return shared


def coarse_map(model: Any, image0: Tensor, image1: Tensor) -> Tensor:
    """(B, C, h, w) transformer output of image 0."""
    pair = model.check_input({"image0": image0, "image1": image1})
    return model.transform(*model.extract_pair(pair))[0]  # type: ignore[no-any-return]


def hold_agreement(shared: float) -> None:
    """Raise Disagreement unless nearly all matches are shared."""
    if not shared >= LEAST_AGREEMENT:
        raise Disagreement(
            f"matches: {shared:.1%} are shared with the plain way, expected {LEAST_AGREEMENT:.0%}"
        )


def agreement(got: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Share of matches that the other side has too, the lesser of both ways; 1 where neither has any.

    Convention:
        Matches are the same when they are of one pair and both keypoints lie within half a coarse cell.
    """
    if not len(got["confidence"]) or not len(truth["confidence"]):
        return float(len(got["confidence"]) == len(truth["confidence"]))
    same = got["batch_indexes"][:, None] == truth["batch_indexes"]
    for key in ("keypoints0", "keypoints1"):
        same &= torch.cdist(got[key].float(), truth[key].float(), p=torch.inf) <= SAME_MATCH
    return float(min(same.any(0).float().mean(), same.any(1).float().mean()))


@functools.cache
def plain_model(preset: str) -> Any:
    """Unfused, eager, float32: the embedded ``small``, or ``full`` with the seeded weights of the parity tests."""
    from eloftr_ops import EfficientLoFTR

    if preset == "small":
        return EfficientLoFTR.from_pretrained("small")
    tests = str(Path(__file__).parents[1] / "tests")
    if tests not in sys.path:
        sys.path.insert(0, tests)
    return importlib.import_module("support.golden").golden_model()


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
    from eloftr_kernels.dual_softmax import reference
    from eloftr_ops.model.coarse import score_cells
    from eloftr_ops.types import Features

    model = plain_model(preset).optimize_for_inference()
    padded = [-(-side // 32) * 32 for side in size]
    operations: dict[str, float] = {}

    def counted(stage: str, function: Callable[..., Any], *arguments: Any) -> Any:
        results: list[Any] = []
        operations[stage] = count_operations(lambda: results.append(function(*arguments)))
        return results[0]

    # As if compiled: everything in one piece, and no branch on values, of which there are none.
    as_compiled = patch.object(torch.compiler, "is_compiling", lambda: True)
    one_block = patch.object(reference, "BLOCK_ELEMENTS", 1 << 62)
    with as_compiled, one_block, FakeTensorMode(allow_non_fake_inputs=True):
        features = Features(*counted("backbone", model.backbone, torch.empty(1, 1, *padded)), mask=None)
        operations["backbone"] *= 2  # images
        counted("transformer", model.transformer, features.coarse, features.coarse)
        coarse = features.coarse.to(next(model.transformer.parameters()).dtype)
        cells = counted("coarse matching", score_cells, coarse, coarse, None, None, model.config)
        counted("pyramid", model.fine_features, features, features, cells)
    return operations


def _ours(spec: MatcherSpec, context: Context) -> Matcher:
    dtype = DTYPES[spec.dtype or context.dtype]
    plain = copy.deepcopy(plain_model(spec.preset)).to(context.device)
    model = plain.optimize_for_inference(dtype=dtype, compile=spec.mode == "compile")
    if spec.mode == "reduce-overhead":
        for owner, attribute in ((model.backbone, "forward"), (model, "transform"), (model, "fine_features")):
            compiled = torch.compile(getattr(owner, attribute), mode=spec.mode, dynamic=False)
            setattr(owner, attribute, compiled)
    elif spec.mode == "graph":
        _graph_dense_part(model)

    def coarse(a: Tensor, b: Tensor) -> Tensor:
        return coarse_map(model, a, b)

    # As users have them, in float32 where the first stage is.
    image_dtype = next(model.parameters()).dtype
    return Matcher(lambda a, b: model({"image0": a, "image1": b}), coarse, image_dtype, model)


def _graph_dense_part(model: Any) -> None:
    """Replay backbone, transformer and pyramid, whose shapes are static, as CUDA graphs."""
    graphs: dict[Any, tuple[list[Tensor], Run]] = {}

    def wrap(owner: Any, attribute: str, flatten: Callable[..., list[Tensor]]) -> None:
        plain = getattr(owner, attribute)

        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = flatten(*args)
            key = (attribute, *(t.shape for t in tensors))
            if key not in graphs:
                graphs[key] = (tensors, graphed(lambda: plain(*args, **kwargs)))
            inputs, replay = graphs[key]
            for mine, theirs in zip(inputs, tensors, strict=True):
                if mine.data_ptr() != theirs.data_ptr():
                    mine.copy_(theirs)
            return replay()

        setattr(owner, attribute, call)

    wrap(model.backbone, "forward", lambda image: [image])
    wrap(model, "transform", lambda f0, f1: [f0.coarse, f1.coarse])
    wrap(model, "fine_features", lambda f0, f1, m: [m.coarse0, m.coarse1, *f0[:2], *f1[:2]])


def _transformers(spec: MatcherSpec, context: Context) -> Matcher:
    from transformers import EfficientLoFTRForKeypointMatching
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder = context.folder / "transformers"
    if not folder.exists():
        plain_model("full").save_pretrained(folder, layout="transformers")
    dtype = DTYPES[spec.dtype or context.dtype]
    model: Any = EfficientLoFTRForKeypointMatching.from_pretrained(folder)
    model = model.eval().to(context.device, dtype)

    def paired(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)], 1)

    def match(a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"confidence": (model(paired(a, b)).matches[:, 0] > -1).nonzero()}

    def coarse(a: Tensor, b: Tensor) -> Tensor:
        features = model.efficientloftr(paired(a, b)).feature_maps[0]
        return features[:, 0]  # type: ignore[no-any-return]

    return Matcher(match, coarse, dtype, model)


def _kornia(spec: MatcherSpec, context: Context) -> Matcher:
    from kornia.feature import LoFTR

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LoFTR(pretrained=None).eval()
    model.coarse_matching.thr = 0.0  # random weights: about as many matches as trained ones give
    dtype = DTYPES[spec.dtype or context.dtype]
    model = model.to(context.device, dtype)
    return Matcher(lambda a, b: model({"image0": a, "image1": b}), None, dtype, model)
