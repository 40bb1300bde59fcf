# SPDX-License-Identifier: Apache-2.0
"""A matcher for glue-factory, the training and evaluation framework: a model of its two-view pipeline.

Name this module as the matcher in a configuration; there is no extractor:

    model:
        name: two_view_pipeline
        extractor: {name: null}
        matcher: {name: eloftr_ops.integrations.glue_factory, weights: small}

glue-factory looks for the class in ``__main_model__``. It exists if glue-factory is installed.

Convention:
    glue-factory's keypoints are (x, y) in pixels of the resized ``view``, the centre of pixel (x, y) at
    (x + 0.5, y + 0.5), as COLMAP's. These are the frame and the unit of this project: nothing is shifted.

Source: Lindenberger, Sarlin, Pollefeys: "LightGlue: Local Feature Matching at Light Speed", ICCV 2023, and the
framework's documentation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eloftr_ops.errors import ArgumentError
from eloftr_ops.integrations.common import PairMatcher, load_package, most_confident

__all__ = ["model_class"]

_ADVICE = "Install glue-factory as its README says: clone it and run pip install -e ."


def model_class() -> type[Any]:
    """The model, a class of glue-factory's ``BaseModel``.

    Its configuration: ``weights`` ("small", a file, a folder or a Hugging Face repository), ``filter_threshold`` (None:
    the weights' own), and ``max_num_matches`` (None: all).

    Convention:
        - In: ``view0`` and ``view1``, each with ``image`` (B, 1 or 3, H, W) in [0, 1].
        - Out, with K the most matches of a pair: ``keypoints0``, ``keypoints1`` (B, K, 2), ``keypoint_scores0``,
          ``keypoint_scores1`` (B, K), ``matching_scores0``, ``matching_scores1`` (B, K), and ``matches0``, ``matches1``
          (B, K): k for match k, -1 in rows that are padding, which are zero.
        - Gradient: as the matcher's; see docs/differentiability.md. ``loss`` is not offered: train the matcher with
          `eloftr_ops.training`.

    Raises:
        ImportError: glue-factory is not installed.
    """
    base = load_package("gluefactory.models.base_model", _ADVICE).BaseModel

    class EfficientLoFTR(base):  # type: ignore[misc, valid-type]
        default_conf = {"weights": "small", "filter_threshold": None, "max_num_matches": None}  # noqa: RUF012
        required_data_keys = ["view0", "view1"]  # noqa: RUF012

        def _init(self, conf: Any) -> None:
            self.net = PairMatcher(conf.weights, conf.filter_threshold)
            self.are_weights_initialized = True  # glue-factory asks before it evaluates

        def _forward(self, data: dict[str, Any]) -> dict[str, Tensor]:
            images = {f"image{side}": data[f"view{side}"]["image"] for side in (0, 1)}
            return _in_batches(self.net(images), len(images["image0"]), self.conf.max_num_matches)

        def loss(self, pred: dict[str, Tensor], data: dict[str, Any]) -> Any:
            raise NotImplementedError("Train the matcher with eloftr_ops.training; glue-factory evaluates it.")

    EfficientLoFTR.__module__ = __name__
    return EfficientLoFTR


def _in_batches(found: dict[str, Tensor], batch: int, count: int | None) -> dict[str, Tensor]:
    """Ragged matches as (B, K, ...), padded with zeros and marked with -1."""
    if count is not None and count < 1:
        raise ArgumentError("max_num_matches", f"expected at least 1, or None, got {count}.")
    rows = [torch.nonzero(found["batch_indexes"] == pair)[:, 0] for pair in range(batch)]
    rows = [row[most_confident(found["confidence"][row], count)] for row in rows]
    most = max(len(row) for row in rows)

    def padded(values: Tensor) -> Tensor:
        whole = values.new_zeros((batch, most, *values.shape[1:]))
        for pair, row in enumerate(rows):
            whole[pair, : len(row)] = values[row]
        return whole

    keypoints0, keypoints1, confidence = (padded(found[name]) for name in ("keypoints0", "keypoints1", "confidence"))
    lengths = torch.tensor([len(row) for row in rows], device=confidence.device)
    index = torch.arange(most, device=confidence.device).expand(batch, most)
    matches = torch.where(index < lengths[:, None], index, -1)
    return {
        "keypoints0": keypoints0,
        "keypoints1": keypoints1,
        "keypoint_scores0": confidence,
        "keypoint_scores1": confidence,
        "matches0": matches,
        "matches1": matches,
        "matching_scores0": confidence,
        "matching_scores1": confidence,
    }


def __getattr__(name: str) -> Any:
    """glue-factory asks for ``__main_model__``; nothing of it is loaded before."""
    if name == "__main_model__":
        globals()[name] = model_class()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
