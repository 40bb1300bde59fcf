# SPDX-License-Identifier: Apache-2.0
"""Makes ``tests/support`` importable and keeps runs comparable."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
