# SPDX-License-Identifier: Apache-2.0
"""Writes EfficientLoFTR as a patch for kornia: PyTorch only, one folder and its tests.

    python eloftr_ops/integrations/kornia/build.py OUT

OUT/kornia/feature/efficient_loftr holds the model of this project with the PyTorch form of its ops, and
OUT/tests/feature/test_efficient_loftr.py its tests, both to be copied over a clone of kornia. Nothing is written twice:
the files come from the sources, with imports made relative. What kornia has no place for is left out: Triton kernels,
engines for inference, the loaders of other weights, matches that are drawn at random.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FOLDER = "kornia/feature/efficient_loftr"
_OPS = ("aggregated_attention", "dual_softmax", "upsample_mlp", "window_match")
# Files of the patch, and where they come from.
SOURCES = {
    **{f"{name}.py": f"eloftr_ops/{name}.py" for name in ("config", "types", "checks")},
    **{
        f"{name}.py": f"eloftr_ops/model/{name}.py"
        for name in ("backbone", "transformer", "coarse", "covariance", "fine", "matcher")
    },
    "ops/arithmetic.py": "kernels/eloftr_kernels/arithmetic.py",
    **{f"ops/{op}/{name}.py": f"kernels/eloftr_kernels/{op}/{name}.py" for op in _OPS for name in ("naive", "cpu")},
    "ops/window_match/moments.py": "kernels/eloftr_kernels/window_match/moments.py",
}
TEMPLATES = {
    "__init__.py": "package.py.in",
    "ops/__init__.py": "ops.py.in",
    **{f"ops/{op}/__init__.py": "empty.py.in" for op in _OPS},
}
_CONSTRUCTOR = """\
        config: EfficientLoFTRConfig | None = None,
        *,
        fused: bool = False,
        pretrained: str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # LoFTR's own constructor would build LoFTR's layers
        config = config or EfficientLoFTRConfig()
        if not isinstance(config, EfficientLoFTRConfig):
            raise TypeError(f"config: expected an EfficientLoFTRConfig, got {type(config).__name__}.")
        self.backbone: RepVGG = RepVGG(config, fused=fused)  # type: ignore[assignment]
        self.transformer = CoarseTransformer(config)
        self.pyramid = FeaturePyramid(config)
        self._config = config
        if pretrained is not None:
            self.load_state_dict(torch.load(pretrained, map_location="cpu", weights_only=True))
            self.eval()

"""
# Methods that need what kornia has no place for, and what the matcher imports for them alone.
_LEFT_OUT = ("optimize_for_inference", "from_pretrained", "save_pretrained", "sample_matches")
_UNUSED = (
    r"_KORNIA_NAMES = .*\n",
    r"import os\n",
    r"(?<=GradientMode), WeightLayout",
    r"(?<=match_cells), score_cells",
    r"from eloftr_ops\.model\.sampling import .*\n",
    r"    (?:SampledMatches|SampledPixels),\n",
)
_KORNIA = "from kornia.feature import LoFTR\n"
_ARGUMENTS = """        config: architecture and matching parameters; the authors' model by default.
        fused: build the backbone with re-parameterised blocks (inference form).
        pretrained: file with a state dict; the matcher is then in evaluation mode.

    Raises:
        TypeError: ``config`` is no configuration.
"""
_DISPATCH = '''# SPDX-License-Identifier: Apache-2.0
"""Where an op works piece by piece, and in which dtype."""

from __future__ import annotations

import torch
from torch import Tensor'''
_STAGE = re.compile(r"^ *@stage\n|^from .* import stage\n", re.MULTILINE)
_IMPORT = re.compile(r"^(\s*)from (eloftr_ops|eloftr_kernels)(\.[\w.]+)? import ", re.MULTILINE)
_LEFT = re.compile(r"^.*\beloftr_(?:ops|kernels)\b.*$", re.MULTILINE)


def build(out: Path) -> list[Path]:
    """Write the patch into an empty or a new folder; the files written.

    Raises:
        FileExistsError: the folder is not empty.
        FileNotFoundError: not run in a clone of the repository.
        ValueError: a source names something that the patch does not have.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out}: expected an empty folder or a new one. Remove it, or name another.")
    if not (ROOT / "kernels").is_dir():
        raise FileNotFoundError("The patch is made from the sources. Run this in a clone of the repository.")
    texts = {name: (ROOT / source).read_text() for name, source in SOURCES.items()}
    # Nothing replaces a stage there.
    texts = {name: _STAGE.sub("", text) for name, text in texts.items()}
    texts["ops/dispatch.py"] = _used_of(ROOT / "kernels" / "eloftr_kernels" / "dispatch.py", texts)
    texts["matcher.py"] = _plain_module(texts["matcher.py"])
    texts |= {name: (HERE / "templates" / source).read_text() for name, source in TEMPLATES.items()}
    texts = {name: relative(text, name) for name, text in texts.items()}
    check_imports(texts)
    written = [_write(out / FOLDER / name, text) for name, text in texts.items()]
    tests = (HERE / "templates" / "tests.py.in").read_text()
    written.append(_write(out / "tests" / "feature" / "test_efficient_loftr.py", tests))
    shutil.copy(HERE / "README.md", out / "README.md")
    return written


def relative(text: str, name: str) -> str:
    """A file of the patch, with imports of its own files.

    Raises:
        ValueError: an import of a file that the patch does not have.
    """
    here = name.split("/")[:-1]

    def change(match: re.Match[str]) -> str:
        indent, package, rest = match.groups()
        parts = (rest or "")[1:].split(".") if rest else []
        parts = parts[1:] if package == "eloftr_ops" and parts[:1] == ["model"] else parts
        parts = ["ops", *parts] if package == "eloftr_kernels" else parts
        common = 0
        while common < len(here) and common < len(parts) and here[common] == parts[common]:
            common += 1
        return f"{indent}from {'.' * (len(here) - common + 1)}{'.'.join(parts[common:])} import "

    changed = _IMPORT.sub(change, text)
    left = [line for line in _LEFT.findall(changed) if "import" in line]
    if left:
        raise ValueError(f"{name}: the patch has no file for {left[0].strip()!r}.")
    # In docstrings the names are kornia's.
    return changed.replace("eloftr_kernels", "ops").replace("eloftr_ops.model.", "").replace("eloftr_ops", "kornia")


def check_imports(texts: dict[str, str]) -> None:
    """Raises ValueError where a file of the patch imports one that the patch does not have."""
    for name, text in texts.items():
        for dots, rest in re.findall(r"^\s*from (\.+)([\w.]*) import ", text, re.MULTILINE):
            here = name.split("/")[:-1]
            place = "/".join([*here[: len(here) - len(dots) + 1], *filter(None, rest.split("."))])
            if not {f"{place}.py", f"{place}/__init__.py".lstrip("/")} & set(texts):
                raise ValueError(f"{name}: the patch has no file {place}.py. Add it to SOURCES, or leave out its use.")


def _plain_module(text: str) -> str:
    """The matcher without what needs the rest of this project: its other engine, and its loaders of weights."""
    for name in _LEFT_OUT:
        method = rf"(?:    @classmethod\n)?    def {name}\(.*?(?=\n    (?:@|def ))"
        text, count = re.subn(method, "", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"matcher.py: expected one method {name}, found {count}.")
    start = text.index("        config: EfficientLoFTRConfig | str | None = None,")
    end = text.index("    @property  # type: ignore[override]\n    def config")
    text = text[:start] + _CONSTRUCTOR + text[end:]
    start = text.index("        config: architecture and matching parameters; the authors' model by default.")
    end = text.index('    """', start)
    text = text[:start] + _ARGUMENTS + text[end:]
    text = text.replace(_KORNIA, "from kornia.feature.loftr.loftr import LoFTR\n")
    for unused in _UNUSED:
        text = re.sub(unused, "", text)
    return text


def _used_of(source: Path, texts: dict[str, str]) -> str:
    """A file with what other files of the patch use of it, and what that uses in turn."""
    tree = ast.parse(source.read_text())
    named = {name: node for node in tree.body for name in _names(node)}
    asked = _asked(texts)
    wanted = [name for name in named if name in asked]
    for name in wanted:
        used = {node.id for node in ast.walk(named[name]) if isinstance(node, ast.Name)}
        wanted += [other for other in named if other in used and other not in wanted]
    parts = [ast.get_source_segment(source.read_text(), node) or "" for name, node in named.items() if name in wanted]
    return "\n\n\n".join([_DISPATCH, *parts]) + "\n"


def _asked(texts: dict[str, str]) -> set[str]:
    """The names of ``dispatch`` that the files import or read."""
    nodes = [node for text in texts.values() for node in ast.walk(ast.parse(text))]
    imported = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "eloftr_kernels.dispatch"]
    read = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    return {alias.name for node in imported for alias in node.names} | {
        node.attr for node in read if isinstance(node.value, ast.Name) and node.value.id == "dispatch"
    }


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write EfficientLoFTR as a patch for kornia.")
    parser.add_argument("out", type=Path, help="an empty or a new folder")
    try:
        written = build(parser.parse_args().out)
    except (OSError, ValueError) as error:
        parser.exit(2, f"Error: {error}\n")
    print(f"written: {len(written)} files")


if __name__ == "__main__":
    main()
