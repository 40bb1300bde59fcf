# SPDX-License-Identifier: Apache-2.0
"""What is saved is what is loaded, in every layout, form and precision."""

import json

import pytest
import torch
from safetensors import safe_open

from eloftr_ops import EfficientLoFTR
from eloftr_ops.weights import embedded_names, load_pretrained, loading, write_embedded
from eloftr_ops.weights.saving import EMBEDDED_LIMIT
from support.weights import randomise, same_weights, tiny_config, tiny_model

CHANGED = {"threshold": 0.4, "centred_subpixel": True, "gradient_mode": "soft", "position_scale": (0.7, 0.8)}


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("form", ["training", "fused"])
@pytest.mark.parametrize("layout", ["eloftr_ops", "authors"])
def test_a_saved_folder_is_the_same_model(tmp_path, layout, form):
    model = tiny_model(tiny_config(**CHANGED))
    model = model.fused() if form == "fused" else model
    model.save_pretrained(tmp_path / "deep" / "folder", layout=layout)
    loaded = EfficientLoFTR.from_pretrained(tmp_path / "deep" / "folder")
    assert same_weights(loaded, model)
    assert loaded.config == model.config
    assert not loaded.training


def test_authors_checkpoint_has_their_shape(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "folder", layout="authors")
    state = torch.load(tmp_path / "folder" / "model.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(
        state["matcher.loftr_coarse.layers.1.q_proj.weight"],
        model.transformer.layers[0].cross_attention.q_proj.weight,
    )
    assert all(name.startswith("matcher.") for name in state)


def test_our_safetensors_file_carries_its_configuration(tmp_path):
    model = tiny_model(tiny_config(**CHANGED))
    model.save_pretrained(tmp_path / "folder")
    loaded = load_pretrained(tmp_path / "folder" / "model.safetensors")
    assert same_weights(loaded, model)
    assert loaded.config == model.config


def test_arguments_change_the_configuration_and_nothing_else(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "folder")
    changes = {
        "threshold": 25.0,
        "score": "similarity",
        "border_removal": 0,
        "position_scale": (0.5, 0.5),
        "gradient_mode": "straight_through",
    }
    loaded = EfficientLoFTR.from_pretrained(str(tmp_path / "folder"), **changes)
    assert loaded.config == model.config.replace(**changes)
    other = tiny_config(num_heads=4)
    assert load_pretrained(tmp_path / "folder", config=other).config == other


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_comes_in_the_dtype_asked_for(tmp_path, dtype):
    model = tiny_model()
    model.save_pretrained(tmp_path / "folder")
    assert same_weights(load_pretrained(tmp_path / "folder", dtype=dtype), model.to(dtype))


def test_a_half_precision_folder_loads_as_float32(tmp_path):
    model = tiny_model().half()
    model.save_pretrained(tmp_path / "folder", layout="authors")
    assert same_weights(load_pretrained(tmp_path / "folder"), model.float())


def test_loaded_weights_are_trainable_and_own_their_memory(tmp_path):
    tiny_model().save_pretrained(tmp_path / "folder")
    first, second = (load_pretrained(tmp_path / "folder") for _ in range(2))
    assert all(p.requires_grad and p.is_contiguous() for p in first.parameters())
    with torch.no_grad():
        next(first.parameters()).zero_()
    assert not same_weights(first, second)


def test_loading_leaves_the_random_state_alone(tmp_path):
    tiny_model().save_pretrained(tmp_path / "folder")
    before = torch.get_rng_state()
    load_pretrained(tmp_path / "folder")
    assert torch.equal(torch.get_rng_state(), before)


def test_saving_again_replaces_the_weights_and_keeps_other_files(tmp_path):
    folder, model = tmp_path / "folder", tiny_model()
    model.save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    randomise(model, seed=1)
    model.save_pretrained(folder, layout="authors")
    assert same_weights(load_pretrained(folder), model)
    assert contents(folder) == ["config.json", "model.ckpt", "model.safetensors", "notes.txt"]
    assert contents(tmp_path) == ["folder"]


def test_a_save_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match="No space"):
        tiny_model().save_pretrained(tmp_path / "folder")
    with pytest.raises(OSError, match="No space"):
        write_embedded(tiny_model(), tmp_path / "small.safetensors")
    assert contents(tmp_path) == []


def test_embedded_weights_load_by_name_in_float32(tmp_path, monkeypatch):
    model = tiny_model(tiny_config(**CHANGED))
    size = write_embedded(model, tmp_path / "tiny.safetensors", metadata={"steps": "100"})
    assert size == (tmp_path / "tiny.safetensors").stat().st_size
    with safe_open(tmp_path / "tiny.safetensors", "pt") as file:
        assert file.metadata()["steps"] == "100"
        assert json.loads(file.metadata()["config"]) == model.config.to_dict()

    monkeypatch.setattr(loading.resources, "files", lambda package: tmp_path)
    assert embedded_names() == ["tiny"]
    loaded = load_pretrained("tiny")
    assert loaded.config == model.config
    for (name, kept), (_, value) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert kept.dtype == torch.float32
        assert torch.equal(kept, value if value.dim() == 1 else value.half().float()), name


def test_embedded_weights_have_a_size_limit(tmp_path):
    with pytest.raises(ValueError, match=r"expected at most 1000 bytes in torch.float16, got"):
        write_embedded(tiny_model(), tmp_path / "small.safetensors", limit=1000)
    assert contents(tmp_path) == []


def test_embedded_weights_must_fit_their_precision(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.pyramid.coarse_projection.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"pyramid.coarse_projection.weight: expected values that are finite in"):
        write_embedded(model, tmp_path / "small.safetensors")
    assert write_embedded(model, tmp_path / "small.safetensors", dtype=torch.bfloat16) < EMBEDDED_LIMIT


def test_every_embedded_model_loads():
    for name in embedded_names():
        model = load_pretrained(name)
        assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
