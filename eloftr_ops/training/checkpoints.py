# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive a kill: the pieces are written first, then the manifest that makes them valid.

``step-00001200.json`` lists size and SHA-256 of ``step-00001200.000``, ``.001`` ...; joined they are what
``torch.save`` wrote. They are read by ``torch.load(weights_only=True)``: nothing in them is ever executed.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from eloftr_ops.storage import write_file

KEPT = 2
_NAME = re.compile(r"step-(\d{8})\.(json|\d{3})")
_LOADING_ERRORS = (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile)


class CheckpointError(ValueError):
    """No checkpoint of a folder can be used."""


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], *, piece_mib: int | None = None) -> None:
    """Write the state of ``step``; the last two checkpoints are kept.

    Args:
        folder: of the checkpoints.
        step: number of steps done.
        state: tensors, numbers and texts, in dictionaries and lists.
        piece_mib: largest size of a file, MiB; None for one file.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getvalue()
    size = len(content) if piece_mib is None else piece_mib * 2**20
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    if len(pieces) > 1000:
        raise ValueError(f"piece_mib: expected at most 1000 pieces, got {len(pieces)}. Use larger ones.")
    folder.mkdir(parents=True, exist_ok=True)
    # A manifest of the same step would speak of the old pieces while they are replaced.
    _manifest(folder, step).unlink(missing_ok=True)
    for number, piece in enumerate(pieces):
        write_file(_piece(folder, step, number), piece)
    manifest = [{"bytes": len(piece), "sha256": hashlib.sha256(piece).hexdigest()} for piece in pieces]
    write_file(_manifest(folder, step), json.dumps({"step": step, "pieces": manifest}).encode())
    _remove_all_but(folder, _steps(folder)[-KEPT:])


def load_checkpoint(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """Load the newest complete checkpoint and its step; None if there was never one.

    A damaged checkpoint is skipped with a ``UserWarning``.

    Raises:
        CheckpointError: there are checkpoints, but none that can be used.
    """
    problems = []
    for step in reversed(_steps(folder)):
        try:
            state = _read(folder, step)
        except (OSError, *_LOADING_ERRORS) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            problems.append(f"{_manifest(folder, step)}: {reason}")
            warnings.warn(f"checkpoint passed over: {problems[-1]}", stacklevel=2)
            continue
        return step, state
    if problems:
        raise CheckpointError(
            f"{folder}: expected a whole checkpoint, got damaged ones ({'; '.join(problems)}). "
            "Delete the folder to start anew."
        )
    return None


def _read(folder: Path, step: int) -> dict[str, Any]:
    manifest = json.loads(_manifest(folder, step).read_bytes())
    if not isinstance(manifest, dict) or not isinstance(manifest.get("pieces"), list):
        raise ValueError("expected a manifest with pieces, got something else")
    content = b""
    for number, expected in enumerate(manifest["pieces"]):
        piece = _piece(folder, step, number).read_bytes()
        actual = {"bytes": len(piece), "sha256": hashlib.sha256(piece).hexdigest()}
        if actual != expected:
            raise ValueError(f"piece {number} is not the one that was written ({len(piece)} bytes)")
        content += piece
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"expected a dictionary, got {type(state).__name__}")
    return state


def _steps(folder: Path) -> list[int]:
    """Steps that have a manifest, ascending."""
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match and match[2] == "json")


def _remove_all_but(folder: Path, steps: list[int]) -> None:
    """Manifests first, so that there never is one whose pieces are gone."""
    named = [(path, match) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    stale = [(path, match[2]) for path, match in named if int(match[1]) not in steps]
    for path, _ in sorted(stale, key=lambda item: item[1] != "json"):
        path.unlink()


def _manifest(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.json"


def _piece(folder: Path, step: int, number: int) -> Path:
    return folder / f"step-{step:08d}.{number:03d}"
