# SPDX-License-Identifier: Apache-2.0
"""Suites ``matcher`` and ``cpu``: what whole matchers are asked to do, by the kind of a :class:`PairCase`."""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases, matchers
from benchmarks.cases import PairCase
from benchmarks.gates import agreement, hold_agreement
from benchmarks.matchers import MATCHERS, Matcher
from benchmarks.measure import (
    DTYPES,
    Benchmark,
    Context,
    Disagreement,
    Elapsed,
    Entry,
    Run,
    convolution,
)
from benchmarks.report import row_time
from benchmarks.stages import STAGES, plain_model, stage_operations, timed_stages

FLOOR = "3x3 convolution"  # of the shape of most of the work: what the machine can do at most
CONVOLUTION_ERROR = 1e-5  # of the norm
_IMPORT = "import time, torch, kornia; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def benchmarks(suite: str, context: Context) -> list[Benchmark]:
    """Every case of ``suite``, "matcher" or "cpu", that is measured on this kind of device."""
    tables = {
        "matcher": (cases.MATCHER, cases.QUICK_MATCHER),
        "cpu": (cases.CPU, cases.QUICK_CPU),
    }

    def everybody(case: PairCase) -> tuple[str, ...]:
        return tuple(
            name
            for name, entry in MATCHERS.items()
            if suite in entry.suites and math.prod(case.size) <= (entry.largest or math.inf)
        )

    return [
        _benchmark(case._replace(entries=case.entries or everybody(case)), context)
        for case in tables[suite][context.quick]
        if case.batch < 16 or context.device.type == "cuda"
    ]


def _benchmark(case: PairCase, context: Context) -> Benchmark:
    first = case.entries[0]
    baselines = {
        "pair": "transformers",
        "many": f"{first}, six calls",
        "batch": f"{first}, one by one",
        "convolution": "direct",
    }
    gates = {
        "many": "the same matches as by six calls",
        "batch": "the same matches as one by one",
        "convolution": f"within {CONVOLUTION_ERROR} of the direct convolution's norm",
    }
    held = case.kind in ("pair", "curve")
    return Benchmark(
        case.name,
        "alike" if case.alike else case.kind,
        "forward+backward" if case.kind == "training" else "whole",
        lambda: _KINDS[case.kind](case, context),
        baselines.get(case.kind),
        matchers.GATE if held else gates.get(case.kind, "none: nothing to compare"),
        case.repeats,
        pixels=math.prod(case.size) or None,
        warm=case.warm,
        profile=None if case.kind == "training" else functools.partial(_stage_lines, case, context),
    )


def _stage_lines(case: PairCase, context: Context, name: str, limits: dict[str, float | None]) -> list[str]:
    """Where the time of a pair goes, and how much of it the arithmetic would take at the machine's own rate."""
    entry = MATCHERS.get(name)
    if case.kind != "pair" or entry is None or not entry.staged:
        return []
    seconds = _stage_seconds(case, name, context)
    operations = stage_operations(entry.preset, case.size)
    lines = ["", f"{name}, by stage:"]
    for stage, taken in seconds.items():
        line = f"  {stage:22} {row_time(taken):>8} {taken / sum(seconds.values()):5.0%}"
        # The transformer and the scores stay in float32, see InferenceMatcher.
        dtype = "fp32" if stage in ("transformer", "coarse matching") else entry.dtype_in(context)
        rate = limits.get(f"convolution_{dtype}_op_per_s")
        if rate and stage in operations:
            line += f", arithmetic alone {row_time(operations[stage] / rate)}"
        lines.append(line)
    return lines


def _stage_seconds(case: PairCase, name: str, context: Context) -> dict[str, float]:
    """Seconds by stage of one pair, after one untimed run."""
    matcher = matchers.load(name, context)
    pair = [x.to(matcher.dtype) for x in matchers.images(case.size, 1, context.device, alike=case.alike)]
    with torch.inference_mode():
        matcher.match(*pair)
        with timed_stages(matcher.model, context.device) as seconds:
            matcher.match(*pair)
    return {stage: seconds[stage] for stage in STAGES}


def _pair(case: PairCase, context: Context) -> list[Entry]:
    def build(name: str, gated: bool) -> Run:
        matcher = matchers.load(name, context)
        shared = matchers.gate(name, matcher, case.size, context, alike=case.alike) if gated else None
        given = matchers.images(case.size, case.batch, context.device, alike=case.alike)
        pair = [x.to(matcher.dtype) for x in given]
        return _counting(lambda: matcher.match(*pair), shared)

    def operations(name: str) -> float | None:
        counted = MATCHERS[name].operations(name, case.size, context)
        return None if counted is None else counted * case.batch

    made = [
        _entry(name, build, case.batch)._replace(operations=functools.partial(operations, name))
        for name in case.entries
    ]
    if context.device.type == "cpu" and case.batch == 1:
        made += [_floor(name, context) for name in ("fp32", "bf16")]
    return made


def _floor(dtype: str, context: Context) -> Entry:
    run, operations = convolution(DTYPES[dtype], quick=context.quick)
    return Entry(f"{FLOOR} {dtype}", lambda gated: torch.no_grad()(run), operations, has_peak=False)


def _many(case: PairCase, context: Context) -> list[Entry]:
    """Four images, all six pairs: every image's features once, or pair by pair."""
    pairs = list(itertools.combinations(range(4), 2))

    def photographs(matcher: Matcher) -> list[Tensor]:
        first, second = matchers.images(case.size, 1, context.device)
        return [x.to(matcher.dtype) for x in (first, second, first.flip(-1), second.flip(-1))]

    def calls(matcher: Matcher) -> Run:
        given = photographs(matcher)
        return lambda: [matcher.match(given[i], given[j]) for i, j in pairs]

    def features(matcher: Matcher) -> Run:
        given = photographs(matcher)

        def run() -> list[dict[str, Tensor]]:
            known = [matcher.model.extract_features(x) for x in given]
            return [matcher.model({"features0": known[i], "features1": known[j]}) for i, j in pairs]

        return run

    return _two_ways(case, context, ("six calls", calls), ("features kept", features), len(pairs))


def _batch(case: PairCase, context: Context) -> list[Entry]:
    """The same pairs in one batch, or one by one."""

    def together(matcher: Matcher) -> Run:
        pair = [x.to(matcher.dtype) for x in matchers.images(case.size, case.batch, context.device)]
        return lambda: [matcher.match(*pair)]

    def singles(matcher: Matcher) -> Run:
        pair = [x.to(matcher.dtype) for x in matchers.images(case.size, 1, context.device)]
        return lambda: [matcher.match(*pair) for _ in range(case.batch)]

    return _two_ways(case, context, ("one by one", singles), ("one batch", together), case.batch)


def _two_ways(
    case: PairCase,
    context: Context,
    first: tuple[str, Callable[[Matcher], Run]],
    second: tuple[str, Callable[[Matcher], Run]],
    pairs: int,
) -> list[Entry]:
    """Two ways of the same work; the second is held to the matches that the first gives."""
    name = case.entries[0]

    def build(way: str, gated: bool) -> Run:
        matcher = matchers.load(name, context)
        run = dict((first, second))[way](matcher)
        if gated and way == second[0]:
            with torch.inference_mode():
                expected, got = _joined(first[1](matcher)(), pairs), _joined(run(), pairs)
            hold_agreement(agreement(got, expected))
        return _counting(lambda: _joined(run(), pairs), None)

    made = (_entry(way, build, pairs, f"{name}, {way}") for way, _ in (first, second))
    return [entry._replace(has_peak=False) for entry in made]


def _curve(case: PairCase, context: Context) -> list[Entry]:
    """The whole, then its stages: the first row runs the model, the others report what it took within."""
    name, latest = case.entries[0], dict[str, float]()

    def build(name: str, gated: bool) -> Run:
        matcher = matchers.load(name, context)
        if gated:
            matchers.gate(name, matcher, case.size, context)
        pair = [x.to(matcher.dtype) for x in matchers.images(case.size, 1, context.device)]

        def run() -> int:
            with torch.inference_mode(), timed_stages(matcher.model, context.device) as seconds:
                found = matcher.match(*pair)
            latest.clear()
            latest.update(seconds)
            return len(found["confidence"])

        return run

    operations = stage_operations(MATCHERS[name].preset, case.size)

    def row(stage: str) -> Entry:
        return Entry(
            f"{name}: {stage}",
            lambda gated: lambda: Elapsed(latest.get(stage, 0.0)),
            operations.get(stage),
            has_peak=False,
        )

    whole = _entry(name, build)._replace(has_peak=False, operations=sum(operations.values()))
    return [whole, *(row(stage) for stage in STAGES)]


def _convolution(case: PairCase, context: Context) -> list[Entry]:
    """A 3x3 convolution as it is defined, and by Winograd's algorithm, held to it."""
    generator = torch.Generator().manual_seed(0)
    conv = torch.nn.Conv2d(case.channels, case.channels, 3, padding=1).requires_grad_(False)
    conv.to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(1, case.channels, *case.size, generator=generator).relu_()
    x = x.to(context.device, memory_format=torch.channels_last)

    def build(name: str, gated: bool) -> Run:
        from eloftr_ops.inference.cpu.allocator import keep_small_blocks
        from eloftr_ops.inference.cpu.winograd import WinogradConv3x3

        keep_small_blocks()  # as a matcher that is optimized for inference does
        function = conv if name == "direct" else WinogradConv3x3(conv)
        error = float((function(x) - conv(x)).norm() / conv(x).norm())
        if not error <= CONVOLUTION_ERROR:
            raise Disagreement(f"relative error {error:.2g}, allowed {CONVOLUTION_ERROR}")

        @torch.no_grad()
        def run() -> None:
            function(x)

        return run

    return [_entry(name, torch.no_grad()(build))._replace(has_peak=False) for name in ("direct", "Winograd")]


def _training(case: PairCase, context: Context) -> list[Entry]:
    """Forward, losses and backward of one batch; rendering and the optimiser are not counted."""

    def build(name: str, gated: bool) -> Run:
        from eloftr_ops.inference.cpu.allocator import keep_all_memory

        if context.device.type == "cpu" and not context.quick:
            keep_all_memory()  # as the command line's training does
        return training_step(case.size, case.batch, context.device, dtype=name.split()[-1])

    return [_entry(f"eloftr_ops small {dtype}", build, case.batch) for dtype in ("fp32", "bf16")]


def training_step(size: tuple[int, int], batch: int, device: torch.device, *, dtype: str) -> Run:
    """Forward, losses and backward of ``batch`` pairs of (height, width) by a ``small`` model with random weights."""
    from eloftr_ops import EfficientLoFTR
    from eloftr_ops.data.synthetic import HomographyBatch
    from eloftr_ops.training.batches import batch_of_rendered
    from eloftr_ops.training.objective import batch_losses

    model = EfficientLoFTR(plain_model("small").config).to(device).train()
    image0, image1 = matchers.images(size, batch, device)
    valid = torch.ones_like(image0, dtype=torch.bool)
    identity = torch.eye(3, device=device).repeat(batch, 1, 1)
    rendered = batch_of_rendered(HomographyBatch(image0, image1, identity, valid, valid))

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            losses = batch_losses(model, rendered)
        model.zero_grad(set_to_none=True)
        (losses.coarse + losses.pixel + losses.subpixel).backward()

    return run


def _import(case: PairCase, context: Context) -> list[Entry]:
    def build(name: str, gated: bool) -> Run:
        def run() -> Elapsed:
            command = [sys.executable, "-c", _IMPORT.format(name)]
            return Elapsed(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

        return run

    return [_entry("import eloftr_ops", build)._replace(has_peak=False)]


def _command(case: PairCase, context: Context) -> list[Entry]:
    """The bundled pair by the command line, beside the bare imports that any user of torch and kornia pays."""
    arguments: dict[str, Callable[[Path], list[str]]] = {
        "import torch, kornia": lambda folder: ["-c", "import torch, kornia"],
        "eloftr-ops match": lambda folder: [
            *command,
            "match",
            *pair,
            "--output",
            str(folder / "matches.npz"),
        ],
        "eloftr-ops demo, which draws a picture": lambda folder: [
            *command,
            "demo",
            "--output-dir",
            str(folder),
        ],
    }
    command = ["-c", "from eloftr_ops.cli import app; app()"]
    assets = importlib.resources.files("eloftr_ops") / "assets"
    pair = [str(assets / name) for name in ("demo_0.jpg", "demo_1.jpg")]

    def build(name: str, gated: bool) -> Run:
        def run() -> None:
            with tempfile.TemporaryDirectory() as folder:
                code = arguments[name](Path(folder))
                subprocess.run([sys.executable, *code], check=True, capture_output=True)

        return run

    return [_entry(name, build)._replace(has_peak=False) for name in arguments]


def _entry(key: str, build: Callable[[str, bool], Run], pairs: int = 1, name: str | None = None) -> Entry:
    return Entry(name or key, lambda gated: build(key, gated), pairs=pairs)


def _counting(match: Callable[[], dict[str, Tensor]], shared: float | None) -> Run:
    """A run without gradients that returns how many matches there were, and how many the gate had found shared."""

    def run() -> dict[str, Any]:
        with torch.inference_mode():
            return {"matches": len(match()["confidence"]), "agreement": shared}

    return run


def _joined(parts: list[dict[str, Tensor]], pairs: int) -> dict[str, Tensor]:
    """Matches of several calls, each of as many pairs, as those of one batch."""
    owners = [p["batch_indexes"] + i * (pairs // len(parts)) for i, p in enumerate(parts)]
    joined = {key: torch.cat([p[key] for p in parts]) for key in ("keypoints0", "keypoints1", "confidence")}
    return {**joined, "batch_indexes": torch.cat(owners)}


_KINDS: dict[str, Callable[[PairCase, Context], list[Entry]]] = {
    "pair": _pair,
    "many": _many,
    "batch": _batch,
    "curve": _curve,
    "convolution": _convolution,
    "training": _training,
    "import": _import,
    "command": _command,
}
