# SPDX-License-Identifier: Apache-2.0
"""Files of tensors and of JSON, read without executing anything."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

CHECKPOINT_SUFFIXES = (".ckpt", ".pth", ".pt", ".bin")
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COUNTER = "num_batches_tracked"  # of BatchNorm: the only entries that are not floating point
JSON_LIMIT = 1_000_000  # bytes; a configuration takes about a thousand


class WeightsNotFoundError(FileNotFoundError, ValueError):
    """The weights do not exist or cannot be downloaded; the message says what to do."""


def read_content(path: Path) -> tuple[Mapping[Any, Any], dict[str, str]]:
    """What a file holds, dictionaries of tensors at any depth, and its metadata.

    Raises:
        WeightsNotFoundError: no such file.
        ValueError: a damaged file, one that holds code, or a name that ends in none of the known ways.
    """
    if not path.is_file():
        raise WeightsNotFoundError(f"{path}: expected a file of weights, found none; check the path.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in CHECKPOINT_SUFFIXES:
        return _read_checkpoint(path)
    known = ", ".join((".safetensors", *CHECKPOINT_SUFFIXES))
    raise ValueError(f"{path}: expected a file name that ends in one of {known}, got {path.suffix!r}.")


def plain_state(content: Mapping[Any, Any], source: str) -> dict[str, Tensor]:
    """The state dict of a file in which no matcher was found, for the messages that say what is wrong.

    Raises:
        ValueError: no state dict at all.
    """
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping) or not state:
        raise ValueError(
            f'{source}: expected {{"state_dict": {{name: tensor}}}} or {{name: tensor}}, got {type(state).__name__}.'
        )
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{source}: expected tensors by name, got {type(tensor).__name__} under {name!r}; "
                "save the model's state_dict alone."
            )
    return dict(state)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        WeightsNotFoundError: no such file.
        ValueError: not an object of finite numbers, strings and lists, or larger than any configuration.
    """
    if not path.is_file():
        raise WeightsNotFoundError(f"{path}: expected a configuration file, found none; check the path.")
    if path.stat().st_size > JSON_LIMIT:
        raise ValueError(f"{path}: expected a configuration of at most {JSON_LIMIT} bytes, got {path.stat().st_size}.")
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, source: str) -> dict[str, Any]:
    """The JSON object in ``text``; errors as :func:`read_json`, naming ``source``."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: expected a JSON object of finite values: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(value).__name__}.")
    return value


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        # One read of one file: safe_open opens it by name a second time, when another may have taken its place.
        content = path.read_bytes()
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return tensors, header.get("__metadata__") or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a safetensors file, got a damaged or other one ({error}); fetch it again."
        ) from error


def _read_checkpoint(path: Path) -> tuple[Mapping[Any, Any], dict[str, str]]:
    """Nested dictionaries, and what :func:`save_pretrained` notes beside them."""
    _check_uncompressed(path)
    with path.open("rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(_refusal(path, error)) from error
        except Exception as error:  # a damaged pickle or archive raises nearly anything
            reason = (str(error).splitlines() or ["no content"])[0]
            raise ValueError(
                f"{path}: expected a PyTorch checkpoint, got a damaged or truncated file "
                f"({type(error).__name__}: {reason}); fetch it again."
            ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f'{path}: expected {{"state_dict": {{name: tensor}}}} or {{name: tensor}}, got {type(content).__name__}.'
        )
    noted = content.get("eloftr_ops")
    return content, {"eloftr_ops": noted} if isinstance(noted, str) else {}


def _check_uncompressed(path: Path) -> None:
    """Refuse compressed records, which ``torch.save`` never writes: a small file could fill the memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception:  # the old format, or damaged: torch.load says so
        return
    packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    if packed or sum(record.file_size for record in records) > path.stat().st_size:
        name = packed[0] if packed else "the whole"
        raise ValueError(
            f"{path}: refused: expected records that are stored as they are, as torch.save writes them, got {name} "
            "compressed. Unpacking it could fill the memory. Fetch the file again from its authors."
        )


def _refusal(path: Path, error: Exception) -> str:
    """Why a pickle was refused. torch's own text is left out: it suggests to load the file all the same."""
    named_type = re.search(r"GLOBAL ([\w.]+)", str(error))
    reason = (
        f"it asks for {named_type[1]}, which is not a tensor" if named_type else "it is damaged or no checkpoint at all"
    )
    return (
        f"{path}: refused: expected a checkpoint of tensors only, but {reason}. Loading it could run code, so nothing "
        "in it was run. Fetch it again from its authors; or, in a place where running it is harmless, save its "
        "state_dict with safetensors.torch.save_file(state_dict, 'weights.safetensors') and load that file here."
    )


def check_plain(name: str, tensor: Tensor) -> None:
    """Refuse what is not a dense tensor with every element in the file: views can claim sizes that exhaust memory."""
    counter = name.endswith(COUNTER)
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(f"{name}: expected a dense tensor, got {tensor.layout} on {tensor.device}.")
    if counter and tensor.dtype != torch.int64:
        raise ValueError(f"{name}: expected torch.int64, got {tensor.dtype}.")
    if not counter and tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, FLOAT_DTYPES))}, got {tensor.dtype}.")
    shape = tuple(tensor.shape)
    if tensor.numel() == 0:
        raise ValueError(f"{name}: expected elements, got the empty shape {shape}.")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{name}: expected every element of {shape} in the file, got a view of fewer.")


def _refuse_constant(text: str) -> float:
    raise ValueError(f"expected a finite number, got {text}")


def _finite(text: str) -> float:
    value = float(text)
    return value if abs(value) != float("inf") else _refuse_constant(text)
