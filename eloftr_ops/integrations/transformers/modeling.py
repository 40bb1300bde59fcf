# SPDX-License-Identifier: Apache-2.0
"""transformers' models of EfficientLoFTR, whose computation is :class:`eloftr_ops.EfficientLoFTR`."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BackboneOutput

from eloftr_ops import EfficientLoFTR
from eloftr_ops.integrations.transformers.configuration import RUNTIME_FIELDS, EfficientLoFTRConfig
from eloftr_ops.integrations.transformers.features import (
    attention_weights,
    paired,
    recomputed_block,
    run_block,
    walked_features,
)
from eloftr_ops.integrations.transformers.labels import PairFeatures, matching_loss
from eloftr_ops.integrations.transformers.loading import is_ours, load_ours
from eloftr_ops.integrations.transformers.names import graft
from eloftr_ops.integrations.transformers.outputs import EfficientLoFTRKeypointMatchingOutput, packed_matches
from eloftr_ops.training.config import LossConfig
from eloftr_ops.training.optimization import evaluation_mode

__all__ = [
    "EfficientLoFTRForKeypointMatching",
    "EfficientLoFTRModel",
    "EfficientLoFTRPreTrainedModel",
]

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as transformers' image processors weigh colours


class EfficientLoFTRPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation, as transformers' models have them.

    ``from_pretrained`` takes what transformers' takes, and what :meth:`eloftr_ops.EfficientLoFTR.from_pretrained`
    takes: the embedded ``"small"``, the authors' checkpoints, this package's folders.
    """

    config_class = EfficientLoFTRConfig
    config: EfficientLoFTRConfig
    base_model_prefix = "efficientloftr"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["EfficientLoFTRModel"]  # noqa: RUF012 - transformers' attribute

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers' own; the docstring of the class tells what else it takes.

        Raises:
            ValueError: weights of another model, or that do not fit.
            OSError: nothing was found under this name.
        """
        if is_ours(pretrained_model_name_or_path):
            return load_ours(cls, pretrained_model_name_or_path, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @property
    def matcher(self) -> EfficientLoFTR:
        """The operator that computes: the same weights under this package's names."""
        return self.__dict__["_matcher"]  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> Any:
        """Training or evaluation mode, of the operator too."""
        if "_matcher" in self.__dict__:
            self.matcher.train(mode)
        return super().train(mode)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()  # transformers leaves out what was loaded
        else:
            super()._init_weights(module)

    def _follow_config(self) -> None:
        """Fields that were changed in ``config`` hold from the next call on."""
        now = tuple(str(getattr(self.config, name)) for name in RUNTIME_FIELDS)
        if now != self.__dict__.get("_config_seen"):
            self.matcher.config = self.config.to_eloftr_ops()
            self.__dict__["_config_seen"] = now

    def _wanted(self, given: bool | None, name: str) -> bool:
        return bool(getattr(self.config, name, False)) if given is None else given

    def _returned(self, output: Any, return_dict: bool | None) -> Any:
        wanted = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if wanted else output.to_tuple()


class EfficientLoFTRModel(EfficientLoFTRPreTrainedModel):
    """The features of both images: coarse maps after the transformer, and the backbone's maps for refinement.

    Args:
        config: of the model.
    """

    _keys_to_ignore_on_load_unexpected = [r"^refinement_layer\."]  # noqa: RUF012 - transformers' attribute

    def __init__(self, config: EfficientLoFTRConfig) -> None:
        super().__init__(config)
        matcher = EfficientLoFTR(config.to_eloftr_ops())
        self.__dict__["_matcher"] = matcher  # not registered: its layers are, under transformers' names
        graft(self, matcher, "efficientloftr.")
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Features of a batch of pairs.

        Args:
            pixel_values: (B, 2, C, H, W) in [0, 1], C = 3 or 1; H and W at least 32.
            labels: none are taken here.
            output_attentions: return attention weights.
            output_hidden_states: return the maps after each block of the backbone.
            return_dict: return an output class, not a tuple.
            kwargs: not looked at, as transformers passes some to every model.

        Returns:
            ``feature_maps``: (B, 2, C, h, w) at 1/8, then the backbone's maps (2 B, C, ...) at 1/2 and 1/4, images of
            a pair side by side; ``hidden_states`` and ``attentions`` as
            :class:`EfficientLoFTRKeypointMatchingOutput` has them. Sizes that are no multiple of 32 are rounded up.

        Raises:
            ValueError, TypeError: other shapes, sizes, ranges or dtypes; labels.
        """
        if labels is not None:
            raise ValueError(
                "labels: expected None, since features have no loss. Use EfficientLoFTRForKeypointMatching."
            )
        self._follow_config()
        features, hidden = self.features(split_pairs(pixel_values))
        sides = tuple(self.matcher.check_input({f"features{i}": f for i, f in enumerate(features)}))
        coarse = torch.stack(self.matcher.transform(*sides), 1)  # type: ignore[arg-type]
        residual = [paired(torch.cat([getattr(side, name) for side in sides])) for name in ("half", "quarter")]
        attentions = None
        if self._wanted(output_attentions, "output_attentions"):
            attentions = attention_weights(self.matcher, features)
        shown = self._wanted(output_hidden_states, "output_hidden_states")
        output = BackboneOutput(
            feature_maps=(coarse, *residual), hidden_states=hidden if shown else None, attentions=attentions
        )
        return self._returned(output, return_dict)

    def features(self, images: tuple[Tensor, Tensor]) -> tuple[PairFeatures, tuple[Tensor, ...]]:
        """Backbone features of both images, and the maps after every block, images of a pair side by side."""
        self.matcher.check_input({"image0": images[0], "image1": images[1]})
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        run = recomputed_block if recompute else run_block
        features, maps = walked_features(self.matcher, images, run)
        return features, tuple(paired(x) for x in maps)


class EfficientLoFTRForKeypointMatching(EfficientLoFTRPreTrainedModel):
    """Two images in, matches out, with the numbers and the gradients of :class:`eloftr_ops.EfficientLoFTR`.

    Args:
        config: of the model.
    """

    loss_config = LossConfig()  # weights of the loss's terms; assign another one to a model

    def __init__(self, config: EfficientLoFTRConfig) -> None:
        super().__init__(config)
        self.efficientloftr = EfficientLoFTRModel(config)
        self.__dict__["_matcher"] = self.efficientloftr.matcher
        self.refinement_layer = nn.Module()
        graft(self.refinement_layer, self.matcher, "refinement_layer.")
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Match a batch of pairs.

        Gradient:
            To ``matching_scores`` and ``keypoints`` as ``config.eloftr_ops["gradient_mode"]`` says: ``hard`` (the
            default), ``straight_through`` or ``soft``; see ``docs/differentiability.md``. In training mode with
            labels, ``loss`` alone carries gradient.

        Args:
            pixel_values: (B, 2, C, H, W) in [0, 1], C = 3 or 1; H and W at least 32. Coloured pixels are turned gray.
            labels: what is known about the pairs, in pixels of ``pixel_values``, pixel centres at + 0.5: a tensor
                (B, 3, 3) of homographies from image 0 to image 1, or a mapping with ``H_0to1``, or with ``depth0``,
                ``depth1`` (B, H, W), ``K0``, ``K1`` (B, 3, 3) and ``T_0to1`` (B, 4, 4).
            output_attentions: return attention weights; costs a second pass of the transformer.
            output_hidden_states: return the maps after each block of the backbone.
            return_dict: return an output class, not a tuple.
            kwargs: not looked at, as transformers passes some to every model.

        Returns:
            :class:`EfficientLoFTRKeypointMatchingOutput`; no match gives M = 0.

        Raises:
            ValueError, TypeError: other shapes, sizes, ranges or dtypes; labels of other names.
        """
        self._follow_config()
        images = split_pairs(pixel_values)
        attended = self._wanted(output_attentions, "output_attentions")
        shown = self._wanted(output_hidden_states, "output_hidden_states")
        learning = self.training and torch.is_grad_enabled()
        if not (attended or shown or learning or labels is not None):
            return self._returned(self._packed({"image0": images[0], "image1": images[1]}, images), return_dict)
        features, hidden = self.efficientloftr.features(images)
        loss = None
        if labels is not None:
            loss = matching_loss(self.matcher, images, features, labels, self.loss_config)
        if labels is not None and self.training:
            with torch.no_grad(), evaluation_mode(self.matcher):
                output = self._packed(features._asdict(), images)
        else:
            output = self._packed(features._asdict(), images)
        output.loss = loss
        output.hidden_states = hidden if shown else None
        output.attentions = attention_weights(self.matcher, features) if attended else None
        return self._returned(output, return_dict)

    def _packed(self, data: dict[str, Any], images: tuple[Tensor, Tensor]) -> EfficientLoFTRKeypointMatchingOutput:
        size = (images[0].shape[-2], images[0].shape[-1])
        matches, scores, keypoints = packed_matches(self.matcher(data), len(images[0]), size)
        return EfficientLoFTRKeypointMatchingOutput(matches=matches, matching_scores=scores, keypoints=keypoints)


def split_pairs(pixel_values: Any) -> tuple[Tensor, Tensor]:
    """(B, 2, C, H, W) -> two gray (B, 1, H, W).

    Raises:
        TypeError: not a tensor.
        ValueError: another shape.
    """
    if not isinstance(pixel_values, Tensor):
        raise TypeError(
            f"pixel_values: expected a tensor (B, 2, 3, H, W), got {type(pixel_values).__name__}. "
            'Call the image processor with return_tensors="pt".'
        )
    if pixel_values.ndim != 5 or pixel_values.shape[1] != 2 or pixel_values.shape[2] not in (1, 3):
        raise ValueError(
            f"pixel_values: expected shape (B, 2, 3, H, W) or (B, 2, 1, H, W), got {tuple(pixel_values.shape)}. "
            "Pairs of images are stacked along the second dimension."
        )
    gray = pixel_values[:, :, :1]
    if pixel_values.shape[2] == 3 and not _is_gray(pixel_values):
        weights = pixel_values.new_tensor(_LUMA) / sum(_LUMA)
        gray = (pixel_values * weights[:, None, None]).sum(2, keepdim=True)
    return gray[:, 0], gray[:, 1]


def _is_gray(pixel_values: Tensor) -> bool:
    red, green, blue = pixel_values.detach().unbind(2)
    return torch.equal(red, green) and torch.equal(green, blue)
