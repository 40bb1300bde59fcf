# SPDX-License-Identifier: Apache-2.0
"""A matcher that looks again: any matcher with kornia LoFTR's dictionaries, guided by what it found."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from kornia.feature import LoFTR
from torch import Tensor, nn

from eloftr_ops.checks import MIN_SIZE
from eloftr_ops.config import check_choice
from eloftr_ops.efforts import Effort
from eloftr_ops.errors import ArgumentError
from eloftr_ops.guided.looks import Found, Look, Setting
from eloftr_ops.guided.merge import merged
from eloftr_ops.guided.runner import Runner
from eloftr_ops.guided.strategy import Chain, Plan, plan
from eloftr_ops.guided.warps import Source

__all__ = ["GuidedMatcher", "GuidedMatches", "LookReport"]

_AT_ONCE = 16  # looks per call on a GPU
_Matcher = Callable[..., Mapping[str, Tensor]]


class LookReport(NamedTuple):
    """What was done for one pair."""

    looks: int  # how many were taken
    views: tuple[str, ...]  # those that the matches come from, in words, the first one first
    inliers: int  # places that agree with one homography or fundamental matrix
    evidence: float  # -log10 of the share of unrelated pairs that agree as much, for one look
    expired: bool  # whether the time was spent before the search had ended


class GuidedMatches(NamedTuple):
    """The matches of B pairs, as `EfficientLoFTR` gives them, and what was done for each pair."""

    keypoints0: Tensor  # (M, 2), pixels of the images as given
    keypoints1: Tensor  # (M, 2)
    confidence: Tensor  # (M,)
    batch_indexes: Tensor  # (M,) int64, ascending
    reports: tuple[LookReport, ...]  # one per pair


class GuidedMatcher(LoFTR):
    """Match, warp the images so that they look alike, and match again.

    A semi-dense matcher is precise where two views look alike, and weak where they differ in scale, rotation or slant.
    So the matches of a first look give a warp: the homography of the plane that most of them lie near, and a smooth
    field for what lies off it. Image 1 is seen through it, so that it looks like image 0; the matches of that look are
    carried back through the warp. Where the first look finds little, simulated views are searched: turned, reduced and
    slanted ones, of either image. What agrees is followed up.

    After Yu and Morel, "ASIFT" (2011); Mishkin, Matas and Perdoch, "MODS" (2015); Shen et al., "RANSAC-Flow"
    (ECCV 2020).

    Convention:
        Dictionaries, frames and dtypes are those of ``kornia.feature.LoFTR`` and `EfficientLoFTR`. Keypoints are in
        pixels of the images as given, the centre of pixel (x, y) at (x + 0.5, y + 0.5). ``confidence`` is that of the
        look that found the match. A batch gives what its pairs give alone.

    Gradient:
        The looks are chosen without gradient. A warp is a constant map: keypoints carry the gradient that the matcher
        gives them, through the warp, to the images as given and to the matcher's weights. For that the looks that the
        matches come from are taken once more. In training mode, each look counts for BatchNorm.

    Args:
        matcher: anything that takes and gives kornia LoFTR's dictionaries: `EfficientLoFTR`, its optimized copy,
            ``kornia.feature.LoFTR``, or any callable.
        effort: ``fast``: one look. ``normal``: looks through the warp, where it changes something. ``thorough``: the
            search, too, where the first look finds little.
        size: long side at which images are matched; larger images are reduced to it, but a look at a part of them takes
            what detail they have. None: as they are.
        seconds: start no new look after so many seconds per pair; None: no limit.
        looks_at_once: of a search, per call of the matcher; None: 16 on a GPU, 1 on a CPU.

    Raises:
        ArgumentError: a ValueError: an argument that cannot be used.
    """

    def __init__(
        self,
        matcher: _Matcher,
        effort: Effort = "normal",
        *,
        size: int | None = None,
        seconds: float | None = None,
        looks_at_once: int | None = None,
    ) -> None:
        nn.Module.__init__(self)  # LoFTR's own constructor would build LoFTR's layers
        if not callable(matcher):
            raise ArgumentError("matcher", f"expected a matcher, got {type(matcher).__name__}.")
        check_choice("effort", effort, Effort)
        for name, value, least in (("size", size, MIN_SIZE), ("looks_at_once", looks_at_once, 1)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ArgumentError(name, f"expected an integer of at least {least}, or None, got {value!r}.")
        if seconds is not None and not 0 <= seconds < float("inf"):
            raise ArgumentError("seconds", f"expected a number of seconds, 0 or more, or None, got {seconds!r}.")
        self.matcher = matcher
        self.effort, self.size, self.seconds, self.looks_at_once = effort, size, seconds, looks_at_once

    def forward(self, data: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
        """Match a batch of pairs; the dictionaries are those of ``kornia.feature.LoFTR``.

        Args:
            data: ``image0`` (B, 1, H0, W0) and ``image1`` (B, 1, H1, W1) in [0, 1]; perhaps ``mask0`` (B, H0, W0) and
                ``mask1`` (B, H1, W1), zero where there is no image.
            **options: passed on to the matcher, for instance ``mode="straight_through"``.

        Returns:
            ``keypoints0`` (M, 2), ``keypoints1`` (M, 2), ``confidence`` (M,), ``batch_indexes`` (M,).

        Raises:
            ArgumentError: an entry that is missing, or cannot be used.
        """
        found = self.match(**_checked(data), **options)._asdict()
        del found["reports"]
        return found

    def match(
        self,
        image0: Tensor,
        image1: Tensor,
        mask0: Tensor | None = None,
        mask1: Tensor | None = None,
        **options: Any,
    ) -> GuidedMatches:
        """As :meth:`forward`, and says what was done for each pair."""
        _checked({"image0": image0, "image1": image1, "mask0": mask0, "mask1": mask1})
        settings = [self._setting(image0, image1)] * len(image0)
        at_once = settings[0].at_once if settings else 1
        sources = _sources(image0, image1, mask0, mask1, settings)
        budget = _Budget(None if self.seconds is None else self.seconds * len(settings))
        with torch.no_grad():
            still = [(source0.detached(), source1.detached()) for source0, source1 in sources]
            runner = Runner(self.matcher, still, at_once, options)
            chains, counts = _run_plans([plan(self.effort, each, budget.expired) for each in settings], runner)
        if self._needs_gradient(image0, image1):
            runner = Runner(self.matcher, sources, at_once, options)
            chains = [
                chain._replace(found=tuple(runner.run([(pair, look) for look in chain.looks])))
                for pair, chain in enumerate(chains)
            ]
        reports = tuple(
            LookReport(count, tuple(look.view for look in chain.looks), *chain.support, budget.ended)
            for chain, count in zip(chains, counts, strict=True)
        )
        return _collected([merged(chain.found) for chain in chains], settings, image0, image1, reports)

    def _needs_gradient(self, *images: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        weights = self.matcher.parameters() if isinstance(self.matcher, nn.Module) else ()
        return any(tensor.requires_grad for tensor in (*images, *weights))

    def _setting(self, image0: Tensor, image1: Tensor) -> Setting:
        given = [(image.shape[-1], image.shape[-2]) for image in (image0, image1)]
        sizes = [_working_size(size_wh, self.size) for size_wh in given]
        at_once = self.looks_at_once or (_AT_ONCE if image0.is_cuda else 1)
        return Setting((sizes[0], sizes[1]), max(*sizes[0], *sizes[1]), given[0][0] / sizes[0][0], at_once)


class _Budget:
    """A time budget, which begins now."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.perf_counter() + seconds
        self.ended = False  # whether it kept anybody from a look

    def expired(self) -> bool:
        """Whether no new look may start."""
        self.ended = self.ended or (self._end is not None and time.perf_counter() >= self._end)
        return self.ended


def _checked(data: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that guided matching takes; the matcher checks their values."""
    images: dict[str, Any] = {}
    for name in ("image0", "image1"):
        image = data.get(name)
        if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] != 1 or not image.is_floating_point():
            got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ArgumentError(
                name,
                f"expected a floating point tensor (B, 1, H, W), got {got}. Pass images: features cannot be warped.",
            )
        if min(image.shape[-2:]) < MIN_SIZE:
            raise ArgumentError(
                name, f"expected at least {MIN_SIZE} pixels on each side, got {tuple(image.shape[-2:])}."
            )
        images[name] = image
    if len(images["image0"]) != len(images["image1"]):
        counts = f"{len(images['image0'])} and {len(images['image1'])}"
        raise ArgumentError("image1", f"expected as many images as in image0, got {counts}.")
    for side in "01":
        mask, image = data.get(f"mask{side}"), images[f"image{side}"]
        shape = (len(image), *image.shape[-2:])
        if mask is not None and (not isinstance(mask, Tensor) or tuple(mask.shape) != shape):
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ArgumentError(f"mask{side}", f"expected a tensor {shape}, the size of its image, got {got}.")
        images[f"mask{side}"] = mask
    return images


def _working_size(size_wh: tuple[int, int], longest: int | None) -> tuple[int, int]:
    scale = 1.0 if longest is None else min(1.0, longest / max(size_wh))
    return max(MIN_SIZE, round(size_wh[0] * scale)), max(MIN_SIZE, round(size_wh[1] * scale))


def _sources(
    image0: Tensor, image1: Tensor, mask0: Tensor | None, mask1: Tensor | None, settings: list[Setting]
) -> list[tuple[Source, Source]]:
    pairs = []
    for pair, setting in enumerate(settings):
        one = slice(pair, pair + 1)
        sides = [
            Source.of(image[one], None if mask is None else mask[one], size)
            for image, mask, size in zip((image0, image1), (mask0, mask1), setting.sizes, strict=True)
        ]
        pairs.append((sides[0], sides[1]))
    return pairs


def _run_plans(plans: Sequence[Plan], runner: Runner) -> tuple[list[Chain], list[int]]:
    """Run all plans to their ends; what they ask for at one time goes through the matcher together.

    Returns:
        The chain of each plan, and how many looks it took.
    """
    asked: dict[int, list[Look]] = {pair: next(each) for pair, each in enumerate(plans)}
    chains: dict[int, Chain] = {}
    counts = [0] * len(plans)
    while asked:
        found = iter(runner.run([(pair, look) for pair, looks in asked.items() for look in looks]))
        answers = {pair: [next(found) for _ in looks] for pair, looks in asked.items()}
        asked = {}
        for pair, answer in answers.items():
            counts[pair] += len(answer)
            try:
                asked[pair] = plans[pair].send(answer)
            except StopIteration as end:
                chains[pair] = end.value
    return [chains[pair] for pair in range(len(plans))], counts


def _collected(
    found: list[Found],
    settings: list[Setting],
    image0: Tensor,
    image1: Tensor,
    reports: tuple[LookReport, ...],
) -> GuidedMatches:
    """In pixels of the images as given, on their device."""
    dtype = image0.dtype if image0.dtype is torch.float64 else torch.float32
    sides = []
    for side, image in enumerate((image0, image1)):
        points = [
            each[side]
            * each[side].new_tensor([image.shape[-1], image.shape[-2]])
            / each[side].new_tensor(setting.sizes[side])
            for each, setting in zip(found, settings, strict=True)
        ]
        sides.append(torch.cat([*points, torch.zeros(0, 2, dtype=torch.float64)]).to(image0.device, dtype))
    counts = torch.tensor([len(each.confidence) for each in found], dtype=torch.int64)
    batch = torch.repeat_interleave(torch.arange(len(found)), counts).to(image0.device)
    confidence = torch.cat([*(each.confidence for each in found), torch.zeros(0)]).to(image0.device, dtype)
    return GuidedMatches(sides[0], sides[1], confidence, batch, reports)
