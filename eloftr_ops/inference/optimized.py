# SPDX-License-Identifier: Apache-2.0
"""A matcher for inference alone: everything folded that can be, no gradients, optionally another dtype or compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eloftr_ops.config import GradientMode
from eloftr_ops.inference import cuda_graphs as graphs
from eloftr_ops.inference.cpu.allocator import keep_small_blocks
from eloftr_ops.inference.cpu.winograd import use_winograd
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.types import CoarseOutput, Features

_REMEDY = "Use the matcher that it was made from."
FLOAT_STAGES = 2  # of the backbone, with bfloat16 behind them
_COMPILED = ("transform", "fine_features")  # methods that are compiled beside the backbone
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class InferenceMatcher(EfficientLoFTR):
    """What :meth:`EfficientLoFTR.optimize_for_inference` returns: the same matches, sooner, and nothing else.

    RepVGG branches and every BatchNorm are folded into convolutions, weights lie channels last, and no graph is
    recorded. In float32 on a CPU, wide convolutions run by Winograd's algorithm, with weights that are four times as
    large (:mod:`eloftr_ops.inference.cpu.winograd`). It is a copy: the matcher that it was made from stays as it is,
    and is the one to train and to save.

    With bfloat16 the transformer and the scores stay in float32: its 8 bits are too few for what decides which cells
    match, and cost more matches than all the convolutions together. So do the backbone's stages before the map at half
    resolution: they are a small part of it, and most of what its rounding costs.

    Convention:
        As :class:`EfficientLoFTR`; images may come in any floating dtype.

    Gradient:
        None. Inputs that require one are refused, so that a loss is never silently cut off.

    Args:
        matcher: where the weights come from.
        dtype: of all weights and maps, but see above for bfloat16; None keeps the matcher's.
        compiled: compile the dense parts, once per image size: True for TorchInductor (on a CPU it needs a C++
            compiler, and tens of seconds), or the name of another ``torch.compile`` backend.
        mixed: keep in float32 what bfloat16 keeps there, with float16 too.
        winograd: use Winograd's algorithm where it pays.
        cuda_graphs: on a CUDA GPU, record the launches of the first call with some shapes, and repeat them later.

    Attributes:
        cuda_graphs: the :class:`~eloftr_ops.inference.cuda_graphs.CudaGraphs` of this copy. Its ``why_not(device)``
            says in words why there are none.

    Raises:
        ValueError: a dtype that is not floating point.
    """

    def __init__(
        self,
        matcher: EfficientLoFTR,
        *,
        dtype: torch.dtype | None = None,
        compiled: bool | str = False,
        mixed: bool = False,
        winograd: bool = True,
        cuda_graphs: bool = True,
    ) -> None:
        nn.Module.__init__(self)
        self.cuda_graphs = graphs.CudaGraphs(off=None if cuda_graphs else graphs.SWITCHED_OFF)
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(str, _DTYPES))}, got {dtype}.")
        fused = matcher.fused()
        self._config = fused.config
        self.backbone, self.transformer, self.pyramid = fused.backbone, fused.transformer, fused.pyramid
        self.pyramid.fuse_()
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if dtype is torch.bfloat16 or (mixed and dtype is torch.float16):
            self._round_wide_convolutions(dtype)
        elif dtype is not None:
            self.to(dtype)
        if next(self.parameters()).device.type == "cpu":
            keep_small_blocks()
            if winograd and dtype in (None, torch.float32) and self.dtype is torch.float32 and not compiled:
                use_winograd(self)
        self._backend = "inductor" if compiled is True else compiled or None
        self._compile()

    def _compile(self) -> None:
        if self._backend is None:
            return
        self.backbone.compile(backend=self._backend, dynamic=False)
        for name in _COMPILED:
            setattr(self, name, torch.compile(getattr(self, name), backend=self._backend, dynamic=False))

    def __getstate__(self) -> dict[str, Any]:
        """Without compiled methods, which would go on with this matcher's weights in a copy."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {name: value for name, value in state.items() if name not in _COMPILED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or one read from a file, compiles for itself."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compile()

    def _round_wide_convolutions(self, dtype: torch.dtype) -> None:
        """What :class:`InferenceMatcher` says; what stays in float32 must not pass through ``dtype``."""
        self.float()
        for part in (*self.backbone.stages[FLOAT_STAGES:], self.pyramid):
            part.to(dtype)
        self.backbone.stages[FLOAT_STAGES - 1].append(_To(dtype))  # type: ignore[operator]

    @torch.no_grad()
    def forward(
        self, data: Mapping[str, Any], *, mode: GradientMode | None = None, covariance: bool = False
    ) -> dict[str, Tensor]:
        """As :meth:`EfficientLoFTR.forward`, without gradients; with covariances, without replay of CUDA graphs.

        Raises:
            ValueError: also for an input that requires a gradient.
        """
        for name, value in data.items() if isinstance(data, Mapping) else ():
            _refuse_gradient(name, value)
        replayed = None if covariance else self.cuda_graphs.match(self, data, mode)
        return super().forward(data, mode=mode, covariance=covariance) if replayed is None else replayed

    @torch.no_grad()
    def extract_features(self, image: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """As :meth:`EfficientLoFTR.extract_features`, without gradients."""
        _refuse_gradient("image", image)
        return super().extract_features(image, mask)

    def transform(self, features0: Features, features1: Features) -> tuple[Tensor, Tensor]:
        """As :meth:`EfficientLoFTR.transform`, in the transformer's dtype."""
        dtype = next(self.transformer.parameters()).dtype
        converted = (features._replace(coarse=features.coarse.to(dtype)) for features in (features0, features1))
        return super().transform(*converted)

    def fine_features(self, features0: Features, features1: Features, coarse: CoarseOutput) -> tuple[Tensor, Tensor]:
        """As :meth:`EfficientLoFTR.fine_features`, in the pyramid's dtype."""
        coarse0, coarse1 = coarse.coarse0.to(features0.half.dtype), coarse.coarse1.to(features1.half.dtype)
        return super().fine_features(features0, features1, coarse._replace(coarse0=coarse0, coarse1=coarse1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InferenceMatcher:
        self.cuda_graphs.clear()  # they read the weights where these were
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> InferenceMatcher:
        """Evaluation mode only.

        Raises:
            RuntimeError: for ``mode=True``: the folded BatchNorms cannot be trained.
        """
        if mode:
            raise RuntimeError(f"A matcher optimized for inference cannot be trained. {_REMEDY}")
        super().train(False)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> InferenceMatcher:
        """No parameter takes a gradient.

        Raises:
            RuntimeError: for ``requires_grad=True``.
        """
        if requires_grad:
            raise RuntimeError(f"A matcher optimized for inference has no gradients. {_REMEDY}")
        super().requires_grad_(False)
        return self

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Not for this one.

        Raises:
            RuntimeError: always: the folded weights have no file layout.
        """
        raise RuntimeError(f"A matcher optimized for inference cannot be saved. {_REMEDY}")


class _To(nn.Module):
    """Conversion to a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def _refuse_gradient(name: str, value: Any) -> None:
    tensors = value.values() if isinstance(value, Mapping) else (value,)
    if any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
        raise ValueError(
            f"{name}: expected a tensor without gradient, got one that requires it: a matcher optimized for inference "
            f"gives none. {_REMEDY} Or pass {name}.detach()."
        )
