# SPDX-License-Identifier: Apache-2.0
"""Configuration files: YAML to dataclasses and back, with errors that name file and field."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from eloftr_ops.storage import write_file
from eloftr_ops.training.config import TrainingConfig

T = TypeVar("T")


def read_config(path: str | Path) -> TrainingConfig:
    """Read a configuration file; paths in it start from the current folder.

    Raises:
        ValueError: no such file, not YAML, unknown or missing fields, values of another type or out of range; the
            message names the file and the field.
    """
    path = Path(path)
    try:
        return config_from_dict(_read_yaml(path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_recipe(name: str, changes: Mapping[str, Mapping[str, Any]]) -> TrainingConfig:
    """A recipe that comes with the package, with fields set over its own.

    Args:
        name: ``small`` or ``fine_tune``.
        changes: fields by section.

    Raises:
        ValueError: as :func:`read_config`.
    """
    with resources.as_file(resources.files("eloftr_ops.training") / "recipes" / f"{name}.yaml") as path:
        values = _read_yaml(path)
    for section, fields in changes.items():
        values[section] = {**values.get(section, {}), **fields}
    return config_from_dict(values)


def config_from_dict(values: Mapping[str, Any]) -> TrainingConfig:
    """Build a configuration from plain data, such as :func:`config_to_dict` gives.

    Raises:
        ValueError: unknown or missing fields, values of another type or out of range; the message names the field.
    """
    return _build(TrainingConfig, values, "")


def config_to_dict(config: TrainingConfig) -> dict[str, Any]:
    """Plain data (dictionaries, lists, numbers, text) that :func:`config_from_dict` takes."""
    plain = _plain(config)
    if not isinstance(plain, dict):
        raise TypeError(f"config: expected a TrainingConfig, got {type(config).__name__}.")
    return plain


def write_config(config: TrainingConfig, path: Path) -> None:
    """Write a configuration file that :func:`read_config` reads, whole or not at all."""
    import yaml

    write_file(path, yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True).encode())


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected sections (run, data, ...), got {type(values).__name__}.")
    return values


def _build(kind: type[T], values: Any, place: str) -> T:
    prefix = f"{place}." if place else ""
    if not isinstance(values, Mapping):
        raise ValueError(f"{place or 'configuration'}: expected fields, got {values!r}.")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = [f"unknown {prefix}{name}" for name in values if name not in fields]
    missing = [
        f"missing {prefix}{name}"
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if unknown or missing:
        raise ValueError(f"{', '.join(unknown + missing)}; known: {', '.join(fields)}.")
    hints = typing.get_type_hints(kind)
    converted = {name: _convert(value, hints[name], f"{prefix}{name}") for name, value in values.items()}
    try:
        return kind(**converted)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def _convert(value: Any, hint: Any, place: str) -> Any:
    """``value`` as the type ``hint`` says; numbers in text count, since YAML reads 1e-3 as text."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, place)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = [arg for arg in args if arg is not type(None)]
        return _convert(value, inner, place)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{place}: expected one of {', '.join(map(str, args))}, got {value!r}.")
        return value
    if origin is tuple:
        return _convert_tuple(value, args, place)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError as error:
            raise ValueError(f"{place}: expected a number, got {value!r}.") from error
    wanted = Mapping if origin is not None else hint
    if not isinstance(value, wanted) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{place}: expected {_TYPE_NAMES.get(hint, 'fields')}, got {value!r}.")
    return value


def _convert_tuple(value: Any, args: tuple[Any, ...], place: str) -> tuple[Any, ...]:
    repeated = args[-1] is Ellipsis
    if not isinstance(value, list | tuple) or (not repeated and len(value) != len(args)):
        raise ValueError(f"{place}: expected a list{'' if repeated else f' of {len(args)}'}, got {value!r}.")
    kinds = [args[0]] * len(value) if repeated else args
    return tuple(_convert(item, kind, f"{place}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True)))


_TYPE_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
