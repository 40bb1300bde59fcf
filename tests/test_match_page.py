# SPDX-License-Identifier: Apache-2.0
"""The page of matches: what a browser shows, and that it needs nothing but itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eloftr_ops import matching
from eloftr_ops.errors import ArgumentError
from eloftr_ops.images import load_image
from eloftr_ops.io import FileError
from eloftr_ops.visualization import MatchPage, draw_matches
from support.browser import chromium

POINTS0 = np.array([[10.5, 20.5], [30.25, 40.0], [50.0, 12.0], [22.0, 33.0]])
POINTS1 = np.array([[5.5, 6.5], [20.125, 25.0], [33.0, 8.0], [11.0, 17.0]])
CONFIDENCE = np.array([0.25, 0.5, 0.75, 1.0])
INLIERS = np.array([True, True, False, True])
# Gray, so that any colour on the page is a line's.
IMAGE0, IMAGE1 = np.full((48, 64), 0.5), np.full((32, 40), 0.5)


def page_of(tmp_path: Path, name: str = "page.html", **options: Any) -> Path:
    arguments: dict[str, Any] = {"confidence": CONFIDENCE, "inliers": INLIERS, **options}
    draw_matches(IMAGE0, IMAGE1, POINTS0, POINTS1, path=tmp_path / name, backend="html", **arguments)
    return tmp_path / name


def data_of(page: MatchPage) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.html, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


class Shown:
    """A page in the browser, asked as a person would ask it."""

    def __init__(self, tab: Any) -> None:
        self.tab = tab
        self.wrong: list[str] = []
        self.asked: list[str] = []
        tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        tab.on("console", lambda line: self.wrong.append(line.text) if line.type == "error" else None)
        tab.on("request", lambda request: self.asked.append(request.url))

    def open(self, path: Path) -> Shown:
        self.tab.goto(path.as_uri())
        self.tab.wait_for_selector("#view[data-view]")
        return self

    def view(self) -> tuple[float, float, float]:
        self.tab.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        scale, left, top = json.loads(self.tab.get_attribute("#view", "data-view"))
        return scale, left, top

    def place(self, side: int, point: Any) -> tuple[float, float]:
        """Where a point of an image is in the window; image 1 is at the right, both are centred in height."""
        scale, left, top = self.view()
        box = self.tab.locator("#view").bounding_box()
        corner = (0.0, 0.0) if side == 0 else (104 * 1.012 - 40, 8.0)
        return tuple(
            box[axis] + start + (value + shift) * scale
            for axis, start, value, shift in zip("xy", (left, top), point, corner, strict=True)
        )  # type: ignore[return-value]

    def hover(self, x: float, y: float) -> str:
        self.tab.mouse.move(x, y)
        box = self.tab.locator("#match")
        return box.text_content() if box.is_visible() else ""

    def color(self, x: float, y: float) -> tuple[int, int, int]:
        """The pixel of the canvas there."""
        box = self.tab.locator("#view").bounding_box()
        code = "([x, y]) => Array.from(document.getElementById('view').getContext('2d').getImageData(x, y, 1, 1).data)"
        red, green, blue, _ = self.tab.evaluate(code, [round(x - box["x"]), round(y - box["y"])])
        return red, green, blue

    def counts(self) -> str:
        text: str = self.tab.text_content("#counts")
        return text


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def shown(browser: Any) -> Iterator[Shown]:
    tab = browser.new_page(viewport={"width": 900, "height": 500})
    seen = Shown(tab)
    yield seen
    tab.close()
    assert seen.wrong == []
    assert all(url.startswith(("file:", "data:")) for url in seen.asked)


def test_pointer_shows_the_match_under_it(shown: Shown, tmp_path: Path) -> None:
    shown.open(page_of(tmp_path, size0_wh=(128, 96), size1_wh=(40, 32)))
    # Image 0 was twice as large: its coordinates are those of the original.
    assert shown.hover(*shown.place(0, POINTS0[1])) == (
        "match 1\nimage 0  (60.50, 80.00)\nimage 1  (20.13, 25.00)\nconfidence 0.500\ninlier"
    )
    assert shown.hover(*shown.place(1, POINTS1[2])).endswith("confidence 0.750\noutlier")
    first, second = shown.place(0, POINTS0[0]), shown.place(1, POINTS1[0])
    middle = ((first[0] + second[0]) / 2, (first[1] + second[1]) / 2)
    assert shown.hover(*middle).startswith("match 0\n")  # on the line, far from its ends
    assert shown.hover(first[0] - 40, first[1] - 40) == ""


def test_slider_and_box_choose_the_lines(shown: Shown, tmp_path: Path) -> None:
    shown.open(page_of(tmp_path))
    assert shown.counts() == "4 of 4 matches · 3 inliers · 4 drawn"
    shown.tab.fill("#threshold", "0.5")
    assert shown.counts() == "3 of 4 matches · 2 inliers · 3 drawn"
    assert shown.hover(*shown.place(0, POINTS0[0])) == ""  # its confidence is 0.25
    shown.tab.uncheck("#outliers")
    assert shown.counts() == "2 of 4 matches · 2 inliers · 2 drawn"
    shown.tab.fill("#threshold", "0")
    shown.tab.check("#outliers")
    assert shown.counts() == "4 of 4 matches · 3 inliers · 4 drawn"


def test_lines_have_the_colour_of_their_confidence(shown: Shown, tmp_path: Path) -> None:
    shown.open(page_of(tmp_path))
    low, high, bad = (shown.color(*shown.place(0, POINTS0[k])) for k in (0, 3, 2))
    assert high[0] > high[2] + 100  # viridis ends yellow
    assert high[1] > high[2] + 100
    assert low[2] > low[0] + 20  # and begins blue
    assert bad[0] > max(bad[1:]) + 40  # outliers are red
    shown.tab.fill("#threshold", "1")
    red, green, blue = shown.color(*shown.place(0, POINTS0[0]))
    assert max(red, green, blue) - min(red, green, blue) <= 4  # gray again: no line


def test_wheel_zooms_at_the_pointer_and_a_drag_moves(shown: Shown, tmp_path: Path) -> None:
    shown.open(page_of(tmp_path))
    scale, *_ = fitted = shown.view()
    here = shown.place(0, POINTS0[3])
    shown.tab.mouse.move(*here)
    shown.tab.mouse.wheel(0, -500)
    shown.tab.wait_for_function(f"() => JSON.parse(document.getElementById('view').dataset.view)[0] > {scale * 1.5}")
    # Browsers round the pointer to whole pixels, here by half a pixel at most; twice as large, that is one.
    zoomed = shown.place(0, POINTS0[3])
    assert zoomed == pytest.approx(here, abs=0.6)
    shown.tab.mouse.down()
    shown.tab.mouse.move(here[0] + 30, here[1] - 20)
    shown.tab.mouse.up()
    assert shown.place(0, POINTS0[3]) == pytest.approx((zoomed[0] + 30, zoomed[1] - 20), abs=0.01)
    assert shown.hover(here[0] + 30, here[1] - 20).startswith("match 3\n")
    shown.tab.click("#fit")
    assert shown.view() == pytest.approx(fitted)


def test_many_matches_are_thinned_out_at_first(shown: Shown, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    points, scores = generator.random((1000, 2)) * 30, generator.random(1000)
    draw_matches(IMAGE0, IMAGE1, points, points, scores, backend="html", path=tmp_path / "page.html")
    shown.open(tmp_path / "page.html")
    assert shown.counts() == "1,000 of 1,000 matches · 200 drawn"
    shown.tab.select_option("#lines", "all")
    assert shown.counts() == "1,000 of 1,000 matches · 1,000 drawn"


def test_no_match_and_no_confidence(shown: Shown, tmp_path: Path) -> None:
    none = np.zeros((0, 2))
    draw_matches(IMAGE0, IMAGE1, none, none, backend="html", path=tmp_path / "page.html")
    shown.open(tmp_path / "page.html")
    assert shown.counts() == "0 of 0 matches · 0 drawn"
    assert not shown.tab.is_visible("#threshold")


def test_page_holds_all_it_needs() -> None:
    page = draw_matches(IMAGE0, IMAGE1, POINTS0, POINTS1, CONFIDENCE, max_matches=1, backend="html")
    assert "http" not in page.html.replace("http-equiv", "")
    data = data_of(page)
    assert data["points"] == [
        POINTS0[:, 0].tolist(),
        POINTS0[:, 1].tolist(),
        POINTS1[:, 0].tolist(),
        POINTS1[:, 1].tolist(),
    ]
    assert data["confidence"] == CONFIDENCE.tolist()
    assert data["inlier"] is None
    assert page._repr_html_().startswith('<iframe srcdoc="&lt;!doctype html')


def test_scores_that_are_no_numbers_are_no_script() -> None:
    scores = torch.tensor([float("nan"), float("inf"), 2.0, 5.0])
    data = data_of(draw_matches(IMAGE0, IMAGE1, POINTS0, POINTS1, scores, backend="html"))
    assert data["confidence"] == [None, None, 2.0, 5.0]
    assert data["limits"] == [2.0, 5.0]


def test_suffix_chooses_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).random((64, 96)).astype(np.float32)
    loaded = load_image("image", image, resize=48)

    def matcher(_: dict[str, Any]) -> dict[str, torch.Tensor]:
        points = torch.tensor([[12.0, 8.0]])
        return {"keypoints0": points, "keypoints1": points, "confidence": torch.ones(1)}

    matches = matching.match_loaded(matcher, loaded, loaded)
    page = matches.plot(tmp_path / "page.html")
    assert isinstance(page, MatchPage)
    assert (tmp_path / "page.html").read_text() == page.html
    assert [image["scale"] for image in data_of(page)["images"]] == [[2.0, 2.0]] * 2
    matches.save(tmp_path / "other.HTM")
    assert (tmp_path / "other.HTM").read_text().startswith("<!doctype html>")


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    arguments = (IMAGE0, IMAGE1, POINTS0, POINTS1)
    with pytest.raises(ArgumentError, match="backend: expected matplotlib or html, got 'svg'"):
        draw_matches(*arguments, backend="svg")  # type: ignore[call-overload]
    with pytest.raises(ArgumentError, match="ax: expected None"):
        draw_matches(*arguments, backend="html", ax=object())  # type: ignore[call-overload]
    with pytest.raises(ArgumentError, match=r"size1_wh: expected a positive \(width, height\)"):
        draw_matches(*arguments, backend="html", size1_wh=(0, 4))
    with pytest.raises(FileError, match=r"expected a name that ends in \.html, \.htm, got \.png"):
        draw_matches(*arguments, backend="html", path=tmp_path / "page.png")
    with pytest.raises(FileError, match=r"got \.html"):
        draw_matches(*arguments, path=tmp_path / "page.html")
