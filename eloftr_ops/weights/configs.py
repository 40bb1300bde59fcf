# SPDX-License-Identifier: Apache-2.0
"""Configurations as they are stored beside weights: our own, and transformers' ``EfficientLoFTRConfig``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from eloftr_ops._version import __version__
from eloftr_ops.config import EfficientLoFTRConfig, WeightLayout
from eloftr_ops.model.backbone import STAGE_STRIDES
from eloftr_ops.model.transformer import AGGREGATION
from eloftr_ops.weights.files import parse_json

FORMAT = "eloftr_ops"
VERSION = 1
SAFETENSORS, CHECKPOINT = "model.safetensors", "model.ckpt"
MODEL_TYPE = "efficientloftr"
_ROTARY_BASE = 10000.0

# transformers' field: ours
_MAPPED = {
    "out_features": "stage_channels",
    "stage_num_blocks": "stage_blocks",
    "num_attention_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "coarse_matching_temperature": "temperature",
    "coarse_matching_threshold": "threshold",
    "coarse_matching_border_removal": "border_removal",
    "fine_matching_slice_dim": "subpixel_channels",
    "fine_matching_regress_temperature": "subpixel_temperature",
}
# What the method fixes, and transformers leaves open.
_FIXED: dict[str, Any] = {
    "stage_stride": list(STAGE_STRIDES),
    "activation_function": "relu",
    "q_aggregation_kernel_size": AGGREGATION,
    "kv_aggregation_kernel_size": AGGREGATION,
    "q_aggregation_stride": AGGREGATION,
    "kv_aggregation_stride": AGGREGATION,
    "attention_dropout": 0.0,
    "attention_bias": False,
    "mlp_activation_function": "leaky_relu",
    "fine_kernel_size": 8,
    "batch_norm_eps": 1e-5,
}
# Ours that transformers has no field for; kept under FORMAT in its config.json, which transformers carries along.
_OURS_ALONE = (
    "position_scale",
    "round_rotary",
    "centred_subpixel",
    "gradient_mode",
    "soft_temperature",
    "soft_neighbourhood",
    "covariance_calibration",
)


class FolderConfig(NamedTuple):
    """What a ``config.json`` says, or a file of weights about itself."""

    config: EfficientLoFTRConfig
    layout: WeightLayout
    weights: str  # file name in the same folder
    save: str | None  # which save wrote it; None for one of another origin


def read_folder_config(fields: Mapping[str, Any], source: str) -> FolderConfig:
    """Understand the fields of a ``config.json``, ours or transformers'.

    Raises:
        ValueError: neither format, unknown fields or versions, values outside their domain or the method's.
        TypeError: values of another type.
    """
    if fields.get("format") == FORMAT:
        return _read_own(fields, source)
    if fields.get("model_type") == MODEL_TYPE:
        extra = fields.get(FORMAT)
        save = extra.get("save") if isinstance(extra, dict) else None
        return FolderConfig(from_transformers(fields, source), "transformers", SAFETENSORS, _text(save))
    raise ValueError(
        f'{source}: expected "format": "{FORMAT}" or "model_type": "{MODEL_TYPE}", '
        f"got format {fields.get('format')!r}, model_type {fields.get('model_type')!r}: not EfficientLoFTR weights."
    )


def folder_config(config: EfficientLoFTRConfig, layout: WeightLayout, dtype: torch.dtype, save: str) -> bytes:
    """The ``config.json`` that :func:`read_folder_config` reads; ``save`` names the save that it is part of."""
    fields: dict[str, Any]
    if layout == "transformers":
        fields = to_transformers(config, dtype)
        fields[FORMAT]["save"] = save
    else:
        weights = CHECKPOINT if layout == "authors" else SAFETENSORS
        fields = {
            **_header(), "version": VERSION, "weights": weights, "save": save, "config": config.to_dict()
        }  # fmt: skip
    return _dump(fields, indent=2).encode()


def preprocessor_config() -> bytes:
    """The ``preprocessor_config.json`` of transformers' image processor, which its ``pipeline`` needs."""
    fields = {
        "image_processor_type": "EfficientLoFTRImageProcessor",
        "do_resize": True,
        "size": {"height": 480, "width": 640},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_grayscale": True,
    }
    return _dump(fields, indent=2).encode()


def read_metadata(metadata: Mapping[str, str], source: str) -> FolderConfig | None:
    """What a file of weights says about itself in its metadata; ``None`` for a file of another origin."""
    if metadata.get("format") == FORMAT:
        _check_version(metadata.get("version"), source)
        fields = parse_json(metadata.get("config", ""), f"{source}: config")
        return FolderConfig(_build(fields, source), "eloftr_ops", SAFETENSORS, metadata.get("save"))
    if FORMAT not in metadata:
        return None
    described = parse_json(metadata[FORMAT], f"{source}: {FORMAT}")
    _check_version(described.get("version"), source)
    layout, values = described.get("layout"), described.get("config")
    if layout not in ("authors", "transformers") or not isinstance(values, dict):
        raise ValueError(f"{source}: {FORMAT}: expected layout and config, got {described!r}.")
    weights = CHECKPOINT if layout == "authors" else SAFETENSORS
    return FolderConfig(_build(values, source), layout, weights, _text(described.get("save")))


def metadata_for(
    config: EfficientLoFTRConfig, layout: WeightLayout = "eloftr_ops", save: str | None = None
) -> dict[str, str]:
    """The metadata that :func:`read_metadata` reads."""
    saved = {} if save is None else {"save": save}
    if layout == "eloftr_ops":
        return {**_header(), "version": str(VERSION), "config": _dump(config.to_dict()), **saved}
    described = {"version": VERSION, "layout": layout, "config": config.to_dict(), **saved}
    return {"format": "pt", FORMAT: _dump(described)}


def from_transformers(fields: Mapping[str, Any], source: str) -> EfficientLoFTRConfig:
    """Our configuration for transformers' fields; absent ones have transformers' defaults, the ``full`` model's.

    Fields that describe no computation (labels, versions, ...) and those that are unknown are passed over, as
    transformers does. Raises as :func:`read_folder_config`.
    """
    for name, fixed in _FIXED.items():
        if fields.get(name, fixed) not in (fixed, None):
            raise ValueError(f"{source}: {name}: expected {fixed!r}, which the method fixes, got {fields[name]!r}.")
    values = {ours: fields[name] for name, ours in _MAPPED.items() if fields.get(name) is not None}
    skip_softmax = fields.get("coarse_matching_skip_softmax", False)
    if not isinstance(skip_softmax, bool):
        raise TypeError(f"{source}: coarse_matching_skip_softmax: expected a bool, got {skip_softmax!r}.")
    values["score"] = "similarity" if skip_softmax else "dual_softmax"
    extra = fields.get(FORMAT, {})
    if isinstance(extra, dict):
        extra = {name: value for name, value in extra.items() if name != "save"}
    if not isinstance(extra, dict) or not set(extra) <= set(_OURS_ALONE):
        raise ValueError(f"{source}: {FORMAT}: expected some of {', '.join(_OURS_ALONE)}, got {extra!r}.")
    config = _build({**values, **extra}, source)
    _check_derived(fields, config, source)
    _check_rotary(fields, config.num_heads, source)
    return config


def to_transformers(config: EfficientLoFTRConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of transformers' ``config.json`` for a model whose ``position_scale`` is 1."""
    values = config.to_dict()
    return {
        "architectures": ["EfficientLoFTRForKeypointMatching"],
        "model_type": MODEL_TYPE,
        "dtype": str(dtype).removeprefix("torch."),
        **{name: values[ours] for name, ours in _MAPPED.items()},
        **_FIXED,
        "hidden_size": config.coarse_channels,
        "coarse_matching_skip_softmax": config.score == "similarity",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": _ROTARY_BASE,
            "partial_rotary_factor": config.num_heads / 2,
        },
        FORMAT: {name: values[name] for name in _OURS_ALONE},
    }


def _read_own(fields: Mapping[str, Any], source: str) -> FolderConfig:
    known = {"format", "version", "written_by", "weights", "save", "config"}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"{source}: unknown field(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}.")
    _check_version(fields.get("version"), source)
    values = fields.get("config")
    if not isinstance(values, dict):
        raise ValueError(f"{source}: config: expected an object of configuration fields, got {values!r}.")
    weights = fields.get("weights", SAFETENSORS)
    if weights not in (SAFETENSORS, CHECKPOINT):
        raise ValueError(f"{source}: weights: expected {SAFETENSORS} or {CHECKPOINT}, got {weights!r}.")
    layout: WeightLayout = "authors" if weights == CHECKPOINT else "eloftr_ops"
    return FolderConfig(_build(values, source), layout, str(weights), _text(fields.get("save")))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _header() -> dict[str, str]:
    return {"format": FORMAT, "written_by": f"eloftr_ops {__version__}"}


def _check_version(version: object, source: str) -> None:
    if version not in (VERSION, str(VERSION)):
        raise ValueError(
            f"{source}: version: expected {VERSION}, got {version!r}; a newer eloftr_ops may read this file."
        )


def _build(values: Mapping[str, Any], source: str) -> EfficientLoFTRConfig:
    try:
        return EfficientLoFTRConfig.from_dict(values)
    except TypeError as error:
        raise TypeError(f"{source}: {error}") from error
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{source}: {error}") from error


def _check_derived(fields: Mapping[str, Any], config: EfficientLoFTRConfig, source: str) -> None:
    channels, heads = config.coarse_channels, config.num_heads
    derived = {"hidden_size": channels, "num_key_value_heads": heads, "head_dim": channels // heads}
    for name, expected in derived.items():
        default = 256 if name == "hidden_size" else expected
        if fields.get(name, default) not in (expected, None):
            raise ValueError(f"{source}: {name}: expected {expected}, got {fields.get(name, default)!r}.")


def _check_rotary(fields: Mapping[str, Any], num_heads: int, source: str) -> None:
    """Frequencies that span the whole width: transformers derives them from the width of a head, times a factor."""
    rotary = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rotary, dict):
        raise TypeError(f"{source}: rope_parameters: expected an object, got {rotary!r}.")
    for name, default, expected in (
        ("rope_type", "default", "default"),
        ("rope_theta", _ROTARY_BASE, _ROTARY_BASE),
        ("partial_rotary_factor", 4.0, num_heads / 2),
    ):
        value = rotary.get(name, fields.get(name, default))
        if value != expected:
            raise ValueError(f"{source}: {name}: expected {expected!r} with {num_heads} heads, got {value!r}.")


def _dump(fields: Mapping[str, Any], indent: int | None = None) -> str:
    try:
        return json.dumps(fields, indent=indent, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"config: expected finite values, which JSON can hold: {error}") from error
