# SPDX-License-Identifier: Apache-2.0
"""Which pair is the n-th of a step: a mixture of sources in which every pair has its own generator.

A pair depends only on (seed, step, position in the step). So a step has the same pairs for any number of processes,
micro-batches and workers, and after an interruption.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from eloftr_ops.data import (
    HomographyPairs,
    JsonPairs,
    MegaDepthPairs,
    PairOptions,
    ScanNetPairs,
    ScenePairs,
    procedural_textures,
    read_textures,
)
from eloftr_ops.data.labelled import LabelledPairs
from eloftr_ops.training.batches import TrainingBatch, batch_of_labelled, batch_of_rendered, join_batches
from eloftr_ops.training.config import RENDERED, DataConfig, SourceConfig, ValidationConfig
from eloftr_ops.training.interruption import leave_signals_to_the_main_process

_PROCEDURAL_SIDE = 512  # pixels
_DRAWN_FOR_VALIDATION = 8
_LEAST_HELD_FROM = 10  # images, of which some are held out
_OF_WINDOWS = 1  # last part of the seed of what is drawn after a pair was made

Place = tuple[int, int]  # step, position in it


class Textures:
    """The images that pairs are rendered from, and those held out for validation."""

    def __init__(self, config: DataConfig, hold_out: float, seed: int) -> None:
        images: list[Tensor] = []
        if config.textures is not None:
            images = read_textures(config.textures, max_images=config.max_images, strict=config.strict)
        period = round(1 / hold_out) if hold_out > 0 and len(images) >= _LEAST_HELD_FROM else 0
        self.held_out = images[::period] if period else []
        images = [image for i, image in enumerate(images) if not period or i % period]
        drawn = procedural_textures(generator_of(seed), config.procedural, _PROCEDURAL_SIDE)
        self.images, self.drawn = len(images), len(drawn)
        self.training: list[Tensor] = [*images, *drawn]
        self.weights = [1.0] * len(images) + [config.procedural_weight] * config.procedural

    def for_validation(self) -> list[Tensor]:
        """Those held out; where none are, those of training; without any, some drawn by chance."""
        if self.held_out or self.training:
            return self.held_out or self.training
        return list(procedural_textures(generator_of(0), _DRAWN_FOR_VALIDATION, _PROCEDURAL_SIDE))


class PairMixture(Dataset[TrainingBatch]):
    """Pair number ``position`` of ``step``, as a batch of one.

    Args:
        config: sources and sizes.
        textures: of the rendered ones.
        seed: of everything drawn.

    Raises:
        ValueError, FileError: sources that cannot be opened.
    """

    def __init__(self, config: DataConfig, textures: Textures, seed: int) -> None:
        self.config, self.seed = config, seed
        self._sources = [_open(source, config, textures) for source in config.sources]
        self._weights = torch.tensor([source.weight for source in config.sources], dtype=torch.float64)

    def describe(self, textures: Textures) -> str:
        """What the pairs come from, with numbers."""
        parts = []
        if any(source.kind in RENDERED for source in self.config.sources):
            parts.append(f"{textures.images} images for training, {len(textures.held_out)} for validation")
            if textures.drawn:
                parts.append(f"{textures.drawn} textures drawn by chance")
        for source, pairs in zip(self.config.sources, self._sources, strict=True):
            if isinstance(pairs, LabelledPairs):
                parts.append(f"{len(pairs)} {source.kind} pairs")
        return ", ".join(parts)

    def size_of(self, step: int) -> tuple[int, int]:
        """(height, width) of the step's pairs."""
        generator = generator_of(self.seed, step)
        return self.config.sizes[int(torch.randint(len(self.config.sizes), (), generator=generator))]

    def count_of(self, step: int) -> int:
        """Pairs of the step, over all processes."""
        return max(1, self.config.batch_pixels // math.prod(self.size_of(step)))

    def __getitem__(self, place: Place) -> TrainingBatch:
        """The pair; `FileError` if files cannot be used and ``strict``, or none of a source can be."""
        step, position = place
        generator, size = generator_of(self.seed, step, position), self.size_of(step)
        seed = seed_of(self.seed, step, position, _OF_WINDOWS)
        source = self._sources[int(torch.multinomial(self._weights, 1, generator=generator))]
        if isinstance(source, HomographyPairs | ScenePairs):
            pair = batch_of_rendered(source.sample(1, size, generator), [seed])
        else:
            index = int(torch.randint(len(source), (), generator=generator))
            pair = batch_of_labelled(_at_size(source, size)[index], size, seed)
        return pair._replace(joined=self.count_of(step))


class _Shares(Sampler[list[Place]]):
    """Places of one process, part by part: of the parts of a step, part k has positions k, k + parts, ..."""

    def __init__(self, mixture: PairMixture, steps: range, process: int, processes: int, accumulate: int) -> None:
        self._mixture, self._steps = mixture, steps
        self._parts, self._own = (
            processes * accumulate,
            range(process * accumulate, (process + 1) * accumulate),
        )

    def __iter__(self) -> Iterator[list[Place]]:
        for step in self._steps:
            count = self._mixture.count_of(step)
            for part in self._own:
                yield [(step, position) for position in range(part, count, self._parts)]

    def __len__(self) -> int:
        return len(self._steps) * len(self._own)


def batches(
    mixture: PairMixture, steps: range, *, process: int = 0, processes: int = 1, accumulate: int = 1
) -> Iterator[TrainingBatch | None]:
    """The micro-batches of one process, ``accumulate`` per step; None for a micro-batch without a pair.

    Args:
        mixture: the pairs.
        steps: to go through.
        process: number of this process.
        processes: of all that share the steps.
        accumulate: parts that each process has of a step.
    """
    loader = DataLoader(
        mixture,
        batch_sampler=_Shares(mixture, steps, process, processes, accumulate),
        num_workers=mixture.config.workers,
        collate_fn=join_batches,
        worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator(),  # otherwise the loader would draw from the global one
    )
    return iter(loader)


def validation_batches(config: ValidationConfig, data: DataConfig, textures: Textures) -> Iterator[TrainingBatch]:
    """The same rendered homographies at each call, one pair at a time."""
    pairs = HomographyPairs(textures.for_validation(), data.homographies)
    for position in range(config.pairs):
        yield batch_of_rendered(pairs.sample(1, config.size, generator_of(config.seed, position)))


def seed_of(*parts: int) -> int:
    """A seed below 2**63 that depends on each of the parts, all at least 0."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_of(*parts: int) -> torch.Generator:
    """A CPU generator of :func:`seed_of`."""
    return torch.Generator().manual_seed(seed_of(*parts))


def _open(source: SourceConfig, config: DataConfig, textures: Textures) -> HomographyPairs | ScenePairs | LabelledPairs:
    if source.kind in RENDERED:
        if source.kind == "homographies":
            return HomographyPairs(textures.training, config.homographies, weights=textures.weights)
        return ScenePairs(textures.training, config.scenes, weights=textures.weights)
    options = PairOptions(strict=config.strict)
    root = "." if source.root is None else source.root
    if source.kind == "megadepth":
        return MegaDepthPairs(
            root,
            source.index or root,
            min_score=source.min_score,
            max_score=source.max_score,
            depth=source.depth,
            options=options,
        )
    if source.kind == "scannet":
        return ScanNetPairs(root, source.index, depth=source.depth, options=options)
    return JsonPairs(Path(source.index or ""), source.root, labels=source.labels, options=options)


def _at_size(pairs: LabelledPairs, size_hw: tuple[int, int]) -> LabelledPairs:
    """The same pairs, read no larger than needed; what was found unusable is known to both."""
    sized = copy.copy(pairs)
    sized.options = dataclasses.replace(pairs.options, resize=max(size_hw))
    return sized
