# SPDX-License-Identifier: Apache-2.0
"""Auto classes that give this package's classes, and a switch that makes transformers' own give them."""

from __future__ import annotations

import os
from typing import Any

import transformers
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_KEYPOINT_MATCHING_MAPPING, MODEL_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import is_torchvision_available

from eloftr_ops.integrations.transformers.configuration import EfficientLoFTRConfig
from eloftr_ops.integrations.transformers.image_processing import (
    EfficientLoFTRImageProcessor,
    EfficientLoFTRImageProcessorPil,
)
from eloftr_ops.integrations.transformers.loading import is_ours
from eloftr_ops.integrations.transformers.modeling import (
    EfficientLoFTRForKeypointMatching,
    EfficientLoFTRModel,
    EfficientLoFTRPreTrainedModel,
)
from eloftr_ops.integrations.transformers.pipelines import TASK, KeypointMatchingPipeline

__all__ = ["AutoImageProcessor", "AutoModel", "AutoModelForKeypointMatching", "register", "unregister"]

_BACKENDS: dict[str, type[BaseImageProcessor]] = {
    "torchvision": EfficientLoFTRImageProcessor,
    "pil": EfficientLoFTRImageProcessorPil,
}
_before: dict[str, Any] = {}  # what register() replaced in the table of tasks


class AutoImageProcessor:
    """``from_pretrained`` gives the image processor of EfficientLoFTR: torchvision's where there is torchvision."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        backend: str | None = None,
        use_fast: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The image processor of a folder, a Hub repository or embedded weights.

        Args:
            pretrained_model_name_or_path: as for the models; weights without ``preprocessor_config.json`` that this
                package wrote, or embeds, get the default.
            backend: "torchvision" or "pil"; default: torchvision if it is installed.
            use_fast: transformers' older word: True for torchvision, False for PIL.
            kwargs: of the image processor, or of the Hub.

        Raises:
            ValueError: an unknown backend, or the image processor of another model.
            OSError: there is none under this name.
        """
        if backend is None and use_fast is not None:
            backend = "torchvision" if use_fast else "pil"
        if backend is None:
            backend = "torchvision" if is_torchvision_available() else "pil"
        if backend not in _BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(_BACKENDS)}, got {backend!r}.")
        chosen = _BACKENDS[backend]
        if is_ours(pretrained_model_name_or_path):
            for name in ("revision", "cache_dir", "local_files_only", "token"):
                kwargs.pop(name, None)
            return chosen(**kwargs)
        return chosen.from_pretrained(pretrained_model_name_or_path, **kwargs)


class _AutoModel:
    _model: type[EfficientLoFTRPreTrainedModel]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """The model with trained weights; see :class:`EfficientLoFTRPreTrainedModel`.

        Raises:
            ValueError: weights of another model.
            OSError: nothing was found under this name.
        """
        kwargs.pop("trust_remote_code", None)  # no code is loaded
        return cls._model.from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_config(cls, config: EfficientLoFTRConfig, **kwargs: Any) -> Any:
        """The model with random weights.

        Raises:
            ValueError: the configuration of another model.
        """
        if not isinstance(config, EfficientLoFTRConfig):
            raise ValueError(f"config: expected an EfficientLoFTRConfig, got {type(config).__name__}.")
        return cls._model._from_config(config, **kwargs)


class AutoModelForKeypointMatching(_AutoModel):
    """Gives :class:`EfficientLoFTRForKeypointMatching`; other models are refused."""

    _model = EfficientLoFTRForKeypointMatching


class AutoModel(_AutoModel):
    """Gives :class:`EfficientLoFTRModel`; other models are refused."""

    _model = EfficientLoFTRModel


def register() -> None:
    """Make transformers' own Auto classes and ``pipeline`` give this package's classes for ``efficientloftr``.

    Other model types stay as they are, but all keypoint matching pipelines are built from
    :class:`KeypointMatchingPipeline`, which hands on image sizes as (height, width). A second call changes nothing;
    :func:`unregister` takes it back.
    """
    model_type = EfficientLoFTRConfig.model_type
    transformers.AutoConfig.register(model_type, EfficientLoFTRConfig, exist_ok=True)
    transformers.AutoModel.register(EfficientLoFTRConfig, EfficientLoFTRModel, exist_ok=True)
    MODEL_FOR_KEYPOINT_MATCHING_MAPPING.register(EfficientLoFTRConfig, EfficientLoFTRForKeypointMatching, exist_ok=True)
    IMAGE_PROCESSOR_MAPPING.register(EfficientLoFTRConfig, dict(_BACKENDS), exist_ok=True)
    task = PIPELINE_REGISTRY.supported_tasks[TASK]
    _before.setdefault("impl", task["impl"])
    task["impl"] = KeypointMatchingPipeline


def unregister() -> None:
    """Undo :func:`register`; without it before, nothing changes."""
    CONFIG_MAPPING._extra_content.pop(EfficientLoFTRConfig.model_type, None)
    for mapping in (MODEL_MAPPING, MODEL_FOR_KEYPOINT_MATCHING_MAPPING, IMAGE_PROCESSOR_MAPPING):
        mapping._extra_content.pop(EfficientLoFTRConfig, None)
    if "impl" in _before:
        PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] = _before.pop("impl")
