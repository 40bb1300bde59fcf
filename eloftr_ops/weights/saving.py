# SPDX-License-Identifier: Apache-2.0
"""``save_pretrained`` in three layouts, and the single file that the package embeds."""

from __future__ import annotations

import io
import os
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import safetensors.torch
import torch
from torch import Tensor

from eloftr_ops.config import WeightLayout
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.storage import write_file, write_folder
from eloftr_ops.weights.configs import (
    CHECKPOINT,
    FORMAT,
    SAFETENSORS,
    folder_config,
    metadata_for,
    preprocessor_config,
)
from eloftr_ops.weights.files import COUNTER, FLOAT_DTYPES
from eloftr_ops.weights.layouts import AUTHORS_PREFIX
from eloftr_ops.weights.names import to_layout

EMBEDDED_LIMIT = 8_000_000  # bytes


def save_pretrained(
    model: EfficientLoFTR, folder: str | os.PathLike[str], *, layout: WeightLayout = "eloftr_ops"
) -> None:
    """Write a folder that :func:`load_pretrained` loads to the same model, bit by bit.

    Each file is replaced in one step, weights first. Both files name the save that they are part of, and the weights
    carry their configuration too: a reader never takes the configuration of another model, even where the writer was
    killed between the two files. Writers of one folder on one machine take turns.

    Args:
        model: in training or re-parameterised form, on any device.
        folder: where; parent folders are made.
        layout: the names and files that are written:

            - ``eloftr_ops``: ``config.json`` and ``model.safetensors`` with our names;
            - ``authors``: ``model.ckpt``, ``{"state_dict": {"matcher.<name>": tensor}}`` with the authors' names, and
              our ``config.json``, since a checkpoint does not tell heads or matching parameters;
            - ``transformers``: ``config.json``, ``preprocessor_config.json`` and ``model.safetensors`` that
              ``EfficientLoFTRForKeypointMatching.from_pretrained`` loads strictly. It computes the same coarse
              scores up to the rounding of rotary tables. It has no counterpart of ``centred_subpixel`` (a
              ``UserWarning`` says so: positions in image 1 differ by about a pixel there), nor of re-parameterised
              blocks or ``position_scale`` (both refused).

    Raises:
        ValueError: unknown layout, weights that are not finite, or a model that the layout cannot hold.
        TypeError: ``model`` is not an :class:`EfficientLoFTR`.
        OSError: the folder cannot be written.
    """
    if layout not in get_args(WeightLayout):
        raise ValueError(f"layout: expected one of {', '.join(get_args(WeightLayout))}, got {layout!r}.")
    state = _state(model)
    if layout == "transformers":
        _check_expressible(model, state)
    prefix = AUTHORS_PREFIX if layout == "authors" else ""
    state = {prefix + to_layout(name, layout): tensor for name, tensor in state.items()}
    save = uuid.uuid4().hex
    metadata = metadata_for(model.config, layout, save)
    if layout == "authors":
        buffer = io.BytesIO()
        torch.save({"state_dict": state, FORMAT: metadata[FORMAT]}, buffer)
        weights = {CHECKPOINT: buffer.getvalue()}
    else:
        weights = {SAFETENSORS: safetensors.torch.save(state, metadata)}
    if layout == "transformers":
        weights["preprocessor_config.json"] = preprocessor_config()
    dtype = next(model.parameters()).dtype
    write_folder(Path(folder), {**weights, "config.json": folder_config(model.config, layout, dtype, save)})


def write_embedded(
    model: EfficientLoFTR,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] | None = None,
    limit: int = EMBEDDED_LIMIT,
) -> int:
    """Write one ``.safetensors`` file with the configuration in its metadata, as the package embeds it.

    Convolutions and projections are stored in ``dtype``; vectors (norms and their statistics) stay float32, since
    they cost little and rounding them costs accuracy. :func:`load_pretrained` gives float32 again.

    Args:
        model: trained model, in either form.
        path: of the file; replaced in one step.
        dtype: of everything that is not a vector: float16, bfloat16 or float32.
        metadata: more to keep in the file (training data, steps, ...), text by name.
        limit: largest size in bytes.

    Returns:
        The size in bytes.

    Raises:
        ValueError: a larger file, another suffix, values that are not finite in ``dtype``, metadata names in use.
        TypeError: ``model`` is not an :class:`EfficientLoFTR`, ``dtype`` is none of these, metadata is not text.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"path: expected a name that ends in .safetensors, got {os.fspath(path)!r}.")
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, FLOAT_DTYPES))}, got {dtype!r}.")
    header = metadata_for(model.config)
    for name, text in (metadata or {}).items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(f"metadata: expected text by name, got {text!r} under {name!r}.")
        if name in header:
            raise ValueError(f"metadata: expected other names than {', '.join(header)}, got {name!r}.")
    state = {
        name: tensor.to(dtype if tensor.dim() > 1 else torch.float32).contiguous()
        for name, tensor in _state(model).items()
        if not name.endswith(COUNTER)
    }
    _check_finite(state)
    content = safetensors.torch.save(state, {**header, **(metadata or {})})
    if len(content) > limit:
        raise ValueError(f"model: expected at most {limit} bytes in {dtype}, got {len(content)}.")
    write_file(Path(path), content)
    return len(content)


def _state(model: EfficientLoFTR) -> dict[str, Tensor]:
    if not isinstance(model, EfficientLoFTR):
        raise TypeError(f"model: expected an EfficientLoFTR, got {type(model).__name__}.")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    _check_finite(state)
    return state


def _check_finite(state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"model: {name}: expected values that are finite in {tensor.dtype}, got NaN or infinity.")


def _check_expressible(model: EfficientLoFTR, state: Mapping[str, Tensor]) -> None:
    if any(".fused." in name for name in state):
        raise ValueError(
            "layout: transformers has no re-parameterised blocks; expected the model before fused(), got a fused one. "
            "Save that one, or use layout='authors'."
        )
    if model.config.position_scale != (1.0, 1.0):
        raise ValueError(
            f"layout: transformers has no position_scale; expected (1.0, 1.0), got {model.config.position_scale}. "
            "Load the weights with position_scale=(1.0, 1.0) and save that model."
        )
    if model.config.centred_subpixel:
        warnings.warn(
            "transformers has no centred_subpixel: coarse matches stay the same, but its sub-pixel stage looks a pixel "
            "up and left of the matched one.",
            stacklevel=4,
        )
