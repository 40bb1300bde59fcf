# SPDX-License-Identifier: Apache-2.0
"""Writes the kernel package of the Hugging Face Hub from the sources in this folder.

    python kernels/hub/build.py OUT [--repo-id organisation/eloftr-kernels]

OUT is what ``kernel-builder`` takes: ``build.toml``, ``flake.nix``, ``CARD.md``, ``torch-ext/eloftr_kernels``,
``benchmarks`` and ``tests``. It also holds ``build``, one folder per backend, so that the ``kernels`` library loads it
without a build: all is Python, and Triton compiles on the machine that runs it.

The Hub's rules: imports inside the package are relative, and each build registers its ops in a namespace of its own, so
that two versions live in one process. Both are edits of text: the sources are written for them.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE.parent / "eloftr_kernels"
PACKAGE = "eloftr_kernels"
NAME = "eloftr-kernels"
REPO_ID = "eloftr-ops/eloftr-kernels"
VERSION = 0  # of the interface; the Hub keeps 0 for what may still change
BACKENDS = ("cpu", "cuda", "rocm")
NAMESPACE = re.compile(r'@operator\("eloftr::(\w+)"')
ABSOLUTE = re.compile(rf"^(\s*)from {PACKAGE}(\.[\w.]+)? import ", re.MULTILINE)
_REST = re.compile(rf"^\s*(?:import {PACKAGE}|from {PACKAGE})\b", re.MULTILINE)
_OPS = '''"""Written by the build: the namespace of this build's ops."""

import torch

ops = getattr(torch.ops, "{id}")


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an op of this build."""
    return f"{id}::{{op_name}}"
'''
_COMPATIBILITY = '''"""For older versions of kernels, which look for the package here."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parent.parent / "__init__.py"
_name = "{id}_compatibility"
_spec = importlib.util.spec_from_file_location(_name, _path)
_module = importlib.util.module_from_spec(_spec)
sys.modules[_name] = _module
_spec.loader.exec_module(_module)
globals().update({{name: getattr(_module, name) for name in _module.__all__}})
'''


def relative(text: str, depth: int) -> str:
    """A source file with imports relative to the package, of which it is ``depth`` folders deep.

    Raises:
        ValueError: an absolute import is left.
    """
    dots = "." * (depth + 1)

    def change(match: re.Match[str]) -> str:
        indent, rest = match.groups()
        return f"{indent}from {dots}{(rest or '')[1:]} import "

    changed = ABSOLUTE.sub(change, text)
    left = _REST.search(changed)
    if left:
        raise ValueError(f"{left[0].strip()}: write it as `from {PACKAGE}... import ...`, which can be made relative.")
    return changed


def own_namespace(text: str, depth: int) -> str:
    """A source file whose ops are registered under the name that the build gives."""
    changed, count = NAMESPACE.subn(r'@operator(add_op_namespace_prefix("\1")', text)
    if '"eloftr::' in changed:
        raise ValueError('"eloftr::": ops are registered by @operator("eloftr::name", ...) only.')
    if not count:
        return text
    dots = "." * (depth + 1)
    after = "from torch import Tensor\n"
    if after not in changed:
        raise ValueError(f"expected the line {after.strip()!r}, after which the namespace is imported.")
    return changed.replace(after, f"{after}\nfrom {dots}_ops import add_op_namespace_prefix", 1)


def package_files() -> dict[str, str]:
    """The files of the package, by their path in it."""
    files = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE)
        depth = len(name.parts) - 1
        files[name.as_posix()] = relative(own_namespace(path.read_text(), depth), depth)
    for path in sorted(SOURCE.rglob("*.json")):
        files[path.relative_to(SOURCE).as_posix()] = path.read_text()
    files["layers.py"] = relative((HERE / "layers.py").read_text(), 0)
    start = files["__init__.py"]
    files["__init__.py"] = start.replace("__all__ = [", 'from . import layers\n\n__all__ = [\n    "layers",', 1)
    return files


def write_package(folder: Path, repo_id: str = REPO_ID) -> None:
    """Write the package into an empty or a new folder.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: a source file that the Hub's rules do not allow.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: expected an empty folder or a new one. Remove it, or name another.")
    files = package_files()
    _write(folder / "torch-ext" / PACKAGE, files)
    functions = "\n".join(f"- `{name}`" for name in _functions(files["__init__.py"]))
    for name in ("build.toml", "flake.nix", "CARD.md"):
        text = (HERE / name).read_text().replace("@REPO_ID@", repo_id).replace("@FUNCTIONS@", functions)
        _write(folder, {name: text})
    _write(folder / "benchmarks", {"benchmark.py": (HERE / "benchmark.py").read_text()})
    _write(folder / "tests", {"__init__.py": "", "test_package.py": (HERE / "test_package.py").read_text()})
    shutil.copy(HERE.parent / "LICENSE", folder / "LICENSE")
    for backend in BACKENDS:
        _write_variant(folder / "build" / f"torch-{backend}", files, backend)


def _write_variant(folder: Path, files: dict[str, str], backend: str) -> None:
    """What the ``kernels`` library loads for one backend."""
    source = "".join(f"{name}\0{text}\0" for name, text in sorted(files.items()))
    # Of the sources, not of the version: two builds with one number may differ.
    identity = f"_{PACKAGE}_{backend}_{hashlib.sha256(source.encode()).hexdigest()[:10]}"
    built = {
        **files,
        "_ops.py": _OPS.format(id=identity),
        f"{PACKAGE}/__init__.py": _COMPATIBILITY.format(id=identity),
    }
    _write(folder, built)
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in sorted(built.items())
    }
    metadata = {
        "name": NAME,
        "id": identity,
        "version": VERSION,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    _write(folder, {"metadata.json": json.dumps(metadata, indent=2) + "\n"})


def _functions(start: str) -> list[str]:
    """The public functions of the package, of its ``__all__``."""
    listed = re.search(r"__all__ = \[(.*?)\]", start, re.DOTALL)
    names = re.findall(r'"(\w+)"', listed[1]) if listed else []
    return [name for name in names if name[0].islower() and name != "layers"]


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the kernel package of the Hugging Face Hub.")
    parser.add_argument("out", type=Path, help="an empty or a new folder")
    parser.add_argument("--repo-id", default=REPO_ID, help=f"repository on the Hub; default {REPO_ID}")
    arguments = parser.parse_args()
    try:
        write_package(arguments.out, arguments.repo_id)
    except (OSError, ValueError) as error:
        parser.exit(2, f"Error: {error}\n")
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
