# SPDX-License-Identifier: Apache-2.0
"""How a benchmark is measured: gate, warm up, interleaved rounds, peak memory; and what the machine can do at most."""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.record import empty_row

Run = Callable[[], Any]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_MOST_CALLS = 1000


class Unavailable(Exception):  # noqa: N818 - not an error: a row that says why it is empty
    """A contender that cannot run here; the message is the reason in words."""


class Disagreement(Exception):  # noqa: N818 - the gate's verdict
    """A contender whose result is not the reference's; the message says what differs and by how much."""


class Elapsed(float):
    """Seconds that a run took by its own clock; returned by runs that cannot be timed from outside."""


class Context(NamedTuple):
    """What all benchmarks of a run share."""

    device: torch.device
    dtype: str
    folder: Path  # of exported weights
    quick: bool = False


class Entry(NamedTuple):
    """One way of doing a benchmark's work: a row of its table."""

    name: str
    # What is timed. True: held to the reference first. Raises Unavailable or Disagreement.
    build: Callable[[bool], Run]
    # Least work of a run; a function is asked after timing, and only if the entry was timed.
    operations: float | Callable[[], float | None] | None = None
    bytes: float | None = None
    pairs: int = 1  # image pairs per run
    has_peak: bool = True  # its peak memory means something


class Benchmark(NamedTuple):
    """One case of the record, not yet measured."""

    name: str
    group: str
    mode: str  # forward, forward+backward or whole
    entries: Callable[[], list[Entry]]
    baseline: str | None
    gate: str  # what is held against what, in words
    repeats: int
    pixels: int | None = None
    warm: bool = True
    least_seconds: float = 0.0  # of a timed region
    peak_of_call: bool = False  # peak memory on a CPU is that of a warm call, else that of the whole process
    # What --profile prints of a row, given its name and the machine's limits; None: the operators that take longest.
    profile: Callable[[str, dict[str, float | None]], list[str]] | None = None

    @property
    def key(self) -> str:
        """Name and mode."""
        return f"{self.name}, {self.mode}"


class Timing(NamedTuple):
    """Seconds per run over the rounds."""

    median_s: float
    q1_s: float
    q3_s: float
    repeats: int


def run_benchmark(
    benchmark: Benchmark, suite: str, context: Context, deadline: float
) -> tuple[dict[str, Any], dict[str, Run]]:
    """Measure: a case of the record without limit fractions, and the runs that were timed."""
    torch.compiler.reset()
    entries = {entry.name: entry for entry in benchmark.entries()}
    rows, runs = {}, {}
    for name, entry in entries.items():
        outcome = _prepare(benchmark, entry, context, deadline)
        if callable(outcome):
            runs[name], rows[name] = outcome, empty_row(name, "timed")
        else:
            rows[name] = empty_row(name, *outcome)
    timings, results = rounds(runs, benchmark.repeats, context.device, benchmark.least_seconds)
    for name, timing in timings.items():
        rows[name] |= timing._asdict() | _counts(results.pop(name))
    results.clear()
    for name, entry in entries.items():
        if name in runs and entry.has_peak and time.monotonic() < deadline:
            rows[name]["peak_bytes"] = _peak(benchmark, name, runs[name], suite, context)
        operations = entry.operations
        if callable(operations):
            operations = operations() if name in runs else None
        rows[name] |= {"pairs": entry.pairs, "operations": operations, "bytes": entry.bytes}
    fields = {key: getattr(benchmark, key) for key in ("name", "group", "baseline", "pixels", "gate")}
    return {**fields, "measure": benchmark.mode, "rows": list(rows.values())}, runs


def limit_fractions(case: dict[str, Any], limits: dict[str, float | None], dtype: str) -> None:
    """Fill in how near each row comes to the least time that the measured limits of the machine allow."""
    for row in case["rows"]:
        floor = f"convolution_{'bf16' if 'bf16' in row['name'] else 'fp32'}_op_per_s"
        rate = limits[floor] if dtype == "mixed" else limits["matmul_op_per_s"]
        copy = limits["copy_bytes_per_s"]
        if row["median_s"] and row["operations"] and rate:
            least = row["operations"] / rate
            if row["bytes"] and copy:
                least = max(least, row["bytes"] / copy)
            row["limit_fraction"] = least / row["median_s"]


def peak_of_one_run(benchmark: Benchmark, name: str) -> float | None:
    """Bytes of this process, which does nothing else: an op's beyond its inputs, a matcher's beyond torch."""
    base = process_memory("VmRSS")
    entry = next(entry for entry in benchmark.entries() if entry.name == name)
    run = entry.build(False)
    if benchmark.peak_of_call:
        run()  # what the first call sets up stays out, and so does what compilation takes
        gc.collect()
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        except OSError:
            return None
        base = process_memory("VmRSS")
    run()
    return process_memory("VmHWM") - base


def synchronise(device: torch.device) -> None:
    """Wait for the device; part of every timed region."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rounds(
    runs: Mapping[str, Run], repeats: int, device: torch.device, least_seconds: float = 0.0
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Time every run once per round, so that a machine that drifts drifts for all.

    Args:
        runs: by name.
        repeats: rounds.
        device: synchronised before and inside each timed region.
        least_seconds: shorter runs are called repeatedly within one timed region until it is about that long.

    Returns:
        Timings and the last result of every run, by name.
    """
    calls = {name: _calls(run, device, least_seconds) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, run in runs.items():
            results.pop(name, None)  # a kept output would count as somebody's memory
            elapsed, results[name] = _timed(run, calls[name], device)
            seconds[name].append(elapsed)
    return {name: _summary(values) for name, values in seconds.items()}, results


def peak_above(run: Run, device: torch.device) -> float | None:
    """Bytes that one run allocates on a GPU at most, beyond what was allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return float(torch.cuda.max_memory_allocated(device) - before)


def process_memory(field: str) -> float:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024.0


def machine_limits(device: torch.device, dtype: torch.dtype, *, quick: bool) -> dict[str, float]:
    """Bytes per second of a copy and operations per second of a matrix product, the best of a few."""
    size = 256 if quick else 8192 if device.type == "cuda" else 2048
    elements = 2**18 if quick else 2**29 if device.type == "cuda" else 2**26
    a = torch.randn(size, size, device=device).to(dtype)
    source = torch.zeros(elements, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ a}
    for run in runs.values():
        run()
    best = {
        name: min(_timed(run, 1 if quick else 5, device)[0] for _ in range(1 if quick else 5))
        for name, run in runs.items()
    }
    return {"copy_bytes_per_s": 2 * elements / best["copy"], "matmul_op_per_s": 2 * size**3 / best["matmul"]}


def convolution(dtype: torch.dtype, *, quick: bool) -> tuple[Run, float]:
    """A 3x3 convolution of the shape that most of the model's work has, and its operations."""
    channels, height, width = (32, 12, 16) if quick else (256, 60, 80)
    weight = torch.randn(channels, channels, 3, 3).to(dtype, memory_format=torch.channels_last)
    x = torch.randn(2, channels, height, width).to(dtype, memory_format=torch.channels_last)
    return lambda: F.conv2d(x, weight, padding=1), 2.0 * 9 * channels**2 * x.shape[0] * height * width


def count_operations(run: Run) -> float:
    """Operations of the convolutions and matrix products of one run."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def first_line(error: BaseException) -> str:
    """An exception as a phrase of one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _prepare(benchmark: Benchmark, entry: Entry, context: Context, deadline: float) -> Run | tuple[str, str]:
    """The run, gated and warm, or the status and the reason of a row without times."""
    if time.monotonic() > deadline:
        return "not run", "the time that the run may take was spent"
    if context.quick and "torch.compile" in entry.name:
        return "not run", "--quick leaves compilation out"
    try:
        run = entry.build(True)
        if benchmark.warm:
            run()
            synchronise(context.device)
    except Unavailable as reason:
        return "not run", str(reason)
    except Disagreement as verdict:
        return "refused", str(verdict)
    except torch.OutOfMemoryError as error:
        return "failed", f"out of memory: {first_line(error)}"
    except Exception as error:
        # A peer or a compiler may raise anything. The row says what, and the run exits with 1.
        return "failed", first_line(error)
    return run


def _counts(result: Any) -> dict[str, Any]:
    if isinstance(result, dict) and "matches" in result:
        return {key: result[key] for key in ("matches", "agreement")}
    return {"matches": result} if isinstance(result, int) else {}


def _peak(benchmark: Benchmark, name: str, run: Run, suite: str, context: Context) -> float | None:
    if context.device.type == "cuda":
        # A graph's memory is its own pool.
        return None if "graph" in name else peak_above(run, context.device)
    if context.quick:
        return None
    command = [sys.executable, "-m", "benchmarks.run", suite, "--device", "cpu", "--dtype", context.dtype,
               "--peak-of", benchmark.key, name, "--folder", str(context.folder)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = done.stdout.split()[-1] if done.returncode == 0 else "none"
    return None if text == "none" else float(text)


def _timed(run: Run, calls: int, device: torch.device) -> tuple[float, Any]:
    synchronise(device)
    start = time.perf_counter()
    result = run()
    for _ in range(calls - 1):
        run()
    synchronise(device)
    elapsed = (time.perf_counter() - start) / calls
    return (float(result), None) if isinstance(result, Elapsed) else (elapsed, result)


def _calls(run: Run, device: torch.device, least_seconds: float) -> int:
    if least_seconds == 0:
        return 1
    once = min(_timed(run, 1, device)[0] for _ in range(2))
    return max(1, min(_MOST_CALLS, round(least_seconds / max(once, 1e-7))))


def _summary(values: list[float]) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], 1)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, q1, q3, len(values))
