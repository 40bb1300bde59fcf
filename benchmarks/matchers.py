# SPDX-License-Identifier: Apache-2.0
"""Whole matchers, ours and peers', behind one call. One registry entry per contender.

To add a matcher: write a function that loads it, and a :class:`MatcherEntry` in ``MATCHERS``. Nothing else has to be
edited.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gates import agreement, hold_agreement, hold_features
from benchmarks.measure import DTYPES, Context, Unavailable, count_operations
from benchmarks.stages import plain_model, stage_operations

GATE_SIZE = (256, 320)  # multiples of 32: transformers takes no others
GATE = (
    "coarse features against the plain float32 model (transformers: the same weights) within the dtype's bound; "
    "float32 matches: 99 % the same within half a cell, both ways. kornia's LoFTR is another model: not held to ours"
)
_LARGEST_COUNTED = 480 * 640
_counted: dict[tuple[str, str, tuple[int, int]], float] = {}


class Matcher(NamedTuple):
    """A loaded matcher."""

    match: Callable[[Tensor, Tensor], dict[str, Tensor]]  # (B, 1, H, W) twice, in this dtype
    coarse: Callable[[Tensor, Tensor], Tensor] | None  # features of image 0 after the transformer
    dtype: torch.dtype  # of the images
    model: Any


class GateCase(NamedTuple):
    """A matcher, and the small pair on which it is held to the plain model."""

    matcher: Matcher
    plain: Any
    pair: tuple[Tensor, Tensor]  # float32
    dtype: str

    @property
    def own_pair(self) -> tuple[Tensor, Tensor]:
        """The pair in the matcher's dtype."""
        return self.pair[0].to(self.matcher.dtype), self.pair[1].to(self.matcher.dtype)


class MatcherEntry(NamedTuple):
    """A contender: whose, what it needs, how it is loaded and held, how its work is counted."""

    owner: str
    build: Callable[[MatcherEntry, Context], Matcher]
    packages: tuple[str, ...]
    gate: Callable[[GateCase], float | None] | None  # None: another model, not held to ours
    operations: Callable[[str, tuple[int, int], Context], float | None]  # of one pair
    suites: tuple[str, ...]
    preset: str = "full"
    dtype: str | None = None  # None: the run's
    mode: str = "eager"  # eager, compile, reduce-overhead or graph
    staged: bool = False  # its stages can be timed one by one
    largest: int | None = None  # pixels of an image; larger pairs leave it out

    def dtype_in(self, context: Context) -> str:
        """Name of the dtype in which it runs."""
        return self.dtype or context.dtype


def load(name: str, context: Context) -> Matcher:
    """Build the matcher called ``name``.

    Raises:
        Unavailable: a package that is missing, a mode that needs a GPU.
    """
    entry = MATCHERS[name]
    for package in entry.packages:
        if importlib.util.find_spec(package) is None:
            raise Unavailable(f"{package} is not installed")
    if entry.mode in ("graph", "reduce-overhead") and context.device.type != "cuda":
        raise Unavailable("CUDA graphs need a GPU")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return entry.build(entry, context)


def images(size: tuple[int, int], batch: int, device: torch.device, *, alike: bool = False) -> tuple[Tensor, Tensor]:
    """The bundled photograph and its warp, or itself, (B, 1, H, W) each, resized."""
    from eloftr_ops.io import demo_pair

    photograph, warped, _ = demo_pair()
    pair = photograph, photograph if alike else warped
    first, second = (F.interpolate(x, size, mode="bilinear", antialias=True) for x in pair)
    return first.repeat(batch, 1, 1, 1).to(device), second.repeat(batch, 1, 1, 1).to(device)


def gate(name: str, matcher: Matcher, size: tuple[int, int], context: Context, *, alike: bool = False) -> float | None:
    """Hold a matcher to the plain float32 model of its preset on a small pair; returns the share of common matches.

    Raises:
        Disagreement: says what differs and by how much.
    """
    entry = MATCHERS[name]
    if entry.gate is None:
        return None
    pair = images(min(size, GATE_SIZE), 1, context.device, alike=alike)
    plain = plain_model(entry.preset, context.device)
    with torch.inference_mode():
        return entry.gate(GateCase(matcher, plain, pair, entry.dtype_in(context)))


def coarse_map(model: Any, image0: Tensor, image1: Tensor) -> Tensor:
    """(B, C, h, w) transformer output of image 0."""
    pair = model.check_input({"image0": image0, "image1": image1})
    return model.transform(*model.extract_pair(pair))[0]  # type: ignore[no-any-return]


def _hold_to_plain_features(case: GateCase) -> None:
    if case.matcher.coarse is not None:
        truth = coarse_map(case.plain, *case.pair)
        hold_features(case.matcher.coarse(*case.own_pair), truth, case.dtype)


def _hold_to_plain(case: GateCase) -> float:
    """Features, and in float32 the matches too."""
    _hold_to_plain_features(case)
    matches = case.plain({"image0": case.pair[0], "image1": case.pair[1]})
    shared = agreement(case.matcher.match(*case.own_pair), matches)
    if case.dtype == "fp32":
        hold_agreement(shared)
    return shared


def _operations_by_stage(name: str, size: tuple[int, int], context: Context) -> float:
    """Of all maps of our model, convolved by definition."""
    return sum(stage_operations(MATCHERS[name].preset, size).values())


def _operations_of_a_run(name: str, size: tuple[int, int], context: Context) -> float | None:
    """Counted while a peer matches; None for large images, which would take too long."""
    if math.prod(size) > _LARGEST_COUNTED:
        return None
    key = (MATCHERS[name].owner, MATCHERS[name].preset, size)
    if key not in _counted:
        matcher = load(name, context._replace(dtype="fp32"))
        pair = [x.to(matcher.dtype) for x in images(size, 1, context.device)]
        _counted[key] = count_operations(lambda: matcher.match(*pair))
    return _counted[key]


def _ours(entry: MatcherEntry, context: Context) -> Matcher:
    dtype = DTYPES[entry.dtype_in(context)]
    plain = copy.deepcopy(plain_model(entry.preset, context.device))
    model = plain.optimize_for_inference(
        dtype=dtype, compile=entry.mode == "compile", cuda_graphs=entry.mode == "graph"
    )
    if entry.mode == "reduce-overhead":
        for owner, attribute in ((model.backbone, "forward"), (model, "transform"), (model, "fine_features")):
            compiled = torch.compile(getattr(owner, attribute), mode=entry.mode, dynamic=False)
            setattr(owner, attribute, compiled)

    def coarse(a: Tensor, b: Tensor) -> Tensor:
        return coarse_map(model, a, b)

    # As users have them, in float32 where the first stage is.
    image_dtype = next(model.parameters()).dtype
    return Matcher(lambda a, b: model({"image0": a, "image1": b}), coarse, image_dtype, model)


def _plain(entry: MatcherEntry, context: Context) -> Matcher:
    """The model as it is loaded, not optimized."""
    model = plain_model(entry.preset, context.device)
    return Matcher(lambda a, b: model({"image0": a, "image1": b}), None, torch.float32, model)


def _transformers(entry: MatcherEntry, context: Context) -> Matcher:
    from transformers import EfficientLoFTRForKeypointMatching
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder = context.folder / "transformers"
    if not folder.exists():
        plain_model("full").save_pretrained(folder, layout="transformers")
    dtype = DTYPES[entry.dtype_in(context)]
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


def _our_transformers(entry: MatcherEntry, context: Context) -> Matcher:
    """The plain model behind transformers' interface: what that door adds to the bare operator."""
    from eloftr_ops.integrations.transformers import EfficientLoFTRForKeypointMatching

    model: Any = EfficientLoFTRForKeypointMatching.from_pretrained(entry.preset)
    model = model.eval().to(context.device)

    def match(a: Tensor, b: Tensor) -> dict[str, Tensor]:
        found = model(torch.stack([a, b], 1))
        valid = found.matches[:, 0] > -1
        keypoints = found.keypoints * found.keypoints.new_tensor([a.shape[-1], a.shape[-2]])
        points = {f"keypoints{side}": keypoints[:, side][valid] for side in (0, 1)}
        return {
            **points,
            "confidence": found.matching_scores[:, 0][valid],
            "batch_indexes": valid.nonzero()[:, 0],
        }

    return Matcher(match, None, torch.float32, model)


def _onnxruntime(entry: MatcherEntry, context: Context) -> Matcher:
    """The exported graph in onnxruntime; it is written for each size when that is first met, which is not timed."""
    import onnxruntime

    from eloftr_ops.inference.export import export

    sessions: dict[tuple[int, ...], Any] = {}

    def session(size: tuple[int, int]) -> Any:
        if size not in sessions:
            file = context.folder / f"{entry.preset}-{size[1]}x{size[0]}.onnx"
            if not file.exists():
                export(plain_model(entry.preset), file, size=size, max_matches=math.prod(size) // 64)
            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads = torch.get_num_threads()
            sessions[size] = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
        return sessions[size]

    def match(a: Tensor, b: Tensor) -> dict[str, Tensor]:
        feed = {"image0": a.numpy(), "image1": b.numpy()}
        names = ["keypoints0", "keypoints1", "confidence", "valid"]
        fields = session((a.shape[-2], a.shape[-1])).run(names, feed)
        *found, valid = (torch.from_numpy(field) for field in fields)
        picked = {name: value[valid] for name, value in zip(names[:3], found, strict=True)}
        return {**picked, "batch_indexes": valid.nonzero()[:, 0]}

    return Matcher(match, None, torch.float32, None)


def _kornia(entry: MatcherEntry, context: Context) -> Matcher:
    from kornia.feature import LoFTR

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LoFTR(pretrained=None).eval()
    model.coarse_matching.thr = 0.0  # random weights: about as many matches as trained ones give
    dtype = DTYPES[entry.dtype_in(context)]
    model = model.to(context.device, dtype)
    return Matcher(lambda a, b: model({"image0": a, "image1": b}), None, dtype, model)


_BOTH = ("matcher", "cpu")
_OURS: dict[str, Any] = {
    "owner": "eloftr_ops",
    "build": _ours,
    "packages": ("kornia", "safetensors"),
    "gate": _hold_to_plain,
    "operations": _operations_by_stage,
}
_GPU: dict[str, Any] = {**_OURS, "suites": ("matcher",)}
_CPU: dict[str, Any] = {**_OURS, "suites": ("cpu",), "staged": True}
# In the order of the rows.
MATCHERS: dict[str, MatcherEntry] = {
    "eloftr_ops full": MatcherEntry(**_GPU, staged=True),
    "eloftr_ops full, torch.compile": MatcherEntry(**_GPU, mode="compile"),
    "eloftr_ops full, reduce-overhead": MatcherEntry(**_GPU, mode="reduce-overhead"),
    "eloftr_ops full, CUDA graph": MatcherEntry(**_GPU, mode="graph"),
    "eloftr_ops small": MatcherEntry(**_GPU, preset="small", staged=True),
    "eloftr_ops small, torch.compile": MatcherEntry(**_GPU, preset="small", mode="compile"),
    "eloftr_ops small, CUDA graph": MatcherEntry(**_GPU, preset="small", mode="graph"),
    "eloftr_ops full fp32": MatcherEntry(**_CPU, dtype="fp32"),
    "eloftr_ops full bf16": MatcherEntry(**_CPU, dtype="bf16"),
    "eloftr_ops small fp32": MatcherEntry(**_CPU, preset="small", dtype="fp32"),
    "eloftr_ops small bf16": MatcherEntry(**_CPU, preset="small", dtype="bf16"),
    "eloftr_ops small fp32, plain": MatcherEntry(
        **{**_OURS, "build": _plain}, suites=("cpu",), preset="small", dtype="fp32", largest=_LARGEST_COUNTED
    ),
    "eloftr_ops small fp32, plain, transformers' interface": MatcherEntry(
        **{**_OURS, "build": _our_transformers, "packages": (*_OURS["packages"], "transformers")},
        suites=("cpu",),
        preset="small",
        dtype="fp32",
        largest=_LARGEST_COUNTED,
    ),
    "eloftr_ops small fp32, onnxruntime": MatcherEntry(
        **{
            **_OURS,
            "build": _onnxruntime,
            "packages": (*_OURS["packages"], "onnx", "onnxscript", "onnxruntime"),
        },
        suites=("cpu",),
        preset="small",
        dtype="fp32",
        largest=_LARGEST_COUNTED,
    ),
    "transformers": MatcherEntry(
        "transformers",
        _transformers,
        ("kornia", "transformers"),
        _hold_to_plain_features,
        _operations_of_a_run,
        _BOTH,
    ),
    "kornia LoFTR": MatcherEntry("kornia", _kornia, ("kornia",), None, _operations_of_a_run, _BOTH),
}
