# SPDX-License-Identifier: Apache-2.0
"""``python -m eloftr_ops.training RECIPE.yaml``: train on homographies of a folder of photographs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import torch
import typer

from eloftr_ops.config import EfficientLoFTRConfig
from eloftr_ops.data import HomographyPairs, PhotoTextures, SyntheticConfig, procedural_textures
from eloftr_ops.matcher import EfficientLoFTR
from eloftr_ops.training.supervised import TrainingConfig, train
from eloftr_ops.weights import write_embedded

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The fields of a recipe file; see ``recipes/small.yaml``."""

    photos: str
    folder: str
    preset: str = "small"
    procedural: int = 60
    procedural_weight: float = 0.2
    zoom: tuple[float, float] = (0.6, 3.0)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        ValueError: not a mapping, unknown or missing fields; the message names them.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"recipe: cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"recipe: expected a mapping in {path}, got {type(values).__name__}.")
    training = values.pop("training", {})
    if "sizes" in training:
        training["sizes"] = tuple(tuple(size) for size in training["sizes"])
    if "zoom" in values:
        values["zoom"] = tuple(values["zoom"])
    return _build(Recipe, {**values, "training": _build(TrainingConfig, training, "training.")})


def main(recipe: Path, device: str = "cpu", threads: int = 0, until: int = 0) -> None:
    """Train, or go on training, as RECIPE says; writes FOLDER/weights.safetensors at the end.

    Args:
        recipe: YAML file.
        device: torch device.
        threads: CPU threads; 0 leaves torch's choice.
        until: stop after this step; 0 goes to the end.
    """
    chosen = read_recipe(recipe)
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(chosen.training.seed)
    generator = torch.Generator().manual_seed(chosen.training.seed)
    photos = list(PhotoTextures(Path(chosen.photos)))
    drawn = list(procedural_textures(generator, chosen.procedural, 512)) if chosen.procedural else []
    weights = [1.0] * len(photos) + [chosen.procedural_weight] * len(drawn)
    pairs = HomographyPairs(
        [texture.to(device) for texture in (*photos, *drawn)],
        SyntheticConfig(zoom=chosen.zoom),
        weights=weights,
    )
    model = EfficientLoFTR(EfficientLoFTRConfig.preset(chosen.preset)).to(device)
    trained = train(model, pairs, chosen.training, Path(chosen.folder), until=until or None)
    path = Path(chosen.folder) / "weights.safetensors"
    size = write_embedded(trained.cpu(), path, metadata={"steps": str(chosen.training.steps)})
    typer.echo(f"written {path} ({size} bytes)")


def _build(kind: type[T], values: dict[str, Any], prefix: str = "") -> T:
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    missing = sorted(
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    )
    if unknown or missing:
        problem = ", ".join(
            [f"unknown {prefix}{n}" for n in unknown] + [f"missing {prefix}{n}" for n in missing]
        )
        raise ValueError(f"recipe: {problem}; known: {', '.join(fields)}.")
    return kind(**values)


if __name__ == "__main__":
    typer.run(main)
