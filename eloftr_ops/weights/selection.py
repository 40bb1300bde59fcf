# SPDX-License-Identifier: Apache-2.0
"""Which of a file's tensors are a matcher's weights: trainers wrap, average, and store other things beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from eloftr_ops.config import WeightLayout
from eloftr_ops.weights.files import check_plain
from eloftr_ops.weights.names import to_layout

# Components that DataParallel, DDP, AveragedModel, torch.compile, FSDP and checkpointing put into names.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_FIRST = (
    "backbone.stages.0.0.conv3x3.conv.weight",
    "backbone.stages.0.0.fused.weight",
)  # every matcher has one
_ANCHORS = frozenset(to_layout(name, layout) for name in _FIRST for layout in get_args(WeightLayout))
_DEPTH = 8  # of nested dictionaries that are searched


class WeightSet(NamedTuple):
    """The weights of one matcher in a file."""

    entry: str  # where: keys of nested dictionaries and the prefix of names, joined by dots; "" for the file itself
    tensors: dict[str, Tensor]  # by names without prefix and wrappers


def choose_weights(content: Mapping[Any, Any], source: str, entry: str | None) -> WeightSet | None:
    """The one set of a matcher's weights in nested dictionaries; None where there is none.

    Raises:
        ValueError: tensors of another kind, different sets and no ``entry``, or an ``entry`` that is none of them.
    """
    found = [chosen for place, group in _groups(content, (), set()) for chosen in _sets(place, group, source)]
    for chosen in found:
        for name, tensor in chosen.tensors.items():
            check_plain(f"{source}: {name}", tensor)
    known = ", ".join(repr(chosen.entry) for chosen in found) or "none"
    if entry is not None:
        for chosen in found:
            if chosen.entry == entry:
                return chosen
        raise ValueError(f"entry: expected one of the sets of weights in {source} ({known}), got {entry!r}.")
    if any(not _equal(found[0].tensors, other.tensors) for other in found[1:]):
        raise ValueError(
            f"{source}: expected the weights of one matcher, got {len(found)} different sets: {known}. "
            f"Pass one of them, for instance entry={found[0].entry!r}."
        )
    return found[0] if found else None


def _groups(
    content: object, place: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Dictionaries that hold tensors, with the keys that lead to them."""
    if not isinstance(content, Mapping) or id(content) in seen or len(place) > _DEPTH:
        return
    seen.add(id(content))
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
    for key, value in content.items():
        yield from _groups(value, (*place, str(key)), seen)


def _sets(place: tuple[str, ...], group: Mapping[str, Tensor], source: str) -> Iterator[WeightSet]:
    """The matchers among the tensors of one dictionary."""
    prefixes = {prefix for name in group if (prefix := _prefix_of_anchor(name)) is not None}
    members: dict[tuple[str, ...], dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    longest_first = sorted(prefixes, key=len, reverse=True)
    for name, tensor in group.items():
        parts = tuple(name.split("."))
        owner = next((prefix for prefix in longest_first if parts[: len(prefix)] == prefix), None)
        if owner is None:
            continue  # of another module
        plain = ".".join(part for part in parts[len(owner) :] if part not in _WRAPPERS)
        if plain in members[owner]:
            raise ValueError(f"{source}: expected one entry per parameter, got {name} a second time.")
        members[owner][plain] = tensor
    for prefix, tensors in members.items():
        yield WeightSet(".".join((*place, *prefix)), tensors)


def _prefix_of_anchor(name: str) -> tuple[str, ...] | None:
    """What stands before the name of a matcher's first convolution; None for another name."""
    parts = name.split(".")
    for start, part in enumerate(parts):
        if part not in _WRAPPERS and ".".join(p for p in parts[start:] if p not in _WRAPPERS) in _ANCHORS:
            return tuple(parts[:start])
    return None


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
