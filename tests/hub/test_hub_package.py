# SPDX-License-Identifier: Apache-2.0
"""The package of the Hugging Face Hub: built from the sources, loaded from its folder by the ``kernels`` library."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import eloftr_kernels
from eloftr_ops.model.transformer import AggregatedAttention

ROOT = Path(__file__).parents[2]


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hub_build", ROOT / "kernels" / "hub" / "build.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILD = _script()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "package"
    BUILD.write_package(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(package: Path) -> Any:
    library = pytest.importorskip("kernels")
    return library.get_local_kernel(package, backend="cpu")


def features(channels: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(1, 40, channels, generator=generator) for _ in range(2))
    return first.requires_grad_(), second.requires_grad_()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_ops_give_the_same_values_and_gradients(loaded: Any, backend: str) -> None:
    """``triton`` runs in the interpreter, through each file of the op."""
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    results = []
    for module in (loaded, eloftr_kernels):
        inputs = features()
        with module.backend(backend):
            row, column = module.dual_softmax_lse(*inputs, temperature=0.5)
        (row.sum() + 2 * column.sum()).backward()
        results.append((row, column, *(x.grad for x in inputs)))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_ops_have_a_namespace_of_their_own(loaded: Any, package: Path) -> None:
    metadata = json.loads((package / "build" / "torch-cpu" / "metadata.json").read_text())
    assert metadata["id"].startswith("_eloftr_kernels_cpu_")
    own = getattr(torch.ops, metadata["id"])
    for name in ("dual_softmax_lse", "window_match", "upsample_mlp_backward", "aggregated_attention"):
        assert hasattr(own, name)
        assert hasattr(torch.ops.eloftr, name)  # beside those of the installed package
    assert loaded.aggregated_attention is not eloftr_kernels.aggregated_attention
    assert not [name for name in sys.modules if name.startswith(metadata["id"] + ".") and "eloftr_ops" in name]


def test_metadata_are_what_the_library_reads(package: Path) -> None:
    rust = pytest.importorskip("kernels._rust")
    for backend in ("cpu", "cuda", "rocm"):
        folder = package / "build" / f"torch-{backend}"
        metadata = rust.Metadata.read_from_file(folder / "metadata.json")
        assert (metadata.name.python_name, metadata.version) == ("eloftr_kernels", 0)
        files = json.loads((folder / "metadata.json").read_text())["digest"]["files"]
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")} - {"metadata.json"}
        assert set(files) == {name for name in there if "__pycache__" not in name}
        for name, digest in files.items():
            assert base64.b64decode(digest) == hashlib.sha256((folder / name).read_bytes()).digest()


def test_no_import_is_absolute_and_no_name_is_left(package: Path) -> None:
    sources = list((package / "torch-ext" / "eloftr_kernels").rglob("*.py"))
    assert len(sources) > 20
    for path in sources:
        text = path.read_text()
        compile(text, str(path), "exec")
        lines = [line.strip() for line in text.splitlines()]
        assert not [line for line in lines if line.startswith(("from eloftr", "import eloftr"))], path
        assert '"eloftr::' not in text
    for name in (
        "build.toml",
        "flake.nix",
        "CARD.md",
        "LICENSE",
        "benchmarks/benchmark.py",
        "tests/test_package.py",
    ):
        text = (package / name).read_text()
        assert text
        assert "@REPO_ID@" not in text
        assert "@FUNCTIONS@" not in text
    assert "- `dual_softmax_lse`\n" in (package / "CARD.md").read_text()


def test_layer_replaces_the_forward_of_the_models_layer(package: Path) -> None:
    library = pytest.importorskip("kernels")

    class Layer(AggregatedAttention):
        """A class of its own: the library marks it."""

    layer = Layer(32, 2).eval()
    x, source = torch.randn(1, 32, 8, 8), torch.randn(1, 32, 8, 12)
    expected = layer(x, source)
    library.replace_kernel_forward_from_hub(Layer, "AggregatedAttention")
    place = library.LocalLayerRepository(repo_path=package, layer_name="AggregatedAttention")
    with library.use_kernel_mapping({"AggregatedAttention": {"cpu": place}}):
        library.kernelize(layer, mode=library.Mode.INFERENCE, device="cpu")
    assert layer.forward.__func__.__module__.startswith("_eloftr_kernels_cpu_")
    torch.testing.assert_close(layer(x, source), expected, rtol=0, atol=0)


def test_benchmarks_verify_their_results(package: Path) -> None:
    command = pytest.importorskip("kernels.cli.benchmark")
    (kind,) = command.discover_benchmark_classes(package / "benchmarks" / "benchmark.py", package)
    module = sys.modules["benchmark_module"]
    module.CHANNELS, module.ROWS, module.COLUMNS = 32, 8, 12  # type: ignore[attr-defined]
    results, _ = command.run_benchmark_class(kind, 1, 0, str(package), True, "local")
    assert set(results) == {"aggregated_attention", "coarse_layer", "dual_softmax_lse"}
    assert all(timing.verified for timing in results.values())


def test_what_the_hub_does_not_allow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"import eloftr_kernels: write it as"):
        BUILD.relative("import eloftr_kernels.dispatch\n", 0)
    with pytest.raises(ValueError, match=r"ops are registered by @operator"):
        BUILD.own_namespace('torch.library.custom_op("eloftr::mine")\n', 1)
    assert BUILD.relative("    from eloftr_kernels.a.b import c\n", 1) == "    from ..a.b import c\n"
    assert BUILD.relative("from eloftr_kernels import dispatch\n", 1) == "from .. import dispatch\n"
    (tmp_path / "file").touch()
    script = ROOT / "kernels" / "hub" / "build.py"
    ended = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "expected an empty folder or a new one" in ended.stderr
