# SPDX-License-Identifier: Apache-2.0
"""Files that are wrong, broken or hostile: refused with an error that names the fault, and never run."""

import contextlib
import json
import pickle

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eloftr_ops.weights import WeightsNotFoundError, load_pretrained, save_pretrained, write_embedded
from eloftr_ops.weights.files import JSON_LIMIT
from eloftr_ops.weights.names import to_layout
from support.weights import tiny_config, tiny_model


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def authors_state():
    return {to_layout(n, "authors"): t for n, t in tiny_model(tiny_config(num_heads=8)).state_dict().items()}


def save_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "eloftr.ckpt")
    return tmp_path / "eloftr.ckpt"


def edit_config(folder, edit):
    fields = json.loads((folder / "config.json").read_text())
    edit(fields)
    (folder / "config.json").write_text(json.dumps(fields))


class Opener:
    """Unpickled as a call of ``open(path, "w")``."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


# names and shapes


def test_missing_and_unexpected_names_are_listed_as_the_file_has_them(tmp_path):
    state = authors_state()
    for index in range(7):
        state[f"loftr_fine.{index}"] = torch.zeros(1)
    del state["loftr_coarse.layers.1.merge.weight"]
    with pytest.raises(ValueError, match="expected the weights of the configured") as caught:
        load_pretrained(save_checkpoint(tmp_path, state))
    message = str(caught.value)
    assert "Missing (1): loftr_coarse.layers.1.merge.weight." in message
    assert "Unexpected (7): loftr_fine.0, loftr_fine.1, loftr_fine.2, loftr_fine.3, loftr_fine.4, ..." in message


def test_another_shape_is_named_with_both_shapes(tmp_path):
    state = authors_state()
    state["fine_preprocess.layer3_outconv.weight"] = torch.zeros(32, 16, 1, 1)
    text = r"fine_preprocess.layer3_outconv.weight expected \(32, 32, 1, 1\), got \(32, 16, 1, 1\)"
    with pytest.raises(ValueError, match=text):
        load_pretrained(save_checkpoint(tmp_path, state))


def test_weights_of_another_model(tmp_path):
    state = {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(10)}
    text = "expected EfficientLoFTR weights, which have backbone.layer0.rbr_dense.conv.weight or .* got conv1.weight"
    with pytest.raises(ValueError, match=text):
        load_pretrained(save_checkpoint(tmp_path, state))


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, {"step": 3}, torch.zeros(2), {1: torch.zeros(2)}])
def test_checkpoints_that_are_no_state_dict(tmp_path, content):
    with pytest.raises(ValueError, match="expected"):
        load_pretrained(save_checkpoint(tmp_path, content))


# values


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(tmp_path, value):
    model = tiny_model()
    model.backbone.stages[1][0].identity.running_var[3] = value
    state = {to_layout(n, "authors"): t for n, t in model.state_dict().items()}
    text = "backbone.layer1.0.rbr_identity.running_var: expected values that are finite in torch.float32"
    with pytest.raises(ValueError, match=text):
        load_pretrained(save_checkpoint(tmp_path, state), config=model.config)
    with pytest.raises(ValueError, match=r"identity.running_var: expected values that are finite"):
        model.save_pretrained(tmp_path / "folder")


def test_values_too_large_for_the_precision_asked_for(folder, tmp_path):
    model = tiny_model()
    model.pyramid.coarse_projection.weight.data[0, 0] = 1e6
    model.save_pretrained(tmp_path / "large")
    assert load_pretrained(tmp_path / "large").pyramid.coarse_projection.weight[0, 0] == 1e6
    with pytest.raises(ValueError, match=r"finite in torch.float16"):
        load_pretrained(tmp_path / "large", dtype=torch.float16)


def odd_tensors():
    return {
        "expanded": (torch.zeros(1).expand(10**6, 10**6), "every element of .* in the file, got a view"),
        "empty": (torch.zeros(10**9, 0), r"expected elements, got the empty shape \(1000000000, 0\)"),
        "integer": (torch.zeros(32, 32, 1, 1, dtype=torch.int64), "expected one of torch.float16"),
        "sparse": (torch.zeros(4, 4).to_sparse(), "expected a dense tensor"),
    }


@pytest.mark.parametrize("kind", ["expanded", "empty", "integer", "sparse"])
def test_tensors_of_a_kind_that_weights_are_not(tmp_path, kind):
    tensor, text = odd_tensors()[kind]
    state = {**authors_state(), "fine_preprocess.layer3_outconv.weight": tensor}
    with pytest.raises(ValueError, match=text):
        load_pretrained(save_checkpoint(tmp_path, state))


# broken files


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("layout", ["eloftr_ops", "authors"])
def test_truncated_files(tmp_path, layout, share):
    tiny_model().save_pretrained(tmp_path, layout=layout)
    path = next(tmp_path.glob("model.*"))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"{path.name}: .*Fetch it again|{path.name}: .*fetch it again"):
        load_pretrained(tmp_path)


@settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), legacy=st.booleans())
def test_damaged_checkpoints_raise_nothing_undocumented(tmp_path, data, legacy):
    path = tmp_path / "eloftr.ckpt"
    torch.save(authors_state(), path, _use_new_zipfile_serialization=not legacy)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, 4000) | st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(ValueError):  # or it loads: not every bit is load-bearing
        load_pretrained(path)


@pytest.mark.parametrize("name", ["page.ckpt", "page.safetensors"])
def test_a_web_page_in_place_of_weights(tmp_path, name):
    (tmp_path / name).write_text("<!DOCTYPE html><html>Sign in to download</html>")
    with pytest.raises(ValueError, match=f"{name}: "):
        load_pretrained(tmp_path / name)


# hostile files


@pytest.mark.parametrize("container", ["torch", "legacy torch", "plain pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, container):
    path, trace = tmp_path / "eloftr.ckpt", tmp_path / "trace"
    content = {"state_dict": {**authors_state(), "extra": Opener(trace)}}
    if container == "plain pickle":
        path.write_bytes(pickle.dumps({"state_dict": Opener(trace)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "torch")
    with pytest.raises(ValueError, match="refused") as caught:
        load_pretrained(path)
    message = str(caught.value)
    assert not trace.exists()
    assert f"{path}: refused" in message
    assert "io.open" in message
    assert "nothing in it was run" in message
    assert "safetensors.torch.save_file" in message
    assert "weights_only" not in message


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("stage_channels", [64, 64, 128, 10**9], "stage_channels: the configuration asks for"),
        ("stage_blocks", [1, 2, 1, 10**9], "stage_blocks: the configuration asks for"),
        ("num_layers", 10**9, "num_layers: the configuration asks for 1000000000"),
        ("stage_channels", [8, 8, 16, 64], "Other shapes"),
        ("num_heads", 10**9, "stage_channels"),
        ("num_layers", 2, r"Missing \("),
        ("num_heads", "2", "num_heads: expected an int"),
        ("num_heads", True, "num_heads: expected an int"),
        ("stage_blocks", {"a": 1}, "stage_blocks: expected 4 numbers"),
        ("threshold", 10**400, "config.json: "),
        ("temperature", None, "temperature: expected a number"),
        ("__class__", "os.system", "Unknown configuration field"),
    ],
)
def test_configurations_with_hostile_fields(folder, field, value, text):
    edit_config(folder, lambda fields: fields["config"].update({field: value}))
    with pytest.raises((ValueError, TypeError), match=text) as caught:
        load_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("weights", "../../etc/passwd", "weights: expected model.safetensors or model.ckpt"),
        ("weights", ["model.ckpt"], "weights: expected"),
        ("version", 2, "version: expected 1, got 2; a newer eloftr_ops may read this file"),
        ("config", [1], "config: expected an object"),
        ("auto_map", {"AutoModel": "code.py"}, "unknown field.* auto_map"),
        ("format", "other", 'expected "format": "eloftr_ops" or "model_type": "efficientloftr"'),
        ("format", {}, "not EfficientLoFTR weights"),
    ],
)
def test_configuration_files_with_hostile_headers(folder, field, value, text):
    edit_config(folder, lambda fields: fields.update({field: value}))
    with pytest.raises(ValueError, match=text):
        load_pretrained(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        "{",
        '{"a": NaN}',
        '{"a": 1e999}',
        '{"a": ' + "9" * 5000 + "}",
        " " * (JSON_LIMIT + 1),
    ],
    ids=["empty", "list", "deep", "open", "nan", "infinite", "long number", "large"],
)
def test_configuration_files_that_are_none(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json: expected"):
        load_pretrained(folder)


def test_metadata_of_a_safetensors_file_is_checked_too(tmp_path):
    state = authors_state()
    path = tmp_path / "weights.safetensors"
    for metadata, text in (
        ({"format": "eloftr_ops", "version": "1"}, "config: expected a JSON object"),
        ({"format": "eloftr_ops", "version": "9", "config": "{}"}, "version: expected 1, got '9'"),
        ({"format": "eloftr_ops", "version": "1", "config": '{"depth": 3}'}, "Unknown configuration field"),
    ):
        safetensors.torch.save_file(state, path, metadata)
        with pytest.raises(ValueError, match=text):
            load_pretrained(path)


# things that are not there


def test_an_unknown_name_lists_the_known_ones(tmp_path, monkeypatch):
    from eloftr_ops.weights import loading

    write_embedded(tiny_model(), tmp_path / "first.safetensors")
    write_embedded(tiny_model(), tmp_path / "second.safetensors")
    monkeypatch.setattr(loading.resources, "files", lambda package: tmp_path)
    with pytest.raises(WeightsNotFoundError, match=r"embedded weights \(first, second\), a file,.* got 'large'"):
        load_pretrained("large")


@pytest.mark.parametrize("name", ["missing.ckpt", "weights/missing.ckpt", "./missing/folder", "/no/such/folder"])
def test_missing_files_are_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match="check the spelling and the path"):
        load_pretrained(name)


def test_folders_that_lack_a_file(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsNotFoundError, match=r"model.safetensors: expected a file of weights, found none"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(WeightsNotFoundError, match=r"expected config.json beside the weights"):
        load_pretrained(folder)


# arguments


def test_arguments_of_another_type(folder, tmp_path):
    for arguments, text in (
        ({"name_or_path": 3}, "name_or_path: expected a name or a path, got int"),
        ({"name_or_path": folder, "dtype": torch.int8}, "dtype: expected one of torch.float16"),
        ({"name_or_path": folder, "config": {}}, "config: expected an EfficientLoFTRConfig, got dict"),
        ({"name_or_path": folder, "threshold": "high"}, "threshold: expected a number"),
    ):
        with pytest.raises(TypeError, match=text):
            load_pretrained(**arguments)
    with pytest.raises(TypeError, match="model: expected an EfficientLoFTR, got Linear"):
        save_pretrained(torch.nn.Linear(1, 1), tmp_path / "out")
    with pytest.raises(TypeError, match="metadata: expected text by name"):
        write_embedded(tiny_model(), tmp_path / "out.safetensors", metadata={"steps": 3})


def test_arguments_out_of_their_domain(folder, tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="threshold: expected a probability"):
        load_pretrained(folder, threshold=2.0)
    with pytest.raises(ValueError, match="layout: expected one of eloftr_ops, authors, transformers, got 'onnx'"):
        model.save_pretrained(tmp_path / "out", layout="onnx")
    with pytest.raises(ValueError, match="folder: expected a folder"):
        model.save_pretrained(folder / "config.json")
    with pytest.raises(ValueError, match=r"a name that ends in .safetensors"):
        write_embedded(model, tmp_path / "small.bin")
    with pytest.raises(ValueError, match="metadata: expected other names than"):
        write_embedded(model, tmp_path / "out.safetensors", metadata={"config": "{}"})
    (tmp_path / "weights.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"file name that ends in one of .safetensors, .ckpt"):
        load_pretrained(tmp_path / "weights.onnx")
