# SPDX-License-Identifier: Apache-2.0
"""Every Python block of the README and of the docs runs, and prints what the page says.

The blocks of a page share their names, in order. What they take for granted (files, tensors, downloads) is set up by
the page's function in `support.documentation`.
"""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from support.documentation import SET_UP

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in [ROOT / "README.md", ROOT / "kernels" / "README.md", *(ROOT / "docs").rglob("*.md")]
    if BLOCK.search(page.read_text())
)


@pytest.mark.parametrize("page", PAGES)
def test_the_python_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = SET_UP[page](tmp_path, monkeypatch) if page in SET_UP else {}
    for number, found in enumerate(BLOCK.finditer((ROOT / page).read_text()), 1):
        code, expected = found.groups()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{page}, block {number}", "exec"), names)
        if expected is not None:
            _compare(printed.getvalue(), expected)


def _compare(printed: str, expected: str) -> None:
    """The same words, and numbers within 5 % or 0.05: machines differ in the few matches at the threshold."""
    assert _words(printed) == _words(expected)
    values, claimed = ([float(n.replace(",", "")) for n in NUMBER.findall(text)] for text in (printed, expected))
    assert values == pytest.approx(claimed, rel=0.05, abs=0.05)


def _words(text: str) -> list[str]:
    return NUMBER.sub("#", text).split()


def test_every_set_up_belongs_to_a_page() -> None:
    assert set(SET_UP) <= set(PAGES)
