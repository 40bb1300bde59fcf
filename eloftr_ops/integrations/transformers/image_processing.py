# SPDX-License-Identifier: Apache-2.0
"""transformers' image processors of EfficientLoFTR, on its torchvision and its PIL backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs
from transformers.utils import is_torchvision_available

from eloftr_ops.integrations.transformers.outputs import EfficientLoFTRKeypointMatchingOutput
from eloftr_ops.integrations.transformers.pairs import flat_pairs, plain_image
from eloftr_ops.integrations.transformers.postprocessing import drawn_matches, keypoints_on_originals

__all__ = ["EfficientLoFTRImageProcessor", "EfficientLoFTRImageProcessorPil"]

_LUMA = (0.2989, 0.587, 0.114)
_TYPES = (
    "EfficientLoFTRImageProcessor",
    "EfficientLoFTRImageProcessorPil",
    "EfficientLoFTRImageProcessorFast",
)


class EfficientLoFTRImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of the image processors; ``do_grayscale`` beside transformers' own."""

    do_grayscale: bool


class PairProcessing:
    """What both image processors share: pairs, sizes, pictures."""

    valid_kwargs = EfficientLoFTRImageProcessorKwargs
    resample = PILImageResampling.BILINEAR
    size = {"height": 480, "width": 640}  # noqa: RUF012 - transformers' attribute
    default_to_square = False
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = None
    do_grayscale = True

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Resize, scale to [0, 1] and turn gray.

        Floating point images whose values are at most 1 are taken as scaled already. Transparent pixels of Pillow
        images become white, 16-bit ones are reduced to 8 bits.

        Args:
            images: a pair, or a list of pairs, of Pillow images, paths, URLs, arrays or tensors; with one, three or
                four channels, first or last, or none.
            kwargs: ``do_resize``, ``size``, ``resample``, ``do_rescale``, ``rescale_factor``, ``do_grayscale``,
                ``input_data_format``, ``return_tensors`` and what else transformers' processors take.

        Returns:
            ``pixel_values``, (B, 2, 3, height, width); the three channels are equal with ``do_grayscale``.

        Raises:
            ValueError: no pairs, images of other shapes or kinds, sizes that differ with ``do_resize=False``.
        """
        return super().preprocess(images, **kwargs)  # type: ignore[misc]

    def post_process_keypoint_matching(
        self,
        outputs: EfficientLoFTRKeypointMatchingOutput,
        target_sizes: Tensor | Sequence[Any],
        threshold: float = 0.0,
    ) -> list[dict[str, Tensor]]:
        """Keypoints in pixels of the original images.

        Convention:
            Floating point (x, y), the centre of pixel (x, y) is (x + 0.5, y + 0.5), and the image spans
            [0, width] x [0, height]. In this frame a change of size is a product, without an offset of half a pixel.
            Subtract 0.5 for OpenCV. The gradient passes.

        Args:
            outputs: of the model.
            target_sizes: (height, width) of both images of each pair, before the processor: a tensor (B, 2, 2), or a
                list of pairs of tuples.
            threshold: in [0, 1]; matches must score above it. 0 keeps all that the model found.

        Returns:
            For each pair ``keypoints0`` (M, 2), ``keypoints1`` (M, 2), ``matching_scores`` (M,).

        Raises:
            ValueError: sizes of another number or shape, a threshold outside [0, 1].
            TypeError: a threshold that is no number.
        """
        return keypoints_on_originals(outputs, target_sizes, threshold)

    def visualize_keypoint_matching(
        self, images: Any, keypoint_matching_output: list[dict[str, Tensor]]
    ) -> list[Image.Image]:
        """Each pair side by side with a line per match, from red (score 0) to green (score 1).

        Args:
            images: the pair or pairs that :meth:`preprocess` got.
            keypoint_matching_output: of :meth:`post_process_keypoint_matching`.

        Returns:
            A Pillow image per pair.

        Raises:
            ValueError: another number of pairs.
        """
        return drawn_matches(images, keypoint_matching_output)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own, but the image processor of another model is refused.

        Raises:
            ValueError: ``image_processor_type`` is another one.
        """
        found = image_processor_dict.get("image_processor_type", _TYPES[0])
        if found not in _TYPES:
            raise ValueError(
                f"image_processor_type: expected {_TYPES[0]}, got {found}: these are files of another model."
            )
        return super().from_dict(image_processor_dict, **kwargs)  # type: ignore[misc]

    def _prepare_images_structure(self, images: Any, **_: Any) -> list[Any]:
        flat = flat_pairs(images)
        loaded = [self.fetch_images(x) if isinstance(x, str) else x for x in flat]  # type: ignore[attr-defined]
        return [plain_image(x) if isinstance(x, Image.Image) else x for x in loaded]

    def process_image(self, image: Any, **kwargs: Any) -> Any:
        """One image, channels first: 1 or 3 of them."""
        kwargs.pop("do_convert_rgb", None)
        if image.ndim == 2:
            kwargs["input_data_format"] = None
        x = super().process_image(image, **kwargs)  # type: ignore[misc]
        return _opaque(x) if x.shape[0] == 4 else x


class EfficientLoFTRImageProcessor(PairProcessing, TorchvisionBackend):
    """The image processor on torchvision; without torchvision use :class:`EfficientLoFTRImageProcessorPil`.

    Args:
        kwargs: see :meth:`preprocess`; they become its defaults.
    """

    def __init__(self, **kwargs: Any) -> None:
        if not is_torchvision_available():
            raise ImportError(
                "EfficientLoFTRImageProcessor: expected torchvision, found none. Install the torchvision of this "
                "torch, or use EfficientLoFTRImageProcessorPil."
            )
        super().__init__(**kwargs)

    def _preprocess(
        self,
        images: list[Tensor],
        do_resize: bool,
        size: Any,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        return_tensors: Any,
        do_grayscale: bool = True,
        **_: Any,
    ) -> BatchFeature:
        done = []
        for image in images:
            x = image
            scaled = x.is_floating_point() and (x.numel() == 0 or float(x.max()) <= 1)
            if do_resize:
                x = self.resize(x, size=size, resample=resample)
            if do_rescale:
                x = x.float() if scaled else self.rescale(x, rescale_factor)
                x = x.clamp(0, 1) if rescale_factor == 1 / 255 else x
            done.append(_three(x, do_grayscale))
        return _stacked(done, return_tensors)


class EfficientLoFTRImageProcessorPil(PairProcessing, PilBackend):
    """The image processor on Pillow and NumPy; needs no torchvision.

    Args:
        kwargs: see :meth:`preprocess`; they become its defaults.
    """

    def _preprocess(
        self,
        images: list[npt.NDArray[Any]],
        do_resize: bool,
        size: Any,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        return_tensors: Any,
        do_grayscale: bool = True,
        **_: Any,
    ) -> BatchFeature:
        done = []
        for image in images:
            x = image
            scaled = x.dtype.kind == "f" and (x.size == 0 or float(x.max()) <= 1)
            if do_resize:
                x = self.resize(_eight_bits(x), size=size, resample=resample)
            if do_rescale:
                x = x.astype(np.float32) if scaled else self.rescale(x, rescale_factor)
                x = x.clip(0, 1) if rescale_factor == 1 / 255 else x
            done.append(_three(torch.from_numpy(np.ascontiguousarray(x)), do_grayscale))
        return _stacked(done, return_tensors)


def _eight_bits(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Integers as Pillow resizes them."""
    return x.clip(0, 255).astype(np.uint8) if x.dtype.kind in "iub" else x


def _opaque(x: Any) -> Any:
    """RGBA, channels first, over white."""
    top = 255 if float(x.max()) > 1 else 1
    mixed = x[:3] * (x[3:] / top) + (top - x[3:])
    return mixed.round().astype(x.dtype) if isinstance(x, np.ndarray) else mixed.round().to(x.dtype)


def _three(x: Tensor, do_grayscale: bool) -> Tensor:
    """(1 or 3, H, W) -> (3, H, W); equal channels with ``do_grayscale``."""
    if x.shape[0] == 1:
        return x.expand(3, -1, -1)
    if not do_grayscale or (torch.equal(x[0], x[1]) and torch.equal(x[1], x[2])):
        return x
    weights = torch.tensor(_LUMA, dtype=torch.float64) / sum(_LUMA)
    gray = (x.double() * weights[:, None, None].to(x.device)).sum(0, keepdim=True)
    gray = gray.to(x.dtype) if x.is_floating_point() else gray.round().to(x.dtype)
    return gray.expand(3, -1, -1)


def _stacked(images: list[Tensor], return_tensors: Any) -> BatchFeature:
    if len({tuple(image.shape) for image in images}) > 1:
        sizes = ", ".join(sorted({f"{x.shape[2]} x {x.shape[1]}" for x in images}))
        raise ValueError(
            f"images: expected one size with do_resize=False, got images of {sizes} pixels. Use do_resize=True."
        )
    pairs = [torch.stack(images[i : i + 2]) for i in range(0, len(images), 2)]
    if return_tensors in ("pt", "np"):
        return BatchFeature(
            data={"pixel_values": torch.stack(pairs).numpy() if return_tensors == "np" else torch.stack(pairs)}
        )
    return BatchFeature(data={"pixel_values": pairs}, tensor_type=return_tensors)
