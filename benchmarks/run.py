# SPDX-License-Identifier: Apache-2.0
"""Take measurements: ``python -m benchmarks.run kernels|launch|matcher|cpu ...``; several suites may be named.

Every contender is held to a reference before it is timed; one that disagrees is not timed, its row says what
disagreed, and the exit status is 1. Rounds are interleaved. A run ends when its minutes are spent: rows that were not
reached say so. ``kernels`` needs torch, triton and this repository alone; without an installation, run it with
``PYTHONPATH=kernels``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernels, launch, pairs, record
from benchmarks.measure import (
    DTYPES,
    Benchmark,
    Context,
    Run,
    limit_fractions,
    machine_limits,
    peak_of_one_run,
    run_benchmark,
)
from benchmarks.ops import OPS
from benchmarks.report import case_table, slope_table

SUITES: dict[str, Callable[[Context], list[Benchmark]]] = {
    "kernels": kernels.benchmarks,
    "launch": launch.benchmarks,
    "matcher": functools.partial(pairs.benchmarks, "matcher"),
    "cpu": functools.partial(pairs.benchmarks, "cpu"),
}
MINUTES = {"cuda": 9.0, "cpu": 14.5}  # per command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; 1 if anything was refused or failed."""
    options = _parse(arguments)
    device = torch.device(options.device)
    dtype = options.dtype or ("fp32" if device.type == "cpu" and options.suites != ["launch"] else "fp16")
    if options.threads:
        torch.set_num_threads(options.threads)
    deadline = time.monotonic() + 60 * (options.minutes or MINUTES[device.type])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as scratch, _interpreter(options):
        context = Context(device, dtype, Path(options.folder or scratch), options.quick)
        if options.peak_of:
            return _print_peak(options.suites[0], options.peak_of, context)
        bad = 0
        for suite in options.suites:
            result = _run_suite(suite, context, deadline, options)
            bad += sum(row["status"] in ("refused", "failed") for case in result["cases"] for row in case["rows"])
    return int(bad > 0)


@contextlib.contextmanager
def _interpreter(options: argparse.Namespace) -> Iterator[None]:
    """Triton's interpreter for the quick gate of the kernels on a CPU; it is chosen when they are imported."""
    wanted = options.quick and options.device == "cpu" and options.suites == ["kernels"]
    before = os.environ.get("TRITON_INTERPRET")
    if wanted:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        if wanted:
            os.environ.pop("TRITON_INTERPRET") if before is None else os.environ.update(TRITON_INTERPRET=before)


def _chosen(suite: str, context: Context, options: argparse.Namespace) -> list[Benchmark]:
    """The benchmarks of a suite that ``--only`` and ``--op`` leave."""
    return [
        benchmark
        for benchmark in SUITES[suite](context)
        if (not options.only or options.only in benchmark.key) and (not options.op or options.op == benchmark.group)
    ]


def _run_suite(suite: str, context: Context, deadline: float, options: argparse.Namespace) -> dict[str, Any]:
    start = time.monotonic()
    result = _empty_record(suite, context)
    print(f"# {suite} on {result['device']['name']}, {result['dtype']}, {result['environment']['threads']} threads")
    if suite in ("kernels", "matcher"):
        result["limits"] |= machine_limits(context.device, DTYPES[context.dtype], quick=context.quick)
    for benchmark in _chosen(suite, context, options):
        case, runs = run_benchmark(benchmark, suite, context, deadline)
        _keep_floor(case, result["limits"])
        limit_fractions(case, result["limits"], result["dtype"])
        result["cases"].append(case)
        result["seconds"] = time.monotonic() - start
        print("\n".join(["", *case_table(case)]), flush=True)
        if options.profile:
            _print_profile(benchmark, runs, context, result["limits"])
        if options.json:  # after every case: what is measured stays measured if the run is cut off
            path = record.write(result, options.output)
    print("\n".join(["", *slope_table(result["cases"])]))
    record.check_record(result)
    if options.json and result["cases"]:
        print(f"\nwritten {path}")
    return result


def _empty_record(suite: str, context: Context) -> dict[str, Any]:
    return {
        "schema": record.SCHEMA,
        "suite": suite,
        "device": {"kind": context.device.type, "name": record.device_name(context.device)},
        "dtype": "mixed" if suite == "cpu" else context.dtype,
        "quick": context.quick,
        "environment": record.environment(),
        "limits": dict.fromkeys(record.RECORD["limits"]),
        "seconds": 0.0,
        "cases": [],
    }


def _keep_floor(case: dict[str, Any], limits: dict[str, float | None]) -> None:
    """The convolution rates of the first case that measured them are the run's."""
    for row in case["rows"]:
        if row["name"].startswith(pairs.FLOOR) and row["median_s"]:
            key = f"convolution_{row['name'].split()[-1]}_op_per_s"
            limits[key] = limits[key] or row["operations"] / row["median_s"]


def _print_profile(
    benchmark: Benchmark, runs: dict[str, Run], context: Context, limits: dict[str, float | None]
) -> None:
    """Seconds by stage for our matchers, otherwise the operators that take longest."""
    for name, run in runs.items():
        if benchmark.profile is not None:
            print("\n".join(benchmark.profile(name, limits)))
            continue
        with torch.profiler.profile() as profile:
            run()
        kind = "self_cuda_time_total" if context.device.type == "cuda" else "self_cpu_time_total"
        print(f"\n{benchmark.key}: {name}\n{profile.key_averages().table(sort_by=kind, row_limit=10)}")


def _print_peak(suite: str, peak_of: list[str], context: Context) -> int:
    key, name = peak_of
    benchmark = next(made for made in SUITES[suite](context) if made.key == key)
    peak = peak_of_one_run(benchmark, name)
    print("none" if peak is None else peak)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="+", choices=record.SUITES, metavar="|".join(record.SUITES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: fp16 on a GPU, fp32 on a CPU")
    parser.add_argument("--json", action="store_true", help="write benchmarks/results/<suite>--<device>--<dtype>.json")
    parser.add_argument("--output", type=Path, default=record.RESULTS, help="folder for --json")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: measures nothing")
    parser.add_argument("--profile", action="store_true", help="print where each contender's time goes")
    parser.add_argument("--only", help="cases whose name contains this; an error if there is none")
    parser.add_argument("--op", choices=tuple(OPS), help="suite kernels: the cases of one op")
    parser.add_argument(
        "--contender",
        metavar="NAME=MODULE:FUNCTION",
        help="suite kernels: time this function beside ours; it takes the arguments of --op by name",
    )
    parser.add_argument("--minutes", type=float, help=f"stop measuring after so long; default {MINUTES}")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if "cpu" in options.suites and options.device != "cpu":
        parser.error("the suite cpu runs on the CPU: add --device cpu")
    if (options.op or options.contender) and options.suites != ["kernels"]:
        parser.error("--op and --contender: expected the suite kernels alone")
    if options.contender and not options.op:
        parser.error(f"--contender: expected --op too, one of {', '.join(OPS)}")
    if options.contender:
        try:
            kernels.add_entry(options.contender, options.op)
        except ValueError as error:
            parser.error(str(error))
    context = Context(torch.device(options.device), options.dtype or "fp32", Path(), options.quick)
    for suite in options.suites:
        if not options.peak_of and not _chosen(suite, context, options):
            names = "\n  ".join(benchmark.key for benchmark in SUITES[suite](context))
            parser.error(
                f"--only {options.only!r}: expected part of a case's name, got none. Cases of {suite}:\n  {names}"
            )
    return options


if __name__ == "__main__":
    raise SystemExit(main())
