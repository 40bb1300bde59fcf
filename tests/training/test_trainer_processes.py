# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed, and runs of two processes: both end as one undisturbed process does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eloftr_ops.training.loop import train
from support.training_runs import exact, gradients, losses, short, whole

SCRIPT = Path(__file__).parents[1] / "support" / "training_runs.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_killed_while_writing_a_checkpoint_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "kill", str(tmp_path / "cut")]
    killed = subprocess.run(command, env=ENVIRONMENT, check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "cut" / "checkpoints" / "step-00000004.000").exists()
    resumed = train(short(tmp_path / "cut"))
    whole = train(short(tmp_path / "whole"))
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("group")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(SCRIPT), "group", str(folder)],
        env=ENVIRONMENT,
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("case", ["shares", "accumulated", "blank"])
def test_two_processes_give_the_gradient_of_one_with_the_joined_batch(group: Path, case: str) -> None:
    """In float64 only the order of sums differs, by some 1e-16 each; the reported loss is float32."""
    expected = gradients(exact(group), case, 0, 1)
    assert sum(float(value.abs().sum()) for value in expected.values()) > 0
    for rank in (0, 1):
        found = torch.load(group / f"gradients{rank}.pt", weights_only=True)[case]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            tolerance = (1e-6 if name == "loss" else 1e-10) * max(1e-3, float(value.abs().max()))
            torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


def test_a_run_of_two_processes_is_that_of_one(group: Path, tmp_path: Path) -> None:
    train(whole(tmp_path))
    found, expected = losses(group / "run"), losses(tmp_path)
    assert found == pytest.approx(expected, rel=1e-5)
    scores = [(folder / "log.jsonl").read_text().count('"score"') for folder in (group / "run", tmp_path)]
    assert scores == [2, 2]
