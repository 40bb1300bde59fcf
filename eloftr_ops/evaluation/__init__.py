# SPDX-License-Identifier: Apache-2.0
"""Evaluation of matchers: relative pose, homography, precision; ``eloftr-ops evaluate`` in Python."""

from eloftr_ops.evaluation.datasets import DATASETS, EvaluationSet, open_pairs
from eloftr_ops.evaluation.estimators import ESTIMATORS, estimate_homography, estimate_pose
from eloftr_ops.evaluation.metrics import (
    PoseErrors,
    auc,
    corner_error,
    epipolar_errors,
    matching_precision,
    overlap_error,
    pose_errors,
    transfer_errors,
)
from eloftr_ops.evaluation.protocol import EvaluationConfig, PairResult, measure_pair
from eloftr_ops.evaluation.result import EvaluationResult, PairFailure
from eloftr_ops.evaluation.runner import evaluate, evaluate_pairs

__all__ = [
    "DATASETS",
    "ESTIMATORS",
    "EvaluationConfig",
    "EvaluationResult",
    "EvaluationSet",
    "PairFailure",
    "PairResult",
    "PoseErrors",
    "auc",
    "corner_error",
    "epipolar_errors",
    "estimate_homography",
    "estimate_pose",
    "evaluate",
    "evaluate_pairs",
    "matching_precision",
    "measure_pair",
    "open_pairs",
    "overlap_error",
    "pose_errors",
    "transfer_errors",
]
