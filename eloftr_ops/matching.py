# SPDX-License-Identifier: Apache-2.0
"""Two images in, their matches out: one call for files, URLs, Pillow images, arrays and tensors."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from eloftr_ops.checks import MIN_SIZE
from eloftr_ops.errors import ArgumentError, FileError
from eloftr_ops.images import ImageSource, LoadedImage, load_image
from eloftr_ops.io import MATCH_SUFFIXES, check_output, write_matches
from eloftr_ops.model.matcher import EfficientLoFTR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = [
    "ImageMatches",
    "Matcher",
    "TwoViewModel",
    "choose_device",
    "load_matcher",
    "match_images",
    "match_loaded",
]

Matcher = Callable[[dict[str, Any]], Mapping[str, Tensor]]  # kornia LoFTR's dictionaries in and out

DEFAULT_WEIGHTS = "small"
DEFAULT_RESIZE = 640
INLIER_THRESHOLD = 1.5  # pixels of the images as matched
_MATRIX = {"homography": "H_0to1", "fundamental": "F_0to1"}
_KEPT = 4  # matchers
_MATCHERS: OrderedDict[tuple[Any, ...], Matcher] = OrderedDict()


class TwoViewModel(NamedTuple):
    """A homography or a fundamental matrix, and the matches that agree with it."""

    matrix: Tensor | None  # (3, 3) float64, between pixels of the images as given; None: none was found
    inliers: Tensor  # (M,) bool; all False without a matrix


@dataclass(frozen=True, eq=False, repr=False)
class ImageMatches:
    """The matches of two images, in the pixels of the images as given.

    Convention:
        Keypoints are (x, y); the centre of pixel (x, y) is (x + 0.5, y + 0.5). Subtract 0.5 for OpenCV. A file or URL
        is turned upright as its EXIF data say; its keypoints are in pixels of the upright image. Everything is on the
        CPU and carries no gradient.
    """

    keypoints0: Tensor  # (M, 2) float32
    keypoints1: Tensor  # (M, 2) float32
    confidence: Tensor  # (M,) float32
    image0: LoadedImage  # as matched
    image1: LoadedImage
    names: tuple[str, str]  # what the images were called
    seconds: float  # of the matcher alone
    device: torch.device  # of the matcher
    _models: dict[tuple[str, float], TwoViewModel] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.confidence)

    def __repr__(self) -> str:
        sizes = " and ".join("{}x{}".format(*im.original_size_wh) for im in (self.image0, self.image1))
        if not len(self):
            return f"ImageMatches(no match, {sizes} pixels)"
        count = f"{len(self):,} match{'es' if len(self) > 1 else ''}"
        low, middle, high = (
            float(v) for v in (self.confidence.min(), self.confidence.median(), self.confidence.max())
        )
        return (
            f"ImageMatches({count}, confidence {low:.2f} to {high:.2f}, median {middle:.2f}, {sizes} pixels)"
        )

    def homography(self, threshold: float = INLIER_THRESHOLD) -> TwoViewModel:
        """The homography that most matches agree with (OpenCV's MAGSAC++).

        Convention:
            ``matrix`` is ``H_0to1``, ``x1 ~ H_0to1 x0``, between pixels of the images as given, last entry 1.

        Args:
            threshold: largest error of an inlier, in pixels of the images as matched.

        Raises:
            ArgumentError: a threshold that is not a positive number.
        """
        return self._model("homography", threshold)

    def fundamental(self, threshold: float = INLIER_THRESHOLD) -> TwoViewModel:
        """The fundamental matrix that most matches agree with (OpenCV's MAGSAC++).

        Convention:
            ``matrix`` is ``F_0to1``, ``x1^T F_0to1 x0 = 0``, between pixels of the images as given, of norm 1.

        Args:
            threshold: as :meth:`homography`.

        Raises:
            ArgumentError: as :meth:`homography`.
        """
        return self._model("fundamental", threshold)

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        model: str | None = None,
        threshold: float = INLIER_THRESHOLD,
        max_matches: int | None = 200,
        ax: Axes | None = None,
    ) -> Figure | SubFigure:
        """Draw both images side by side with lines between their matches; see `draw_matches`.

        Args:
            path: picture to write, too: .png, .jpg, .webp, .pdf or .svg.
            model: "homography" or "fundamental": draw its outliers thin and red. None: draw all alike.
            threshold: of the model's inliers.
            max_matches: the most lines drawn; None for all.
            ax: axes to draw into; None makes a figure.

        Raises:
            FileError: ``path`` cannot be written.
            ArgumentError: an unknown model.
        """
        from eloftr_ops.visualization import draw_matches

        found = None if model is None else self._model(model, threshold)
        pictures = [
            image.image if image.color is None else image.color for image in (self.image0, self.image1)
        ]
        keypoints0, keypoints1 = self._matched_keypoints()
        return draw_matches(
            pictures[0],
            pictures[1],
            keypoints0,
            keypoints1,
            self.confidence,
            None if found is None or found.matrix is None else found.inliers,
            max_matches=max_matches,
            path=path,
            ax=ax,
        )

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        model: str | None = "fundamental",
        threshold: float = INLIER_THRESHOLD,
    ) -> None:
        """Write a file of matches (.npz, .json, .csv) or a picture, as the command line does; whole or not at all.

        The fields are listed in docs/cli.md.

        Args:
            path: file to write; its suffix chooses the format.
            model: whose inliers and matrix go into the file: "fundamental", "homography" or None.
            threshold: of the model's inliers.

        Raises:
            FileError: an unknown suffix, or a place that cannot be written.
            ArgumentError: an unknown model.
        """
        from eloftr_ops.visualization import PICTURE_SUFFIXES

        if check_output(path, (*MATCH_SUFFIXES, *PICTURE_SUFFIXES)).suffix.lower() in PICTURE_SUFFIXES:
            self.plot(path, model=model, threshold=threshold)
            return
        found = None if model is None else self._model(model, threshold)
        write_matches(
            path,
            self.keypoints0,
            self.keypoints1,
            self.confidence,
            size0_wh=self.image0.original_size_wh,
            size1_wh=self.image1.original_size_wh,
            inliers=None if found is None else found.inliers,
            matrices={} if found is None or found.matrix is None else {_MATRIX[str(model)]: found.matrix},
        )

    def _matched_keypoints(self) -> tuple[Tensor, Tensor]:
        """In pixels of the images as matched, float64."""
        return self.image0.from_original(self.keypoints0), self.image1.from_original(self.keypoints1)

    def _model(self, model: str, threshold: float) -> TwoViewModel:
        if model not in _MATRIX:
            raise ArgumentError("model", f"expected {' or '.join(_MATRIX)}, got {model!r}.")
        if not 0 < threshold < float("inf"):
            raise ArgumentError("threshold", f"expected a positive number of pixels, got {threshold}.")
        key = (model, float(threshold))
        if key not in self._models:
            matrix, inliers = _robust_model(model, threshold, *self._matched_keypoints())
            if matrix is not None:
                matrix = _between_originals(matrix, model, self.image0, self.image1)
            self._models[key] = TwoViewModel(None if matrix is None else torch.from_numpy(matrix), inliers)
        return self._models[key]


def match_images(
    image0: ImageSource,
    image1: ImageSource,
    weights: str | os.PathLike[str] | Matcher = DEFAULT_WEIGHTS,
    device: str | torch.device = "auto",
    resize: int | None = DEFAULT_RESIZE,
    threshold: float | None = None,
    max_matches: int | None = None,
    *,
    mask0: npt.NDArray[Any] | Tensor | None = None,
    mask1: npt.NDArray[Any] | Tensor | None = None,
) -> ImageMatches:
    """Match two images.

    The matcher is kept: the next call with the same weights, device and threshold starts at once.

    Convention:
        Keypoints are (x, y) in pixels of the images as given, whatever ``resize`` is; the centre of pixel (x, y) is
        (x + 0.5, y + 0.5). No gradient; for gradients call the matcher itself.

    Args:
        image0: a path, an http(s) URL, a ``PIL.Image.Image``, an array (H, W) or (H, W, C), or a tensor (H, W),
            (C, H, W) or (1, C, H, W): gray, RGB or RGBA; uint8, uint16, bool, or floating point in [0, 1].
        image1: likewise.
        weights: "small" (embedded), a file, a folder or a Hugging Face repository; or a matcher: an `EfficientLoFTR`
            in evaluation mode, its optimized copy, or anything that takes and gives kornia LoFTR's dictionaries.
        device: "auto" (a CUDA GPU if there is one), "cpu", "cuda", "cuda:1", ...
        resize: images with a longer long side are reduced to it before matching; 0 or None: never.
        threshold: least confidence of a match; the weights' own by default. For a matcher: its own, or a higher one.
        max_matches: keep so many matches, the most confident; None: all.
        mask0: (H, W) of the size of image 0 as given, zero where no match may lie.
        mask1: likewise.

    Returns:
        The matches, M = 0 if there are none.

    Raises:
        FileError: an image that cannot be read.
        ArgumentError: anything else that cannot be used; the message begins with the argument's name. Both are
            ValueErrors.
        torch.OutOfMemoryError: the images are too large for the GPU.
    """
    _check_numbers(resize, threshold, max_matches)
    pair = (
        _loaded("image0", image0, resize, mask0),
        _loaded("image1", image1, resize, mask1),
    )
    if isinstance(weights, (str, os.PathLike)):
        matcher = _kept_matcher(weights, device, threshold)
    else:
        matcher = _checked_matcher(weights, device, threshold)
    names = (_name("image0", image0), _name("image1", image1))
    return match_loaded(matcher, *pair, names=names, threshold=threshold, max_matches=max_matches)


def match_loaded(
    matcher: Matcher,
    image0: LoadedImage,
    image1: LoadedImage,
    *,
    names: tuple[str, str] = ("image0", "image1"),
    threshold: float | None = None,
    max_matches: int | None = None,
) -> ImageMatches:
    """Match images that are loaded already, by anything that speaks kornia LoFTR's dictionaries.

    Args:
        matcher: takes a dictionary with ``image0``, ``image1`` (1, 1, H, W) and perhaps ``mask0``, ``mask1``
            (1, H, W), on its device; gives one with ``keypoints0``, ``keypoints1`` (M, 2) and ``confidence`` (M,).
        image0: from `load_image`.
        image1: likewise.
        names: what to call the images.
        threshold: matches whose confidence is not above it are left out.
        max_matches: keep so many matches, the most confident.
    """
    device = _device_of(matcher)
    data: dict[str, Any] = {}
    for side, loaded in zip("01", (image0, image1), strict=True):
        data[f"image{side}"] = loaded.image.to(device)
        if loaded.mask is not None:
            data[f"mask{side}"] = loaded.mask.to(device)
    start = time.perf_counter()
    with torch.inference_mode():
        found = {name: value.cpu() for name, value in matcher(data).items()}  # waits for the device
    seconds = time.perf_counter() - start
    keypoints0, keypoints1, confidence = (
        found[name].float().clone() for name in ("keypoints0", "keypoints1", "confidence")
    )
    kept = _kept(confidence, threshold, max_matches)
    return ImageMatches(
        image0.to_original(keypoints0[kept]),
        image1.to_original(keypoints1[kept]),
        confidence[kept],
        image0,
        image1,
        names,
        seconds,
        device,
    )


def _kept(confidence: Tensor, threshold: float | None, max_matches: int | None) -> Tensor:
    """Indexes of the matches to report, ascending."""
    indexes = torch.arange(len(confidence))
    if threshold is not None:
        indexes = indexes[confidence > threshold]
    if max_matches is not None:
        # Ties go to the earlier match, and those kept stay in their order.
        best = confidence[indexes].argsort(descending=True, stable=True)[:max_matches]
        indexes = indexes[best.sort().values]
    return indexes


def load_matcher(
    weights: str | os.PathLike[str],
    device: str | torch.device = "auto",
    *,
    threshold: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> EfficientLoFTR:
    """The matcher for inference, optimized, on its device.

    Raises:
        ArgumentError: weights, a device or a threshold that cannot be used.
    """
    chosen = choose_device(device)
    try:
        matcher = EfficientLoFTR.from_pretrained(weights)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise ArgumentError("weights", f"{weights}: {error}") from error
    matcher = matcher.optimize_for_inference(dtype=dtype).to(chosen)
    if threshold is not None:
        try:
            matcher.config = matcher.config.replace(threshold=threshold)
        except ValueError as error:
            raise ArgumentError("threshold", str(error).removeprefix("threshold: ")) from error
    return matcher


def choose_device(device: str | torch.device) -> torch.device:
    """The device of that name; a GPU, if there is one, for "auto".

    Raises:
        ArgumentError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()  # it must give results back, too
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        # Unknown, not built in, or not present.
        reason = f"expected a device that PyTorch can use here, got {str(device)!r}. Pass auto or cpu."
        raise ArgumentError("device", reason) from error
    return chosen


def _check_numbers(resize: int | None, threshold: float | None, max_matches: int | None) -> None:
    for name, value, least in (("resize", resize, 0), ("max_matches", max_matches, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ArgumentError(name, f"expected an integer of at least {least}, or None, got {value!r}.")
    if threshold is not None and not 0 <= threshold < float("inf"):
        raise ArgumentError("threshold", f"expected a confidence of 0 or more, got {threshold}.")


def _name(argument: str, source: Any) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else argument


def _loaded(argument: str, source: ImageSource, resize: int | None, mask: Any) -> LoadedImage:
    loaded = load_image(argument, source, resize=resize or None)
    if min(loaded.size_wh) < MIN_SIZE:
        width, height = loaded.size_wh
        reduced = loaded.size_wh != loaded.original_size_wh
        raise FileError(
            f"{_name(argument, source)}: {width}x{height} pixels{f' after a resize to {resize}' if reduced else ''}, "
            f"expected at least {MIN_SIZE} on each side.{' Pass a larger resize.' if reduced else ''}"
        )
    return loaded if mask is None else _masked(argument.replace("image", "mask"), loaded, mask)


def _masked(argument: str, loaded: LoadedImage, mask: Any) -> LoadedImage:
    """The image with a mask at its original size laid over it."""
    values = torch.as_tensor(mask).detach().cpu() if isinstance(mask, (np.ndarray, Tensor)) else None
    if values is None:
        raise ArgumentError(argument, f"expected an array or a tensor (H, W), got {type(mask).__name__}.")
    width, height = loaded.original_size_wh
    if values.numel() != width * height or tuple(values.shape[-2:]) != (height, width):
        raise ArgumentError(
            argument,
            f"expected the size of its image, (H, W) = {(height, width)}, got {tuple(values.shape)}.",
        )
    if values.is_floating_point() and not torch.isfinite(values).all():
        raise ArgumentError(argument, "expected finite values, got NaN or infinity. Pass a bool mask.")
    seen = (values.reshape(1, 1, height, width) != 0).float()
    if loaded.size_wh != loaded.original_size_wh:
        size = (loaded.size_wh[1], loaded.size_wh[0])
        seen = torch.nn.functional.interpolate(
            seen, size, mode="bilinear", antialias=True, align_corners=False
        )
    visible = seen[0] >= 0.5
    return loaded._replace(mask=visible if loaded.mask is None else visible & loaded.mask)


def _kept_matcher(
    weights: str | os.PathLike[str], device: str | torch.device, threshold: float | None
) -> Matcher:
    """A matcher made before from the same weights, or a new one."""
    chosen = choose_device(device)
    key = (str(weights), _modified(weights), str(chosen), threshold)
    matcher = _MATCHERS.pop(key, None) or load_matcher(weights, chosen, threshold=threshold)
    _MATCHERS[key] = matcher
    while len(_MATCHERS) > _KEPT:
        _MATCHERS.popitem(last=False)
    return matcher


def _modified(weights: str | os.PathLike[str]) -> int | None:
    """When a file or folder was last written: new weights under an old name are read anew."""
    try:
        path = Path(weights)
        inside = list(path.iterdir()) if path.is_dir() else []
        return max(entry.stat().st_mtime_ns for entry in (path, *inside))
    except OSError:
        return None


def _checked_matcher(matcher: Any, device: str | torch.device, threshold: float | None) -> Matcher:
    if not callable(matcher):
        raise ArgumentError("weights", f"expected a name, a path or a matcher, got {type(matcher).__name__}.")
    if isinstance(matcher, nn.Module) and matcher.training:
        raise ArgumentError("weights", "expected a matcher in evaluation mode. Call its .eval() first.")
    own = _device_of(matcher)
    if device != "auto" and torch.empty(0, device=choose_device(device)).device != own:
        raise ArgumentError("device", f"expected auto, or {own}, where the matcher is, got {str(device)!r}.")
    least = getattr(getattr(matcher, "config", None), "threshold", None)
    if threshold is not None and isinstance(least, float) and threshold < least:
        raise ArgumentError(
            "threshold",
            f"expected at least {least:g}, the matcher's own, got {threshold}. Change its config.",
        )
    return matcher  # type: ignore[no-any-return]


def _device_of(matcher: Any) -> torch.device:
    parameter = next(matcher.parameters(), None) if isinstance(matcher, nn.Module) else None
    device = getattr(matcher, "device", None) if parameter is None else parameter.device
    return device if isinstance(device, torch.device) else torch.device("cpu")


def _robust_model(
    model: str, threshold: float, keypoints0: Tensor, keypoints1: Tensor
) -> tuple[npt.NDArray[np.float64] | None, Tensor]:
    """The matrix (3, 3) between the frames of the keypoints, and the inliers (M,)."""
    from eloftr_ops.geometry import estimate_robust  # OpenCV is not loaded for anything else

    batch = torch.zeros(len(keypoints0), dtype=torch.int64)
    estimate = estimate_robust(keypoints0, keypoints1, batch, batch_size=1, model=model, threshold=threshold)
    return estimate.model_0to1[0].numpy() if estimate.valid.item() else None, estimate.inliers


def _between_originals(
    matrix: npt.NDArray[np.float64], model: str, image0: LoadedImage, image1: LoadedImage
) -> npt.NDArray[np.float64]:
    """The matrix between the images as matched, made one between the original images."""
    up0, up1 = (np.diag([*loaded.scale_xy, 1.0]) for loaded in (image0, image1))
    if model == "homography":
        moved = up1 @ matrix @ np.linalg.inv(up0)
        return moved / moved[2, 2] if moved[2, 2] else moved  # OpenCV's and kornia's scale
    moved = np.linalg.inv(up1) @ matrix @ np.linalg.inv(up0)
    scaled: npt.NDArray[np.float64] = moved / np.linalg.norm(moved)
    return scaled
