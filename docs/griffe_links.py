# SPDX-License-Identifier: Apache-2.0
"""What mkdocstrings needs to show this project's docstrings well.

- Names in docstrings become links: Sphinx roles (:func:`x`), and names in back-ticks that the API pages explain.
- Comments behind the fields of a tuple or a dataclass become their descriptions.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|mod|meth|attr|data|exc):`~?([\w.]+)`")
NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)")


class LinkNames(griffe.Extension):
    """Rewrites docstrings once the packages are loaded, so that names of other files can be found."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Visit each object of a package."""
        self._visit(pkg)

    def _visit(self, item: griffe.Object) -> None:
        if item.docstring is not None:
            if isinstance(item, griffe.Class):
                item.docstring.value += _fields(item)
            for pattern in (ROLE, NAME):
                item.docstring.value = pattern.sub(lambda found: _link(item, found), item.docstring.value)
        for member in item.members.values():
            if isinstance(member, griffe.Object):
                self._visit(member)


def _fields(item: griffe.Class) -> str:
    """An "Attributes" section from the comments behind a class's fields; nothing if the docstring explains them."""
    text = item.docstring.value
    if "Attributes:" in text or "Args:" in text or not isinstance(item.filepath, Path):
        return ""
    lines = item.filepath.read_text().splitlines()
    described = []
    for name, member in item.members.items():
        if isinstance(member, griffe.Attribute) and not name.startswith("_") and member.endlineno:
            comment = lines[member.endlineno - 1].partition("  # ")[2]
            if comment:
                described.append(f"    {name}: {comment}")
    return "\n".join(["", "", "Attributes:", *described]) if described else ""


def _link(item: griffe.Object, found: re.Match[str]) -> str:
    """A link that is dropped without a warning if no page explains the name."""
    name = found.group(1)
    path = _path(item, name)
    if path is None:
        return f"`{name}`"
    # A space inside would end the match of the second pattern, so code is written as HTML.
    return f'<autoref identifier="{path}" optional><code>{name.rpartition(".")[2]}</code></autoref>'


def _path(item: griffe.Object, name: str) -> str | None:
    """The full path of a name as the object's docstring sees it; None for a word that is no name here."""
    scope: griffe.Object | None = item
    while scope is not None:
        if name.partition(".")[0] in scope.members:
            return f"{scope.path}.{name}"
        scope = scope.parent
    return name if name.startswith(("eloftr_ops.", "eloftr_kernels.")) else None
