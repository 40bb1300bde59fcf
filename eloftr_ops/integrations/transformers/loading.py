# SPDX-License-Identifier: Apache-2.0
"""Weights that transformers cannot read itself: the embedded ones, checkpoints, this package's folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from eloftr_ops import EfficientLoFTR
from eloftr_ops.integrations.transformers.configuration import EfficientLoFTRConfig
from eloftr_ops.weights import embedded_names
from eloftr_ops.weights.configs import FORMAT

_HUB_ARGUMENTS = ("revision", "cache_dir", "local_files_only")


def is_ours(name_or_path: str | os.PathLike[str] | None) -> bool:
    """Embedded weights, a file of weights, or a folder that this package's own layout is in."""
    if name_or_path is None:
        return False
    path = Path(name_or_path)
    if os.fspath(name_or_path) in embedded_names() and not path.is_dir():
        return True
    if path.is_file():
        return True
    try:
        fields = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and fields.get("format") == FORMAT


def load_ours(cls: Any, name_or_path: Any, **kwargs: Any) -> Any:
    """``cls.from_pretrained`` of such weights; keyword arguments as transformers' own."""
    hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}
    if hub.get("revision") == "main":  # transformers' default; what is here has one revision
        del hub["revision"]
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    if isinstance(dtype, str):
        dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    device = _device(kwargs.pop("device_map", None))
    given, with_info = kwargs.pop("config", None), kwargs.pop("output_loading_info", False)
    source = EfficientLoFTR.from_pretrained(name_or_path, **hub)
    config = given or EfficientLoFTRConfig.from_eloftr_ops(source.config)
    for name in [name for name in kwargs if hasattr(config, name)]:
        setattr(config, name, kwargs.pop(name))
    config.name_or_path = str(name_or_path)
    attention = kwargs.pop("attn_implementation", None)
    if attention is not None:
        config._attn_implementation = attention
    model = cls(config)
    target = model.matcher.state_dict()
    state = source.state_dict()
    if any(".fused." in name for name in state):
        raise ValueError(
            f"{name_or_path}: expected weights with RepVGG's three branches, got re-parameterised ones, which "
            "transformers' layout has no names for. Load them with eloftr_ops.EfficientLoFTR.from_pretrained."
        )
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in target.items()}:
        raise ValueError(f"config: expected the architecture of {name_or_path}, got another one.")
    model.matcher.load_state_dict(state)
    if dtype is not None:
        model.to(dtype)
    model.config.dtype = model.dtype
    model = model.to(device).eval()
    if with_info:
        return model, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
    return model


def _device(device_map: Any) -> torch.device:
    """The one device of a map; these models are too small to be split."""
    if isinstance(device_map, dict):
        devices = list(dict.fromkeys(device_map.values()))
        if len(devices) != 1:
            raise ValueError(f"device_map: expected one device for these weights, got {device_map!r}.")
        device_map = devices[0]
    if device_map in (None, "cpu"):
        return torch.device("cpu")
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return torch.device(device_map)
