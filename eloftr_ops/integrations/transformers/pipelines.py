# SPDX-License-Identifier: Apache-2.0
"""``pipeline(task="keypoint-matching")``: images in, a list of matches out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Pipeline
from transformers.image_utils import load_image

from eloftr_ops.errors import FileError
from eloftr_ops.integrations.transformers.outputs import EfficientLoFTRKeypointMatchingOutput as Output
from eloftr_ops.integrations.transformers.postprocessing import check_threshold

__all__ = ["KeypointMatchingPipeline", "pipeline"]

TASK = "keypoint-matching"
DEFAULT_MODEL = "small"
_EXPECTED = "inputs: expected a pair (image0, image1) or a list of pairs of paths, URLs or Pillow images, got"


class KeypointMatchingPipeline(Pipeline):
    """Matches of pairs of images; :func:`pipeline` makes one."""

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def _sanitize_parameters(
        self, threshold: float | None = None, timeout: float | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if kwargs:
            raise TypeError(f"expected the arguments threshold and timeout, got {', '.join(sorted(kwargs))}.")
        if threshold is not None:
            raw = getattr(getattr(self.model, "config", None), "coarse_matching_skip_softmax", False)
            check_threshold(threshold, torch.tensor([2.0]) if raw is True else None)
        loading = {} if timeout is None else {"timeout": timeout}
        return loading, {}, {} if threshold is None else {"threshold": threshold}

    def __call__(self, inputs: Any, threshold: float = 0.0, **kwargs: Any) -> Any:
        """Match one pair, or several.

        Convention:
            ``x`` and ``y`` are in pixels of the image as it was given (a file: turned upright as its EXIF data say);
            the centre of pixel (x, y) is (x + 0.5, y + 0.5). Subtract 0.5 for OpenCV.

        Args:
            inputs: a pair, or a list of pairs, of paths, http(s) URLs or Pillow images.
            threshold: in [0, 1]; matches must score above it. 0 keeps all that the model found.
            kwargs: ``batch_size`` (pairs at a time), ``num_workers``, ``timeout`` (seconds, of a URL).

        Returns:
            For one pair a list of dictionaries, best score first: ``keypoint_image_0`` and ``keypoint_image_1``, each
            ``{"x": ..., "y": ...}``, and ``score``. For several pairs a list of such lists.

        Raises:
            ValueError: anything else; an image that cannot be read or fetched.
        """
        pairs = _pairs(inputs)
        found = super().__call__(pairs, threshold=threshold, **kwargs)
        return found[0] if len(pairs) == 1 else found

    def preprocess(self, images: Any, timeout: float | None = None) -> dict[str, Tensor]:
        """A pair as the model takes it, and its sizes."""
        loaded = [_loaded(image, timeout) for image in images]
        pixels = self.image_processor(images=loaded, return_tensors="pt")["pixel_values"].to(self.dtype)
        sizes = [[(image.height, image.width) for image in loaded]]
        return {"pixel_values": pixels, "target_sizes": torch.tensor(sizes)}

    def _forward(self, model_inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        output = self.model(pixel_values=model_inputs["pixel_values"])
        return {
            "keypoints": output.keypoints,
            "matches": output.matches,
            "matching_scores": output.matching_scores,
            "target_sizes": model_inputs["target_sizes"],
        }

    def postprocess(self, model_outputs: dict[str, Tensor], threshold: float = 0.0) -> list[dict[str, Any]]:
        """The matches of a pair as plain data, best first."""
        output = Output(
            keypoints=model_outputs["keypoints"],
            matches=model_outputs["matches"],
            matching_scores=model_outputs["matching_scores"],
        )
        (found,) = self.image_processor.post_process_keypoint_matching(output, model_outputs["target_sizes"], threshold)
        order = found["matching_scores"].argsort(descending=True, stable=True)
        points0, points1 = (found[name][order].tolist() for name in ("keypoints0", "keypoints1"))
        scores = found["matching_scores"][order].tolist()
        return [
            {
                "keypoint_image_0": {"x": x0, "y": y0},
                "keypoint_image_1": {"x": x1, "y": y1},
                "score": score,
            }
            for (x0, y0), (x1, y1), score in zip(points0, points1, scores, strict=True)
        ]


def pipeline(
    task: str = TASK,
    model: Any = None,
    config: Any = None,
    image_processor: Any = None,
    revision: str | None = None,
    device: Any = None,
    device_map: Any = None,
    dtype: Any = "auto",
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> KeypointMatchingPipeline:
    """A pipeline that matches keypoints, with transformers' arguments and structure of the result.

    Args:
        task: "keypoint-matching", the only one.
        model: a model, or what ``from_pretrained`` takes; default: the embedded ``small``.
        config: of the model, in place of the stored one.
        image_processor: an image processor, or where its files are; default: the model's.
        revision: branch, tag or commit of a Hub repository.
        device: of the model; default: the first GPU, or the CPU.
        device_map: in place of ``device``.
        dtype: of the model.
        model_kwargs: more arguments of ``from_pretrained``.
        kwargs: of the pipeline: ``batch_size``, ``threshold``, ``timeout``, ``num_workers``.

    Raises:
        ValueError: another task, weights of another model.
        OSError: nothing was found under this name.
    """
    from eloftr_ops.integrations.transformers.auto import AutoImageProcessor, AutoModelForKeypointMatching

    if task != TASK:
        raise ValueError(f"task: expected {TASK!r}, got {task!r}. transformers.pipeline has the others.")
    kwargs.pop("trust_remote_code", None)  # no code is loaded
    name = DEFAULT_MODEL if model is None else model
    hub: dict[str, Any] = {"revision": revision} if revision is not None else {}
    for argument in ("token", "local_files_only"):
        if argument in kwargs:
            hub[argument] = kwargs.pop(argument)
    named = isinstance(name, (str, os.PathLike))
    if named:
        more = {"device_map": device_map} if device_map is not None else {}
        more = {**more, "config": config} if config is not None else more
        model = AutoModelForKeypointMatching.from_pretrained(name, dtype=dtype, **hub, **more, **(model_kwargs or {}))
    if image_processor is None or isinstance(image_processor, (str, os.PathLike)):
        source = image_processor or (name if named else DEFAULT_MODEL)
        image_processor = AutoImageProcessor.from_pretrained(source, **hub)
    return KeypointMatchingPipeline(model=model, image_processor=image_processor, task=task, device=device, **kwargs)


def _pairs(inputs: Any) -> list[Any]:
    if inputs is None or isinstance(inputs, (str, Image.Image)) or not isinstance(inputs, Sequence):
        raise ValueError(f"{_EXPECTED} {type(inputs).__name__}.")
    if not inputs:
        raise ValueError(f"{_EXPECTED} an empty list.")
    if all(_is_image(image) for image in inputs):
        if len(inputs) == 2:
            return [list(inputs)]
        raise ValueError(f"{_EXPECTED} a list of {len(inputs)} image{'s'[: len(inputs) > 1]}.")
    for index, pair in enumerate(inputs):
        if isinstance(pair, (str, Image.Image)) or not isinstance(pair, Sequence) or len(pair) != 2:
            count = f"{len(pair)} images" if isinstance(pair, (list, tuple)) else type(pair).__name__
            raise ValueError(f"inputs[{index}]: expected a pair of images, got {count}.")
        for image in pair:
            if not _is_image(image):
                raise ValueError(f"inputs[{index}]: expected paths, URLs or Pillow images, got {type(image).__name__}.")
    return [list(pair) for pair in inputs]


def _is_image(image: Any) -> bool:
    return isinstance(image, (str, os.PathLike, Image.Image))


def _loaded(image: Any, timeout: float | None) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    name = os.fspath(image)
    try:
        return load_image(name, timeout=timeout)  # type: ignore[no-any-return]
    except Exception as error:
        if name.startswith(("http://", "https://")):
            raise FileError(
                f"{name}: expected an image that can be fetched, got: {error}. Without a network, save the image to "
                "a file and pass its path."
            ) from error
        raise FileError(f"{name}: expected an image file, got: {error}") from error
