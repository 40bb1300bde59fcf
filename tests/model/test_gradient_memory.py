# SPDX-License-Identifier: Apache-2.0
"""Memory of forward and backward through the homography loss: linear in cells, bounded in bytes."""

import math
import subprocess
import sys

import torch

from eloftr_ops.training.end_to_end import homography_objective
from support.memory import LargestTensor
from support.models import random_images, tiny_model

LIMIT = 2e9  # bytes of the process beyond the interpreter with torch and this package loaded

MEASURE = """
import torch
from pathlib import Path
from eloftr_ops import EfficientLoFTR
from eloftr_ops.io import demo_pair
from eloftr_ops.training.end_to_end import homography_objective

def peak():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
small = torch.zeros(1, 1, 32, 32, requires_grad=True)
torch.nn.functional.conv2d(small, torch.zeros(1, 1, 3, 3)).sum().backward()
before = peak()
model = EfficientLoFTR.from_pretrained("small")
pair = demo_pair()
objective = homography_objective(model, pair.image0, pair.image1, pair.H_0to1.float()[None])
objective.loss.backward()
print(len(objective.matches.confidence), bool(objective.valid), peak() - before)
"""


def test_no_matrix_of_all_cell_pairs() -> None:
    """At 480 x 640 against 480 x 608, L = 4800 and S = 4560: nothing has as many elements as L x S."""
    model = tiny_model(stage_channels=(8, 16, 16, 32))
    image = random_images(1, 480, 640)
    shifted = image.roll(16, -1)[..., :608]
    cells0, cells1 = 60 * 80, 60 * 76
    with LargestTensor() as seen:
        objective = homography_objective(model, image, shifted, torch.eye(3)[None])
        objective.loss.backward()
    assert len(objective.matches.confidence) > 20
    assert bool(objective.valid)
    assert seen.elements < cells0 * cells1 / 4
    assert not any(shape[-2:] in ((cells0, cells1), (cells1, cells0)) for shape in seen.shapes)
    # the watcher does see the recomputed blocks of scores
    assert any(shape[-1:] == (cells1,) and math.prod(shape) > 1e6 for shape in seen.shapes)


def test_a_vga_pair_takes_less_than_two_gigabytes() -> None:
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    matches, valid, peak = run.stdout.split()
    assert int(matches) > 100
    assert valid == "True"
    assert int(peak) < LIMIT
