# SPDX-License-Identifier: Apache-2.0
"""transformers' configuration: its fields, files and checks, and the way to and from the operator's."""

import json

import pytest
import transformers

from eloftr_ops import EfficientLoFTRConfig as OperatorConfig
from eloftr_ops.integrations.transformers import EfficientLoFTRConfig


def test_defaults_are_the_full_model_and_transformers_own():
    ours, theirs = EfficientLoFTRConfig(), transformers.EfficientLoFTRConfig()
    assert ours.to_eloftr_ops() == OperatorConfig.preset("full")
    public = {k: v for k, v in ours.to_dict().items() if k not in ("eloftr_ops", "rope_parameters")}
    assert public.items() <= theirs.to_dict().items()
    assert ours.rope_parameters == theirs.rope_parameters


@pytest.mark.parametrize("preset", ["full", "optimized", "small"])
def test_every_preset_survives_the_way_to_transformers_words_and_back(preset, tmp_path):
    config = OperatorConfig.preset(preset).replace(gradient_mode="soft", soft_temperature=0.5)
    theirs = EfficientLoFTRConfig.from_eloftr_ops(config)
    assert theirs.to_eloftr_ops() == config
    theirs.save_pretrained(tmp_path)
    assert EfficientLoFTRConfig.from_pretrained(tmp_path).to_eloftr_ops() == config


def test_json_holds_the_fields_and_gives_an_equal_configuration(tmp_path):
    config = EfficientLoFTRConfig(coarse_matching_threshold=0.3, num_attention_layers=2)
    text = json.loads(config.to_json_string())
    assert text["coarse_matching_threshold"] == 0.3
    assert text["num_attention_layers"] == 2
    config.to_json_file(tmp_path / "config.json")
    assert EfficientLoFTRConfig.from_json_file(tmp_path / "config.json").to_dict() == config.to_dict()
    assert EfficientLoFTRConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_arguments_of_every_transformers_configuration_are_kept():
    config = EfficientLoFTRConfig(output_hidden_states=True, num_labels=3, name_or_path="somewhere")
    assert config.output_hidden_states
    assert config.num_labels == 3
    assert config.name_or_path == "somewhere"
    assert EfficientLoFTRConfig.from_dict({}, output_attentions=True).output_attentions


def test_transformers_reads_our_file_and_we_read_its(tmp_path):
    EfficientLoFTRConfig(coarse_matching_threshold=0.3).save_pretrained(tmp_path / "ours")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").coarse_matching_threshold == 0.3
    transformers.EfficientLoFTRConfig(coarse_matching_border_removal=1).save_pretrained(tmp_path / "theirs")
    assert EfficientLoFTRConfig.from_pretrained(tmp_path / "theirs").to_eloftr_ops().border_removal == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("coarse_matching_threshold", 1.5, "threshold: expected a probability"),
        ("coarse_matching_threshold", "high", "threshold: expected a number"),
        ("num_attention_heads", 0, "num_heads: expected at least 1"),
        ("num_attention_heads", 2.5, "num_heads: expected an int"),
        ("hidden_size", 64, "hidden_size: expected 256, got 64"),
        ("stage_stride", [2, 2, 2, 2], "stage_stride: expected .* which the method fixes"),
        ("fine_kernel_size", 10, "fine_kernel_size: expected 8"),
        ("out_features", [64, 64], "stage_channels: expected 4 numbers"),
        ("eloftr_ops", {"threshold": 0.1}, "eloftr_ops: expected some of"),
        ("rope_parameters", {"rope_theta": 500.0}, "rope_theta: expected 10000.0"),
    ],
)
def test_a_value_outside_its_domain_is_named(field, value, message):
    with pytest.raises((ValueError, TypeError), match=message):
        EfficientLoFTRConfig(**{field: value})


def test_the_configuration_of_another_model_is_refused(tmp_path):
    transformers.SuperGlueConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type: expected 'efficientloftr', got 'superglue'"):
        EfficientLoFTRConfig.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"expected an eloftr_ops\.EfficientLoFTRConfig, got dict"):
        EfficientLoFTRConfig.from_eloftr_ops({})
