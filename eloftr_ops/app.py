# SPDX-License-Identifier: Apache-2.0
"""A page in the browser that matches two images (``eloftr-ops app``); runs as a Hugging Face Space, too.

The network runs once for a pair. The slider and the choice of a model work on its matches.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import torch

from eloftr_ops.downloads import download, is_url, refuse_private
from eloftr_ops.errors import ArgumentError, FileError
from eloftr_ops.image_matches import INLIER_THRESHOLD, ImageMatches
from eloftr_ops.images import read_image
from eloftr_ops.io import MATCH_SUFFIXES
from eloftr_ops.matching import DEFAULT_RESIZE, DEFAULT_WEIGHTS, load_matcher, match_images
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.wording import describe_device, describe_inliers, describe_verdict

__all__ = ["MAX_MEBIBYTES", "PairMatcher", "View", "build_app", "serve"]

MAX_MEBIBYTES = 20  # of an uploaded or linked image
SIZES = (320, 480, 640, 960, 1280)  # of the long side, pixels
_LEAST = 0.05  # what the slider starts at: the network reports no less confident matches
_HEIGHT = 460  # of the picture, CSS pixels
_SESSIONS = 100  # whose matches are kept
_SECONDS_KEPT = 3600
_LOCAL = ("127.0.0.1", "localhost", "::1")
_NO_PAIR = "Give two images: drop, paste or link them, or take the example."
_ABOUT = """# EfficientLoFTR: match two images
Drop, paste or link two images of the same scene. Lines join the same points, coloured by confidence. Point at a line to
see its coordinates; the wheel zooms, a drag moves.
"""
_Picture = npt.NDArray[np.uint8]


class Kept(NamedTuple):
    """What the page keeps of a pair."""

    matches: ImageMatches
    folder: tempfile.TemporaryDirectory[str]  # of the files to download; goes away with this tuple


class View(NamedTuple):
    """What the page shows of a pair."""

    page: str  # HTML
    words: str
    overlay: _Picture | None  # (H, W, 3): image 0 warped onto image 1, half and half; None without a homography
    files: list[Path]  # of the matches: .npz, .json, .csv


class PairMatcher:
    """The matcher behind the page.

    Args:
        weights: as `eloftr_ops.match_images`.
        device: likewise.

    Raises:
        ArgumentError: weights or a device that cannot be used.
    """

    def __init__(self, weights: str = DEFAULT_WEIGHTS, device: str = "auto") -> None:
        self._matcher: EfficientLoFTR = load_matcher(weights, device)
        self.threshold = float(self._matcher.config.threshold)
        probabilities = self._matcher.config.score == "dual_softmax"
        self.limits = (min(_LEAST, self.threshold), 1.0) if probabilities else (self.threshold, 4 * self.threshold)
        self._matcher.config = self._matcher.config.replace(threshold=self.limits[0])

    def match(self, path0: str | None, path1: str | None, resize: int = DEFAULT_RESIZE) -> ImageMatches:
        """All matches of two image files that the slider may show.

        Raises:
            FileError: no image, or one that cannot be read; in words for the page, without the server's folders.
        """
        if not path0 or not path1:
            raise FileError(_NO_PAIR)
        try:
            return match_images(path0, path1, weights=self._matcher, resize=resize)
        except (FileError, ArgumentError) as error:
            raise FileError(without_folders(str(error), path0, path1)) from error
        except torch.OutOfMemoryError as error:
            raise FileError("The images are too large for this GPU. Choose a smaller size.") from error


def without_folders(message: str, *paths: str) -> str:
    """A message that names files, without the folders where the server keeps them."""
    for path in paths:
        message = message.replace(path, Path(path).name)
    return message


def at_least(matches: ImageMatches, confidence: float) -> ImageMatches:
    """The matches with at least this confidence."""
    kept = matches.confidence >= confidence
    return dataclasses.replace(
        matches,
        keypoints0=matches.keypoints0[kept],
        keypoints1=matches.keypoints1[kept],
        confidence=matches.confidence[kept],
        _kept={},
    )


def view(matches: ImageMatches, confidence: float, model: str, folder: Path) -> View:
    """What the page shows of the matches with at least this confidence.

    Args:
        matches: of :meth:`PairMatcher.match`.
        confidence: of the slider.
        model: "homography" or "fundamental": whose outliers are red.
        folder: where the files are written.
    """
    shown = at_least(matches, confidence)
    page = shown.plot(backend="html", model=model if len(shown) else None)
    files = [folder / f"matches{suffix}" for suffix in MATCH_SUFFIXES]
    for path in files:
        shown.save(path, model=model)
    return View(page.frame(_HEIGHT, slider=False), _words(shown, model), overlay(shown), files)  # type: ignore[union-attr]


def _words(matches: ImageMatches, model: str) -> str:
    time = f"The network took {matches.seconds:.2f} s ({describe_device(matches.device)})."
    if not len(matches):
        return f"**No match** with this confidence. Move the slider to the left, or try other images. {time}"
    verdict, _, share = describe_verdict(matches).partition(": ")
    count = f"{len(matches):,} match{'es' if len(matches) > 1 else ''}"
    inliers = describe_inliers(matches, model, INLIER_THRESHOLD)
    name = "fundamental matrix" if model == "fundamental" else model
    return f"**{verdict[0].upper()}{verdict[1:]}**: {share}. {count}; {name}: {inliers}. {time}"


def overlay(matches: ImageMatches) -> _Picture | None:
    """Image 0 warped by the homography of the matches, laid over image 1, half and half; both as matched.

    Returns:
        (H, W, 3) of the size of image 1; None where the matches determine no homography.
    """
    import cv2

    matrix = matches.homography().matrix
    if matrix is None:
        return None
    below, above = _colors(matches.image1), _colors(matches.image0)
    # From the original images to those shown; OpenCV's pixel centres are integers.
    up0 = np.diag([*matches.image0.scale_xy, 1.0])
    down1 = np.diag([*(1 / scale for scale in matches.image1.scale_xy), 1.0])
    shift = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    H = np.linalg.inv(shift) @ down1 @ matrix.numpy() @ up0 @ shift
    size = (below.shape[1], below.shape[0])
    warped = cv2.warpPerspective(above, H, size)
    covered = cv2.warpPerspective(np.ones(above.shape[:2], np.float32), H, size)[..., None] / 2
    mixed: _Picture = (below * (1 - covered) + warped * covered + 0.5).astype(np.uint8)
    return mixed


def _colors(image: Any) -> _Picture:
    """(H, W, 3) of a loaded image."""
    if image.color is not None:
        return image.color  # type: ignore[no-any-return]
    gray = (image.image[0, 0].numpy() * 255 + 0.5).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2)


def fetch(url: str, folder: Path, *, public: bool) -> Path:
    """Download the image behind a link.

    Args:
        url: http or https.
        folder: where to put it.
        public: the page serves others: addresses of the server's own network are refused.

    Raises:
        FileError: no link, no image, too large, or a refused address.
    """
    url = url.strip()
    if not is_url(url):
        raise FileError(f"{url or 'The link'}: expected an address that begins with http:// or https://.")
    if public:
        refuse_private(url)
    # A redirect could lead back inside.
    redirects = {"max_redirects": 0} if public else {}
    content = download(url, max_bytes=MAX_MEBIBYTES * 2**20, **redirects)
    path = folder / (Path(urlsplit(url).path).name[-80:] or "image")
    path.write_bytes(content)
    try:
        read_image(path, resize=64)
    except FileError as error:
        raise FileError(without_folders(str(error), str(path))) from error
    return path


def require_gradio() -> Any:
    """The package gradio.

    Raises:
        ImportError: it is missing or too old; the message names the extra.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f"The page needs the package gradio: {error}. {_INSTALL}") from error
    if int(gradio.__version__.split(".")[0]) < 6:
        raise ImportError(f"gradio: expected version 6 or newer, got {gradio.__version__}. {_INSTALL}")
    return gradio


_INSTALL = "Install it with: pip install 'eloftr-ops[app]'"


def build_app(matcher: PairMatcher, *, public: bool = False) -> Any:
    """The page, a ``gradio.Blocks``.

    Args:
        matcher: behind it.
        public: it serves others, so that links into the server's own network are refused.

    Raises:
        ImportError: gradio is missing or too old.
    """
    gr = require_gradio()
    assets = importlib.resources.files("eloftr_ops") / "assets"
    pair = [str(assets / f"demo_{side}.jpg") for side in (0, 1)]
    low, high = matcher.limits
    with gr.Blocks(
        title="EfficientLoFTR", analytics_enabled=False, delete_cache=(_SECONDS_KEPT, _SECONDS_KEPT)
    ) as page:
        kept = gr.State(None, time_to_live=_SECONDS_KEPT)
        gr.Markdown(_ABOUT)
        with gr.Row():
            images = [_image_input(gr, side, public) for side in (0, 1)]
        gr.Examples([pair], images, label="Example", cache_examples=False)
        with gr.Row(equal_height=True):
            run = gr.Button("Match", variant="primary", elem_id="run")
            size = gr.Dropdown(list(SIZES), value=DEFAULT_RESIZE, label="long side as matched, pixels")
            models = [
                ("homography (a plane, a rotation)", "homography"),
                ("fundamental matrix", "fundamental"),
            ]
            model = gr.Radio(models, value="homography", label="outliers of", elem_id="model")
            least = gr.Slider(low, high, matcher.threshold, step=0.01, label="least confidence", elem_id="least")
        words = gr.Markdown(elem_id="words")
        lines = gr.HTML(elem_id="lines")
        with gr.Row():
            laid = gr.Image(
                label="image 0 warped onto image 1", interactive=False, elem_id="overlay", format="png",
                buttons=["download", "fullscreen"],
            )  # fmt: skip
            with gr.Column(scale=0, min_width=180):
                downloads = [
                    gr.DownloadButton(f"Download {suffix}", interactive=False, elem_id=f"save-{suffix[1:]}")
                    for suffix in MATCH_SUFFIXES
                ]
        shown = [lines, words, laid, *downloads]

        def match(path0: Any, path1: Any, resize: Any, confidence: Any, chosen: Any) -> list[Any]:
            with _words_for_errors(gr):
                matches = matcher.match(path0, path1, int(resize))
                now = Kept(matches, tempfile.TemporaryDirectory(prefix="eloftr-"))
                return [now, *_outputs(gr, now, confidence, chosen)]

        def change(now: Any, confidence: Any, chosen: Any) -> list[Any]:
            if now is None:
                return [gr.skip()] * len(shown)
            return _outputs(gr, now, confidence, chosen)

        run.click(match, [*images, size, least, model], [kept, *shown], concurrency_limit=1)
        for choice in (least, model):
            # While the slider moves, only its last position is drawn.
            choice.change(change, [kept, least, model], shown, show_progress="hidden", trigger_mode="always_last")
    return page


def _image_input(gr: Any, side: int, public: bool) -> Any:
    """An image by drop, paste or link."""
    with gr.Column():
        # None keeps the file as it is: its depth and its EXIF orientation.
        image = gr.Image(
            label=f"image {side}", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=260,
            elem_id=f"image{side}", buttons=[],
        )  # fmt: skip
        # Gradio would open the file and fail without words; the matcher reads it and says what is wrong.
        image.preprocess = lambda payload: None if payload is None else payload.path
        link = gr.Textbox(label="or its address", placeholder="https://...", max_lines=1, elem_id=f"link{side}")

    fetched = gr.State(None, time_to_live=_SECONDS_KEPT)  # Gradio copies the file after this call

    def take(url: str) -> list[Any]:
        if not url.strip():
            return [gr.skip(), gr.skip()]
        with _words_for_errors(gr):
            folder = tempfile.TemporaryDirectory(prefix="eloftr-")
            return [str(fetch(url, Path(folder.name), public=public)), folder]

    link.submit(take, link, [image, fetched])
    return image


class _words_for_errors:  # noqa: N801 - read as a word in a with statement
    """Shows the user's mistakes on the page."""

    def __init__(self, gr: Any) -> None:
        self._gr = gr

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FileError):
            raise self._gr.Error(str(error), duration=10, print_exception=False) from None


def _outputs(gr: Any, now: Kept, confidence: float, model: str) -> list[Any]:
    seen = view(now.matches, confidence, model, Path(now.folder.name))
    return [
        seen.page,
        seen.words,
        seen.overlay,
        *(gr.update(value=str(path), interactive=True) for path in seen.files),
    ]


def serve(
    weights: str = DEFAULT_WEIGHTS,
    device: str = "auto",
    *,
    host: str | None = None,
    port: int | None = None,
    browser: bool = False,
    block: bool = True,
) -> Any:
    """Serve the page until it is interrupted.

    Args:
        weights: as `eloftr_ops.match_images`.
        device: likewise.
        host: address to listen at. None: the environment's ``GRADIO_SERVER_NAME``, which a Space sets, else 127.0.0.1.
        port: None: ``GRADIO_SERVER_PORT``, else the first free one from 7860.
        browser: open the page.
        block: False returns at once.

    Returns:
        The ``gradio.Blocks``.

    Raises:
        ImportError: gradio is missing or too old.
        ArgumentError: weights, a device or a port that cannot be used.
    """
    gr = require_gradio()
    host = host or os.environ.get("GRADIO_SERVER_NAME") or _LOCAL[0]
    page = build_app(PairMatcher(weights, device), public=host not in _LOCAL)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            inbrowser=browser,
            prevent_thread_lock=not block,
            max_file_size=MAX_MEBIBYTES * 2**20,
            state_session_capacity=_SESSIONS,
            theme=gr.themes.Default(primary_hue="teal", font=["system-ui", "sans-serif"]),
            footer_links=[],
        )
    except OSError as error:
        raise ArgumentError("port", f"{host}:{port or 7860} cannot be used: {error}") from error
    return page
