# SPDX-License-Identifier: Apache-2.0
"""Exchange with transformers, run: strict loading both ways, and the same coarse scores on the same images."""

import json

import pytest
import torch
from transformers import EfficientLoFTRConfig as TheirConfig
from transformers import EfficientLoFTRForKeypointMatching as TheirModel

from eloftr_ops import EfficientLoFTR, EfficientLoFTRConfig
from eloftr_ops.weights import load_pretrained
from support.models import coarse_stage
from support.weights import image_pair, randomise, same_weights, tiny_config, tiny_model

# transformers does not round its rotary tables to float16.
EXACT_ROTARY = {"round_rotary": False}
# Float32, a few hundred operations deep: relative error well under 1e-5. Rounding the tables moves the features of
# these models by 2e-6, another number of heads by 3e-3.
TOLERANCE = 1e-5


def theirs_of(model, folder):
    model.save_pretrained(folder, layout="transformers")
    theirs, report = TheirModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return theirs.eval()


@torch.no_grad()
def coarse_features(ours, theirs, images):
    maps = coarse_stage(ours, {"image0": images[:1], "image1": images[1:]}).coarse
    stacked = theirs.efficientloftr(images.expand(2, 3, -1, -1)[None]).feature_maps[0]
    return (maps.coarse0, maps.coarse1), stacked.unbind(1)


def relative_error(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_heads": 4, "num_layers": 2}, {"num_heads": 1, "stage_blocks": (2, 1, 2, 3)}],
    ids=["two heads", "four heads", "one head"],
)
def test_an_export_computes_the_same_coarse_features(tmp_path, changes):
    ours = tiny_model(tiny_config(**EXACT_ROTARY, **changes))
    mine, stacked = coarse_features(ours, theirs_of(ours, tmp_path / "folder"), image_pair())
    assert max(relative_error(a, b) for a, b in zip(mine, stacked, strict=True)) < TOLERANCE


def test_the_comparison_sees_a_wrong_number_of_heads(tmp_path):
    ours = tiny_model(tiny_config(**EXACT_ROTARY))
    theirs = theirs_of(ours, tmp_path / "folder")
    wrong = load_pretrained(tmp_path / "folder", config=tiny_config(**EXACT_ROTARY, num_heads=4))
    mine, stacked = coarse_features(wrong, theirs, image_pair())
    assert max(relative_error(a, b) for a, b in zip(mine, stacked, strict=True)) > 100 * TOLERANCE


@pytest.mark.parametrize("score", ["dual_softmax", "similarity"])
@torch.no_grad()
def test_an_export_finds_the_same_coarse_matches_with_the_same_scores(tmp_path, score):
    ours = tiny_model(tiny_config(**EXACT_ROTARY, temperature=10.0, threshold=0.0, border_removal=1, score=score))
    theirs, images = theirs_of(ours, tmp_path / "folder"), image_pair()
    found = theirs(images.expand(2, 3, -1, -1)[None])
    matched = found.matches[0, 0] >= 0
    mine = ours({"image0": images[:1], "image1": images[1:]})["confidence"]
    assert len(mine) == int(matched.sum()) > 0
    expected = found.matching_scores[0, 0][matched]
    torch.testing.assert_close(mine.sort().values, expected.sort().values, rtol=1e-4, atol=0)


def test_the_small_model_is_expressible(tmp_path):
    ours = EfficientLoFTR(EfficientLoFTRConfig.preset("small").replace(**EXACT_ROTARY)).eval()
    randomise(ours)
    with pytest.warns(UserWarning, match="transformers has no centred_subpixel"):
        ours.save_pretrained(tmp_path / "folder", layout="transformers")
    theirs, report = TheirModel.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(report.values())
    mine, stacked = coarse_features(ours, theirs.eval(), image_pair(64, 96))
    assert max(relative_error(a, b) for a, b in zip(mine, stacked, strict=True)) < TOLERANCE
    assert load_pretrained(tmp_path / "folder").config == ours.config


def test_their_folder_loads_as_it_is(tmp_path):
    torch.manual_seed(0)
    fields = {
        "out_features": [8, 8, 16, 32],
        "hidden_size": 32,
        "stage_num_blocks": [1, 2, 1, 1],
        "num_attention_layers": 1,
        "coarse_matching_threshold": 0.3,
        "coarse_matching_border_removal": 1,
        "fine_matching_slice_dim": 4,
    }
    theirs = TheirModel(TheirConfig(**fields)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "folder")
    ours = EfficientLoFTR.from_pretrained(tmp_path / "folder")
    assert ours.config == tiny_config(num_heads=8, threshold=0.3, border_removal=1)
    mine, stacked = coarse_features(ours, theirs, image_pair())
    assert max(relative_error(a, b) for a, b in zip(mine, stacked, strict=True)) < TOLERANCE


def test_a_model_that_went_through_transformers_comes_back_whole(tmp_path):
    ours = tiny_model(tiny_config(gradient_mode="soft", soft_temperature=0.5))
    theirs_of(ours, tmp_path / "there").save_pretrained(tmp_path / "back")
    loaded = load_pretrained(tmp_path / "back")
    assert same_weights(loaded, ours)
    assert loaded.config == ours.config


def test_absent_fields_are_the_full_model():
    from eloftr_ops.weights.configs import from_transformers

    assert from_transformers({}, "config.json") == EfficientLoFTRConfig()
    assert from_transformers(TheirConfig().to_dict(), "config.json") == EfficientLoFTRConfig()


def test_models_that_transformers_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="transformers has no re-parameterised blocks"):
        tiny_model().fused().save_pretrained(tmp_path / "folder", layout="transformers")
    with pytest.raises(ValueError, match=r"transformers has no position_scale; expected \(1.0, 1.0\)"):
        tiny_model(tiny_config(position_scale=(0.5, 0.5))).save_pretrained(tmp_path, layout="transformers")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stage_stride", [2, 2, 2, 2]),
        ("activation_function", "gelu"),
        ("q_aggregation_kernel_size", 2),
        ("kv_aggregation_stride", 8),
        ("attention_bias", True),
        ("mlp_activation_function", "relu"),
        ("fine_kernel_size", 10),
        ("batch_norm_eps", 1e-3),
        ("hidden_size", 64),
        ("num_key_value_heads", 1),
        ("partial_rotary_factor", 4.0),
        ("rope_theta", 500.0),
        ("rope_type", "linear"),
        ("num_attention_heads", "2"),
        ("coarse_matching_skip_softmax", "no"),
        ("eloftr_ops", {"threshold": 0.1}),
    ],
)
def test_another_method_than_ours_is_refused(tmp_path, field, value):
    tiny_model().save_pretrained(tmp_path, layout="transformers")
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    target = fields["rope_parameters"] if field in fields["rope_parameters"] else fields
    target[field] = value
    path.write_text(json.dumps(fields))
    names = {"num_attention_heads": "num_heads"}
    with pytest.raises((ValueError, TypeError), match=f"{names.get(field, field)}: expected"):
        load_pretrained(tmp_path)
