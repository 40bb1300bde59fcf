# SPDX-License-Identifier: Apache-2.0
"""The authors' checkpoints in the forms they are found in, without a configuration beside them."""

import pytest
import safetensors.torch
import torch

from eloftr_ops.weights import load_pretrained
from eloftr_ops.weights.names import to_layout
from support.weights import same_weights, tiny_config, tiny_model

# Eight heads, as in the released models: what a checkpoint alone is taken to have.
CONFIG = tiny_config(num_heads=8, num_layers=2, stage_blocks=(1, 2, 1, 3), subpixel_channels=7)


def authors_state(model, prefix=""):
    return {prefix + to_layout(name, "authors"): tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["matcher.", ""])
@pytest.mark.parametrize("form", ["training", "fused"])
def test_the_shapes_tell_the_architecture(tmp_path, form, prefix, suffix):
    model = tiny_model(CONFIG)
    model = model.fused() if form == "fused" else model
    state = authors_state(model, prefix)
    path = tmp_path / f"eloftr{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": state} if suffix == ".ckpt" else state, path)
    loaded = load_pretrained(path)
    assert same_weights(loaded, model)
    assert loaded.config == model.config


def test_other_entries_of_a_training_checkpoint_are_passed_over(tmp_path):
    model = tiny_model(CONFIG)
    checkpoint = {
        "epoch": 29,
        "optimizer_states": [{"lr": 1e-3}],
        "state_dict": authors_state(model, "matcher."),
    }
    torch.save(checkpoint, tmp_path / "last.ckpt")
    assert same_weights(load_pretrained(tmp_path / "last.ckpt"), model)


def test_batch_norm_counters_may_be_missing(tmp_path):
    model = tiny_model(CONFIG)
    state = {n: t for n, t in authors_state(model).items() if not n.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "eloftr.pth")
    loaded = load_pretrained(tmp_path / "eloftr.pth").state_dict()
    for name, tensor in model.state_dict().items():
        expected = torch.tensor(0) if name.endswith("num_batches_tracked") else tensor
        assert torch.equal(loaded[name], expected), name


def test_a_configuration_tells_what_shapes_cannot(tmp_path):
    model = tiny_model(tiny_config(num_heads=2))
    torch.save(authors_state(model), tmp_path / "eloftr.ckpt")
    assert load_pretrained(tmp_path / "eloftr.ckpt", config=model.config).config.num_heads == 2
    narrow = tiny_model(tiny_config(stage_channels=(8, 8, 16, 16)))
    torch.save(authors_state(narrow), tmp_path / "narrow.ckpt")
    with pytest.raises(ValueError, match=r"multiple of 4 \* num_heads = 32, got 16.* Pass config="):
        load_pretrained(tmp_path / "narrow.ckpt")


def test_our_own_state_dict_is_as_good(tmp_path):
    model = tiny_model(CONFIG)
    torch.save(model.state_dict(), tmp_path / "ours.pt")
    assert same_weights(load_pretrained(tmp_path / "ours.pt"), model)


def test_one_parameter_under_two_names_is_refused(tmp_path):
    state = authors_state(tiny_model(CONFIG))
    name = "loftr_coarse.layers.0.q_proj.weight"
    torch.save({**state, f"matcher.{name}": state[name]}, tmp_path / "eloftr.ckpt")
    with pytest.raises(ValueError, match=f"one entry per parameter, got matcher.{name} a second time"):
        load_pretrained(tmp_path / "eloftr.ckpt")
