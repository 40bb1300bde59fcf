# SPDX-License-Identifier: Apache-2.0
"""The house: direction of imports, public names, and a README that runs."""

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest

import eloftr_kernels
import eloftr_ops

ROOT = Path(__file__).parents[1]
PACKAGES = {"eloftr_ops": ROOT / "eloftr_ops", "eloftr_kernels": ROOT / "kernels" / "eloftr_kernels"}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name.split(".")[0] for name in found}


def test_kernels_need_torch_and_triton_only() -> None:
    for path in PACKAGES["eloftr_kernels"].rglob("*.py"):
        foreign = _imports(path) & {"eloftr_ops", "kornia", "numpy", "benchmarks", "tests"}
        assert not foreign, f"{path} imports {foreign}"


def test_triton_is_imported_in_kernel_files_only() -> None:
    for package in PACKAGES.values():
        for path in package.rglob("*.py"):
            if not path.stem.startswith("kernel"):
                top_level = {
                    name.split(".")[0]
                    for node in ast.parse(path.read_text()).body
                    if isinstance(node, ast.Import | ast.ImportFrom)
                    for name in (
                        [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                    )
                }
                assert "triton" not in top_level, path


def test_the_library_imports_neither_tests_nor_benchmarks() -> None:
    for path in PACKAGES["eloftr_ops"].rglob("*.py"):
        assert not _imports(path) & {"tests", "support", "benchmarks", "pytest", "hypothesis"}, path


def test_public_names() -> None:
    """A removal or an addition is a deliberate edit here."""
    assert set(eloftr_ops.__all__) == {"EfficientLoFTR", "EfficientLoFTRConfig", "Matches", "__version__"}
    for package in (eloftr_ops, eloftr_kernels):
        assert all(hasattr(package, name) for name in package.__all__)


def test_files_are_short() -> None:
    for package in PACKAGES.values():
        for path in package.rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_the_readme_example_prints_what_it_says(readme: str) -> None:
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    expected = re.search(r"```text\n(.*?)```", readme, re.DOTALL).group(1)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    number = re.compile(r"\d+(?:\.\d+)?")
    assert number.sub("#", printed.getvalue()) == number.sub("#", expected)
    (count, error, _), (said, claimed, _) = (
        [float(x) for x in number.findall(t)] for t in (printed.getvalue(), expected)
    )
    assert count == pytest.approx(
        said, rel=0.05
    )  # a few matches lie at the threshold, and round elsewhere otherwise
    assert error == pytest.approx(claimed, abs=0.1)


def test_links_in_the_docs_lead_somewhere(readme: str) -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page} -> {target}"
