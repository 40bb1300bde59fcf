# SPDX-License-Identifier: Apache-2.0
"""Configuration files: errors name file and field, recipes can be read, nothing is lost on the way."""

from pathlib import Path
from typing import Any

import pytest

from eloftr_ops.training.config_file import (
    config_from_dict,
    config_to_dict,
    read_config,
    read_recipe,
    write_config,
)

LEAST = "run: {folder: runs/a}\ndata: {procedural: 2}\n"


def test_defaults_and_numbers_in_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(LEAST + "optimizer: {learning_rate: 1e-4}\nloss: {end_to_end: {robust: cauchy}}\n")
    config = read_config(path)
    assert config.optimizer.learning_rate == 1e-4
    assert (config.loss.windows, config.loss.fine_weight, config.optimizer.pyramid_rate) == (512, 0.5, 1.0)
    assert (config.loss.homography_weight, config.loss.pose_weight) == (0, 0)
    assert config.loss.end_to_end.robust == "cauchy"


@pytest.mark.parametrize("name", ["small", "fine_tune"])
def test_recipes_are_read_and_written_without_loss(tmp_path: Path, name: str) -> None:
    config = read_recipe(name, {"run": {"folder": str(tmp_path)}, "data": {"textures": "images"}})
    assert config.data.textures == "images"
    assert config.data.sizes[0] == (256, 256)
    write_config(config, tmp_path / "again.yaml")
    assert read_config(tmp_path / "again.yaml") == config
    assert config_to_dict(config)["run"]["folder"] == str(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {folder: a, stepz: 3}\ndata: {procedural: 2}", r"unknown run\.stepz; known: folder, steps"),
        ("run: {}\ndata: {procedural: 2}", r"missing run\.folder"),
        ("run: {folder: a}", r"missing data"),
        ("run: {folder: a}\ndata: {}", r"data\.textures: expected a folder of images"),
        (LEAST + "loss: {windows: many}", r"loss\.windows: expected a whole number, got 'many'"),
        (LEAST + "loss: {padding: 1}", r"loss\.padding: expected true or false"),
        (LEAST + "optimizer: {learning_rate: fast}", r"optimizer\.learning_rate: expected a number"),
        (LEAST + "optimizer: {learning_rate: 0}", r"optimizer\.learning_rate: expected more than 0"),
        (LEAST + "validation: {size: [256]}", r"validation\.size: expected a list of 2"),
        (LEAST + "model: {changes: 3}", r"model\.changes: expected fields"),
        (
            "run: {folder: a, precision: half}\ndata: {procedural: 1}",
            r"run\.precision: expected one of 32-true",
        ),
        ("run: {folder: a}\ndata: {sources: [{kind: json}]}", r"data\.sources\[0\]\.index: expected a path"),
        ("run: {folder: a}\ndata: {sources: [{kind: video}]}", r"data\.sources\[0\]\.kind: expected one of"),
        (
            "run: {folder: a}\ndata: {procedural: 1, sizes: [[8, 64]]}",
            r"data\.sizes: expected \(height, width\)",
        ),
        ("run: {folder: a}\ndata: {procedural: 1, scenes: {yaw: -1}}", r"data\.scenes\.yaw must be >= 0"),
        ("- run", r"expected sections"),
        ("run: [", r"cannot be read"),
    ],
)
def test_errors_name_file_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml: cannot be read"):
        read_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("run", "steps", 10**8),
        ("run", "checkpoint_seconds", float("inf")),
        ("data", "workers", 10**6),
        ("data", "procedural", 10**9),
        ("data", "batch_pixels", 10**12),
        ("data", "sizes", [[64, 10**6]]),
        ("validation", "size", [10**6, 64]),
        ("validation", "pairs", 10**9),
        ("loss", "windows", 10**9),
        ("loss", "fine_weight", float("inf")),
        ("optimizer", "learning_rate", float("inf")),
        ("optimizer", "accumulate", 10**9),
    ],
)
def test_numbers_that_no_run_needs_are_refused(section: str, field: str, value: Any) -> None:
    values: dict[str, Any] = {"run": {"folder": "x"}, "data": {"procedural": 1}}
    config_from_dict(values)
    values[section] = {**values.get(section, {}), field: value}
    with pytest.raises(ValueError, match=rf"{section}\.{field}: expected"):
        config_from_dict(values)
