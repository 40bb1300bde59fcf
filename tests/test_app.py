# SPDX-License-Identifier: Apache-2.0
"""The page behind ``eloftr-ops app``: its functions without Gradio, and the page itself where Gradio is installed."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from eloftr_ops import EfficientLoFTR, __version__, app, matching
from eloftr_ops.errors import FileError
from eloftr_ops.image_matches import ImageMatches
from eloftr_ops.images import load_image
from eloftr_ops.io import demo_pair
from support.browser import chromium
from support.models import put_for_pretrained

MOVED = (9.0, -4.0)  # image 0 -> image 1, pixels of the original images


def matches_of_a_shift(count: int = 60) -> ImageMatches:
    """Matches of a noise image, twice reduced, and its shift; their confidences are 0.00, 0.01, ..."""
    generator = np.random.default_rng(0)
    wide = np.kron(generator.random((40, 50)), np.ones((4, 4))).astype(np.float32)
    pictures = wide[12:140, 12:172], wide[16:144, 3:163]
    loaded = [load_image("image", np.stack([picture] * 3, 2), resize=80) for picture in pictures]
    points = torch.from_numpy(generator.random((count, 2)).astype(np.float32)) * torch.tensor([60.0, 50.0]) + 8

    def matcher(_: dict[str, Any]) -> dict[str, torch.Tensor]:
        other = points + torch.tensor(MOVED) / 2
        return {"keypoints0": points, "keypoints1": other, "confidence": torch.arange(count) / 100}

    return matching.match_loaded(matcher, *loaded)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """Two files that show the same part of the bundled pair."""
    views = demo_pair()
    for name, view, top, left in (("a.png", views.image0, 60, 320), ("b.png", views.image1, 30, 160)):
        part = view[0, 0, top : top + 160, left : left + 160]
        Image.fromarray((part * 255).byte().numpy()).save(tmp_path / name)
    return str(tmp_path / "a.png"), str(tmp_path / "b.png")


def test_slider_chooses_among_kept_matches(tmp_path: Path) -> None:
    matches = matches_of_a_shift()
    seen = app.view(matches, 0.2, "homography", tmp_path)
    assert len(app.at_least(matches, 0.2)) == 40  # 0.20 to 0.59
    assert "40 matches; homography: 40 inliers (100%)" in seen.words
    assert seen.words.startswith("**Related**: ")
    assert [path.name for path in seen.files] == ["matches.npz", "matches.json", "matches.csv"]
    stored = json.loads(seen.files[1].read_text())
    assert len(stored["confidence"]) == 40
    np.testing.assert_allclose(stored["H_0to1"], [[1, 0, MOVED[0]], [0, 1, MOVED[1]], [0, 0, 1]], atol=1e-3)
    assert len(seen.files[2].read_text().splitlines()) == 41
    assert "without-slider" in seen.page
    assert len(matches) == 60  # the kept ones are as before


def test_overlay_lays_the_images_on_each_other() -> None:
    matches = matches_of_a_shift()
    mixed = app.overlay(matches)
    assert mixed is not None
    below = np.asarray(matches.image1.color)
    assert mixed.shape == below.shape
    # 9 and 4 pixels of the originals are 4.5 and 2 of those shown: compare where both images are, far from borders.
    inner = (slice(4, 50), slice(8, 70))
    assert np.abs(mixed[inner].astype(float) - below[inner]).mean() < 4  # of 255: the halves agree
    wrong = app.overlay(app.dataclasses.replace(matches, image0=matches.image0._replace(color=255 - below)))
    assert wrong is not None
    assert np.abs(wrong[inner].astype(float) - below[inner]).mean() > 20  # it can fail


def test_no_match_is_said(tmp_path: Path) -> None:
    seen = app.view(matches_of_a_shift(), 0.99, "fundamental", tmp_path)
    assert seen.words.startswith("**No match** with this confidence.")
    assert seen.overlay is None
    assert len(seen.files[2].read_text().splitlines()) == 1


def test_matcher_reports_less_confident_matches_than_its_own_threshold(pair: tuple[str, str]) -> None:
    matcher = app.PairMatcher()
    assert matcher.threshold == pytest.approx(0.2)
    assert matcher.limits == (0.05, 1.0)
    found = matcher.match(*pair, resize=160)
    plain = matching.match_images(*pair, resize=160)
    assert len(found) > len(plain)
    kept = app.at_least(found, matcher.threshold)
    torch.testing.assert_close(kept.keypoints0, plain.keypoints0)


def test_mistakes_are_in_words_without_folders(tmp_path: Path, pair: tuple[str, str], monkeypatch: Any) -> None:
    put_for_pretrained(monkeypatch, EfficientLoFTR, EfficientLoFTR.from_pretrained("small").config)
    matcher = app.PairMatcher()
    with pytest.raises(FileError, match="Give two images"):
        matcher.match(pair[0], None)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(FileError, match=r"^broken\.png: not an image of a known format"):
        matcher.match(pair[0], str(broken))
    small = tmp_path / "small.png"
    Image.new("L", (20, 20)).save(small)
    with pytest.raises(FileError, match=r"^small\.png: 20x20 pixels, expected at least 32"):
        matcher.match(str(small), pair[1])


def test_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileError, match="expected an address that begins with http"):
        app.fetch("photo.jpg", tmp_path, public=False)
    (tmp_path / "source.png").write_bytes(b"")
    Image.new("L", (40, 40), 9).save(tmp_path / "source.png")
    asked = []

    def download(url: str, **limits: int) -> bytes:
        asked.append((url, limits))
        return (tmp_path / "source.png").read_bytes() if url.endswith("png") else b"<html>"

    monkeypatch.setattr(app, "download", download)
    path = app.fetch(" http://127.0.0.1/x/photo.png ", tmp_path, public=False)
    assert path.name == "photo.png"
    assert asked == [("http://127.0.0.1/x/photo.png", {"max_bytes": 20 * 2**20})]
    with pytest.raises(FileError, match="page: not an image of a known format"):
        app.fetch("http://127.0.0.1/page", tmp_path, public=False)


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.7", "169.254.169.254", "::1", "192.168.1.1"])
def test_a_public_page_reads_nothing_inside_its_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(None, None, None, "", (address, 0))])
    with pytest.raises(FileError, match="an address inside this server's network"):
        app.fetch("http://metadata.example/image.png", tmp_path, public=True)


def test_missing_gradio_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from eloftr_ops.cli import app as command

    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(command, ["app", "--port", "7999"])
    assert result.exit_code == 2
    assert "pip install 'eloftr-ops[app]'" in result.output


@contextlib.contextmanager
def served(folder: Path) -> Iterator[int]:
    """A web server of a folder; its port."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.slow
def test_page_in_a_browser(pair: tuple[str, str], tmp_path: Path) -> None:
    """A file and a link in, matches out; the slider, a download, a broken file."""
    try:
        app.require_gradio()
    except ImportError as error:
        pytest.skip(str(error))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with chromium() as browser, served(tmp_path) as files:
        page = app.serve(block=False)
        try:
            tab = browser.new_page(viewport={"width": 1200, "height": 1600})
            tab.set_default_timeout(120_000)
            asked: list[str] = []
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(page.local_url)
            tab.set_input_files("#image0 input[type=file]", pair[0])
            tab.fill("#link1 input, #link1 textarea", f"http://127.0.0.1:{files}/b.png")
            tab.press("#link1 input, #link1 textarea", "Enter")
            for side in (0, 1):
                tab.wait_for_selector(f"#image{side} img")
            tab.click("#run")
            before = tab.frame_locator("#lines iframe").locator("#counts").inner_text().split(" of ")[0]
            assert tab.inner_text("#words").startswith("Related: ")
            assert f"{before} matches" in tab.inner_text("#words")
            tab.wait_for_selector("#overlay img")
            tab.fill("#least input[type=number]", "0.9")
            tab.press("#least input[type=number]", "Enter")
            changed = "old => !document.querySelector('#words').innerText.includes(old + ' matches')"
            tab.wait_for_function(changed, arg=before)
            with tab.expect_download() as download:
                tab.click("#save-csv")
            rows = Path(download.value.path()).read_text().splitlines()
            assert f"{len(rows) - 1} matches" in tab.inner_text("#words")
            assert min(float(row.split(",")[4]) for row in rows[1:]) >= 0.9
            tab.click("#image1 button[aria-label='Remove Image'], #image1 button[aria-label='Clear']")
            tab.set_input_files("#image1 input[type=file]", str(broken))
            tab.wait_for_timeout(500)
            tab.click("#run")
            tab.wait_for_selector("text=broken.png: not an image of a known format")
            assert all("127.0.0.1" in url or url.startswith(("data:", "blob:")) for url in asked)
        finally:
            page.close()


def test_space_names_the_wheel_of_this_version() -> None:
    space = Path(__file__).parents[1] / "docs" / "space"
    assert (space / "requirements.txt").read_text() == f"./eloftr_ops-{__version__}-py3-none-any.whl\n"
    header = (space / "README.md").read_text().split("---\n")[1]
    assert "sdk: gradio\n" in header
    assert "app_file: app.py\n" in header
    assert "from eloftr_ops.app import serve" in (space / "app.py").read_text()
