# SPDX-License-Identifier: Apache-2.0
"""Rules for the whole repository: direction of imports, public names, short functions, paths that docs name."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import eloftr_kernels
import eloftr_ops

ROOT = Path(__file__).parents[1]
PACKAGES = {"eloftr_ops": ROOT / "eloftr_ops", "eloftr_kernels": ROOT / "kernels" / "eloftr_kernels"}
FILE_LINES = 400
FUNCTION_LINES = 60  # without the docstring
KERNEL_LINES = 100
# Triton has no functions that return through pointers and keep a block in registers: these cannot be split.
LONG_KERNELS = {"_window_match_bwd"}
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "kernels" / "README.md",
    *(ROOT / "docs").rglob("*.md"),
]


def _files() -> Iterator[Path]:
    for package in PACKAGES.values():
        yield from sorted(package.rglob("*.py"))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _imports(path: Path) -> set[str]:
    """First parts of the names that a file imports anywhere."""
    found = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name.split(".")[0] for name in found}


def _top_level(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run with the file, and those under TYPE_CHECKING; not those inside functions."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If | ast.Try):
            yield from _top_level([*node.body, *node.orelse])


def _imported_files(path: Path) -> set[Path]:
    """Files of this repository that a file names in its top-level imports."""
    found = set()
    for node in _top_level(_tree(path).body):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            found |= {file for file in [_file_of(name) or _file_of(name.rpartition(".")[0])] if file}
    return found


def _file_of(name: str) -> Path | None:
    package, _, rest = name.partition(".")
    if package not in PACKAGES:
        return None
    place = PACKAGES[package].joinpath(*filter(None, rest.split(".")))
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def test_kernels_need_torch_and_triton_only() -> None:
    for path in PACKAGES["eloftr_kernels"].rglob("*.py"):
        foreign = _imports(path) & {"eloftr_ops", "kornia", "numpy", "benchmarks", "tests"}
        assert not foreign, f"{path} imports {foreign}"


def test_triton_is_imported_in_kernel_files_only() -> None:
    for path in _files():
        if not path.stem.startswith("kernel"):
            for node in _top_level(_tree(path).body):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not any(module.split(".")[0] == "triton" for module in modules), path


def test_the_library_imports_neither_tests_nor_benchmarks() -> None:
    for path in PACKAGES["eloftr_ops"].rglob("*.py"):
        assert not _imports(path) & {"tests", "support", "benchmarks", "pytest", "hypothesis"}, path


def test_files_do_not_import_in_a_circle() -> None:
    try:
        graphlib.TopologicalSorter({path: _imported_files(path) for path in _files()}).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" <- ".join(str(file.relative_to(ROOT)) for file in error.args[1])) from None


def test_public_names() -> None:
    """A removal or an addition is a deliberate edit here."""
    assert set(eloftr_ops.__all__) == {
        "EfficientLoFTR",
        "EfficientLoFTRConfig",
        "ImageMatches",
        "Matches",
        "__version__",
        "match_images",
    }
    for package in (eloftr_ops, eloftr_kernels):
        assert all(hasattr(package, name) for name in package.__all__)


def test_files_are_short() -> None:
    long = [path for path in _files() if len(path.read_text().splitlines()) > FILE_LINES]
    assert not long


def test_functions_are_short() -> None:
    long = []
    for path in _files():
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in LONG_KERNELS:
                kernel = path.stem.startswith("kernel")
                lines = _lines(node)
                if lines > (KERNEL_LINES if kernel else FUNCTION_LINES):
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert not long, "\n".join(long)


def _lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = node.body[0]
    docstring = ast.get_docstring(node) is not None
    return node.end_lineno - node.lineno + 1 - (first.end_lineno - first.lineno + 1 if docstring else 0)


def test_links_in_the_docs_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page} -> {target}"


def test_paths_that_the_docs_name_exist() -> None:
    """Of the names in back-ticks: those that begin with a folder of this repository and have a suffix."""
    folders = "eloftr_ops|kernels|tests|benchmarks|docs|eloftr_kernels"
    path = re.compile(rf"`((?:{folders})/[\w./-]+\.(?:py|md|json|yaml|toml|safetensors))(?:::\w+)?`")
    missing = []
    for page in PAGES:
        for name in path.findall(page.read_text()):
            places = (ROOT / name, ROOT / "kernels" / name, page.parent / name)
            if not any(place.exists() for place in places):
                missing.append(f"{page.relative_to(ROOT)}: {name}")
    assert not missing, "\n".join(missing)
