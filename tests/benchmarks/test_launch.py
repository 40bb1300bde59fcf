# SPDX-License-Identifier: Apache-2.0
"""The suite that measures the host: it runs without a GPU, in a process without Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import launch, record
from benchmarks.measure import Context, Unavailable

ROOT = Path(__file__).parents[2]


def test_host_time_is_told_with_its_parts(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "benchmarks.run", "launch", "--device", "cpu", "--quick", "--only"]
    command += ["dual_softmax_lse", "--json", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (case,) = record.read(tmp_path / "launch--cpu--fp16.json")["cases"]
    seconds = {row["name"]: row["median_s"] for row in case["rows"]}
    assert case["baseline"] == launch.ADD
    for mode in ("forward", launch.RECORDING):
        parts = [seconds[f"{mode}: {part}"] for part in (*launch.PARTS, launch.OTHER)]
        assert sum(parts) == pytest.approx(seconds[mode])
        assert seconds[f"{mode}: Triton's launcher"] > 0  # the Triton path ran
    assert "in units of one torch.add" in done.stdout


def test_the_interpreter_is_a_reason_not_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(Unavailable, match="interpreter is on"):
        launch._ready(Context(torch.device("cpu"), "fp16", Path(), quick=True))
