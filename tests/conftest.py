# SPDX-License-Identifier: Apache-2.0
"""Makes ``tests/support`` and ``benchmarks`` importable, and keeps runs comparable."""

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
