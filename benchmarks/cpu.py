# SPDX-License-Identifier: Apache-2.0
"""Matchers on the CPU: seconds per pair and peak memory, ours and peers' in one run.

python -m benchmarks.cpu [--size 480 640] [--repeats 5] [--json benchmarks/results/cpu.json]

Every matcher gets the same pair: the bundled photograph and its warp. Before anything is timed, our ``full`` is held
to the scores of transformers' port with the same weights. Timed calls alternate between matchers, so a machine that
drifts drifts for all; the floor is a convolution of the same shape as most of the work, timed in the same rounds.
Peak memory is that of a process of its own beyond the interpreter with torch loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

FULL_GFLOP = 432  # of a 640x480 pair, authors' architecture
Matcher = Callable[[torch.Tensor, torch.Tensor], int]


def _seeded_full() -> Any:
    """The ``full`` model with the seeded weights of the parity tests: as many matches as trained ones would give."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from support.golden import golden_model

    return golden_model()


def _ours(preset: str, dtype: torch.dtype) -> Matcher:
    from eloftr_ops import EfficientLoFTR

    model = EfficientLoFTR.from_pretrained("small") if preset == "small" else _seeded_full()
    model = model.fuse().to(dtype)
    return lambda a, b: len(model({"image0": a.to(dtype), "image1": b.to(dtype)})["confidence"])


def _transformers(folder: str) -> Matcher:
    from transformers import EfficientLoFTRForKeypointMatching

    model = EfficientLoFTRForKeypointMatching.from_pretrained(folder).eval()

    def match(a: torch.Tensor, b: torch.Tensor) -> int:
        images = torch.stack([a[0].expand(3, -1, -1), b[0].expand(3, -1, -1)])[None]
        return int((model(images).matches > -1).sum()) // 2

    return match


def _kornia() -> Matcher:
    from kornia.feature import LoFTR

    torch.manual_seed(0)
    model = LoFTR(pretrained=None).eval()
    model.coarse_matching.thr = 0.0
    return lambda a, b: len(model({"image0": a, "image1": b})["confidence"])


def _matcher(name: str, folder: str) -> Matcher:
    if name == "transformers":
        return _transformers(folder)
    if name == "kornia LoFTR":
        return _kornia()
    preset, dtype = name.split()[1:]
    return _ours(preset, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])


NAMES = ("eloftr_ops full fp32", "eloftr_ops full bf16", "transformers", "kornia LoFTR",
         "eloftr_ops small fp32", "eloftr_ops small bf16")  # fmt: skip


def _images(size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    from eloftr_ops.io import demo_pair

    pair = demo_pair()
    return tuple(F.interpolate(x, size, mode="bilinear").contiguous() for x in pair[:2])  # type: ignore[return-value]


def _export_for_transformers(folder: str) -> None:
    """Our ``full`` with the seeded weights, saved in transformers' layout; checks that scores agree."""
    from transformers import EfficientLoFTRForKeypointMatching

    ours = _seeded_full()
    ours.save_pretrained(folder, layout="transformers")
    theirs = EfficientLoFTRForKeypointMatching.from_pretrained(folder).eval()
    a, b = _images((128, 160))
    maps = ours.match_maps(*ours.pair_features({"image0": a, "image1": b}))
    images = torch.stack([a[0].expand(3, -1, -1), b[0].expand(3, -1, -1)])[None]
    coarse = theirs.efficientloftr(images).feature_maps[0]
    error = (coarse[0, 0] - maps.coarse0[0]).norm() / coarse[0, 0].norm()
    if not error < 1e-3:
        raise SystemExit(f"refusing to time: coarse features differ by {float(error):.2g} from transformers'")


def _floor() -> Callable[[], None]:
    """A 3x3 convolution of 256 channels at 1/8 of 640x480, two images: 11.3 GFLOP."""
    conv = torch.nn.Conv2d(256, 256, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.rand(2, 256, 60, 80).to(memory_format=torch.channels_last)

    def run() -> None:
        conv(x)

    return run


def _peak(name: str, folder: str, size: tuple[int, int]) -> float:
    """GB beyond torch, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.cpu",
        "--peak",
        name,
        "--folder",
        folder,
        "--size",
        *map(str, size),
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _status(field: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024 / 1e9


def _measure_peak(name: str, folder: str, size: tuple[int, int]) -> None:
    base = _status("VmRSS")
    match = _matcher(name, folder)
    match(*_images(size))
    print(_status("VmHWM") - base)


def _run(size: tuple[int, int], repeats: int, folder: str, names: tuple[str, ...]) -> dict[str, Any]:
    _export_for_transformers(folder)
    images = _images(size)
    matchers = {name: _matcher(name, folder) for name in names}
    counts = {name: match(*images) for name, match in matchers.items()}  # warm-up
    floor = _floor()
    floor()
    seconds: dict[str, list[float]] = {name: [] for name in (*matchers, "floor")}
    for _ in range(repeats):
        for name, match in matchers.items():
            start = time.perf_counter()
            match(*images)
            seconds[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(5):
            floor()
        seconds["floor"].append((time.perf_counter() - start) / 5)
    rate = 11.3 / statistics.median(seconds.pop("floor"))
    rows = [
        {
            "matcher": name,
            "median_s": statistics.median(values),
            "min_s": min(values),
            "max_s": max(values),
            "matches": counts[name],
            "peak_gb": _peak(name, folder, size),
        }
        for name, values in seconds.items()
    ]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "size": size,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "commit": commit,
        "conv_gflop_per_s": rate,
        "rows": rows,
    }


def _print(record: dict[str, Any]) -> None:
    print(
        f"{record['size']}, {record['threads']} threads, convolutions at {record['conv_gflop_per_s']:.0f} GFLOP/s"
    )
    print("| matcher | seconds, median (min .. max) | peak memory beyond torch | matches |")
    print("| --- | --- | --- | --- |")
    for row in record["rows"]:
        times = f"{row['median_s']:.2f} ({row['min_s']:.2f} .. {row['max_s']:.2f})"
        print(f"| {row['matcher']} | {times} | {row['peak_gb']:.2f} GB | {row['matches']} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs=2, type=int, default=(480, 640), metavar=("H", "W"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--matchers", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--peak", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    size = (options.size[0], options.size[1])
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        if options.peak:
            _measure_peak(options.peak, options.folder, size)
            return
        record = _run(size, options.repeats, folder, tuple(options.matchers))
    _print(record)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
