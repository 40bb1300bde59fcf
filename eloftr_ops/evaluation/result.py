# SPDX-License-Identifier: Apache-2.0
"""The outcome of an evaluation: totals, and a JSON record of everything."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from eloftr_ops._version import __version__
from eloftr_ops.evaluation.metrics import auc
from eloftr_ops.evaluation.protocol import (
    CORNER_THRESHOLDS,
    OVERLAP_THRESHOLDS,
    POSE_THRESHOLDS,
    EvaluationConfig,
    PairResult,
)
from eloftr_ops.io import atomic_write

__all__ = ["RECORD_FORMAT", "EvaluationResult", "PairFailure"]

RECORD_FORMAT = "eloftr-ops evaluation 1"

_PACKAGES = ("torch", "kornia", "numpy", "opencv")


@dataclass(frozen=True)
class PairFailure:
    """A pair with broken files or labels. It is part of no average.

    Attributes:
        index: of the pair in its data set.
        reason: which file, and what is wrong with it.
    """

    index: int
    reason: str


@dataclass(frozen=True)
class EvaluationResult:
    """The results of an evaluation.

    Attributes:
        config: how it was measured.
        available: number of pairs in the data set.
        chosen: number of pairs that were to be evaluated.
        pairs: those that were.
        failures: those that could not be.
    """

    config: EvaluationConfig
    available: int
    chosen: int
    pairs: Sequence[PairResult]
    failures: Sequence[PairFailure]

    @property
    def complete(self) -> bool:
        """Whether every chosen pair was tried."""
        return len(self.pairs) + len(self.failures) == self.chosen

    def totals(self) -> dict[str, Any]:
        """Counts and means; measures under "pose" and "homography" if there are such pairs.

        AUC and precision are in percent. AUC pools all runs of all pairs; the error of a pose is the larger one of its
        two angles. Precision is the mean over pairs. Numbers without any pair are NaN.
        """
        totals: dict[str, Any] = {
            "available": self.available,
            "chosen": self.chosen,
            "evaluated": len(self.pairs),
            "failed": len(self.failures),
            "matches_per_pair": _mean([pair.matches for pair in self.pairs]),
            "seconds_per_pair": _mean([pair.seconds for pair in self.pairs]),
            "seconds_per_pair_median": (
                float(np.median([pair.seconds for pair in self.pairs])) if self.pairs else float("nan")
            ),
        }
        for kind in ("pose", "homography"):
            chosen = [pair for pair in self.pairs if pair.kind == kind]
            if chosen:
                totals[kind] = _measures(kind, chosen)
        return totals

    def record(self, run: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Everything as plain JSON values. NaN and infinity become None, because JSON has neither.

        Args:
            run: what else was configured, stored as it is: data set, weights, device, ...
        """
        record = {
            "format": RECORD_FORMAT,
            "version": __version__,
            "versions": _versions(),
            "complete": self.complete,
            "run": dict(run or {}),
            "configuration": asdict(self.config),
            "totals": self.totals(),
            "pairs": [asdict(pair) for pair in self.pairs],
            "failures": [asdict(failure) for failure in self.failures],
        }
        plain: dict[str, Any] = _finite(record)
        return plain

    def write(self, path: str | Path, run: Mapping[str, Any] | None = None) -> None:
        """Write `record` as JSON, whole or not at all.

        Args:
            path: the file.
            run: see `record`.

        Raises:
            FileError: the file system refuses.
        """
        text = json.dumps(self.record(run), indent=1, allow_nan=False)
        with atomic_write(path) as file:
            file.write(text.encode() + b"\n")


def _measures(kind: str, pairs: Sequence[PairResult]) -> dict[str, float]:
    if kind == "pose":
        pooled: dict[str, tuple[list[float], tuple[int, ...]]] = {
            "auc": (
                [
                    max(angles)
                    for pair in pairs
                    for angles in zip(pair.errors["rotation"], pair.errors["translation"], strict=True)
                ],
                POSE_THRESHOLDS,
            )
        }
    else:
        pooled = {
            f"{name}_auc": ([error for pair in pairs for error in pair.errors[name]], thresholds)
            for name, thresholds in (("corner", CORNER_THRESHOLDS), ("overlap", OVERLAP_THRESHOLDS))
        }
    measures: dict[str, float] = {
        "pairs": len(pairs),
        "without_model": sum(not pair.estimated for pair in pairs),
    }
    for name, (errors, thresholds) in pooled.items():
        areas = auc(errors, thresholds)
        measures |= {f"{name}@{bound}": area for bound, area in zip(thresholds, areas, strict=True)}
    for criterion in pairs[0].precision:
        measures[f"precision@{criterion}"] = 100 * _mean([pair.precision[criterion] for pair in pairs])
    return measures


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _versions() -> dict[str, str]:
    installed = {name: cv2.__version__ if name == "opencv" else importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **installed}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
