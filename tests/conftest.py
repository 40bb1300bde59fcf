# SPDX-License-Identifier: Apache-2.0
"""Makes ``tests/support`` and ``benchmarks`` importable, and keeps runs comparable."""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported, which other packages may do before the tests of the kernels.
    os.environ["TRITON_INTERPRET"] = "1"

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the ops take a GPU where there is one: ``pytest -m gpu`` runs them beside those that need one."""
    for item in items:
        if item.path.parent.name in ("ops", "gpu") and item.path.stem != "test_kernel_compilation":
            item.add_marker(pytest.mark.gpu)
