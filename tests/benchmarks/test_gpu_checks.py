# SPDX-License-Identifier: Apache-2.0
"""The script for machines with a GPU: it names what fails, ends what hangs, and runs on a CPU as far as that goes."""

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_checks, record
from benchmarks.gpu_checks import Step

TESTS = """
import pytest

def test_good():
    pass

@pytest.mark.parametrize("size", [7])
def test_bad(size):
    raise ValueError(f"wrong for {size}\\nand more")
"""


def checked(tmp_path: Path, *chosen: Step) -> list[dict]:
    gpu_checks.run_steps(chosen, "cpu", tmp_path, dict(os.environ))
    made = json.loads((tmp_path / "checks.json").read_text())
    assert made["environment"]["versions"]["torch"]
    return made["steps"]


def test_failed_tests_are_named_with_their_reason(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    command = ["-m", "pytest", str(tmp_path), "-q", "-p", "no:cacheprovider", "--junitxml"]
    step = Step("tests", 60, [*command, str(tmp_path / "tests.xml")], gpu_checks._failed_tests)
    (outcome,) = checked(tmp_path, step)
    assert outcome["status"] == "failed with exit status 1"
    (name,) = outcome["failed"]
    assert name.endswith("test_some.test_bad[7]: ValueError: wrong for 7")


def test_a_step_that_hangs_is_ended_and_the_next_one_runs(tmp_path: Path) -> None:
    hanging = Step("hanging", 0.5, ["-c", "import time; print('here', flush=True); time.sleep(60)"], lambda f: [])
    crashing = Step("crashing", 30, ["-c", "raise ValueError('broken')"], lambda f: [])
    first, second = checked(tmp_path, hanging, crashing)
    assert first["status"] == "over its limit of 0.5 s"
    assert first["seconds"] < 20
    assert second["failed"] == ["ValueError: broken"]


def test_refused_rows_are_named(tmp_path: Path) -> None:
    row = record.empty_row("triton", "refused", "y: error 1, allowed 0.01")
    case = {
        "name": "mlp",
        "group": "mlp",
        "measure": "forward",
        "baseline": None,
        "pixels": None,
        "gate": "g",
    }
    made = {
        "schema": record.SCHEMA,
        "suite": "kernels",
        "device": {"kind": "cpu", "name": "cpu"},
        "dtype": "fp16",
        "quick": True,
        "environment": record.environment(),
        "limits": dict.fromkeys(record.RECORD["limits"]),
        "seconds": 1.0,
        "cases": [{**case, "rows": [row]}],
    }
    record.write(made, tmp_path)
    assert gpu_checks._failed_rows(tmp_path, "kernels") == ["mlp, forward, triton: refused: y: error 1, allowed 0.01"]


def test_the_limits_add_up_to_eight_minutes(tmp_path: Path) -> None:
    made = gpu_checks.steps("cuda", tmp_path, quick=False)
    assert [step.name for step in made] == [
        "tests", "kernels", "launch", "matcher", "profile_pair", "profile_training",
    ]  # fmt: skip
    assert sum(step.limit for step in made) <= 8 * 60


def test_a_profile_leaves_a_record(tmp_path: Path) -> None:
    gpu_checks.profile("training", torch.device("cpu"), tmp_path, quick=True)
    made = json.loads((tmp_path / "profile_training.json").read_text())
    assert made["seconds"] > 0
    assert made["longest_on_host"][0]["seconds"] > 0


def test_the_script_runs_on_a_cpu(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--quick", "--output", str(tmp_path), "--steps", "profile_pair"]
    assert gpu_checks.main(arguments) == 0
    steps = json.loads((tmp_path / "checks.json").read_text())["steps"]
    assert [(step["name"], step["status"]) for step in steps] == [("profile_pair", "passed")]
    assert (tmp_path / "profile_pair.json").exists()


def test_without_a_gpu_it_says_how_to_try(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        return
    with pytest.raises(SystemExit):
        gpu_checks.main([])
    assert "--device cpu --quick" in capsys.readouterr().err
