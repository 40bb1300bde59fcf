# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in at most eight minutes: ``python -m benchmarks.gpu_checks``.

It runs the tests marked ``gpu``, the suites ``kernels``, ``launch`` and ``matcher``, and profiles a pair and a training
step. Every step is a process of its own with a limit in seconds, so that one that hangs or crashes costs no other.
``checks.json`` in the output folder says of each step how it ended and what failed, by name; each step also leaves its
log and its own record there.

A bare machine needs Python, torch, triton, pytest and pytest-xdist. What else is needed can be carried: run
``python -m benchmarks.gpu_checks --prepare wheels`` where there is a network, and ``--wheels wheels`` there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import record

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "out" / "gpu_checks"
CARRIED = ("kornia", "kornia-rs", "lightning-fabric")
SITE = "eloftr_ops_gpu_checks"  # folder of carried packages, in the system's temporary folder
_WORST_ROWS = 16  # of a profile


class Step(NamedTuple):
    """One process."""

    name: str
    limit: float  # seconds
    command: list[str]  # after the interpreter
    failed: Callable[[Path], list[str]]  # names of what failed, from the output folder


def steps(device: str, output: Path, *, quick: bool) -> list[Step]:
    """What is run, in this order: what may fail comes first, and the limits add up to under eight minutes."""
    workers = str(max(1, min(15, (os.cpu_count() or 2) - 1)))
    tests = ["tests/gpu"] if quick else ["tests/ops", "tests/gpu"]
    pytest = ["-m", "pytest", *tests, "-m", "gpu", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
    pytest += ["--junitxml", str(output / "tests.xml")] + ([] if quick else ["-n", workers])
    shared = ["--device", device, "--json", "--output", str(output)] + (["--quick"] if quick else [])

    def suite(name: str, limit: float, *more: str) -> Step:
        minutes = ["--minutes", str(round((limit - 20) / 60, 2))]  # the last case may take a while longer
        command = ["-m", "benchmarks.run", name, *shared, *minutes, *more]
        return Step(name, limit, command, lambda folder: _failed_rows(folder, name))

    def profile(what: str) -> Step:
        command = [
            "-m",
            "benchmarks.gpu_checks",
            "--profile",
            what,
            "--device",
            device,
            "--output",
            str(output),
        ]
        command += ["--quick"] if quick else []
        return Step(f"profile_{what}", 35, command, lambda folder: [])

    only = ["--only", "dual_softmax_lse"] if quick else []
    return [
        Step("tests", 125, pytest, _failed_tests),
        suite("kernels", 115, *only),
        suite("launch", 45, *only),
        suite("matcher", 115),
        profile("pair"),
        profile("training"),
    ]


def run_steps(
    chosen: Sequence[Step], device: str, output: Path, environment: dict[str, str], *, quick: bool = False
) -> dict[str, Any]:
    """Run ``chosen`` one after the other; writes ``checks.json`` after each, and returns what it holds."""
    output.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {
        "device": record.device_name(torch.device(device)),
        "quick": quick,
        "environment": record.environment(),
        "seconds": 0.0,
        "steps": [],
    }
    start = time.monotonic()
    for step in chosen:
        outcome = _run(step, output, environment)
        made["steps"].append(outcome)
        made["seconds"] = time.monotonic() - start
        (output / "checks.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        print(f"{step.name}: {outcome['status']}, {outcome['seconds']:.0f} s", flush=True)
        for name in outcome["failed"]:
            print(f"  {name}", flush=True)
    return made


def _run(step: Step, output: Path, environment: dict[str, str]) -> dict[str, Any]:
    log = output / f"{step.name}.log"
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        # A group of its own: the limit ends its workers too.
        process = subprocess.Popen(
            [sys.executable, *step.command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(step.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    failed = _names(step, output)
    if code is None:
        status = f"over its limit of {step.limit:g} s"
    else:
        status = "passed" if code == 0 else f"failed with exit status {code}"
    if code != 0 and not failed:
        failed = [_last_line(log)]
    return {
        "name": step.name,
        "command": ["python", *step.command],
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "failed": failed,
    }


def _names(step: Step, output: Path) -> list[str]:
    try:
        return step.failed(output)
    except (OSError, ValueError, ET.ParseError):
        return []  # the step left no record, or half of one: its log says why


def _failed_tests(output: Path) -> list[str]:
    """Names of failed tests, each with its reason."""
    found = []
    for case in ET.parse(output / "tests.xml").iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        if bad:
            reason = (bad[0].get("message") or "").strip().splitlines()
            found.append(f"{case.get('classname')}.{case.get('name')}: {reason[0][:200] if reason else ''}")
    return found


def _failed_rows(output: Path, suite: str) -> list[str]:
    """Rows of a suite that were refused, failed or not reached."""
    spent = "the time that the run may take was spent"
    return [
        f"{case['name']}, {case['measure']}, {row['name']}: {row['status']}: {row['reason']}"
        for path in sorted(output.glob(f"{suite}--*.json"))
        for case in record.read(path)["cases"]
        for row in case["rows"]
        if row["status"] in ("refused", "failed") or row["reason"] == spent
    ]


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line[:300] for line in reversed(lines) if line), "it printed nothing")


def profile(what: str, device: torch.device, output: Path, *, quick: bool) -> None:
    """Profile a pair or a training step; writes ``profile_<what>.json`` and prints the tables."""
    call = {"pair": _pair_call, "training": _training_call}[what](device, quick)
    for _ in range(1 if quick else 3):
        call()
    _wait(device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    calls = 1 if quick else 3
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _wait(device)
    seconds = (time.perf_counter() - start) / calls
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(calls):
            call()
        _wait(device)
    averages = profiler.key_averages()
    made: dict[str, Any] = {
        "what": what,
        "device": record.device_name(device),
        "environment": record.environment(),
        "seconds": seconds,
        "device_seconds": sum(event.self_device_time_total for event in averages) / calls / 1e6,
        "host_seconds": sum(event.self_cpu_time_total for event in averages) / calls / 1e6,
    }
    for place, key in (("device", "self_device_time_total"), ("host", "self_cpu_time_total")):
        worst = sorted(averages, key=lambda event: -getattr(event, key))[:_WORST_ROWS]
        made[f"longest_on_{place}"] = [
            {"name": e.key[:120], "calls": e.count / calls, "seconds": getattr(e, key) / calls / 1e6}
            for e in worst
            if getattr(e, key) > 0
        ]
        print(averages.table(sort_by=key.replace("device", "cuda"), row_limit=_WORST_ROWS))
    output.mkdir(parents=True, exist_ok=True)
    (output / f"profile_{what}.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(f"{what}: {1e3 * seconds:.2f} ms a call")


def _pair_call(device: torch.device, quick: bool) -> Callable[[], object]:
    """The matcher as people deploy it on the device: the optimized copy, in half precision on a GPU."""
    from benchmarks.matchers import images
    from eloftr_ops import EfficientLoFTR

    dtype = torch.float16 if device.type == "cuda" else torch.float32
    matcher = EfficientLoFTR.from_pretrained("small").to(device).optimize_for_inference(dtype=dtype)
    size = (96, 128) if quick else (480, 640)
    pair = [x.to(next(matcher.parameters()).dtype) for x in images(size, 1, device)]
    return torch.inference_mode()(lambda: matcher({"image0": pair[0], "image1": pair[1]}))


def _training_call(device: torch.device, quick: bool) -> Callable[[], object]:
    """Forward, losses and backward of a batch."""
    from benchmarks.pairs import training_step

    size, batch = ((96, 128), 1) if quick else ((256, 256), 20)
    return training_step(size, batch, device, dtype="fp32")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prepare(folder: Path, python: str) -> None:
    """Download the packages that a bare machine lacks, at the versions of ``constraints.txt``."""
    pinned = re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    versions = {name.lower().replace("_", "-"): version for name, version in pinned}
    packages = [f"{name}=={versions[name]}" if name in versions else name for name in CARRIED]
    platforms = [f"--platform={name}" for name in ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += [f"--python-version={python}", "--implementation=cp", *platforms, "--dest", str(folder)]
    subprocess.run([*command, "--platform=manylinux2014_x86_64", *packages], check=True)


def _environment(wheels: Path | None) -> dict[str, str]:
    """Of the steps: the checkout on the path, with what was carried beside it."""
    paths = [str(ROOT), str(ROOT / "kernels")]
    if wheels is not None:
        site = Path(tempfile.gettempdir()) / SITE
        files = sorted(str(path) for path in wheels.glob("*.whl"))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        subprocess.run([*command, "--target", str(site), *files], check=True)
        paths.append(str(site))
    earlier = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths + earlier), "HF_HUB_OFFLINE": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks; 1 if any step failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: proves that the script runs")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of logs and records")
    parser.add_argument("--steps", nargs="+", help="only these")
    parser.add_argument("--wheels", type=Path, help="folder of packages to install first")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="download those packages, and stop")
    parser.add_argument("--python", default="3.12", help="version for --prepare")
    parser.add_argument("--profile", choices=("pair", "training"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.prepare:
        prepare(options.prepare, options.python)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a GPU, found none. --device cpu --quick tries the script")
    output = options.output.resolve()
    if options.profile:
        profile(options.profile, torch.device(options.device), output, quick=options.quick)
        return 0
    chosen = steps(options.device, output, quick=options.quick)
    names = [step.name for step in chosen]
    for name in options.steps or []:
        if name not in names:
            parser.error(f"--steps: expected some of {', '.join(names)}, got {name!r}")
    chosen = [step for step in chosen if not options.steps or step.name in options.steps]
    made = run_steps(chosen, options.device, output, _environment(options.wheels), quick=options.quick)
    print(f"written {output / 'checks.json'}, {made['seconds']:.0f} s")
    return int(any(step["status"] != "passed" for step in made["steps"]))


if __name__ == "__main__":
    raise SystemExit(main())
