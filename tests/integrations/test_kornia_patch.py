# SPDX-License-Identifier: Apache-2.0
"""The patch for kornia: built, put into the installed kornia, its tests run, its matches compared with ours."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kornia.feature
import pytest
import torch

import eloftr_ops
from eloftr_ops.integrations.kornia import build
from eloftr_ops.io import demo_pair
from support import toolboxes

PACKAGE = "kornia.feature.efficient_loftr"


class BaseTester:
    """As much of kornia's ``testing.base.BaseTester`` as the tests use, with its tolerances."""

    @staticmethod
    def assert_close(actual: Any, expected: Any, low_tolerance: bool = False) -> None:
        rtol, atol = (1e-2, 10**-2.5) if low_tolerance else (1e-4, 1e-5)
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)

    @staticmethod
    def gradcheck(function: Any, inputs: Any, **options: Any) -> None:
        variables = [value.detach().double().requires_grad_() for value in inputs]
        assert torch.autograd.gradcheck(function, variables, fast_mode=True, **options)


@pytest.fixture(scope="module")
def patch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The patch, inside the installed kornia for as long as the tests of this file run."""
    folder = tmp_path_factory.mktemp("kornia") / "patch"
    build.build(folder)
    place = str(folder / "kornia" / "feature")
    kornia.feature.__path__.append(place)
    yield folder
    kornia.feature.__path__.remove(place)
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]


@pytest.fixture
def tester(patch: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    toolboxes.module(monkeypatch, "testing.base", BaseTester=BaseTester)
    path = patch / "tests" / "feature" / "test_efficient_loftr.py"
    spec = importlib.util.spec_from_file_location("patched_tests", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TestEfficientLoFTR()


@pytest.mark.parametrize(
    "name", ["smoke", "cardinality", "exception", "feature", "batch_equals_its_pairs", "gradcheck"]
)
def test_tests_of_the_patch(tester: Any, name: str) -> None:
    method = getattr(tester, f"test_{name}")
    device, dtype = torch.device("cpu"), torch.float32
    if name == "gradcheck":
        method(device)
        return
    marks = [mark for mark in getattr(method, "pytestmark", []) if mark.name == "parametrize"]
    for case in marks[0].args[1] if marks else [()]:
        method(device, dtype, *([case] if marks else []))


def test_every_test_of_the_patch_is_run(tester: Any) -> None:
    (mark,) = [mark for mark in test_tests_of_the_patch.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]
    assert {f"test_{name}" for name in mark.args[1]} == {name for name in dir(tester) if name.startswith("test_")}


@pytest.mark.parametrize("gradient", [False, True])
def test_matches_are_those_of_this_project(patch: Path, tmp_path: Path, gradient: bool) -> None:
    package = importlib.import_module(PACKAGE)
    own = eloftr_ops.EfficientLoFTR.from_pretrained("small").eval()
    torch.save(own.state_dict(), tmp_path / "small.pt")
    config = package.EfficientLoFTRConfig(**{name: getattr(own.config, name) for name in vars(own.config)})
    fused = any(name.endswith("fused.weight") for name in own.state_dict())
    ported = package.EfficientLoFTR(config, fused=fused, pretrained=str(tmp_path / "small.pt"))
    assert not ported.training
    views = demo_pair()
    data = {"image0": views.image0[..., 60:188, 320:448], "image1": views.image1[..., 30:158, 160:288]}
    with torch.set_grad_enabled(gradient):
        mine, other = own(data), ported(data)
    assert len(mine["confidence"]) > 40
    for key in mine:
        torch.testing.assert_close(other[key], mine[key], atol=2e-3, rtol=1e-4, check_dtype=True)


def test_patch_needs_torch_and_kornia_alone(patch: Path) -> None:
    for path in (patch / "kornia").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) triton", text, re.MULTILINE)
        assert "eloftr_kernels" not in text
        assert "eloftr_ops" not in text


def test_what_the_patch_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"coarse\.py: the patch has no file for 'import eloftr_kernels'"):
        build.relative("import eloftr_kernels\n", "coarse.py")
    assert build.relative("from eloftr_kernels import dispatch\n", "ops/a/cpu.py") == "from .. import dispatch\n"
    assert build.relative("from eloftr_ops.model.fine import f\n", "matcher.py") == "from .fine import f\n"
    build.check_imports({"a.py": "from .ops import b\n", "ops/__init__.py": "from ..a import c\n"})
    with pytest.raises(ValueError, match=r"ops/a\.py: the patch has no file ops/b\.py"):
        build.check_imports({"ops/a.py": "from .b import c\n"})
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="expected an empty folder or a new one"):
        build.build(tmp_path)
