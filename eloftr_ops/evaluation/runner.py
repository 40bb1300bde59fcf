# SPDX-License-Identifier: Apache-2.0
"""A matcher over a data set of labelled pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eloftr_ops.checks import MIN_SIZE
from eloftr_ops.data.labelled import ImagePair, LabelledPairs
from eloftr_ops.evaluation.protocol import EvaluationConfig, PairResult, measure_pair
from eloftr_ops.evaluation.result import EvaluationResult, PairFailure
from eloftr_ops.io import FileError

__all__ = ["Matcher", "chosen_indexes", "evaluate", "evaluate_pairs"]

Matcher = Callable[[dict[str, Any]], Mapping[str, Tensor]]
"""What `kornia.feature.LoFTR` is. In: a dictionary with image0, image1 (1, 1, H, W) and, where a part of an image is
masked, mask0, mask1 (1, H, W). Out: a dictionary with keypoints0, keypoints1 (M, 2) and confidence (M,)."""


def evaluate(
    matcher: Matcher,
    pairs: LabelledPairs,
    config: EvaluationConfig | None = None,
    *,
    limit: int | None = None,
    device: torch.device | str = "cpu",
    strict: bool = False,
) -> EvaluationResult:
    """Evaluate a matcher on labelled pairs.

    Convention:
        As `evaluate_pairs`.

    Args:
        matcher: for instance `EfficientLoFTR` or `kornia.feature.LoFTR`, on ``device`` and in evaluation mode.
        pairs: opened with ``PairOptions(min_overlap=None)``, so that hard pairs are kept.
        config: how to measure; `EvaluationConfig` by default.
        limit: at most so many pairs, evenly spread over the data set.
        device: that images are moved to.
        strict: raise at a pair that cannot be read, instead of counting it.

    Raises:
        FileError: a pair that cannot be read, if ``strict``.
        ValueError: a pair without ground truth, or padded; keypoints that are not finite.
    """
    config = config or EvaluationConfig()
    indexes = chosen_indexes(len(pairs), limit)
    results: list[PairResult] = []
    failures: list[PairFailure] = []
    for outcome in evaluate_pairs(matcher, pairs, indexes, config, device=device, strict=strict):
        if isinstance(outcome, PairResult):
            results.append(outcome)
        else:
            failures.append(outcome)
    return EvaluationResult(config, len(pairs), len(indexes), results, failures)


def evaluate_pairs(
    matcher: Matcher,
    pairs: LabelledPairs,
    indexes: Sequence[int],
    config: EvaluationConfig,
    *,
    device: torch.device | str = "cpu",
    strict: bool = False,
) -> Iterator[PairResult | PairFailure]:
    """Evaluate pairs one by one. Callers can show progress, and keep the results after an interruption.

    Convention:
        - Keypoints of the matcher are in pixels of the images it gets; the centre of pixel (x, y) is
          (x + 0.5, y + 0.5).
        - Seconds: wall clock of the matcher alone, until its results are on the CPU. The first pair is matched once
          more before, untimed.

    Args:
        matcher: see `evaluate`.
        pairs: see `evaluate`.
        indexes: of the pairs to evaluate.
        config: how to measure.
        device: that images are moved to.
        strict: raise at a pair that cannot be read.

    Yields:
        A `PairResult`, or a `PairFailure` where the pair cannot be read, for each index.

    Raises:
        FileError: a pair that cannot be read, if ``strict``.
        ValueError: as `evaluate`.
    """
    warm = False
    for index in indexes:
        try:
            pair = _loaded(pairs, index)
        except FileError as error:
            if strict:
                raise
            yield PairFailure(index, str(error))
            continue
        if not warm:
            _matched(matcher, pair, device)
            warm = True
        start = time.perf_counter()
        found = _matched(matcher, pair, device)
        seconds = time.perf_counter() - start
        keypoints0, keypoints1 = found["keypoints0"], found["keypoints1"]
        if config.max_matches is not None:
            best = found["confidence"].argsort(descending=True, stable=True)[: config.max_matches].sort().values
            keypoints0, keypoints1 = keypoints0[best], keypoints1[best]
        yield measure_pair(pair, keypoints0, keypoints1, config, index=index, seconds=seconds)


def chosen_indexes(count: int, limit: int | None) -> list[int]:
    """At most ``limit`` of ``count`` indexes, evenly spread: data sets are sorted by scene.

    Raises:
        ValueError: a limit less than 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}. Pass None for all pairs.")
    if limit is None or limit >= count:
        return list(range(count))
    return [int(index) for index in np.linspace(0, count - 1, limit).round()]


def _loaded(pairs: LabelledPairs, index: int) -> ImagePair:
    pair = pairs.load(index)
    for image in (pair.image0, pair.image1):
        height, width = image.shape[-2:]
        if min(height, width) < MIN_SIZE:
            raise FileError(
                f"{pair.name}: {width} x {height} pixels as matched, expected at least {MIN_SIZE} on each side."
            )
    return pair


def _matched(matcher: Matcher, pair: ImagePair, device: torch.device | str) -> dict[str, Tensor]:
    data: dict[str, Any] = {}
    for side, image, mask in (("0", pair.image0, pair.mask0), ("1", pair.image1, pair.mask1)):
        data[f"image{side}"] = image[None].to(device)
        if not mask.all():
            data[f"mask{side}"] = mask[None].to(device)
    with torch.inference_mode():
        return {name: value.cpu() for name, value in matcher(data).items()}  # waits for the device
