# SPDX-License-Identifier: Apache-2.0
"""The record of a run: plain JSON with a schema that is checked when it is written and when it is read."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
SUITES = ("kernels", "launch", "matcher", "cpu")
STATUSES = ("timed", "not run", "refused", "failed")
PACKAGES = ("torch", "triton", "kornia", "transformers", "numpy")
_NUMBER = (int, float)
_OPTIONAL_NUMBER = (int, float, type(None))
_OPTIONAL_TEXT = (str, type(None))

# field -> what its value may be: types, a tuple of allowed strings, a nested schema, or a list of one of these
ROW: dict[str, Any] = {
    "name": str,
    "status": STATUSES,
    "reason": _OPTIONAL_TEXT,  # of a row that is not timed
    "median_s": _OPTIONAL_NUMBER,
    "q1_s": _OPTIONAL_NUMBER,
    "q3_s": _OPTIONAL_NUMBER,
    "repeats": int,
    "peak_bytes": _OPTIONAL_NUMBER,
    "operations": _OPTIONAL_NUMBER,
    "bytes": _OPTIONAL_NUMBER,
    "limit_fraction": _OPTIONAL_NUMBER,  # least time by the measured limits / median time
    "pairs": int,
    "matches": (int, type(None)),
    "agreement": _OPTIONAL_NUMBER,  # share of matches found by the plain float32 model too
}
CASE: dict[str, Any] = {
    "name": str,
    "group": str,
    "measure": str,
    "baseline": _OPTIONAL_TEXT,  # the row that the others are compared with
    "pixels": (int, type(None)),
    "gate": str,  # what was held against what before timing
    "rows": [ROW],
}
RECORD: dict[str, Any] = {
    "schema": int,
    "suite": SUITES,
    "device": {"kind": ("cuda", "cpu"), "name": str},
    "dtype": ("fp32", "fp16", "bf16", "mixed"),
    "quick": bool,
    "environment": {
        "commit": str,
        "dirty": (bool, type(None)),
        "time": str,
        "versions": {"python": str, **dict.fromkeys(PACKAGES, _OPTIONAL_TEXT)},
        "threads": int,
        "load_average": [_NUMBER],
        "float32_matmul_precision": str,
    },
    "limits": {
        "copy_bytes_per_s": _OPTIONAL_NUMBER,
        "matmul_op_per_s": _OPTIONAL_NUMBER,
        "convolution_fp32_op_per_s": _OPTIONAL_NUMBER,
        "convolution_bf16_op_per_s": _OPTIONAL_NUMBER,
    },
    "seconds": _NUMBER,  # the whole run
    "cases": [CASE],
}


def validate(value: Any, schema: Any = RECORD, path: str = "record") -> None:
    """Check ``value`` against ``schema``.

    Raises:
        ValueError: fields missing or unknown, values of another type, or numbers that are not finite; with the path.
    """
    if isinstance(schema, dict):
        if not isinstance(value, dict) or set(value) != set(schema):
            keys = sorted(value) if isinstance(value, dict) else repr(value)
            raise ValueError(f"{path}: expected the fields {sorted(schema)}, got {keys}.")
        for key, inner in schema.items():
            validate(value[key], inner, f"{path}.{key}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise ValueError(f"{path}: expected a list, got {value!r}.")
        for index, item in enumerate(value):
            validate(item, schema[0], f"{path}[{index}]")
    elif isinstance(schema, tuple) and all(isinstance(choice, str) for choice in schema):
        if value not in schema:
            raise ValueError(f"{path}: expected one of {schema}, got {value!r}.")
    else:
        _validate_leaf(value, schema if isinstance(schema, tuple) else (schema,), path)


def check_record(record: dict[str, Any]) -> None:
    """:func:`validate`, and: this schema's version, and times exactly where a row was timed.

    Raises:
        ValueError: with the path.
    """
    validate(record)
    if record["schema"] != SCHEMA:
        raise ValueError(f"record.schema: expected {SCHEMA}, got {record['schema']}.")
    for case in record["cases"]:
        for row in case["rows"]:
            timed = row["status"] == "timed"
            where = f"{case['name']}, {row['name']}"
            if timed != (row["median_s"] is not None):
                raise ValueError(f"{where}: expected a median exactly where the status is 'timed'.")
            if timed == bool(row["reason"]):
                raise ValueError(f"{where}: expected a reason exactly where the status is not 'timed'.")


def empty_row(name: str, status: str, reason: str | None = None) -> dict[str, Any]:
    """A row with nothing measured yet."""
    row: dict[str, Any] = dict.fromkeys(ROW)
    return {**row, "name": name, "status": status, "reason": reason, "repeats": 0, "pairs": 1}


def file_name(record: dict[str, Any]) -> str:
    """``<suite>--<device>--<dtype>.json``."""
    device = "cpu" if record["device"]["kind"] == "cpu" else record["device"]["name"]
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{record['suite']}--{slug}--{record['dtype']}.json"


def write(record: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Check and write; returns the file."""
    check_record(record)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(record)
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> dict[str, Any]:
    """Read and check.

    Raises:
        ValueError: not JSON or not a record; names the file.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        check_record(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return record


def environment() -> dict[str, Any]:
    """Where and with what the measurements are made."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": None if status is None else bool(status),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _validate_leaf(value: Any, types: tuple[type, ...], path: str) -> None:
    if isinstance(value, bool) and bool not in types:
        raise ValueError(f"{path}: expected {_names(types)}, got {value!r}.")
    if not isinstance(value, types):
        raise ValueError(f"{path}: expected {_names(types)}, got {value!r}.")
    if isinstance(value, float) and not abs(value) < float("inf"):
        raise ValueError(f"{path}: expected a finite number, got {value!r}.")


def _names(types: tuple[type, ...]) -> str:
    return " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
