# SPDX-License-Identifier: Apache-2.0
"""The backbone's strided 1x1 branch: the values of the strided convolution, without its faulty backward."""

import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from eloftr_ops.model.backbone import ConvBatchNorm

TRAINING_STEP = """
import torch
from support.models import tiny_model
model = tiny_model().train()
for _ in range(2):
    sum(x.sum() for x in model.backbone(torch.rand(2, 1, 480, 608))).backward()
print("finite", all(bool(torch.isfinite(p.grad).all()) for p in model.backbone.parameters()))
"""


def test_picking_positions_first_is_the_strided_convolution() -> None:
    branch = ConvBatchNorm(3, 5, 1, 2).double().eval()
    for size in ((6, 8), (7, 5)):
        x = torch.rand(2, 3, *size, dtype=torch.float64)
        expected = branch.bn(F.conv2d(x, branch.conv.weight, stride=2))
        torch.testing.assert_close(branch(x), expected)


def test_a_training_step_at_a_size_that_corrupted_memory() -> None:
    """In a process of its own: the fault aborts it."""
    tests = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", TRAINING_STEP], cwd=tests, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["finite", "True"]
