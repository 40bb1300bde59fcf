# SPDX-License-Identifier: Apache-2.0
"""A suite as tasks, and a task as a case of the record: gate, warm up, time in rounds, then peak memory."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import cases, matchers, operators, workloads
from benchmarks.cases import KernelCase, PairCase
from benchmarks.matchers import Context
from benchmarks.measure import (
    Contender,
    Disagreement,
    Run,
    Unavailable,
    first_line,
    peak_above,
    process_memory,
    rounds,
    synchronise,
)
from benchmarks.record import empty_row


class Task(NamedTuple):
    """One case of the record, not yet measured."""

    name: str
    group: str
    measure: str
    case: KernelCase | PairCase
    contenders: Callable[[], list[Contender]]
    baseline: str | None
    gate: str
    repeats: int
    pixels: int | None = None
    warm: bool = True
    least_seconds: float = 0.0  # of a timed region

    @property
    def key(self) -> str:
        """Name and measure."""
        return f"{self.name}, {self.measure}"


def suite_tasks(suite: str, context: Context) -> list[Task]:
    """Everything in ``suite`` that is measured on this kind of device."""
    device, quick = context.device, context.quick
    pairs: tuple[PairCase, ...]
    if suite == "kernels":
        table = cases.QUICK_KERNELS if quick else cases.KERNELS
        return [
            Task(
                case.name,
                case.op,
                measure,
                case,
                lambda c=case, m=measure: operators.contenders(c, m, context.dtype, device),  # type: ignore[misc]
                operators.EAGER,
                operators.GATE,
                repeats=1 if quick else 20 if device.type == "cuda" else 5,
                least_seconds=0.0 if quick or device.type == "cpu" else 2e-3,
            )
            for case in table
            if device.type in case.devices
            for measure in case.measures
        ]
    if suite == "matcher":
        pairs = cases.QUICK_MATCHER if quick else cases.MATCHER
    else:
        pairs = cases.QUICK_CPU if quick else cases.CPU
    return [_pair_task(case, context) for case in pairs if case.batch < 16 or device.type == "cuda"]


def _pair_task(case: PairCase, context: Context) -> Task:
    first = case.contenders[0] if case.contenders else ""
    baselines = {
        "pair": "transformers",
        "many": f"{first}, six calls",
        "batch": f"{first}, one by one",
        "convolution": "direct",
    }
    gates = {
        "many": "the same matches as by six calls",
        "batch": "the same matches as one by one",
        "convolution": f"within {workloads.CONVOLUTION_ERROR} of the direct convolution's norm",
    }
    held = case.kind in ("pair", "curve")
    return Task(
        case.name,
        "alike" if case.alike else case.kind,
        "forward+backward" if case.kind == "training" else "whole",
        case,
        lambda: workloads.contenders(case, context),
        baselines.get(case.kind),
        matchers.GATE if held else gates.get(case.kind, "none: nothing to compare"),
        case.repeats,
        pixels=math.prod(case.size) or None,
        warm=case.warm,
    )


def run_task(
    task: Task, suite: str, context: Context, deadline: float
) -> tuple[dict[str, Any], dict[str, Run]]:
    """Measure ``task``: a case of the record without limit fractions, and the runs that were timed."""
    torch.compiler.reset()
    contenders = {c.name: c for c in task.contenders()}
    rows, runs = {}, {}
    for name, contender in contenders.items():
        outcome = _prepare(task, contender, context, deadline)
        if callable(outcome):
            runs[name], rows[name] = outcome, empty_row(name, "timed")
        else:
            rows[name] = empty_row(name, *outcome)
    timings, results = rounds(runs, task.repeats, context.device, task.least_seconds)
    for name, timing in timings.items():
        rows[name] |= timing._asdict() | _counts(results.pop(name))
    results.clear()
    for name, contender in contenders.items():
        rows[name]["pairs"] = contender.pairs
        rows[name]["operations"], rows[name]["bytes"] = contender.operations, contender.bytes
        if name in runs and contender.has_peak and time.monotonic() < deadline:
            rows[name]["peak_bytes"] = _peak(task, name, runs[name], suite, context)
        if name in runs and name in cases.MATCHERS and isinstance(task.case, PairCase):
            counted = workloads.counted_operations(task.case, name, context)
            rows[name]["operations"] = None if counted is None else counted * contender.pairs
    fields = {key: getattr(task, key) for key in ("name", "group", "measure", "baseline", "pixels", "gate")}
    return {**fields, "rows": list(rows.values())}, runs


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


def peak_of_one_run(task: Task, name: str) -> float | None:
    """Bytes of this process, which does nothing else: an op's beyond its inputs, a matcher's beyond torch."""
    base = process_memory("VmRSS")
    contender = next(c for c in task.contenders() if c.name == name)
    run = contender.build(False)
    if isinstance(task.case, KernelCase):
        run()  # what the first call sets up stays out, and so does what compilation takes
        gc.collect()
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        except OSError:
            return None
        base = process_memory("VmRSS")
    run()
    return process_memory("VmHWM") - base


def _prepare(task: Task, contender: Contender, context: Context, deadline: float) -> Run | tuple[str, str]:
    """The run, gated and warm, or the status and the reason of a row without times."""
    if time.monotonic() > deadline:
        return "not run", "the time that the run may take was spent"
    if context.quick and "torch.compile" in contender.name:
        return "not run", "--quick leaves compilation out"
    try:
        run = contender.build(True)
        if task.warm:
            run()
            synchronise(context.device)
    except Unavailable as reason:
        return "not run", str(reason)
    except Disagreement as verdict:
        return "refused", str(verdict)
    except torch.OutOfMemoryError as error:
        return "failed", f"out of memory: {first_line(error)}"
    except (
        Exception
    ) as error:  # a peer or a compiler may raise anything; the row says what, and the run exits with 1
        return "failed", first_line(error)
    return run


def _counts(result: Any) -> dict[str, Any]:
    if isinstance(result, dict) and "matches" in result:
        return {key: result[key] for key in ("matches", "agreement")}
    return {"matches": result} if isinstance(result, int) else {}


def _peak(task: Task, name: str, run: Run, suite: str, context: Context) -> float | None:
    if context.device.type == "cuda":
        return (
            None if "graph" in name else peak_above(run, context.device)
        )  # a graph's memory is its own pool
    if context.quick:
        return None
    command = [sys.executable, "-m", "benchmarks.run", suite, "--device", "cpu", "--dtype", context.dtype,
               "--peak-of", task.key, name, "--folder", str(context.folder)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = done.stdout.split()[-1] if done.returncode == 0 else "none"
    return None if text == "none" else float(text)
