# SPDX-License-Identifier: Apache-2.0
"""Stored weights from a file, a folder or a Hub repository, whole or in shards, with the configuration of one save."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eloftr_ops.weights.configs import SAFETENSORS, FolderConfig, read_folder_config, read_metadata
from eloftr_ops.weights.files import WeightsNotFoundError, plain_state, read_content, read_json
from eloftr_ops.weights.hub import Repository
from eloftr_ops.weights.layouts import Stored, guess_layout
from eloftr_ops.weights.selection import choose_weights

_PICKLED = "pytorch_model.bin"  # transformers' older name
_ATTEMPTS, _PAUSE = 6, 0.05  # while another process writes the folder; pause in seconds
_MOST_SHARDS = 1000


def from_file(path: Path, entry: str | None) -> Stored:
    """A file alone; its metadata tell the configuration if we wrote it."""
    stored, own = _read([path], str(path), None, entry)
    return stored if own is None else stored._replace(layout=own.layout, config=own.config)


def from_folder(folder: Path, entry: str | None, variant: str | None) -> Stored:
    """A folder with ``config.json``. Weights and configuration are always those of one save.

    A writer replaces one file after the other. Where they name two saves, the folder is read again; where that does not
    help, since the writer was killed in between, the configuration inside the weights counts.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise WeightsNotFoundError(
            f"{folder}: expected config.json beside the weights in the folder, found none; complete the folder, or "
            "pass the path of the weights file itself."
        )
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE)
        described = read_folder_config(read_json(file), str(file))
        files = _weight_files(lambda name: _existing(folder / name), described.weights, variant)
        files = files or _only_variant(folder, variant) or [folder / described.weights]
        stored, own = _read(files, str(files[0]), described, entry)
        if own is None or own.save in (None, described.save):
            return stored
    warnings.warn(
        f"{folder}: config.json and the weights are of two saves, of which one was interrupted. The configuration that "
        "the weights carry is used. Save the model again to mend the folder.",
        stacklevel=4,
    )
    return stored if own is None else stored._replace(layout=own.layout, config=own.config)


def from_hub(repository: Repository, entry: str | None, variant: str | None) -> Stored:
    """A repository of the Hub, all files of one commit."""
    file = repository.fetch("config.json")
    described = read_folder_config(read_json(file), f"{repository.name}/config.json")
    pinned = repository.pinned(file)
    files = _weight_files(pinned.try_fetch, described.weights, variant)
    files = files or [pinned.fetch(_with_variant(described.weights, variant))]  # which says what is wrong
    return _read(files, f"{repository.name}/{files[0].name}", described, entry)[0]


def _read(
    files: list[Path], source: str, described: FolderConfig | None, entry: str | None
) -> tuple[Stored, FolderConfig | None]:
    """The weights in the files, and what they say about themselves."""
    content: dict[Any, Any] = {}
    metadata: dict[str, str] = {}
    for path in files:
        held, metadata = read_content(path)
        twice = content.keys() & held.keys()
        if twice:
            raise ValueError(f"{path}: expected every entry in one shard, got {min(map(str, twice))} again.")
        content |= held
    chosen = choose_weights(content, source, entry)
    tensors = plain_state(content, source) if chosen is None else chosen.tensors
    if chosen is not None and chosen.entry not in ("", "matcher", "state_dict", "state_dict.matcher"):
        source = f"{source} ({chosen.entry})"
    if described is None:
        stored = Stored(tensors, guess_layout(tensors), None, source)
    else:
        stored = Stored(tensors, described.layout, described.config, source)
    return stored, read_metadata(metadata, source)


def _weight_files(fetch: Callable[[str], Path | None], weights: str, variant: str | None) -> list[Path] | None:
    """The files that hold the weights, by the names that transformers gives them; None where there are none."""
    for name in (weights, _PICKLED) if weights == SAFETENSORS else (weights,):
        whole = fetch(_with_variant(name, variant))
        if whole is not None:
            return [whole]
        index = fetch(_with_variant(f"{name}.index.json", variant))
        if index is not None:
            return _shards(index, fetch)
    return None


def _shards(index: Path, fetch: Callable[[str], Path | None]) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index}: expected weight_map, file names by parameter, got {type(places).__name__}.")
    names = sorted(set(places.values()))
    strange = [name for name in names if Path(name).name != name]
    if strange or not 0 < len(names) <= _MOST_SHARDS:
        raise ValueError(
            f"{index}: expected the names of 1 to {_MOST_SHARDS} files beside it, got {(strange or names)[:3]}."
        )
    found = [(name, fetch(name)) for name in names]
    missing = [name for name, path in found if path is None]
    if missing:
        raise WeightsNotFoundError(f"{index}: expected the file {missing[0]} beside it, found none.")
    return [path for _, path in found if path is not None]


def _only_variant(folder: Path, variant: str | None) -> list[Path] | None:
    """The one variant of a folder that has no plain weights; it is found without being named."""
    if variant is not None:
        raise WeightsNotFoundError(
            f"{folder / _with_variant(SAFETENSORS, variant)}: expected the weights of variant {variant!r}, found none."
        )
    found = sorted(path for path in folder.glob("model.*.safetensors") if "-of-" not in path.name)
    if len(found) > 1:
        names = ", ".join(path.name.split(".", 1)[1].removesuffix(".safetensors") for path in found)
        raise ValueError(f"{folder}: expected one set of weights, got the variants {names}. Pass variant=.")
    return found or None


def _with_variant(name: str, variant: str | None) -> str:
    if variant is None:
        return name
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}.{variant}.{suffix}"


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None
