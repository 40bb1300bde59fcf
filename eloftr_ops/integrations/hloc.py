# SPDX-License-Identifier: Apache-2.0
"""A dense matcher for hloc, the toolbox of hierarchical localization.

hloc loads matchers by name from its package ``hloc.matchers``. :func:`register` puts this one there, and the
configurations into ``hloc.match_dense.confs``; then hloc's functions take it as they take their own:

    from eloftr_ops.integrations import hloc as eloftr
    from hloc import match_dense

    eloftr.register()
    features, matches = match_dense.main(match_dense.confs["eloftr"], pairs, images, export_dir=outputs)

Convention:
    hloc puts the centre of the first pixel at (0, 0): it adds 0.5 before it scales keypoints, and again on the way to
    COLMAP. This matcher subtracts 0.5 from its own keypoints, so that both sums are right.

Source: Sarlin, Cadena, Siegwart, Dymczyk: "From Coarse to Fine: Robust Hierarchical Localization at Large Scale",
CVPR 2019, and the tool's documentation.
"""

from __future__ import annotations

import copy
import importlib
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from eloftr_ops.errors import ArgumentError
from eloftr_ops.integrations.common import PairMatcher, load_package, most_confident

__all__ = ["CONFS", "NAME", "matcher_class", "register"]

NAME = "eloftr"
_ADVICE = "Install hloc as its README says: clone it and run pip install -e ."
_PREPROCESSING = {"grayscale": True, "resize_max": 1024, "dfactor": 8}
_MODEL = {"name": NAME, "weights": "small"}

# "eloftr": all keypoints, for small scenes. "eloftr_aachen": one keypoint per 8 pixels, for large ones.
# "eloftr_superpoint": for keypoints of another detector, passed as features_ref. As hloc's own for LoFTR.
CONFS: dict[str, dict[str, Any]] = {
    name: {
        "output": f"matches-{name}",
        "model": _MODEL,
        "preprocessing": _PREPROCESSING,
        "max_error": max_error,
        "cell_size": cell_size,
    }
    for name, max_error, cell_size in (
        ("eloftr", 1, 1),
        ("eloftr_aachen", 2, 8),
        ("eloftr_superpoint", 4, 4),
    )
}


def matcher_class() -> type[Any]:
    """The matcher, a class of hloc's ``BaseModel``.

    Its configuration: ``weights`` ("small", a file, a folder or a Hugging Face repository), ``match_threshold`` (None:
    the weights' own), and ``max_num_matches`` (None: all).

    Convention:
        - In: ``image0``, ``image1`` (1, 1, H, W) in [0, 1], and perhaps ``mask0``, ``mask1`` (1, H, W).
        - Out: ``keypoints0``, ``keypoints1`` (M, 2), the centre of the first pixel at (0, 0); ``scores`` (M,).
        - Image 1 is given to the network as its first image, as hloc does for LoFTR: then keypoints are refined in
          image 0, the query, and lie on a grid in image 1.
        - Gradient: none.

    Raises:
        ImportError: hloc is not installed.
    """
    base = load_package("hloc.utils.base_model", _ADVICE).BaseModel

    class EfficientLoFTR(base):  # type: ignore[misc, valid-type]
        default_conf = {"weights": "small", "match_threshold": None, "max_num_matches": None}  # noqa: RUF012
        required_inputs = ["image0", "image1"]  # noqa: RUF012

        def _init(self, conf: dict[str, Any]) -> None:
            self.net = PairMatcher(conf["weights"], conf["match_threshold"])

        @torch.no_grad()
        def _forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
            _check_single(data)
            found = self.net(
                {_other_side(key): data[key] for key in ("image0", "image1", "mask0", "mask1") if key in data}
            )
            kept = most_confident(found["confidence"], self.conf["max_num_matches"])
            return {
                "keypoints0": found["keypoints1"][kept] - 0.5,
                "keypoints1": found["keypoints0"][kept] - 0.5,
                "scores": found["confidence"][kept],
            }

    EfficientLoFTR.__module__ = f"hloc.matchers.{NAME}"  # hloc takes the class that its module defines
    return EfficientLoFTR


def register() -> None:
    """Make hloc know the matcher and its configurations, by the name ``eloftr``; a second call changes nothing.

    Raises:
        ImportError: hloc is not installed.
    """
    name = f"hloc.matchers.{NAME}"
    dense = load_package("hloc.match_dense", _ADVICE)
    if name not in sys.modules:
        module = ModuleType(name, __doc__)
        module.EfficientLoFTR = matcher_class()  # type: ignore[attr-defined]
        sys.modules[name] = module
        setattr(importlib.import_module("hloc.matchers"), NAME, module)
    for key, conf in CONFS.items():
        dense.confs.setdefault(key, copy.deepcopy(conf))


def _other_side(key: str) -> str:
    return key[:-1] + ("1" if key.endswith("0") else "0")


def _check_single(data: dict[str, Tensor]) -> None:
    for key in ("image0", "image1"):
        if data[key].shape[0] != 1:
            raise ArgumentError(key, f"expected one image, (1, 1, H, W), got {tuple(data[key].shape)}.")
