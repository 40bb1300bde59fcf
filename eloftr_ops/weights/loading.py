# SPDX-License-Identifier: Apache-2.0
"""``load_pretrained``: a model from the embedded weights, a file, a folder or the Hub."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eloftr_ops.config import EfficientLoFTRConfig
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.weights.files import CHECKPOINT_SUFFIXES, FLOAT_DTYPES, WeightsNotFoundError
from eloftr_ops.weights.hub import Repository, is_repository
from eloftr_ops.weights.layouts import Stored, build_model, infer_config, our_names
from eloftr_ops.weights.sources import from_file, from_folder, from_hub

_SUFFIX = ".safetensors"


def load_pretrained(
    name_or_path: str | os.PathLike[str] = "small",
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    entry: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: EfficientLoFTRConfig | None = None,
    **config_changes: Any,
) -> EfficientLoFTR:
    """A model with trained weights, in evaluation mode.

    Nothing in a file is executed: weights are safetensors, or checkpoints read by ``torch.load(weights_only=True)``.

    Args:
        name_or_path: one of, tried in this order:

            - the name of embedded weights (:func:`embedded_names`); write ``./small`` for a folder of that name;
            - a file: ``.safetensors``, or a checkpoint (``.ckpt``, ``.pth``, ``.pt``, ``.bin``): the authors', ours,
              or a trainer's, with the weights in nested dictionaries and under prefixes such as ``module.matcher.``.
              Without a stored configuration the shapes give the architecture; heads (8) and matching parameters are
              those of ``full``. Pass ``config`` for others;
            - a folder with ``config.json`` and weights, as :func:`save_pretrained` and transformers write, also in
              shards or as ``pytorch_model.bin``;
            - a Hub repository, ``organisation/name``, such as ``zju-community/efficientloftr``. A path whose first
              folder exists here is not looked up there.
        revision: branch, tag or commit of the Hub repository; a commit pins the weights.
        cache_dir: of the Hub; its default is ``HF_HOME``'s.
        local_files_only: take Hub files from the cache alone; the ``HF_HUB_OFFLINE`` variable does the same.
        variant: of the weights in a folder or repository, for instance "fp16" for ``model.fp16.safetensors``. The only
            variant of a folder needs no name.
        entry: which weights to take where a file holds several, for instance averaged ones; the error lists them.
        device: of the model.
        dtype: of the model, whatever the file stores: float32, float64, float16 or bfloat16.
        config: the configuration to use instead of the stored one.
        config_changes: fields of the configuration to use in place of the stored ones, for instance ``threshold``,
            ``border_removal``, ``position_scale`` or ``gradient_mode``; None leaves a field alone.
            ``score="similarity"`` is the authors' *optimized* inference; it needs another threshold (theirs: 25).

    Raises:
        WeightsNotFoundError: (a ``FileNotFoundError`` and a ``ValueError``) no such file, folder, name or repository,
            or no connection; the message says what to do.
        ValueError: a damaged file, one that holds code, other names or shapes than the configuration's, values that
            are not finite, a configuration of another method.
        TypeError: values of another type, in the arguments or in a configuration.
    """
    _check_types(name_or_path, dtype, config)
    changes = {name: value for name, value in config_changes.items() if value is not None}
    hub = HubOptions(revision, cache_dir, local_files_only)
    stored = _find(name_or_path, hub, variant, entry)
    tensors = our_names(stored)
    config = config or stored.config or infer_config(tensors, stored.source)
    config = config.replace(**changes)
    return build_model(tensors, config, stored.layout, stored.source, torch.device(device), dtype)


def embedded_names() -> list[str]:
    """Names of the weights that come with the package."""
    files = resources.files("eloftr_ops.weights").iterdir()
    return sorted(file.name.removesuffix(_SUFFIX) for file in files if file.name.endswith(_SUFFIX))


def _check_types(name_or_path: object, dtype: object, config: object) -> None:
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"name_or_path: expected a name or a path, got {type(name_or_path).__name__}.")
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, FLOAT_DTYPES))}, got {dtype!r}.")
    if config is not None and not isinstance(config, EfficientLoFTRConfig):
        raise TypeError(f"config: expected an EfficientLoFTRConfig, got {type(config).__name__}.")


class HubOptions(NamedTuple):
    """How a repository is fetched."""

    revision: str | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool


def _find(name_or_path: str | os.PathLike[str], hub: HubOptions, variant: str | None, entry: str | None) -> Stored:
    name, path = os.fspath(name_or_path), _expanded(name_or_path)
    named = isinstance(name_or_path, str)
    embedded = named and name in embedded_names()
    on_hub = named and not embedded and is_repository(name) and not _looks_local(path)
    if hub.revision is not None and not on_hub:
        raise ValueError(
            f"revision: expected None, since {name!r} is no Hub repository (organisation/name), got {hub.revision!r}."
        )
    if on_hub:
        return from_hub(Repository(name, *hub), entry, variant)
    if embedded:
        with resources.as_file(resources.files("eloftr_ops.weights") / (name + _SUFFIX)) as file:
            return from_file(file, entry)
    if path.is_dir():
        return from_folder(path, entry, variant)
    if path.is_file():
        return from_file(path, entry)
    names = ", ".join(embedded_names()) or "none in this installation"
    raise WeightsNotFoundError(
        f"name_or_path: expected the name of embedded weights ({names}), a file, a folder or a Hub repository "
        f"(organisation/name), got {name!r}, which is none of these; check the spelling and the path."
    )


def _looks_local(path: Path) -> bool:
    """It exists, or names a file of weights, or lies in a folder that exists here: no organisation is called so."""
    return path.exists() or path.suffix in (_SUFFIX, *CHECKPOINT_SUFFIXES) or path.parent.is_dir()


def _expanded(name_or_path: str | os.PathLike[str]) -> Path:
    """With the home folder in place of ``~``; as it is where there is no such user."""
    try:
        return Path(name_or_path).expanduser()
    except RuntimeError:
        return Path(name_or_path)
