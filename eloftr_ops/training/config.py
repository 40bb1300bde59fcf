# SPDX-License-Identifier: Apache-2.0
"""What a training run is made of: one frozen dataclass per section of a configuration file.

``training/config_file.py`` reads them from YAML; ``docs/training.md`` has them as a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from eloftr_ops.checks import MIN_SIZE
from eloftr_ops.data.scenes import SceneConfig
from eloftr_ops.data.synthetic import SyntheticConfig
from eloftr_ops.training.end_to_end import EndToEndConfig
from eloftr_ops.training.expected_reward import ObjectiveConfig

SourceKind = Literal["homographies", "scenes", "megadepth", "scannet", "json"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "64-true"]

RENDERED: tuple[SourceKind, ...] = ("homographies", "scenes")


# What a typing error may not ask for: memory and time grow with these, and names of checkpoints have eight digits.
_MOST: dict[str, float] = {
    "steps": 99_999_999,
    "seed": 2**63 - 1,
    "max_images": 10_000_000,
    "procedural": 100_000,
    "batch_pixels": 2**31,
    "workers": 1024,
    "windows": 1_000_000,
    "accumulate": 10_000,
    "pairs": 1_000_000,
}
_MOST_OTHERWISE = 1e9
_MAX_SIDE = 8192  # pixels


def _at_least(name: str, value: float, least: float, *, exclusive: bool = False) -> None:
    """Also not above what any run needs, and not NaN."""
    most = _MOST.get(name, _MOST_OTHERWISE)
    if not (value > least if exclusive else value >= least):
        raise ValueError(f"{name}: expected {'more than' if exclusive else 'at least'} {least:g}, got {value}.")
    if value > most:
        raise ValueError(f"{name}: expected at most {most:.10g}, got {value}.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained.

    Args:
        preset: of :class:`eloftr_ops.EfficientLoFTRConfig`, with random weights; ignored if ``weights`` is set.
        weights: to start from: a name, file, folder or Hub repository, as ``from_pretrained`` takes them.
        changes: fields of the model's configuration to set over the preset's or the weights' own.
        freeze_batch_norm: normalise with the stored statistics, and do not update them; scale and shift are still
            trained. Pairs are then independent of each other, so the number of processes and of micro-batches changes
            only the rounding.
        sync_batch_norm: statistics of the joined batch of all processes; CUDA only.
        channels_last: weights of convolutions in channels-last order.
        compile: ``torch.compile`` backbone, transformer and pyramid.
    """

    preset: str = "small"
    weights: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    freeze_batch_norm: bool = False
    sync_batch_norm: bool = False
    channels_last: bool = False
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One part of the mixture that pairs are drawn from.

    Args:
        kind: ``homographies`` and ``scenes`` are rendered from the textures of the data section; ``megadepth``,
            ``scannet`` and ``json`` read labelled pairs.
        weight: how often it is drawn, relative to the others.
        root: folder of the images; None where ``json`` pairs start from their file's folder.
        index: MegaDepth's index file or folder, ScanNet's index (None: ``root``'s ``test.npz``), or the JSON file.
        min_score: of MegaDepth's overlap scores, pairs not above it are left out.
        max_score: of MegaDepth's overlap scores, pairs above it are left out.
        depth: read depth; without it pairs are supervised by their pose alone.
        labels: of ``json``: every pair must have a label; False only for the objective ``support``.

    Raises:
        ValueError: a field that the kind needs is missing, or a weight that is not positive.
    """

    kind: SourceKind
    weight: float = 1.0
    root: str | None = None
    index: str | None = None
    min_score: float = 0.0
    max_score: float = math.inf
    depth: bool = True
    labels: bool = True

    def __post_init__(self) -> None:
        needed: dict[str, tuple[str, ...]] = {
            "megadepth": ("root", "index"),
            "scannet": ("root",),
            "json": ("index",),
        }
        for name in needed.get(self.kind, ()):
            if getattr(self, name) is None:
                raise ValueError(f"{name}: expected a path for kind {self.kind}, got none.")
        _at_least("weight", self.weight, 0, exclusive=True)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where pairs come from and how many make a step.

    Args:
        textures: folder of images without labels, of any kind and depth of folders, that pairs are rendered from.
        max_images: the largest number of images in memory.
        procedural: textures drawn by chance beside them.
        procedural_weight: how often one of those is drawn, relative to an image.
        sources: the mixture.
        homographies: how homographies are rendered.
        scenes: how scenes are rendered.
        sizes: (height, width) of the pairs, one drawn per step. Labelled images are reduced and filled up to it.
        batch_pixels: pixels of one image side, summed over the pairs of a step (all processes and micro-batches). The
            step has as many pairs of its size as fit, and at least one.
        workers: processes that prepare pairs in advance; with 0 the training process prepares them.
        strict: stop at a file that cannot be used, instead of skipping it.

    Raises:
        ValueError: a value out of range, or rendered pairs without a texture.
    """

    textures: str | None = None
    max_images: int = 2000
    procedural: int = 0
    procedural_weight: float = 0.2
    sources: tuple[SourceConfig, ...] = (SourceConfig(kind="homographies"),)
    homographies: SyntheticConfig = field(default_factory=SyntheticConfig)
    scenes: SceneConfig = field(default_factory=SceneConfig)
    sizes: tuple[tuple[int, int], ...] = ((256, 256),)
    batch_pixels: int = 4 * 256 * 256
    workers: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_images", 1), ("procedural", 0), ("batch_pixels", 1), ("workers", 0)):
            _at_least(name, getattr(self, name), least)
        _at_least("procedural_weight", self.procedural_weight, 0, exclusive=True)
        if not self.sources:
            raise ValueError("sources: expected at least one, got none.")
        sides = [side for size in self.sizes for side in size]
        if not sides or not MIN_SIZE <= min(sides) <= max(sides) <= _MAX_SIDE:
            raise ValueError(
                f"sizes: expected (height, width) of {MIN_SIZE} to {_MAX_SIDE} pixels each, got {self.sizes}."
            )
        rendered = [source.kind for source in self.sources if source.kind in RENDERED]
        if rendered and self.textures is None and self.procedural == 0:
            raise ValueError(
                f"textures: expected a folder of images for {', '.join(rendered)}, got none. Set it, or procedural."
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The losses of a batch.

    Args:
        windows: true pairs of cells whose windows the fine losses look at, expected number per step.
        fine_weight: of the pixel and sub-pixel losses together.
        subpixel_weight: of the sub-pixel loss within them.
        subpixel_divergence: of ``losses.matching.subpixel_divergence`` within the sub-pixel loss; 0 leaves it out.
        fine_from: step from which the fine losses are trained too; before it the pyramid is not run.
        padding: fine losses look at the matcher's own pairs, completed with true ones (ground-truth padding, LoFTR);
            costs one more pass without gradient.
        least_true: share of the windows that are true pairs at least, with ``padding``.
        depth_tolerance: relative difference of depths up to which they count as one surface; LoFTR takes 0.2.
        pose_distance: pixels of Sampson distance up to which a match is taken as true where only the pose is known.
        homography_weight: of the corner error, pixels, of the homography estimated from the matches; 0 leaves it out.
        pose_weight: of the error, radians, of the relative pose estimated from the matches; 0 leaves it out.
        end_to_end: how those two are estimated.

    Raises:
        ValueError: a value out of range.
    """

    windows: int = 512
    fine_weight: float = 0.5
    subpixel_weight: float = 1.0
    subpixel_divergence: float = 0.0
    fine_from: int = 0
    padding: bool = False
    least_true: float = 0.25
    depth_tolerance: float = 0.05
    pose_distance: float = 8.0
    homography_weight: float = 0.0
    pose_weight: float = 0.0
    end_to_end: EndToEndConfig = field(default_factory=EndToEndConfig)

    def __post_init__(self) -> None:
        _at_least("windows", self.windows, 1)
        weights = (
            "fine_weight",
            "subpixel_weight",
            "subpixel_divergence",
            "homography_weight",
            "pose_weight",
        )
        for name in ("fine_from", *weights):
            _at_least(name, getattr(self, name), 0)
        for name in ("depth_tolerance", "pose_distance"):
            _at_least(name, getattr(self, name), 0, exclusive=True)
        if not 0 <= self.least_true <= 1:
            raise ValueError(f"least_true: expected a share in [0, 1], got {self.least_true}.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its learning rate schedule, and its safeguards.

    Args:
        learning_rate: after warm-up.
        warmup_steps: linear warm-up.
        final_rate: share of the rate that the cosine decay ends at.
        pyramid_rate: factor on the rate of the feature pyramid.
        weight_decay: of matrices and kernels; norms and biases are not decayed.
        clip_norm: largest gradient norm.
        accumulate: micro-batches per process and step; more of them need less memory and give the same gradient.
        ema_decay: of the averaged weights, which are validated and exported; smaller over the first steps.
        max_bad_steps: non-finite steps in a row (skipped, counted) after which the run stops.

    Raises:
        ValueError: a value out of range.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 300
    final_rate: float = 0.01
    pyramid_rate: float = 1.0
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    accumulate: int = 1
    ema_decay: float = 0.999
    max_bad_steps: int = 20

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip_norm"):
            _at_least(name, getattr(self, name), 0, exclusive=True)
        for name in ("warmup_steps", "pyramid_rate", "weight_decay"):
            _at_least(name, getattr(self, name), 0)
        for name in ("accumulate", "max_bad_steps"):
            _at_least(name, getattr(self, name), 1)
        for name in ("final_rate", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in [0, 1], got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Matches on rendered pairs that are the same each time.

    Args:
        every: steps between validations, which also choose the weights to export; 0 for none.
        pairs: number of them.
        size: (height, width).
        hold_out: share of the images that training does not see; none where there are fewer than ten images.
        seed: of the pairs.

    Raises:
        ValueError: a value out of range.
    """

    every: int = 500
    pairs: int = 32
    size: tuple[int, int] = (256, 256)
    hold_out: float = 0.1
    seed: int = 1_000_003

    def __post_init__(self) -> None:
        _at_least("every", self.every, 0)
        _at_least("pairs", self.pairs, 1)
        if not MIN_SIZE <= min(self.size) <= max(self.size) <= _MAX_SIDE:
            raise ValueError(f"size: expected {MIN_SIZE} to {_MAX_SIDE} pixels each, got {self.size}.")
        if not 0 <= self.hold_out <= 0.5:
            raise ValueError(f"hold_out: expected a share in [0, 0.5], got {self.hold_out}.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Folder, length, device and logging of a run.

    Args:
        folder: gets ``config.json`` and ``model.safetensors`` of the best weights, ``last`` with the last ones,
            ``checkpoints``, ``log.jsonl``, ``tensorboard`` and ``training.yaml``. A run that finds its checkpoints
            there goes on.
        steps: optimiser steps in all.
        seed: of the initial weights and of the data.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: of Lightning Fabric.
        checkpoint_every: steps between checkpoints.
        checkpoint_seconds: longest time between two checkpoints.
        checkpoint_piece_mib: split a checkpoint into files of at most so many MiB; None for one file.
        log_every: steps between log lines.
        tensorboard: write scalars for TensorBoard.

    Raises:
        ValueError: a value out of range.
    """

    folder: str
    steps: int = 20_000
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "32-true"
    checkpoint_every: int = 250
    checkpoint_seconds: float = 60.0
    checkpoint_piece_mib: int | None = None
    log_every: int = 50
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "checkpoint_every", "log_every"):
            _at_least(name, getattr(self, name), 1)
        _at_least("checkpoint_seconds", self.checkpoint_seconds, 0, exclusive=True)
        _at_least("seed", self.seed, 0)
        if self.checkpoint_piece_mib is not None:
            _at_least("checkpoint_piece_mib", self.checkpoint_piece_mib, 1)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A run: the sections of a configuration file."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        """The sources must have what the objective looks at.

        Raises:
            ValueError: none of them has.
        """
        if self.objective.kind != "support" and not all(source.labels for source in self.data.sources):
            raise ValueError(
                "data.sources: expected labels for this objective, got labels: false. Set objective.kind: support."
            )
        kinds = {source.kind for source in self.data.sources}
        if self.objective.kind == "homography_reward" and not kinds & {"homographies", "json"}:
            raise ValueError(
                "objective.kind: expected pairs with homographies (homographies, json), got "
                f"{', '.join(sorted(kinds))}."
            )
        if self.objective.kind == "pose_reward" and kinds == {"homographies"}:
            raise ValueError(
                "objective.kind: expected pairs with poses (scenes, megadepth, scannet, json), got homographies."
            )
