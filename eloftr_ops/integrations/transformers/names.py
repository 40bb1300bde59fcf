# SPDX-License-Identifier: Apache-2.0
"""The operator's layers under transformers' names: one set of weights, two trees of modules."""

from __future__ import annotations

from torch import nn

from eloftr_ops import EfficientLoFTR
from eloftr_ops.weights.names import to_layout


def graft(target: nn.Module, matcher: EfficientLoFTR, prefix: str) -> None:
    """Register under ``target`` the layers of ``matcher`` whose names in transformers begin with ``prefix``.

    The layers are the matcher's own: whoever loads, moves or trains them does so for both.
    """
    for name, layer in matcher.named_modules():
        if not (layer._parameters or layer._buffers):
            continue
        path = to_layout(f"{name}.", "transformers").rstrip(".")
        if path.startswith(prefix):
            *parents, last = path.removeprefix(prefix).split(".")
            owner = target
            for parent in parents:
                if parent not in owner._modules:
                    owner.add_module(parent, nn.Module())
                owner = owner.get_submodule(parent)
            owner.add_module(last, layer)
