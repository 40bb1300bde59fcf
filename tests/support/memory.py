# SPDX-License-Identifier: Apache-2.0
"""How large the tensors of a computation get."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Watches every tensor that any operation makes, in forward, recomputation and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
                self.shapes.add(tuple(x.shape))
        return out
