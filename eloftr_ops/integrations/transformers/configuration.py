# SPDX-License-Identifier: Apache-2.0
"""transformers' configuration of EfficientLoFTR: its fields and names, this package's checks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from eloftr_ops.config import EfficientLoFTRConfig as OperatorConfig
from eloftr_ops.weights.configs import FORMAT, MODEL_TYPE, from_transformers, to_transformers

__all__ = ["EfficientLoFTRConfig"]

# Fields that may change after the model was built; the model follows at its next call.
RUNTIME_FIELDS = (
    "coarse_matching_skip_softmax",
    "coarse_matching_threshold",
    "coarse_matching_temperature",
    "coarse_matching_border_removal",
    "fine_matching_regress_temperature",
    FORMAT,
)
_OWN = ("architectures", "model_type", "dtype", FORMAT)  # of to_transformers, set by other means


class EfficientLoFTRConfig(PreTrainedConfig):
    """Description of a model in transformers' words; the defaults are the ``full`` model's.

    Fields that the method fixes (strides, aggregation, activations, window size) are accepted with their one value.

    Args:
        stage_num_blocks: RepVGG blocks of the four stages.
        out_features: widths of the four stages.
        stage_stride: of the stages; fixed.
        hidden_size: width of the coarse map, the last of ``out_features``.
        activation_function: of the backbone; fixed.
        q_aggregation_kernel_size: fixed, as the next three.
        kv_aggregation_kernel_size: see above.
        q_aggregation_stride: see above.
        kv_aggregation_stride: see above.
        num_attention_layers: pairs of self- and cross-attention.
        num_attention_heads: attention heads.
        attention_dropout: fixed to none.
        attention_bias: fixed to False.
        mlp_activation_function: fixed.
        coarse_matching_skip_softmax: scores are raw similarities instead of probabilities.
        coarse_matching_threshold: matches score above it.
        coarse_matching_temperature: of the coarse similarities.
        coarse_matching_border_removal: cells next to the border that take part in no match.
        fine_kernel_size: fixed.
        batch_norm_eps: fixed.
        rope_parameters: of the rotary positions; fixed by the number of heads.
        fine_matching_slice_dim: channels of the sub-pixel stage.
        fine_matching_regress_temperature: of the sub-pixel stage.
        initializer_range: kept for files; convolutions are initialised as PyTorch does.
        eloftr_ops: fields of :class:`eloftr_ops.EfficientLoFTRConfig` that transformers has no name for, such as
            ``gradient_mode``.
        kwargs: fields of every transformers configuration.

    Raises:
        ValueError: a value outside its domain or the method's; the message names the field.
        TypeError: a value of another type.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        stage_num_blocks: list[int] | None = None,
        out_features: list[int] | None = None,
        stage_stride: list[int] | None = None,
        hidden_size: int | None = None,
        activation_function: str = "relu",
        q_aggregation_kernel_size: int = 4,
        kv_aggregation_kernel_size: int = 4,
        q_aggregation_stride: int = 4,
        kv_aggregation_stride: int = 4,
        num_attention_layers: int = 4,
        num_attention_heads: int = 8,
        attention_dropout: float = 0.0,
        attention_bias: bool = False,
        mlp_activation_function: str = "leaky_relu",
        coarse_matching_skip_softmax: bool = False,
        coarse_matching_threshold: float = 0.2,
        coarse_matching_temperature: float = 0.1,
        coarse_matching_border_removal: int = 2,
        fine_kernel_size: int = 8,
        batch_norm_eps: float = 1e-5,
        rope_parameters: dict[str, Any] | None = None,
        fine_matching_slice_dim: int = 8,
        fine_matching_regress_temperature: float = 10.0,
        initializer_range: float = 0.02,
        eloftr_ops: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        given = {k: v for k, v in locals().items() if k not in ("self", "kwargs") and not k.startswith("__")}
        for name, value in given.items():
            setattr(self, name, value)
        self.stage_num_blocks = list(stage_num_blocks or (1, 2, 4, 14))
        self.out_features = list(out_features or (64, 64, 128, 256))
        self.stage_stride = list(stage_stride or (2, 1, 2, 2))
        self.hidden_size = self.out_features[-1] if hidden_size is None else hidden_size
        self.eloftr_ops = dict(eloftr_ops or {})
        self.rope_parameters = _rope(rope_parameters, num_attention_heads, kwargs)
        super().__init__(**kwargs)
        self.to_eloftr_ops()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own, but files of another model type are refused.

        Raises:
            ValueError: ``model_type`` is not ``efficientloftr``.
        """
        found = config_dict.get("model_type", MODEL_TYPE)
        if found != MODEL_TYPE:
            raise ValueError(
                f"model_type: expected {MODEL_TYPE!r}, got {found!r}: these are weights of another model. "
                "Load them with transformers' own classes."
            )
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_eloftr_ops(cls, config: OperatorConfig, **kwargs: Any) -> EfficientLoFTRConfig:
        """The same model in transformers' words.

        Args:
            config: of an :class:`eloftr_ops.EfficientLoFTR`.
            kwargs: fields of every transformers configuration.

        Raises:
            TypeError: ``config`` is something else.
        """
        if not isinstance(config, OperatorConfig):
            raise TypeError(f"config: expected an eloftr_ops.EfficientLoFTRConfig, got {type(config).__name__}.")
        fields = to_transformers(config, torch.float32)
        shared = {name: value for name, value in fields.items() if name not in _OWN}
        return cls(**shared, eloftr_ops=fields[FORMAT], **kwargs)

    def to_eloftr_ops(self) -> OperatorConfig:
        """The configuration of the operator, :class:`eloftr_ops.EfficientLoFTR`.

        Raises:
            ValueError, TypeError: as the constructor, for fields that were changed since.
        """
        fields = {name: value for name, value in vars(self).items() if name not in _OWN and not name.startswith("_")}
        return from_transformers({**fields, FORMAT: dict(self.eloftr_ops)}, "config")


def _rope(given: dict[str, Any] | None, heads: Any, legacy: dict[str, Any]) -> dict[str, Any]:
    """The method's rotary positions: frequencies that span the whole width, whatever the number of heads."""
    old = legacy.pop("rope_scaling", None)
    factor = heads / 2 if isinstance(heads, int) else 4.0
    default = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}
    top = {name: legacy.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in legacy}
    return {**default, **top, **(old or {}), **(given or {})}
